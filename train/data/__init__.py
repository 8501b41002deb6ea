"""Training samples: dataset folders, streams, encoders, and caches of what encoders store.

It may import kernels, mclr, models, configs, and of train: system, weights.
"""
