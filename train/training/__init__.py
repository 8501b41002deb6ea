"""A training run: what it is made of, its steps, its loop, its logs.

It may import kernels, mclr, models, configs, and of train: system, weights, data, engine.
"""
