"""Checkpoints: whole or not there, never trusted when damaged, never lost by what comes after."""

import json
import os
import signal
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mclr.train.engine.checkpoint
import mclr.train.system.files
from mclr.errors import UserError
from mclr.train.engine.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from mclr.train.system.files import CannotWrite, write_tensors


def save(run, images, keep=2):
    save_checkpoint(run, images, {"engine": {"w": torch.full((5,), float(images))}}, {"images": images}, {}, keep)


def names(run):
    return sorted(os.listdir(run / "checkpoints"))


def newest(run):
    folder, damaged = newest_checkpoint(run)
    return folder and int(folder.name), [int(p.name) for p in damaged]


def test_what_is_saved_is_loaded(tmp_path):
    assert newest(tmp_path) == (None, [])
    state = {"images": 64, "seconds": 0.1, "flops": 1e20}
    tensors = {"engine": {"a": torch.randn(2, 3), "step": torch.tensor(7.0)}, "ema": {"a": torch.randn(2, 3).T}}
    save_checkpoint(tmp_path, 64, tensors, state, {}, keep=1)
    loaded, back = load_checkpoint(newest_checkpoint(tmp_path)[0])
    assert back == state and loaded.keys() == tensors.keys()
    for name in tensors:
        assert all(torch.equal(loaded[name][key], tensors[name][key]) for key in tensors[name])


def test_the_newest_ones_are_kept(tmp_path):
    for images in (64, 128, 192, 1_000_000_000_000):
        save(tmp_path, images)
    assert names(tmp_path) == ["000000000192", "1000000000000"] and newest(tmp_path) == (1_000_000_000_000, [])


