"""Adaptive LayerNorm: LayerNorm without parameters, then the condition's scale and shift; alone, or after a gated residual add.

    x' = x + gate * y  (or x alone),  h = (x' - mean) / sqrt(variance + eps) * (1 + scale) + shift     (variance: biased, over the width)

Sources: VAR, arXiv 2404.02905; DiT, arXiv 2212.09748. gate, scale and shift are one vector per row, the same for all its tokens. x and x'
are the residual stream, in fp32.

In the first block all rows of a sample read the same tokens. Then x is held once per sample, and index says which sample a row reads.
Token 0 carries the condition: it differs from row to row and comes from `first`.

Backward (derived), with n the normalised token, g = dh (1 + scale), dx' the gradient of x', and sums over the tokens of a row:

    dx = dx' + (g - mean g - n mean(g n)) / sqrt(variance + eps),  dy = gate dx,  dgate = sum dx y,  dscale = sum dh n,  dshift = sum dh

A program handles some tokens of a row. With index, a backward program handles some tokens of a sample: it takes the rows of the sample in
order, and adds to the dx that it wrote for the rows before. Every program sums over its tokens in fp32; the sums of all programs are then
added in a fixed order.

R rows; B samples; L tokens; D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mclr.kernels.choice import runs_triton
from mclr.kernels.op import Op, Shape, cdiv, fit, floats, jit, launch, power_of_2, refuse, refuse_index, result_dtype, tl


def stream(
    x: Tensor,
    index_R: Tensor | None = None,
    first_RD: Tensor | None = None,
    y_RLD: Tensor | None = None,
    gate_RD: Tensor | None = None,
) -> Tensor:
    """x'_RLD. With index, it is made of the first token of the row and of the other tokens of its sample."""
    if index_R is not None and first_RD is not None:
        x = torch.cat((first_RD[:, None], x[:, 1:][index_R]), 1)
    return x if y_RLD is None or gate_RD is None else x + gate_RD[:, None].to(x.dtype) * y_RLD


def definition(
    x: Tensor, scale_RD: Tensor, shift_RD: Tensor, eps: float, dtype: torch.dtype, **added: Tensor
) -> tuple[Tensor | None, Tensor]:
    """added: the other arguments of stream()."""
    x_RLD = stream(x, **added)
    scale_R1D, shift_R1D = scale_RD[:, None].to(x.dtype), shift_RD[:, None].to(x.dtype)
    h_RLD = F.layer_norm(x_RLD, x.shape[-1:], eps=eps) * (1 + scale_R1D) + shift_R1D
    return x_RLD if "y_RLD" in added else None, h_RLD.to(result_dtype(x, dtype))


