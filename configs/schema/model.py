"""The model section, one class per paradigm: the network, its weights, and its encoder."""

from dataclasses import MISSING, fields
from typing import Any, Literal

from pydantic import Field, create_model

from mclr.configs.schema.section import Positive, Section, Size, Whole, setting
from mclr.models.options import GIVEN, hints_of
from mclr.models.registry import Network

VAE_FACTOR = 8  # pixels per latent along a side (train/data/encoders.py, Latents)


def net_section(network: Network) -> type[Section]:
    """The section model.net of a kind of network: its options, except those that follow from the data and the encoder."""
    sections: dict[str, Any] = {}
    hints = hints_of(network.config)
    for option in fields(network.config):
        default, meaning, follows = option.default, option.metadata.get("meaning"), option.metadata.get("follows")
        if follows:
            sections[option.name] = hints[option.name], Field(default_factory=follows, description=meaning)
        elif option.name not in GIVEN[str(network.paradigm)]:
            sections[option.name] = hints[option.name], setting(... if default is MISSING else default, meaning)
    return create_model(network.config.__name__, __base__=Section, __doc__=network.config.__doc__, **sections)


class Posterior(Section):
    """The noise-conditional classifier p(c | x_t) of the contrasts posterior and weighted."""

    weights: str | None = setting(None, "Weights of the classifier; null: trained from scratch with the run")
    backbone: str | None = setting(None, "A ConvNeXt by timm's name, for sides of 16 or more; null: our small network")
    channels: Size = setting(32, "Width of our small network")
    lr: Positive = setting(0.001, "Learning rate of the classifier")
    warmup_images: Whole = setting(
        0, "From scratch: images that train the classifier first, while the network learns by maximum likelihood"
    )


class _Model(Section):
    """The settings that all models share."""

    name: str = setting(..., "Name in logs and model cards")
    weights: str | None = setting(
        None, "Where training starts: weights folder, run, bundled name, published file or hf://ORG/REPO; null: from scratch"
    )
    class_map: str | None = setting(
        None,
        "Classes of the weights: JSON file {class here: condition there, or null}, `fresh` or `same`; null: other classes are refused",
    )


class DiffusionModel(_Model):
    """A diffusion model, on pixels or latents."""

    paradigm: Literal["diffusion"] = setting(..., "Kind of model")
    kind: str = setting("edm2", "Kind of network in models/registry.py; not given: edm2 for diffusion, var for next_scale")
    net: Any = setting(..., "Options of the network")  # its net_section()
    vae: str | None = setting(None, "Encoder of latents: folder of a diffusers AutoencoderKL or hf://ORG/REPO; null: pixels")
    noise_mean: float = setting(-0.4, "Mean of ln sigma in training")
    noise_std: Positive = setting(1.0, "Standard deviation of ln sigma in training")
    sigma_data: Positive = setting(0.5, "Standard deviation of the data")
    posterior: Posterior = Posterior()


class NextScaleModel(_Model):
    """A next-scale model, on tokens."""

    paradigm: Literal["next_scale"] = setting(..., "Kind of model")
    kind: str = setting("var", "Kind of network in models/registry.py; not given: edm2 for diffusion, var for next_scale")
    net: Any = setting(..., "Options of the network")  # its net_section()
    tokenizer: str = setting(..., "Weights of the tokenizer: a folder, bundled name or published file")


MODELS: dict[str, type[Section]] = {"diffusion": DiffusionModel, "next_scale": NextScaleModel}
