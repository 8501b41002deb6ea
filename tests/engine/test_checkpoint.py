"""Checkpoints: whole or not there, never trusted when damaged, never lost by what comes after."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mclr.train.engine.checkpoint
from mclr.errors import UserError
from mclr.train.engine.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint

ROOT = Path(__file__).parent.parent.parent


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


@pytest.mark.parametrize("function", ["write_json", "save_file"])
def test_a_process_killed_while_writing_leaves_nothing_to_read(tmp_path, function):
    save(tmp_path, 64)
    program = f"""
import os, pathlib, torch
from mclr.train.engine import checkpoint
real = checkpoint.{function}
def killed(*args):
    real(*args)
    os.kill(os.getpid(), 9)
checkpoint.{function} = killed
checkpoint.save_checkpoint(pathlib.Path({str(tmp_path)!r}), 128, {{"engine": {{"w": torch.zeros(5)}}}}, {{}}, {{}}, 1)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == -9
    left = [name for name in names(tmp_path) if name != "000000000064"]
    assert len(left) == 1 and left[0].startswith(".tmp-")
    assert newest(tmp_path) == (64, [])
    assert load_checkpoint(newest_checkpoint(tmp_path)[0])[1] == {"images": 64}


@pytest.mark.parametrize("function", ["write_json", "save_file"])
def test_a_full_disk_is_told_and_costs_nothing(tmp_path, monkeypatch, function):
    save(tmp_path, 64, keep=1)
    # as safetensors and our own writer say it
    error = {"save_file": mclr.train.engine.checkpoint.SafetensorError("I/O error: No space left on device (os error 28)")}
    full = error.get(function, UserError("cannot write state.json (No space left on device)"))

    def fail(*args):
        raise full

    monkeypatch.setattr(mclr.train.engine.checkpoint, function, fail)
    with pytest.raises(UserError, match="No space left"):
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