def in_torch(x_RLD: Tensor, scale_RD: Tensor, shift_RD: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """h_RLD."""
    factor_RD, shift_RD = 1 + scale_RD.to(x_RLD.dtype), shift_RD.to(x_RLD.dtype)
    if x_RLD.is_cpu and x_RLD[0].numel() >= 1 << 15:
        # one pass each way; for small rows and on a GPU the calls would take longer than the passes that they save
        each = zip(x_RLD.unbind(), factor_RD.unbind(), shift_RD.unbind(), strict=True)
        h_RLD = torch.stack([F.layer_norm(x_LD, x_LD.shape[-1:], factor_D, shift_D, eps) for x_LD, factor_D, shift_D in each])
    else:
        h_RLD = torch.addcmul(shift_RD[:, None], F.layer_norm(x_RLD, x_RLD.shape[-1:], eps=eps), factor_RD[:, None])
    return h_RLD.to(result_dtype(x_RLD, dtype))


@jit
def _token_of_sample(x_ptr, first_ptr, row, at, token, column, inside, D):
    """The token of a row: token 0 from first, the others from x. at: offsets of the token in x."""
    x = tl.load(x_ptr + at, mask=inside & (token > 0), other=0.0)
    return x + tl.load(first_ptr + row * D + column, mask=inside & (token == 0), other=0.0)


@jit
def _clear(dx_ptr, begin, end, D, inside, BLOCK: tl.constexpr):
    for token in range(begin, end):
        tl.store(dx_ptr + token * D, tl.zeros([BLOCK], tl.float32), mask=inside)


@jit
def _forward(
    x_ptr, first_ptr, y_ptr, gate_ptr, scale_ptr, shift_ptr, index_ptr, out_ptr, h_ptr, mean_ptr, rstd_ptr,
    gate_stride, scale_stride, shift_stride, eps, L, D, tokens, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: some tokens of one row, one after the other. Rows are the faster axis, so that the rows of a sample share x in L2."""
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
            x = _token_of_sample(x_ptr, first_ptr, row, (sample * L + token) * D + column, token, column, inside, D)
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
    """One program: some tokens of one row. With order (the rows, grouped by sample): some tokens of all rows of one sample, in order.

    x: what was normalised, per row; with order and without y, per sample. partial: [R, programs of a row, sums 2 or 3, D].
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
            _clear(dx_ptr + owner * L * D + column, begin, end, D, inside, BLOCK)
    for done in range(0, count):
        row = owner
        if order_ptr is not None:
            row = tl.load(order_ptr + start + done)
            # wait: other threads of this program wrote the dx of earlier rows, which is read below
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
                x = _token_of_sample(x_ptr, first_ptr, row, of_owner, token, column, inside, D)
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
    """t with the elements of each row next to each other; there may be gaps between rows."""
    return t if t.stride(1) == 1 else t.contiguous()


def _warps(block: int) -> int:
    """Four columns per thread: 16 bytes in fp32. With eight, fp32 and half precision would be loaded in different layouts."""
    return power_of_2(cdiv(block, 128), most=32)


@torch.library.custom_op("mclr::modulated_norm", mutates_args=())
def _normalised(
    x: Tensor, first: Tensor | None, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor,
    index: Tensor | None, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x' (empty without y), h, mean and 1 / standard deviation of every token."""
    R, (L, D) = len(scale), x.shape[1:]
    x, scale, shift = x.contiguous(), _dense(scale), _dense(shift)
    y, gate = (None, None) if y is None or gate is None else (y.contiguous(), _dense(gate))
    first, index = (None, None) if first is None or index is None else (first.contiguous(), index.contiguous())
    out, h, mean, rstd = _results(x, first, y, gate, scale, shift, index, eps, dtype)
    block, tokens = power_of_2(D, least=32), 8
    strides = (0 if gate is None else gate.stride(0), scale.stride(0), shift.stride(0))
    given = (x, first, y, gate, scale, shift, index, out, h, mean, rstd, *strides, eps, L, D, tokens)
    launch(_forward, (R, cdiv(L, tokens)), *given, BLOCK=block, warps=_warps(block))
    return out, h, mean, rstd


@_normalised.register_fake
def _results(x, first, y, gate, scale, shift, index, eps, dtype):
    R, (L, D) = len(scale), x.shape[1:]
    out = x.new_empty(0) if y is None else x.new_empty(R, L, D)
    return out, x.new_empty(R, L, D, dtype=dtype), x.new_empty(R, L), x.new_empty(R, L)


@torch.library.custom_op("mclr::modulated_norm_backward", mutates_args=())
def _gradients(
    x: Tensor, first: Tensor | None, y: Tensor | None, gate: Tensor | None, scale: Tensor, index: Tensor | None,
    mean: Tensor, rstd: Tensor, dh: Tensor, dout: Tensor | None, samples: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx (per sample if index is given), dfirst, dy, and the sums over tokens [R, 2 or 3, D]; empty where it does not apply.

    x: what was normalised; per row if y is given.
    """
    R, L, D = dh.shape
    x, scale, dh = x.contiguous(), _dense(scale), dh.contiguous()
    dout = None if dout is None else dout.contiguous()
    y, gate = (None, None) if y is None or gate is None else (y.contiguous(), _dense(gate))
    first = None if first is None else first.contiguous()
    order = offset = None
    if index is not None:
        # rows sorted by sample, then by row; the place where the rows of each sample begin, and the end
        sorted_index, order = index.sort(stable=True)
        offset = torch.searchsorted(sorted_index, torch.arange(samples + 1, device=index.device))
    dx, dfirst, dy, _ = _new_gradients(x, first, y, gate, scale, index, mean, rstd, dh, dout, samples)
    block = power_of_2(D, least=32)
    # about 1024 programs: several per multiprocessor, but few partial sums
    tokens = max(cdiv(samples * L, 1024), 4)
    programs = cdiv(L, tokens)
    sums = 2 if y is None else 3
    partial = x.new_empty(R, programs, sums, D)
    strides = (0 if gate is None else gate.stride(0), scale.stride(0))
    given = (x, first, y, gate, scale, mean, rstd, dh, dout, order, offset, dx, dfirst, dy, partial, *strides, L, D, tokens, sums)
    launch(_backward, (samples, programs), *given, BLOCK=block, warps=_warps(block))
    return dx, dfirst, dy, partial.sum(1)


@_gradients.register_fake
def _new_gradients(x, first, y, gate, scale, index, mean, rstd, dh, dout, samples):
    R, L, D = dh.shape
    dfirst = x.new_empty(0) if index is None else x.new_empty(R, D)
    dy = x.new_empty(0) if y is None else torch.empty_like(y, memory_format=torch.contiguous_format)
    return x.new_empty(samples, L, D), dfirst, dy, x.new_empty(R, 2 if y is None else 3, D)


def _save(ctx, inputs, output):
    # saved: x' or x, which the network keeps anyway; two numbers per token; the other inputs except shift
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


_normalised.register_autograd(_derive, setup_context=_save)


def modulated_norm(
    x: Tensor,
    scale_RD: Tensor,
    shift_RD: Tensor,
    eps: float,
    dtype: torch.dtype,
    index_R: Tensor | None = None,
    first_RD: Tensor | None = None,
    y_RLD: Tensor | None = None,
    gate_RD: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """(x'_RLD = x + gate * y in fp32, None without y; h_RLD in dtype: its tokens normalised in fp32, times 1 + scale, plus shift).

    x: x_RLD, fp32. With index (int64, the sample of each row): x_BLD and first, fp32; first holds token 0 of each row, and token 0 of x
    is not read. y, gate, scale, shift: fp32, fp16 or bf16; all but y of any strides. All but index get gradients; a sample without rows
    gets 0. In torch x may be fp64; then h is fp64 too. Raises ValueError that names the argument that does not fit.
    """
    triton = runs_triton("modulated_norm", x)
    accepted = floats(triton)
    for name, one, other in (("first", first_RD, index_R), ("gate", gate_RD, y_RLD)):
        if (one is None) != (other is None):
            refuse(name, f"goes with {'index' if name == 'first' else 'y'}: both or neither")
    rows = {"y": (y_RLD, "RLD"), "gate": (gate_RD, "RD"), "scale": (scale_RD, "RD"), "shift": (shift_RD, "RD")}
    fit(accepted, x=(x, "RLD" if index_R is None else "BLD"), **rows, first=(first_RD, "RD"), index=(index_R, "R"))
    for name, t in (("x", x), ("first", first_RD)):
        if t is not None and t.dtype.itemsize < 4:
            refuse(name, f"dtype {t.dtype}, not torch.float32")
    if dtype not in accepted:
        refuse("dtype", f"{dtype}, not one of {', '.join(map(str, accepted))}")
    if index_R is not None:
        refuse_index("index", index_R, len(x))
    if triton:
        x_RLD, h_RLD, *_ = _normalised(x, first_RD, y_RLD, gate_RD, scale_RD, shift_RD, index_R, eps, dtype)
    else:
        x_RLD = stream(x, index_R, first_RD, y_RLD, gate_RD)
        h_RLD = in_torch(x_RLD, scale_RD, shift_RD, eps, dtype)
    return None if y_RLD is None else x_RLD, h_RLD


def draw(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict:
    B, R, L, D = (shape[name] for name in "BRLD")
    # gate, scale and shift are slices of one tensor
    six_R6D = torch.randn(R, 6, D, generator=generator).mul(0.5).to(dtype)
    x = torch.randn(B if "indexed" in shape else R, L, D, generator=generator) + torch.randn(D, generator=generator)
    inputs = {"x": x, "scale_RD": six_R6D[:, 2], "shift_RD": six_R6D[:, 4]}
    if "indexed" in shape:
        inputs["first_RD"] = torch.randn(R, D, generator=generator)
    if "gated" in shape:
        inputs |= {"y_RLD": torch.randn(R, L, D, generator=generator).to(dtype), "gate_RD": six_R6D[:, 0]}
    for t in inputs.values():
        t.requires_grad_()
    # as in training, the two rows of a sample are far apart
    return inputs | {"eps": 1e-6, "dtype": dtype} | ({"index_R": torch.arange(R) % B} if "indexed" in shape else {})


def forms(shapes: dict[str, Shape]) -> dict[str, Shape]:
    """These sizes alone, and after a gated residual add."""
    return {f"{name}, gated": shape | {"gated": 1} for name, shape in shapes.items()} | shapes


PAIRS = {
    f"{name}, {B} pairs": {"B": B, "R": 2 * B, "L": 680, "D": D}
    for name, D in (("var-d16", 1024), ("var-d30", 1920))
    for B in (8, 32)
}
TINY = {
    "pairs of a sample": {"B": 2, "R": 4, "L": 11, "D": 40, "indexed": 1},
    "rows": {"B": 3, "R": 3, "L": 5, "D": 6},
    "wide": {"B": 1, "R": 2, "L": 2, "D": 2304, "indexed": 1},
    "one number": {"B": 1, "R": 1, "L": 1, "D": 1},
}
SHAPES = PAIRS | {f"{name}, first block": shape | {"indexed": 1} for name, shape in PAIRS.items()}
OP = Op("modulated_norm", modulated_norm, definition, draw, shapes=forms(SHAPES), tiny=forms(TINY), narrow={"B": 1, "R": 2})
