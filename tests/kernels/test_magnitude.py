"""EDM2's fused activations: zeros, large numbers, the clip, layouts, what is refused. Formulas and gradients: test_kernels.py."""

import math

import pytest
import torch

from mclr.kernels.choice import using
from mclr.kernels.magnitude import EPS, SILU
from mclr.kernels.norm_silu import norm_silu
from mclr.kernels.op import as_tuple, compare
from mclr.kernels.registry import OPS
from mclr.kernels.scale_silu import scale_silu
from mclr.kernels.sum_clip import sum_clip

both = pytest.mark.parametrize("kernels", ["torch", "triton"])
per_op = pytest.mark.parametrize("op", [OPS[name] for name in ("norm_silu", "scale_silu", "sum_clip")], ids=lambda op: op.name)
LAST = torch.channels_last


def image(*shape, seed=0, scale=1.0, dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return x.to(dtype).requires_grad_()


@both
def test_zeros_have_a_finite_gradient(kernels):
    x = image(2, 5, 2, 3)
    with torch.no_grad():
        x[0, :, 1, 2] = 0
    with using(kernels):
        n, s = norm_silu(x)
        dn, ds = image(*x.shape, seed=1), image(*x.shape, seed=2)
        (dx,) = torch.autograd.grad((n, s), x, (dn, ds))
    assert (n[0, :, 1, 2] == 0).all() and (s[0, :, 1, 2] == 0).all() and dx.isfinite().all()
    # silu'(0) = 1/2; no direction to project out
    torch.testing.assert_close(dx[0, :, 1, 2], (dn + ds / (2 * SILU))[0, :, 1, 2] / EPS)
    with using(kernels):
        nothing = torch.zeros(1, 3, 2, 2, requires_grad=True)
        out = scale_silu(nothing, torch.zeros(1, 3, requires_grad=True))
    (dx,) = torch.autograd.grad(out.sum(), nothing)
    assert (out == 0).all() and (dx == 0).all()


# exp(-x) is infinite where SiLU is 0
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@both
@pytest.mark.parametrize("scale", [1e-3, 1e4])
@per_op
def test_small_and_large_numbers(op, scale, kernels):
    inputs = op.draw(op.tiny["odd sizes"], torch.float32, torch.Generator().manual_seed(4))
    inputs = {
        name: (t.detach() * scale).requires_grad_() if name != "scale_RN" and torch.is_tensor(t) else t
        for name, t in inputs.items()
    }
    if "clip" in inputs:
        inputs["clip"] = math.inf
    assert not compare(op, inputs, torch.float32, kernels)


@both
def test_either_output_may_go_unused(kernels):
    x = image(2, 6, 2, 2)
    with using(kernels):
        parts = [torch.autograd.grad(norm_silu(x)[i].square().sum(), x)[0] for i in range(2)]
        n, s = norm_silu(x)
        (whole,) = torch.autograd.grad(n.square().sum() + s.square().sum(), x)
    torch.testing.assert_close(parts[0] + parts[1], whole)


@both
@per_op
def test_the_layout_stays(op, kernels):
    """channels_last in, channels_last out, gradients too; and the numbers are those of NCHW."""
    inputs = op.draw(op.tiny["odd sizes"], torch.float32, torch.Generator().manual_seed(0))
    found = []
    for form in (torch.contiguous_format, LAST):
        given = {
            k: v.detach().contiguous(memory_format=form).requires_grad_() if k[1:] == "_RNHW" else v for k, v in inputs.items()
        }
        with using(kernels):
            outputs = as_tuple(op.run(**given))
        images = [v for k, v in given.items() if k[1:] == "_RNHW"]
        grads = torch.autograd.grad(sum(out.square().sum() for out in outputs), images)
        assert all(t.is_contiguous(memory_format=form) for t in (*outputs, *grads))
        found.append((*outputs, *grads))
    for nchw, last in zip(*found, strict=True):
        torch.testing.assert_close(nchw, last)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_gradient_passes_up_to_the_clip_and_at_it(dtype, kernels):
    above = torch.nextafter(torch.tensor(256.0, dtype=dtype), torch.tensor(math.inf, dtype=dtype)).item()
    values = [0.0, 255.0, 256.0, -256.0, above, -above, 1e4, -1e4]
    a = torch.tensor(values, dtype=dtype).view(1, 8, 1, 1).requires_grad_()
    b = torch.zeros_like(a, requires_grad=True)
    with using(kernels):
        # t = 0: nothing is rounded
        out = sum_clip(a, b, 0.0, 256.0)
        da, db = torch.autograd.grad(out, (a, b), torch.ones_like(a))
    assert out.flatten().tolist() == [0.0, 255.0, 256.0, -256.0, 256.0, -256.0, 256.0, -256.0]
    assert da.flatten().tolist() == [1.0] * 4 + [0.0] * 4 and (db == 0).all()


@both
def test_nan_is_not_clipped_away(kernels):
    a = torch.tensor([math.nan, 1.0]).view(1, 2, 1, 1)
    with using(kernels):
        out = sum_clip(a, torch.zeros_like(a), 0.3, 0.5).flatten()
    assert out[0].isnan() and out[1] == 0.5


X = torch.ones(2, 3, 4, 5)


@both
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: norm_silu(X[0]), "x: 3 dimensions, not 4"),
        (lambda: norm_silu(X.int()), "x: dtype torch.int32"),
        (lambda: scale_silu(X, X[0, 0]), r"scale: shape \(4, 5\), not \(2, 3\)"),
        (lambda: scale_silu(X.half(), X[..., 0, 0]), r"scale: dtype torch\.float32, not one of torch\.float16"),
        (lambda: scale_silu(X, torch.ones(2, 3, device="meta")), "scale: on meta, not on cpu as x"),
        (lambda: sum_clip(X, X[:1], 0.3, 1.0), r"b: shape \(1, 3, 4, 5\), not \(2, 3, 4, 5\)"),
        (lambda: sum_clip(X, X.half(), 0.3, 1.0), r"b: dtype torch\.float16, not one of torch\.float32"),
        (lambda: sum_clip(X, X, 1.1, 1.0), r"t: 1\.1 is not in \[0, 1\]"),
        (lambda: sum_clip(X, X, math.nan, 1.0), "t: nan is not in"),
        (lambda: sum_clip(X, X, 0.3, 0.0), r"clip: 0\.0 is not above 0"),
        (lambda: sum_clip(X, X, 0.3, math.nan), "clip: nan is not above 0"),
    ],
)
def test_what_does_not_fit_is_refused(call, says, kernels):
    with using(kernels), pytest.raises(ValueError, match=says):
        call()
