"""Value of a denoised image: minus EDM's weighted squared error, from the network's raw answer, per row of the pair.

    D = c_skip x_t + c_out F,  c_skip = s^2 / (sigma^2 + s^2),  c_out = sigma s / sqrt(sigma^2 + s^2),  s = sigma_data
    value = -(sigma^2 + s^2) / (sigma s)^2 * mean (D - x)^2                                             (EDM, arXiv 2206.00364, table 1)
          = -mean (F - target)^2,  target = (x - c_skip x_t) / c_out                                    (the weight is c_out^-2; derived)

The second form is what runs: the target has unit variance, it is the same for both rows of a pair, and where sigma is small it comes
from x - x_t, which is exact where the noise is below |x| / 2, instead of from two products that are rounded before they cancel.

Per element of a row, F in bf16: forward reads 2 bytes of F and, once per sample, 8 of x and x_t; backward reads the same and writes 2.
A pair costs 2 x 2 + 8 = 12 bytes forward and 16 backward where two separate rows cost 20 and 24. Floor at an H200's 4.3 TB/s,
32 pairs: edm2-img64-s (12,288 elements) 1.1 + 1.5 us, edm2-img512-l (16,384) 1.5 + 2.0 us: nothing beside the network; what it saves is
some twenty launches.

R rows; B samples; C H W image; N = C H W.
"""

import torch
from torch import Tensor

from mclr.kernels.choice import runs_triton
from mclr.kernels.op import Cost, Op, Shape, cdiv, floats, jit, launch, power_of_2, refuse, refuse_index, refuse_unlike, tl


def definition(
    raw_RCHW: Tensor, x_BCHW: Tensor, noisy_BCHW: Tensor, sigma_B: Tensor, index_R: Tensor, sigma_data: float
) -> Tensor:
    x, noisy, sigma = x_BCHW[index_R], noisy_BCHW[index_R], sigma_B[index_R, None, None, None]
    norm = (sigma**2 + sigma_data**2).sqrt()
    denoised = sigma_data**2 / norm**2 * noisy + sigma * sigma_data / norm * raw_RCHW
    return -((norm / (sigma * sigma_data)) ** 2 * (denoised - x).square()).flatten(1).mean(1)


def in_torch(raw_RCHW: Tensor, x_BCHW: Tensor, noisy_BCHW: Tensor, sigma_B: Tensor, index_R: Tensor, sigma_data: float) -> Tensor:
    sigma = sigma_B[:, None, None, None]
    norm = (sigma**2 + sigma_data**2).sqrt()
    small = (x_BCHW - noisy_BCHW) + (sigma / norm) ** 2 * noisy_BCHW
    target = torch.where(sigma < sigma_data, small, x_BCHW - (sigma_data / norm) ** 2 * noisy_BCHW) * (
        norm / (sigma * sigma_data)
    )
    return -(raw_RCHW.to(target.dtype) - target[index_R]).square().flatten(1).mean(1)


@jit
def _difference(raw_ptr, x_ptr, noisy_ptr, sigma_ptr, index_ptr, row, column, inside, s, N):
    """F - target at some columns of one row, fp32."""
    sample = tl.load(index_ptr + row)
    sigma = tl.load(sigma_ptr + sample)
    norm = tl.sqrt(sigma * sigma + s * s)
    x = tl.load(x_ptr + sample * N + column, mask=inside, other=0.0)
    noisy = tl.load(noisy_ptr + sample * N + column, mask=inside, other=0.0)
    raw = tl.load(raw_ptr + row * N + column, mask=inside, other=0.0).to(tl.float32)
    noise_share, data_share = sigma / norm, s / norm
    small = (x - noisy) + noise_share * noise_share * noisy
    large = x - data_share * data_share * noisy
    return raw - tl.where(sigma < s, small, large) * (norm / (sigma * s))


