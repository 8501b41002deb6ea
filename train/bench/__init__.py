"""Benches: whole steps, ranks, reading data.

It may import kernels, mclr, models, configs, and of train: scoring and the rooms below it.
"""
