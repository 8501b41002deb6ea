"""train/sample.py: an image depends on its seed and condition alone; what is there is not drawn again; the work is counted."""

import json
import shutil
import subprocess
from dataclasses import replace
from unittest.mock import MagicMock, call

import numpy as np
import pytest
import torch
from golden_weights import relative_rms
from launch import ROOT, environment, launcher, of_ours
from PIL import Image

import mclr
import mclr.train.run
import mclr.train.weights.folder
from mclr.configs.schema import PRESETS, dump, load
from mclr.models.vqvae import VQVAE, VQVAEConfig
from mclr.train import sample
from mclr.train.data.images import image_paths, read_images
from mclr.train.sampling import folder as samples_folder
from mclr.train.sampling.find import find_generator
from mclr.train.system.console import run
from mclr.train.training.networks import build_encoder, build_net
from mclr.train.weights.folder import load_net, read_tensors, save_weights

EDM2 = ["model.net.model_channels=8", "model.net.channels_per_head=8", "sample.steps=3", "sample.batch=8"]
VAR = ["model.net.depth=1", "model.net.embed_dim=16", "model.net.num_heads=2", "sample.batch=8"]


def save_random(folder, config):
    """Weights of the config's network under which image and condition both matter."""
    torch.manual_seed(0)
    net = build_net(config, build_encoder(config, torch.device("cpu")))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.ones(()) if p.ndim == 0 else torch.randn_like(p) * 0.3)
    save_weights(folder, net)


def make_run(folder, config):
    save_random(folder / "weights", config)
    (folder / "config.yaml").write_text(dump(config))
    return folder


@pytest.fixture(scope="module")
def diffusion_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("edm2"), load("edm2-digits", "mclr", "digits", "local", EDM2))


@pytest.fixture(scope="module")
def token_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("var")
    torch.manual_seed(1)
    tokenizer = VQVAEConfig(
        img_channels=1, ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8, vocab_size=64, scales=(1, 2, 3, 4)
    )
    save_weights(folder / "tokenizer", VQVAE(tokenizer))
    overrides = [*VAR, f"model.tokenizer={folder / 'tokenizer'}"]
    return make_run(folder, load("var-digits", "mclr", "digits", "local", overrides))


def like(source, folder, *overrides):
    """Weights with the options of a run, but for these overrides."""
    config, _ = find_generator(str(source), None, None, overrides)
    save_random(folder, config)
    return folder


def sample_(*argv):
    return run(sample.main, [str(arg) for arg in argv])


def images(folder):
    return {path.name: path.read_bytes() for path in (folder / "images").iterdir()}


def drawn(source, out, *argv):
    """The images of a command that succeeds."""
    assert sample_(source, "--out", out, *argv) == 0
    return images(out)


def refused(capsys, *argv):
    """What a command that fails says, in one line."""
    capsys.readouterr()
    assert sample_(*argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def record(folder):
    return json.loads((folder / "sample.json").read_text())


@pytest.mark.parametrize("kind", ["diffusion_run", "token_run"])
def test_an_image_depends_on_its_seed_and_condition_alone(kind, request, tmp_path, capsys):
    source = request.getfixturevalue(kind)
    everything = drawn(source, tmp_path / "all", "--count", 23)
    assert sorted(everything) == [f"{seed:06d}-{seed % 10}.png" for seed in range(23)]
    assert len(set(everything.values())) == 23

    # another count, another first seed
    few = drawn(source, tmp_path / "few", "--count", 3, "--seed", 6)
    assert sorted(few) == ["000006-6.png", "000007-7.png", "000008-8.png"]
    # the same seed of another condition is another image; of the same condition it is the same
    two = drawn(source, tmp_path / "two", "--per-class", 4, "--classes", "3,1")
    assert sorted(two) == [f"{seed:06d}-{1 if seed % 2 else 3}.png" for seed in range(8)]
    for name, data in (few | {"000001-1.png": two["000001-1.png"]}).items():
        assert everything[name] == data, name
    assert everything["000004-4.png"] != two["000004-3.png"]

    # a run that was cut short, then one that asks for more
    for name in ("000000-0.png", "000011-1.png"):
        (tmp_path / "all/images" / name).unlink()
    capsys.readouterr()
    assert drawn(source, tmp_path / "all", "--count", 23) == everything
    assert "2 images drawn" in capsys.readouterr().out
    more = drawn(source, tmp_path / "few", "--count", 17, "--seed", 6)
    assert more == {name: data for name, data in everything.items() if name >= "000006"}


def test_the_bar_moves_by_the_images_of_a_batch(diffusion_run, tmp_path, monkeypatch):
    bar = MagicMock()
    monkeypatch.setattr(samples_folder, "progress_bar", bar)
    drawn(diffusion_run, tmp_path / "s", "--count", 12, "--seed", 6)
    assert bar.call_args == call(12, begun=0, quiet=False)
    assert bar().__enter__().update.call_args_list == [call(2), call(8), call(2)]


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("edm2-digits", ["sample.steps=4"]),
        ("edm2-digits", ["sample.steps=4", "sample.churn=10"]),
        ("var-digits", ["sample.gamma=1", "sample.top_k=20"]),
    ],
)
def test_the_size_of_the_micro_batch_hardly_matters(name, overrides):
    """The bundled weights, before rounding: images to 1e-4, and the very same tokens.

    Seeds from 32: of those from 0 to 149 only seed 24 draws a uniform so near the edge of a code's share (1e-7) that rounding decides.
    """
    model = mclr.load(name, "cpu", settings=overrides)
    one, seven, all_ = (replace(model, batch=batch).draw(torch.arange(32) % 10, range(32, 64)) for batch in (1, 7, 32))
    for other in (seven, all_):
        assert torch.equal(other, one) if name == "var-digits" else relative_rms(other, one) < 1e-4


