"""train/convert.py: published files of every kind in and out, bit by bit; and every bad file is one line with nothing written."""

import dataclasses
import json
import os
import shutil

import pytest
import safetensors.torch
import torch
from foreign import GOLDEN, convert_, published

import mclr.train.run
from mclr.models.edm2 import EDM2, EDM2Config
from mclr.models.features import ImageClassifier, ImageClassifierConfig
from mclr.models.var import VAR, VARConfig
from mclr.train.engine.ema import reconstruct
from mclr.train.system.console import run
from mclr.train.weights.folder import load_net, read_config, save_weights


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("file", GOLDEN)
def test_published_weights_come_in_and_go_out_unchanged(file, tmp_path, capsys):
    state_dict, kind, settings, config = published(file)
    torch.save(state_dict, tmp_path / "in.pth")
    assert convert_(tmp_path / "in.pth", tmp_path / "ours", *settings) == 0
    found = dataclasses.asdict(load_net(str(tmp_path / "ours"), kind).config)
    assert {key: found[key] for key in config} == config
    licence = "licence: published EDM2 weights and all weights made from them: CC BY-NC-SA 4.0"
    assert (licence in capsys.readouterr().out) == ("licence" in read_config(tmp_path / "ours")) == (kind == "edm2")

    assert convert_(tmp_path / "ours", tmp_path / "out.pth") == 0
    assert_equal(torch.load(tmp_path / "out.pth", weights_only=True), state_dict)
    out = capsys.readouterr().out
    assert ("does not show 'channels_per_head=16'" in out) == ("licence: " in out) == (kind == "edm2")
    assert convert_(tmp_path / "ours", tmp_path / "out.safetensors") == 0
    assert_equal(safetensors.torch.load_file(tmp_path / "out.safetensors"), state_dict)

    assert convert_(tmp_path / "out.safetensors", tmp_path / "again", *settings) == 0
    first, second = (tmp_path / name / "model.safetensors" for name in ("ours", "again"))
    assert first.read_bytes() == second.read_bytes()
    assert read_config(tmp_path / "ours")["made_by"] == " ".join(
        ["mclr convert", f"{tmp_path}/in.pth", f"{tmp_path}/ours", *settings]
    )


def test_scales_of_a_tokenizer_can_be_given(tmp_path):
    state_dict, *_ = published("vqvae_10scales.npz")
    torch.save(state_dict, tmp_path / "in.pt")
    assert convert_(tmp_path / "in.pt", tmp_path / "ours", "scales=[1, 2, 3, 4, 6, 9, 13, 18, 24, 32]") == 0
    assert load_net(str(tmp_path / "ours"), "vqvae").config.scales == (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


def test_what_the_file_does_not_show_is_said_when_it_is_written(tmp_path, capsys):
    config = VARConfig(10, depth=1, embed_dim=16, num_heads=2, patch_nums=(1, 2, 4), attn_l2_norm=False, drop_path=0.1)
    save_weights(tmp_path / "ours", VAR(config))
    assert convert_(tmp_path / "ours", tmp_path / "out.pth") == 0
    assert "does not show 'num_heads=2', 'patch_nums=[1, 2, 4]': repeat" in capsys.readouterr().out
    assert convert_(tmp_path / "out.pth", tmp_path / "again", "num_heads=2", "patch_nums=[1, 2, 4]") == 0
    assert load_net(str(tmp_path / "again"), "var").config == dataclasses.replace(config, drop_path=0.0)


def test_an_edm2_of_unusual_widths_is_recognised(tmp_path, refused):
    config = EDM2Config(
        8, 1, 0, model_channels=8, channel_mult=(2, 4), channel_mult_noise=1, channel_mult_emb=3, num_blocks=2,
        attn_resolutions=(), channels_per_head=64, logvar_channels=6,
    )  # fmt: skip
    config = dataclasses.replace(config, channels_per_head=32)
    net = EDM2(config)
    save_weights(tmp_path / "ours", net)
    assert convert_(tmp_path / "ours", tmp_path / "out.pth") == 0
    err = refused(tmp_path / "out.pth", tmp_path / "again")
    assert "64 must divide the 32 channels" in err and err.endswith("give channels_per_head=... to `mclr convert`\n")
    assert convert_(tmp_path / "out.pth", tmp_path / "again", "channels_per_head=32") == 0
    assert load_net(str(tmp_path / "again"), "edm2").config == config


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("num_heads", "is no setting of this network: give key=value, where key is one of num_classes, depth"),
        ("heads=2", "is no setting of this network"),
        ("num_heads=two", "num_heads must be like 2, and in its range"),
        ("num_heads=0", "num_heads must be like 2"),
        ("num_heads=[2]", "num_heads must be like 2"),
        ("num_heads=3", "embed_dim=128 must be a multiple of model.net.num_heads=3"),
        ("patch_nums=[1, 2]", "looks like a VAR next-scale network, but"),
        ("patch_nums=[]", "patch_nums must be like [1, 2, 3, 4]"),
        ("patch_nums=[1, -2]", "patch_nums must be like [1, 2, 3, 4]"),
        ("depth=3", "looks like a VAR next-scale network, but"),
    ],
)
def test_a_bad_setting_is_one_line(setting, line, tmp_path, refused):
    torch.save(published("var_tiny.npz")[0], tmp_path / "a.pth")
    assert line in refused(tmp_path / "a.pth", tmp_path / "ours", setting)
    assert not (tmp_path / "ours").exists()


