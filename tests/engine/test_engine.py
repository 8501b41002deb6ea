"""DeepSpeed on several ranks is plain torch on the whole batch: at every ZeRO stage, for both paradigms, through every save and load."""

import copy

import pytest
import torch
from launch import results_of
from ranks import CLIP, COMPILED, KINDS, RESUMED, STAGES, WAYS
from torch import nn

from mclr.models.var import VAR, VARConfig
from mclr.train.engine.base import Engine, Frozen, make_optimizer

MODELS = ("edm2-digits", "var-digits")
FOUR = pytest.param(4, marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[2, FOUR])
def results(request, digits, tokenizer, tmp_path_factory):
    """What tests/ranks.py finds on so many ranks."""
    return results_of("ranks.py", request.param, tmp_path_factory.mktemp("ranks"), digits, tokenizer)


@pytest.mark.parametrize("model", MODELS)
def test_the_reference_moves_and_is_clipped_at_some_steps(results, model):
    assert results[f"{model} local"]["moved"] > 1e-2
    smallest, largest = results[f"{model} local"]["norms"]
    assert smallest < CLIP < largest


SAME = [f"{model} {how}" for model in MODELS for how in [*(f"zero{zero}" for zero in STAGES), "one micro-batch"]]
SAME += [f"{kind} zero{zero}" for kind in KINDS for zero in (2, 3)]
SAME += [f"{model} {way} {kind}" for model in MODELS for way, (kinds, _) in WAYS.items() for kind in kinds]
SAME += [f"poisoned zero{zero}" for zero in STAGES]


@pytest.mark.parametrize("name", SAME)
def test_ranks_do_not_change_the_result(results, name):
    """Nor do micro-batches, kinds of steps, host memory, recomputed activations; steps that are not finite change nothing."""
    found = results[name]
    assert found["weights"] <= 1e-5 and found.get("norms", 0.0) <= 1e-5
    assert found.get("moved", 1.0) > 1e-3


@pytest.mark.slow
def test_compiled_blocks_do_not_change_the_result(digits, tokenizer, tmp_path):
    results = results_of("ranks.py", 2, tmp_path, digits, tokenizer, COMPILED="1")
    assert len(results) == len(MODELS) * sum(len(kinds) for kinds, _ in COMPILED.values())
    assert all(found["weights"] <= 1e-5 for found in results.values())


@pytest.mark.parametrize("model", MODELS)
def test_micro_batches_do_not_change_the_result_of_one_rank(results, model):
    found = results[f"{model} local"]["micro"]
    assert found["weights"] <= 1e-5 and found["norms"] <= 1e-5


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("zero", STAGES)
def test_bf16_runs_at_every_stage_as_it_does_on_one_rank(results, model, zero):
    assert results[f"{model} zero{zero} bf16"]["weights"] <= 2e-3


@pytest.mark.parametrize("name", [f"edm2-digits zero{zero}{precision}" for zero in STAGES for precision in ("", " bf16")])
def test_forced_weights_keep_their_magnitude_at_every_stage(results, name):
    """The projection leaves rounding alone: more than nothing, so that a stage without it (1e-3 a step) would show."""
    assert 0 < results[name]["rows"] <= 2e-4


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("start", "end"), RESUMED, ids=str)
def test_what_one_engine_saves_any_other_goes_on_from(results, model, start, end):
    found = results[f"{model} from {start} to {end}"]
    assert found["same"] and found["next"] <= 1e-5


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def test_weight_decay_spares_gains_and_biases(linear):
    before = {name: p.detach().clone() for name, p in linear.named_parameters()}
    optimizer = make_optimizer(linear, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.5)
    engine = Engine(linear, optimizer, clip=0.0, accumulation=1, bf16=False)
    engine.backward(engine(torch.zeros(1, 3)).sum() * 0)
    engine.step(0.1)
    torch.testing.assert_close(linear.weight, before["weight"] * 0.95)
    torch.testing.assert_close(linear.bias, before["bias"], rtol=0, atol=0)


def test_the_step_takes_its_rate_and_tells_the_norm_before_clipping(linear):
    engine = Engine(linear, make_optimizer(linear, 1.0, (0.9, 0.99), 1e-8, 0.0), clip=0.1, accumulation=1, bf16=False)
    x = torch.tensor([[3.0, 0.0, 4.0]])
    engine.backward(engine(x)[:, 0].sum())
    before = linear.weight.detach().clone()
    # gradient: x in one row of the weight, 1 in the bias
    assert float(engine.step(0.25)) == pytest.approx(26**0.5)
    # AdamW's first step has the size of the rate, whatever the clipping
    torch.testing.assert_close(before - linear.weight, torch.tensor([[0.25, 0, 0.25], [0, 0, 0]]), rtol=1e-4, atol=1e-6)


def test_rows_are_counted_with_and_without_gradient(linear):
    engine = Engine(linear, make_optimizer(linear, 1.0, (0.9, 0.99), 1e-8, 0.0), clip=0.0, accumulation=1, bf16=False)
    engine(torch.zeros(5, 3))
    with torch.no_grad():
        engine(torch.zeros(2, 3))
    assert engine.rows == {"grad": 5, "no_grad": 2}


def answers_under_bf16(net, *inputs):
    with torch.autocast("cpu", torch.bfloat16):
        return net(*inputs)


def test_a_reference_in_half_the_memory_answers_the_same():
    """Bit for bit what the network itself answers under bf16: a ratio of equal weights stays 0."""
    torch.manual_seed(0)
    net = VAR(
        VARConfig(num_classes=3, depth=2, embed_dim=32, num_heads=2, patch_nums=(1, 2, 3), vocab_size=16, z_channels=4)
    ).eval()
    teacher, c_R, tokens, index_R = torch.randn(2, 13, 4), torch.tensor([0, 3]), torch.randint(16, (2, 14)), torch.arange(2)
    with torch.no_grad():
        h, head = answers_under_bf16(net, teacher, c_R)
        expected = h.clone(), head(h, tokens, index_R).clone()
    frozen = Frozen(copy.deepcopy(net), bf16=True)
    h, head = frozen(teacher, c_R)
    assert torch.equal(h, expected[0]) and torch.equal(head(h, tokens, index_R), expected[1])
    sizes = {p.dtype: sum(q.numel() for q in frozen.net.parameters() if q.dtype == p.dtype) for p in frozen.net.parameters()}
    assert sizes[torch.bfloat16] > 5 * sizes[torch.float32] and not any(p.requires_grad for p in frozen.net.parameters())