def test_networks_are_folded_and_images_are_those_of_networks_that_are_not(diffusion_run, guides, monkeypatch):
    model = mclr.load(diffusion_run, "cpu", settings=["sample.gamma=1.5", f"sample.guide.weights={guides['diffusion_run']}"])
    expected = model.draw(torch.arange(8), range(8))
    assert all(p.requires_grad for p in model.net.parameters())
    counted = model.counted()
    monkeypatch.delattr("mclr.models.blocks.used_weights")
    monkeypatch.delattr("mclr.models.edm2.used_weights")
    assert torch.equal(counted.draw(torch.arange(8), range(8)), expected)


def test_blends_of_codes_are_pictures_and_no_dataset(token_run, tmp_path, capsys):
    smoothly = ("--count", 9, "sample.more_smooth=true")
    plain, smooth = drawn(token_run, tmp_path / "plain", "--count", 9), drawn(token_run, tmp_path / "smooth", *smoothly)
    assert record(tmp_path / "smooth")["forwards_per_image"] == 1
    assert plain.keys() == smooth.keys() and all(plain[name] != smooth[name] for name in plain)
    # by seed, as everything else
    (tmp_path / "smooth/images/000003-3.png").unlink()
    assert drawn(token_run, tmp_path / "smooth", *smoothly) == smooth
    assert "of sample.more_smooth=true" in refused(capsys, token_run, "--out", tmp_path / "smooth", "--count", 9)
    line = refused(capsys, token_run, "--out", tmp_path / "d", "--dataset", *smoothly)
    assert "sample.more_smooth=true makes pictures of no tokens: leave out --dataset" in line
    assert not (tmp_path / "d").exists()


