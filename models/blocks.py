"""What networks are built of: trunk_dtype and running for all; the rest preserves magnitude, so that inputs of unit variance give such
outputs (Karras et al. 2024, arXiv 2312.02696).

Equations are that paper's; normalize, mp_silu and mp_sum are in kernels/magnitude.py. Weights and statistics are computed in fp32
whatever the dtype of the activations.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mclr.kernels.weight_norm import used_weights


def trunk_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the matrix products: the one that an enclosing torch.autocast announces, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def running(activation_checkpointing: bool) -> Callable[..., Any]:
    """How a network runs its blocks: run(block, *inputs). Checkpointed, backward computes the activations inside a block again."""
    if activation_checkpointing and torch.is_grad_enabled():
        return partial(checkpoint, use_reentrant=False)
    return lambda block, *inputs: block(*inputs)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Concatenate channels so that b contributes the share t whatever the widths (Eq. 103)."""
    n_a, n_b = a.shape[1], b.shape[1]
    scale = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1 - t) / math.sqrt(n_a)), b * (scale * t / math.sqrt(n_b))], dim=1)


class MPFourier(nn.Module):
    """A number into random cosine features of unit variance (Eq. 75): [R] -> [R, channels], fp32. Fixed after construction."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", torch.empty(channels).normal_(std=2 * math.pi))
        self.register_buffer("phases", torch.empty(channels).uniform_(0, 2 * math.pi))

    def forward(self, value_R: Tensor) -> Tensor:
        return math.sqrt(2) * torch.cos(value_R[:, None].float() * self.freqs.float() + self.phases.float())


class MPConv(nn.Module):
    """Bias-free convolution (linear where `kernel` is 0) whose used weight has rows of norm 1 (Eq. 47).

    The stored weight is never written in training: normalising it as well, after every optimizer step, is the trainer's part.
    used: the used weight, where somebody made it already. folded: the stored weight is the used one.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int = 0):
        super().__init__()
        shape = (channels_out, channels_in, kernel, kernel) if kernel else (channels_out, channels_in)
        self.weight = nn.Parameter(torch.empty(shape).normal_())
        self.used: Tensor | None = None
        self.folded = False

    @torch.no_grad()
    def fold(self) -> None:
        """Store the used weight, once and for all: no forward computes it again."""
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
