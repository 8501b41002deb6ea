"""Weights on disk: folders, model cards, published files of others, and the reader that never runs their code.

It may import kernels, mclr, models, configs, and of train: system.
"""
