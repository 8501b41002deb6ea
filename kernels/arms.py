"""What the bench measures against what: an operation's definition, compiled, as others wrote it, ours; and VAR's attention.

R rows; B samples; H heads; L tokens; D width; V codes; d width of a head; N = R L.
"""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from mclr.kernels.op import Cost, Op, Shape, triton
from mclr.kernels.weight_norm import force_weights

# sides of VAR's token maps at 256 pixels, and where each map ends in the sequence
SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
ENDS = tuple(sum(side**2 for side in SCALES[: k + 1]) for k in range(len(SCALES)))
# rows of a chunk of logits
CHUNK = 8192


@dataclass(frozen=True)
class Arm:
    """One way to compute an operation. kernels: the word for `using`. forward_only: why there is no backward."""

    call: Callable[..., Any]
    kernels: str = "torch"
    compiled: bool = False
    forward_only: str = ""


def compiled(function: Callable[..., Any]) -> Arm:
    return Arm(torch.compile(function, dynamic=False), compiled=True)


@cache
def scale_L(device: torch.device) -> Tensor:
    return torch.tensor([k for k, side in enumerate(SCALES) for _ in range(side**2)], device=device)


@cache
def mask_LL(device: torch.device) -> Tensor:
    return scale_L(device)[:, None] >= scale_L(device)[None, :]


@cache
def block_mask(device: torch.device) -> Any:
    scale = scale_L(device)
    return create_block_mask(lambda b, h, q, k: scale[q] >= scale[k], None, None, len(scale), len(scale), device=str(device))


def masked_attention(q_RHLd: Tensor, k_RHLd: Tensor, v_RHLd: Tensor) -> Tensor:
    """VAR's attention: a token sees its own scale and all coarser ones."""
    return F.scaled_dot_product_attention(q_RHLd, k_RHLd, v_RHLd, attn_mask=mask_LL(q_RHLd.device))


def prefix_attention(q_RHLd: Tensor, k_RHLd: Tensor, v_RHLd: Tensor) -> Tensor:
    """The same without a mask: one call per scale, on what it sees."""
    scales = [(slice(start, end), slice(end)) for start, end in pairwise((0, *ENDS))]
    attend = F.scaled_dot_product_attention
    return torch.cat([attend(q_RHLd[:, :, own], k_RHLd[:, :, seen], v_RHLd[:, :, seen]) for own, seen in scales], 2)


def flexible_attention(gpu: bool) -> Arm:
    attend = torch.compile(flex_attention, dynamic=False)

    def call(**qkv: Tensor) -> Tensor:
        # on a CPU it refuses inputs that require gradient
        q, k, v = (t if gpu else t.detach() for t in qkv.values())
        return attend(q, k, v, block_mask=block_mask(q.device))

    return Arm(call, compiled=True, forward_only="" if gpu else "FlexAttention has no backward on a CPU")


def _draw_attention(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict:
    sizes = shape["R"], shape["H"], ENDS[-1], 64
    return {f"{name}_RHLd": torch.randn(sizes, generator=generator).to(dtype).requires_grad_() for name in "qkv"}


def _attention_cost(shape: Shape, dtype: torch.dtype) -> Cost:
    rows, seen = shape["R"] * shape["H"], sum(side**2 * end for side, end in zip(SCALES, ENDS, strict=True))
    tensor, flops = rows * ENDS[-1] * 64 * dtype.itemsize, 4 * rows * seen * 64
    # backward: reads q k v, the output and its gradient, writes three gradients; five products where forward has two
    return Cost(4 * tensor, 8 * tensor, flops, flops * 5 // 2)


# measured beside OPS, to see whether a kernel of our own is worth writing
COMPARISONS = {
    "scale_attention": Op(
        name="scale_attention",
        run=masked_attention,
        definition=masked_attention,
        draw=_draw_attention,
        shapes={f"var-{net}, {R // 2} pairs": {"R": R, "H": H} for net, H in (("d16", 16), ("d30", 30)) for R in (16, 64)},
        tiny={},
        cost=_attention_cost,
        narrow={"R": 2},
    )
}


def liger() -> Arm | None:
    """Liger's fused Linear and cross-entropy, a value per token."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")

    def call(hidden_RLD: Tensor, weight_VD: Tensor, bias_V: Tensor, tokens_BL: Tensor, index_R: Tensor) -> Tensor:
        tokens_RL = tokens_BL[index_R]
        weight, bias = weight_VD.to(hidden_RLD.dtype), bias_V.to(hidden_RLD.dtype)
        return -loss(weight, hidden_RLD.flatten(0, 1), tokens_RL.flatten(), bias).view(tokens_RL.shape)

    return Arm(call)


def _chunk(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, tokens_N: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(hidden_ND, weight_VD, bias_V).float(), tokens_N, reduction="none")


def chunked(hidden_RLD: Tensor, weight_VD: Tensor, bias_V: Tensor, tokens_BL: Tensor, index_R: Tensor) -> Tensor:
    """Linear and cross-entropy by chunks of rows, whose logits are computed again in backward instead of kept."""
    tokens_RL, linear = tokens_BL[index_R], (weight_VD.to(hidden_RLD.dtype), bias_V.to(hidden_RLD.dtype))
    pieces = hidden_RLD.flatten(0, 1).split(CHUNK), tokens_RL.flatten().split(CHUNK)
    values = [checkpoint(_chunk, h, *linear, t, use_reentrant=False) for h, t in zip(*pieces, strict=True)]
    return torch.cat(values).view(tokens_RL.shape)


# of a GPU alone
BASELINES: dict[str, dict[str, Callable[[], Arm | None]]] = {
    "token_logp": {"Liger": liger, "chunks, compiled": lambda: compiled(chunked)}
}


def forced(weights: list[Tensor]) -> list[Tensor]:
    """force_weights as training calls it, in place: its Op makes copies first, which moves as many bytes once more."""
    force_weights(weights)
    return weights


def sized(op: Op, gpu: bool) -> dict[str, Shape]:
    """The shapes that are timed; for a CPU cut to `narrow`, each of them once."""
    if gpu:
        return op.shapes
    cut: dict[str, Shape] = {}
    for name, shape in op.shapes.items():
        if shape | op.narrow not in cut.values():
            sizes = " ".join(f"{size}={n}" for size, n in op.narrow.items())
            cut[f"{re.sub(', [0-9]+ pairs', '', name)}, cut to {sizes}"] = shape | op.narrow
    return cut


def arms(op: Op, gpu: bool) -> dict[str, Arm | None]:
    """By name; the first is the definition, None stands for what is not installed. Made anew for every shape, compiled for it alone."""
    if op.name in COMPARISONS:
        return {"SDPA, mask": Arm(op.run), "FlexAttention": flexible_attention(gpu), "SDPA by prefix": Arm(prefix_attention)}
    ours = forced if op.name == "force_weights" else op.run
    found: dict[str, Arm | None] = {"eager": Arm(op.definition)}
    if gpu:
        found |= {"torch.compile": compiled(op.definition)} | {name: make() for name, make in BASELINES.get(op.name, {}).items()}
    found["ours/torch"] = Arm(ours)
    if gpu:
        found["ours/triton"] = Arm(ours, "triton") if triton else None
    return found
