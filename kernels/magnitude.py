"""EDM2's magnitude-preserving operations on activations, fused: pixel norm with SiLU, modulation with SiLU, weighted sum with a clip.

    norm_silu:   n = x / (1e-4 + rms of x over the channels) (Eq. 30),  s = silu(n) / .596 (Eq. 81)
    scale_silu:  silu(scale x) / .596, one scale per row and channel
    sum_clip:    clip(((1 - t) a + t b) / sqrt((1 - t)^2 + t^2), -clip, clip) (Eq. 88)

Equations are those of Karras et al. 2024, arXiv 2312.02696. Backward, derived: with m = 1e-4 + rms, u = dn + ds silu'(n) / .596 and
N channels, dx = (u - x (sum u x) / (N rms m)) / m; where x = 0 the norm has no direction and dx = u / m.

Bytes per element in bf16, forward + backward: norm_silu 6 + 8 (and 4 per pixel for the rms), scale_silu 4 + 6, sum_clip 7 + 7 (one of
them says whether the element was clipped). Every operation reads each input once from memory: where channels are gone through twice,
the second time runs backwards, so that what was read last is still in the cache. Floor in us at an H200's 4.3 TB/s, forward +
backward:

                                 norm_silu    scale_silu       sum_clip
    edm2-img64-s, 64 px, 32      70 + 94       47 + 70         82 + 82
    edm2-img64-s, 16 px, 32      13 + 18        9 + 13         15 + 15
    edm2-img512-l, 64 px, 32    117 + 156      78 + 117       137 + 137
    edm2-img512-l, 16 px, 32     22 + 29       15 + 22         26 + 26

and a quarter of that for 8 pairs. Rows do not meet here: a pair costs what two separate rows cost.

R rows; N channels; H W image; P = H W pixels, neighbours in NCHW, N apart in channels_last; results keep the layout of the input.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mclr.kernels.choice import runs_triton
from mclr.kernels.op import Cost, Op, Shape, cdiv, floats, jit, launch, power_of_2, refuse, refuse_unlike, tl, wide

EPS = 1e-4  # beside every RMS; not a mere guard: published weights were trained with it and answer differently without
SILU = 0.596  # RMS of silu(x) for unit normal x


class _Normalize(torch.autograd.Function):
    """The derived backward takes 4 passes, autograd 10; norms over few or strided elements are slow on a CPU, sums are not."""

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
        # along is 0 where rms is
        shift = along / (inverse * rms.clamp_min(torch.finfo(rms.dtype).tiny))
        return torch.addcmul(upstream, n, shift.to(n.dtype), value=-1).mul_(inverse.to(n.dtype)), None


def normalize(x: Tensor, dim: int | None = None) -> Tensor:
    """x / (1e-4 + rms(x)), in x's dtype; the RMS over `dim` (Eq. 30, pixel norm), or over all but the first (Eq. 47, a weight).

    As a projection of stored weights onto unit magnitude this is forced weight normalisation (Eq. 66); the trainer applies it. The
    gradient is finite at x = 0.
    """
    return _Normalize.apply(x, tuple(range(1, x.ndim)) if dim is None else (dim,))


def mp_silu(x: Tensor) -> Tensor:
    """SiLU over .596, the RMS of its output for unit normal inputs (Eq. 81)."""
    # in place: the gradient of SiLU needs its input alone
    return F.silu(x).div_(SILU)


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Interpolate from a to b and keep the variance of independent inputs (Eq. 88)."""
    return a.lerp(b, t) / math.hypot(1 - t, t)


def layout(x: Tensor) -> torch.memory_format:
    """channels_last where x is that and not NCHW at once; NCHW for all other strides."""
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _planes(x: Tensor) -> dict[str, int]:
    """Sizes and strides by which kernels walk over a tensor of this layout."""
    N, P = x.shape[1], x.shape[2] * x.shape[3]
    stride_n, stride_p = (1, N) if layout(x) == torch.channels_last else (P, 1)
    return {"N": N, "P": P, "stride_n": stride_n, "stride_p": stride_p}


@jit
def _silu(h):
    """(silu(h) / .596, its derivative)."""
    sigmoid = 1.0 / (1.0 + tl.exp(-h))
    return h * sigmoid / 0.596, sigmoid * (1.0 + h * (1.0 - sigmoid)) / 0.596


