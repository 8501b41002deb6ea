"""Adaptive LayerNorm: LayerNorm without parameters, then the condition's scale and shift; alone, or after a gated residual add.

    modulated_norm:  h = (x - mean) / sqrt(variance + eps) * (1 + scale) + shift            (variance: biased, over the width)
    gated_norm:      x' = x + gate * y,  h = modulated_norm(x')                            (VAR, arXiv 2404.02905; DiT, arXiv 2212.09748)

gate, scale and shift are one vector per row, the same for all its tokens. x and x' are the residual stream, in fp32.

In the first block all rows of a sample read the same tokens. Then x is held once per sample, and index says which sample a row reads.
Token 0 carries the condition: it differs from row to row and comes from `first`.

Backward (derived), with n the normalised token, g = dh (1 + scale), dx' the gradient of x', and sums over the tokens of a row:

    dx = dx' + (g - mean g - n mean(g n)) / sqrt(variance + eps),  dy = gate dx,  dgate = sum dx y,  dscale = sum dh n,  dshift = sum dh

R rows; B samples; L tokens; D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mclr.kernels.choice import runs_triton
from mclr.kernels.modulated_norm_triton import normalised
from mclr.kernels.op import Cost, Op, Shape, fit, floats, refuse, refuse_index, result_dtype


def of_rows(x: Tensor, index_R: Tensor | None = None, first_RD: Tensor | None = None) -> Tensor:
    """x_RLD: x itself; with index, the first token of the row and then the other tokens of its sample."""
    return x if index_R is None or first_RD is None else torch.cat((first_RD[:, None], x[:, 1:][index_R]), 1)


def gated_sum(x: Tensor, y_RLD: Tensor, gate_RD: Tensor, index_R: Tensor | None = None, first_RD: Tensor | None = None) -> Tensor:
    """x'_RLD."""
    return of_rows(x, index_R, first_RD) + gate_RD[:, None].to(x.dtype) * y_RLD


def modulated_definition(
    x: Tensor, scale_RD: Tensor, shift_RD: Tensor, eps: float, dtype: torch.dtype, **shared: Tensor | None
) -> Tensor:
    """shared: index_R and first_RD."""
    scale_R1D, shift_R1D = scale_RD[:, None].to(x.dtype), shift_RD[:, None].to(x.dtype)
    normed_RLD = F.layer_norm(of_rows(x, **shared), x.shape[-1:], eps=eps)
    return (normed_RLD * (1 + scale_R1D) + shift_R1D).to(result_dtype(x, dtype))


def gated_definition(
    x: Tensor, y_RLD: Tensor, gate_RD: Tensor, index_R: Tensor | None = None, first_RD: Tensor | None = None, **norm: Any
) -> tuple[Tensor, Tensor]:
    x_RLD = gated_sum(x, y_RLD, gate_RD, index_R, first_RD)
    return x_RLD, modulated_definition(x_RLD, **norm)


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


def _refuse(triton: bool, x: Tensor, dtype: torch.dtype, index_R: Tensor | None, first_RD: Tensor | None, **rows: Tensor) -> None:
    """Raises ValueError that names the argument that does not fit. rows: the arguments with one entry per row, by name."""
    accepted, per_row = floats(triton), {name: (t, "RLD" if name == "y" else "RD") for name, t in rows.items()}
    if (index_R is None) != (first_RD is None):
        refuse("first", "goes with index: both or neither")
    fit(accepted, x=(x, "RLD" if index_R is None else "BLD"), **per_row, first=(first_RD, "RD"), index=(index_R, "R"))
    for name, t in (("x", x), ("first", first_RD)):
        if t is not None and t.dtype.itemsize < 4:
            refuse(name, f"dtype {t.dtype}, not torch.float32")
    if dtype not in accepted:
        refuse("dtype", f"{dtype}, not one of {', '.join(map(str, accepted))}")
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

    x: x_RLD, fp32. With index (int64, the sample of each row): x_BLD and first, fp32; first holds token 0 of each row, and token 0 of x
    is not read. scale, shift: fp32, fp16 or bf16, of any strides. All but index get gradients; a sample without rows gets 0. In torch x
    may be fp64; then h is fp64 too. Raises ValueError that names the argument that does not fit.
    """
    triton = runs_triton("modulated_norm", x)
    _refuse(triton, x, dtype, index_R, first_RD, scale=scale_RD, shift=shift_RD)
    if not triton:
        return in_torch(of_rows(x, index_R, first_RD), scale_RD, shift_RD, eps, dtype)
    return normalised(x, first_RD, None, None, scale_RD, shift_RD, index_R, eps, dtype)[1]


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

    y, gate: fp32, fp16 or bf16; the others as in modulated_norm. Raises ValueError that names the argument that does not fit.
    """
    triton = runs_triton("gated_norm", x)
    _refuse(triton, x, dtype, index_R, first_RD, y=y_RLD, gate=gate_RD, scale=scale_RD, shift=shift_RD)
    if not triton:
        x_RLD = gated_sum(x, y_RLD, gate_RD, index_R, first_RD)
        return x_RLD, in_torch(x_RLD, scale_RD, shift_RD, eps, dtype)
    return normalised(x, first_RD, y_RLD, gate_RD, scale_RD, shift_RD, index_R, eps, dtype)[:2]


