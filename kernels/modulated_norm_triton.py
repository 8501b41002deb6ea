"""The Triton kernels of modulated_norm and gated_norm, and the custom operation that runs them. Formulas: modulated_norm.py.

A program handles some tokens of a row. With index, a backward program handles some tokens of a sample: it takes the rows of the sample in
order, and adds to the dx that it wrote for the rows before. Every program sums over its tokens in fp32; the sums of all programs are then
added in a fixed order.

R rows; B samples; L tokens; D width.
"""

import torch
from torch import Tensor

from mclr.kernels.op import cdiv, jit, launch, power_of_2, tl


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


@torch.library.custom_op("mclr::gated_norm", mutates_args=())
def normalised(
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


@normalised.register_fake
def _results(x, first, y, gate, scale, shift, index, eps, dtype):
    R, (L, D) = len(scale), x.shape[1:]
    out = x.new_empty(0) if y is None else x.new_empty(R, L, D)
    return out, x.new_empty(R, L, D, dtype=dtype), x.new_empty(R, L), x.new_empty(R, L)


@torch.library.custom_op("mclr::gated_norm_backward", mutates_args=())
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
    order, offset = (None, None) if index is None else _grouped(index, samples)
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


def _grouped(index: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """(rows sorted by sample, then by row; the place where the rows of each sample begin, and the end)."""
    sorted_index, order = index.sort(stable=True)
    return order, torch.searchsorted(sorted_index, torch.arange(samples + 1, device=index.device))


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


normalised.register_autograd(_derive, setup_context=_save)
