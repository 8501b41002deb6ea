"""mclr.load and Model: the same images as `mclr sample`, few images at the cost of few, saved weights that load again."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import mclr
from mclr.likelihood import Draws
from mclr.train import sample
from mclr.train.data.encoders import Latents
from mclr.train.data.images import image_paths, read_images
from mclr.train.sampling.generate import SAMPLING, conditions_of
from mclr.train.system.console import run
from mclr.train.training import held_out, memorisation
from mclr.train.weights.folder import read_tensors

MODELS = ("edm2-digits", "var-digits")


def loaded(name):
    return mclr.load(name, device="cpu")


@pytest.mark.parametrize(("name", "gamma"), [("edm2-digits", 1.5), ("var-digits", 0.0), ("var-digits", 1.5)])
def test_exact_images_are_those_of_the_command(name, gamma, tmp_path):
    """Bit for bit, with the command's own steps and micro-batch, from a seed in the middle of it."""
    argv = [name, "--out", str(tmp_path), "--count", "13", "--seed", "10", f"sample.gamma={gamma}"]
    assert run(sample.main, argv) == 0
    expected = read_images(image_paths(tmp_path))
    classes = [seed % 10 for seed in range(10, 23)]
    images = loaded(name).sample(classes, seed=10, gamma=gamma, exact=True)
    assert images.dtype == torch.uint8 and np.array_equal(images.numpy(), expected)
    # without gamma the settings decide, as they do for the command; a Schedule is taken as it is
    model = mclr.load(name, device="cpu", settings=[f"sample.gamma={gamma}"])
    shape = {"edm2-digits": "constant", "var-digits": "ramp"}[name]
    for given in (None, mclr.Schedule(shape, gamma)):
        assert np.array_equal(model.sample(classes, seed=10, gamma=given, exact=True).numpy(), expected)


@pytest.mark.parametrize(("name", "count"), [("edm2-digits", 60), ("var-digits", 300)])
def test_few_images_take_a_short_batch_and_look_the_same(name, count, monkeypatch):
    """As the command's full micro-batches: before rounding diffusion differs by less than 1e-4, and tokens are the same."""
    model, widths, c_N, seeds = loaded(name), [], torch.arange(count) % 10, range(32, 32 + count)
    real = type(model.paradigm).sample

    def counted(self, net, c_B, *more):
        widths.append(len(c_B))
        return real(self, net, c_B, *more)

    monkeypatch.setattr(type(model.paradigm), "sample", counted)
    short = torch.cat([model.draw(c_N[i : i + 5], seeds[i : i + 5], short=True) for i in range(0, count, 5)])
    assert set(widths) == {8}
    widths.clear()
    exact = model.draw(c_N, seeds)
    assert set(widths) == {model.batch} and model.batch > 60
    assert torch.equal(short, exact) if name == "var-digits" else (short - exact).abs().max() < 1e-4


def test_a_training_network_samples_without_dropout_and_trains_on(tmp_path):
    model = loaded("edm2-digits")
    before = model.sample([4], seed=2)
    model.net.train()
    assert torch.equal(model.sample([4], seed=2), before) and model.net.training
    assert all(p.requires_grad and p.grad is None for p in model.net.parameters())
    assert not torch.equal(model.sample([4], seed=3), before) and not torch.equal(model.sample([4], seed=2, steps=2), before)
    guide = mclr.load("edm2-digits", device="cpu", settings=["model.net.dropout=0.5"])
    guide.net.train()
    assert torch.equal(model.sample([4], seed=2, gamma=1.0, guide=guide), before) and guide.net.training


def test_a_guide_of_other_samples_is_refused():
    diffusion, tokens = map(loaded, MODELS)
    other = loaded("var-digits")
    with torch.no_grad():
        next(other.encoder.tokenizer.parameters()).add_(1)
    with_three, louder, larger = (copy.deepcopy(diffusion.net) for _ in range(3))
    with_three.config = replace(with_three.config, num_classes=3)
    louder.config = replace(louder.config, sigma_data=1.0)
    larger.config = replace(larger.config, img_resolution=16)
    for model, guide, message in [
        (diffusion, tokens, "is no generator of the paradigm diffusion"),
        (diffusion, tokens.net, "is no generator of the paradigm diffusion"),
        (tokens, diffusion, "is no generator of the paradigm next_scale"),
        (diffusion, mclr.load("digits-posterior", device="cpu"), "is no generator"),
        (diffusion, with_three, "has num_classes 3, the model has 10"),
        (diffusion, louder, "has sigma_data 1.0, the model has 0.5"),
        (diffusion, larger, "has img_resolution 16, the model has 8"),
        (diffusion, mclr.from_denoiser(lambda noisy, sigma, c: noisy, sigma_data=1.0), "has sigma_data 1.0"),
        (tokens, other, "is of another tokenizer"),
    ]:
        with pytest.raises(ValueError, match=f"guide= {message}"):
            model.sample([1], gamma=1.0, guide=guide)
    with pytest.raises(ValueError, match=r"guide must be a network, or a Model of mclr\.load, not 'edm2-digits'"):
        diffusion.sample([1], gamma=1.0, guide="edm2-digits")


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_loads_again(name, tmp_path):
    """By its folder, without a preset of its name, with its licence and its class names."""
    model = loaded(name)
    model.notes["classes"] = [f"digit {c}" for c in range(10)]
    model.save(tmp_path / "mine")
    again = mclr.load(tmp_path / "mine", device="cpu")
    images = again.sample(["digit 7", 3], exact=True)
    assert torch.equal(images, model.sample([7, 3], exact=True)) and again.notes["licence"] == model.notes["licence"]
    with pytest.raises(mclr.UserError, match="exists"):
        model.save(tmp_path / "mine")
    assert read_tensors(tmp_path / "mine").keys() == dict(model.net.state_dict()).keys()


