"""EDM2's weight normalisation, all weights of a network in one launch: the weights that are used, and those that are stored.

    used_weights:   u = gain / sqrt(f) w / (1e-4 + rms(w)) per row (Eq. 47, 66 of Karras et al. 2024, arXiv 2312.02696)
    force_weights:  w <- w / (1e-4 + rms(w)) per row, in place (Eq. 66)

f is the fan-in: the elements of a row, which is an output channel. Backward, derived: rms = |w| / sqrt(f), so with
M = |w| + 1e-4 sqrt(f) it is u = gain w / M and, for an upstream gradient G,

    dw = gain / M (G - w <G, w> / (M |w|)),   dgain = sum over rows of <G, w> / M;   where w = 0, dw = gain / M G

Bytes per element, used weights in bf16: forward 6, backward 10, force 8; statistics are computed again, nothing but the weights is kept.
Floor at 4.3 TB/s: edm2-img64-s (280 M elements) 391 + 651 us, force 521; edm2-img512-l (778 M) 1,085 + 1,809 us, force 1,447. Both
rows of a pair use the same weights: one pair in one forward normalises once, two separate forwards twice.

One program per row goes through its columns twice, the second time backwards, so that what was read last is still in the cache.
Which weight a row belongs to stands in a table that is made of shapes alone; the addresses are handed over anew at every call.
The compiler knows nothing of an address that it reads from a table and would load 4 bytes at a time. So a program looks at its own row:
where weight and result are aligned and the fan-in is a multiple of 4 it runs a copy of the code that loads 16 bytes; odd fan-ins,
and parameters cut from a flat buffer at any place, run the other.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kernels.choice import runs_triton
from kernels.magnitude import EPS, layout, normalize
from kernels.op import Cost, Op, Shape, jit, launch, refuse, tl

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
BLOCK = 2048


def fan_in(w: Tensor) -> int:
    return w.numel() // len(w)


def used_weights_reference(weights: list[Tensor], gains_n: Tensor, dtype: torch.dtype) -> list[Tensor]:
    gains = gains_n.unbind()
    rms = [w.flatten(1).square().mean(1).sqrt() for w in weights]
    scales = [gain / math.sqrt(fan_in(w)) / (EPS + r) for w, gain, r in zip(weights, gains, rms, strict=True)]
    used = [w * _per_row(scale, w) for w, scale in zip(weights, scales, strict=True)]
    return [u.to(_result(u, dtype)) for u in used]


def _result(w: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What fp32 weights are asked for; fp64 weights, which are there for checks, stay that."""
    return torch.float64 if w.dtype == torch.float64 else dtype


