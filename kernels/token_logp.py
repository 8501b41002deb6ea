"""Log-probabilities of given tokens from hidden states and the last Linear, without storing logits.

    value[r, l] = log softmax(z)[tokens[index[r], l]],  z = weight h[r, l] + bias,  d value / d z = onehot - softmax(z)

The contrast `null` scores inversely guided logits, z + g (z - sg z_guide). g is a number per token; z_guide comes from a second row
without gradient. The Linear is affine and the factors 1 + g and -g sum to 1, so these logits are the Linear of h + g (h - h_guide)
(derived). That takes one product and one log-sum-exp instead of two. z may also be log-probabilities: the softmax cancels their shift.
The gradients differ from those of that Linear, because sg also stops the gradient of weight and bias. With
d = (1 + g) (onehot - softmax): h gets weight^T d, the weight gets d h^T with h alone (not the mixture), the bias gets d.

Triton, forward: a program computes one tile of logits (fp32 accumulator). Per row it stores the largest logit, the sum of
exp(logit - largest), and the target's logit if the tile holds it. A second kernel merges the tiles. Backward: the tiles of logits are
computed again, in chunks of rows; d is stored in h's dtype, and torch.mm makes the gradients of it. This costs a fourth product beside
the three that every implementation needs, and saves the 4 V bytes per token that log_softmax keeps. Which is faster on a GPU has not
been measured. The result is deterministic: no sum depends on the order in which programs run. A width that is not a multiple of 16
spills registers; no preset has one.

B samples; R rows; L tokens of a row; M = R L; D width; V codes.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mclr.kernels.choice import runs_triton
from mclr.kernels.op import Op, Shape, cdiv, fit, floats, jit, launch, power_of_2, refuse, refuse_index, tl, wide

# logits (or their gradients) in memory at a time: as many as a CPU's cache holds; 8,192 rows of 4,096 codes, which fill a GPU
CPU_LOGITS, GPU_LOGITS = 1 << 21, 1 << 25


def definition(
    hidden_RLD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    tokens_BL: Tensor,
    index_R: Tensor,
    guide_RLD: Tensor | None = None,
    mix_RL: Tensor | None = None,
) -> Tensor:
    linear = weight_VD.to(hidden_RLD.dtype), bias_V.to(hidden_RLD.dtype)
    logits = F.linear(hidden_RLD, *linear)
    if guide_RLD is not None and mix_RL is not None:
        logits = logits + mix_RL.detach()[..., None] * (logits - F.linear(guide_RLD, *linear).detach())
    # in the dtype that autocast uses
    return logits.log_softmax(-1, wide(logits)).gather(-1, tokens_BL[index_R][..., None])[..., 0]


def _scored(hidden_RLD: Tensor, guide_RLD: Tensor | None, mix_RL: Tensor | None) -> Tensor:
    """The hidden states whose logits are scored, [M, D]."""
    if guide_RLD is not None and mix_RL is not None:
        mix = mix_RL[..., None]
        hidden_RLD = ((1 + mix) * hidden_RLD - mix * guide_RLD).to(hidden_RLD.dtype)
    return hidden_RLD.flatten(0, 1).contiguous()


def _chunks(rows: int, weight_VD: Tensor) -> Iterator[slice]:
    """Chunks of the rows, of equal size except the last."""
    most = GPU_LOGITS if weight_VD.is_cuda else CPU_LOGITS
    step = cdiv(rows, cdiv(rows * len(weight_VD), most))
    if weight_VD.is_cuda:
        # whole tiles of the kernels
        step = cdiv(step, 128) * 128
    return (slice(first, first + step) for first in range(0, rows, step))


def wide_linear(hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
    """The Linear of operands in hidden's dtype with results in fp32 (fp64 of fp64), for use without gradient."""
    weight_VD = weight_VD.to(hidden_MD.dtype)
    if hidden_MD.dtype.itemsize > 2:
        return F.linear(hidden_MD, weight_VD, bias_V)
    if hidden_MD.is_cuda:
        return torch.mm(hidden_MD, weight_VD.T, out_dtype=torch.float32).add_(bias_V)
    return F.linear(hidden_MD.float(), weight_VD.float(), bias_V.float())


