"""The arms that the bench compares: the definition of an operation, the same compiled, other people's code, ours.

R rows; B samples; L tokens; D width; V codes; N = R L.
"""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mclr.kernels.op import Op, Shape, triton
from mclr.kernels.weight_norm import force_weights

# rows of a chunk of logits
CHUNK = 8192


@dataclass(frozen=True)
class Arm:
    """One way to compute an operation. kernels: the mode in which it runs (choice.using)."""

    call: Callable[..., Any]
    kernels: str = "torch"


def compiled(function: Callable[..., Any]) -> Arm:
    return Arm(torch.compile(function, dynamic=False))


def liger() -> Arm | None:
    """Liger's fused Linear and cross-entropy, with a value per token; None if Liger is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")

    def call(hidden_RLD: Tensor, weight_VD: Tensor, bias_V: Tensor, tokens_BL: Tensor, index_R: Tensor) -> Tensor:
        tokens_RL = tokens_BL[index_R]
        weight, bias = weight_VD.to(hidden_RLD.dtype), bias_V.to(hidden_RLD.dtype)
        return -loss(weight, hidden_RLD.flatten(0, 1), tokens_RL.flatten(), bias).view(tokens_RL.shape)

    return Arm(call)


def _nll(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, tokens_N: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(hidden_ND, weight_VD, bias_V).float(), tokens_N, reduction="none")


def cross_entropy(
    hidden_RLD: Tensor, weight_VD: Tensor, bias_V: Tensor, tokens_BL: Tensor, index_R: Tensor, chunk: int = 0
) -> Tensor:
    """Linear and cross-entropy. chunk: so many rows at a time, whose logits backward computes again; 0: all rows, logits kept."""
    tokens_RL, linear = tokens_BL[index_R], (weight_VD.to(hidden_RLD.dtype), bias_V.to(hidden_RLD.dtype))
    hidden_ND, tokens_N = hidden_RLD.flatten(0, 1), tokens_RL.flatten()
    if not chunk:
        return _nll(hidden_ND, *linear, tokens_N).view(tokens_RL.shape)
    pieces = zip(hidden_ND.split(chunk), tokens_N.split(chunk), strict=True)
    return torch.cat([checkpoint(_nll, h, *linear, t, use_reentrant=False) for h, t in pieces]).view(tokens_RL.shape)


def forced(weights: list[Tensor]) -> list[Tensor]:
    """force_weights in place, as training calls it. Its Op makes copies first, which doubles the bytes."""
    force_weights(weights)
    return weights


def sized(op: Op, gpu: bool) -> dict[str, Shape]:
    """The shapes to time, by name. On a CPU their sizes in `narrow` are cut, and equal shapes are timed once."""
    if gpu:
        return op.shapes
    cut: dict[str, Shape] = {}
    for name, shape in op.shapes.items():
        if shape | op.narrow not in cut.values():
            sizes = " ".join(f"{size}={n}" for size, n in op.narrow.items())
            cut[f"{re.sub(', [0-9]+ pairs', '', name)}, cut to {sizes}"] = shape | op.narrow
    return cut


def arms(op: Op, gpu: bool) -> dict[str, Arm | None]:
    """Arms by name. The first is the definition; None: not installed. Make them anew for every shape, so that each is compiled for it."""
    ours = forced if op.name == "force_weights" else op.run
    found: dict[str, Arm | None] = {"eager": Arm(op.definition)}
    if gpu:
        found["torch.compile"] = compiled(op.definition)
    if gpu and op.name == "token_logp":
        found["Liger"], found["cross-entropy, compiled"] = liger(), compiled(cross_entropy)
        found["chunks, compiled"] = compiled(lambda **inputs: cross_entropy(**inputs, chunk=CHUNK))
    found["ours/torch"] = Arm(ours)
    if gpu:
        found["ours/triton"] = Arm(ours, "triton") if triton else None
    return found
