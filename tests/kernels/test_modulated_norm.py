"""modulated_norm: extreme tokens, rows that share a sample's tokens, one gradient alone, refusals."""

import pytest
import torch

from mclr.kernels.choice import using
from mclr.kernels.modulated_norm import OP, modulated_norm
from mclr.kernels.op import as_tuple, compare, leaves, moved, results

both = pytest.mark.parametrize("kernels", ["torch", "triton"])
both_forms = pytest.mark.parametrize("gated", [False, True], ids=["alone", "gated"])


def drawn(gated, dtype=torch.float32, indexed=False, **shape):
    form = dict.fromkeys(["gated"] * gated + ["indexed"] * indexed, 1)
    return OP.draw({"B": 3, "R": 3, "L": 5, "D": 6} | form | shape, dtype, torch.Generator().manual_seed(0))


def with_tokens(inputs, change):
    """The inputs, x and first changed."""
    changed = {name: change(inputs[name].detach()).requires_grad_() for name in ("x", "first_RD") if name in inputs}
    return inputs | changed


def double(inputs):
    return moved(inputs, lambda t: t.double() if t.is_floating_point() else t)


@both
@both_forms
def test_a_constant_token_becomes_the_shift(gated, kernels):
    inputs = with_tokens(drawn(gated, D=7), lambda t: torch.full_like(t, 3.0))
    if gated:
        inputs["y_RLD"] = torch.zeros_like(inputs["y_RLD"]).requires_grad_()
    assert not compare(OP, inputs, torch.float32, kernels)
    with using(kernels):
        h = as_tuple(OP.run(**inputs))[-1]
    assert torch.equal(h, inputs["shift_RD"][:, None].expand_as(h))


@both
@pytest.mark.parametrize("factor", [1e4, 1e-4])
@both_forms
def test_large_and_small_tokens(gated, factor, kernels):
    inputs = with_tokens(drawn(gated, indexed=1, R=6, D=33), lambda t: t * factor)
    assert not compare(OP, inputs, torch.float32, kernels)


@both
@pytest.mark.parametrize(("offset", "spread"), [(1e4, 1.0), (1e-4, 1e-8), (-300.0, 0.01)])
def test_tokens_far_from_zero_lose_what_their_mean_rounds_off(offset, spread, kernels):
    inputs = with_tokens(drawn(False, D=50), lambda t: offset + spread * t) | {"eps": 1e-30}
    expected = results(OP.definition, double(inputs))
    with using(kernels):
        found = results(OP.run, inputs)
    for name, true in expected.items():
        lost = 4 * 2**-24 * abs(offset) / spread
        assert (found[name] - true).norm() <= lost * true.norm(), name