def test_a_target_that_cannot_be_written_is_one_line(tmp_path, refused):
    torch.save(published("var_tiny.npz")[0], tmp_path / "a.pth")
    save_weights(tmp_path / "judge", ImageClassifier(ImageClassifierConfig(1, 3)))
    for argv, line in [
        ((tmp_path / "a.pth", tmp_path / "judge"), "exists already"),
        ((tmp_path / "judge", tmp_path / "a.pth"), "exists already"),
        ((tmp_path / "judge", tmp_path / "b.pth"), "kind image_classifier: only edm2, dit, var, vqvae have a published form"),
        ((tmp_path / "none", tmp_path / "b.pth"), "no weights at"),
        ((tmp_path / "judge", tmp_path / "b.pth", "depth=2"), "depth=2 has no effect"),
        ((tmp_path / "judge", tmp_path / "b", "depth=2", "--half"), "depth=2 has no effect"),
        ((tmp_path / "judge", tmp_path / "b.pth", "--half"), "is named like a published file"),
        ((tmp_path / "a.pth", tmp_path / "b.pkl"), "is named like a published file"),
        (("var-digits", tmp_path / "none" / "b.pth"), "cannot write"),
        (("var-digits", tmp_path / "a.pth" / "b.pth"), "below a regular file"),
        ((tmp_path / "a.pth", tmp_path / "a.pth" / "b"), "below a regular file"),
        (("var-digits", "/proc/nowhere.pth"), "cannot write"),
        ((tmp_path / "a.pth", "/proc/nowhere/b"), "cannot write"),
    ]:
        assert line in refused(*argv)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "judge"]


def no_room(*args):
    raise OSError(28, "No space left on device", args[0])


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_force_replaces_weights_and_nothing_else(tmp_path, monkeypatch, refused):
    torch.save(published("var_tiny.npz")[0], tmp_path / "a.pth")
    save_weights(tmp_path / "old", ImageClassifier(ImageClassifierConfig(1, 3)))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/config.json").write_text("{}")
    (tmp_path / "photos/cat.png").write_text("")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/README.md").write_text("mine")
    before = contents(tmp_path)
    for argv, line in [
        ((tmp_path / "a.pth", tmp_path / "old"), "old exists already: remove it, choose another name, or replace it by --force"),
        (("var-digits", tmp_path / "a.pth"), "a.pth exists already"),
        (("var-digits", tmp_path / "old", "--half"), "old exists already"),
        ((tmp_path / "a.pth", tmp_path / "photos", "--force"), "photos is not what --force may replace, weights"),
        ((tmp_path / "a.pth", tmp_path / "notes", "--force"), "notes is not what --force may replace"),
        ((tmp_path / "a.pth", tmp_path / "notes.txt", "--force"), "notes.txt is not what --force may replace"),
        ((tmp_path / "photos/cat.png", tmp_path / "old", "--force"), "cat.png is empty"),
    ]:
        assert line in refused(*argv) and contents(tmp_path) == before
    # a failure in the last moment leaves the old weights
    with monkeypatch.context() as patch:
        # the old folder goes aside, the new one cannot take its place, the old one comes back
        renames = iter([os.rename, no_room, os.rename])
        patch.setattr(os, "rename", lambda src, dst: next(renames)(src, dst))
        assert "No space left" in refused(tmp_path / "a.pth", tmp_path / "old", "--force")
    assert contents(tmp_path) == before

    assert convert_(tmp_path / "a.pth", tmp_path / "old", "--force") == 0
    assert load_net(str(tmp_path / "old"), "var")
    assert convert_("var-digits", tmp_path / "old", "--half", "--force") == 0
    assert convert_(tmp_path / "old", tmp_path / "a.pth", "--force") == 0
    assert convert_(tmp_path / "a.pth", tmp_path / "old", "--force") == 0
    assert load_net(str(tmp_path / "old"), "var").config == load_net("var-digits", "var").config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "notes", "notes.txt", "old", "photos"]


