"""train/weights/folder.py: what a name of weights may be, files that are converted once, and errors that name the likely preset."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
import torch
from foreign import convert_, published

from mclr.errors import UserError
from mclr.models.edm2 import EDM2Config
from mclr.models.var import VAR, VARConfig
from mclr.train import sample
from mclr.train.system.console import run
from mclr.train.system.hub import fetch
from mclr.train.weights.folder import (
    BUNDLED,
    find_weights,
    inherited,
    load_into,
    load_net,
    presets_of,
    read_config,
    save_weights,
    sha256,
)

VAR_SIZE = {"patch_nums": (1, 2, 3, 4), "vocab_size": 64, "z_channels": 8}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fetch.cache_clear()
    return tmp_path / "cache" / "mclr"


def tiny_var():
    torch.manual_seed(0)
    return VAR(VARConfig(10, depth=1, embed_dim=16, num_heads=2, **VAR_SIZE))


def described_only(folder, config):
    """A weights folder without weights: sizes are compared before."""
    kind = {VARConfig: "var", EDM2Config: "edm2"}[type(config)]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"kind": kind, "config": vars(config)}))
    return folder


def test_bundled_names_and_folders(tmp_path):
    assert find_weights("edm2-digits") == BUNDLED / "edm2-digits"
    save_weights(tmp_path / "mine", tiny_var())
    assert find_weights(str(tmp_path / "mine")) == tmp_path / "mine"
    with pytest.raises(
        UserError, match=r"no weights at nowhere: give a folder .*, a published file, hf://ORG/REPO\[/FILE\], or a bundled"
    ):
        find_weights("nowhere")


@pytest.mark.parametrize("half", [False, True])
def test_a_published_file_is_converted_once(half, tmp_path, cache, capsys):
    state_dict = published("var_tiny.npz")[0]
    if half:
        state_dict = {name: t.half() if t.is_floating_point() else t for name, t in state_dict.items()}
    file = tmp_path / "net.pth"
    torch.save(state_dict, file)
    # as the ranks of a run do
    with ThreadPoolExecutor(4) as ranks:
        folders = set(ranks.map(find_weights, [str(file)] * 4))
    folder = folders.pop()
    assert not folders and folder.parent == cache and folder.name.startswith("net-")
    assert capsys.readouterr().err == f"{file}: converted once, into {folder}\n"
    assert sorted(path.name for path in cache.iterdir()) == ["lock", folder.name]
    assert torch.equal(load_net(str(file), "var").head.weight, state_dict["head.weight"].float())
    # fp16 stays fp16
    bytes_of = sum(t.numel() for t in load_net(str(file), "var").state_dict().values()) * (2 if half else 4)
    assert bytes_of < (folder / "model.safetensors").stat().st_size < bytes_of + 10_000
    assert read_config(folder)["base"] == "net.pth"
    # other content under the same name is another network
    torch.save(state_dict | {"head.weight": state_dict["head.weight"] + 1}, file)
    assert find_weights(str(file)) != folder


def test_a_bad_file_or_cache_is_one_line(tmp_path, cache, monkeypatch):
    (tmp_path / "net.pth").write_bytes(b"noise")
    with pytest.raises(UserError, match="is text"):
        find_weights(str(tmp_path / "net.pth"))
    assert [path.name for path in cache.iterdir()] == ["lock"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "net.pth"))
    with pytest.raises(UserError, match=r"cannot write .*: set XDG_CACHE_HOME to a folder with room to spare"):
        find_weights(str(tmp_path / "net.pth"))


def test_weights_on_the_hub(tmp_path, cache, monkeypatch, capsys):
    hub = tmp_path / "hub"
    save_weights(hub, tiny_var())
    torch.save(published("var_tiny.npz")[0], hub / "net.pth")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file, revision: str(hub / file))
    assert find_weights("hf://org/repo") == hub
    folder = find_weights("hf://org/repo/net.pth@v1")
    assert folder.parent == cache and read_config(folder)["base"] == "hf://org/repo/net.pth@v1"
    assert "base_model: org/repo\n" in (folder / "README.md").read_text()
    assert capsys.readouterr().err.startswith("hf://org/repo/net.pth@v1: converted once")
    for name, base in (("hf://org/repo", "hf://org/repo"), (str(folder), "hf://org/repo/net.pth@v1"), (None, None)):
        assert inherited(name).get("base") == base
    assert load_net("hf://org/repo", "var").config == tiny_var().config


def test_a_published_file_samples_with_the_only_preset_of_its_size(tmp_path):
    file = tmp_path / "net.pth"
    assert convert_("var-digits", file) == 0
    for source in (str(file), "var-digits"):
        assert run(sample.main, [source, "--out", str(tmp_path / Path(source).stem), "--count", "2"]) == 0
    assert sha256(find_weights(str(file))) == sha256(BUNDLED / "var-digits")
    images = [sorted((tmp_path / name / "images").iterdir()) for name in ("net", "var-digits")]
    assert [path.read_bytes() for path in images[0]] == [path.read_bytes() for path in images[1]]


def edm2(channels, img_channels=3, resolution=64):
    return EDM2Config(resolution, img_channels, 1000, model_channels=channels)


@pytest.mark.parametrize(
    ("config", "presets"),
    [
        (VARConfig(1000, 20, 1280, 20), ["var-d20"]),
        (VARConfig(1000, 16, 1024, 16, drop_path=0.3), ["var-d16"]),
        (VARConfig(1000, 17, 1088, 17), []),
        (edm2(192), ["edm2-img64-s"]),
        (edm2(192, img_channels=4), ["edm2-img512-s"]),
        (edm2(200), []),
    ],
)
def test_presets_are_told_by_size(config, presets, tmp_path):
    assert presets_of(read_config(described_only(tmp_path / "net", config))) == presets


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            VARConfig(10, 20, 1280, 20, mlp_ratio=4.0, **VAR_SIZE),
            "weights net have depth 20, this run has 1; embed_dim 1280, this run has 16; num_heads 20, this run has 2: these look "
            "like var-d20, give "
            "--model var-d20 (in Python, model=)",
        ),
        (
            VARConfig(10, 3, 24, 3, mlp_ratio=2.0, shared_aln=True, **VAR_SIZE),
            "weights net have depth 3, this run has 1; embed_dim 24, this run has 16; num_heads 3, this run has 2: give fitting "
            "weights by --init",
        ),
        (
            edm2(192),
            "weights net hold a network of kind edm2, not var: these look like edm2-img64-s, give --model edm2-img64-s (in Python, model=)",
        ),
        (edm2(200), "weights net hold a network of kind edm2, not var: give fitting weights by --init"),
        (
            VARConfig(5, 1, 16, 2, **VAR_SIZE),
            "weights net have num_classes 5, this run has 10: give the data they were trained on, or start from them with "
            "model.class_map=fresh, or with a JSON file {class here: condition there, or null}",
        ),
        (
            VARConfig(10, 1, 16, 2, **VAR_SIZE | {"vocab_size": 128}),
            "weights net have vocab_size 128, this run has 64: give the tokenizer that they were trained with, model.tokenizer=WEIGHTS",
        ),
    ],
)
def test_what_does_not_fit_is_told_with_a_way_out(config, line, tmp_path):
    with pytest.raises(UserError) as error:
        load_into(tiny_var(), described_only(tmp_path / "net", config))
    assert str(error.value) == line.replace("net", str(tmp_path / "net"), 1)


def test_three_entries_at_most_are_named(tmp_path):
    save_weights(tmp_path / "net", tiny_var(), {f"extra{i}": torch.zeros(1) for i in range(5)})
    with pytest.raises(
        UserError,
        match=r"do not fit the network: extra0 is unexpected, extra1 is unexpected, .*, and 2 more entries; choose",
    ):
        load_into(tiny_var(), tmp_path / "net")