class _InTorch(torch.autograd.Function):
    """Saves its inputs and, with `keep`, softmax - onehot, [M, V] in hidden's dtype; without it no tensor of that size is made."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, tokens, index, guide, mix, keep):
        scored, target = _scored(hidden, guide, mix), tokens[index].flatten()[:, None]
        kept = hidden.new_empty(len(scored), len(weight)) if keep else None
        value_M1 = torch.empty(target.shape, device=hidden.device, dtype=wide(hidden))
        # convert once, not in wide_linear for every chunk
        linear = [weight.to(hidden.dtype), bias]
        if not hidden.is_cuda:
            scored, *linear = (t.to(value_M1.dtype) for t in (scored, *linear))
        for rows in _chunks(len(scored), weight):
            logits = wide_linear(scored[rows], *linear)
            prob = logits.softmax(-1)
            # the largest probability is 1 / sum exp(z - max z): log softmax without a second pass of exponentials
            value = logits.gather(-1, target[rows]) - logits.amax(-1, True) + prob.amax(-1, True).log()
            value_M1[rows] = value
            if kept is not None:
                # p - 1 from unrounded numbers: so the gradient of an almost certain token keeps its digits
                kept[rows] = prob.scatter_(-1, target[rows], value.expm1())
        ctx.save_for_backward(hidden, weight, mix, kept)
        ctx.bias_dtype = bias.dtype
        return value_M1.view(hidden.shape[:2])

    @staticmethod
    def backward(ctx, upstream):
        hidden, weight, mix, kept = ctx.saved_tensors
        # multiply the tensors of width D, which are smaller than those of width V
        factor = (-upstream if mix is None else -upstream * (1 + mix)).flatten()[:, None].to(hidden.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            grad_hidden = torch.mm(kept, weight.to(hidden.dtype)).mul_(factor).view(hidden.shape)
            grad_weight = torch.mm(kept.T, hidden.flatten(0, 1) * factor)
            grad_bias = torch.mm(kept.T, factor)[:, 0]
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(ctx.bias_dtype), None, None, None, None, None


def in_torch(hidden_RLD, weight_VD, bias_V, tokens_BL, index_R, guide_RLD=None, mix_RL=None) -> Tensor:
    if not hidden_RLD.is_cuda and hidden_RLD[..., 0].numel() * len(weight_VD) <= CPU_LOGITS:
        # the cache holds all logits: the definition takes fewer passes
        dtype = wide(hidden_RLD)
        weight_VD, guide = weight_VD.to(hidden_RLD.dtype).to(dtype), None if guide_RLD is None else guide_RLD.to(dtype)
        return definition(hidden_RLD.to(dtype), weight_VD, bias_V.to(dtype), tokens_BL, index_R, guide, mix_RL)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (hidden_RLD, weight_VD, bias_V))
    return _InTorch.apply(hidden_RLD, weight_VD, bias_V, tokens_BL, index_R, guide_RLD, mix_RL, keep)


@jit
def _logits(
    hidden_ptr, weight_ptr, bias_ptr, row, column, M, V, D, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One tile of logits, fp32; -inf beyond the last code."""
    hidden_row = hidden_ptr + row.to(tl.int64)[:, None] * D
    weight_column = weight_ptr + column.to(tl.int64)[None, :] * D
    logits = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        hidden = tl.load(hidden_row + d[None, :], mask=(row < M)[:, None] & (d < D)[None, :], other=0.0)
        weight = tl.load(weight_column + d[:, None], mask=(column < V)[None, :] & (d < D)[:, None], other=0.0)
        logits = tl.dot(hidden, weight, logits, input_precision="tf32x3")
    bias = tl.load(bias_ptr + column, mask=column < V, other=0.0).to(tl.float32)
    return tl.where((column < V)[None, :], logits + bias[None, :], float("-inf"))


