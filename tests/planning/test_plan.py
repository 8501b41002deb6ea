"""What a plan says is what a run takes: bytes of live tensors on 1, 2 and 4 ranks, bytes sent, saved activations, FLOPs, rows."""

import dataclasses
import resource

import pytest
import torch
from launch import results_of
from plan_ranks import BATCH, GATHERED, MICRO, MODELS, SMALL, planned_run

import mclr.train.engine.zero
from mclr.train.cli import main
from mclr.train.planning.footprint import Model
from mclr.train.planning.plan import GIB, MARGIN, encoder_of, largest_share, largest_that_fits, memory_of, sent_by
from mclr.train.system.gpus import GPUS, gpu_named, peak_flops
from mclr.train.training.build import build_networks, build_task, open_source
from mclr.train.training.compute import forward_flops
from mclr.train.training.launch import rank_shares
from mclr.train.training.step import train_step


@pytest.fixture(scope="module", params=[2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))])
def ranks(request, digits, tokenizer, tmp_path_factory):
    """(number of ranks, what tests/plan_ranks.py found on them)."""
    return request.param, results_of("plan_ranks.py", request.param, tmp_path_factory.mktemp("ranks"), digits, tokenizer)


def model_of(config):
    return Model(config, encoder_of(config))


@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("model", MODELS)
def test_live_tensors_and_bytes_sent(ranks, tokenizer, model, zero):
    count, results = ranks
    found = results[f"{model} {zero}"]
    planned = model_of(planned_run(model, tokenizer, "engine.kind=deepspeed", f"engine.zero={zero}"))
    memory = memory_of(planned, count, MICRO)
    expected = {key: memory[key] for key in ("weights", "gradients", "optimizer", "averages")}
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=0.1)
    assert found["sent"] == pytest.approx(sent_by(planned, count, MICRO), rel=0.1, abs=200)


@pytest.mark.parametrize("model", MODELS)
def test_what_zero_3_gathers(ranks, tokenizer, model, monkeypatch):
    count, results = ranks
    monkeypatch.setattr(mclr.train.engine.zero, "BUCKET", SMALL)
    expected = memory_of(model_of(planned_run(model, tokenizer, *GATHERED)), count, MICRO)["gathered"]
    assert 0.6 * expected <= results[f"{model} gathered"] <= expected


def small_task(model, digits, tokenizer, *more):
    config = planned_run(model, tokenizer, "engine.kind=local", f"data.path={digits}", *more)
    device = torch.device("cpu")
    return config, build_task(config, open_source(config), build_networks(config, device), device, BATCH)


def saved_by(net, call):
    """Bytes that a call saves for backward, besides the weights."""
    own = {t.untyped_storage()._cdata for t in (*net.parameters(), *net.buffers())}
    saved = {}

    def keep(t):
        storage = t.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        call()
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_what_a_step_saves_for_backward(digits, tokenizer, model, precision, checkpointing):
    more = (f"engine.precision={precision}", f"engine.activation_checkpointing={checkpointing}")
    config, task = small_task(model, digits, tokenizer, *more)
    planned = model_of(config)
    held = saved_by(planned.net, lambda: planned._measured(BATCH, False))
    real = saved_by(task.engine.net, lambda: train_step(task, range(BATCH), BATCH, 0.001, lambda: False))
    assert held == pytest.approx(real, rel=0.1)
    assert held <= planned.activations(BATCH, False)


def test_numbers_of_images_that_are_not_counted(tokenizer):
    planned = model_of(planned_run("var-digits", tokenizer, "engine.activation_checkpointing=true", "engine.precision=bf16"))
    for images in (24, 100):
        assert planned.activations(images, False) == pytest.approx(planned.measured(images, False), rel=0.1)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_two_and_three_blocks_tell_of_all(tokenizer, checkpointing):
    more = ("model.net.depth=5", f"engine.activation_checkpointing={checkpointing}")
    planned = model_of(planned_run("var-digits", tokenizer, *more))
    assert planned.measured(2, False) == planned._measured(2, False)


def test_activation_checkpointing_saves_memory(tokenizer):
    plain, checkpointed = (
        model_of(planned_run("var-digits", tokenizer, f"engine.activation_checkpointing={on}")) for on in ("false", "true")
    )
    assert checkpointed.activations(64, False) < 0.7 * plain.activations(64, False)


INTERVAL = ("objective.schedule.kind=interval", "objective.schedule.high=0.5")
OBJECTIVES = {
    "null": ("var-digits", ()),
    "uniform": ("edm2-digits", ()),
    "uniform tokens": ("var-digits", ("objective.contrast=uniform",)),
    "rows cut short": ("var-digits", ("objective.contrast=uniform", *INTERVAL)),
    "posterior": ("edm2-digits", ("objective.contrast=posterior",)),
    "posterior tokens": ("var-digits", ("objective.contrast=posterior",)),
}


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_and_flops(digits, tokenizer, name, lockstep):
    model, settings = OBJECTIVES[name]
    config, task = small_task(model, digits, tokenizer, *settings)
    planned = model_of(config)
    flops = forward_flops(task)
    assert (planned.flops, planned.classifier_flops) == (flops["net"], flops["posterior"])
    task.engine.rows.update(grad=0, no_grad=0)
    # as ZeRO 3 has it
    task.engine.lockstep = lockstep
    train_step(task, range(BATCH), BATCH, 0.001, lambda: False)
    calls = planned.calls(lockstep)
    rows = BATCH * planned.share_of(calls.grad)
    assert task.engine.rows["no_grad"] == pytest.approx(BATCH * planned.share_of(calls.free))
    # conditions drawn from a posterior may coincide
    assert (
        task.engine.rows["grad"] == pytest.approx(rows) if "posterior" not in name else BATCH < task.engine.rows["grad"] <= rows
    )


