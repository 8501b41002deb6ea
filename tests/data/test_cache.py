"""Caches of latents and tokens: what is read is what the encoder gives, however the making was stopped; damage is one line."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import as_rank
from photos import refused, save_tiny_vae
from ranks import Trained, tiny
from runs import assert_same_tensors

from mclr.configs.schema import load
from mclr.errors import UserError
from mclr.likelihood import Draws
from mclr.train.cli import main as command_line
from mclr.train.data.cache import cache_of, data_line, precision_of, through_cache
from mclr.train.data.encoders import Latents, from_uint8
from mclr.train.prepare import main
from mclr.train.system.console import run
from mclr.train.training.build import open_source
from mclr.train.training.networks import build_encoder

CPU = torch.device("cpu")
COUNT = 22  # of the photos in the train split


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr("mclr.train.data.cache.CHUNK", 5)
    monkeypatch.setattr("mclr.train.data.cache.BATCH", 3)


@pytest.fixture
def data(photos, tmp_path):
    return shutil.copytree(photos, tmp_path / "data")


@pytest.fixture
def make(data, vae, capsys):
    """make(*arguments) -> (status, what was said) of `mclr prepare cache` on the photos."""

    def make(*arguments):
        capsys.readouterr()
        status = run(main, ["cache", "--model", "edm2-digits", "--data", str(data), f"model.vae={vae}", *arguments])
        out, err = capsys.readouterr()
        return status, out + "".join(line for line in err.splitlines() if line.startswith("error"))

    return make


def opened(data, vae, *overrides):
    """(config, source without a cache, encoder)."""
    config = load("edm2-digits", "mle", str(data), "local", [f"model.vae={vae}", "model.weights=null", *overrides])
    return config, open_source(config), build_encoder(config, CPU)


def cached(data, vae, *overrides):
    config, source, encoder = opened(data, vae, *overrides)
    return through_cache(source, encoder, config.data, config.model)


def expected(data, vae, mirror=False):
    """What the VAE gives of every image of the split, in shard order."""
    _, source, encoder = opened(data, vae)
    images = from_uint8(source.split.images(list(range(COUNT))))
    return encoder.encode(images.flip(-1) if mirror else images).numpy()


def folder(data):
    return next((data / "cache").iterdir())


def files(data):
    return {path.relative_to(data / "cache"): path.read_bytes() for path in (data / "cache").rglob("*.npy")}


@pytest.mark.parametrize("views", [1, 2])
def test_a_cache_holds_what_the_encoder_gives(views, make, data, vae):
    status, said = make(f"data.flip={views == 2}")
    assert status == 0
    what = "latents of 22 images and their mirror images" if views == 2 else "latents of 22 images"
    assert said == f"{folder(data)}: {what}, float32, 0.{views - 1} MiB\n"
    source = cached(data, vae, f"data.flip={views == 2}")
    stored_NV = np.stack([source.cache.read(i) for i in range(COUNT)])
    assert stored_NV.shape == (COUNT, views, 8, 8, 8)
    for view in range(views):
        np.testing.assert_allclose(stored_NV[:, view], expected(data, vae, mirror=view == 1), rtol=0, atol=1e-4)
    # any program reads it
    whole = np.concatenate([np.load(file)["x"] for file in sorted(folder(data).glob("*.npy"))])
    assert np.array_equal(whole, stored_NV)
    record = json.loads((folder(data) / "cache.json").read_text())
    assert (record["count"], record["shape"], record["views"]) == (COUNT, [8, 8, 8], views)
    assert record["command"].startswith("mclr prepare cache --model edm2-digits --data ")
    # and again: nothing to do
    before = {path: path.stat().st_mtime_ns for path in folder(data).iterdir()}
    assert "is complete: latents of 22" in make(f"data.flip={views == 2}")[1]
    assert {path: path.stat().st_mtime_ns for path in folder(data).iterdir()} == before


def test_a_run_reads_its_cache_and_no_image(make, data, vae, monkeypatch):
    """At every position the same x up to the rounding of a batch, mirrored where the run mirrors."""
    make("data.flip=true")
    overrides = ["model.vae=" + str(vae), "data.flip=true", "data.resolution=64", "data.channels=3", "data.num_classes=2"]
    trained = Trained("edm2-digits", "local", data, None, 8, settings=overrides)
    plain_x, plain_c, *_ = trained.task.samples(30, 40)
    source = cached(data, vae, "data.flip=true")
    assert cache_of(source)
    monkeypatch.setattr("mclr.train.data.dataset.read_image", lambda *_: pytest.fail("an image was read"))
    task = replace(trained.task, source=source)
    source.prefetch(range(30, 50))
    x, c, *_ = task.samples(30, 40)
    assert torch.equal(c, plain_c) and x.dtype == torch.float32
    assert ((x - plain_x).square().mean() / plain_x.square().mean()).sqrt() < 1e-5
    # with mirror images among them, which are others
    flip_B, batch = Draws(task.loss.seed, list(range(30, 70))).uniform() < 0.5, source.batch(30, 40)
    changed_B = (task.encode(batch, flip_B) - task.encode(batch)).flatten(1).abs().amax(1) > 1e-2
    assert 8 < flip_B.sum() < 32 and torch.equal(changed_B, flip_B)
    assert not source.coming


def test_fp16_moves_latents_by_as_much_as_is_said(make, data, vae):
    """Half is one cache, exact another, and the exact one is read where both are there."""
    assert "float16" in make("--half")[1]
    half = cached(data, vae)
    assert half.cache.key.dtype == "float16"
    _, _, encoder = opened(data, vae)
    assert precision_of(half, encoder) == {"latents": "float16"}
    stored = half.batch(0, COUNT).stored_BV
    assert stored.dtype == torch.float32
    half_size = sum(path.stat().st_size for path in folder(data).glob("*.npy"))
    make()
    exact = cached(data, vae)
    assert exact.cache.key.dtype == "float32" and precision_of(exact, encoder) == {"latents": "float32"}
    assert sum(path.stat().st_size for path in exact.cache.folder.glob("*.npy")) > 1.7 * half_size
    assert 0 < (stored - exact.batch(0, COUNT).stored_BV).abs().max() < 2**-10
    # latents of EDM2's statistics: means as spread as all of them, a small standard deviation
    mean, std = (torch.tensor(v)[None, :, None, None] for v in (Latents.MEAN, Latents.STD))
    stored = torch.cat([mean + std * Draws(1, list(range(8))).normal(4, 64, 64), torch.full((8, 4, 64, 64), 0.1)], 1)
    x, rounded = (encoder.draw(each, Draws(0, list(range(8)))) for each in (stored, stored.half().float()))
    assert ((x - rounded).square().mean() / x.var()).sqrt() == pytest.approx(2.5e-4, rel=0.1)


class Stop(Exception):
    pass


def stopping(monkeypatch, images):
    """Let the VAE be stopped after so many images; returns what counts them."""
    count, encode = [0], Latents.encode

    def counted(self, image_BCHW):
        count[0] += len(image_BCHW)
        if count[0] > images:
            raise Stop
        return encode(self, image_BCHW)

    monkeypatch.setattr(Latents, "encode", counted)
    return count


def test_a_stopped_job_goes_on_after_its_last_file(make, data, vae, monkeypatch):
    make()
    whole, place = files(data), folder(data)
    shutil.rmtree(place)
    with monkeypatch.context() as patch:
        stopping(patch, 13)
        with pytest.raises(Stop):
            make()
    assert sorted(path.name for path in place.iterdir()) == ["000000.npy", "000001.npy"]
    config, source, encoder = opened(data, vae)
    assert through_cache(source, encoder, config.data, config.model) is source
    says = f"data       nothing in {data / 'cache'} is complete and fits this run: every image is encoded at every visit"
    assert data_line(source, encoder, config.data) == [says]
    # what a kill or a crash of the machine may leave
    (place / "000000.npy").write_bytes((place / "000000.npy").read_bytes()[:-1])
    (place / ".tmp-killed").write_bytes(b"half")
    kept = (place / "000001.npy").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        count = stopping(patch, 1000)
        assert make()[0] == 0
    assert count[0] == COUNT - 5 and (place / "000001.npy").stat().st_mtime_ns == kept
    assert files(data) == whole and not list(place.glob(".tmp-*"))


def test_ranks_share_the_files_without_a_word(make, data, vae, monkeypatch):
    make("data.flip=true")
    whole = files(data)
    shutil.rmtree(data / "cache")
    for rank, there in ((1, ["000001.npy", "000003.npy"]), (0, sorted([*(path.name for path in whole), "cache.json", "lock"]))):
        as_rank(monkeypatch, rank, 2)
        status, said = make("data.flip=true")
        assert status == 0 and sorted(path.name for path in folder(data).iterdir()) == there
        assert bool(said) == (rank == 0)
    # rank 0 at the end, and files of another that it does not see
    (folder(data) / "cache.json").unlink()
    (folder(data) / "000001.npy").unlink()
    assert f"{folder(data)}: 1 of 5 files are still being made elsewhere" in make("data.flip=true")[1]
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.delenv("WORLD_SIZE")
    make("data.flip=true")
    assert files(data) == whole
    # who comes second to the end leaves the first one's word
    record = (folder(data) / "cache.json").read_text()
    assert not cache_of(cached(data, vae, "data.flip=true")).finish("another command")
    assert (folder(data) / "cache.json").read_text() == record


def test_a_file_system_without_locks_will_do(make, data, vae, monkeypatch):
    def refuse(file, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert make()[0] == 0 and cache_of(cached(data, vae))


def test_a_cache_is_for_its_encoder_data_and_mirroring(make, data, vae, tmp_path):
    make()
    other = save_tiny_vae(tmp_path / "other", block_out_channels=(8, 8, 16, 16))
    for overrides in (["data.flip=true"], [f"model.vae={other}"]):
        assert cache_of(cached(data, vae, *overrides)) is None
    make("data.flip=true")
    assert cache_of(cached(data, vae, "data.flip=true")).key.views == 2
    # the one without mirror images is shorter; with it gone the other serves as well
    source = cached(data, vae)
    assert source.cache.key.views == 1
    shutil.rmtree(source.cache.folder)
    assert cache_of(cached(data, vae)).key.views == 2
    record = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps(record | {"source": "elsewhere"}))
    assert cache_of(cached(data, vae)) is None


def test_a_stream_has_no_cache(data, vae):
    config, source, encoder = opened(data, vae)
    # no path at all
    source.info = source.info.model_copy(update={"splits": {}, "path": Path("pipe:" + 300 * "x")})
    assert through_cache(source, encoder, config.data, config.model) is source
    says = "data       streamed, shards drawn with replacement: a resumed run sees other samples"
    assert data_line(source, encoder, config.data) == [says]


@pytest.mark.parametrize(
    ("file", "damage"),
    [("000002.npy", lambda path: os.truncate(path, 1000)), ("000004.npy", Path.unlink)],
    ids=["cut off", "missing"],
)
def test_a_damaged_cache_is_refused_when_a_run_starts(file, damage, make, data, vae):
    make()
    damage(folder(data) / file)
    says = f"{folder(data)} is damaged ({file} is missing or cut off): remove this folder, and make it again with `mclr prepare cache`"
    with pytest.raises(UserError, match=f"^{re.escape(says)}$"):
        cached(data, vae)
    # nor does making it again overlook that
    assert make() == (2, f"error: {says}")


def test_damage_inside_of_a_file_is_noticed_when_it_is_read(make, data, vae):
    make()
    file = folder(data) / "000001.npy"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    source = cached(data, vae)
    order = source.indices(range(COUNT))
    for position, i in enumerate(order):
        if i != 9:
            source.batch(position, 1)
    with pytest.raises(UserError, match=r"is damaged \(sample 9 in 000001.npy: its checksum differs\): remove this folder"):
        source.batch(order.index(9), 1)
    # a file of other samples is of the right size and whole
    shutil.copy(folder(data) / "000000.npy", file)
    with pytest.raises(UserError, match=r"\(sample 5 in 000001.npy: its checksum differs\)"):
        cached(data, vae).batch(order.index(5), 1)


def test_a_damaged_image_stops_the_making_with_the_usual_line(make, data, vae):
    _, source, _ = opened(data, vae)
    sample = source.split.samples[7]
    content = bytearray((data / sample.file).read_bytes())
    content[sample.offset + 40 : sample.offset + 400] = bytes(360)
    (data / sample.file).write_bytes(content)
    status, said = make("data.damaged=0.5")
    assert status == 2 and f"the image of sample {sample.key} is damaged" in said and said.count("\n") == 0
    assert [path.name for path in folder(data).iterdir()] == ["000000.npy"]


def test_what_cannot_be_cached_is_one_line(make, data, digits, tokenizer, capsys):
    tokens = ["cache", "--model", "var-digits", "--data", str(digits), f"model.tokenizer={tokenizer}"]
    for argv, says in (
        (["cache", "--model", "edm2-digits", "--data", str(digits)], "edm2-digits models pixels: there is nothing to cache"),
        ([*tokens, "--half"], "var-digits models tokens, which are whole numbers: leave out --half"),
        (["cache", "--model", "edm2-digits"], "arguments are required: --data"),
        ([*tokens, "data.flipp=true"], "did you mean data.flip?"),
        ([*tokens, "data.path=pipe:cat a.tar"], "pipe:cat a.tar is a stream, whose samples have no numbers"),
    ):
        assert says in refused(main, argv, capsys)
    assert not (digits / "cache").exists() and not (data / "cache").exists()


def test_numbers_that_fp16_does_not_hold_are_refused(make, data, monkeypatch):
    encode = Latents.encode
    monkeypatch.setattr(Latents, "encode", lambda self, image_BCHW: encode(self, image_BCHW) + 1e5)
    status, said = make("--half")
    assert status == 2 and "numbers that float16 does not hold" in said and not files(data)


def test_a_run_on_tokens_may_gain_and_lose_its_cache(digits, tokenizer, tmp_path, capsys, monkeypatch):
    data = shutil.copytree(digits, tmp_path / "data")
    model = ["--model", "var-digits", "--data", str(data), "data.flip=true"]

    def start(out, images):
        capsys.readouterr()
        settings = [*tiny("var-digits", tokenizer), "train.batch=8", f"train.images={images}"]
        assert command_line(["train", *model, *settings, "--out", str(tmp_path / out)]) == 0
        return capsys.readouterr().out

    assert "data       tokens" not in start("plain", 32) and "data       nothing" not in start("other", 16)
    assert command_line(["prepare", "cache", *model, f"model.tokenizer={tokenizer}"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr("mclr.train.data.dataset.read_image", lambda *_: pytest.fail("an image was read"))
        assert f"data       tokens (uint8) from {folder(data)}\n" in start("other", 24)
    shutil.rmtree(data / "cache")
    start("other", 32)
    assert_same_tensors(tmp_path / "plain", tmp_path / "other")


def test_a_run_on_fp16_latents_may_not_change_them(make, data, vae, tmp_path, capsys):
    argv = ["train", "--model", "edm2-digits", "--objective", "mle", "--data", str(data), "--out", str(tmp_path / "run")]
    argv += [f"model.vae={vae}", "model.weights=null", "model.posterior.weights=null", "train.batch=8"]
    assert command_line([*argv, "train.images=8"]) == 0
    assert json.loads((tmp_path / "run" / "inputs.json").read_text())["latents"] == "float32"
    make("--half")
    capsys.readouterr()
    assert command_line([*argv, "train.images=16"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: run folder {tmp_path / 'run'} began with another latents=float32 than lies there now: choose")
    # an exact one takes the place of both
    make()
    assert command_line([*argv, "train.images=16"]) == 0
    assert f"data       latents (float32) from {data / 'cache'}" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(data / "cache")
    make("--half")
    assert command_line([*argv, "train.images=8"]) == 0
    (folder(data) / "000000.npy").unlink()
    assert command_line([*argv, "train.images=16"]) == 2
    assert "is damaged (000000.npy is missing or cut off)" in capsys.readouterr().err
    shutil.rmtree(data / "cache")
    assert command_line([*argv, "train.images=16"]) == 2
    assert "began with another latents=float16 than" in capsys.readouterr().err
