"""models/registry.py: a network of one's own, from this file alone, is trained, saved, loaded, sampled and planned by the commands."""

# ruff: noqa: RUF009  option() makes constants

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from mclr.configs.schema import fits
from mclr.models.conditions import map_rows
from mclr.models.options import Conditions, Options, Size, Sizes, hints_of, option
from mclr.models.registry import NETWORKS, Network, fold, share_of
from mclr.models.var import Head
from mclr.train import convert, run, sample
from mclr.train.system import console
from mclr.train.weights.folder import load_net


@dataclass(frozen=True)
class TinyOptions(Options):
    img_channels: Size
    num_classes: Conditions
    width: Size = option(8, "Channels inside")


class Tiny(nn.Module):
    """Two convolutions, between them the condition."""

    condition_layer, map_layer = "embed.weight", staticmethod(map_rows)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.num_classes + 1, config.width)
        self.first = nn.Conv2d(config.img_channels, config.width, 3, padding=1)
        self.last = nn.Conv2d(config.width, config.img_channels, 3, padding=1)
        self.logvar = nn.Parameter(torch.zeros(()))

    def forward(self, noisy_BCHW, sigma_B, c_R, index_R=None):
        x = self.first(noisy_BCHW * (sigma_B**2 + 0.25).rsqrt()[:, None, None, None])
        x = x if index_R is None else x[index_R]
        return self.last(F.silu(x + self.embed(c_R)[:, :, None, None])), self.logvar + 0.0 * c_R


@dataclass(frozen=True)
class TinyTokensOptions(Options):
    num_classes: Conditions
    vocab_size: Size
    z_channels: Size
    patch_nums: Sizes
    width: Size = option(8, "Width of every token")


class TinyTokens(nn.Module):
    """Every token from its place, its condition and its teacher input."""

    def __init__(self, config):
        super().__init__()
        self.config, self.tokens = config, sum(side * side for side in config.patch_nums)
        self.embed = nn.Embedding(config.num_classes + 1, config.width)
        self.teacher = nn.Linear(config.z_channels, config.width)
        self.place = nn.Parameter(torch.zeros(self.tokens, config.width))
        self.head = Head(config.width, config.vocab_size)

    def forward(self, teacher_BlE, c_R, index_R=None, cache=None):
        start, count = (cache.length if cache else 0), self.tokens_of(teacher_BlE, cache=cache)
        x = F.pad(self.teacher(teacher_BlE), (0, 0, count - teacher_BlE.shape[1], 0)) + self.place[start : start + count]
        x = x if index_R is None else x[index_R]
        if cache:
            cache.length += count
        return x + self.embed(c_R)[:, None], self.head

    def tokens_of(self, *inputs, cache=None):
        return inputs[0].shape[1] + (cache is None or cache.length == 0)

    def new_cache(self, rows):
        return SimpleNamespace(length=0)


TINY = {
    "diffusion": Network("test_registry:Tiny", TinyOptions, "A tiny diffusion network", "mclr sample FOLDER", "diffusion"),
    "next_scale": Network(
        "test_registry:TinyTokens", TinyTokensOptions, "A tiny token network", "mclr sample FOLDER", "next_scale"
    ),
}


def preset(paradigm):
    own = {"posterior": {"weights": "digits-posterior"}} if paradigm == "diffusion" else {"tokenizer": "digits-tokenizer"}
    model = {"name": "tiny", "paradigm": paradigm, "kind": "tiny", "net": {"width": 4}} | own
    train = {"images": 64, "batch": 32, "lr": 0.01, "checkpoint_every": 32}
    return yaml.dump({"model": model, "train": train, "objective": {"lam": 0.5}, "sample": {"batch": 4}})


@pytest.mark.parametrize("paradigm", TINY)
def test_a_network_of_ones_own_goes_through_every_command(paradigm, digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(NETWORKS, "tiny", TINY[paradigm])
    file, folder = tmp_path / "tiny.yaml", tmp_path / "run"
    file.write_text(preset(paradigm))

    def mclr(program, *argv):
        assert console.run(program, [*map(str, argv)]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    train = ("--model", file, "--objective", "mclr", "--data", digits)
    assert "tiny" in mclr(run.main, *train, "--plan", "--gpus", 1)
    mclr(run.main, *train, "--out", folder)
    net = load_net(str(folder / "weights"), "tiny")
    assert type(net) is TINY[paradigm].net and net.config.width == 4
    start = TINY[paradigm].net(net.config).place if paradigm == "next_scale" else torch.zeros(())
    assert not torch.equal(net.place if paradigm == "next_scale" else net.logvar, start), "it has learned"
    assert f"{TINY[paradigm].about}, " in (folder / "weights" / "README.md").read_text()
    mclr(sample.main, folder, "--count", 4, "--out", tmp_path / "samples")
    assert len(list((tmp_path / "samples" / "images").iterdir())) == 4
    assert json.loads((tmp_path / "samples" / "sample.json").read_text())["forwards_per_image"] >= 1
    mclr(convert.main, folder / "weights", tmp_path / "half", "--half")
    # another run from these weights, its conditions mapped where the network says how
    again = [*train, "--init", tmp_path / "half", "--out", tmp_path / "again", "model.class_map=fresh"]
    if paradigm == "diffusion":
        mclr(run.main, *again)
    else:
        assert console.run(run.main, [*map(str, again)]) == 2
        assert "a TinyTokens cannot map its conditions: leave out model.class_map" in capsys.readouterr().err


def test_a_wrong_option_of_ones_own_network_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(NETWORKS, "tiny", TINY["diffusion"])
    (tmp_path / "tiny.yaml").write_text(preset("diffusion"))
    argv = ["--model", str(tmp_path / "tiny.yaml"), "--objective", "mclr", "--data", "digits", "--dry-run"]
    for setting, line in (
        ("model.net.width=0", "model.net.width=0: expected an integer > 0 and <= 65536"),
        ("model.net.widht=4", "unknown key model.net.widht; did you mean model.net.width?"),
        ("model.net.model_channels=4", "unknown key model.net.model_channels; only networks of kind edm2 have it"),
        (
            "engine.activation_checkpointing=true",
            "engine.activation_checkpointing=true: a network of kind tiny has none; set it to false",
        ),
        ("model.kind=tinny", 'model.kind="tinny": expected edm2 or dit or tiny'),
    ):
        assert console.run(run.main, [*argv, setting]) == 2
        assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize(
    "name", ["edm2-digits", "sit-digits", "var-digits", "digits-tokenizer", "digits-classifier", "digits-posterior"]
)
def test_bundled_options_are_in_their_ranges(name):
    net = load_net(name)
    hints = hints_of(type(net.config))
    assert all(fits(value, hints[key]) for key, value in vars(net.config).items())
    wrong = {**dict.fromkeys(hints, -1), **dict.fromkeys([key for key in hints if key.startswith("norm")], 0)}
    assert not any(fits(value, hints[key]) for key, value in wrong.items())


def test_what_a_network_does_not_say_has_a_default():
    plain = nn.Linear(1, 1)
    fold(plain)
    assert share_of(plain, torch.zeros(3, 1)) == 1
    net = TinyTokens(TinyTokensOptions(3, 8, 4, (1, 2)))
    assert share_of(net, torch.zeros(2, 0, 4), torch.zeros(2)) == 1 / 5
