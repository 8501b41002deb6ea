"""Averages of weights: their profiles are the power functions of the paper, and others are made from their snapshots afterwards."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import relative_rms
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mclr.errors import UserError
from mclr.train.engine.ema import EMA, beta_of, coefficients, exponent_of, reconstruct, rewind_snapshots, write_snapshot
from mclr.train.run import main


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.15, 0.25])
def test_the_exponent_gives_the_standard_deviation_asked_for(std):
    """Relative to its end, a profile of density (gamma + 1) t^gamma on [0, 1] has this standard deviation."""
    gamma = exponent_of(std)
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert (square - mean**2) ** 0.5 == pytest.approx(std, rel=1e-9)


def profile(std: float, batches: list[int]) -> np.ndarray:
    """The share that the weights after each batch have in the final average."""
    shares, seen = np.zeros(len(batches)), 0
    for i, batch in enumerate(batches):
        seen += batch
        beta = beta_of(std, seen, batch)
        shares = shares * beta
        shares[i] = 1 - beta
    return shares


@pytest.mark.parametrize("std", [0.05, 0.1, 0.25])
def test_the_shares_are_the_power_function(std):
    shares, power = profile(std, [4] * 500), exponent_of(std) + 1
    edges = (np.arange(501) / 500) ** power
    np.testing.assert_allclose(shares, np.diff(edges), atol=1e-12)


def test_the_first_step_forgets_what_was_before():
    ema = EMA({"w": torch.full((3,), 7.0)}, 0.1)
    ema.update({"w": torch.ones(3)}, images_seen=4, images=4)
    assert ema.average["w"].tolist() == [1.0] * 3


def test_the_average_is_fp32_and_no_view_of_the_weights():
    w = torch.ones(3)
    ema = EMA({"w": w}, 0.05)
    w.zero_()
    assert ema.average["w"].dtype == torch.float32 and ema.average["w"].tolist() == [1.0] * 3
    # increments far below the resolution of bf16 add up
    for step in range(1, 1001):
        ema.update({"w": torch.full((3,), 2.0)}, images_seen=10**6 + step, images=1)
    kept = (10**6 / (10**6 + 1000)) ** (exponent_of(0.05) + 1)
    torch.testing.assert_close(ema.average["w"], torch.full((3,), 2 - kept), rtol=1e-5, atol=0)


def test_the_published_implementation_has_the_same_numbers():
    numbers = np.load(Path(__file__).parent.parent / "golden" / "phema.npz")
    np.testing.assert_allclose([exponent_of(std) for std in numbers["stds"]], numbers["exps"], rtol=0, atol=1e-9)
    np.testing.assert_allclose([beta_of(std, 4096, 128) for std in numbers["stds"]], numbers["betas"], rtol=0, atol=1e-9)
    x_K, _ = coefficients(numbers["in_ofs"], numbers["in_std"], float(numbers["out_ofs"][0]), float(numbers["out_std"][0]))
    np.testing.assert_allclose(x_K, numbers["coefficients"][:, 0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("std", [0.04, 0.075, 0.2])
def test_the_combined_profile_is_as_far_from_the_one_asked_for_as_it_says(std):
    """Against sums over many short steps."""
    steps, t_K, std_K = 8000, np.repeat(np.arange(1.0, 9.0), 2), np.tile([0.05, 0.1], 8)

    def density(t, std):
        return np.diff(np.minimum(np.arange(steps + 1) * 8 / steps / t, 1) ** (exponent_of(std) + 1))

    x_K, distance = coefficients(t_K, std_K, 8.0, std)
    wanted = density(8.0, std)
    off = sum(x * density(t, s) for x, t, s in zip(x_K, t_K, std_K, strict=True)) - wanted
    assert x_K.sum() == pytest.approx(1) and np.linalg.norm(off) / np.linalg.norm(wanted) == pytest.approx(distance, rel=1e-2)
    # what least squares found is better than any step away from it
    rng = np.random.default_rng(0)
    for _ in range(20):
        step = rng.standard_normal(16) * 0.01
        step -= step.mean()
        other = off + sum(d * density(t, s) for d, t, s in zip(step, t_K, std_K, strict=True))
        assert np.linalg.norm(other) > np.linalg.norm(off)


def test_neither_copies_nor_neighbours_of_a_snapshot_blow_up():
    t_K, std_K = np.repeat([*range(1, 17), 16.0001], 2), np.tile([0.05, 0.1], 17)
    once, distance = coefficients(t_K, std_K, 16.0001, 0.075)
    assert np.abs(once).max() < 1 and distance < 0.01
    twice, same = coefficients(np.tile(t_K, 2), np.tile(std_K, 2), 16.0001, 0.075)
    assert np.abs(twice).max() < 1 and same == pytest.approx(distance, rel=1e-3)


def test_an_average_made_afterwards_is_the_one_that_was_tracked(digits, tmp_path):
    """Of a real run, from snapshots of other widths: nearer than any snapshot by far, as near as fp16 allows."""
    run = tmp_path / "run"
    argv = ["--model", "edm2-digits", "--objective", "mle", "--data", str(digits), "--engine", "local", "--out", str(run)]
    length = ["train.batch=4", "train.images=478", "train.snapshot_every=42"]
    assert main([*argv, *length, "train.ema_std=0.075"]) == 0
    paths = sorted((run / "snapshots").iterdir())
    # at the first step that reaches a multiple, and at the end
    times = [44, 84, 128, 168, 212, 252, 296, 336, 380, 420, 464, 480]
    assert [path.name for path in paths] == [f"{n:012d}-{std}.safetensors" for n in times for std in ("0.050", "0.100")]
    tracked = load_file(run / "weights" / "model.safetensors")
    made, images = reconstruct(run, 0.075)
    assert images == 480 and all(t.dtype == torch.float32 for t in made.values()) and tracked.keys() >= made.keys()
    off, nearest = relative_rms(made, tracked), min(relative_rms(load_file(path), tracked) for path in paths)
    rounding = relative_rms({name: tracked[name].half() for name in made}, tracked)
    assert off < 1.1 * rounding and nearest > 5 * off


@pytest.fixture
def run(tmp_path):
    """A run folder with snapshots of a weight that has walked at random, and this weight after each image."""
    torch.manual_seed(0)
    walk = torch.randn(120, 3).cumsum(0) / 10
    averages = [EMA({"w": walk[0], "gain": walk[0, 0]}, std) for std in (0.05, 0.1)]
    for seen, w in enumerate(walk, start=1):
        for ema in averages:
            ema.update({"w": w, "gain": w[0]}, seen, 1)
            if seen % 10 == 0:
                write_snapshot(tmp_path, ema.average, ema.std, seen)
    return tmp_path, walk


def test_a_snapshot_is_small_and_says_what_it_is(run):
    path = run[0] / "snapshots" / "000000000120-0.050.safetensors"
    with safe_open(path, framework="pt") as snapshot:
        assert snapshot.metadata() == {"images_seen": "120", "std": "0.05"}
    assert {t.dtype for t in load_file(path).values()} == {torch.float16}
    assert len(list((run[0] / "snapshots").iterdir())) == 24


@pytest.mark.parametrize("std", [0.03, 0.05, 0.075, 0.1, 0.2])
def test_widths_within_and_beyond_those_of_the_snapshots(std, run):
    folder, walk = run
    shares = torch.from_numpy(profile(std, [1] * 120)).float()
    made, _ = reconstruct(folder, std)
    tolerance = {"rtol": 0, "atol": 0.02 if std in (0.03, 0.2) else 2e-3}
    torch.testing.assert_close(made["w"], shares @ walk, **tolerance)
    torch.testing.assert_close(made["gain"], shares @ walk[:, 0], **tolerance)


def test_it_stands_at_the_newest_snapshot(run):
    folder, walk = run
    rewind_snapshots(folder, 100)
    assert max(path.name for path in (folder / "snapshots").iterdir()) == "000000000100-0.100.safetensors"
    shares = torch.from_numpy(profile(0.075, [1] * 100)).float()
    torch.testing.assert_close(reconstruct(folder, 0.075)[0]["w"], shares @ walk[:100], rtol=0, atol=2e-3)


def written(images, **tensors):
    return lambda snapshots: write_snapshot(snapshots.parent, tensors, 0.05, images)


def cut_off(snapshots):
    os.truncate(snapshots / "000000000100-0.050.safetensors", 100)


def without_numbers(snapshots):
    save_file({"w": torch.zeros(3)}, snapshots / "000000000110-0.050.safetensors")


def all_but_one_lost(snapshots):
    for path in sorted(snapshots.iterdir())[1:]:
        path.unlink()


# message -> (std, what happens to the snapshots)
HARMS = {
    "std=0.3 is out of range: must be >= 0.01 and <= 0.25": (0.3, None),
    "std=nan is out of range": (float("nan"), None),
    "holds no snapshots: train with train.snapshot_every=IMAGES": (0.1, shutil.rmtree),
    "from the 24 snapshot(s)": (0.01, None),
    "from the 1 snapshot(s)": (0.1, all_but_one_lost),
    "0000100-0.050.safetensors is damaged": (0.1, cut_off),
    "0000110-0.050.safetensors is damaged": (0.1, without_numbers),
    "0000121-0.050.safetensors is of another network": (0.1, written(121, w=torch.zeros(3))),
    "0000122-0.050.safetensors is of another network": (0.1, written(122, w=torch.zeros(4), gain=torch.tensor(0.0))),
}


@pytest.mark.parametrize("message", HARMS)
def test_what_cannot_be_made_is_said_in_one_line(message, run):
    std, harm = HARMS[message]
    if harm:
        harm(run[0] / "snapshots")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        reconstruct(run[0], std)
    assert "\n" not in str(error.value)
