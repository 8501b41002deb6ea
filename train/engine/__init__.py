"""What carries a network through optimisation: engines, averages of weights, checkpoints.

It may import kernels, mclr, models, configs, and of train: system, weights, data.
"""
