"""A whole training step of both paradigms through every fused operation, in Triton's interpreter, against the same step in torch."""

import pytest
import torch
from golden_weights import relative_rms
from ranks import tiny

import kernels.op
from configs.schema import load
from kernels.choice import using
from kernels.registry import OPS
from train.build import build_networks, build_task, choose_kernels, open_source
from train.cli import run
from train.run import main
from train.step import train_step

CPU = torch.device("cpu")
# of both paradigms, and of the contrasts those that reach an operation in another way
STEPS = {
    "edm2-digits, posterior": ("edm2-digits", ()),
    "edm2-digits, null": ("edm2-digits", ("objective.contrast=null",)),
    "var-digits, uniform": ("var-digits", ("objective.contrast=uniform", "objective.schedule.kind=constant")),
    "var-digits, null": ("var-digits", ()),
}
USED = {
    "edm2-digits": {"used_weights", "force_weights", "norm_silu", "scale_silu", "sum_clip", "denoising_value"},
    "var-digits": {"modulated_norm", "gated_norm", "token_logp"},
}


def weights_after_a_step(model, settings, digits, tokenizer, kernels):
    settings = [*tiny(model, tokenizer), f"data.path={digits}", "train.batch=4", *settings]
    config = load(model, "mclr", "digits", "local", settings)
    task = build_task(config, open_source(config), build_networks(config, CPU), CPU, 4)
    with torch.no_grad():
        for name, p in task.engine.net.named_parameters():
            if p.ndim == 0 or "modulation" in name:
                # gains and gates that start at 0 would hide what lies behind them
                p.copy_(torch.linspace(-0.5, 0.5, p.numel()).view(p.shape) if p.ndim else torch.tensor(0.7))
    with using(kernels):
        metrics = train_step(task, range(4), 4, 1e-2, lambda: False)
    return task.engine.weights(), metrics


@pytest.mark.parametrize("name", STEPS)
def test_a_step_through_every_operation_is_the_step_in_torch(name, digits, tokenizer, monkeypatch):
    model, settings = STEPS[name]
    launched = set()
    launch = kernels.op.launch

    def noted(kernel, *arguments, **options):
        launched.add(kernel.fn.__module__)
        launch(kernel, *arguments, **options)

    for op in OPS.values():
        monkeypatch.setattr(f"{op.run.__module__}.launch", noted)
    expected, metrics = weights_after_a_step(model, settings, digits, tokenizer, "torch")
    assert not launched
    found, fused = weights_after_a_step(model, settings, digits, tokenizer, "triton")
    assert launched == {OPS[op].run.__module__ for op in USED[model]}
    for metric in ("loss", "gradient_norm"):
        assert fused[metric].item() == pytest.approx(metrics[metric].item(), rel=2e-5)
    for weight, value in expected.items():
        assert relative_rms(found[weight], value) < 1e-4, weight


def test_every_operation_is_used_by_a_paradigm():
    assert set.union(*USED.values()) == OPS.keys()


def test_a_run_says_which_operations_are_fused(digits, monkeypatch, capsys, tmp_path):
    config = load("edm2-digits", "mle", "digits", "local", ["engine.kernels=triton"])
    with using("auto"):
        assert choose_kernels(config, CPU) == f"kernels    triton: Triton runs {', '.join(OPS)}"
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        argv = ["--model", "edm2-digits", "--out", str(tmp_path / "run"), f"data.path={digits}", "engine.kernels=triton"]
        assert run(main, argv) == 2
        assert "engine.kernels=triton needs a GPU: use auto" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
        config = load("edm2-digits", "mle", "digits", "local", [])
        assert choose_kernels(config, CPU) == "kernels    auto: Triton runs none of them, plain torch"
