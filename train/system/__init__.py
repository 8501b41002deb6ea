"""What every program stands on: files that appear whole, ranks, signs of life, GPUs, the hub.

It may import kernels, mclr, models, configs, and of train: no other room of train/.
"""
