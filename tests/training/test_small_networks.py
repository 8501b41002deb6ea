"""Tests of train/training/small_networks.py: each small network learns from the digits, and `mclr prepare` writes weights that load."""

import json
import os
import re
import signal

import numpy as np
import pytest
import torch
from photos import refused
from PIL import Image

import mclr.train.training.small_networks
from mclr.configs.schema import load
from mclr.errors import UserError
from mclr.likelihood import Draws
from mclr.train.data.dataset import SplitReader, load_split, open_dataset
from mclr.train.data.source import open_images
from mclr.train.data.write import prepare_digits, prepare_images
from mclr.train.prepare import main
from mclr.train.system.console import run
from mclr.train.training.build import build_networks
from mclr.train.training.networks import build_classifier
from mclr.train.training.small_networks import CRITERIA, Recipe, fit, new_network, quality, shifted
from mclr.train.weights.folder import load_net, save_weights

KINDS = {"tokenizer": "vqvae", "classifier": "image_classifier", "posterior": "noise_classifier"}


class Still:
    """Draws that move every image by one pixel right and down."""

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.zeros(2, *shape)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "digits"
    prepare_digits(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls(digits, kind):
    source, device = open_images(digits, "train", 0), torch.device("cpu")
    torch.manual_seed(0)
    net = new_network(kind, 8, 1, 10)
    image, c = source.batch(0, 64).image_BCHW.float() / 127.5 - 1, source.batch(0, 64).c_B

    def loss() -> float:
        with torch.no_grad():
            return float(CRITERIA[kind](net, image, c, Draws(7, list(range(64)))))

    before = loss()
    fit(net, CRITERIA[kind], source, Recipe(40, 32, 3e-3), 0, device)
    assert loss() < 0.8 * before


@pytest.mark.parametrize("kind", KINDS)
def test_prepare_writes_weights_that_load(digits, tmp_path, kind, capsys):
    out = tmp_path / kind
    assert run(main, [kind, str(out), "--data", str(digits), "--steps", "2", "--batch", "8"]) == 0
    net = load_net(str(out), KINDS[kind])
    assert not net.training
    described = json.loads((out / "config.json").read_text())
    assert described["made_by"].startswith(f"mclr prepare {kind}") and "held-out" in described["result"]
    assert run(main, [kind, str(out), "--data", str(digits)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_bundled_weights_are_as_good_as_they_say(digits):
    image, c = load_split(digits, "val")
    image = image.float() / 127.5 - 1
    with torch.no_grad():
        judge = load_net("digits-classifier", "image_classifier")
        assert (judge(image).argmax(1) == c).float().mean() >= 0.98
        tokenizer = load_net("digits-tokenizer", "vqvae")
        error = (tokenizer.decode(tokenizer.encode(image)) - image).square().mean().sqrt()
        assert error < 0.17
        posterior = load_net("digits-posterior", "noise_classifier")
        assert (posterior(image, torch.full((len(image),), 0.05)).argmax(1) == c).float().mean() >= 0.97


def test_shifts_bring_in_background():
    image = torch.ones(2, 1, 4, 4)
    moved = shifted(image, Still())
    assert moved.shape == image.shape
    assert (moved[:, :, 0] == -1).all() and (moved[:, :, :, 0] == -1).all() and (moved[:, :, 1:, 1:] == 1).all()


TEN = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


@pytest.mark.parametrize(
    ("resolution", "levels", "scales"),
    [
        (5, 1, (1, 2, 3, 4, 5)),
        (8, 2, (1, 2, 3, 4)),
        (12, 3, (1, 2, 3)),
        (16, 3, (1, 2, 3, 4)),
        (28, 2, (1, 2, 3, 4, 5, 6, 7, 9, 12, 14)),
        (32, 2, TEN),
        (48, 3, (1, 2, 3, 4, 5, 6, 8, 10, 12)),
        (64, 3, TEN),
        (256, 5, TEN),
        (512, 5, (1, 2, 4, 6, 8, 10, 12, 16, 20, 26, 32)),
    ],
)
def test_tokenizer_scales_end_at_the_feature_map(resolution, levels, scales):
    with torch.device("meta"):
        net = new_network("tokenizer", resolution, 3, 10)
        config = net.config
        assert net.features(torch.empty(1, 3, resolution, resolution)).shape[2:] == (scales[-1], scales[-1])
    assert config.scales == scales and len(config.ch_mult) == levels
    assert resolution == scales[-1] << (levels - 1)
    assert (config.ch, config.z_channels, config.vocab_size) == ((32, 8, 64) if resolution <= 16 else (64, 32, 4096))
    assert sum(p.numel() for p in net.parameters()) < (1e6 if resolution <= 16 else 2e7)


def test_new_networks_of_the_digits_are_the_bundled_ones():
    for kind, name in KINDS.items():
        assert new_network(kind, 8, 1, 10).config == load_net(f"digits-{kind}", name).config


@pytest.mark.parametrize(("resolution", "says"), [(50, "48 or 52"), (9, "8 or 10"), (1000, "992 or 1008"), (45, "44 or 48")])
def test_a_size_that_cannot_be_halved_is_refused(resolution, says):
    with pytest.raises(UserError, match=rf"{resolution}-pixel images .* --resolution {says}$"):
        new_network("tokenizer", resolution, 3, 10)
    for allowed in map(int, says.split(" or ")):
        with torch.device("meta"):
            new_network("tokenizer", allowed, 3, 10)


@pytest.mark.parametrize("kind", KINDS)
def test_quality_in_batches_is_quality_at_once(digits, kind, monkeypatch):
    net, held_out = load_net(f"digits-{kind}", KINDS[kind]), SplitReader(open_dataset(digits), "val")
    cpu, sizes = torch.device("cpu"), []
    for module in (net.encoder,) if kind == "tokenizer" else (net,):
        module.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    monkeypatch.setattr(mclr.train.training.small_networks, "BATCH", 1000)
    at_once = quality(kind, net, held_out, cpu)
    monkeypatch.undo()
    sizes.clear()
    assert quality(kind, net, held_out, cpu) == at_once
    assert set(sizes) == {256, 41}


def test_weights_outlive_their_scoring(digits, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise UserError("an image is damaged")

    monkeypatch.setattr(mclr.train.training.small_networks, "quality", fail)
    out = tmp_path / "out"
    assert run(main, ["classifier", str(out), "--data", str(digits), "--steps", "1", "--batch", "8"]) == 2
    assert "an image is damaged" in capsys.readouterr().err
    assert load_net(str(out), "image_classifier")


def test_what_cannot_be_used_is_found_before_the_fit(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mclr.train.training.small_networks, "fit", None)
    (tmp_path / "file").write_text("")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/x").write_text("")
    rng = np.random.default_rng(0)
    for c in "ab":
        (tmp_path / "src" / c).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(rng.integers(0, 255, (9, 9)).astype(np.uint8)).save(tmp_path / "src" / c / f"{i}.png")
    prepare_images(tmp_path / "src", tmp_path / "nine", 9, channels=1, val_share=0.5)
    prepare_images(tmp_path / "src", tmp_path / "no-val", 8, channels=1, val_share=0)
    capsys.readouterr()
    for out, data, line, *flags in [
        (tmp_path / "file/out", digits, "cannot write"),
        (tmp_path / "taken", digits, "exists already"),
        (tmp_path / "out", tmp_path / "nine", "9-pixel images"),
        (tmp_path / "out", tmp_path / "no-val", "has no images in its val split"),
        (tmp_path / "out", "digit", "did you mean digits?"),
        (tmp_path / "out", digits, "--steps is 0 and --batch 128: both must be at least 1", "--steps", "0"),
        (tmp_path / "out", digits, "--steps is 1000 and --batch -1: both", "--batch", "-1"),
        (tmp_path / "out", digits, "--lr is 0: it must be a number above 0", "--lr", "0"),
        (tmp_path / "out", digits, "--lr is nan: it must", "--lr", "nan"),
    ]:
        assert line in refused(main, ["tokenizer", out, "--data", data, *flags], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing_behind(number, status, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(mclr.train.training.small_networks, "fit", lambda *args, **more: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as ended:
        main(["classifier", str(tmp_path / "net"), "--data", str(digits)])
    assert ended.value.code == status and not list(tmp_path.iterdir())


def test_progress_and_time_left_show_where_stderr_is_a_file(digits, tmp_path, capsys):
    assert run(main, ["classifier", str(tmp_path / "out"), "--data", str(digits), "--steps", "3", "--batch", "8"]) == 0
    assert re.search(r"100%.* 24/24 \[\d\d:\d\d<00:00, +[\d.]+img/s, loss=", capsys.readouterr().err)


def test_a_loss_that_is_not_finite_writes_nothing(digits, tmp_path, capsys):
    out = tmp_path / "new/out"
    assert run(main, ["classifier", str(out), "--data", str(digits), "--steps", "5", "--batch", "8", "--lr", "1e30"]) == 2
    err = capsys.readouterr().err
    # after the bar
    assert err.splitlines()[-1].startswith("error: the loss or its gradient is not finite at step ")
    assert not any(out.parent.iterdir())


def test_data_may_be_a_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(main, ["classifier", "out", "--data", "digits", "--steps", "1", "--batch", "8"]) == 0
    assert (tmp_path / "data/digits/dataset.json").is_file()
    assert json.loads((tmp_path / "out/config.json").read_text())["data"] == "digits"


def with_posterior(name, *overrides):
    overrides = (f"model.posterior.weights={name}", "model.weights=null", "model.net.attn_resolutions=[]", *overrides)
    return load("edm2-digits", "mclr", "digits", "local", list(overrides))


@pytest.mark.parametrize("resolution", [8, 16, 32])
def test_a_run_loads_the_posterior_that_prepare_makes(resolution, tmp_path):
    net = new_network("posterior", resolution, 1, 10)
    save_weights(tmp_path / "posterior", net)
    config = with_posterior(tmp_path / "posterior", f"data.resolution={resolution}")
    loaded = build_networks(config, torch.device("cpu")).classifier
    assert loaded.config == net.config
    torch.testing.assert_close(loaded.state_dict(), net.state_dict(), atol=0, rtol=0)
    fresh = build_classifier(with_posterior("null", f"data.resolution={resolution}"))
    assert fresh.config == net.config


def test_the_weights_decide_the_size_of_the_posterior(tmp_path):
    net = new_network("posterior", 64, 1, 10)
    save_weights(tmp_path / "posterior", net)
    assert build_classifier(with_posterior(tmp_path / "posterior", "data.resolution=16")).config == net.config
    bundled = build_classifier(with_posterior("digits-posterior"))
    assert bundled.config == new_network("posterior", 8, 1, 10).config


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.channels=3", "img_channels 1, this run has 3"),
        ("data.num_classes=11", "num_classes 10, this run has 11"),
        ("model.sigma_data=0.25", "sigma_data 0.5, this run has 0.25"),
    ],
)
def test_a_posterior_of_other_data_is_refused(override, says):
    with pytest.raises(UserError, match=f"^model.posterior.weights=digits-posterior has {says}: "):
        build_classifier(with_posterior("digits-posterior", override))
