"""train.keep_best: which checkpoint a run calls its best, and the loss that decides it (train/training/held_out.py)."""

import json
import math
from pathlib import Path

import pytest
import torch
from runs import metrics

from mclr.configs.schema import load
from mclr.errors import UserError
from mclr.loss import project
from mclr.train.cli import main
from mclr.train.data.dataset import load_split
from mclr.train.data.encoders import from_uint8
from mclr.train.engine.checkpoint import best_checkpoint, checkpoints
from mclr.train.training import held_out
from mclr.train.training.build import build_networks, build_task, open_source
from mclr.train.training.held_out import HeldOut, mle_loss, readers_of, with_weights
from mclr.train.weights.folder import load_net

CPU = torch.device("cpu")
LAM = 1.5


def losses_of(run):
    return [json.loads((folder / "state.json").read_text())["held_out"] for folder in checkpoints(Path(run))]


@torch.no_grad()
def expected_loss(net, posterior, digits):
    """What mclr's loss is in expectation, of all held-out digits: (1 + lam) err under the own condition - lam sum_c~ p(c~|x_t) err.

    err: EDM's weighted squared error, written out; with own random numbers and no rows of the program.
    """
    image_NCHW, c_N = load_split(digits, "val")
    x, total, generator = from_uint8(image_NCHW), 0.0, torch.Generator().manual_seed(5)
    for _ in range(3):
        sigma_N = (torch.randn(len(x), generator=generator) - 0.4).exp()
        s = sigma_N[:, None, None, None]
        noisy = x + s * torch.randn(x.shape, generator=generator)
        p_NK = posterior(noisy, sigma_N).softmax(-1)
        c_skip, c_out = 0.25 / (s**2 + 0.25), 0.5 * s / (s**2 + 0.25).sqrt()
        err_NK = torch.stack(
            [
                (((c_skip * noisy + c_out * net(noisy, sigma_N, torch.full_like(c_N, k))[0] - x) / c_out) ** 2).mean((1, 2, 3))
                for k in range(10)
            ],
            1,
        )
        own_N = err_NK.gather(1, c_N[:, None])[:, 0]
        total += ((1 + LAM) * own_N - LAM * (p_NK * err_NK).sum(1)).mean().item() / 3
    return total


def test_the_best_checkpoint_of_mclr_is_the_nearest_to_its_optimum(digits, tmp_path, monkeypatch, capsys):
    """In a real run. Plain maximum likelihood, which once ranked the checkpoints, would keep the first: it rises as mclr works."""
    monkeypatch.chdir(tmp_path)
    argv = ["train", "--model", "edm2-digits", "--objective", "mclr", "--data", str(digits), "--engine", "local", "--out", "run"]
    assert main([*argv, "train.images=1920", "train.checkpoint_every=640", "train.keep=9", "train.keep_best=true"]) == 0
    folders, losses = checkpoints(Path("run")), losses_of("run")
    best, loss = best_checkpoint(folders)
    assert loss == min(losses) and f"best checkpoint: {best}, held-out loss" in capsys.readouterr().out
    nets, posterior = [load_net(str(folder), "edm2") for folder in folders], load_net("digits-posterior", "noise_classifier")
    expected = [expected_loss(net, posterior, digits) for net in nets]
    assert folders.index(best) == expected.index(min(expected)) > 0
    task = task_of("edm2-digits", "mclr", digits)
    ranking, of_mle = HeldOut(task, readers_of(task.source.info)["val"], posterior), []
    for net, expected in zip(nets, losses, strict=True):
        # the averaged weights, which the folder holds
        with with_weights(task.engine, dict(net.named_parameters())):
            assert ranking.loss() == pytest.approx(expected, abs=1e-6)
            of_mle.append(mle_loss(task, ranking.reader))
    assert of_mle.index(min(of_mle)) == 0
    # what was trained is put back to the bit
    fresh = load_net("edm2-digits", "edm2")
    fresh_weights = dict(fresh.named_parameters())
    project(fresh)
    assert all(torch.equal(p, fresh_weights[name]) for name, p in task.engine.net.named_parameters())


def task_of(model, objective, digits, *overrides):
    config = load(model, objective, "digits", "local", [f"data.path={digits}", *overrides])
    return build_task(config, open_source(config), build_networks(config, CPU), CPU, config.train.batch)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("edm2-digits", ("objective.contrast=null",)),
        ("var-digits", ()),
        ("var-digits", ("objective.contrast=posterior", "objective.lam=0.3", "objective.bound=3.0")),
        ("edm2-digits", ("objective.name=cca",)),
    ],
)
def test_any_objective_ranks_and_leaves_training_as_it_was(model, settings, digits, tmp_path, monkeypatch):
    """Two steps with and without: the same weights, rows and FLOPs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(held_out, "RANKING", 64)
    for name, best in (("with", "true"), ("without", "false")):
        argv = ["train", "--model", model, "--data", str(digits), "--engine", "local", "--out", name]
        if "objective.name=cca" in settings:
            argv += ["--objective", "cca"]
        more = [each for each in settings if not each.startswith("objective.name")]
        steps = ["train.batch=16", "train.images=32", "train.log_every=1", "train.checkpoint_every=16"]
        assert main([*argv, *more, *steps, f"train.keep_best={best}"]) == 0
    assert metrics("with") == metrics("without")
    assert all(math.isfinite(loss) for loss in losses_of("with")) and losses_of("without") == [None, None]


def test_a_loss_without_a_lowest_value_ranks_nothing():
    for objective, more in (("unlearn", []), ("mclr", ["objective.contrast=uniform", "objective.lam=0.1"])):
        with pytest.raises(UserError, match=r"^train.keep_best=true needs a loss that has a lowest value"):
            load("edm2-digits", objective, "digits", "local", ["train.keep_best=true", *more])
    load("var-digits", "mclr", "digits", "local", ["train.keep_best=true", "objective.contrast=uniform", "objective.bound=3.0"])


def test_every_batch_of_the_ranking_is_a_sign_of_life(digits, monkeypatch):
    """2,048 draws may take longer than the watchdog waits."""
    monkeypatch.setattr(held_out, "RANKING", 192)
    task, beats = task_of("edm2-digits", "mclr", digits, "objective.contrast=null"), []
    HeldOut(task, readers_of(task.source.info)["val"], None).loss(lambda: beats.append(1))
    assert len(beats) == 192 // held_out.BATCH
