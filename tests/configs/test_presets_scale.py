"""Runs at 512 pixels, shrunk in width and depth alone: images to shards, shards to a cache, the cache to a trained network. And what
presets say of full size: figures of the plan, an example of a hostfile."""

import json
import re
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from launch import RUN, environment, launcher
from photos import save_tiny_vae
from PIL import Image
from safetensors.torch import load_file

from mclr.configs.schema import PRESETS
from mclr.models.options import SCALES_512
from mclr.models.vqvae import VQVAE, VQVAEConfig
from mclr.train.cli import main
from mclr.train.weights.folder import save_weights

IMAGES, BATCH, STEPS = 8, 4, 3
# narrow and shallow, with the levels, attention, scales, dropout, precision and classifier's kind of the preset
SMALL = {
    "edm2-img512-l": (
        *("model.net.model_channels=16", "model.net.channels_per_head=16", "model.net.num_blocks=1"),
        *("model.posterior.backbone=convnext_atto", "model.posterior.warmup_images=4"),
    ),
    "var-d36-s": ("model.net.depth=2", "model.net.embed_dim=32", "model.net.num_heads=2"),
}
CACHED = {"edm2-img512-l": "latents (float32)", "var-d36-s": "tokens (uint16)"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dataset of 512 pixels, out of a zip file as a user may have it."""
    folder, draws = tmp_path_factory.mktemp("photos"), torch.Generator().manual_seed(0)
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        for i in range(IMAGES):
            coarse = torch.randint(0, 256, (16, 20, 3), dtype=torch.uint8, generator=draws)
            Image.fromarray(coarse.numpy()).resize((640, 512)).save(folder / "one.jpg")
            archive.write(folder / "one.jpg", f"{'cat' if i % 2 else 'dog'}/{i}.jpg")
    argv = ["prepare", "images", str(folder / "photos.zip"), str(folder / "data"), "--resolution", "512", "--val-share", "0"]
    assert main(argv) == 0
    return folder / "data"


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Model -> the setting that names its encoder: of the published form and strides, and little width."""
    folder = tmp_path_factory.mktemp("encoders")
    vae = save_tiny_vae(folder / "vae")
    torch.manual_seed(0)
    save_weights(folder / "tokenizer", VQVAE(VQVAEConfig(ch=32, ch_mult=(1,) * 5, num_res_blocks=1, scales=SCALES_512)))
    return {"edm2-img512-l": f"model.vae={vae}", "var-d36-s": f"model.tokenizer={folder / 'tokenizer'}"}


@pytest.fixture(scope="module", params=SMALL)
def cached(request, data, encoders):
    """(model, arguments of its run), the cache made."""
    model, encoder = request.param, encoders[request.param]
    assert main(["prepare", "cache", "--model", model, "--data", str(data), encoder]) == 0
    settings = [f"train.batch={BATCH}", "train.micro_batch=1", f"train.images={STEPS * BATCH}", "train.log_every=1"]
    argv = ["--model", model, "--objective", "mclr", "--data", str(data), encoder, *SMALL[model], *settings]
    return model, [*argv, "train.warmup_images=0", "train.checkpoint_every=8"]


def assert_trained(model: str, run: Path, said: str) -> None:
    """It read the cache, took every step in the preset's precision, on the objective's loss, and left a checkpoint and finite weights."""
    assert f"data       {CACHED[model]} from " in said and "bf16" in said
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in logged if "gradient_norm" in line]
    assert len(steps) == STEPS and all(0 < line["gradient_norm"] < float("inf") for line in steps)
    last = steps[-1]
    if model == "edm2-img512-l":
        # the classifier has warmed up: mismatched rows were scored, with gradient, and are not worth what the matched ones are
        assert last["contrast_share"] > 0 != last["ratio"] and last["rows"] > STEPS * BATCH
    else:
        # plain maximum likelihood would have the loss -value
        assert last["loss"] > -1.1 * last["value"] and last["rows"] == STEPS * BATCH
    weights = load_file(run / "weights" / "model.safetensors")
    assert all(t.isfinite().all() for t in weights.values())
    assert (run / "checkpoints" / f"{STEPS * BATCH:012d}").is_dir()


def test_on_one_process(cached, tmp_path, capfd):
    model, argv = cached
    assert main(["train", *argv, "--engine", "local", "--out", str(tmp_path / "run")]) == 0
    assert_trained(model, tmp_path / "run", capfd.readouterr().out)


LAUNCHED = [
    ("var-d36-s", "zero3"),
    *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("edm2-img512-l", "zero3"), ("edm2-img512-l", "8x80gb"))),
]


@pytest.mark.parametrize(("cached", "engine"), LAUNCHED, indirect=["cached"])
def test_under_the_launcher(cached, engine, tmp_path):
    model, argv = cached
    command = [*launcher("deepspeed"), str(RUN), *argv, "--engine", engine, "--out", str(tmp_path / "run")]
    ran = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert_trained(model, tmp_path / "run", ran.stdout)


# a command in the header of a preset, and what it prints
FIGURES = re.compile(r"#   mclr (train --model (\S+) .* --plan)   not measured: (\S+) GiB per GPU, (\S+) images/s$", re.MULTILINE)
SAID = sorted({found for path in PRESETS.rglob("*.yaml") for found in FIGURES.findall(path.read_text())})


@pytest.mark.slow
@pytest.mark.parametrize(("command", "model", "total", "rate"), SAID)
def test_presets_say_what_the_plan_says(command, model, total, rate, capsys):
    assert main(command.split()) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()[0] in ("8", "32")]
    # total, most images, GB sent, s/step, images/s, rows/s
    assert [(line[-6], line[-2]) for line in lines] == [(total, rate)]


def test_every_size_for_large_machines_says_its_figures():
    assert {model for _, model, *_ in SAID} == {
        path.stem for path in PRESETS.glob("model/*.yaml") if re.search("512|var-d[^i]|it-[^d]", path.stem)
    }


def test_the_example_of_a_hostfile():
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(PRESETS / "hostfile.example")) == {"node-1": 8, "node-2": 8}