@both
@pytest.mark.parametrize("index", [[0, 1, 2, 0, 1, 2], [2, 0, 2, 2, 0], [1], [1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("sizes", [{"L": 1}, {"D": 1}, {"L": 9, "D": 11}], ids=str)
@both_forms
def test_rows_read_the_tokens_of_their_sample(gated, sizes, index, kernels):
    inputs = drawn(gated, indexed=1, R=len(index), **sizes) | {"index_R": torch.tensor(index)}
    assert not compare(OP, inputs, torch.float32, kernels)
    gathered = {name: value for name, value in inputs.items() if name not in ("index_R", "first_RD")}
    with using(kernels):
        shared = results(OP.run, inputs)
        gathered["x"] = torch.cat((inputs["first_RD"][:, None], inputs["x"][index][:, 1:]), 1).detach().requires_grad_()
        separate = results(OP.run, gathered)
    for name, value in separate.items():
        if name == "gradient of x":
            value, x = torch.zeros_like(shared[name]), value
            value[:, 1:].index_add_(0, torch.tensor(index), x[:, 1:])
            assert torch.equal(shared["gradient of first_RD"], x[:, 0])
        torch.testing.assert_close(shared[name], value, rtol=1e-6, atol=1e-6)
    unread = [sample for sample in range(3) if sample not in index]
    assert not shared["gradient of x"][:, 0].any() and not shared["gradient of x"][unread].any()


@pytest.mark.parametrize("indexed", [0, 1])
@both_forms
def test_large_rows_in_torch(gated, indexed):
    inputs = drawn(gated, torch.bfloat16, indexed=indexed, B=2, R=2, L=40, D=1024)
    assert not compare(OP, inputs, torch.bfloat16, "torch")
    assert not compare(OP, double(inputs), torch.float64, "torch")


@both
@pytest.mark.parametrize("indexed", [0, 1])
@pytest.mark.parametrize("output", [0, 1])
def test_one_gradient_alone(output, indexed, kernels):
    inputs = drawn(True, indexed=indexed)
    wide = double(inputs)

    def gradients(function, inputs):
        out = function(**inputs)[output]
        upstream = torch.linspace(-1, 2, out.numel()).view_as(out).to(out)
        found = torch.autograd.grad(out, list(leaves(inputs).values()), upstream, materialize_grads=True)
        return dict(zip(leaves(inputs), found, strict=True))

    expected = gradients(OP.definition, wide)
    with using(kernels):
        found = gradients(modulated_norm, inputs)
        outputs = modulated_norm(**inputs)
        upstream = [torch.zeros_like(out) for out in outputs]
        upstream[output] = torch.linspace(-1, 2, outputs[output].numel()).view_as(outputs[output])
        beside_zeros = torch.autograd.grad(outputs, list(leaves(inputs).values()), upstream)
    for (name, grad), zeros in zip(found.items(), beside_zeros, strict=True):
        torch.testing.assert_close(grad.double(), expected[name], rtol=1e-5, atol=1e-5)
        assert torch.equal(grad, zeros), name


@both
def test_every_tensor_may_have_its_own_dtype(kernels):
    inputs = drawn(True) | {"dtype": torch.float16}
    for name in ("y_RLD", "scale_RD"):
        inputs[name] = inputs[name].detach().half().requires_grad_()
    assert not compare(OP, inputs, torch.float16, kernels)
    with using(kernels):
        x, h = modulated_norm(**inputs)
        grads = torch.autograd.grad((x.sum(), h.sum()), list(leaves(inputs).values()))
    assert (x.dtype, h.dtype) == (torch.float32, torch.float16)
    assert [grad.dtype for grad in grads] == [t.dtype for t in leaves(inputs).values()]


INDEX = torch.tensor([0, 1, 2])
WRONG = {
    "x: 2 dimensions, not 3": {"x": torch.zeros(3, 6)},
    "x: dtype torch.bfloat16, not torch.float32": {"x": torch.zeros(3, 5, 6, dtype=torch.bfloat16)},
    r"scale: shape \(2, 6\), not \(3, 6\)": {"scale_RD": torch.zeros(2, 6)},
    r"shift: shape \(3, 5\), not \(3, 6\)": {"shift_RD": torch.zeros(3, 5)},
    "dtype: torch.int64, not one of": {"dtype": torch.int64},
    "first: goes with index: both or neither": {"first_RD": torch.zeros(3, 6)},
    r"first: shape \(2, 6\), not \(3, 6\)": {"index_R": INDEX, "first_RD": torch.zeros(2, 6)},
    "first: dtype torch.float16, not torch.float32": {"index_R": INDEX, "first_RD": torch.zeros(3, 6, dtype=torch.float16)},
    "index: dtype torch.int32, not torch.int64": {"index_R": INDEX.int(), "first_RD": torch.zeros(3, 6)},
    r"index: shape \(2,\), not \(3,\)": {"index_R": INDEX[:2], "first_RD": torch.zeros(3, 6)},
    r"index: holds 3, outside 0\.\.2": {"index_R": INDEX + 1, "first_RD": torch.zeros(3, 6)},
}


@both
@pytest.mark.parametrize("says", WRONG)
@both_forms
def test_what_does_not_fit_is_refused_by_name(gated, says, kernels):
    with using(kernels), pytest.raises(ValueError, match=says):
        OP.run(**drawn(gated) | WRONG[says])
    with using(kernels), pytest.raises(ValueError, match=r"y: shape \(3, 4, 6\), not \(3, 5, 6\)"):
        modulated_norm(**drawn(True) | {"y_RLD": torch.zeros(3, 4, 6)})
    with using(kernels), pytest.raises(ValueError, match="gate: goes with y: both or neither"):
        modulated_norm(**drawn(False) | {"y_RLD": torch.zeros(3, 5, 6)})