@pytest.fixture(scope="module")
def snapshots(digits, tmp_path_factory):
    """A finished run of two steps that kept snapshots, from weights with a licence."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(3)
    sizes = {"channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,), "channels_per_head": 8, "logvar_channels": 32}
    save_weights(folder / "base", EDM2(EDM2Config(8, 1, 10, model_channels=8, **sizes)), licence="CC BY-NC-SA 4.0")
    argv = [
        "--model", "edm2-digits", "--objective", "mle", "--data", str(digits), "--init", str(folder / "base"), "--out", str(folder / "run"),
        "model.net.model_channels=8", "model.net.channels_per_head=8", "train.images=32", "train.batch=16", "train.snapshot_every=16",
    ]  # fmt: skip
    assert run(mclr.train.run.main, argv) == 0
    return folder / "run"


def test_another_average_of_a_run(snapshots, tmp_path, refused):
    assert convert_(snapshots, tmp_path / "a", "--ema-std", 0.1) == 0
    described, of_run = read_config(tmp_path / "a"), read_config(snapshots / "weights")
    assert described == of_run | {"ema_std": 0.1, "images_seen": 32} and described["licence"] == "CC BY-NC-SA 4.0"
    found, whole = (
        safetensors.torch.load_file(folder / "model.safetensors") for folder in (tmp_path / "a", snapshots / "weights")
    )
    average, _ = reconstruct(snapshots, 0.1)
    assert found.keys() == whole.keys() > average.keys()
    for name, t in found.items():
        assert torch.equal(t, average.get(name, whole[name])), name

    shutil.copytree(snapshots, tmp_path / "unfinished")
    shutil.rmtree(tmp_path / "unfinished/weights")
    for argv, line in [
        ((snapshots, tmp_path / "c", "--ema-std", "x"), "invalid float value"),
        ((snapshots, tmp_path / "c", "--ema-std", 0.5), "std=0.5 is out of range"),
        ((snapshots, tmp_path / "c", "--ema-std", 0.1, "--half"), "not allowed with argument"),
        ((snapshots, tmp_path / "a", "--ema-std", 0.1), "exists already"),
        ((snapshots, tmp_path / "c.pth", "--ema-std", 0.1), "is named like a published file"),
        ((tmp_path, tmp_path / "c", "--ema-std", 0.1), "is no finished run: --ema-std needs the folder that `mclr train` made"),
        ((tmp_path / "unfinished", tmp_path / "c", "--ema-std", 0.1), "is no finished run"),
    ]:
        assert line in refused(*argv)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("file", ["out.pth", "out.safetensors"])
@pytest.mark.parametrize("licence", ["CC BY-NC-SA 4.0", "Apache-2.0", None])
def test_the_licence_goes_with_all_that_is_made_from_weights(licence, file, snapshots, tmp_path, capsys):
    """Through fp16, a published file and back. An EDM2 of ours has its own licence, or none; not that of published EDM2 weights."""
    save_weights(tmp_path / "whole", load_net(str(snapshots / "weights")), **({"licence": licence} if licence else {}))
    assert convert_(tmp_path / "whole", tmp_path / "half", "--half") == 0
    capsys.readouterr()
    assert convert_(tmp_path / "half", tmp_path / file) == 0
    assert (f"licence: {licence}\n" in capsys.readouterr().out) == (licence is not None)
    assert convert_(tmp_path / file, tmp_path / "again", "channels_per_head=8") == 0
    for folder in (tmp_path / "half", tmp_path / "again"):
        assert read_config(folder).get("licence") == licence
    front = {"CC BY-NC-SA 4.0": "cc-by-nc-sa-4.0", "Apache-2.0": "apache-2.0", None: "unknown"}[licence]
    assert f"license: {front}\n" in (tmp_path / "again/README.md").read_text()


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, refused):
    torch.save(published("var_tiny.npz")[0], tmp_path / "a.pth")
    monkeypatch.setattr(os, "fsync", no_room)
    for argv in (
        (tmp_path / "a.pth", tmp_path / "b"),
        ("var-digits", tmp_path / "b.pth"),
        ("var-digits", tmp_path / "b", "--half"),
    ):
        assert "No space left on device" in refused(*argv)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_half_keeps_network_and_notes(tmp_path):
    torch.manual_seed(0)
    net = VAR(VARConfig(num_classes=3, depth=1, embed_dim=16, num_heads=2, patch_nums=(1, 2), vocab_size=8, z_channels=4))
    save_weights(tmp_path / "whole", net, command="mclr train ...", images_seen=7)
    assert convert_(tmp_path / "whole", tmp_path / "half", "--half") == 0
    half = load_net(str(tmp_path / "half"), "var")
    for (name, p), q in zip(net.named_parameters(), half.parameters(), strict=True):
        assert torch.equal(p.half().float(), q), name
    described = json.loads((tmp_path / "half" / "config.json").read_text())
    assert described["images_seen"] == 7 and described["command"] == "mclr train ..." and "fp16" in described["stored"]
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.7 * sizes[0]
