"""train/training/memorisation.py: the views, what is read of the network, when; and a monitored run, which the monitor leaves as it was."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import RUN, environment, launcher
from PIL import Image
from ranks import tiny
from runs import BATCH, DROPOUT, STEPS, metrics
from safetensors.torch import load_file

from mclr.configs.schema import load
from mclr.likelihood import Draws
from mclr.models.edm2 import EDM2, EDM2Config
from mclr.train.cli import main
from mclr.train.data.dataset import load_split, open_dataset
from mclr.train.data.encoders import RGB, from_uint8
from mclr.train.data.images import image_paths, read_images
from mclr.train.data.source import permutation
from mclr.train.data.write import prepare_images
from mclr.train.training import held_out, memorisation
from mclr.train.training.build import build_networks, build_task, open_source
from mclr.train.weights.folder import load_net

READ = {"mle_loss", "mle_loss_val", "icr", "icr_val"}


def small(model, tokenizer=None):
    return [*(word for word in tiny(model, tokenizer) if not word.startswith("objective")), DROPOUT[model]]


TINY = small("edm2-digits")


@pytest.fixture(scope="module")
def images(digits):
    return held_out.readers_of(open_dataset(digits))


@pytest.fixture
def few_draws(monkeypatch):
    monkeypatch.setattr(held_out, "READING", 64)


def test_a_view_is_one_of_nine_shifts_of_a_digit(images):
    image_BCHW = images["train"].images(list(range(64)))
    shifted = torch.nn.functional.pad(from_uint8(image_BCHW), (1, 1, 1, 1), mode="replicate")
    nine = torch.stack([shifted[..., y : y + 8, x : x + 8] for y in range(3) for x in range(3)])
    views = memorisation.view(image_BCHW, Draws(0, list(range(64))), flip=False)
    same = (nine == views).flatten(2).all(2)
    assert same.any(0).all() and same.any(1).all()
    assert torch.equal(views, memorisation.view(image_BCHW, Draws(0, list(range(64))), flip=False))


def test_features_are_the_mean_of_the_middle_block_under_noise_and_no_condition(images):
    net, x_BCHW = load_net("edm2-digits", "edm2"), from_uint8(images["train"].images([0, 1, 2]))
    h_BD = memorisation.features(net, x_BCHW, Draws(0, [0, 1, 2]))
    noisy_BCHW = x_BCHW + 0.29 * Draws(0, [0, 1, 2]).normal(1, 8, 8)
    seen = []
    hook = net.decoder["4x4_block1"].register_forward_hook(lambda block, inputs, output: seen.append(output))
    with torch.no_grad():
        net(noisy_BCHW, torch.full((3,), 0.29), torch.full((3,), 10))
    hook.remove()
    assert h_BD.shape == (3, 32) and torch.equal(h_BD, seen[0].mean((2, 3)))
    assert not any(block._forward_hooks for block in net.decoder.values())


def test_wide_blocks_are_projected_the_same_way_every_time(monkeypatch):
    torch.manual_seed(0)
    net = EDM2(
        EDM2Config(8, 1, 10, model_channels=16, channel_mult=(1, 4), num_blocks=1, attn_resolutions=(), channels_per_head=16)
    )
    x_BCHW = torch.rand(40, 1, 8, 8)
    narrow_BD = memorisation.features(net, x_BCHW, Draws(0, list(range(40))))
    monkeypatch.setattr(memorisation, "WIDTH", 64)
    wide_BD = memorisation.features(net, x_BCHW, Draws(0, list(range(40))))
    assert narrow_BD.shape == (40, 32) and wide_BD.shape == (40, 64)
    # one matrix for all rows
    matrix = torch.linalg.lstsq(wide_BD, narrow_BD).solution
    assert torch.allclose(wide_BD @ matrix, narrow_BD, atol=1e-4)
    assert torch.linalg.matrix_rank(narrow_BD) == 32


def test_a_reading_repeats_itself_and_disturbs_nothing(images, few_draws):
    net = load_net("edm2-digits", "edm2")
    weights, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    first = memorisation.measure(net, RGB(), images, flip=False)
    assert first == memorisation.measure(net, RGB(), images, flip=False) and first.keys() == {"icr", "icr_val"}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())


def test_noise_contaminates(images, monkeypatch):
    """Of the bundled network on held-out digits: the noisier the views, the less they share."""
    net, val = load_net("edm2-digits", "edm2"), {"val": images["val"]}
    monkeypatch.setattr(held_out, "READING", 192)
    found = []
    for sigma in (0.05, 0.29, 1.0, 20.0):
        monkeypatch.setattr(memorisation, "SIGMA", sigma)
        found.append(memorisation.measure(net, RGB(), val, flip=False)["icr_val"])
    assert found == sorted(found) and found[0] < 0.6 < found[2] and 0.9 < found[3] < 1.1


@pytest.mark.parametrize("model", ["edm2-digits", "var-digits"])
def test_the_loss_is_that_of_mle_under_the_images_own_conditions(model, digits, tokenizer, few_draws):
    task = build(model, digits, tokenizer)
    readers = held_out.readers_of(task.source.info)
    found = {split: held_out.mle_loss(task, reader) for split, reader in readers.items()}
    assert found == {split: held_out.mle_loss(task, reader) for split, reader in readers.items()}
    net, info, losses = task.engine.net.eval(), task.source.info, {}
    for split in ("train", "val"):
        image_NCHW, c_N = load_split(digits, split)
        chosen = permutation(0, 0, len(c_N))[:64].copy()
        x = task.encoder.encode(from_uint8(image_NCHW[chosen]))
        probe = task.loss.paradigm.probe(x, Draws(held_out.LOSS, list(range(64))))
        with torch.no_grad():
            prediction = task.loss.paradigm.predict(net, probe, torch.arange(64), c_N[chosen])
            own = task.loss.paradigm.log_likelihood(prediction, probe, torch.arange(64))
        losses[split] = (own.aux_R - own.value_RT.mean(1)).mean().item()
    assert found == pytest.approx(losses, rel=1e-5) and info.splits["val"].count >= 64


def build(model, digits, tokenizer, *overrides):
    config = load(model, "mle", "digits", "local", [*small(model, tokenizer), f"data.path={digits}", *overrides])
    device = torch.device("cpu")
    return build_task(config, open_source(config), build_networks(config, device), device, config.train.batch)


def monitor_of(task, every=8, period=8):
    return memorisation.Monitor(task, held_out.readers_of(task.source.info), every, period)


@pytest.mark.parametrize(
    ("every", "period", "due"),
    [
        (20, 10, [20, 40, 60]),
        (5, 10, [10, 20, 30, 40, 50, 60, 65]),  # 65: the last line, off the grid
        (25, 10, [30, 50]),
    ],
)
def test_a_reading_is_due_once_every_so_many_images(every, period, due, digits, tokenizer, monkeypatch):
    """Decided by the images seen alone, so that a resumed run reads where an uninterrupted one does."""
    monkeypatch.setattr(memorisation, "mle_loss", lambda task, reader, beat: 1.0)
    here = monitor_of(build("var-digits", digits, tokenizer), every, period)
    assert [images for images in (10, 20, 30, 40, 50, 60, 65) if here.read(images)] == due


def test_without_a_null_condition_or_of_tokens_there_is_no_icr(digits, tokenizer, few_draws):
    """Every batch is a sign of life: a reading may take longer than the watchdog waits."""
    diffusion, beats = monitor_of(build("edm2-digits", digits, tokenizer)), []
    diffusion.beat = lambda: beats.append(1)
    assert diffusion.read(8).keys() == READ and len(beats) == 4
    for task in (build("edm2-digits", digits, tokenizer, "train.drop_condition=0.0"), build("var-digits", digits, tokenizer)):
        assert monitor_of(task).read(8).keys() == {"mle_loss", "mle_loss_val"}


def test_features_that_cannot_be_read_end_no_run(digits, tokenizer, few_draws, monkeypatch, capsys):
    monkeypatch.setattr(memorisation, "features", lambda net, x_BCHW, draws: torch.ones(len(x_BCHW), 4))
    found = monitor_of(build("edm2-digits", digits, tokenizer)).read(8)
    assert found.keys() == {"mle_loss", "mle_loss_val"}
    assert capsys.readouterr().out == (
        "at 8 images no ICR of the train images (the two views of the images do not differ in some direction of feature space): "
        "leave it out, or train longer\n"
    )


@pytest.fixture
def start(digits, tmp_path, monkeypatch, few_draws):
    """start(name, steps, *overrides) -> run folder of a tiny run that logs every step."""
    monkeypatch.chdir(tmp_path)

    def start(name, steps, *overrides):
        argv = [
            "train",
            "--model",
            "edm2-digits",
            "--objective",
            "mle",
            "--data",
            str(digits),
            "--engine",
            "local",
            "--out",
            name,
        ]
        assert main([*argv, *TINY, f"train.batch={BATCH}", f"train.images={steps * BATCH}", "train.log_every=1", *overrides]) == 0
        return tmp_path / name

    return start


def same_weights(run, other):
    here, there = (load_file(each / "weights" / "model.safetensors") for each in (run, other))
    return all(torch.equal(here[k], there[k]) for k in here)


def test_a_monitored_run_learns_what_it_would_have_learned(start):
    plain, monitored = start("plain", STEPS), start("monitored", STEPS, f"train.monitor_every={2 * BATCH}")
    for steps in (3, STEPS):
        resumed = start("resumed", steps, f"train.monitor_every={2 * BATCH}")
    assert same_weights(plain, monitored) and same_weights(plain, resumed)
    assert [{k: line.get(k) for k in READ} for line in metrics(resumed)] == [
        {k: line.get(k) for k in READ} for line in metrics(monitored)
    ]
    for i, (without, line) in enumerate(zip(metrics(plain), metrics(monitored), strict=True), start=1):
        assert line.keys() - without.keys() == (READ if i % 2 == 0 else set())
        assert {k: line[k] for k in without} == without


def test_evaluate_reads_the_icr_of_a_run(start, digits, capsys, tmp_path):
    run = start("run", 1, "sample.steps=1")
    capsys.readouterr()
    assert main(["evaluate", str(run), "--icr", "--real", "val"]) == 0
    written = json.loads((run / "samples" / "evaluation.json").read_text())["icr"]
    expected = memorisation.measure(
        load_net(str(run / "weights"), "edm2"), RGB(), held_out.readers_of(open_dataset(digits)), flip=False
    )
    assert written == {**expected, "sigma": 0.29, "pairs": 64}
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("icr")] == [
        [name, f"{value:.4f}"] for name, value in expected.items()
    ]
    assert main(["evaluate", str(run / "samples"), "--icr"]) == 2
    assert capsys.readouterr().err.startswith("error: --icr looks into the network of a diffusion run, ")


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_ranks_read_what_one_process_reads(zero, start, digits, monkeypatch):
    """Two ranks; with ZeRO 2 rank 0 reads alone, with ZeRO 3 both do. Also the loss that ranks a checkpoint, of averaged weights."""
    argv = ["--model", "edm2-digits", "--objective", "mle", "--data", str(digits), "--engine", zero, "--out", "ranks", *TINY]
    # ranks draw their own dropout
    argv += [
        f"train.batch={BATCH}",
        f"train.images={2 * BATCH}",
        "train.log_every=1",
        f"train.monitor_every={BATCH}",
        "model.net.dropout=0.0",
        "train.keep_best=true",
    ]
    ran = subprocess.run(
        [*launcher("deepspeed"), str(RUN), *argv], capture_output=True, text=True, env=environment(), timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    monkeypatch.setattr(held_out, "READING", 640)  # as it is in the ranks
    start("alone", 2, f"train.monitor_every={BATCH}", "model.net.dropout=0.0", "train.keep_best=true")
    ranks, alone = (metrics(Path(name)) for name in ("ranks", "alone"))
    for name in (*READ, "loss"):
        assert [line[name] for line in ranks] == pytest.approx([line[name] for line in alone], rel=1e-4)
    losses = [
        json.loads(Path(name, f"checkpoints/{2 * BATCH:012d}/state.json").read_text())["held_out"] for name in ("ranks", "alone")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.fixture(scope="module")
def few(digits, tmp_path_factory):
    """64 training digits and 297 held-out ones."""
    home = tmp_path_factory.mktemp("few")
    image_NCHW, c_N = load_split(digits, "train")
    for i in permutation(0, 0, len(c_N))[:361]:
        (home / f"few/{c_N[i]}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image_NCHW[i, 0].numpy()).save(home / f"few/{c_N[i]}/{i:05d}.png")
    prepare_images(home / "few", home / "data", 8, channels=1, val_share=297 / 361)
    return home / "data"


def memorised(run, data):
    """Share of 200 samples less than a third as far from the nearest training image as from the second nearest."""
    assert main(["sample", str(run), "--out", str(run / "drawn"), "--count", "200", "sample.steps=18"]) == 0
    drawn = from_uint8(torch.from_numpy(np.array(read_images(image_paths(run / "drawn"))))).flatten(1)
    near_M2 = torch.cdist(drawn, from_uint8(load_split(data, "train")[0]).flatten(1)).topk(2, largest=False).values
    return (near_M2[:, 0] < near_M2[:, 1] / 3).double().mean().item()


@pytest.mark.slow
def test_what_it_sees_of_a_run_that_memorises_and_of_one_that_does_not(few, digits, tmp_path, monkeypatch):
    """edm2-digits from scratch on 64 and on 1,500 images, 1,000 steps: the held-out loss turns up in the one alone.

    ICR turns up a little in both: a limit of the method at this size, mclr/EXPERIMENTS.md.
    """
    monkeypatch.chdir(tmp_path)
    recipe = ["--objective", "mle", "--init", "none", "--engine", "local", "train.images=64000", "train.warmup_images=3200"]
    read = {}
    for name, data in (("few", few), ("many", digits)):
        argv = ["train", "--model", "edm2-digits", "--data", str(data), "--out", name, *recipe, "train.monitor_every=6400"]
        assert main(argv) == 0
        readings = [line for line in metrics(tmp_path / name) if "icr" in line]
        read[name] = {column: [line[column] for line in readings] for column in READ}
        assert len(readings) == 10
    share = {name: memorised(tmp_path / name, data) for name, data in (("few", few), ("many", digits))}
    assert share["few"] > 0.05 and share["many"] < 0.01
    for curves in read.values():
        # with every reading the training images are known better
        assert curves["mle_loss"] == sorted(curves["mle_loss"], reverse=True)
        assert 1.03 < curves["icr"][-1] / min(curves["icr"]) < 1.1 and curves["icr"].index(min(curves["icr"])) < 3
    held_out = read["few"]["mle_loss_val"]
    assert held_out.index(min(held_out)) < 3 and held_out[-1] > 2 * min(held_out)
    held_out = read["many"]["mle_loss_val"]
    assert held_out[-1] == min(held_out)