def test_a_rank_holds_the_weights_that_its_part_touches():
    assert largest_share(((4, 4),), 1) == 8
    assert largest_share(((4, 4),), 2) == 4
    # elements 0..3 and 4..7 of 3 + 4 + 1
    assert largest_share(((3, 4, 1),), 2) == 7
    assert largest_share(((3, 4, 1), (2, 2)), 2) == 9


def plan_of(argv, capsys):
    assert main(["train", "--plan", *argv]) == 0
    return capsys.readouterr().out


def test_a_published_network_without_its_memory_or_any_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = plan_of(["--model", "var-d20", "--gpus", "8", "--gpu", "A100-40", "--engine", "zero3"], capsys)
    assert "600.92M" in out and "1000 classes, 3 x 256^2" in out and "on a100-40: 39 GiB" in out
    # its weights alone take 2.4 GB
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 1e9
    assert not list(tmp_path.iterdir())


def test_the_table_holds_the_numbers_that_share_the_batch(capsys):
    for argv, numbers in ((["train.batch=48"], ["1", "2", "4", "8", "16"]), (["--engine", "local"], ["1"])):
        first_words = [line.split()[0] for line in plan_of(["--model", "edm2-digits", *argv], capsys).splitlines()]
        assert first_words[first_words.index("GPUs") + 1 :] == numbers


def test_the_largest_micro_batch_is_the_last_that_fits(tokenizer):
    model = model_of(planned_run("edm2-digits", tokenizer, "train.batch=4096"))
    sizes = rank_shares(model.config, 2)
    assert sizes == [2**i for i in range(12)]
    for middle in (0, 5, 11):
        room = sum(memory_of(model, 2, sizes[middle]).values())
        assert largest_that_fits(model, 2, room) == sizes[middle]
    assert largest_that_fits(model, 2, sum(memory_of(model, 2, 1).values()) - 1) is None


def test_where_nothing_fits_it_says_what_would(monkeypatch, capsys):
    monkeypatch.setitem(GPUS, "h100", dataclasses.replace(GPUS["h100"], memory=0.001))
    argv = ["--model", "edm2-digits", "--gpu", "h100", "--gpus", "8"]
    assert "nothing fits on 8 GPUs: use engine.activation_checkpointing=true or --engine zero3" in plan_of(argv, capsys)
    argv += ["--engine", "zero3", "engine.activation_checkpointing=true", "engine.offload=true"]
    assert "nothing fits on 8 GPUs: use more GPUs, or larger ones" in plan_of(argv, capsys)
    monkeypatch.setitem(GPUS, "h100", dataclasses.replace(GPUS["h100"], memory=0.02))
    argv = ["--model", "edm2-digits", "--gpu", "h100", "--gpus", "1"]
    assert "64 images do not fit on 1 GPU: use train.micro_batch=" in plan_of(argv, capsys)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--plan", "--gpus", "0"], "--gpus 0: must be 1 to 1024"),
        (["--plan", "--gpus", "1025"], "--gpus 1025: must be 1 to 1024"),
        (["--plan", "--gpus", "many"], "--gpus: invalid int value: 'many'"),
        (["--plan", "--gpus", "3"], "train.batch=64 cannot be shared by 3 ranks: make it a multiple of 3"),
        (["--plan", "--gpus", "2", "--engine", "local"], "engine.kind=local runs on one rank, not 2"),
        (["--plan", "--gpu", "abacus"], f"unknown GPU abacus: give one of {', '.join(GPUS)}"),
        (["--gpus", "2"], "--gpus and --gpu belong to --plan"),
        (["--plan", "data.resolution=7"], "model.net.channel_mult: a side of 7 cannot be halved 1 times"),
    ],
)
def test_a_wrong_argument(argv, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--model", "edm2-digits", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err and not list(tmp_path.iterdir())


def test_gpus_by_the_names_that_torch_gives():
    names = {
        "NVIDIA A100-SXM4-40GB": "a100-40",
        "NVIDIA A100 80GB PCIe": "a100-80-pcie",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA H200": "h200",
        "NVIDIA GeForce RTX 4090": "rtx-4090",
        "NVIDIA RTX 6000 Ada Generation": "rtx-6000-ada",
        # another GPU, a part of one, one that is not listed
        "NVIDIA GH200 480GB": None,
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb": None,
        "Tesla T4": None,
    }
    assert {name: gpu_named(name) for name in names} == names
    assert peak_flops(torch.device("cpu"), "bf16") is None
    assert 0 < MARGIN < 1 and all(GPUS[name].memory * GIB > 2**34 for name in GPUS)
