"""The model section, one class per paradigm: the network, its weights, and its encoder."""

import json
from dataclasses import MISSING, fields
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, create_model

from mclr.configs.schema.section import NotNegative, Positive, Section, Size, Whole, setting
from mclr.errors import UserError
from mclr.models.options import GIVEN, hints_of
from mclr.models.registry import Network, kinds_of

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


def fits(value: Any, hint: Any) -> bool:
    """Whether a value, lists as tuples, is of the type and in the range of an option (models/options.py)."""
    try:
        TypeAdapter(hint, config=Section.model_config).validate_python(value)
    except ValidationError:
        return False
    return True


class Posterior(Section):
    """The noise-conditional classifier p(c | x_t) of the contrasts posterior and weighted."""

    weights: str | None = setting(None, "Weights, for contrast posterior or weighted; null: the classifier learns with the run")
    backbone: str | None = setting(None, "A ConvNeXt by timm's name, for sides of 16 or more; null: our small network")
    channels: Size = setting(32, "Width of our small network")
    lr: Positive = setting(0.001, "Learning rate of the classifier")
    warmup_images: Whole = setting(0, "weights=null: images that train the classifier first, while the network learns by mle")


class Strength(Section):
    """The dial of a network."""

    max: NotNegative = setting(
        0.0, "A dial: the network is told a strength, and is trained for every lam from 0 to this; 0: no dial"
    )


PARADIGM = "diffusion: denoises pixels or latents; next_scale: predicts tokens, scale by scale"
KIND = "edm2 or dit (diffusion), var (next_scale), or one of your own in models/registry.py; not given: edm2 or var"


class _Model(Section):
    """The settings that all models share."""

    name: str = setting(..., "Name in logs and model cards")
    weights: str | None = setting(
        None, "Where training starts: a folder, run, bundled name, published file or hf://ORG/REPO; null: fresh"
    )
    class_map: str | None = setting(
        None,
        "Conditions of model.weights. same: those of the data; fresh: all start anew; or a JSON file {class here: condition there, or "
        "null}; null: the same number is taken as the same, any other is refused",
    )
    strength: Strength = Strength()
    net: Any = setting(..., "Options of the network")  # its net_section()


class DiffusionModel(_Model):
    """A diffusion model, on pixels or latents."""

    paradigm: Literal["diffusion"] = setting(..., PARADIGM)
    kind: str = setting("edm2", KIND)
    vae: str | None = setting(None, "Encoder of latents: folder of a diffusers AutoencoderKL or hf://ORG/REPO; null: pixels")
    latents: Literal["edm2", "sd"] = setting(
        "edm2", "How images become latents. edm2: channel by channel, of standard deviation .5; sd: times .18215 (DiT, SiT)"
    )
    noise_mean: float = setting(-0.4, "Mean of ln sigma in training")
    noise_std: Positive = setting(1.0, "Standard deviation of ln sigma in training")
    sigma_data: Positive = setting(0.5, "Standard deviation of the data")
    posterior: Posterior = Posterior()


class NextScaleModel(_Model):
    """A next-scale model, on tokens."""

    paradigm: Literal["next_scale"] = setting(..., PARADIGM)
    kind: str = setting("var", KIND)
    tokenizer: str = setting(..., "Weights of the tokenizer: a folder, bundled name or published file")


MODELS: dict[str, type[Section]] = {"diffusion": DiffusionModel, "next_scale": NextScaleModel}


def kind_of_model(model: Any) -> str:
    """The kind of network that an unchecked model section names, or the default of its paradigm.

    Raises UserError for an unknown paradigm, or a kind that the paradigm does not have.
    """
    # other faults of the section are found when its settings are validated
    given = model if isinstance(model, dict) else {"paradigm": "diffusion"}
    paradigm = given.get("paradigm")
    if paradigm not in list(MODELS):
        raise UserError(f"model.paradigm={json.dumps(paradigm, default=str)}: expected {' or '.join(MODELS)}")
    kind, kinds = given.get("kind", MODELS[paradigm].model_fields["kind"].default), kinds_of(paradigm)
    if kind not in kinds:
        raise UserError(f"model.kind={json.dumps(kind, default=str)}: expected {' or '.join(kinds)}")
    return kind
