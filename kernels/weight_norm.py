"""EDM2's weight normalisation, of many weights in one launch: for the weights that layers use, and for the stored ones.

    used_weights:   u = w / (sqrt(f) (1e-4 + rms(w))) per row (Eq. 47, 66 of Karras et al. 2024, arXiv 2312.02696)
    force_weights:  w <- w / (1e-4 + rms(w)) per row, in place (Eq. 66)

A row is an output channel, f its number of elements (the fan-in). Backward, derived: rms = |w| / sqrt(f), so with M = |w| + 1e-4 sqrt(f)
it is u = w / M and, for an upstream gradient G, dw = (G - w <G, w> / (M |w|)) / M; where w = 0, dw = G / M.

EDM2 makes the weights of one block per launch: gradients then come block by block, and ZeRO reduces them during the backward pass.

One program handles one row. It reads the columns twice, the second time backwards, so that the last ones may still be in the cache.
One table says which weight a row belongs to; another holds the addresses, and is new at every call. The compiler knows nothing about an
address from a table and would load 4 bytes at a time. So a program looks at its own row: if weight and result are aligned and the fan-in
is a multiple of 4, it runs a copy of the code that loads 16 bytes, else a copy without that.
"""

import math
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mclr.kernels.choice import runs_triton
from mclr.kernels.magnitude import EPS, dense, empty, layout
from mclr.kernels.op import FLOATS, Op, Shape, fit, jit, launch, refuse, result_dtype, tl

BLOCK = 2048


def fan_in(w: Tensor) -> int:
    return w.numel() // len(w)


