"""train/data/encoders.py: what is stored of an image, what is drawn of it, what comes back; and a whole run on latents."""

import json
import math
import re
import sys

import pytest
import torch
from photos import save_tiny_vae

from mclr.configs.schema import load
from mclr.errors import UserError
from mclr.likelihood import Draws
from mclr.train import sample
from mclr.train.data.encoders import RGB, VAE_WEIGHTS, Latents, Tokens, find_vae, from_uint8, load_vae, mirrored, to_uint8
from mclr.train.data.images import read_images
from mclr.train.run import main
from mclr.train.training.networks import build_encoder
from mclr.train.weights.folder import load_net, read_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def latents(vae):
    return Latents(load_vae(str(vae), CPU))


def images(count: int, side: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_eight_bits_survive_both_ways():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    assert from_uint8(levels)[[0, 255]].tolist() == [-1, 1]
    x = torch.linspace(-1, 1, 10001)
    assert (from_uint8(to_uint8(x)) - x).abs().max() <= 1 / 255 + 1e-6
    assert to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_pixels_and_tokens_draw_no_numbers(tokenizer):
    digits = Tokens(load_net(str(tokenizer), "vqvae"))
    for encoder, image in ((RGB(), images(2)), (digits, images(2, side=8)[:, :1])):
        draws = Draws(0, [5, 6])
        stored = encoder.encode(image)
        assert encoder.draw(stored, draws) is stored
        assert torch.equal(draws.uniform(), Draws(0, [5, 6]).uniform())


def test_what_is_stored_is_the_posterior_of_the_vae(latents):
    image = images(11)  # more than go through at a time
    posterior = latents.vae.encode((image + 1) / 2).latent_dist
    expected = torch.cat([posterior.mean, posterior.std], dim=1)
    assert expected.shape == (11, 8, 2, 2)
    torch.testing.assert_close(latents.encode(image), expected, rtol=1e-5, atol=1e-6)
    # to mirror the image is not to mirror its latents
    flipped = latents.encode(mirrored(image, torch.ones(11, dtype=torch.bool)))
    assert not torch.allclose(flipped, expected.flip(-1), atol=1e-3)


def test_an_image_is_drawn_by_its_own_numbers(latents):
    stored = latents.encode(images(3))
    together = latents.draw(stored, Draws(0, [7, 8, 9]))
    assert together.shape == (3, 4, 2, 2)
    for i, position in enumerate((7, 8, 9)):
        assert torch.equal(latents.draw(stored[i : i + 1], Draws(0, [position]))[0], together[i])
    assert not torch.equal(latents.draw(stored, Draws(0, [10, 11, 12])), together)


def test_latents_of_the_assumed_statistics_have_those_of_the_noise_law(latents):
    mean, std = (torch.tensor(v)[None, :, None, None].expand(8, 4, 64, 64) for v in (Latents.MEAN, Latents.STD))
    x_NC = latents.draw(torch.cat([mean, std], dim=1), Draws(0, list(range(8)))).movedim(1, -1).flatten(0, 2)
    # 32,768 numbers per channel: five standard errors
    torch.testing.assert_close(x_NC.mean(0), torch.zeros(4), rtol=0, atol=5 * 0.5 / math.sqrt(len(x_NC)))
    torch.testing.assert_close(x_NC.std(0), torch.full((4,), 0.5), rtol=0, atol=5 * 0.5 / math.sqrt(2 * len(x_NC)))


def test_the_statistics_are_of_latents_before_stable_diffusion_scales_them(latents):
    size = math.sqrt(sum(mean**2 + std**2 for mean, std in zip(Latents.MEAN, Latents.STD, strict=True)) / 4)
    assert size * latents.vae.config.scaling_factor == pytest.approx(1, abs=0.1)


def test_decoding_undoes_drawing(latents):
    image = images(11)
    mean = latents.vae.encode((image + 1) / 2).latent_dist.mean
    certain = torch.cat([mean, torch.zeros_like(mean)], dim=1)
    decoded = latents.decode(latents.draw(certain, Draws(0, list(range(11)))))
    expected = (latents.vae.decode(mean).sample * 2 - 1).clamp(-1, 1)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-4)
    assert decoded.shape == image.shape
    assert latents.decode(torch.full((1, 4, 2, 2), 1e4)).abs().max() <= 1


