"""Log-probabilities of tokens without logits: extreme logits, odd sizes, guided rows, what is kept, what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mclr.kernels import token_logp as module
from mclr.kernels.choice import using
from mclr.kernels.op import compare, moved, results
from mclr.kernels.token_logp import OP, draw, token_logp

SHAPE = {"B": 3, "R": 4, "L": 5, "D": 20, "V": 37}
both = pytest.mark.parametrize("kernels", ["torch", "triton"])


@pytest.fixture(autouse=True)
def many(monkeypatch):
    """Some rows of logits are more than a cache holds: else torch takes the definition."""
    monkeypatch.setattr(module, "CPU_LOGITS", 3 * SHAPE["V"])


def drawn(dtype=torch.float32, **sizes):
    return draw(SHAPE | sizes, dtype, torch.Generator().manual_seed(5))


def guided(dtype=torch.float32):
    """With a guide row and a weight g per token, as inverse guidance has them (-1 < g <= 0), and others."""
    inputs, generator = drawn(dtype), torch.Generator().manual_seed(6)
    mix = torch.rand(SHAPE["R"], SHAPE["L"], generator=generator) * 1.5 - 1
    mix[:, 0] = 0
    guide = torch.randn(inputs["hidden_RLD"].shape, generator=generator).to(dtype)
    return inputs | {"guide_RLD": guide, "mix_RL": mix}


def doubled(inputs):
    return moved(inputs, lambda t: t.double() if t.is_floating_point() else t)


def good(inputs, kernels, dtype=torch.float32):
    assert not compare(OP, inputs, dtype, kernels)
    return True


@both
@pytest.mark.parametrize("V", [2, 37, 100, 300])
def test_first_and_last_code_of_any_number_of_codes(kernels, V):
    inputs = drawn(V=V)
    inputs["tokens_BL"][:, ::2], inputs["tokens_BL"][:, 1::2] = 0, V - 1
    assert good(inputs, kernels)


@both
@pytest.mark.parametrize("signs", ["all", "mixed"])
def test_logits_of_ten_thousand(kernels, signs):
    """+-1e4 + small integers, which fp32 holds: log-probabilities near -5 among logits of 1e4 keep their digits."""
    V = 300
    inputs, code = drawn(D=2, V=V), torch.arange(V)
    with torch.no_grad():
        inputs["hidden_RLD"][:, ::2], inputs["hidden_RLD"][:, 1::2] = torch.tensor([[1e4, 1.0], [-1e4, 1.0]]).unbind()
        inputs["weight_VD"][:, 0] = torch.where((code % 7 == 0) & (signs == "mixed"), -1.0, 1.0)
        inputs["weight_VD"][:, 1] = code % 5
        inputs["bias_V"].zero_()
    assert good(inputs, kernels)


@both
def test_a_certain_token(kernels):
    """Its log p is 0 and has no gradient; that of another token is -1e4 and moves both."""
    V, certain = 300, 299
    inputs = drawn(V=V) | {"tokens_BL": torch.tensor([[certain, 0]]), "index_R": torch.tensor([0])}
    inputs["hidden_RLD"] = torch.zeros(1, 2, SHAPE["D"], requires_grad=True)
    inputs["bias_V"] = torch.full((V,), -1e4).index_fill(0, torch.tensor(certain), 0.0).requires_grad_()
    with using(kernels):
        value = token_logp(**inputs)
        (grad,) = torch.autograd.grad(value.sum(), inputs["bias_V"])
    assert value.tolist() == [[0.0, -1e4]]
    assert grad.nonzero()[:, 0].tolist() == [0, certain] and grad[[0, certain]].tolist() == [1.0, -1.0]


def test_an_almost_certain_token_keeps_its_gradient_in_half_precision(monkeypatch):
    """1 - p is not computed from a rounded p, where it is kept for the backward."""
    monkeypatch.setattr(module, "CPU_LOGITS", 1)
    bias = torch.tensor([0.0, -7.0], requires_grad=True)
    hidden, weight = torch.zeros(1, 1, 1, dtype=torch.bfloat16), torch.zeros(2, 1)
    zero = torch.zeros(1, 1, dtype=torch.int64)
    (grad,) = torch.autograd.grad(token_logp(hidden, weight, bias, zero, zero[0]).sum(), bias)
    assert grad[0].item() == pytest.approx(1 - torch.sigmoid(torch.tensor(7.0)).item(), rel=4e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_hidden_states_with_a_linear_of_either_dtype(dtype):
    for linear in (dtype, torch.float32):
        inputs = drawn(dtype)
        for name in ("weight_VD", "bias_V"):
            inputs[name] = inputs[name].detach().to(linear).requires_grad_()
        assert good(inputs, "torch", dtype)
        value = token_logp(**inputs)
        value.sum().backward()
        assert value.dtype == torch.float32
        assert all(t.grad.dtype == t.dtype for t in inputs.values() if t.requires_grad)


def by_two_logits(hidden_RLD, weight_VD, bias_V, tokens_BL, index_R, guide_RLD, mix_RL):
    """log softmax(b log p + (1 - b) sg log p_guide)[token], b = 1 + g."""
    own = F.linear(hidden_RLD, weight_VD, bias_V).log_softmax(-1)
    guide = F.linear(guide_RLD, weight_VD, bias_V).log_softmax(-1).detach()
    share = 1 + mix_RL[..., None]
    mixed = (share * own + (1 - share) * guide).log_softmax(-1)
    return mixed.gather(-1, tokens_BL[index_R][..., None])[..., 0]


def test_a_guided_row_is_the_linear_of_mixed_hidden_states():
    inputs = doubled(guided())
    expected, found = results(by_two_logits, inputs), results(token_logp, inputs)
    assert len(found) == 4
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kernels", "dtype"),
    [("triton", torch.float32), ("triton", torch.float16), ("torch", torch.float16), ("torch", torch.bfloat16)],
)
def test_a_guided_row_in_every_precision(kernels, dtype):
    assert good(guided(dtype), kernels, dtype)


@both
def test_a_guide_gets_no_gradient(kernels):
    inputs = guided()
    wanted = [inputs["guide_RLD"].requires_grad_(), inputs["mix_RL"].requires_grad_()]
    with using(kernels):
        assert torch.autograd.grad(token_logp(**inputs).sum(), wanted, allow_unused=True) == (None, None)


def kept(inputs):
    """The sizes of what is saved for the backward, beside the inputs."""
    saved, known = [], {t.untyped_storage().data_ptr() for t in inputs.values()}

    def note(t):
        if t.untyped_storage().data_ptr() not in known:
            saved.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        token_logp(**inputs)
    return saved


def test_what_is_kept_for_the_backward():
    inputs = drawn()
    M = SHAPE["R"] * SHAPE["L"]
    with using("triton"):
        assert kept(inputs) == [2 * M]
    assert kept(inputs) == [M * SHAPE["V"]]


class Largest(TorchDispatchMode):
    """The most elements that any tensor has that is made inside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def test_without_gradient_there_are_never_all_logits(monkeypatch):
    inputs = drawn(L=32, D=4, V=64)
    whole = token_logp(**inputs)
    monkeypatch.setattr(module, "CPU_LOGITS", 16 * 64)
    with torch.no_grad(), Largest() as largest:
        value = token_logp(**inputs)
    assert largest.elements == 16 * 64
    torch.testing.assert_close(value, whole.detach(), rtol=1e-6, atol=1e-6)


