"""Scoring samples: extractors of features, readers of images, statistics, scores.

It may import kernels, mclr, models, configs, and of train: sampling and the rooms below it.
"""
