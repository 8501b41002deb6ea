"""LayerNorm without parameters, then the condition's scale and shift; and the same after a gated residual add (adaptive LayerNorm).

    modulated_norm:  h = (x - mean) / sqrt(variance + eps) * (1 + scale) + shift            (variance: the biased one, over the width)
    gated_norm:      x' = x + gate * y,  h = modulated_norm(x')                            (VAR, arXiv 2404.02905; DiT, arXiv 2212.09748)

gate, scale and shift are one vector per row, the same for all its tokens; x and x' are the residual stream, in fp32.

Where all rows of a sample still read the same tokens, which is so in the first block, x is held once per SAMPLE and read through index.
Token 0 is of the row, as it carries the condition: it comes from `first`.

Backward, with n the normalised token, g = dh (1 + scale) and dx' what comes from the stream's later readers (derived):

    dx = dx' + (g - mean g - n mean(g n)) / sqrt(variance + eps),  dy = gate dx,  dgate = sum dx y,  dscale = sum dh n,  dshift = sum dh

with sums over a row's tokens. A program owns some tokens of a row, or with index of a sample: it goes over that sample's rows in order,
each adding to the dx that it wrote for those before.

Bytes per element of a row, y and h in bf16, floors at an H200's 4.3 TB/s in us, forward + backward, 8 and 32 pairs of 680 tokens:

| | forward | backward | var-d16 (D = 1024) | var-d30 (D = 1920) |
| --- | --- | --- | --- | --- |
| modulated_norm | x 4, h 2 | x 4, dh 2, dx 4 | 16 + 26, 62 + 104 | 29 + 49, 117 + 194 |
| gated_norm | x 4, y 2, x' 4, h 2 | x' 4, dx' 4, dh 2, y 2, dx 4, dy 2 | 31 + 47, 124 + 187 | 58 + 87, 233 + 350 |

With index a pair's forward reads x once: per element of a sample 8 bytes instead of 12, gated_norm 20 instead of 24. Its backward must move
12 instead of 20 (32 instead of 36) and, where the L2 cache does not hold what a program wrote, moves up to 24 (40). Two separate rows
also need the copy of x, 12 bytes, and as many for its gradient. The sums over tokens are of each program first, in fp32, then added in
fixed order: some 1024 programs write 8 to 12 D bytes per row of theirs, 24 MB at most (47 with index), which the cache holds.

R rows; B samples; L tokens; D width.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mclr.kernels.choice import runs_triton
from mclr.kernels.op import Cost, Op, Shape, cdiv, floats, jit, launch, power_of_2, refuse, refuse_index, refuse_unlike, tl


def of_rows(x: Tensor, index_R: Tensor | None, first_RD: Tensor | None) -> Tensor:
    """x_RLD: x itself, or the tokens of each row's sample after the row's own first."""
    return x if index_R is None or first_RD is None else torch.cat((first_RD[:, None], x[:, 1:][index_R]), 1)


def gated_sum(x: Tensor, y_RLD: Tensor, gate_RD: Tensor, index_R: Tensor | None, first_RD: Tensor | None) -> Tensor:
    return of_rows(x, index_R, first_RD) + gate_RD[:, None].to(x.dtype) * y_RLD


def activation(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of h: an fp64 x makes it fp64."""
    return x.dtype if x.dtype == torch.float64 else dtype


def modulated_definition(
    x: Tensor,
    scale_RD: Tensor,
    shift_RD: Tensor,
    eps: float,
    dtype: torch.dtype,
    index_R: Tensor | None = None,
    first_RD: Tensor | None = None,
) -> Tensor:
    scale_R1D, shift_R1D = scale_RD[:, None].to(x.dtype), shift_RD[:, None].to(x.dtype)
    normed_RLD = F.layer_norm(of_rows(x, index_R, first_RD), x.shape[-1:], eps=eps)
    return (normed_RLD * (1 + scale_R1D) + shift_R1D).to(activation(x, dtype))


