"""EDM2's pixel norm and the SiLU of it, fused.

    n = x / (1e-4 + rms of x over the channels) (Eq. 30),  s = silu(n) / .596 (Eq. 81)      (Karras et al. 2024, arXiv 2312.02696)

Backward (derived), with m = 1e-4 + rms, u = dn + ds silu'(n) / .596 and N channels: dx = (u - x (sum u x) / (N rms m)) / m. Where
x = 0 the norm has no direction, and dx = u / m.

A program reads the channels of its pixels twice, the second time backwards, so that the last ones may still be in the cache.

R rows; N channels; H W image; P = H W pixels.
"""

import torch
from torch import Tensor

from mclr.kernels import magnitude
from mclr.kernels.choice import runs_triton
from mclr.kernels.magnitude import EPS, SIZES, blocks, dense, empty, mp_silu, planes, silu, tile
from mclr.kernels.op import Op, Shape, cdiv, fit, floats, jit, launch, power_of_2, tl


def definition(x_RNHW: Tensor) -> tuple[Tensor, Tensor]:
    n_RNHW = x_RNHW / (EPS + x_RNHW.square().mean(1, keepdim=True).sqrt())
    return n_RNHW, mp_silu(n_RNHW)


@jit
def _forward(x_ptr, n_ptr, s_ptr, rms_ptr, eps, N, P, stride_n, stride_p, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    start = row * N * P
    blocks = tl.cdiv(N, BLOCK_N)
    total = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    for block in range(blocks):
        place, inside = tile(block * BLOCK_N, pixel, N, P, stride_n, stride_p, BLOCK_N)
        x = tl.load(x_ptr + start + place, mask=inside, other=0.0).to(tl.float32)
        total += x * x
    rms = tl.sqrt(tl.sum(total, axis=0) / N)
    tl.store(rms_ptr + row * P + pixel, rms, mask=pixel < P)
    for block in range(blocks):
        place, inside = tile((blocks - 1 - block) * BLOCK_N, pixel, N, P, stride_n, stride_p, BLOCK_N)
        x = tl.load(x_ptr + start + place, mask=inside, other=0.0).to(tl.float32)
        n = x / (eps + rms)[None, :]
        s, _ = silu(n)
        tl.store(n_ptr + start + place, n.to(n_ptr.dtype.element_ty), mask=inside)
        tl.store(s_ptr + start + place, s.to(s_ptr.dtype.element_ty), mask=inside)


@jit
def _upstream(x_ptr, dn_ptr, ds_ptr, place, inside, m):
    """(x, u) at these offsets, fp32."""
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    dn = tl.load(dn_ptr + place, mask=inside, other=0.0).to(tl.float32)
    ds = tl.load(ds_ptr + place, mask=inside, other=0.0).to(tl.float32)
    _, slope = silu(x / m[None, :])
    return x, dn + ds * slope


@jit
def _backward(
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
        place, inside = tile(block * BLOCK_N, pixel, N, P, stride_n, stride_p, BLOCK_N)
        x, u = _upstream(x_ptr, dn_ptr, ds_ptr, start + place, inside, m)
        total += x * u
    # where the rms is 0, the sum is 0 too
    shift = tl.sum(total, axis=0) / tl.maximum(N * rms * m, 1e-30)
    for block in range(blocks):
        place, inside = tile((blocks - 1 - block) * BLOCK_N, pixel, N, P, stride_n, stride_p, BLOCK_N)
        x, u = _upstream(x_ptr, dn_ptr, ds_ptr, start + place, inside, m)
        dx = (u - x * shift[None, :]) / m[None, :]
        tl.store(dx_ptr + start + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def _plan(x: Tensor) -> tuple[tuple[int, int], tuple[int, int, int, int], dict[str, int]]:
    """(grid, sizes and strides, constants) of a launch."""
    P = planes(x)[1]
    # channels_last: whole pixels; NCHW: 64 pixels, fewer in small images, which have few programs
    constants = blocks(x, 2048, channels=1024, pixels=power_of_2(P // 64, 16, 64))
    return (cdiv(P, constants["BLOCK_P"]), len(x)), planes(x), constants


@torch.library.custom_op("mclr::norm_silu", mutates_args=())
def _run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = dense(x)
    n, s, rms = _results(x)
    grid, walk, blocks = _plan(x)
    launch(_forward, grid, x, n, s, rms, EPS, *walk, **blocks, warps=8)
    return n, s, rms


@_run.register_fake
def _results(x):
    return empty(x), empty(x), x.new_empty(len(x), *x.shape[2:], dtype=torch.float32)


@torch.library.custom_op("mclr::norm_silu_backward", mutates_args=())
def _gradient(x: Tensor, rms: Tensor, dn: Tensor, ds: Tensor) -> Tensor:
    x, dn, ds = (dense(each, like=x) for each in (x, dn, ds))
    dx = empty(x)
    grid, walk, blocks = _plan(x)
    launch(_backward, grid, x, rms, dn, ds, dx, EPS, *walk, **blocks, warps=8)
    return dx


def _save(ctx, inputs, output):
    # saved: the input, which the block before keeps anyway as its output, and one number per pixel
    ctx.save_for_backward(inputs[0], output[2])
    ctx.mark_non_differentiable(output[2])


_gradient.register_fake(lambda x, rms, dn, ds: empty(x))
_run.register_autograd(lambda ctx, dn, ds, _: _gradient(*ctx.saved_tensors, dn, ds), setup_context=_save)


def norm_silu(x_RNHW: Tensor) -> tuple[Tensor, Tensor]:
    """(x over its RMS across channels, SiLU of that at unit magnitude), both in x's dtype and layout.

    x: fp32, fp16 or bf16. Raises ValueError if it does not fit.
    """
    triton = runs_triton("norm_silu", x_RNHW)
    fit(floats(triton), x=(x_RNHW, "RNHW"))
    if not triton:
        n_RNHW = magnitude.normalize(x_RNHW, dim=1)
        return n_RNHW, mp_silu(n_RNHW)
    n_RNHW, s_RNHW, _ = _run(x_RNHW)
    return n_RNHW, s_RNHW


def draw(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict:
    return {"x_RNHW": magnitude.draw_activation(shape, dtype, generator)}


OP = Op("norm_silu", norm_silu, definition, draw, **SIZES)
