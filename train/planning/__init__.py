"""What a run would take: memory, FLOPs and speed, without a GPU and without memory.

It may import kernels, mclr, models, configs, and of train: scoring and the rooms below it.
"""