def gated_definition(
    x: Tensor,
    y_RLD: Tensor,
    gate_RD: Tensor,
    scale_RD: Tensor,
    shift_RD: Tensor,
    eps: float,
    dtype: torch.dtype,
    index_R: Tensor | None = None,
    first_RD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    x_RLD = gated_sum(x, y_RLD, gate_RD, index_R, first_RD)
    return x_RLD, modulated_definition(x_RLD, scale_RD, shift_RD, eps, dtype)


def modulated_in_torch(
    x: Tensor,
    scale_RD: Tensor,
    shift_RD: Tensor,
    eps: float,
    dtype: torch.dtype,
    index_R: Tensor | None = None,
    first_RD: Tensor | None = None,
) -> Tensor:
    x_RLD = of_rows(x, index_R, first_RD)
    factor_RD, shift_RD = 1 + scale_RD.to(x.dtype), shift_RD.to(x.dtype)
    if x.is_cpu and x_RLD[0].numel() >= 1 << 15:
        # one pass each way; where a row is small the calls, or on a GPU the launches, take longer than the passes that they save
        each = zip(x_RLD.unbind(), factor_RD.unbind(), shift_RD.unbind(), strict=True)
        h_RLD = torch.stack([F.layer_norm(x_LD, x_LD.shape[-1:], factor_D, shift_D, eps) for x_LD, factor_D, shift_D in each])
    else:
        h_RLD = torch.addcmul(shift_RD[:, None], F.layer_norm(x_RLD, x.shape[-1:], eps=eps), factor_RD[:, None])
    return h_RLD.to(activation(x, dtype))


@jit
def _forward(
    x_ptr, first_ptr, y_ptr, gate_ptr, scale_ptr, shift_ptr, index_ptr, out_ptr, h_ptr, mean_ptr, rstd_ptr,
    gate_stride, scale_stride, shift_stride, eps, L, D, tokens, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: some tokens of one row, one after the other. Rows are the faster axis: those of a sample share x in L2."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * tokens
    column = tl.arange(0, BLOCK)
    inside = column < D
    factor = 1.0 + tl.load(scale_ptr + row * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + row * shift_stride + column, mask=inside, other=0.0).to(tl.float32)
    if y_ptr is not None:
        gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    for token in range(begin, min(begin + tokens, L)):
        at = (row * L + token) * D + column
        if index_ptr is None:
            x = tl.load(x_ptr + at, mask=inside, other=0.0)
        else:
            sample = tl.load(index_ptr + row)
            x = tl.load(x_ptr + (sample * L + token) * D + column, mask=inside & (token > 0), other=0.0)
            x += tl.load(first_ptr + row * D + column, mask=inside & (token == 0), other=0.0)
        if y_ptr is not None:
            x += gate * tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(out_ptr + at, x, mask=inside)
        mean = tl.sum(x) / D
        centred = tl.where(inside, x - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred) / D + eps)
        tl.store(h_ptr + at, (centred * rstd * factor + shift).to(h_ptr.dtype.element_ty), mask=inside)
        tl.store(mean_ptr + row * L + token, mean)
        tl.store(rstd_ptr + row * L + token, rstd)


@jit
def _backward(
    x_ptr, first_ptr, y_ptr, gate_ptr, scale_ptr, mean_ptr, rstd_ptr, dh_ptr, dout_ptr, order_ptr, offset_ptr,
    dx_ptr, dfirst_ptr, dy_ptr, partial_ptr, gate_stride, scale_stride, L, D, tokens, sums, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: some tokens of one row; with order, which groups rows by sample, of all rows of one sample, in order.

    x: what was normalised; of rows where y is given or order is not, else of samples. partial: [R, programs of a row, sums 2 or 3, D].
    """
    owner = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * tokens
    end = min(begin + tokens, L)
    column = tl.arange(0, BLOCK)
    inside = column < D
    count = 1
    if order_ptr is not None:
        start = tl.load(offset_ptr + owner)
        count = (tl.load(offset_ptr + owner + 1) - start).to(tl.int32)
        if count == 0:
            for token in range(begin, end):
                tl.store(dx_ptr + (owner * L + token) * D + column, tl.zeros([BLOCK], tl.float32), mask=inside)
    for done in range(0, count):
        if order_ptr is None:
            row = owner
        else:
            row = tl.load(order_ptr + start + done)
            # dx of the rows before, written by other threads of this program, is read below
            tl.debug_barrier()
        factor = 1.0 + tl.load(scale_ptr + row * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
        dscale = tl.zeros([BLOCK], tl.float32)
        dshift = tl.zeros([BLOCK], tl.float32)
        if y_ptr is not None:
            gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
            dgate = tl.zeros([BLOCK], tl.float32)
        for token in range(begin, end):
            at = (row * L + token) * D + column
            of_owner = (owner * L + token) * D + column
            if y_ptr is not None or order_ptr is None:
                x = tl.load(x_ptr + at, mask=inside, other=0.0)
            else:
                x = tl.load(x_ptr + of_owner, mask=inside & (token > 0), other=0.0)
                x += tl.load(first_ptr + row * D + column, mask=inside & (token == 0), other=0.0)
            rstd = tl.load(rstd_ptr + row * L + token)
            normed = tl.where(inside, (x - tl.load(mean_ptr + row * L + token)) * rstd, 0.0)
            dh = tl.load(dh_ptr + at, mask=inside, other=0.0).to(tl.float32)
            dscale += dh * normed
            dshift += dh
            g = dh * factor
            dx = rstd * (g - tl.sum(g) / D - normed * (tl.sum(g * normed) / D))
            if dout_ptr is not None:
                dx += tl.load(dout_ptr + at, mask=inside, other=0.0)
            if y_ptr is not None:
                dgate += dx * tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
                tl.store(dy_ptr + at, (gate * dx).to(dy_ptr.dtype.element_ty), mask=inside)
            if order_ptr is not None:
                tl.store(dfirst_ptr + row * D + column, dx, mask=inside & (token == 0))
                dx += tl.load(dx_ptr + of_owner, mask=inside & (done > 0), other=0.0)
                dx = tl.where(token > 0, dx, 0.0)
            tl.store(dx_ptr + of_owner, dx, mask=inside)
        slot = partial_ptr + (row * tl.num_programs(1) + tl.program_id(1)) * sums * D + column
        tl.store(slot, dscale, mask=inside)
        tl.store(slot + D, dshift, mask=inside)
        if y_ptr is not None:
            tl.store(slot + 2 * D, dgate, mask=inside)


def _dense(t: Tensor) -> Tensor:
    """Rows whose elements are neighbours in memory; the rows themselves may lie apart."""
    return t if t.stride(1) == 1 else t.contiguous()


def _warps(block: int) -> int:
    """Four columns per thread, 16 bytes in fp32: with eight, fp32 and half precision would be loaded in different layouts."""
    return power_of_2(cdiv(block, 128), most=32)


@torch.library.custom_op("mclr::gated_norm", mutates_args=())
def _norm(
    x: Tensor,
    first: Tensor | None,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    index: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x' (of size 0 without y), h, mean and 1 / standard deviation of every token."""
    R, (L, D) = len(scale), x.shape[1:]
    x, scale, shift = x.contiguous(), _dense(scale), _dense(shift)
    y, gate = (None, None) if y is None or gate is None else (y.contiguous(), _dense(gate))
    first, index = (None, None) if first is None or index is None else (first.contiguous(), index.contiguous())
    h, mean, rstd = x.new_empty(R, L, D, dtype=dtype), x.new_empty(R, L), x.new_empty(R, L)
    out = x.new_empty(0) if y is None else x.new_empty(R, L, D)
    block, tokens = power_of_2(D, least=32), 8
    strides = (0 if gate is None else gate.stride(0), scale.stride(0), shift.stride(0))
    given = (x, first, y, gate, scale, shift, index, out, h, mean, rstd, *strides, eps, L, D, tokens)
    launch(_forward, (R, cdiv(L, tokens)), *given, BLOCK=block, warps=_warps(block))
    return out, h, mean, rstd


@_norm.register_fake
def _(x, first, y, gate, scale, shift, index, eps, dtype):
    R, (L, D) = len(scale), x.shape[1:]
    out = x.new_empty(0) if y is None else x.new_empty(R, L, D)
    return out, x.new_empty(R, L, D, dtype=dtype), x.new_empty(R, L), x.new_empty(R, L)


@torch.library.custom_op("mclr::gated_norm_backward", mutates_args=())
def _gradients(
    x: Tensor,
    first: Tensor | None,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    index: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dh: Tensor,
    dout: Tensor | None,
    samples: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx (of samples where index is given), dfirst, dy, and the sums over tokens [R, 2 or 3, D]; of size 0 where it does not apply.

    x: what was normalised, of rows where y is given.
    """
    R, L, D = dh.shape
    x, scale, dh = x.contiguous(), _dense(scale), dh.contiguous()
    dout = None if dout is None else dout.contiguous()
    y, gate = (None, None) if y is None or gate is None else (y.contiguous(), _dense(gate))
    first = None if first is None else first.contiguous()
    order, offset = (None, None) if index is None else _grouped(index, samples)
    dx = x.new_empty(samples, L, D)
    dfirst = x.new_empty(0) if index is None else x.new_empty(R, D)
    dy = x.new_empty(0) if y is None else torch.empty_like(y)
    block = power_of_2(D, least=32)
    # about 1024 programs: some for every multiprocessor, few partial sums
    tokens = max(cdiv(samples * L, 1024), 4)
    programs = cdiv(L, tokens)
    sums = 2 if y is None else 3
    partial = x.new_empty(R, programs, sums, D)
    strides = (0 if gate is None else gate.stride(0), scale.stride(0))
    given = (x, first, y, gate, scale, mean, rstd, dh, dout, order, offset, dx, dfirst, dy, partial, *strides, L, D, tokens, sums)
    launch(_backward, (samples, programs), *given, BLOCK=block, warps=_warps(block))
    return dx, dfirst, dy, partial.sum(1)


def _grouped(index: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """(rows sorted by sample, in each sample by row; where each sample's rows begin there, and the end)."""
    sorted_index, order = index.sort(stable=True)
    return order, torch.searchsorted(sorted_index, torch.arange(samples + 1, device=index.device))


@_gradients.register_fake
def _(x, first, y, gate, scale, index, mean, rstd, dh, dout, samples):
    R, L, D = dh.shape
    dfirst = x.new_empty(0) if index is None else x.new_empty(R, D)
    dy = x.new_empty(0) if y is None else torch.empty_like(y, memory_format=torch.contiguous_format)
    return x.new_empty(samples, L, D), dfirst, dy, x.new_empty(R, 2 if y is None else 3, D)


def _save(ctx, inputs, output):
    # x' or x, which the network holds anyway, two numbers per token, and the other inputs but shift
    x, first, y, gate, scale, shift, index, _, ctx.dtype = inputs
    out, _, mean, rstd = output
    ctx.samples, ctx.shift_dtype = len(x), shift.dtype
    ctx.save_for_backward(x if y is None else out, first, y, gate, scale, index, mean, rstd)
    ctx.set_materialize_grads(False)


def _derive(ctx, dout, dh, dmean, drstd):
    x, first, y, gate, scale, index, mean, rstd = ctx.saved_tensors
    if dh is None:
        dh = torch.zeros(*mean.shape, x.shape[-1], dtype=ctx.dtype, device=x.device)
    dout = None if y is None else dout
    dx, dfirst, dy, sums = _gradients(x, first, y, gate, scale, index, mean, rstd, dh, dout, ctx.samples)
    dscale, dshift = sums[:, 0].to(scale.dtype), sums[:, 1].to(ctx.shift_dtype)
    dy, dgate = (None, None) if y is None else (dy, sums[:, 2].to(gate.dtype))
    return dx, None if index is None else dfirst, dy, dgate, dscale, dshift, None, None, None


_norm.register_autograd(_derive, setup_context=_save)


def _refuse(
    triton: bool, x: Tensor, rows: dict[str, Tensor], dtype: torch.dtype, index_R: Tensor | None, first_RD: Tensor | None
) -> None:
    """rows: what has one entry per row, by name."""
    if x.ndim != 3:
        refuse("x", f"{x.ndim} dimensions, not 3")
    if (index_R is None) != (first_RD is None):
        refuse("first", "goes with index: both or neither")
    R, (L, D) = len(rows["scale"]), x.shape[1:]
    tensors = {"x": x, **rows}
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("gate", "scale", "shift", "first"), (R, D))
    shapes |= {"x": (R if index_R is None else len(x), L, D), "y": (R, L, D), "index": (R,)}
    if index_R is not None and first_RD is not None:
        tensors |= {"index": index_R, "first": first_RD}
    accepted = floats(triton)
    refuse_unlike(tensors, shapes, accepted)
    if dtype not in accepted:
        refuse("dtype", f"{dtype}, not one of {', '.join(map(str, accepted))}")
    for name, t in tensors.items():
        narrow = name in ("x", "first") and t.dtype in (torch.float16, torch.bfloat16)
        if narrow:
            refuse(name, f"dtype {t.dtype}, not torch.float32")
    if index_R is not None:
        refuse_index("index", index_R, len(x))


def modulated_norm(
    x: Tensor,
    scale_RD: Tensor,
    shift_RD: Tensor,
    eps: float,
    dtype: torch.dtype,
    index_R: Tensor | None = None,
    first_RD: Tensor | None = None,
) -> Tensor:
    """h_RLD in dtype: tokens normalised in fp32, times 1 + scale, plus shift.

    x: x_RLD fp32; with index (int64 sample of each row) x_BLD, whose token 0 is not read: first holds that of each row, fp32.
    scale, shift: fp32, fp16 or bf16, of any strides. All get gradients but index; a sample without a row gets 0. In torch an fp64 x is
    computed, and h returned, in fp64. Raises ValueError naming an argument that does not fit.
    """
    triton = runs_triton("modulated_norm", x)
    _refuse(triton, x, {"scale": scale_RD, "shift": shift_RD}, dtype, index_R, first_RD)
    if not triton:
        return modulated_in_torch(x, scale_RD, shift_RD, eps, dtype, index_R, first_RD)
    return _norm(x, first_RD, None, None, scale_RD, shift_RD, index_R, eps, dtype)[1]


def gated_norm(
    x: Tensor,
    y_RLD: Tensor,
    gate_RD: Tensor,
    scale_RD: Tensor,
    shift_RD: Tensor,
    eps: float,
    dtype: torch.dtype,
    index_R: Tensor | None = None,
    first_RD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(x'_RLD = x + gate * y in fp32, h_RLD = modulated_norm(x') in dtype).

    y, gate: fp32, fp16 or bf16; the rest as of modulated_norm. Raises ValueError naming an argument that does not fit.
    """
    triton = runs_triton("gated_norm", x)
    _refuse(triton, x, {"y": y_RLD, "gate": gate_RD, "scale": scale_RD, "shift": shift_RD}, dtype, index_R, first_RD)
    if not triton:
        x_RLD = gated_sum(x, y_RLD, gate_RD, index_R, first_RD)
        return x_RLD, modulated_in_torch(x_RLD, scale_RD, shift_RD, eps, dtype)
    return _norm(x, first_RD, y_RLD, gate_RD, scale_RD, shift_RD, index_R, eps, dtype)[:2]


def draw_modulated(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict:
    B, R, L, D = shape["B"], shape["R"], shape["L"], shape["D"]
    indexed = shape.get("indexed", 0)
    x = torch.randn(B if indexed else R, L, D, generator=generator) + torch.randn(D, generator=generator)
    # gate, scale and shift are slices of one tensor
    six_R6D = torch.randn(R, 6, D, generator=generator).mul(0.5).to(dtype)
    inputs = {"x": x, "scale_RD": six_R6D[:, 2], "shift_RD": six_R6D[:, 4]}
    if indexed:
        inputs["first_RD"] = torch.randn(R, D, generator=generator)
    for t in inputs.values():
        t.requires_grad_()
    # a sample has two rows, far apart
    return inputs | {"eps": 1e-6, "dtype": dtype} | ({"index_R": torch.arange(R) % B} if indexed else {})


def draw_gated(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict:
    R, L, D = shape["R"], shape["L"], shape["D"]
    y = torch.randn(R, L, D, generator=generator).to(dtype).requires_grad_()
    gate = torch.randn(R, 6, D, generator=generator).to(dtype)[:, 0].requires_grad_()
    return {"y_RLD": y, "gate_RD": gate} | draw_modulated(shape, dtype, generator)


def _cost(shape: Shape, dtype: torch.dtype, gated: bool) -> Cost:
    rows, a = shape["R"] * shape["L"] * shape["D"], dtype.itemsize
    x = 4 * rows * shape["B"] // shape["R"] if shape.get("indexed") else 4 * rows
    if gated:
        return Cost(x + rows * (4 + 2 * a), x + rows * (8 + 3 * a))
    return Cost(x + rows * a, 2 * x + rows * a)


SIZES = {
    f"{name}, {B} pairs": {"B": B, "R": 2 * B, "L": 680, "D": D}
    for name, D in (("var-d16", 1024), ("var-d30", 1920))
    for B in (8, 32)
}
TINY = {
    "rows": {"B": 3, "R": 3, "L": 5, "D": 6},
    "pairs of a sample": {"B": 2, "R": 4, "L": 11, "D": 40, "indexed": 1},
    "wide": {"B": 1, "R": 2, "L": 2, "D": 2304, "indexed": 1},
    "one number": {"B": 1, "R": 1, "L": 1, "D": 1},
}
SHAPES = SIZES | {f"{name}, first block": shape | {"indexed": 1} for name, shape in SIZES.items()}
# what the compiled kernels do not depend on
NARROW = {"B": 1, "R": 2}

MODULATED_NORM = Op(
    name="modulated_norm",
    run=modulated_norm,
    definition=modulated_definition,
    draw=draw_modulated,
    shapes=SHAPES,
    tiny=TINY,
    cost=partial(_cost, gated=False),
    narrow=NARROW,
)
GATED_NORM = Op(
    name="gated_norm",
    run=gated_norm,
    definition=gated_definition,
    draw=draw_gated,
    shapes=SHAPES,
    tiny=TINY,
    cost=partial(_cost, gated=True),
    narrow=NARROW,
)