@jit
def _forward(
    hidden_ptr, weight_ptr, bias_ptr, target_ptr, top_ptr, sum_ptr, value_ptr, M, V, D,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store per row of one tile: the largest logit and the sum of exp(logit - largest), [tiles, M]; the target's logit if it is here."""
    # neighbouring programs share rows: the weight stays in the L2 cache, and hidden is read from memory once
    tile = tl.program_id(0)
    row, column = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tile * BLOCK_V + tl.arange(0, BLOCK_V)
    logits = _logits(hidden_ptr, weight_ptr, bias_ptr, row, column, M, V, D, BLOCK_M, BLOCK_V, BLOCK_D)
    top = tl.max(logits, 1)
    place = tile.to(tl.int64) * M + row
    tl.store(top_ptr + place, top, mask=row < M)
    tl.store(sum_ptr + place, tl.sum(tl.exp(logits - top[:, None]), 1), mask=row < M)
    target = tl.load(target_ptr + row, mask=row < M, other=-1)
    picked = tl.sum(tl.where(column[None, :] == target[:, None], logits, 0.0), 1)
    # exactly one tile holds the target of a row
    tl.store(value_ptr + row, picked, mask=(row < M) & (target // BLOCK_V == tile))


@jit
def _merge(
    tile_top_ptr, tile_sum_ptr, value_ptr, top_ptr, log_sum_ptr, M, TILES, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """Merge the tiles of a row: largest logit, log sum exp(logit - largest). value: from the target's logit to its log-probability."""
    row, tile = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_T)
    place = tile.to(tl.int64)[:, None] * M + row[None, :]
    inside = (tile < TILES)[:, None] & (row < M)[None, :]
    tile_top = tl.load(tile_top_ptr + place, mask=inside, other=-3e38)
    tile_sum = tl.load(tile_sum_ptr + place, mask=inside, other=1.0)
    top = tl.max(tile_top, 0)
    log_sum = tl.log(tl.sum(tile_sum * tl.exp(tile_top - top[None, :]), 0))
    tl.store(top_ptr + row, top, mask=row < M)
    tl.store(log_sum_ptr + row, log_sum, mask=row < M)
    # in this order of subtractions the digits stay, however large the logits are
    tl.store(value_ptr + row, tl.load(value_ptr + row, mask=row < M, other=0.0) - top - log_sum, mask=row < M)


@jit
def _backward(
    hidden_ptr, weight_ptr, bias_ptr, target_ptr, top_ptr, log_sum_ptr, upstream_ptr, grad_ptr, M, V, D,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits of one tile."""
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    logits = _logits(hidden_ptr, weight_ptr, bias_ptr, row, column, M, V, D, BLOCK_M, BLOCK_V, BLOCK_D)
    top = tl.load(top_ptr + row, mask=row < M, other=0.0)
    log_sum = tl.load(log_sum_ptr + row, mask=row < M, other=0.0)
    upstream = tl.load(upstream_ptr + row, mask=row < M, other=0.0)
    target = tl.load(target_ptr + row, mask=row < M, other=-1)
    prob = tl.exp(logits - top[:, None] - log_sum[:, None])
    grad = tl.where(column[None, :] == target[:, None], 1.0 - prob, -prob) * upstream[:, None]
    inside = (row < M)[:, None] & (column < V)[None, :]
    tl.store(grad_ptr + row.to(tl.int64)[:, None] * V + column[None, :], grad.to(grad_ptr.dtype.element_ty), mask=inside)


def _tiles(M: int, V: int, D: int, dtype: torch.dtype) -> tuple[tuple[int, int], dict[str, int]]:
    """(grid, constants and warps of a kernel that computes logits)."""
    most_m, most_v, most_d = (64, 128, 32) if dtype == torch.float32 else (128, 256, 64)
    block_m, block_v = power_of_2(M, 16, most_m), power_of_2(V, 16, most_v)
    constants = {"BLOCK_M": block_m, "BLOCK_V": block_v, "BLOCK_D": power_of_2(D, 16, most_d)}
    return (cdiv(V, block_v), cdiv(M, block_m)), constants | {"warps": 8 if block_m * block_v > 4096 else 4}


@torch.library.custom_op("mclr::token_logp", mutates_args=())
def _value(
    hidden: Tensor, weight: Tensor, bias: Tensor, tokens: Tensor, index: Tensor, guide: Tensor | None, mix: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(value_RL, norm_2M)."""
    scored, target = _scored(hidden, guide, mix), tokens[index].flatten()
    (M, D), V = scored.shape, len(weight)
    (tiles, blocks), constants = _tiles(M, V, D, scored.dtype)
    parts, value, norm = (torch.empty(size, device=hidden.device) for size in ((2, tiles, M), hidden.shape[:2], (2, M)))
    factor = weight.to(scored.dtype).contiguous()
    launch(_forward, (tiles, blocks), scored, factor, bias.contiguous(), target, *parts, value, M, V, D, **constants)
    block_t = power_of_2(tiles)
    block_m = max(2048 // block_t, 1)
    launch(_merge, (cdiv(M, block_m),), *parts, value, *norm, M, tiles, BLOCK_M=block_m, BLOCK_T=block_t)
    return value, norm


@_value.register_fake
def _(hidden, weight, bias, tokens, index, guide, mix):
    value = hidden.new_empty(hidden.shape[:2], dtype=torch.float32)
    return value, value.new_empty(2, value.numel())


@torch.library.custom_op("mclr::token_logp_backward", mutates_args=())
def _gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor, tokens: Tensor, index: Tensor, guide: Tensor | None, mix: Tensor | None,
    norm: Tensor, upstream: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    scored, target = _scored(hidden, guide, mix), tokens[index].flatten()
    own, V = hidden.flatten(0, 1), len(weight)
    factor, shift = weight.to(scored.dtype).contiguous(), bias.contiguous()
    upstream = (upstream if mix is None else upstream * (1 + mix)).flatten().float()
    grad_hidden = torch.empty_like(scored)
    grad_weight, grad_bias = torch.zeros_like(factor, dtype=torch.float32), torch.zeros_like(shift, dtype=torch.float32)
    for rows in _chunks(len(scored), weight):
        given = (factor, shift, target[rows], *norm[:, rows], upstream[rows])
        M, D = scored[rows].shape
        d_logits = scored.new_empty(M, V)
        grid, constants = _tiles(M, V, D, scored.dtype)
        launch(_backward, grid, scored[rows], *given, d_logits, M, V, D, **constants)
        with torch.autocast(hidden.device.type, enabled=False):
            torch.mm(d_logits, factor, out=grad_hidden[rows])
            grad_weight += d_logits.T @ own[rows]
        grad_bias += d_logits.sum(0, dtype=torch.float32)
        # free it before the next chunk's is made
        del d_logits
    return grad_hidden.view(hidden.shape), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


@_gradient.register_fake
def _(hidden, weight, bias, *rest):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (hidden, weight, bias))


def _save(ctx, inputs, output):
    # saved: the inputs and norm, 8 bytes per token; backward computes the logits again
    ctx.save_for_backward(*inputs, output[1])


def _derive(ctx, upstream, _):
    return *_gradient(*ctx.saved_tensors, upstream.contiguous()), None, None, None, None


_value.register_autograd(_derive, setup_context=_save)


def token_logp(
    hidden_RLD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    tokens_BL: Tensor,
    index_R: Tensor,
    guide_RLD: Tensor | None = None,
    mix_RL: Tensor | None = None,
) -> Tensor:
    """value_RL, fp32: log-probabilities, in nats, of each row's tokens under the Linear of its hidden states.

    hidden: fp32, fp16 or bf16; in torch also fp64, and then value is fp64. weight, bias: in hidden's dtype, or fp32 beside a half hidden;
    then the weight is rounded to half. Autocast changes nothing here. Products accumulate in fp32. hidden, weight and bias get gradients
    in their own dtypes. tokens: int64 codes, held once per sample. index: int64, the sample of each row. guide, mix: score
    z + mix (z - sg z_guide), z from hidden and z_guide from guide; no gradient passes through z_guide.
    Raises ValueError that names the argument that does not fit.
    """
    triton = runs_triton("token_logp", hidden_RLD)
    if (guide_RLD is None) != (mix_RL is None):
        refuse("guide", "guide and mix come together")
    given = {"hidden": (hidden_RLD, "RLD"), "weight": (weight_VD, "VD"), "bias": (bias_V, "V"), "tokens": (tokens_BL, "BL")}
    sizes = fit(floats(triton), **given, index=(index_R, "R"), guide=(guide_RLD, "RLD"), mix=(mix_RL, "RL"))
    fits = (hidden_RLD.dtype, torch.float32) if hidden_RLD.dtype.itemsize == 2 else (hidden_RLD.dtype,)
    for name, t in (("hidden", hidden_RLD), ("weight", weight_VD), ("bias", bias_V)):
        if t.dtype not in fits:
            refuse(name, f"dtype {t.dtype}, not {' or '.join(map(str, fits))}")
    refuse_index("tokens", tokens_BL, sizes["V"])
    refuse_index("index", index_R, sizes["B"])
    inputs = (hidden_RLD, weight_VD, bias_V, tokens_BL, index_R, guide_RLD, mix_RL)
    with torch.autocast(hidden_RLD.device.type, enabled=False):
        return _value(*inputs)[0] if triton else in_torch(*inputs)


def draw(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict:
    B, R, L, D, V = (shape[name] for name in "BRLDV")
    hidden = torch.randn(R, L, D, generator=generator).to(dtype).requires_grad_()
    # weights are fp32 for all dtypes of activations, as under autocast
    weight = (2 * torch.randn(V, D, generator=generator) / D**0.5).requires_grad_()
    bias = torch.randn(V, generator=generator).requires_grad_()
    tokens, index = torch.randint(V, (B, L), generator=generator), torch.randint(B, (R,), generator=generator)
    return {"hidden_RLD": hidden, "weight_VD": weight, "bias_V": bias, "tokens_BL": tokens, "index_R": index}


NETWORKS = {"d16": {"L": 680, "D": 1024, "V": 4096}, "d30": {"L": 680, "D": 1920, "V": 4096}}
SHAPES = {f"var-{size}, {B} pairs": {"B": B, "R": 2 * B} | shape for size, shape in NETWORKS.items() for B in (8, 32)}
TINY = {
    "pairs": {"B": 3, "R": 5, "L": 3, "D": 12, "V": 7},
    "one row": {"B": 1, "R": 1, "L": 4, "D": 16, "V": 2},
    "several blocks": {"B": 2, "R": 3, "L": 50, "D": 70, "V": 300},
}
# below 128 tokens the blocks of the kernel shrink; with 640 tokens the logits exceed a CPU's cache
OP = Op("token_logp", token_logp, definition, draw, shapes=SHAPES, tiny=TINY, narrow={"B": 1, "R": 1, "L": 640})