@both
def test_chunks_of_rows_do_not_show(monkeypatch, kernels):
    """Some of them of unequal length, some of one row; with all rows in one, torch takes the definition."""
    values = []
    for rows in (1, 3, 19, 1000):
        monkeypatch.setattr(module, "CPU_LOGITS", rows * SHAPE["V"])
        assert good(guided(), kernels)
        # of half operands too the logits are fp32: the values agree better than half logits would
        values.append(token_logp(**drawn(torch.bfloat16)))
        torch.testing.assert_close(values[-1], values[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 129, 10_880, 43_520])
def test_a_gpu_gets_chunks_of_whole_tiles(rows):
    class Weight:
        is_cuda = True

        def __len__(self):
            return 4096

    chunks = list(module._chunks(rows, Weight()))
    assert all(chunk.start % 128 == 0 and (chunk.stop - chunk.start) * 4096 <= module.GPU_LOGITS for chunk in chunks)
    assert torch.cat([torch.arange(rows)[chunk] for chunk in chunks]).tolist() == list(range(rows))


@both
def test_autocast_does_not_change_the_dtype(kernels):
    """Nor that of the gradients' products, where backward runs inside."""
    inputs = drawn()
    with using(kernels):
        plain = results(token_logp, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            found = results(token_logp, inputs)
    assert len(found) == 4 and all(torch.equal(found[name], plain[name]) for name in plain)


def test_torch_compile_sees_one_graph_of_torch_too():
    inputs = guided()
    compiled = torch.compile(token_logp, backend="aot_eager", fullgraph=True)
    eager, traced = results(token_logp, inputs), results(compiled, inputs)
    for name in eager:
        torch.testing.assert_close(traced[name], eager[name], rtol=1e-5, atol=1e-6)


REFUSALS = {
    "hidden: 2 dimensions, not 3": {"hidden_RLD": torch.zeros(4, 20)},
    r"weight: shape \(37, 19\), not \(37, 20\)": {"weight_VD": torch.zeros(37, 19)},
    r"index: shape \(3,\), not \(4,\)": {"index_R": torch.zeros(3, dtype=torch.int64)},
    "weight: dtype torch.bfloat16, not torch.float32": {"weight_VD": torch.zeros(37, 20, dtype=torch.bfloat16)},
    "bias: dtype torch.float16, not torch.float32": {"bias_V": torch.zeros(37, dtype=torch.float16)},
    "weight: dtype torch.float32, not torch.float64": {"hidden_RLD": torch.zeros(4, 5, 20, dtype=torch.float64)},
    "tokens: dtype torch.int32, not torch.int64": {"tokens_BL": torch.zeros(3, 5, dtype=torch.int32)},
    r"tokens: holds 37, outside 0\.\.36": {"tokens_BL": torch.full((3, 5), 37)},
    r"tokens: holds -1, outside 0\.\.36": {"tokens_BL": torch.full((3, 5), -1)},
    r"index: holds 3, outside 0\.\.2": {"index_R": torch.full((4,), 3)},
    "guide: guide and mix come together": {"guide_RLD": torch.zeros(4, 5, 20)},
    "mix: 1 dimensions, not 2": {"guide_RLD": torch.zeros(4, 5, 20), "mix_RL": torch.zeros(4)},
}


@pytest.mark.parametrize("says", REFUSALS)
def test_refusals(says):
    with pytest.raises(ValueError, match=says):
        token_logp(**drawn() | REFUSALS[says])
