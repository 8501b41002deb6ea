"""The tour: it compares fine-tuning with guidance, and reports.

It may import kernels, mclr, models, configs, and of train: planning, bench and the rooms below them.
"""