class _UsedWeightsInTorch(torch.autograd.Function):
    """Forward and derived backward go over a weight 2 + 4 times, autograd some 4 + 10 times."""

    @staticmethod
    def forward(ctx: Any, gains: Tensor, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        norms = [torch.linalg.vector_norm(w.flatten(1), dim=1) for w in weights]
        ctx.save_for_backward(gains, *weights, *norms)
        return tuple(
            (w * _per_row(gain / (norm + EPS * math.sqrt(fan_in(w))), w)).to(_result(w, dtype))
            for w, gain, norm in zip(weights, gains.unbind(), norms, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gains, *saved = ctx.saved_tensors
        weights, norms = saved[: len(upstream)], saved[len(upstream) :]
        grads, gain_grads = [], []
        for G, w, gain, norm in zip(upstream, weights, gains.unbind(), norms, strict=True):
            G, M = G.to(w.dtype), norm + EPS * math.sqrt(fan_in(w))
            along = (G * w).flatten(1).sum(1).div_(M)
            gain_grads.append(along.sum())
            # along is 0 where the norm is
            shift = along / norm.clamp_min(torch.finfo(norm.dtype).tiny)
            grads.append(torch.addcmul(G, w, _per_row(shift, w), value=-1).mul_(_per_row(gain / M, w)))
        return torch.stack(gain_grads), None, *grads


def _per_row(value: Tensor, w: Tensor) -> Tensor:
    return value.view(-1, *[1] * (w.ndim - 1))


@jit
def _row(owner_ptr, first_ptr, fan_in_ptr):
    """(weight, fan-in, elements of the weight before this row) of this program."""
    row = tl.program_id(0)
    weight = tl.load(owner_ptr + row)
    fan_in = tl.load(fan_in_ptr + weight)
    return weight, fan_in, (row - tl.load(first_ptr + weight)).to(tl.int64) * fan_in


@jit
def _pointer(address, dtype: tl.constexpr, VECTOR: tl.constexpr):
    """The address, which is aligned to VECTOR elements, as a pointer."""
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), VECTOR * (dtype.primitive_bitwidth // 8))


@jit
def _scale_row(w, u, dtype: tl.constexpr, fan_in, gain, extra, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """u = gain w / (|w| + extra), of one row at these addresses."""
    w_ptr, u_ptr = _pointer(w, tl.float32, VECTOR), _pointer(u, dtype, VECTOR)
    # tells the compiler, which does not know the fan-in, that the mask changes at whole vectors alone
    fan_in = fan_in // VECTOR * VECTOR
    total = tl.zeros([BLOCK], tl.float32)
    blocks = tl.cdiv(fan_in, BLOCK)
    for block in range(blocks):
        column = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(w_ptr + column, mask=column < fan_in, other=0.0)
        total += x * x
    scale = gain / (tl.sqrt(tl.sum(total)) + extra)
    for block in range(blocks):
        column = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(w_ptr + column, mask=column < fan_in, other=0.0)
        tl.store(u_ptr + column, (scale * x).to(dtype), mask=column < fan_in)


@jit
def _forward(table_ptr, owner_ptr, first_ptr, fan_in_ptr, gain_ptr, like_ptr, eps, BLOCK: tl.constexpr):
    """table: addresses of weight and result, per weight. gain: None makes it sqrt(f). like: a result, for its dtype."""
    weight, fan_in, before = _row(owner_ptr, first_ptr, fan_in_ptr)
    dtype: tl.constexpr = like_ptr.dtype.element_ty
    SIZE: tl.constexpr = dtype.primitive_bitwidth // 8
    w = tl.load(table_ptr + 2 * weight) + before * 4
    u = tl.load(table_ptr + 2 * weight + 1) + before * SIZE
    root = tl.sqrt(fan_in.to(tl.float32))
    if gain_ptr is None:
        gain = root
    else:
        gain = tl.load(gain_ptr + weight)
    if (w % 16 == 0) & (u % (4 * SIZE) == 0) & (fan_in % 4 == 0):
        _scale_row(w, u, dtype, fan_in, gain, eps * root, BLOCK, 4)
    else:
        _scale_row(w, u, dtype, fan_in, gain, eps * root, BLOCK, 1)


@jit
def _derive_row(G, w, dw, dtype: tl.constexpr, fan_in, gain, extra, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """dw of one row at these addresses; returns <G, w> / M."""
    G_ptr, w_ptr, dw_ptr = _pointer(G, dtype, VECTOR), _pointer(w, tl.float32, VECTOR), _pointer(dw, tl.float32, VECTOR)
    fan_in = fan_in // VECTOR * VECTOR
    square = tl.zeros([BLOCK], tl.float32)
    product = tl.zeros([BLOCK], tl.float32)
    blocks = tl.cdiv(fan_in, BLOCK)
    for block in range(blocks):
        column = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(w_ptr + column, mask=column < fan_in, other=0.0)
        upstream = tl.load(G_ptr + column, mask=column < fan_in, other=0.0).to(tl.float32)
        square += x * x
        product += upstream * x
    norm = tl.sqrt(tl.sum(square))
    along = tl.sum(product) / (norm + extra)
    # where the norm is 0 so is the product
    shift = along / tl.maximum(norm, 1e-30)
    scale = gain / (norm + extra)
    for block in range(blocks):
        column = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(w_ptr + column, mask=column < fan_in, other=0.0)
        upstream = tl.load(G_ptr + column, mask=column < fan_in, other=0.0).to(tl.float32)
        tl.store(dw_ptr + column, scale * (upstream - shift * x), mask=column < fan_in)
    return along


@jit
def _backward(table_ptr, owner_ptr, first_ptr, fan_in_ptr, gain_ptr, like_ptr, part_ptr, eps, BLOCK: tl.constexpr):
    """table: addresses of upstream gradient, weight and its gradient, per weight. like: an upstream gradient, for its dtype.
    part: every row's share of its gain's gradient."""
    weight, fan_in, before = _row(owner_ptr, first_ptr, fan_in_ptr)
    dtype: tl.constexpr = like_ptr.dtype.element_ty
    SIZE: tl.constexpr = dtype.primitive_bitwidth // 8
    G = tl.load(table_ptr + 3 * weight) + before * SIZE
    w = tl.load(table_ptr + 3 * weight + 1) + before * 4
    dw = tl.load(table_ptr + 3 * weight + 2) + before * 4
    gain, extra = tl.load(gain_ptr + weight), eps * tl.sqrt(fan_in.to(tl.float32))
    if (G % (4 * SIZE) == 0) & ((w | dw) % 16 == 0) & (fan_in % 4 == 0):
        along = _derive_row(G, w, dw, dtype, fan_in, gain, extra, BLOCK, 4)
    else:
        along = _derive_row(G, w, dw, dtype, fan_in, gain, extra, BLOCK, 1)
    tl.store(part_ptr + tl.program_id(0), along)


@jit
def _sum_parts(part_ptr, first_ptr, grad_ptr, BLOCK: tl.constexpr):
    weight = tl.program_id(0)
    end = tl.load(first_ptr + weight + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(tl.load(first_ptr + weight), end, BLOCK):
        row = first + tl.arange(0, BLOCK)
        total += tl.load(part_ptr + row, mask=row < end, other=0.0)
    tl.store(grad_ptr + weight, tl.sum(total))


@lru_cache(maxsize=16)
def _rows(shapes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(weight of every row, first row of every weight and the end, fan-in of every weight), int32, from (rows, fan-in) per weight.

    Kept from call to call: it is a function of what it is looked up by.
    """
    first = [0]
    for rows, _ in shapes:
        first.append(first[-1] + rows)
    owner = [weight for weight, (rows, _) in enumerate(shapes) for _ in range(rows)]
    owner_r, first_n, fan_in_n = (
        torch.tensor(each, dtype=torch.int32, device=device) for each in (owner, first, [f for _, f in shapes])
    )
    return owner_r, first_n, fan_in_n


def _shapes(weights: list[Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((len(w), fan_in(w)) for w in weights)


def _table(*lists: list[Tensor]) -> Tensor:
    """Addresses [n, lists], int64, on the GPU of the tensors; the copy waits for nothing there."""
    device = lists[0][0].device
    addresses = [[t.data_ptr() for t in of_one_weight] for of_one_weight in zip(*lists, strict=True)]
    return torch.tensor(addresses, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _dense(weights: list[Tensor]) -> list[Tensor]:
    """Each with rows that are gapless, one after another; within a row any order is the same to a norm."""
    return [w.contiguous(memory_format=layout(w)) for w in weights]


# a graph would replay the addresses of the call that it recorded
@torch.library.custom_op("mclr::used_weights", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _used(weights: list[Tensor], gains: Tensor, dtype: torch.dtype) -> list[Tensor]:
    weights = _dense(weights)
    used = [torch.empty_like(w, dtype=dtype) for w in weights]
    rows = _rows(_shapes(weights), gains.device)
    launch(_forward, (len(rows[0]),), _table(weights, used), *rows, gains.contiguous(), used[0], EPS, BLOCK=BLOCK)
    return used


@_used.register_fake
def _(weights, gains, dtype):
    return [torch.empty_like(w, dtype=dtype, memory_format=layout(w)) for w in weights]


@torch.library.custom_op("mclr::used_weights_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _gradient(weights: list[Tensor], gains: Tensor, upstream: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    weights = _dense(weights)
    upstream = [G.contiguous(memory_format=layout(w)) for G, w in zip(upstream, weights, strict=True)]
    grads, grad_of_gains = [torch.empty_like(w) for w in weights], torch.empty_like(gains.contiguous())
    rows = _rows(_shapes(weights), gains.device)
    parts = gains.new_empty(len(rows[0]))
    given = (_table(upstream, weights, grads), *rows, gains.contiguous(), upstream[0], parts)
    launch(_backward, (len(parts),), *given, EPS, BLOCK=BLOCK)
    launch(_sum_parts, (len(weights),), parts, rows[1], grad_of_gains, BLOCK=BLOCK)
    return grads, grad_of_gains


@_gradient.register_fake
def _(weights, gains, upstream):
    return [torch.empty_like(w, memory_format=layout(w)) for w in weights], torch.empty_like(gains.contiguous())


def _save(ctx, inputs, output):
    # nothing but the inputs: the norms are computed again
    weights, gains, _ = inputs
    ctx.save_for_backward(gains, *weights)


def _derive(ctx, upstream):
    gains, *weights = ctx.saved_tensors
    return *_gradient(weights, gains, upstream), None


_used.register_autograd(_derive, setup_context=_save)


@torch.library.custom_op("mclr::force_weights", mutates_args=("weights",), tags=(torch.Tag.cudagraph_unsafe,))
def _force(weights: list[Tensor]) -> None:
    rows = _rows(_shapes(weights), weights[0].device)
    launch(_forward, (len(rows[0]),), _table(weights, weights), *rows, None, weights[0], EPS, BLOCK=BLOCK)


@_force.register_fake
def _(weights):
    return None


def _admit(op: str, weights: Sequence[Tensor]) -> bool:
    """Whether this runs as a kernel. Raises ValueError unless these are weights of one dtype on one device, none of them empty."""
    refuse("weights", not weights, "there are none")
    triton, device, dtype = runs_triton(op, weights[0]), weights[0].device, weights[0].dtype
    refuse("weights[0]", dtype != torch.float32 and (triton or dtype != torch.float64), f"dtype {dtype}, not torch.float32")
    for i, w in enumerate(weights):
        name = f"weights[{i}]"
        refuse(name, w.ndim not in (2, 4), f"{w.ndim} dimensions, not 2 or 4")
        refuse(name, w.numel() == 0, f"shape {tuple(w.shape)} holds nothing")
        refuse(name, w.device != device, f"on {w.device}, not on {device} as weights[0]")
        refuse(name, w.dtype != dtype, f"dtype {w.dtype}, not {dtype} as weights[0]")
    return triton


def used_weights(weights: list[Tensor], gains_n: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Every weight as its layer uses it, in `dtype` and the layout of the weight: rows of norm `gain`, up to the 1e-4.

    weights: fp32, [out, in] or [out, in, k, k]; gains: fp32, one per weight; all of them get gradients.
    Raises ValueError naming an argument that does not fit.
    """
    triton = _admit("used_weights", weights)
    refuse("gains", tuple(gains_n.shape) != (len(weights),), f"shape {tuple(gains_n.shape)}, not {(len(weights),)}")
    refuse("gains", gains_n.device != weights[0].device, f"on {gains_n.device}, not on {weights[0].device} as weights[0]")
    refuse("gains", gains_n.dtype != weights[0].dtype, f"dtype {gains_n.dtype}, not {weights[0].dtype} as weights[0]")
    refuse("dtype", dtype not in FLOATS, f"{dtype}, not one of {', '.join(map(str, FLOATS))}")
    return _used(weights, gains_n, dtype) if triton else list(_UsedWeightsInTorch.apply(gains_n, dtype, *weights))


@torch.no_grad()
def force_weights(weights: Sequence[Tensor]) -> None:
    """Divide every row of the fp32 weights by 1e-4 + its RMS, in place.

    Raises ValueError for what is not a weight, for one whose rows are not gapless, and for one that stands there twice.
    """
    triton = _admit("force_weights", weights)
    for i, w in enumerate(weights):
        refuse(f"weights[{i}]", not w.is_contiguous(memory_format=layout(w)), f"strides {w.stride()} leave gaps")
    # addresses are not there while a graph is made
    places = {i if torch.compiler.is_compiling() else w.data_ptr() for i, w in enumerate(weights)}
    refuse("weights", len(places) < len(weights), "one is there twice")
    if triton:
        _force(list(weights))
    else:
        for w in weights:
            w.copy_(normalize(w))


# --- what tests, compile report and bench see ---


def network(shape: Shape) -> list[tuple[int, ...]]:
    """Shapes of all weights of an EDM2 U-Net of these levels, whose last two attend, in its order.

    unit: width of the first level, twice that in the second and so on; C channels of the image, K conditions.
    """
    unit, levels, depth = shape["unit"], shape["levels"], shape["blocks"]
    E = unit * levels
    shapes: list[tuple[int, ...]] = [(E, unit), (E, shape["K"])]

    def block(source: int, width: int, decoder: bool, attends: bool) -> None:
        if source != width:
            shapes.append((width, source, 1, 1))
        shapes.extend([(width, source if decoder else width, 3, 3), (width, E), (width, width, 3, 3)])
        if attends:
            shapes.extend([(3 * width, width, 1, 1), (width, width, 1, 1)])

    skips: list[int] = []
    for level in range(levels):
        width = unit * (level + 1)
        if level:
            block(skips[-1], skips[-1], False, False)
        else:
            shapes.append((width, shape["C"] + 1, 3, 3))
        skips.append(skips[-1] if level else width)
        for _ in range(depth):
            block(skips[-1], width, False, level >= levels - 2)
            skips.append(width)
    last = skips[-1]
    block(last, last, True, True)
    block(last, last, True, False)
    for level in reversed(range(levels)):
        if level < levels - 1:
            block(last, last, True, False)
        for _ in range(depth + 1):
            width = unit * (level + 1)
            block(last + skips.pop(), width, True, level >= levels - 2)
            last = width
    return [*shapes, (shape["C"], last, 3, 3), (1, 128)]


def draw_forced(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict:
    # of all magnitudes, since that of a stored weight must not matter
    return {"weights": [torch.randn(s, generator=generator) * 10 ** (i % 5 - 2) for i, s in enumerate(network(shape))]}


def draw_used(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict:
    weights = [w.requires_grad_() for w in draw_forced(shape, dtype, generator)["weights"]]
    gains = torch.randn(len(weights), generator=generator).requires_grad_()
    return {"weights": weights, "gains_n": gains, "dtype": dtype}


def force_copies(weights: list[Tensor]) -> list[Tensor]:
    """As force_weights, of copies."""
    copies = [w.detach().clone(memory_format=torch.contiguous_format) for w in weights]
    force_weights(copies)
    return copies


def force_weights_reference(weights: list[Tensor]) -> list[Tensor]:
    return [w / _per_row(EPS + w.flatten(1).square().mean(1).sqrt(), w) for w in weights]


def cost_used(shape: Shape, dtype: torch.dtype) -> Cost:
    elements = sum(map(math.prod, network(shape)))
    return Cost(elements * (4 + dtype.itemsize), elements * (8 + dtype.itemsize))


def cost_forced(shape: Shape, dtype: torch.dtype) -> Cost:
    return Cost(8 * sum(map(math.prod, network(shape))), 0)


SIZES: dict[str, Any] = {
    "shapes": {
        "edm2-img64-s": {"unit": 192, "levels": 4, "blocks": 3, "C": 3, "K": 1000},
        "edm2-img512-l": {"unit": 320, "levels": 4, "blocks": 3, "C": 4, "K": 1000},
    },
    "tiny": {"one level": {"unit": 2, "levels": 1, "blocks": 1, "C": 1, "K": 5}},
    "narrow": {"unit": 4},
}
USED_WEIGHTS = Op("used_weights", used_weights, used_weights_reference, draw_used, cost=cost_used, **SIZES)
FORCE_WEIGHTS = Op("force_weights", force_copies, force_weights_reference, draw_forced, cost=cost_forced, **SIZES)
