"""What a run would need: memory, FLOPs and time, estimated without a GPU and without that memory.

It may import kernels, mclr, models, configs, and of train: scoring and the rooms below it.
"""
