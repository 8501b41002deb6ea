"""The bench of steps: rows of the table, the work they count, and arms that do not change the loss."""

import math
from dataclasses import replace

import pytest
import torch
from photos import refused
from ranks import tiny

import mclr.train.bench.step
from mclr.schedule import NONE, Schedule
from mclr.train.bench.step import FULL, OBJECTIVES, PAIR, as_run_by, build, draw, measure_sampling, measure_training, peak_memory
from mclr.train.system.console import run
from mclr.train.training.step import train_step

CPU = torch.device("cpu")
EAGER = ("fp32", "eager")
# settings that make a full size small
SMALL = {
    "edm2": ["model.net.model_channels=8", "model.net.channels_per_head=8", "model.net.dropout=0.0"],
    "var": ["model.net.depth=2", "model.net.embed_dim=32", "model.net.drop_path=0.0"],
}


@pytest.fixture
def quick(monkeypatch):
    """A step is measured against a rate that nobody measures."""
    monkeypatch.setattr(mclr.train.bench.step, "flops_per_second", lambda device, precision: 1e12)


def loss_of(task, batch, arm="eager", precision="fp32", lr=0.0):
    return float(train_step(as_run_by(task, arm, precision), range(batch), batch, lr, lambda: False)["loss"])


def small(model, batch=2):
    settings = [*SMALL[model.split("-")[0]], f"train.batch={batch}"]
    return build(model, PAIR, settings, CPU)


@pytest.mark.parametrize("model", ["edm2-digits", "var-digits"])
def test_the_table_says_what_each_objective_costs(model, digits, tokenizer, capsys, monkeypatch, quick):
    settings = [pair for pair in tiny(model, tokenizer) if not pair.startswith("objective.")]
    # so small a share drops none of these samples
    settings += [f"data.path={digits}", "train.drop_condition=1e-9", "model.weights=null"]
    # without weights there is no reference to start from
    monkeypatch.delitem(mclr.train.bench.step.OBJECTIVES, "cca")
    built = {objective: build(model, objective, [*settings, "train.batch=32"], CPU) for objective in OBJECTIVES}
    table = measure_training(built, ["fp32"], ["eager"], 3)
    assert table.keys() == {(objective, *EAGER) for objective in OBJECTIVES}
    work = {objective: row["work"] for (objective, _, _), row in table.items()}
    assert work["mle"] == 1 and work["mclr uniform"] == 2
    # the first two scales are 5 of the 21 tokens of a contrast row; for noise levels it depends on the draws
    cut = work["mclr uniform, progress <= 0.5"]
    assert cut == pytest.approx(1 + 5 / 21) if model == "var-digits" else 1 < cut < 2
    # the ramp is 0 at the first scale alone
    assert work["mclr null"] == pytest.approx(4 / 3)
    for (objective, *_), row in table.items():
        assert 0 < row["p20"] <= row["ms"] <= row["p80"] and row["memory"] > 0
        assert row["images"] == pytest.approx(32_000 / row["ms"])
        assert row["mfu"] == pytest.approx(row["work"] * table["mle", *EAGER]["mfu"] * table["mle", *EAGER]["ms"] / row["ms"])
        if objective in ("mle", "mclr uniform"):
            assert row["rows"] == pytest.approx(row["work"] * row["images"])
    argv = ["--model", model, "--rounds", "1", "--sampling", *settings, "train.batch=8", "sample.batch=3"]
    assert run(mclr.train.bench.step.main, argv) == 0
    out = capsys.readouterr().out
    assert all(f"| {objective} | fp32 | eager | " in out for objective in OBJECTIVES) and " | 1.00 | 1.00 | " in out
    assert "8 samples per step" in out and "Sampling 3 at a time:" in out


@pytest.mark.parametrize("model", FULL)
def test_every_arm_trains_a_small_pair_of_a_full_size(model, quick):
    """bf16 gives the loss of fp32; nothing but the pair is computed."""
    task, config = small(model)
    x_B = task.samples(7, 2)[0]
    assert x_B.shape[1:] == {"edm2-img64-s": (3, 64, 64), "edm2-img512-l": (4, 64, 64)}.get(model, (680,))
    assert len(x_B.unique()) > 200
    plain = loss_of(task, 2)
    assert math.isfinite(plain)
    assert loss_of(task, 2, precision="bf16") == pytest.approx(plain, rel=2e-2)
    table = measure_training({PAIR: (task, config)}, ["fp32", "bf16"], ["eager"], 1)
    assert len(table) == 2 and all(row["work"] == 2 for row in table.values())
    # all arms train the same weights
    assert loss_of(task, 2) != plain


