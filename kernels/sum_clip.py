"""EDM2's weighted sum of two branches and the clip after it, fused.

    clip(((1 - t) a + t b) / sqrt((1 - t)^2 + t^2), -clip, clip)            (Eq. 88 of Karras et al. 2024, arXiv 2312.02696)

R rows; N channels; H W image.
"""

import math
from typing import Any

import torch
from torch import Tensor

from mclr.kernels.choice import runs_triton
from mclr.kernels.magnitude import SIZES, dense, draw_activation, empty, layout, mp_sum
from mclr.kernels.op import Op, Shape, cdiv, fit, floats, jit, launch, power_of_2, refuse, tl


def definition(a_RNHW: Tensor, b_RNHW: Tensor, t: float, clip: float) -> Tensor:
    return mp_sum(a_RNHW, b_RNHW, t).clip(-clip, clip)


class _SumClipInTorch(torch.autograd.Function):
    """Forward and backward in few passes: one mask for the clip, and both gradients are the upstream times constants."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, t: float, clip: float) -> Tensor:
        ctx.clip, ctx.shares = clip, _shares(t)
        total = a.lerp(b, t).div_(math.hypot(1 - t, t))
        if clip == math.inf:
            return total
        ctx.save_for_backward(total)
        return total.clip(-clip, clip)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        if ctx.clip < math.inf:
            (total,) = ctx.saved_tensors
            # hardtanh's gradient is 0 at its ends too, so its ends are the next numbers of the dtype beyond +-clip
            ulp = torch.finfo(total.dtype).eps * 2.0 ** (math.frexp(ctx.clip)[1] - 1)
            end = (round(ctx.clip / ulp) + 1) * ulp
            upstream = torch.ops.aten.hardtanh_backward(upstream, total, -end, end)
        share_a, share_b = ctx.shares
        return upstream * share_a, upstream * share_b, None, None


@jit
def _forward(a_ptr, b_ptr, out_ptr, inside_ptr, share_a, share_b, clip, total, CLIPS: tl.constexpr, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + element, mask=element < total, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + element, mask=element < total, other=0.0).to(tl.float32)
    out = share_a * a + share_b * b
    if CLIPS:
        tl.store(inside_ptr + element, tl.abs(out) <= clip, mask=element < total)
        # minimum and maximum would hide a NaN
        out = tl.where(out > clip, clip, tl.where(out < -clip, -clip, out))
    tl.store(out_ptr + element, out.to(out_ptr.dtype.element_ty), mask=element < total)


@jit
def _backward(upstream_ptr, inside_ptr, da_ptr, db_ptr, share_a, share_b, total, CLIPS: tl.constexpr, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    upstream = tl.load(upstream_ptr + element, mask=element < total, other=0.0).to(tl.float32)
    if CLIPS:
        inside = tl.load(inside_ptr + element, mask=element < total, other=0)
        upstream = tl.where(inside != 0, upstream, 0.0)
    tl.store(da_ptr + element, (share_a * upstream).to(da_ptr.dtype.element_ty), mask=element < total)
    tl.store(db_ptr + element, (share_b * upstream).to(db_ptr.dtype.element_ty), mask=element < total)


def _shares(t: float) -> tuple[float, float]:
    """The factors of a and b."""
    norm = math.hypot(1 - t, t)
    return (1 - t) / norm, t / norm


@torch.library.custom_op("mclr::sum_clip", mutates_args=())
def _run(a: Tensor, b: Tensor, t: float, clip: float) -> tuple[Tensor, Tensor]:
    a, b = dense(a), dense(b, like=a)
    out, inside = _results(a, b, t, clip)
    block = power_of_2(a.numel(), most=2048)
    given = (a, b, out, inside, *_shares(t), clip, a.numel())
    launch(_forward, (cdiv(a.numel(), block),), *given, CLIPS=clip < math.inf, BLOCK=block, warps=8)
    return out, inside


@_run.register_fake
def _results(a, b, t, clip):
    return empty(a), empty(a, torch.bool) if clip < math.inf else a.new_empty(0, dtype=torch.bool)


@torch.library.custom_op("mclr::sum_clip_backward", mutates_args=())
def _gradient(upstream: Tensor, inside: Tensor, t: float, clip: float) -> tuple[Tensor, Tensor]:
    clips = clip < math.inf
    upstream = dense(upstream, like=inside if clips else upstream)
    da, db = empty(upstream), empty(upstream)
    block = power_of_2(upstream.numel(), most=2048)
    given = (upstream, inside, da, db, *_shares(t), upstream.numel())
    launch(_backward, (cdiv(upstream.numel(), block),), *given, CLIPS=clips, BLOCK=block, warps=8)
    return da, db


@_gradient.register_fake
def _(upstream, inside, t, clip):
    like = layout(inside if clip < math.inf else upstream)
    return tuple(torch.empty_like(upstream, memory_format=like) for _ in range(2))


def _save(ctx, inputs, output):
    # saved: one byte per element; nothing if clip is inf
    _, _, ctx.t, ctx.clip = inputs
    ctx.save_for_backward(output[1])


def _derive(ctx, upstream, _):
    return *_gradient(upstream, *ctx.saved_tensors, ctx.t, ctx.clip), None, None


_run.register_autograd(_derive, setup_context=_save)


def sum_clip(a_RNHW: Tensor, b_RNHW: Tensor, t: float, clip: float) -> Tensor:
    """(1 - t) a + t b at the magnitude of independent inputs, clipped to +-clip (inf: no clip), in a's dtype and layout.

    a and b: fp32, fp16 or bf16, both the same. The gradient is 0 where the sum was clipped; at exactly +-clip it passes. NaN stays NaN.
    Raises ValueError that names the argument that does not fit.
    """
    triton = runs_triton("sum_clip", a_RNHW)
    fit(floats(triton), a=(a_RNHW, "RNHW"))
    fit((a_RNHW.dtype,), a=(a_RNHW, "RNHW"), b=(b_RNHW, "RNHW"))
    if not 0 <= t <= 1:
        refuse("t", f"{t} is not in [0, 1]")
    if not clip > 0:
        refuse("clip", f"{clip} is not above 0")
    return _run(a_RNHW, b_RNHW, t, clip)[0] if triton else _SumClipInTorch.apply(a_RNHW, b_RNHW, t, clip)


def draw(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict:
    a, b = (draw_activation(shape, dtype, generator) for _ in range(2))
    # set elements near the clip to 0: rounding would decide whether they are clipped
    with torch.no_grad():
        near = ((0.7 * a.double() + 0.3 * b.double()) / math.hypot(0.7, 0.3)).abs().sub(1.5).abs() < 0.02
        a[near] = b[near] = 0
    return {"a_RNHW": a, "b_RNHW": b, "t": 0.3, "clip": 1.5}


OP = Op("sum_clip", sum_clip, definition, draw, rereads=False, **SIZES)
