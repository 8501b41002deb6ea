"""A whole training step of both paradigms through every fused operation, in Triton's interpreter, against the same step in torch."""

import pytest
import torch
from golden_weights import relative_rms
from ranks import tiny

import mclr.kernels.op
from mclr.configs.schema import load
from mclr.kernels.choice import using
from mclr.kernels.registry import OPS
from mclr.train.run import main
from mclr.train.system.console import run
from mclr.train.training.build import build_networks, build_task, choose_kernels, open_source
from mclr.train.training.compute import forward_flops
from mclr.train.training.step import train_step

CPU = torch.device("cpu")
# both paradigms, with the contrasts that reach an operation in different ways
STEPS = {
    "edm2-digits, posterior": ("edm2-digits", ()),
    "edm2-digits, null": ("edm2-digits", ("objective.contrast=null",)),
    "var-digits, uniform": ("var-digits", ("objective.contrast=uniform", "objective.schedule.kind=constant")),
    "var-digits, null": ("var-digits", ()),
}
# the files whose kernels a step runs
USED = {
    "edm2-digits": ("norm_silu", "scale_silu", "sum_clip", "weight_norm"),
    "var-digits": ("modulated_norm", "token_logp"),
}


def built(model, settings, digits, tokenizer):
    settings = [*tiny(model, tokenizer), f"data.path={digits}", "train.batch=4", *settings]
    config = load(model, "mclr", "digits", "local", settings)
    return build_task(config, open_source(config), build_networks(config, CPU), CPU, 4)


def weights_after_a_step(model, settings, digits, tokenizer, kernels):
    task = built(model, settings, digits, tokenizer)
    with torch.no_grad():
        for name, p in task.engine.net.named_parameters():
            if p.ndim == 0 or "modulation" in name:
                # gains and gates that start at 0 would hide what lies behind them
                p.copy_(torch.linspace(-0.5, 0.5, p.numel()).view(p.shape) if p.ndim else torch.tensor(0.7))
    with using(kernels):
        metrics = train_step(task, range(4), 4, 1e-2, lambda: False)
    return task.engine.shards(), metrics


@pytest.mark.parametrize("name", STEPS)
def test_a_step_through_every_operation_is_the_step_in_torch(name, digits, tokenizer, monkeypatch):
    model, settings = STEPS[name]
    launched = set()
    launch = mclr.kernels.op.launch

    def noted(kernel, *arguments, **options):
        name = kernel.fn.__name__ + (" in place" if options.get("FORCE") else "")
        launched.add((kernel.fn.__module__.removeprefix("mclr.kernels."), name))
        launch(kernel, *arguments, **options)

    for module in USED[model]:
        monkeypatch.setattr(f"mclr.kernels.{module}.launch", noted)
    expected, metrics = weights_after_a_step(model, settings, digits, tokenizer, "torch")
    assert not launched
    found, fused = weights_after_a_step(model, settings, digits, tokenizer, "triton")
    other = ("token_logp", "_merge") if model == "var-digits" else ("weight_norm", "_forward in place")
    assert launched == {(module, kernel) for module in USED[model] for kernel in ("_forward", "_backward")} | {other}
    for metric in ("loss", "gradient_norm"):
        assert fused[metric].item() == pytest.approx(metrics[metric].item(), rel=2e-5)
    for weight, value in expected.items():
        assert relative_rms(found[weight], value) < 1e-4, weight


def test_every_operation_is_used_by_a_paradigm():
    assert {module for of in USED.values() for module in of} == {op.run.__module__.split(".")[-1] for op in OPS.values()}


@pytest.mark.parametrize("model", USED)
def test_compute_is_counted_of_plain_operations(model, digits, tokenizer):
    task = built(model, (), digits, tokenizer)
    with using("torch"):
        plain = forward_flops(task)
    with using("triton"):
        assert forward_flops(task) == plain
    assert plain["net"] > 0


def test_a_run_says_which_operations_are_fused(digits, monkeypatch, capsys, tmp_path):
    with using("auto"):
        assert choose_kernels("triton", CPU) == f"kernels    triton: Triton for {', '.join(OPS)}"
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        argv = ["--model", "edm2-digits", "--out", str(tmp_path / "run"), f"data.path={digits}", "engine.kernels=triton"]
        assert run(main, argv) == 2
        assert "engine.kernels=triton needs a GPU: use auto" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
        assert choose_kernels("auto", CPU) == "kernels    auto: torch"
