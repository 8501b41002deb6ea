"""EDM2's magnitude-preserving functions in plain torch, and what its fused activations share: layouts, tiles, sizes.

    normalize:  x / (1e-4 + rms(x))                                        (Eq. 30, 47, 66)
    mp_silu:    silu(x) / .596                                             (Eq. 81)
    mp_sum:     ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)                  (Eq. 88)

Equations are those of Karras et al. 2024, arXiv 2312.02696. The fused activations are norm_silu.py, scale_silu.py and sum_clip.py.

R rows; N channels; H W image; P = H W pixels, neighbours in NCHW, N apart in channels_last.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mclr.kernels.op import Shape, jit, power_of_2, tl, wide

EPS = 1e-4  # added to every RMS; published weights were trained with it
SILU = 0.596  # RMS of silu(x) for unit normal x


class _Normalize(torch.autograd.Function):
    """Normalisation with its own backward (derived), which reads memory 4 times; autograd would read it 10 times.

    It sums squares itself: torch's norm is slow on a CPU for few or strided elements.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, over: tuple[int, ...]) -> Tensor:
        total = x.to(wide(x)).square().sum(over, keepdim=True)
        count = x.numel() // total.numel()
        rms = (total / count).sqrt_()
        inverse = (EPS + rms).reciprocal_()
        n = x * inverse.to(x.dtype)
        ctx.save_for_backward(n, rms, inverse)
        ctx.over, ctx.count = over, count
        return n

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        n, rms, inverse = ctx.saved_tensors
        along = (upstream * n).sum(ctx.over, keepdim=True, dtype=rms.dtype) / ctx.count
        # where rms is 0, along is 0 too
        shift = along / (inverse * rms.clamp_min(torch.finfo(rms.dtype).tiny))
        return torch.addcmul(upstream, n, shift.to(n.dtype), value=-1).mul_(inverse.to(n.dtype)), None


def normalize(x: Tensor, dim: int | None = None) -> Tensor:
    """x / (1e-4 + rms(x)), in x's dtype. The RMS is over `dim` (pixel norm, Eq. 30), or over all but the first (a weight, Eq. 47).

    Of stored weights it is forced weight normalisation (Eq. 66), which the trainer does. The gradient is finite at x = 0.
    """
    return _Normalize.apply(x, tuple(range(1, x.ndim)) if dim is None else (dim,))


def mp_silu(x: Tensor) -> Tensor:
    """SiLU, divided by .596, the RMS of its output for unit normal inputs (Eq. 81)."""
    # in place, since the gradient of SiLU needs its input alone
    return F.silu(x).div_(SILU)


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Interpolate from a to b; the variance of independent inputs stays (Eq. 88)."""
    return a.lerp(b, t) / math.hypot(1 - t, t)


def layout(x: Tensor) -> torch.memory_format:
    """channels_last if x has that layout alone; NCHW for all other strides."""
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """x without gaps in memory, in the layout of `like`, or its own."""
    return x.contiguous(memory_format=layout(x if like is None else like))


def empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a result of x's shape, in x's layout, without gaps."""
    return torch.empty_like(x, dtype=dtype, memory_format=layout(x))


def planes(x: Tensor) -> tuple[int, int, int, int]:
    """(N channels, P pixels, their strides in elements) of a dense tensor."""
    N, P = x.shape[1], x.shape[2] * x.shape[3]
    return (N, P, 1, N) if layout(x) == torch.channels_last else (N, P, P, 1)


def blocks(x: Tensor, elements: int, channels: int, pixels: int) -> dict[str, int]:
    """BLOCK_N and BLOCK_P of a kernel that handles this many elements at a time, in the order of memory.

    channels: most of them in channels_last. pixels: most of them in NCHW.
    """
    N, P, stride_n, _ = planes(x)
    if stride_n == 1:
        block_n = power_of_2(N, most=channels)
        return {"BLOCK_N": block_n, "BLOCK_P": power_of_2(P, most=elements // block_n)}
    block_p = power_of_2(P, most=pixels)
    return {"BLOCK_N": power_of_2(N, most=elements // block_p), "BLOCK_P": block_p}


@jit
def silu(h):
    """(silu(h) / .596, its derivative)."""
    sigmoid = 1.0 / (1.0 + tl.exp(-h))
    return h * sigmoid / 0.596, sigmoid * (1.0 + h * (1.0 - sigmoid)) / 0.596


@jit
def tile(first, pixel, N, P, stride_n, stride_p, BLOCK_N: tl.constexpr):
    """(offsets within a row, mask of those inside) of BLOCK_N channels from `first` on, at these pixels."""
    channel = first + tl.arange(0, BLOCK_N)
    return channel[:, None] * stride_n + pixel[None, :] * stride_p, (channel < N)[:, None] & (pixel < P)[None, :]


def draw_activation(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    x = torch.randn(shape["R"], shape["N"], shape["H"], shape["W"], generator=generator).to(dtype)
    return x.contiguous(memory_format=torch.channels_last if shape["last"] else torch.contiguous_format).requires_grad_()


# channels_last, as in the network
SHAPES = {
    f"{net}, {size} px, {pairs} pairs": {"R": 2 * pairs, "N": width, "H": size, "W": size, "last": 1}
    for net, size, width in (
        ("edm2-img64-s", 64, 192),
        ("edm2-img64-s", 16, 576),
        ("edm2-img512-l", 64, 320),
        ("edm2-img512-l", 16, 960),
    )
    for pairs in (8, 32)
}
TINY = {
    "odd sizes": {"R": 3, "N": 5, "H": 3, "W": 7, "last": 0},
    "channels_last": {"R": 2, "N": 6, "H": 5, "W": 3, "last": 1},
    "two channels": {"R": 2, "N": 2, "H": 3, "W": 2, "last": 0},
    "one pixel": {"R": 2, "N": 7, "H": 1, "W": 1, "last": 0},
    "several blocks": {"R": 1, "N": 300, "H": 5, "W": 7, "last": 0},
    "several blocks, channels_last": {"R": 1, "N": 1100, "H": 3, "W": 3, "last": 1},
}
SIZES: dict[str, Any] = {"shapes": SHAPES, "tiny": TINY, "narrow": {"R": 1}}