@pytest.mark.parametrize("name", MODELS)
def test_encode_takes_bytes_and_decode_goes_back(name):
    model = loaded(name)
    images = model.sample(range(6))
    x_N = model.encode(images)
    model.paradigm.check(x_N)
    tokens = name == "var-digits"
    assert (model.decode(x_N) - (images.float() / 127.5 - 1)).square().mean().sqrt() < (0.2 if tokens else 1e-6)
    for wrong in (images[:, :, :4], images.int(), images.float(), images[0], images.numpy()):
        with pytest.raises(ValueError, match=r"images must be a tensor, uint8 \[N, 1, 8, 8\], not"):
            model.encode(wrong)


class FlatVAE:
    """Stands for a VAE: its posterior is N(0, 1) for every image."""

    device = torch.device("cpu")

    def eval(self):
        return self

    def requires_grad_(self, _):
        return self

    def encode(self, image):
        mean = torch.zeros(len(image), 4, image.shape[2] // 8, image.shape[3] // 8)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.ones_like(mean)))


def test_latents_have_random_numbers_of_their_own():
    """Those of a position: not those of a loss, of sampling or of measurements, so that noise and latents are independent."""
    model = replace(loaded("edm2-digits"), encoder=Latents(FlatVAE()), image_shape=(3, 64, 64))
    images = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    x_N = model.encode(images, first=8)
    assert torch.equal(model.encode(images[2:], first=10), x_N[2:]) and not torch.equal(model.encode(images, first=0), x_N)
    stored_N = model.encoder.encode(images.float())
    for seed in (0, 1, SAMPLING, held_out.LOSS, memorisation.VIEWS, memorisation.PROJECTION):
        assert not torch.equal(model.encoder.draw(stored_N, Draws(seed, [8, 9, 10, 11])), x_N)
    for first in (None, -1, 1.5):
        with pytest.raises(ValueError, match="first="):
            model.encode(images, first=first)


def test_weights_that_generate_nothing_load_as_frozen_networks():
    posterior = mclr.load("digits-posterior", device="cpu")
    assert posterior(torch.zeros(2, 1, 8, 8), torch.ones(2)).shape == (2, 10)
    assert not posterior.training and not any(p.requires_grad for p in posterior.parameters())
    with pytest.raises(mclr.UserError, match="no weights at nothing"):
        mclr.load("nothing")
    with pytest.raises(mclr.UserError, match="no weights at edm2-digit; did you mean edm2-digits"):
        mclr.load("edm2-digit")
    with pytest.raises(ValueError, match="name=None is no name"):
        mclr.load(None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": [10]}, "class 10 is out of range: must be 0 .. 9"),
        ({"classes": ["cat"]}, "no class is named 'cat'"),
        ({"classes": [1.7]}, "class=1.7 must be a whole number"),
        ({"classes": [-1]}, "class=-1 must be a whole number from 0"),
        ({"classes": []}, "there are no classes"),
        ({"classes": 3}, r"classes=3 is no list: give a list of conditions, as in \[3\]"),
        ({"classes": "3"}, "classes='3' is no list"),
        ({"classes": [1], "seed": "0"}, "seed='0' must be a whole number"),
        ({"classes": [1], "gamma": "0.5"}, "weight='0.5' of a schedule must be a finite number"),
        ({"classes": [1], "guide": mclr.from_denoiser(abs)}, "guide= has no effect without gamma"),
        ({"classes": [1], "seed": -1}, "seed=-1 must be a whole number from 0"),
        ({"classes": [1], "seed": 2**63}, "seed=9223372036854775808 must be a whole number from 0"),
        ({"classes": [1], "steps": 0}, "steps=0 must be a whole number from 1"),
        ({"classes": [1], "steps": 2.5}, "steps=2.5 must be a whole number from 1"),
    ],
)
def test_what_cannot_be_sampled_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        loaded("edm2-digits").sample(**arguments)


def test_classes_have_numbers_and_names():
    names = ["cat", "dog", "3"]
    assert conditions_of(["dog", 0, "1", "3"], 3, names) == [1, 0, 1, 2]
    with pytest.raises(ValueError, match="no class is named 'cow': give numbers, or names like cat"):
        conditions_of(["cow"], 3, names)