DAMAGES = {
    "a byte": lambda folder: (folder / "engine.safetensors").write_bytes(b"x" + (folder / "engine.safetensors").read_bytes()[1:]),
    "a part": lambda folder: os.truncate(folder / "engine.safetensors", 20),
    "a file": lambda folder: (folder / "state.json").unlink(),
    "the list": lambda folder: (folder / "manifest.json").unlink(),
    "the list, half": lambda folder: os.truncate(folder / "manifest.json", 10),
    "the list, other": lambda folder: (folder / "manifest.json").write_text("[]"),
    "the list, empty": lambda folder: (folder / "manifest.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_passed_over(tmp_path, damage):
    save(tmp_path, 64)
    save(tmp_path, 128)
    DAMAGES[damage](tmp_path / "checkpoints" / "000000000128")
    assert newest(tmp_path) == (64, [128])


def test_training_on_from_an_older_one_replaces_the_damaged(tmp_path):
    for images in (64, 128, 192):
        save(tmp_path, images, keep=3)
    for images in (128, 192):
        DAMAGES["a byte"](tmp_path / "checkpoints" / f"{images:012d}")
    assert newest(tmp_path) == (64, [192, 128])
    save(tmp_path, 96, keep=2)
    assert names(tmp_path) == ["000000000064", "000000000096"]
    DAMAGES["a byte"](tmp_path / "checkpoints" / "000000000096")
    save(tmp_path, 96, keep=1)
    assert newest(tmp_path) == (96, []) and names(tmp_path) == ["000000000096"]


def test_a_checkpoint_is_read_by_safetensors_itself(tmp_path):
    """Every type that networks have, empty and 0-d tensors, those of other memory layouts; as save_file writes them."""
    types = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)
    tensors = {str(dtype): (torch.randn(3, 2, 5) * 3).to(dtype) for dtype in types}
    tensors |= {
        "0-d": torch.tensor(7),
        "none": torch.empty(0, 3),
        "layout": torch.randn(1, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    write_tensors(tmp_path / "a", tensors, {"std": "0.1"})
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "b", {"std": "0.1"})
    ours, theirs = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(ours[name].dtype == theirs[name].dtype for name in theirs)
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert file.metadata() == {"std": "0.1"}


def test_a_slow_disk_is_no_hang(tmp_path, monkeypatch):
    """A checkpoint is written, verified and read in chunks with a beat after each. Between two beats few bytes reach the disk."""
    monkeypatch.setattr(mclr.train.system.files, "CHUNK", 64)
    synced, since, most = {}, 0, 0

    def fsync(file):
        nonlocal since, most
        found = os.fstat(file)
        if stat.S_ISREG(found.st_mode):
            since += max(found.st_size - synced.get(found.st_ino, 0), 0)
            synced[found.st_ino] = found.st_size
        most = max(most, since)

    def beat():
        nonlocal since
        since = 0

    monkeypatch.setattr(os, "fsync", fsync)
    tensors = {"engine": {f"w{i}": torch.full((64,), float(i)) for i in range(4)}, "ema": {"w": torch.ones(64)}}
    for images in (64, 128):
        save_checkpoint(tmp_path, images, tensors, {}, {}, keep=1, beat=beat)
    assert sum(synced.values()) > 30 * 64 and most <= 10 * 64
    beats = []
    newest, _ = newest_checkpoint(tmp_path, lambda: beats.append(1))
    # bytes of five tensors, 64 at a time
    assert len(beats) >= 5 * 4
    load_checkpoint(newest, lambda: beats.append(2))
    assert beats.count(2) == 2


@pytest.mark.parametrize("function", ["write_json", "write_tensors"])
def test_a_process_killed_while_writing_leaves_nothing_to_read(tmp_path, function):
    save(tmp_path, 64)
    if (child := os.fork()) == 0:
        real = getattr(mclr.train.engine.checkpoint, function)

        def killed(*args, **options):
            real(*args, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(mclr.train.engine.checkpoint, function, killed)
        save(tmp_path, 128)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    left = [name for name in names(tmp_path) if name != "000000000064"]
    assert len(left) == 1 and left[0].startswith(".tmp-")
    assert newest(tmp_path) == (64, [])
    assert load_checkpoint(newest_checkpoint(tmp_path)[0])[1] == {"images": 64}


@pytest.mark.parametrize("function", ["write_json", "write_tensors"])
def test_a_full_disk_is_told_and_costs_nothing(tmp_path, monkeypatch, function):
    save(tmp_path, 64, keep=1)

    def fail(path, *args, **options):
        raise CannotWrite(path, OSError(28, "No space left on device"))

    monkeypatch.setattr(mclr.train.engine.checkpoint, function, fail)
    with pytest.raises(UserError, match=r"checkpoints/000000000128 \(No space left on device\): make room"):
        save(tmp_path, 128, keep=1)
    assert names(tmp_path) == ["000000000064"] and newest(tmp_path) == (64, [])
    assert json.loads((tmp_path / "checkpoints" / "000000000064" / "state.json").read_text()) == {"images": 64}


def test_the_best_is_kept_beside_the_newest(tmp_path):
    losses = {64: 3.0, 128: 1.0, 192: 1.0, 256: None, 320: 2.0}
    for images, loss in losses.items():
        save_checkpoint(tmp_path, images, {"engine": {}}, {"held_out": loss}, {}, keep=1, keep_best=True)
    assert [int(name) for name in names(tmp_path)] == [192, 320]
    save_checkpoint(tmp_path, 384, {"engine": {}}, {"held_out": 0.5}, {}, keep=1, keep_best=True)
    assert [int(name) for name in names(tmp_path)] == [384]
    save_checkpoint(tmp_path, 448, {"engine": {}}, {"held_out": 0.6}, {}, keep=1, keep_best=True)
    (tmp_path / "checkpoints" / f"{384:012d}" / "state.json").write_text("{")
    save_checkpoint(tmp_path, 512, {"engine": {}}, {"held_out": 0.7}, {}, keep=1, keep_best=True)
    assert [int(name) for name in names(tmp_path)] == [448, 512]
