"""train/training/previews.py: what a picture shows, when it is drawn, and that training never notices."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launch import as_rank
from photos import save_tiny_vae
from PIL import Image

from mclr.configs.schema import Sample, load
from mclr.errors import UserError
from mclr.guidance import Guidance
from mclr.train.cli import main
from mclr.train.data.images import image_paths, read_images
from mclr.train.training.build import build_networks, build_task, open_source
from mclr.train.training.networks import build_paradigm
from mclr.train.training.previews import Preview, columns

CPU = torch.device("cpu")
FEW = {"edm2-digits": ["sample.steps=8"], "var-digits": []}


class Run:
    """A run folder that remembers what it hands to the trackers."""

    def __init__(self, path):
        self.path, self.given, self.trackers = path, [], self

    def give(self, *what):
        self.given.append(what)


@pytest.fixture
def make(digits, tmp_path):
    """make(model, *overrides, run) -> (preview, task) of a run on the digits, with the bundled weights."""

    def make(model, *overrides, run=True):
        settings = [*FEW[model], f"data.path={digits}", "train.grid_every=100", "sample.batch=16", *overrides]
        config = load(model, "mle", "digits", "local", settings)
        task = build_task(config, open_source(config), build_networks(config, CPU), CPU, config.train.batch)
        return Preview(task, config.train.grid_every, config.sample, Run(tmp_path) if run else None), task

    return make


def test_conditions_are_spread_evenly():
    assert columns(10) == list(range(10)) and columns(3) == [0, 1, 2] and columns(1) == [0]
    assert columns(1000) == list(range(0, 1000, 100)) and columns(12) == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]


def test_a_picture_is_due_once_every_so_many_images_and_at_the_end(make):
    preview, _ = make("var-digits")
    steps = [(32 * i, 32 * (i - 1), i == 12) for i in range(1, 13)]
    assert [images for images, before, done in steps if preview.due(images, before, done)] == [128, 224, 320, 384]
    never, _ = make("var-digits", "train.grid_every=0")
    assert not never.due(100, 0, True)


def test_it_shows_the_strength_of_the_settings(make, monkeypatch):
    preview, task = make("var-digits")
    monkeypatch.setattr(
        type(task.loss.paradigm), "sample", lambda self, net, c_B, guidance, draws: told.append(guidance) or 1 / 0
    )
    preview.guidance, told = Preview(task, 100, Sample(strength=1.5), None).guidance, []
    with pytest.raises(ZeroDivisionError):
        preview.write(128)
    assert told == [Guidance(strength=1.5)]


@pytest.mark.parametrize("model", FEW)
def test_it_shows_what_sample_draws(model, make, digits, tmp_path):
    """Ten conditions by four seeds of each, up to the rounding of other micro-batches."""
    preview, _ = make(model)
    preview.write(128)
    assert preview.folder.given == [("picture", "samples", 128, tmp_path / "grids" / "000000000128.png")]
    # 8-pixel digits, one pixel between them, eight times as large
    picture = np.asarray(Image.open(preview.folder.given[0][3]).convert("L"))[::8, ::8]
    assert picture.shape == (4 * 9 - 1, 10 * 9 - 1)
    argv = ["sample", model, "--data", str(digits), "--out", str(tmp_path / "drawn"), "--count", "40", *FEW[model]]
    assert main(argv) == 0
    drawn_NCHW = read_images(image_paths(tmp_path / "drawn"))
    for i, image_CHW in enumerate(drawn_NCHW):
        row, column = 9 * (i // 10), 9 * (i % 10)
        shown = picture[row : row + 8, column : column + 8].astype(int)
        assert np.abs(shown - image_CHW[0]).max() <= 1, i


@pytest.mark.parametrize("model", FEW)
def test_training_never_notices(model, make):
    dropout = {"edm2-digits": "model.net.dropout=0.2", "var-digits": "model.net.drop_path=0.2"}[model]
    preview, task = make(model, dropout)
    net, calls = task.engine.net, []
    # hooks of a module see what goes through its call, as those that gather ZeRO 3's weights do
    net.register_forward_pre_hook(lambda module, inputs: calls.append((module.training, torch.is_grad_enabled())))
    before = {name: t.clone() for name, t in net.state_dict().items()}
    chance, rows = torch.get_rng_state(), dict(task.engine.rows)
    preview.write(100)
    first = preview.folder.given[0][3].read_bytes()
    assert calls and set(calls) == {(False, False)} and net.training
    assert torch.equal(torch.get_rng_state(), chance) and task.engine.rows == rows
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    preview.write(200)
    assert preview.folder.given[1][3].read_bytes() == first


def test_compiled_code_is_left_to_training(make):
    """Another batch size would make compiled code for any, with another rounding than before."""
    preview, task = make("edm2-digits", "sample.steps=1")
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    task.engine.net.compile(backend=backend)
    preview.write(100)
    assert not compiled
    torch._dynamo.reset()


def test_every_forward_is_a_sign_of_life(make):
    """A picture of a large network may take longer than the watchdog waits."""
    preview, task = make("edm2-digits", "sample.batch=40")
    calls, beats = [], []
    task.engine.net.register_forward_pre_hook(lambda *_: calls.append(1))
    preview.beat = lambda: beats.append(1)
    preview.write(100)
    assert len(beats) >= len(calls) >= 8


def test_other_ranks_run_the_network_where_all_must_and_write_nothing(make, tmp_path, monkeypatch):
    preview, task = make("edm2-digits", "sample.steps=1", run=False)
    as_rank(monkeypatch, 1, 2)
    calls = []
    task.engine.net.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    preview.write(100)
    assert calls == []
    task.engine.lockstep = True
    preview.write(100)
    assert calls == [16, 16, 8] and not list(tmp_path.rglob("*.png"))


def test_what_goes_wrong_is_one_line_and_training_mode_comes_back(make, tmp_path, monkeypatch):
    preview, task = make("edm2-digits")

    def short(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(type(task.loss.paradigm), "sample", short)
        with pytest.raises(UserError, match=r"^out of GPU memory for a picture: lower sample.batch \(now 16\)$"):
            preview.write(100)
    assert task.engine.net.training
    (tmp_path / "grids").write_text("")
    with pytest.raises(UserError, match=r"^cannot make .*grids"):
        preview.write(100)


def test_latents_are_decoded(digits, tmp_path):
    """Of an untrained VAE and network: a picture of the right size in colour."""
    pytest.importorskip("diffusers")
    small = ["model.net.model_channels=8", "model.net.channels_per_head=8", "model.net.channel_mult=[1,2]"]
    data = ["data.resolution=32", "data.channels=3", "data.num_classes=3"]
    more = [f"model.vae={save_tiny_vae(tmp_path / 'vae')}", "model.weights=null", "sample.steps=2", "engine.precision=bf16"]
    config = load("edm2-digits", "mle", "digits", "local", [*small, *data, *more, "train.grid_every=8"])
    networks = build_networks(config, CPU)
    engine = SimpleNamespace(net=networks.net.train(), lockstep=False)
    task = SimpleNamespace(
        bf16=False,
        engine=engine,
        device=CPU,
        encoder=networks.encoder,
        loss=SimpleNamespace(paradigm=build_paradigm(config, networks.encoder)),
    )
    preview = Preview(task, 8, config.sample.model_copy(update={"batch": 256}), Run(tmp_path))
    preview.write(8)
    with Image.open(preview.folder.given[0][3]) as picture:
        assert picture.mode == "RGB" and picture.size == (2 * (3 * 33 - 1), 2 * (4 * 33 - 1))