@jit
def _tile(first, pixel, N, P, stride_n, stride_p, BLOCK_N: tl.constexpr):
    """(places in a row, whether they are inside) of BLOCK_N channels from `first`, at these pixels."""
    channel = first + tl.arange(0, BLOCK_N)
    return channel[:, None] * stride_n + pixel[None, :] * stride_p, (channel < N)[:, None] & (pixel < P)[None, :]


# --- norm_silu ---


def norm_silu_definition(x_RNHW: Tensor) -> tuple[Tensor, Tensor]:
    n_RNHW = x_RNHW / (EPS + x_RNHW.square().mean(1, keepdim=True).sqrt())
    return n_RNHW, F.silu(n_RNHW) / SILU


@jit
def _norm_silu_forward(x_ptr, n_ptr, s_ptr, rms_ptr, eps, N, P, stride_n, stride_p, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    start = row * N * P
    blocks = tl.cdiv(N, BLOCK_N)
    total = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    for block in range(blocks):
        place, inside = _tile(block * BLOCK_N, pixel, N, P, stride_n, stride_p, BLOCK_N)
        x = tl.load(x_ptr + start + place, mask=inside, other=0.0).to(tl.float32)
        total += x * x
    rms = tl.sqrt(tl.sum(total, axis=0) / N)
    tl.store(rms_ptr + row * P + pixel, rms, mask=pixel < P)
    for block in range(blocks):
        place, inside = _tile((blocks - 1 - block) * BLOCK_N, pixel, N, P, stride_n, stride_p, BLOCK_N)
        x = tl.load(x_ptr + start + place, mask=inside, other=0.0).to(tl.float32)
        n = x / (eps + rms)[None, :]
        s, _ = _silu(n)
        tl.store(n_ptr + start + place, n.to(n_ptr.dtype.element_ty), mask=inside)
        tl.store(s_ptr + start + place, s.to(s_ptr.dtype.element_ty), mask=inside)


@jit
def _norm_silu_upstream(x_ptr, dn_ptr, ds_ptr, place, inside, m):
    """(x, u) at some places, fp32."""
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    dn = tl.load(dn_ptr + place, mask=inside, other=0.0).to(tl.float32)
    ds = tl.load(ds_ptr + place, mask=inside, other=0.0).to(tl.float32)
    _, slope = _silu(x / m[None, :])
    return x, dn + ds * slope


@jit
def _norm_silu_backward(
    x_ptr, rms_ptr, dn_ptr, ds_ptr, dx_ptr, eps, N, P, stride_n, stride_p, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr
):
    row = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    start = row * N * P
    rms = tl.load(rms_ptr + row * P + pixel, mask=pixel < P, other=1.0)
    m = eps + rms
    blocks = tl.cdiv(N, BLOCK_N)
    total = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    for block in range(blocks):
        place, inside = _tile(block * BLOCK_N, pixel, N, P, stride_n, stride_p, BLOCK_N)
        x, u = _norm_silu_upstream(x_ptr, dn_ptr, ds_ptr, start + place, inside, m)
        total += x * u
    # where the rms is 0 so is the sum
    shift = tl.sum(total, axis=0) / tl.maximum(N * rms * m, 1e-30)
    for block in range(blocks):
        place, inside = _tile((blocks - 1 - block) * BLOCK_N, pixel, N, P, stride_n, stride_p, BLOCK_N)
        x, u = _norm_silu_upstream(x_ptr, dn_ptr, ds_ptr, start + place, inside, m)
        dx = (u - x * shift[None, :]) / m[None, :]
        tl.store(dx_ptr + start + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def _norm_silu_blocks(N: int, P: int, stride_n: int, stride_p: int) -> dict[str, int]:
    """2048 elements at a time: of whole pixels in channels_last; in NCHW of 64 pixels, fewer in small images, whose programs are few."""
    if stride_n == 1:
        block_n = power_of_2(N, most=1024)
        return {"BLOCK_N": block_n, "BLOCK_P": power_of_2(P, most=2048 // block_n)}
    block_p = power_of_2(P, most=power_of_2(P // 64, 16, 64))
    return {"BLOCK_N": power_of_2(N, most=2048 // block_p), "BLOCK_P": block_p}


@torch.library.custom_op("mclr::norm_silu", mutates_args=())
def _norm_silu(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous(memory_format=layout(x))
    n, s = torch.empty_like(x), torch.empty_like(x)
    rms = x.new_empty(len(x), *x.shape[2:], dtype=torch.float32)
    walk = _planes(x)
    blocks = _norm_silu_blocks(**walk)
    grid = (cdiv(walk["P"], blocks["BLOCK_P"]), len(x))
    launch(_norm_silu_forward, grid, x, n, s, rms, EPS, *walk.values(), **blocks, warps=8)
    return n, s, rms


@_norm_silu.register_fake
def _(x):
    n = torch.empty_like(x, memory_format=layout(x))
    return n, torch.empty_like(n), x.new_empty(len(x), *x.shape[2:], dtype=torch.float32)


@torch.library.custom_op("mclr::norm_silu_backward", mutates_args=())
def _norm_silu_gradient(x: Tensor, rms: Tensor, dn: Tensor, ds: Tensor) -> Tensor:
    x, dn, ds = (each.contiguous(memory_format=layout(x)) for each in (x, dn, ds))
    dx = torch.empty_like(x)
    walk = _planes(x)
    blocks = _norm_silu_blocks(**walk)
    grid = (cdiv(walk["P"], blocks["BLOCK_P"]), len(x))
    launch(_norm_silu_backward, grid, x, rms, dn, ds, dx, EPS, *walk.values(), **blocks, warps=8)
    return dx


@_norm_silu_gradient.register_fake
def _(x, rms, dn, ds):
    return torch.empty_like(x, memory_format=layout(x))


def _norm_silu_save(ctx, inputs, output):
    # the input, which is the clipped sum of the block before that already keeps it, and one number per pixel
    ctx.save_for_backward(inputs[0], output[2])
    ctx.mark_non_differentiable(output[2])


def _norm_silu_derive(ctx, dn, ds, _):
    return _norm_silu_gradient(*ctx.saved_tensors, dn, ds)


_norm_silu.register_autograd(_norm_silu_derive, setup_context=_norm_silu_save)


def norm_silu(x_RNHW: Tensor) -> tuple[Tensor, Tensor]:
    """(x over its RMS across channels, SiLU of that at unit magnitude), both in x's dtype and layout.

    x: fp32, fp16 or bf16. Raises ValueError where it does not fit.
    """
    triton = runs_triton("norm_silu", x_RNHW)
    _refuse_activations({"x": x_RNHW}, triton)
    if not triton:
        n_RNHW = normalize(x_RNHW, dim=1)
        return n_RNHW, mp_silu(n_RNHW)
    n_RNHW, s_RNHW, _ = _norm_silu(x_RNHW)
    return n_RNHW, s_RNHW


def _refuse_activations(tensors: dict[str, Tensor], triton: bool) -> None:
    """Raises ValueError unless all have the first one's four dimensions, dtype and device."""
    first, x = next(iter(tensors.items()))
    if x.ndim != 4:
        refuse(first, f"{x.ndim} dimensions, not 4")
    accepted = floats(triton)
    if x.dtype not in accepted:
        refuse(first, f"dtype {x.dtype}, not one of {', '.join(map(str, accepted))}")
    refuse_unlike(tensors, dict.fromkeys(tensors, tuple(x.shape)), (x.dtype,))


# --- scale_silu ---


def scale_silu_definition(x_RNHW: Tensor, scale_RN: Tensor) -> Tensor:
    return mp_silu(x_RNHW * scale_RN[:, :, None, None])


@jit
def _scale_silu_forward(x_ptr, scale_ptr, out_ptr, N, P, stride_n, stride_p, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    row = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * BLOCK_N
    channel, pixel = first + tl.arange(0, BLOCK_N), tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    place, inside = _tile(first, pixel, N, P, stride_n, stride_p, BLOCK_N)
    scale = tl.load(scale_ptr + row * N + channel, mask=channel < N, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * N * P + place, mask=inside, other=0.0).to(tl.float32)
    out, _ = _silu(x * scale[:, None])
    tl.store(out_ptr + row * N * P + place, out.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _scale_silu_backward(
    x_ptr,
    scale_ptr,
    upstream_ptr,
    dx_ptr,
    part_ptr,
    N,
    P,
    stride_n,
    stride_p,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """part: sums over the pixels of one program, [R, programs along P, N]."""
    row = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * BLOCK_N
    channel, pixel = first + tl.arange(0, BLOCK_N), tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    place, inside = _tile(first, pixel, N, P, stride_n, stride_p, BLOCK_N)
    scale = tl.load(scale_ptr + row * N + channel, mask=channel < N, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * N * P + place, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(upstream_ptr + row * N * P + place, mask=inside, other=0.0).to(tl.float32)
    _, slope = _silu(x * scale[:, None])
    dh = upstream * slope
    tl.store(dx_ptr + row * N * P + place, (dh * scale[:, None]).to(dx_ptr.dtype.element_ty), mask=inside)
    part = (row * tl.num_programs(0) + tl.program_id(0)) * N + channel
    tl.store(part_ptr + part, tl.sum(dh * x, axis=1), mask=channel < N)


def _scale_silu_blocks(N: int, P: int, stride_n: int, stride_p: int) -> dict[str, int]:
    """4096 elements, 64 neighbours at a time."""
    if stride_n == 1:
        block_n = power_of_2(N, most=64)
        return {"BLOCK_N": block_n, "BLOCK_P": power_of_2(P, most=4096 // block_n)}
    block_p = power_of_2(P, most=64)
    return {"BLOCK_N": power_of_2(N, most=4096 // block_p), "BLOCK_P": block_p}


@torch.library.custom_op("mclr::scale_silu", mutates_args=())
def _scale_silu(x: Tensor, scale: Tensor) -> Tensor:
    x = x.contiguous(memory_format=layout(x))
    out = torch.empty_like(x)
    walk = _planes(x)
    blocks = _scale_silu_blocks(**walk)
    grid = (cdiv(walk["P"], blocks["BLOCK_P"]), cdiv(walk["N"], blocks["BLOCK_N"]), len(x))
    launch(_scale_silu_forward, grid, x, scale.contiguous(), out, *walk.values(), **blocks, warps=8)
    return out


@_scale_silu.register_fake
def _(x, scale):
    return torch.empty_like(x, memory_format=layout(x))


@torch.library.custom_op("mclr::scale_silu_backward", mutates_args=())
def _scale_silu_gradient(x: Tensor, scale: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    x, upstream = (each.contiguous(memory_format=layout(x)) for each in (x, upstream))
    dx = torch.empty_like(x)
    walk = _planes(x)
    blocks = _scale_silu_blocks(**walk)
    grid = (cdiv(walk["P"], blocks["BLOCK_P"]), cdiv(walk["N"], blocks["BLOCK_N"]), len(x))
    parts = x.new_empty(len(x), grid[0], walk["N"], dtype=torch.float32)
    launch(_scale_silu_backward, grid, x, scale.contiguous(), upstream, dx, parts, *walk.values(), **blocks, warps=8)
    return dx, parts.sum(1).to(scale.dtype)


@_scale_silu_gradient.register_fake
def _(x, scale, upstream):
    return torch.empty_like(x, memory_format=layout(x)), torch.empty_like(scale, memory_format=torch.contiguous_format)


def _scale_silu_save(ctx, inputs, output):
    # nothing but the inputs: the product is computed again
    ctx.save_for_backward(*inputs)


def _scale_silu_derive(ctx, upstream):
    return _scale_silu_gradient(*ctx.saved_tensors, upstream)


_scale_silu.register_autograd(_scale_silu_derive, setup_context=_scale_silu_save)


def scale_silu(x_RNHW: Tensor, scale_RN: Tensor) -> Tensor:
    """SiLU of x times a scale per row and channel, at unit magnitude, in x's dtype and layout; x and scale get gradients.

    x and scale: fp32, fp16 or bf16, both the same. Raises ValueError naming an argument that does not fit.
    """
    triton = runs_triton("scale_silu", x_RNHW)
    _refuse_activations({"x": x_RNHW}, triton)
    tensors = {"x": x_RNHW, "scale": scale_RN}
    refuse_unlike(tensors, {"x": tuple(x_RNHW.shape), "scale": tuple(x_RNHW.shape[:2])}, (x_RNHW.dtype,))
    return (_scale_silu if triton else scale_silu_definition)(x_RNHW, scale_RN)


# --- sum_clip ---


def sum_clip_definition(a_RNHW: Tensor, b_RNHW: Tensor, t: float, clip: float) -> Tensor:
    return mp_sum(a_RNHW, b_RNHW, t).clip(-clip, clip)


class _SumClipInTorch(torch.autograd.Function):
    """One pass for what the clip lets through, and both shares from constants."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, t: float, clip: float) -> Tensor:
        ctx.clip, norm = clip, math.hypot(1 - t, t)
        ctx.shares = (1 - t) / norm, t / norm
        total = a.lerp(b, t).div_(norm)
        if clip == math.inf:
            return total
        ctx.save_for_backward(total)
        return total.clip(-clip, clip)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        if ctx.clip < math.inf:
            (total,) = ctx.saved_tensors
            # this one blocks at its ends too: so they are the next numbers that the dtype has after +-clip
            ulp = torch.finfo(total.dtype).eps * 2.0 ** (math.frexp(ctx.clip)[1] - 1)
            end = (round(ctx.clip / ulp) + 1) * ulp
            upstream = torch.ops.aten.hardtanh_backward(upstream, total, -end, end)
        share_a, share_b = ctx.shares
        return upstream * share_a, upstream * share_b, None, None


@jit
def _sum_clip_forward(a_ptr, b_ptr, out_ptr, inside_ptr, share_a, share_b, clip, total, CLIPS: tl.constexpr, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + element, mask=element < total, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + element, mask=element < total, other=0.0).to(tl.float32)
    out = share_a * a + share_b * b
    if CLIPS:
        tl.store(inside_ptr + element, tl.abs(out) <= clip, mask=element < total)
        # not minimum and maximum: they would hide a NaN
        out = tl.where(out > clip, clip, tl.where(out < -clip, -clip, out))
    tl.store(out_ptr + element, out.to(out_ptr.dtype.element_ty), mask=element < total)


@jit
def _sum_clip_backward(
    upstream_ptr, inside_ptr, da_ptr, db_ptr, share_a, share_b, total, CLIPS: tl.constexpr, BLOCK: tl.constexpr
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    upstream = tl.load(upstream_ptr + element, mask=element < total, other=0.0).to(tl.float32)
    if CLIPS:
        inside = tl.load(inside_ptr + element, mask=element < total, other=0)
        upstream = tl.where(inside != 0, upstream, 0.0)
    tl.store(da_ptr + element, (share_a * upstream).to(da_ptr.dtype.element_ty), mask=element < total)
    tl.store(db_ptr + element, (share_b * upstream).to(db_ptr.dtype.element_ty), mask=element < total)


@torch.library.custom_op("mclr::sum_clip", mutates_args=())
def _sum_clip(a: Tensor, b: Tensor, t: float, clip: float) -> tuple[Tensor, Tensor]:
    a, b = (each.contiguous(memory_format=layout(a)) for each in (a, b))
    out, clips, norm = torch.empty_like(a), clip < math.inf, math.hypot(1 - t, t)
    inside = torch.empty_like(a, dtype=torch.bool) if clips else a.new_empty(0, dtype=torch.bool)
    block, shares = power_of_2(a.numel(), most=2048), ((1 - t) / norm, t / norm)
    grid = (cdiv(a.numel(), block),)
    launch(_sum_clip_forward, grid, a, b, out, inside, *shares, clip, a.numel(), CLIPS=clips, BLOCK=block, warps=8)
    return out, inside


@_sum_clip.register_fake
def _(a, b, t, clip):
    out = torch.empty_like(a, memory_format=layout(a))
    return out, torch.empty_like(out, dtype=torch.bool) if clip < math.inf else a.new_empty(0, dtype=torch.bool)


@torch.library.custom_op("mclr::sum_clip_backward", mutates_args=())
def _sum_clip_gradient(upstream: Tensor, inside: Tensor, t: float, clip: float) -> tuple[Tensor, Tensor]:
    clips, norm = clip < math.inf, math.hypot(1 - t, t)
    upstream = upstream.contiguous(memory_format=layout(inside if clips else upstream))
    da, db = torch.empty_like(upstream), torch.empty_like(upstream)
    block, shares = power_of_2(upstream.numel(), most=2048), ((1 - t) / norm, t / norm)
    grid = (cdiv(upstream.numel(), block),)
    launch(_sum_clip_backward, grid, upstream, inside, da, db, *shares, upstream.numel(), CLIPS=clips, BLOCK=block, warps=8)
    return da, db


@_sum_clip_gradient.register_fake
def _(upstream, inside, t, clip):
    da = torch.empty_like(upstream, memory_format=layout(inside if clip < math.inf else upstream))
    return da, torch.empty_like(da)


def _sum_clip_save(ctx, inputs, output):
    # one byte per element, nothing where nothing is clipped
    _, _, ctx.t, ctx.clip = inputs
    ctx.save_for_backward(output[1])


def _sum_clip_derive(ctx, upstream, _):
    return *_sum_clip_gradient(upstream, *ctx.saved_tensors, ctx.t, ctx.clip), None, None


_sum_clip.register_autograd(_sum_clip_derive, setup_context=_sum_clip_save)


def sum_clip(a_RNHW: Tensor, b_RNHW: Tensor, t: float, clip: float) -> Tensor:
    """(1 - t) a + t b at the magnitude of independent inputs, clipped to +-clip (inf: not at all), in a's dtype and layout.

    a and b: fp32, fp16 or bf16, both the same. No gradient where it was clipped; at exactly +-clip it passes. A NaN stays one.
    Raises ValueError naming an argument that does not fit.
    """
    triton = runs_triton("sum_clip", a_RNHW)
    _refuse_activations({"a": a_RNHW, "b": b_RNHW}, triton)
    if not 0 <= t <= 1:
        refuse("t", f"{t} is not in [0, 1]")
    if not clip > 0:
        refuse("clip", f"{clip} is not above 0")
    return _sum_clip(a_RNHW, b_RNHW, t, clip)[0] if triton else _SumClipInTorch.apply(a_RNHW, b_RNHW, t, clip)


# --- what tests, compile report and bench see ---


def _draw_activation(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    x = torch.randn(shape["R"], shape["N"], shape["H"], shape["W"], generator=generator).to(dtype)
    return x.contiguous(memory_format=torch.channels_last if shape["last"] else torch.contiguous_format).requires_grad_()


def draw_norm_silu(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict:
    return {"x_RNHW": _draw_activation(shape, dtype, generator)}


def draw_scale_silu(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict:
    scale = torch.randn(shape["R"], shape["N"], generator=generator).mul(0.3).add(1).to(dtype).requires_grad_()
    return {"x_RNHW": _draw_activation(shape, dtype, generator), "scale_RN": scale}


def draw_sum_clip(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict:
    a, b = (_draw_activation(shape, dtype, generator) for _ in range(2))
    # no element so near to the clip that rounding decides
    with torch.no_grad():
        near = ((0.7 * a.double() + 0.3 * b.double()) / math.hypot(0.7, 0.3)).abs().sub(1.5).abs() < 0.02
        a[near] = b[near] = 0
    return {"a_RNHW": a, "b_RNHW": b, "t": 0.3, "clip": 1.5}


def _per_element(shape: Shape, forward: int, backward: int) -> Cost:
    elements = shape["R"] * shape["N"] * shape["H"] * shape["W"]
    return Cost(elements * forward, elements * backward)


def cost_norm_silu(shape: Shape, dtype: torch.dtype) -> Cost:
    element, rms = _per_element(shape, 3 * dtype.itemsize, 4 * dtype.itemsize), 4 * shape["R"] * shape["H"] * shape["W"]
    return Cost(element.forward_bytes + rms, element.backward_bytes + rms)


def cost_scale_silu(shape: Shape, dtype: torch.dtype) -> Cost:
    element, scale = _per_element(shape, 2 * dtype.itemsize, 3 * dtype.itemsize), shape["R"] * shape["N"] * dtype.itemsize
    return Cost(element.forward_bytes + scale, element.backward_bytes + 2 * scale)


def cost_sum_clip(shape: Shape, dtype: torch.dtype) -> Cost:
    return _per_element(shape, 3 * dtype.itemsize + 1, 3 * dtype.itemsize + 1)


# in channels_last, as the network is
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
NORM_SILU = Op("norm_silu", norm_silu, norm_silu_definition, draw_norm_silu, cost=cost_norm_silu, **SIZES)
SCALE_SILU = Op("scale_silu", scale_silu, scale_silu_definition, draw_scale_silu, cost=cost_scale_silu, **SIZES)
SUM_CLIP = Op("sum_clip", sum_clip, sum_clip_definition, draw_sum_clip, cost=cost_sum_clip, **SIZES)