@jit
def _forward(raw_ptr, x_ptr, noisy_ptr, sigma_ptr, index_ptr, value_ptr, s, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < N
        difference = _difference(raw_ptr, x_ptr, noisy_ptr, sigma_ptr, index_ptr, row, column, inside, s, N)
        total += tl.where(inside, difference * difference, 0.0)
    tl.store(value_ptr + row, -tl.sum(total) / N)


@jit
def _backward(raw_ptr, x_ptr, noisy_ptr, sigma_ptr, index_ptr, upstream_ptr, grad_ptr, s, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < N
    difference = _difference(raw_ptr, x_ptr, noisy_ptr, sigma_ptr, index_ptr, row, column, inside, s, N)
    grad = -2.0 / N * tl.load(upstream_ptr + row) * difference
    tl.store(grad_ptr + row * N + column, grad.to(grad_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("mclr::denoising_value", mutates_args=())
def _value(raw: Tensor, x: Tensor, noisy: Tensor, sigma: Tensor, index: Tensor, sigma_data: float) -> Tensor:
    raw, x, noisy = raw.contiguous(), x.contiguous(), noisy.contiguous()
    R, N = len(raw), raw[0].numel()
    value = torch.empty(R, device=raw.device, dtype=torch.float32)
    block = power_of_2(N, most=4096)
    launch(_forward, (R,), raw, x, noisy, sigma.contiguous(), index.contiguous(), value, sigma_data, N, BLOCK=block, warps=8)
    return value


@_value.register_fake
def _(raw, x, noisy, sigma, index, sigma_data):
    return raw.new_empty(len(raw), dtype=torch.float32)


@torch.library.custom_op("mclr::denoising_value_backward", mutates_args=())
def _gradient(raw: Tensor, x: Tensor, noisy: Tensor, sigma: Tensor, index: Tensor, upstream: Tensor, sigma_data: float) -> Tensor:
    raw, x, noisy = raw.contiguous(), x.contiguous(), noisy.contiguous()
    R, N = len(raw), raw[0].numel()
    grad = torch.empty_like(raw)
    block = power_of_2(N, most=1024)
    given = (raw, x, noisy, sigma.contiguous(), index.contiguous(), upstream.contiguous())
    launch(_backward, (R, cdiv(N, block)), *given, grad, sigma_data, N, BLOCK=block)
    return grad


@_gradient.register_fake
def _(raw, x, noisy, sigma, index, upstream, sigma_data):
    return torch.empty_like(raw, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    # nothing but the inputs: the difference is computed again
    *tensors, ctx.sigma_data = inputs
    ctx.save_for_backward(*tensors)


def _derive(ctx, upstream):
    raw, x, noisy, sigma, index = ctx.saved_tensors
    return _gradient(raw, x, noisy, sigma, index, upstream, ctx.sigma_data), None, None, None, None, None


_value.register_autograd(_derive, setup_context=_save)


def denoising_value(
    raw_RCHW: Tensor, x_BCHW: Tensor, noisy_BCHW: Tensor, sigma_B: Tensor, index_R: Tensor, sigma_data: float
) -> Tensor:
    """value_R, fp32: minus the squared error of each row's denoised image, weighted to unit size and averaged over its dimensions.

    raw: the network's answer F, fp32, fp16 or bf16; the only one that gets a gradient. x: clean images; noisy: x_t; sigma > 0; all fp32
    and per sample. index: int64 sample of each row. Raises ValueError naming an argument that does not fit.
    """
    B, image = len(x_BCHW), tuple(raw_RCHW.shape[1:])
    tensors = {"raw": raw_RCHW, "x": x_BCHW, "noisy": noisy_BCHW, "sigma": sigma_B, "index": index_R}
    shapes = {"raw": (len(raw_RCHW), *image), "x": (B, *image), "noisy": (B, *image), "sigma": (B,), "index": (len(raw_RCHW),)}
    triton = runs_triton("denoising_value", raw_RCHW)
    if raw_RCHW.ndim != 4:
        refuse("raw", f"{raw_RCHW.ndim} dimensions, not 4")
    refuse_unlike(tensors, shapes, floats(triton))
    refuse_index("index", index_R, B)
    if not triton:
        return in_torch(raw_RCHW, x_BCHW, noisy_BCHW, sigma_B, index_R, sigma_data)
    for name in ("x", "noisy", "sigma"):
        if tensors[name].dtype != torch.float32:
            refuse(name, f"dtype {tensors[name].dtype}, not torch.float32")
    return _value(raw_RCHW, x_BCHW, noisy_BCHW, sigma_B, index_R, sigma_data)


def draw(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict:
    B, R, image = shape["B"], shape["R"], (shape["C"], shape["H"], shape["W"])
    x = torch.randn(B, *image, generator=generator) / 2
    # the noise levels of training and its extremes
    sigma = torch.randn(B, generator=generator).mul(2).sub(0.4).exp().clamp(0.002, 80.0)
    sigma[0], sigma[-1] = 0.002, 80.0
    noisy = x + sigma[:, None, None, None] * torch.randn(B, *image, generator=generator)
    raw = torch.randn(R, *image, generator=generator).to(dtype).requires_grad_()
    index = torch.randint(B, (R,), generator=generator)
    return {"raw_RCHW": raw, "x_BCHW": x, "noisy_BCHW": noisy, "sigma_B": sigma, "index_R": index, "sigma_data": 0.5}


def cost(shape: Shape, dtype: torch.dtype) -> Cost:
    N = shape["C"] * shape["H"] * shape["W"]
    forward = N * (shape["R"] * dtype.itemsize + shape["B"] * 8)
    return Cost(forward, forward + N * shape["R"] * dtype.itemsize)


OP = Op(
    name="denoising_value",
    run=denoising_value,
    definition=definition,
    draw=draw,
    shapes={
        "edm2-img64-s, 8 pairs": {"B": 8, "R": 16, "C": 3, "H": 64, "W": 64},
        "edm2-img64-s, 32 pairs": {"B": 32, "R": 64, "C": 3, "H": 64, "W": 64},
        "edm2-img512-l, 8 pairs": {"B": 8, "R": 16, "C": 4, "H": 64, "W": 64},
        "edm2-img512-l, 32 pairs": {"B": 32, "R": 64, "C": 4, "H": 64, "W": 64},
    },
    tiny={
        "pairs": {"B": 3, "R": 5, "C": 2, "H": 5, "W": 3},
        "one row": {"B": 1, "R": 1, "C": 1, "H": 1, "W": 1},
        "several blocks": {"B": 2, "R": 3, "C": 3, "H": 40, "W": 41},
    },
    cost=cost,
    narrow={"B": 2, "R": 4},
)