def draw_modulated(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict:
    B, R, L, D = (shape[name] for name in "BRLD")
    indexed = "indexed" in shape
    x = torch.randn(B if indexed else R, L, D, generator=generator) + torch.randn(D, generator=generator)
    # gate, scale and shift are slices of one tensor
    six_R6D = torch.randn(R, 6, D, generator=generator).mul(0.5).to(dtype)
    inputs = {"x": x, "scale_RD": six_R6D[:, 2], "shift_RD": six_R6D[:, 4]}
    if indexed:
        inputs["first_RD"] = torch.randn(R, D, generator=generator)
    for t in inputs.values():
        t.requires_grad_()
    # as in training, the two rows of a sample are far apart
    return inputs | {"eps": 1e-6, "dtype": dtype} | ({"index_R": torch.arange(R) % B} if indexed else {})


def draw_gated(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict:
    y = torch.randn(shape["R"], shape["L"], shape["D"], generator=generator).to(dtype).requires_grad_()
    gate = torch.randn(shape["R"], 6, shape["D"], generator=generator).to(dtype)[:, 0].requires_grad_()
    return {"y_RLD": y, "gate_RD": gate} | draw_modulated(shape, dtype, generator)


def cost_modulated(shape: Shape, dtype: torch.dtype) -> Cost:
    B, R, L, D = (shape[name] for name in "BRLD")
    x, h = 4 * (B if "indexed" in shape else R) * L * D, R * L * D * dtype.itemsize
    return Cost(x + h, 2 * x + h)


def cost_gated(shape: Shape, dtype: torch.dtype) -> Cost:
    """Beside the bytes of modulated_norm: y and x' forward; dx', y and dy backward. Backward reads x' in place of x."""
    B, R, L, D = (shape[name] for name in "BRLD")
    x, stream, h = 4 * (B if "indexed" in shape else R) * L * D, 4 * R * L * D, R * L * D * dtype.itemsize
    return Cost(x + stream + 2 * h, x + 2 * stream + 3 * h)


PAIRS = {
    f"{name}, {B} pairs": {"B": B, "R": 2 * B, "L": 680, "D": D}
    for name, D in (("var-d16", 1024), ("var-d30", 1920))
    for B in (8, 32)
}
SIZES: dict[str, Any] = {
    "shapes": PAIRS | {f"{name}, first block": shape | {"indexed": 1} for name, shape in PAIRS.items()},
    "tiny": {
        "rows": {"B": 3, "R": 3, "L": 5, "D": 6},
        "pairs of a sample": {"B": 2, "R": 4, "L": 11, "D": 40, "indexed": 1},
        "wide": {"B": 1, "R": 2, "L": 2, "D": 2304, "indexed": 1},
        "one number": {"B": 1, "R": 1, "L": 1, "D": 1},
    },
    "narrow": {"B": 1, "R": 2},
}
MODULATED_NORM = Op("modulated_norm", modulated_norm, modulated_definition, draw_modulated, cost=cost_modulated, **SIZES)
GATED_NORM = Op("gated_norm", gated_norm, gated_definition, draw_gated, cost=cost_gated, **SIZES)
