"""EDM2's modulation and SiLU, fused: silu(scale x) / .596, one scale per row and channel.

The .596 is from Eq. 81 of Karras et al. 2024, arXiv 2312.02696.

R rows; N channels; H W image; P = H W pixels.
"""

import torch
from torch import Tensor

from mclr.kernels.choice import runs_triton
from mclr.kernels.magnitude import SIZES, blocks, dense, draw_activation, empty, mp_silu, planes, silu, tile
from mclr.kernels.op import Op, Shape, cdiv, fit, floats, jit, launch, tl


def definition(x_RNHW: Tensor, scale_RN: Tensor) -> Tensor:
    return mp_silu(x_RNHW * scale_RN[:, :, None, None])


@jit
def _inputs(x_ptr, scale_ptr, N, P, stride_n, stride_p, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """(row, channels, offsets of this program's elements, mask of those inside, x, scale), both fp32."""
    row = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * BLOCK_N
    channel, pixel = first + tl.arange(0, BLOCK_N), tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    place, inside = tile(first, pixel, N, P, stride_n, stride_p, BLOCK_N)
    scale = tl.load(scale_ptr + row * N + channel, mask=channel < N, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * N * P + place, mask=inside, other=0.0).to(tl.float32)
    return row, channel, row * N * P + place, inside, x, scale[:, None]


@jit
def _forward(x_ptr, scale_ptr, out_ptr, N, P, stride_n, stride_p, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    _, _, place, inside, x, scale = _inputs(x_ptr, scale_ptr, N, P, stride_n, stride_p, BLOCK_N, BLOCK_P)
    out, _ = silu(x * scale)
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _backward(
    x_ptr, scale_ptr, upstream_ptr, dx_ptr, part_ptr, N, P, stride_n, stride_p, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr
):
    """part: sums over the pixels of one program, [R, programs along P, N]."""
    row, channel, place, inside, x, scale = _inputs(x_ptr, scale_ptr, N, P, stride_n, stride_p, BLOCK_N, BLOCK_P)
    upstream = tl.load(upstream_ptr + place, mask=inside, other=0.0).to(tl.float32)
    _, slope = silu(x * scale)
    dh = upstream * slope
    tl.store(dx_ptr + place, (dh * scale).to(dx_ptr.dtype.element_ty), mask=inside)
    part = (row * tl.num_programs(0) + tl.program_id(0)) * N + channel
    tl.store(part_ptr + part, tl.sum(dh * x, axis=1), mask=channel < N)


def _plan(x: Tensor) -> tuple[tuple[int, int, int], tuple[int, int, int, int], dict[str, int]]:
    """(grid, sizes and strides, constants) of a launch."""
    N, P, *_ = planes(x)
    constants = blocks(x, 4096, channels=64, pixels=64)
    return (cdiv(P, constants["BLOCK_P"]), cdiv(N, constants["BLOCK_N"]), len(x)), planes(x), constants


@torch.library.custom_op("mclr::scale_silu", mutates_args=())
def _run(x: Tensor, scale: Tensor) -> Tensor:
    x = dense(x)
    out = empty(x)
    grid, walk, blocks = _plan(x)
    launch(_forward, grid, x, scale.contiguous(), out, *walk, **blocks, warps=8)
    return out


@torch.library.custom_op("mclr::scale_silu_backward", mutates_args=())
def _gradient(x: Tensor, scale: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    x, upstream = dense(x), dense(upstream, like=x)
    dx = empty(x)
    grid, walk, blocks = _plan(x)
    parts = x.new_empty(len(x), grid[0], x.shape[1], dtype=torch.float32)
    launch(_backward, grid, x, scale.contiguous(), upstream, dx, parts, *walk, **blocks, warps=8)
    return dx, parts.sum(1).to(scale.dtype)


def _save(ctx, inputs, output):
    # saved: the inputs alone; backward computes the product again
    ctx.save_for_backward(*inputs)


_run.register_fake(lambda x, scale: empty(x))
_gradient.register_fake(lambda x, scale, upstream: (empty(x), empty(scale)))
_run.register_autograd(lambda ctx, upstream: _gradient(*ctx.saved_tensors, upstream), setup_context=_save)


def scale_silu(x_RNHW: Tensor, scale_RN: Tensor) -> Tensor:
    """SiLU of x times a scale per row and channel, at unit magnitude, in x's dtype and layout; x and scale get gradients.

    x and scale: fp32, fp16 or bf16, both the same. Raises ValueError that names the argument that does not fit.
    """
    triton = runs_triton("scale_silu", x_RNHW)
    fit(floats(triton), x=(x_RNHW, "RNHW"))
    fit((x_RNHW.dtype,), x=(x_RNHW, "RNHW"), scale=(scale_RN, "RN"))
    return (_run if triton else definition)(x_RNHW, scale_RN)


def draw(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict:
    scale = torch.randn(shape["R"], shape["N"], generator=generator).mul(0.3).add(1).to(dtype).requires_grad_()
    return {"x_RNHW": draw_activation(shape, dtype, generator), "scale_RN": scale}


OP = Op("scale_silu", scale_silu, definition, draw, **SIZES)
