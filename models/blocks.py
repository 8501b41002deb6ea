"""Building blocks of networks: two helpers for all, the residual stream of transformers, EDM2's layers that preserve magnitude.

Such a layer gives outputs of unit variance for inputs of unit variance. Equations are those of Karras et al. 2024 (arXiv 2312.02696);
normalize, mp_silu and mp_sum are in kernels/magnitude.py. Weights and statistics are fp32, whatever the dtype of the activations.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mclr.kernels.modulated_norm import modulated_norm
from mclr.kernels.weight_norm import used_weights


def trunk_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the matrix products: that of an enclosing torch.autocast, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def running(activation_checkpointing: bool) -> Callable[..., Any]:
    """A function run(block, *inputs). With activation checkpointing, backward computes the activations inside a block again."""
    if activation_checkpointing and torch.is_grad_enabled():
        return partial(checkpoint, use_reentrant=False)
    return lambda block, *inputs: block(*inputs)


class Stream(NamedTuple):
    """The residual stream, with a sum x + gate y that the next norm will compute.

    x: [R, l, D], fp32. In the first block all rows of a sample share x: then it is [B, l, D], index_R says the sample of each row, and
    first_RD is each row's own token 0.
    """

    x: Tensor
    index_R: Tensor | None = None
    first_RD: Tensor | None = None
    y_RlD: Tensor | None = None
    gate_RD: Tensor | None = None

    def norm(self, scale_RD: Tensor, shift_RD: Tensor, eps: float, dtype: torch.dtype) -> tuple["Stream", Tensor]:
        """(the stream, its tokens normalised, scaled and shifted, [R, l, D] in `dtype`)."""
        x, *added = self
        x_RlD, h_RlD = modulated_norm(x, scale_RD, shift_RD, eps, dtype, *added)
        return self if x_RlD is None else Stream(x_RlD), h_RlD


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Concatenate [R, n_a, ...] and [R, n_b, ...] along the channels; b contributes the share t, whatever the widths (Eq. 103)."""
    n_a, n_b = a.shape[1], b.shape[1]
    scale = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1 - t) / math.sqrt(n_a)), b * (scale * t / math.sqrt(n_b))], dim=1)


class MPFourier(nn.Module):
    """Random cosine features of a number, of unit variance: [R] -> [R, channels], fp32 (Eq. 75). Frequencies and phases stay fixed."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", torch.empty(channels).normal_(std=2 * math.pi))
        self.register_buffer("phases", torch.empty(channels).uniform_(0, 2 * math.pi))

    def forward(self, value_R: Tensor) -> Tensor:
        return math.sqrt(2) * torch.cos(value_R[:, None].float() * self.freqs.float() + self.phases.float())


class MPConv(nn.Module):
    """Convolution without bias, or linear layer (kernel 0), that computes with a weight whose rows have norm 1 (Eq. 47).

    The layer leaves its stored weight as it is. Training also normalises the stored weight, after every step of the optimizer.
    used: the weight to compute with, where the block has made it already. folded: the stored weight is the one to compute with.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int = 0):
        super().__init__()
        shape = (channels_out, channels_in, kernel, kernel) if kernel else (channels_out, channels_in)
        self.weight = nn.Parameter(torch.empty(shape).normal_())
        self.used: Tensor | None = None
        self.folded = False

    @torch.no_grad()
    def fold(self) -> None:
        """Replace the stored weight by the one to compute with, so that no forward computes it again. There is no way back."""
        (used,) = used_weights([self.weight], self.weight.dtype)
        self.weight.data = used if used.ndim == 2 else used.contiguous(memory_format=torch.channels_last)
        self.folded = True

    def forward(self, x: Tensor) -> Tensor:
        """[R, in] -> [R, out], or [R, in, H, W] -> [R, out, H, W], in x's dtype."""
        weight = self.weight.to(x.dtype) if self.folded else self.used
        if weight is None:
            (weight,) = used_weights([self.weight], x.dtype)
        if weight.ndim == 2:
            return F.linear(x, weight)
        return F.conv2d(x, weight.contiguous(memory_format=torch.channels_last), padding="same")