def test_what_is_compiled_gives_the_same_loss(digits, monkeypatch):
    """The posterior's classifier is compiled too, as in a run; here by a compiler that changes nothing."""
    calls = {}

    def compile_(net):
        def run(*inputs):
            calls[net] = calls.get(net, 0) + 1
            return net(*inputs)

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    settings = [f"data.path={digits}", "train.batch=8", *tiny("edm2-digits", None)]
    task, _ = build("edm2-digits", "mclr posterior", settings, CPU)
    assert loss_of(task, 8, "compiled") == pytest.approx(loss_of(task, 8), rel=1e-5)
    assert calls == {task.engine.net: 1, task.posterior_engine.net: 1}


def test_an_arm_reaches_the_posterior_and_the_reference(digits):
    """For tokens the posterior is the network itself. A reference runs in the precision of its arm."""
    settings = [f"data.path={digits}", "train.batch=4"]
    task, _ = build("var-digits", "mclr posterior", settings, CPU)
    arm = as_run_by(task, "eager", "bf16")
    assert arm.engine.autocast._enabled and not task.engine.autocast._enabled
    task, _ = build("var-digits", "cca", settings, CPU)
    assert as_run_by(task, "eager", "bf16").loss.reference.autocast._enabled and not task.loss.reference.autocast._enabled


def test_a_row_that_a_gpu_has_no_memory_for_leaves_the_others(monkeypatch, quick, capsys):
    task, config = small("var-d16", batch=1)

    def step(task, positions, *others):
        if not task.engine.autocast._enabled:
            raise torch.OutOfMemoryError
        return train_step(task, positions, *others)

    monkeypatch.setattr(mclr.train.bench.step, "train_step", step)
    table = measure_training({PAIR: (task, config)}, ["fp32", "bf16"], ["eager"], 1)
    assert table[PAIR, "fp32", "eager"] == {} and table[PAIR, "bf16", "eager"]["work"] == 2
    lines = mclr.train.bench.step.training_table(table).splitlines()
    assert lines[2].startswith(f"| {PAIR} | fp32 | eager | out of memory |") and " | 1.00 | 2.00 | " in lines[3]
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize("model", ["var-d16", "edm2-img64-s"])
def test_sampling_is_measured_with_and_without_guidance(model, monkeypatch):
    task, _ = small(model)
    paradigm = replace(task.loss.paradigm, **({"steps": 2} if model.startswith("edm2") else {}))
    task = replace(task, loss=replace(task.loss, paradigm=paradigm))
    found = measure_sampling(task, Schedule("ramp", 1.0), ["fp32", "bf16"], ["eager"], 1, 1)
    assert found.keys() == {("fp32", "eager"), ("bf16", "eager")}
    assert all(plain > 0 and guided > 0 for plain, guided in found.values())
    # guidance takes a second forward nearly everywhere, of the same size
    forwards = []
    handle = task.engine.net.register_forward_hook(lambda *_: forwards.append(1))
    counts = []
    for gamma in (NONE, Schedule("constant", 1.0)):
        forwards.clear()
        x_B = draw(task, gamma, "fp32", 2)
        counts.append(len(forwards))
    handle.remove()
    assert counts[1] == 2 * counts[0] and x_B.shape == ((2, 680) if model == "var-d16" else (2, 3, 64, 64))
    if model == "var-d16":
        assert x_B.min() >= 0 and x_B.max() < 4096


def test_a_full_size_takes_one_sample_per_step_on_a_cpu(capsys, monkeypatch, quick):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = [*SMALL["var"], "--model", "var-d16", "--arms", "eager", "--precision", "fp32", "--rounds", "1", "--sampling"]
    assert run(mclr.train.bench.step.main, argv) == 0
    out = capsys.readouterr().out
    assert "| eager |" in out and "1 samples per step" in out and "Sampling 1 at a time:" in out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--rounds", "0"], "--rounds: 0: a finite number above 0"),
        (["--model", "edm2"], "invalid choice: 'edm2'"),
        (["--objective", "ddo"], "invalid choice: 'ddo'"),
        (["--arms", "ours", "eager"], "--arms ours needs a GPU"),
        (["engine.precision=bf16"], "engine.precision=bf16: use --arms and --precision"),
        (["train.bacth=8"], "did you mean train.batch?"),
        (["--model", "var-d16", "--objective", "cca"], "cca compares with trained weights"),
    ],
)
def test_bad_arguments_are_one_line(argv, says, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert says in refused(mclr.train.bench.step.main, argv, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["var-d16", "edm2-img64-s"])
def test_a_pair_at_full_size(model):
    """310M and 280M parameters: about a minute and 8 GiB each on two cores."""
    peak_memory(reset=True)
    task, config = build(model, PAIR, ["train.batch=1", *(["model.net.drop_path=0.0"] if model == "var-d16" else [])], CPU)
    plain = loss_of(task, 1)
    half = loss_of(task, 1, precision="bf16")
    assert half == pytest.approx(plain, rel=1e-2)
    # the uniform ratio of one sample has no bound: what a step must do is to move the loss
    loss_of(task, 1, precision="bf16", lr=config.train.lr)
    after = loss_of(task, 1, precision="bf16")
    assert math.isfinite(after) and after != half
    assert peak_memory() < 12
