"""The tour, and what objectives are compared with.

It may import kernels, mclr, models, configs, and of train: planning, bench and the rooms below them.
"""
