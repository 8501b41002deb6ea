"""Magnitude-preserving building blocks: unit-variance inputs give unit-variance outputs (Karras et al. 2024, arXiv 2312.02696).

Equations are that paper's. Weights and statistics are computed in fp32 whatever the dtype of the activations.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-4  # beside every RMS; not a mere guard: published weights were trained with it and answer differently without


def normalize(x: Tensor, dim: int | None = None) -> Tensor:
    """x / (1e-4 + rms(x)), in x's dtype; the RMS over `dim` (Eq. 30, pixel norm), or over all but the first (Eq. 47, a weight).

    As a projection of stored weights onto unit magnitude this is forced weight normalisation (Eq. 66); the trainer applies it.
    """
    over = tuple(range(1, x.ndim)) if dim is None else (dim,)
    # Of a norm the gradient is finite at x = 0, of sqrt(mean(x^2)) it is not.
    norm = torch.linalg.vector_norm(x, dim=over, keepdim=True, dtype=torch.float32)
    rms = norm * math.sqrt(norm.numel() / x.numel())
    return x / (EPS + rms).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU over .596, the RMS of its output for unit normal inputs (Eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Interpolate from a to b and keep the variance of independent inputs (Eq. 88)."""
    return a.lerp(b, t) / math.hypot(1 - t, t)


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
    """Bias-free convolution (linear where `kernel` is 0) whose used weight has rows of norm 1 (Eq. 47), times an optional gain.

    The stored weight is never written in training: normalising it as well, after every optimizer step, is the trainer's part.
    folded: the stored weight is the used one, gain included.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int = 0):
        super().__init__()
        shape = (channels_out, channels_in, kernel, kernel) if kernel else (channels_out, channels_in)
        self.weight = nn.Parameter(torch.empty(shape).normal_())
        self.folded = False

    def used_weight(self, gain: Tensor | float = 1.0) -> Tensor:
        """What the input is multiplied by, fp32."""
        fan_in = self.weight[0].numel()
        return normalize(self.weight.float()) * (gain / math.sqrt(fan_in))

    @torch.no_grad()
    def fold(self, gain: Tensor | float = 1.0) -> None:
        """Store the used weight under this gain, once and for all: no forward computes it again, and each ignores its gain."""
        self.weight.copy_(self.used_weight(gain))
        self.folded = True

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """[R, in] -> [R, out], or [R, in, H, W] -> [R, out, H, W], in x's dtype."""
        weight = (self.weight if self.folded else self.used_weight(gain)).to(x.dtype)
        return F.conv2d(x, weight, padding="same") if weight.ndim == 4 else F.linear(x, weight)