def test_the_vae_is_frozen_and_fp32(latents, vae, tmp_path):
    half = load_vae(str(vae), CPU)
    half.half().save_pretrained(tmp_path / "half")
    for module in (latents.vae, Latents(load_vae(str(tmp_path / "half"), CPU)).vae):
        assert not module.training
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in module.parameters())


@pytest.mark.parametrize(("options", "found"), [
    ({"latent_channels": 16}, "16 channels at 1/8 of the side, scaling_factor 0.18215"),
    ({"block_out_channels": (8, 16)}, "4 channels at 1/2 of the side, scaling_factor 0.18215"),
    ({"scaling_factor": 0.13025}, "4 channels at 1/8 of the side, scaling_factor 0.13025"),
])  # fmt: skip
def test_another_vae_is_refused(options, found, tmp_path):
    folder = save_tiny_vae(tmp_path, **options)
    says = f"model.vae={folder} makes {found}: EDM2's latents are 4 at 1/8, .18215; give stabilityai/sd-vae-ft-mse"
    with pytest.raises(UserError, match=f"^{re.escape(says)}$"):
        load_vae(str(folder), CPU)


def test_a_vae_that_is_not_there_is_one_line(vae, tmp_path, monkeypatch):
    def out_of_reach(*args, **options):
        raise ConnectionError("a network, in a test")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", out_of_reach)
    says = rf"^cannot fetch config.json and {VAE_WEIGHTS} of some/vae: .*that holds both \(a network.*\)$"
    with pytest.raises(UserError, match=says):
        find_vae("hf://some/vae")
    (tmp_path / "half" / "config.json").parent.mkdir()
    (tmp_path / "half" / "config.json").write_text((vae / "config.json").read_text())
    for name in ("stabilityai/sd-vae-ft-mse", str(tmp_path / "half")):
        says = f"model.vae={name} is no folder with config.json and {VAE_WEIGHTS}: give one, or hf://stabilityai/sd-vae-ft-mse"
        with pytest.raises(UserError, match=f"^{re.escape(says)}$"):
            find_vae(name)
    (tmp_path / "half" / VAE_WEIGHTS).write_bytes(b"cut short")
    with pytest.raises(UserError, match=r"half is no readable AutoencoderKL \(\w+\): copy stabilityai/sd-vae-ft-mse again$"):
        load_vae(str(tmp_path / "half"), CPU)


def test_without_diffusers_the_way_to_it_is_named(vae, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"needs diffusers: pip install -e '\.\[vae\]'$"):
        load_vae(str(vae), CPU)


def test_a_run_on_latents_trains_and_is_sampled(photos, vae, tmp_path, capsys):
    """64 pixels are latents of 8: the network of the digits, with four channels."""
    argv = ["--model", "edm2-digits", "--objective", "mclr", "--data", str(photos), f"model.vae={vae}"]
    argv += ["model.weights=null", "model.posterior.weights=null", "data.flip=true", "train.batch=8", "train.images=16"]
    argv += ["train.log_every=1", "train.monitor_every=16"]
    assert main([*argv, "--dry-run"]) == 0
    assert "edm2-digits (diffusion), 0.18M parameters" in capsys.readouterr().out
    run = tmp_path / "run"
    assert main([*argv, "--out", str(run)]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [8, 16] and all(math.isfinite(line["loss"]) for line in lines)
    assert math.isfinite(lines[-1]["mle_loss"]) and lines[-1]["icr"] > 0
    net = read_config(run / "weights")["config"]
    assert (net["img_channels"], net["img_resolution"]) == (4, 8)

    assert sample.main([str(run), "--out", str(tmp_path / "drawn"), "--count", "2", "sample.steps=2", "sample.batch=2"]) == 0
    assert read_images((tmp_path / "drawn" / "images").glob("*.png")).shape == (2, 3, 64, 64)


def test_the_config_decides_the_encoder(vae, tokenizer):
    data = ["data.resolution=64", "data.channels=3", "model.weights=null", "model.posterior.weights=null"]
    for model, overrides, kind, shape in (
        ("edm2-digits", [*data, f"model.vae={vae}"], Latents, (4, 8, 8)),
        ("edm2-digits", [], RGB, (1, 8, 8)),
        ("var-digits", [f"model.tokenizer={tokenizer}"], Tokens, None),
    ):
        config = load(model, "mclr", "digits", "local", overrides)
        encoder = build_encoder(config, CPU)
        assert type(encoder) is kind and encoder.shape(config.data) == shape