def test_two_ranks_draw_what_one_draws(diffusion_run, tmp_path):
    """They fail together, in one line; what was there by then and what was drawn later are the same images."""
    argv = ["--count", "20", "--npz", "sample.batch=4"]
    everything = drawn(diffusion_run, tmp_path / "one", *argv)
    script = tmp_path / "full_disk.py"
    script.write_text(
        "import os, runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import mclr.train.system.files\n"
        "from mclr.errors import UserError\n"
        "write_file = mclr.train.system.files.write_file\n"
        "def write(path, data):\n"
        "    if os.environ['RANK'] == '1' and '000012' in str(path):\n"
        "        raise UserError('no room')\n"
        "    write_file(path, data)\n"
        "mclr.train.system.files.write_file = write\n"
        f"runpy.run_path({sample.__file__!r}, run_name='__main__')\n"
    )
    argv = [str(diffusion_run), "--out", str(tmp_path / "two"), *argv]
    settings = {"capture_output": True, "text": True, "env": environment(), "cwd": ROOT, "timeout": 300}
    ran = subprocess.run([*launcher("deepspeed"), str(script), *argv], **settings)
    assert ran.returncode == 2 and of_ours(ran.stderr) == ["error: rank 1: no room"] and "Traceback" not in ran.stderr
    # the micro-batches of the first turn, and that of rank 0 in the second
    there = images(tmp_path / "two")
    assert there == {name: everything[name] for name in there} and len(there) == 12
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"images", "sample.json"}

    for name in ("000001-1.png", "000010-0.png"):
        (tmp_path / "two/images" / name).unlink()
    ran = subprocess.run([*launcher("torchrun"), "-m", "mclr.train.sample", *argv], **settings)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.count("10 images drawn, 5 network forwards per image, no guidance") == 1
    assert ran.stdout.count("samples.npz: 20 images") == 1
    assert images(tmp_path / "two") == everything and record(tmp_path / "two") == record(tmp_path / "one")
    for name in ("grid.png", "samples.npz"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_a_complete_set_says_so_and_loads_nothing(diffusion_run, tmp_path, capsys, monkeypatch):
    drawn(diffusion_run, tmp_path / "s", "--count", 12)
    before = record(tmp_path / "s")
    monkeypatch.setattr(sample, "load_generator", pytest.fail)
    capsys.readouterr()
    drawn(diffusion_run, tmp_path / "s", "--count", 12)
    assert capsys.readouterr().out == f"{tmp_path / 's'} is complete: 12 images of these settings; nothing to draw\n"
    (tmp_path / "s/grid.png").unlink()  # as if stopped just before the end
    drawn(diffusion_run, tmp_path / "s", "--count", 12)
    assert record(tmp_path / "s") == before
    assert {path.name for path in (tmp_path / "s").iterdir()} == {"images", "grid.png", "sample.json"}


@pytest.mark.parametrize(
    ("kind", "overrides", "forwards"),
    [
        ("diffusion_run", [], 5),  # Heun: two evaluations per step, one in the last
        ("diffusion_run", ["sample.steps=1"], 1),
        ("diffusion_run", ["sample.gamma=0.5"], 10),
        # of the evaluations at 80, 2.5, 2.5, 0.002 and 0.002
        ("diffusion_run", ["sample.gamma=0.5", "sample.schedule.kind=interval", "sample.schedule.low=0.1", "sample.schedule.high=0.5"], 7),
        ("token_run", ["sample.gamma=0.5", "sample.schedule.kind=interval", "sample.schedule.high=0.4"], 1 + 5 / 30),
        ("token_run", [], 1),  # every token once
        ("token_run", ["sample.gamma=0.5"], 2),
        ("token_run", ["sample.gamma=0.5", "sample.schedule.kind=ramp"], 2),  # no guidance at scale 0, whose tokens the guide reads later
    ],
)  # fmt: skip
def test_forwards_are_counted(kind, overrides, forwards, request, tmp_path, capsys):
    """The padding of the last micro-batch (9 images are two of 8) costs nothing per image."""
    drawn(request.getfixturevalue(kind), tmp_path, "--count", 9, *overrides)
    guidance = "guidance 0.5" if "sample.gamma=0.5" in overrides else "no guidance"
    assert f"9 images drawn, {forwards:g} network forwards per image, {guidance}" in capsys.readouterr().out
    assert record(tmp_path)["forwards_per_image"] == round(forwards, 9)


@pytest.fixture(scope="module")
def guides(tmp_path_factory, diffusion_run, token_run):
    """A larger network for each kind of run."""
    return {
        "diffusion_run": like(diffusion_run, tmp_path_factory.mktemp("guide"), "model.net.num_blocks=2"),
        "token_run": like(token_run, tmp_path_factory.mktemp("guide"), "model.net.depth=2", "model.net.embed_dim=24"),
    }


@pytest.mark.parametrize(("kind", "evaluations"), [("diffusion_run", 5), ("token_run", 1)])
def test_another_network_may_guide(kind, evaluations, guides, request, tmp_path, capsys):
    source, constant = request.getfixturevalue(kind), ("--count", 9, "sample.gamma=1.5", "sample.schedule.kind=constant")
    found = {"none": drawn(source, tmp_path / "none", "--count", 9)}
    for name, guide in (("null", "null"), ("other", guides[kind]), ("itself", source / "weights")):
        found[name] = drawn(source, tmp_path / name, *constant, f"sample.guide.weights={guide}")
    out, made = capsys.readouterr().out, record(tmp_path / "other")
    assert len({tuple(found[name].values()) for name in ("none", "null", "other")}) == 3
    # pred + gamma (pred - pred)
    assert found["itself"] == found["none"]

    # a forward of the guide counts as one, whatever its size
    assert made["forwards_per_image"] == 2 * evaluations and made["guide"] == str(guides[kind])
    own, other = (sum(t.numel() for t in read_tensors(folder).values()) for folder in (source / "weights", guides[kind]))
    size = made["guide_size"]
    assert size > 1.2 and size == pytest.approx(other / own, rel=1e-3)
    assert f"guidance 1.5 by {guides[kind]} ({size:.3g} x the model's size)" in out
    assert record(tmp_path / "null")["guide"] is None and "guide_size" not in record(tmp_path / "null")

    # what tells guides apart is their weights, not where they lie
    moved = shutil.copytree(guides[kind], tmp_path / "moved")
    drawn(source, tmp_path / "other", *constant, f"sample.guide.weights={moved}")
    assert "nothing to draw" in capsys.readouterr().out
    line = refused(capsys, source, "--out", tmp_path / "other", *constant, f"sample.guide.weights={source / 'weights'}")
    assert "holds images of sample.guide=" in line


def test_a_run_keeps_its_guide(diffusion_run, guides, tmp_path):
    """As `mclr evaluate RUN` draws: the settings of the run say which network guides."""
    overrides = ["sample.gamma=1.5", f"sample.guide.weights={guides['diffusion_run']}"]
    run_ = make_run(tmp_path / "run", load("edm2-digits", "mclr", "digits", "local", [*EDM2, *overrides]))
    found = drawn(run_, tmp_path / "a", "--count", 3)
    assert found == drawn(diffusion_run, tmp_path / "b", "--count", 3, *overrides) and record(tmp_path / "a")["guide_size"] > 1


def test_a_guide_that_does_not_fit_is_one_line(diffusion_run, token_run, tokenizer, guides, tmp_path, capsys):
    for name, source, overrides in [
        ("three", diffusion_run, ["data.num_classes=3"]),
        ("large", diffusion_run, ["data.resolution=16", "model.net.attn_resolutions=[]"]),
        ("louder", diffusion_run, ["model.sigma_data=1.0"]),
        ("tokens", token_run, [f"model.tokenizer={tokenizer}"]),
    ]:
        like(source, tmp_path / name, *overrides)
    on = ["sample.gamma=0.5"]
    for source, guide, extra, message in [
        (diffusion_run, tmp_path / "nothing", on, f"no weights at {tmp_path / 'nothing'}"),
        (diffusion_run, "digits-tokenizer", on, "weights digits-tokenizer hold a network of kind vqvae, not edm2"),
        (token_run, guides["diffusion_run"], on, "hold a network of kind edm2, not var"),
        (diffusion_run, tmp_path / "three", on, "three has num_classes 3, the model has 10: give a guide for the same samples"),
        (diffusion_run, tmp_path / "large", on, "large has img_resolution 16, the model has 8: give a guide"),
        (diffusion_run, tmp_path / "louder", on, "louder has sigma_data 1.0, the model has 0.5: give a guide"),
        (token_run, tmp_path / "tokens", on, "tokens has vocab_size 16, the model has 64: give a guide"),
        (diffusion_run, 3, on, "sample.guide.weights=3: expected text or null"),
        (diffusion_run, "edm2-digits", [], "sample.guide.weights=edm2-digits needs sample.gamma"),
    ]:
        assert message in refused(capsys, source, "--out", tmp_path / "s", f"sample.guide.weights={guide}", *extra)
        assert not (tmp_path / "s").exists()


def test_a_trained_guide_knows_its_tokenizer(digits, tokenizer, tmp_path, capsys):
    other = load_net(str(tokenizer), "vqvae")
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    save_weights(tmp_path / "other", other)
    argv = ["--model", "var-digits", "--data", str(digits), "--init", "none", "--out", str(tmp_path / "run"), *VAR]
    assert run(mclr.train.run.main, [*argv, f"model.tokenizer={tokenizer}", "train.images=8", "train.batch=8"]) == 0
    guided = ("--count", 1, "sample.gamma=1", f"sample.guide.weights={tmp_path / 'run/weights'}")
    drawn(tmp_path / "run", tmp_path / "same", *guided)
    line = refused(capsys, tmp_path / "run", "--out", tmp_path / "s", *guided, f"model.tokenizer={tmp_path / 'other'}")
    assert f"run/weights is of another tokenizer than {tmp_path / 'other'}: give a guide for the same tokens" in line


def test_a_schedule_is_shown_with_its_sigmas_or_scales(diffusion_run, token_run, tmp_path, capsys):
    interval = ["sample.schedule.kind=interval", "sample.schedule.low=0.31", "sample.schedule.high=0.6"]
    drawn(diffusion_run, tmp_path / "a", "--count", 1, "sample.gamma=0.5", *interval)
    drawn(token_run, tmp_path / "b", "--count", 1, "sample.gamma=2", "sample.schedule.kind=ramp")
    assert [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")] == [
        ["sigma", "80", "13.7", "3", "2.34", "0.4", "0.139", "0.0684", "0.0117", "0.002"],
        ["progress", "0", "0.167", "0.31", "0.333", "0.5", "0.6", "0.667", "0.833", "1"],
        ["gamma", "0", "0", "0.5", "0.5", "0.5", "0.5", "0", "0", "0"],
        ["scale", "1", "2", "3", "4"],
        ["progress", "0", "0.333", "0.667", "1"],
        ["gamma", "0", "0.667", "1.33", "2"],
    ]
    # nothing to show where the weight is the same everywhere, or 0 whatever the schedule
    for name, overrides in (("c", ["sample.gamma=1"]), ("d", interval)):
        drawn(diffusion_run, tmp_path / name, "--count", 1, *overrides)
        assert capsys.readouterr().out.count("\n") == 1
    # a negative part is guidance although gamma is 0
    drawn(diffusion_run, tmp_path / "e", "--count", 1, "sample.schedule.kind=negative_window")
    out = capsys.readouterr().out
    assert "7 network forwards per image, guidance 0 (negative_window)" in out and "gamma" in out


def test_the_pixels_are_those_of_the_model_of_the_npz_and_of_the_record(diffusion_run, tmp_path):
    """Rounded as the record says: 127.5 x + 127.5, half to even."""
    drawn(diffusion_run, tmp_path, "--count", 16, "--seed", 96, "--npz")
    seeds, settings = range(96, 112), record(tmp_path)["settings"]
    x_N = mclr.load(diffusion_run).draw(torch.tensor(seeds) % 10, seeds)
    expected = np.rint(127.5 * x_N.clamp(-1, 1).numpy() + np.float32(127.5))
    assert settings["rounding"] == "round(127.5 x + 127.5), half to even, x in [-1, 1]" and len(np.unique(expected)) > 100
    assert settings["sample.steps"] == 3 and settings["sample.gamma"] == 0 and settings["seed"] == 96
    arrays = np.load(tmp_path / "samples.npz")
    assert arrays["arr_0"].dtype == np.uint8 and np.array_equal(arrays["arr_0"].transpose(0, 3, 1, 2), expected)
    assert arrays["arr_1"].tolist() == [seed % 10 for seed in seeds]
    for seed, image in zip(seeds, expected, strict=True):
        with Image.open(tmp_path / "images" / f"{seed:06d}-{seed % 10}.png") as png:
            assert np.array_equal(np.asarray(png), image[0])
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (10 * 9 * 8 - 8, 9 * 8 - 8)  # one row of ten conditions, eightfold
    # an npz of fewer images does not stay behind
    drawn(diffusion_run, tmp_path, "--count", 17, "--seed", 96)
    assert not (tmp_path / "samples.npz").exists()


def test_weights_go_with_a_preset(diffusion_run, tmp_path, monkeypatch):
    preset = tmp_path / "small.yaml"
    preset.write_text((PRESETS / "model/edm2-digits.yaml").read_text())
    found = drawn(diffusion_run / "weights", tmp_path / "a", "--model", preset, *EDM2, "--count", 9)
    assert found == drawn(diffusion_run, tmp_path / "b", "--count", 9)
    # bundled weights have the preset of their name
    monkeypatch.setattr(mclr.train.weights.folder, "BUNDLED", tmp_path / "bundled")
    save_random(tmp_path / "bundled/edm2-digits", load("edm2-digits", "mle", "digits", "local", []))
    drawn("edm2-digits", tmp_path / "c", "--count", 2, "sample.steps=1", "sample.batch=2")
    assert record(tmp_path / "c")["data"] == {"name": "digits", "path": "data/digits"}


@pytest.mark.parametrize("name", ["mine", None])
def test_weights_say_which_images_they_make(name, tmp_path, capsys):
    """For the command as for mclr.load. Without a recorded name nothing else is taken for their data."""
    config = load("edm2-digits", "mle", "digits", "local", ["data.num_classes=5", "data.channels=3"])
    save_random(tmp_path / "five", config)
    save_weights(tmp_path / "five", load_net(str(tmp_path / "five")), replace=True, **({"data": name} if name else {}))
    few = ["sample.steps=2", "sample.batch=5"]
    drawn(tmp_path / "five", tmp_path / "s", "--count", 5, *few)
    images_N = mclr.load(tmp_path / "five", device="cpu", settings=few).sample(range(5), exact=True)
    assert np.array_equal(read_images(image_paths(tmp_path / "s")), images_N.numpy())
    assert record(tmp_path / "s")["data"] == {"name": name or "unknown", "path": f"data/{name or 'unknown'}"}
    # what is given goes first
    line = refused(capsys, tmp_path / "five", "--out", tmp_path / "d", "--data", "digits", "--count", 5, *few)
    assert "five have img_channels 3, this run has 1" in line
    for other in ("digits-tokenizer", "digits-posterior", "var-digits"):
        line = refused(capsys, other, "--model", "edm2-digits", "--out", tmp_path / "d", "--count", 5, *few)
        assert "hold a network of kind" in line


def test_images_of_other_settings_are_never_mixed(diffusion_run, tmp_path, capsys):
    before = drawn(diffusion_run, tmp_path, "--count", 12), record(tmp_path)
    for argv, message in [
        (["--count", 11], "holds 12 images, more than 11: remove it, or choose another folder"),
        (["--count", 12, "--seed", 1], "holds images of seed=0: remove it, or choose another folder"),
        (["--count", 12, "--classes", "1,2"], "holds images of conditions=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]:"),
        (["--count", 12, "sample.steps=2"], "holds images of sample.steps=3:"),
        (["--count", 12, "sample.gamma=0.2"], "holds images of sample.gamma=0.0:"),
    ]:
        assert message in refused(capsys, diffusion_run, "--out", tmp_path, *argv)
        assert (images(tmp_path), record(tmp_path)) == before


def test_bad_arguments_sources_and_folders_are_one_line_and_write_nothing(diffusion_run, tmp_path, capsys):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished/config.yaml").write_bytes((diffusion_run / "config.yaml").read_bytes())
    (tmp_path / "file").write_text("")
    (tmp_path / "foreign/images").mkdir(parents=True)
    (tmp_path / "foreign/images/cat.png").write_text("")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/sample.json").write_text("{}")
    own, weights = diffusion_run, diffusion_run / "weights"
    for source, out, argv, message in [
        (own, "s", ["--count", 0], "0 images from seed 0: draw 1 to 10000000 at a time"),
        (own, "s", ["--per-class", -1], "-10 images from seed 0"),
        (own, "s", ["--seed", -1], "100 images from seed -1: draw 1 to 10000000 at a time, from a seed of 0 to 2^63 - 1"),
        (own, "s", ["--classes", "1,x"], "--classes 1,x: no class is named 'x': give numbers"),
        (own, "s", ["--classes", "1,10"], "--classes 1,10: class 10 is out of range: must be 0 .. 9"),
        (own, "s", ["--classes", "1,1"], "--classes 1,1: give different conditions"),
        (own, "s", ["sample.step=3"], "unknown key sample.step; did you mean sample.steps?"),
        (own, "s", ["--model", "edm2-digits"], "is a run with a model and data of its own: leave out --model and --data (in Py"),
        (tmp_path / "unfinished", "s", [], "has no weights: it has not finished; repeat its `mclr train` command"),
        (tmp_path / "nothing", "s", [], "no weights at"),
        (weights, "s", [], "say by --model (in Python, model=) which one they belong to"),
        (weights, "s", ["--model", "edm2-digits"], "have model_channels 8, this run has 16"),
        (weights, "s", ["--model", "nonsense"], "unknown model nonsense"),
        (own, "file", [], "it lies below a regular file): choose another place"),
        (own, "foreign", [], "holds files of unknown origin"),
        (own, "damaged", [], "is no record of samples"),
    ]:
        assert message in refused(capsys, source, "--out", tmp_path / out, *argv)
        assert not (tmp_path / "s").exists()


def test_ctrl_c_says_what_stands_and_that_the_command_goes_on(diffusion_run, tmp_path, capsys, monkeypatch):
    bar = MagicMock()
    bar().__enter__().update.side_effect = KeyboardInterrupt
    argv = (diffusion_run, "--out", tmp_path / "s", "--count", 12)
    with monkeypatch.context() as patch:
        patch.setattr(samples_folder, "progress_bar", bar)
        assert sample_(*argv) == 130
    err = capsys.readouterr().err
    assert err == f"interrupted: {tmp_path / 's'} holds 8 of 12 images; the same command draws the rest\n"
    assert sample_(*argv) == 0 and "4 images drawn" in capsys.readouterr().out