def used_weights_definition(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    forced = force_weights_definition(weights)
    return [(f / math.sqrt(fan_in(f))).to(result_dtype(f, dtype)) for f in forced]


def force_weights_definition(weights: list[Tensor]) -> list[Tensor]:
    return [w / _per_row(EPS + w.flatten(1).square().mean(1).sqrt(), w) for w in weights]


class _UsedWeightsInTorch(torch.autograd.Function):
    """Forward reads a weight twice, the derived backward 4 times; autograd would take about 4 and 10 passes."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        norms = [torch.linalg.vector_norm(w.flatten(1), dim=1) for w in weights]
        ctx.save_for_backward(*weights, *norms)
        return tuple(
            (w / _per_row(norm + EPS * math.sqrt(fan_in(w)), w)).to(result_dtype(w, dtype))
            for w, norm in zip(weights, norms, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # read them once: activation checkpointing refuses a second read
        saved = ctx.saved_tensors
        weights, norms = saved[: len(upstream)], saved[len(upstream) :]
        grads = []
        for G, w, norm in zip(upstream, weights, norms, strict=True):
            G, M = G.to(w.dtype), norm + EPS * math.sqrt(fan_in(w))
            # where the norm is 0, the product is 0 too
            shift = (G * w).flatten(1).sum(1).div_(M * norm.clamp_min(torch.finfo(norm.dtype).tiny))
            grads.append(torch.addcmul(G, w, _per_row(shift, w), value=-1).div_(_per_row(M, w)))
        return None, *grads


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
    """An address that is aligned to VECTOR elements, as a pointer."""
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), VECTOR * (dtype.primitive_bitwidth // 8))


@jit
def _scale_row(w, u, dtype: tl.constexpr, fan_in, size, extra, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """u = size w / (|w| + extra) of one row at these addresses."""
    w_ptr, u_ptr = _pointer(w, tl.float32, VECTOR), _pointer(u, dtype, VECTOR)
    # the compiler does not know the fan-in: this line tells it that the mask changes at whole vectors only
    fan_in = fan_in // VECTOR * VECTOR
    total = tl.zeros([BLOCK], tl.float32)
    blocks = tl.cdiv(fan_in, BLOCK)
    for block in range(blocks):
        column = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(w_ptr + column, mask=column < fan_in, other=0.0)
        total += x * x
    scale = size / (tl.sqrt(tl.sum(total)) + extra)
    for block in range(blocks):
        column = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(w_ptr + column, mask=column < fan_in, other=0.0)
        tl.store(u_ptr + column, (scale * x).to(dtype), mask=column < fan_in)


@jit
def _forward(table_ptr, owner_ptr, first_ptr, fan_in_ptr, like_ptr, eps, FORCE: tl.constexpr, BLOCK: tl.constexpr):
    """table: addresses of weight and result, per weight. like: a result, for its dtype. FORCE: rows of RMS 1, else of norm 1."""
    weight, fan_in, before = _row(owner_ptr, first_ptr, fan_in_ptr)
    dtype: tl.constexpr = like_ptr.dtype.element_ty
    SIZE: tl.constexpr = dtype.primitive_bitwidth // 8
    w = tl.load(table_ptr + 2 * weight) + before * 4
    u = tl.load(table_ptr + 2 * weight + 1) + before * SIZE
    root = tl.sqrt(fan_in.to(tl.float32))
    size = root if FORCE else 1.0
    if (w % 16 == 0) & (u % (4 * SIZE) == 0) & (fan_in % 4 == 0):
        _scale_row(w, u, dtype, fan_in, size, eps * root, BLOCK, 4)
    else:
        _scale_row(w, u, dtype, fan_in, size, eps * root, BLOCK, 1)


@jit
def _derive_row(G, w, dw, dtype: tl.constexpr, fan_in, extra, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """dw of one row at these addresses."""
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
    # where the norm is 0, the product is 0 too
    shift = tl.sum(product) / (norm + extra) / tl.maximum(norm, 1e-30)
    for block in range(blocks):
        column = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(w_ptr + column, mask=column < fan_in, other=0.0)
        upstream = tl.load(G_ptr + column, mask=column < fan_in, other=0.0).to(tl.float32)
        tl.store(dw_ptr + column, (upstream - shift * x) / (norm + extra), mask=column < fan_in)


@jit
def _backward(table_ptr, owner_ptr, first_ptr, fan_in_ptr, like_ptr, eps, BLOCK: tl.constexpr):
    """table: addresses of upstream gradient, weight and its gradient, per weight. like: an upstream gradient, for its dtype."""
    weight, fan_in, before = _row(owner_ptr, first_ptr, fan_in_ptr)
    dtype: tl.constexpr = like_ptr.dtype.element_ty
    SIZE: tl.constexpr = dtype.primitive_bitwidth // 8
    G = tl.load(table_ptr + 3 * weight) + before * SIZE
    w = tl.load(table_ptr + 3 * weight + 1) + before * 4
    dw = tl.load(table_ptr + 3 * weight + 2) + before * 4
    extra = eps * tl.sqrt(fan_in.to(tl.float32))
    if (G % (4 * SIZE) == 0) & ((w | dw) % 16 == 0) & (fan_in % 4 == 0):
        _derive_row(G, w, dw, dtype, fan_in, extra, BLOCK, 4)
    else:
        _derive_row(G, w, dw, dtype, fan_in, extra, BLOCK, 1)


@cache
def _rows(shapes: tuple[torch.Size, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(weight of every row, first row of every weight, fan-in of every weight), int32, from the shape of every weight.

    The cache has no limit: a network has about 25 lists of shapes, and making a table again would make the host wait for the GPU.
    """
    first = [0, *accumulate(shape[0] for shape in shapes)][:-1]
    owner = [weight for weight, shape in enumerate(shapes) for _ in range(shape[0])]
    fans = [math.prod(shape[1:]) for shape in shapes]
    owner_r, first_n, fan_in_n = (torch.tensor(each, dtype=torch.int32, device=device) for each in (owner, first, fans))
    return owner_r, first_n, fan_in_n


def _table(*lists: list[Tensor]) -> Tensor:
    """Addresses [n, lists], int64, on the device of the tensors. The host does not wait for the copy.

    Raises ValueError while a CUDA graph is captured, which would replay the addresses of this call.
    """
    device = lists[0][0].device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        refuse("weights", "a CUDA graph would replay the addresses of this call: use engine.kernels=torch")
    addresses = [[t.data_ptr() for t in of_one_weight] for of_one_weight in zip(*lists, strict=True)]
    return torch.tensor(addresses, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


# because of the tag torch.compile does not capture these in CUDA graphs, which would replay the addresses of one call
@torch.library.custom_op("mclr::used_weights", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _used(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    weights = [dense(w) for w in weights]
    used = [empty(w, dtype) for w in weights]
    rows = _rows(tuple(w.shape for w in weights), weights[0].device)
    launch(_forward, (len(rows[0]),), _table(weights, used), *rows, used[0], EPS, FORCE=False, BLOCK=BLOCK)
    return used


@torch.library.custom_op("mclr::used_weights_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _gradient(weights: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    # rows have no gaps; the order within a row does not matter to a norm
    weights = [dense(w) for w in weights]
    upstream = [dense(G, like=w) for G, w in zip(upstream, weights, strict=True)]
    grads = [empty(w) for w in weights]
    rows = _rows(tuple(w.shape for w in weights), weights[0].device)
    launch(_backward, (len(rows[0]),), _table(upstream, weights, grads), *rows, upstream[0], EPS, BLOCK=BLOCK)
    return grads


def _save(ctx, inputs, output):
    # saved: the weights alone; backward computes the norms again
    ctx.save_for_backward(*inputs[0])


_used.register_fake(lambda weights, dtype: [empty(w, dtype) for w in weights])
_gradient.register_fake(lambda weights, upstream: [empty(w) for w in weights])
_used.register_autograd(lambda ctx, upstream: (_gradient(list(ctx.saved_tensors), upstream), None), setup_context=_save)


@torch.library.custom_op("mclr::force_weights", mutates_args=("weights",), tags=(torch.Tag.cudagraph_unsafe,))
def _force(weights: list[Tensor]) -> None:
    rows = _rows(tuple(w.shape for w in weights), weights[0].device)
    launch(_forward, (len(rows[0]),), _table(weights, weights), *rows, weights[0], EPS, FORCE=True, BLOCK=BLOCK)


_force.register_fake(lambda weights: None)


def _admit(op: str, weights: Sequence[Tensor]) -> bool:
    """Whether `op` runs as a Triton kernel. Raises ValueError unless these are non-empty weights of one dtype on one device."""
    if not weights:
        refuse("weights", "there are none")
    triton = runs_triton(op, weights[0])
    dtype = torch.float64 if weights[0].dtype == torch.float64 and not triton else torch.float32
    # every dimension has a size of its own
    named = {f"weights[{i}]": (w, [(i, d) for d in range(4 if w.ndim > 2 else 2)]) for i, w in enumerate(weights)}
    fit((dtype,), **named)
    return triton


def used_weights(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Normalise every weight for its layer: rows of norm 1 (up to the 1e-4), in `dtype` and the layout of the weight.

    weights: fp32, [out, in] or [out, in, k, k]; they get gradients. Raises ValueError that names the argument that does not fit.
    """
    triton = _admit("used_weights", weights)
    if dtype not in FLOATS:
        refuse("dtype", f"{dtype}, not one of {', '.join(map(str, FLOATS))}")
    return _used(list(weights), dtype) if triton else list(_UsedWeightsInTorch.apply(dtype, *weights))


@torch.no_grad()
def force_weights(weights: Sequence[Tensor]) -> None:
    """Divide every row of the fp32 weights by 1e-4 + its RMS, in place.

    Raises ValueError if a tensor is no weight, has gaps in memory, or is listed twice.
    """
    triton = _admit("force_weights", weights)
    for i, w in enumerate(weights):
        if not w.is_contiguous(memory_format=layout(w)):
            refuse(f"weights[{i}]", f"strides {w.stride()} leave gaps")
    # there are no addresses while torch.compile traces
    places = {i if torch.compiler.is_compiling() else w.data_ptr() for i, w in enumerate(weights)}
    if len(places) < len(weights):
        refuse("weights", "one of them is listed twice")
    if triton:
        _force(list(weights))
    else:
        for w in weights:
            w.div_(_per_row(EPS + torch.linalg.vector_norm(w.flatten(1), dim=1) / math.sqrt(fan_in(w)), w))


def block(shape: Shape) -> list[tuple[int, ...]]:
    """Shapes of the weights of one block of EDM2's decoder, `blocks` times; one launch handles all of them.

    width: of the block. source: channels of its input, with the skip connection. embedding: width of the condition's embedding.
    """
    width, source = shape["width"], shape["source"]
    convolutions = [(width, source, 1, 1), (width, source, 3, 3), (width, shape["embedding"]), (width, width, 3, 3)]
    return [*convolutions, (3 * width, width, 1, 1), (width, width, 1, 1)] * shape["blocks"]


def draw_forced(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict:
    # several magnitudes: that of a stored weight must not matter
    return {"weights": [torch.randn(s, generator=generator) * 10 ** (i % 5 - 2) for i, s in enumerate(block(shape))]}


def draw_used(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict:
    weights = [w.requires_grad_() for w in draw_forced(shape, dtype, generator)["weights"]]
    return {"weights": weights, "dtype": dtype}


def forced(weights: list[Tensor]) -> list[Tensor]:
    """The weights themselves, after force_weights."""
    force_weights(weights)
    return weights


SHAPES = {
    "edm2-img64-s": {"width": 768, "source": 1536, "embedding": 768, "blocks": 1},
    "edm2-img512-l": {"width": 1280, "source": 2560, "embedding": 1280, "blocks": 1},
}
SIZES: dict[str, Any] = {
    "tiny": {"one block": {"width": 2, "source": 5, "embedding": 3, "blocks": 1}},
    "narrow": {"width": 4, "source": 8, "embedding": 8},
}
USED_WEIGHTS = Op("used_weights", used_weights, used_weights_definition, draw_used, shapes=SHAPES, **SIZES)
# all weights of a network in one launch: they have as many elements as 14 of these blocks
FORCED = {name: shape | {"blocks": 14} for name, shape in SHAPES.items()}
FORCE_WEIGHTS = Op("force_weights", forced, force_weights_definition, draw_forced, shapes=FORCED, **SIZES)
