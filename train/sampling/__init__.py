"""Images from a run or from weights, and the folder that they are written to.

It may import kernels, mclr, models, configs, and of train: training and the rooms below it.
"""
