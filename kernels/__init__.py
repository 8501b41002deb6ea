"""Fused operations for the paired forward pass; torch and triton alone."""

import sys

if __name__ == "kernels":
    # `python -m kernels.X` in a checkout: go on under the one name that every file has
    import mclr.kernels

    sys.modules["kernels"] = mclr.kernels
