"""Networks, paradigms, objectives and guidance, built from the sections of the configuration."""

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from mclr.configs.schema import DiffusionModel, NextScaleModel, RunConfig, Sample
from mclr.configs.schema import Schedule as ScheduleConfig
from mclr.diffusion import Diffusion, sigma_of
from mclr.errors import UserError
from mclr.forms import EDM, FORMS, Form
from mclr.guidance import Guidance
from mclr.likelihood import Guide, Paradigm
from mclr.models.features import CONVNEXT_SMALLEST, NoiseClassifier, channel_mult_for
from mclr.models.options import GIVEN, NoiseClassifierConfig, hints_of
from mclr.models.registry import NETWORKS, kinds_of
from mclr.next_scale import NextScale, scale_progress
from mclr.objective import Objective
from mclr.schedule import Schedule
from mclr.train.data.encoders import RGB, Encoder, Latents, Tokens, load_vae
from mclr.train.training.class_map import first_other
from mclr.train.weights.folder import find_weights, load_net, read_config, sha256


def build_encoder(config: RunConfig, device: torch.device) -> Encoder:
    """The encoder of a run. Raises UserError when the VAE cannot be loaded, or the tokenizer is for other images than the data."""
    model, data = config.model, config.data
    if isinstance(model, DiffusionModel):
        return Latents(load_vae(model.vae, device), model.latents) if model.vae else RGB()
    tokenizer: Any = load_net(model.tokenizer, "vqvae")
    channels, side = tokenizer.config.img_channels, tokenizer.config.img_resolution
    if (channels, side) != (data.channels, data.resolution):
        raise UserError(
            f"model.tokenizer={model.tokenizer} is for {channels} x {side}^2 images, {data.name} has {data.channels} x "
            f"{data.resolution}^2: for published weights give model.tokenizer= the converted vae_ch160v4096z32.pth (at 512 pixels with "
            f"its scales, `mclr convert --help`), for your own one by `mclr prepare tokenizer WEIGHTS --data {data.path}`"
        )
    return Tokens(tokenizer.to(device))


def build_net(config: RunConfig, encoder: Encoder) -> nn.Module:
    """The generator, freshly initialised from torch's global generator. Raises UserError for an engine option that it lacks."""
    model, network = config.model, NETWORKS[config.model.kind]
    given: dict[str, Any] = {"num_classes": config.data.num_classes, "strength_max": model.strength.max}
    if isinstance(encoder, Tokens):
        tokens = encoder.tokenizer.config
        given |= {"vocab_size": tokens.vocab_size, "z_channels": tokens.z_channels, "patch_nums": tokens.scales}
    else:
        assert isinstance(model, DiffusionModel)
        channels, side, _ = shape_of(encoder, config)
        given |= {"img_resolution": side, "img_channels": channels, "sigma_data": model.sigma_data}
    wanted = hints_of(network.config)
    options = {name: value for name, value in given.items() if name in wanted} | model.net.model_dump()
    net = network.net(network.config(**options))
    if config.engine.activation_checkpointing:
        if not hasattr(net, "activation_checkpointing"):
            raise UserError(f"engine.activation_checkpointing=true: a network of kind {model.kind} has none; set it to false")
        net.activation_checkpointing = True
    return net


def build_paradigm(config: RunConfig, encoder: Encoder) -> Paradigm:
    """The paradigm of a run, with the settings of its sampler."""
    model, sample, null = config.model, config.sample, config.data.num_classes
    if isinstance(encoder, Tokens):
        tokenizer = encoder.tokenizer
        return NextScale(tokenizer.config.scales, null, tokenizer, sample.top_k, sample.top_p, sample.more_smooth)
    assert isinstance(model, DiffusionModel)
    settings = sample.model_dump(include={field.name for field in fields(Diffusion)})
    if sample.churn_max is None:
        settings["churn_max"] = math.inf
    form = getattr(model.net, "form", None)
    if form is None:
        made: Form = EDM(model.noise_mean, model.noise_std, model.sigma_data)
    else:
        made = FORMS[form]
    return Diffusion(shape_of(encoder, config), null, made, **settings)


def shape_of(encoder: Encoder, config: RunConfig) -> tuple[int, int, int]:
    """(C, H, W) of what a diffusion network models."""
    shape = encoder.shape(config.data)
    assert shape is not None
    return shape


def build_classifier(config: RunConfig) -> NoiseClassifier:
    """The posterior classifier of a diffusion run: model.posterior.weights, or fresh from torch's global generator.

    Weights bring their own size. Raises UserError for weights of other data or another sigma_data, and for images too small for a
    ConvNeXt.
    """
    data, model = config.data, config.model
    assert isinstance(model, DiffusionModel)
    posterior = model.posterior
    channels, side, _ = (Latents if model.vae else RGB).shape(data)
    needed: dict[str, Any] = {"img_channels": channels, "num_classes": data.num_classes, "sigma_data": model.sigma_data}
    classifier: Any
    if posterior.weights is None:
        needed |= {"channels": posterior.channels, "channel_mult": channel_mult_for(side), "backbone": posterior.backbone}
        classifier = NoiseClassifier(NoiseClassifierConfig(**needed))
    else:
        classifier = load_net(posterior.weights, "noise_classifier")
        for key, here in needed.items():
            if (there := getattr(classifier.config, key)) != here:
                raise UserError(
                    f"model.posterior.weights={posterior.weights} has {key} {there}, this run has {here}: "
                    "fit another with `mclr prepare posterior`, or give null to start from scratch"
                )
    if classifier.config.backbone and side < CONVNEXT_SMALLEST:
        raise UserError(
            f"posterior backbone {classifier.config.backbone} needs images of {CONVNEXT_SMALLEST} pixels or more, "
            f"data.resolution={data.resolution}{f' makes latents of {side}' if model.vae else ''}: give model.posterior.backbone=null"
        )
    return classifier


def build_objective(config: RunConfig) -> Objective:
    objective = config.objective
    # with a dial lam is not given, and the schedule is that of strength 1
    schedule = build_schedule(objective.schedule, 1.0 if config.model.strength.max else objective.lam or 0.0)
    more = objective.model_dump(include={"bound", "truncate", "beta"})
    return Objective(objective.name, objective.contrast, schedule, **more, strength_max=config.model.strength.max)


def build_guidance(sample: Sample, guide: Guide | None = None) -> Guidance:
    return Guidance(build_schedule(sample.schedule, sample.gamma), guide, sample.strength)


def build_guide(config: RunConfig, net: nn.Module, key: str, classes: Sequence[str] = ()) -> Guide | None:
    """The guide of config.sample or config.objective (key); None where that is the null condition of the network itself.

    net: the network to be guided. classes: names of its conditions, where they are known. Raises UserError when the two are for
    different samples, conditions or tokenizers.
    """
    chosen, model = getattr(config, key).guide, config.model
    if chosen.weights is None:
        return None
    named = f"{key}.guide.weights={chosen.weights}"
    guide: Any = load_net(chosen.weights, *kinds_of(model.paradigm)).requires_grad_(False)
    null = guide.config.num_classes if chosen.condition == "null" else None
    if misfit := guide_misfit(net, guide, model.paradigm, null):
        raise UserError(f"{named} {misfit}: give a guide for the same samples")
    described = read_config(find_weights(chosen.weights))
    there = described.get("classes") or ()
    if null is None and (c := first_other(there, classes)) is not None:
        raise UserError(
            f"{named} was trained on other classes: condition {c} is {there[c]} there and {classes[c]} here. Ask it without a condition, "
            f"{key}.guide.condition=null, or give a guide for the same classes"
        )
    if isinstance(model, NextScaleModel):
        # published weights do not record their tokenizer
        tokenizer = described.get("inputs", {}).get("model.tokenizer")
        if tokenizer not in (None, sha256(find_weights(model.tokenizer))):
            raise UserError(f"{named} is of another tokenizer than {model.tokenizer}: give a guide for the same tokens")
    return Guide(guide, null)


def guide_misfit(net: Any, guide: Any, paradigm: str, null: int | None = None) -> str | None:
    """What keeps a network from guiding another one, in words; None where nothing does.

    paradigm: of net, a key of GIVEN. null: under which the guide is asked; None: under the sample's own condition.
    """
    # a network of a user's own has no options, and at most a sigma_data
    ours, theirs = (getattr(each, "config", each) for each in (net, guide))
    registered = [network.paradigm for network in NETWORKS.values() if network.config is type(theirs)]
    tokens = hasattr(guide, "new_cache")
    if not callable(guide) or paradigm not in (registered or [paradigm]) or tokens != (paradigm == "next_scale"):
        return f"is no generator of the paradigm {paradigm}"
    # a guide's own dial stands at 0
    ignored = ["strength_max"]
    # an unconditional diffusion network guides any, as EDM2's guidance does
    if null is not None or (paradigm == "diffusion" and getattr(theirs, "num_classes", None) == 0):
        ignored.append("num_classes")
    # answers are mixed before they become images, so both need the same sigma_data
    for key in ("form", *GIVEN[paradigm]):
        here = getattr(ours, key, None)
        there = getattr(theirs, key, here)
        if there != here and key not in ignored:
            return f"has {key} {there}, the model has {here}"
    return None


def build_schedule(schedule: ScheduleConfig, weight: float) -> Schedule:
    return Schedule(weight=weight, **schedule.model_dump())


def schedule_table(name: str, schedule: Schedule, scales: Sequence[int] | None) -> list[str]:
    """Three aligned lines: scale or sigma, progress, and the weight under `name`; no lines where the weight is constant.

    scales: sides of the token maps; None: diffusion, shown at seven noise levels and at the bounds of the schedule.
    """
    if schedule.is_zero or schedule.kind == "constant":
        return []
    if scales is None:
        progress = sorted({*(i / 6 for i in range(7)), *schedule.bounds})
        places = ["sigma", *(f"{sigma_of(p):.3g}" for p in progress)]
    else:
        progress = scale_progress(scales)
        places = ["scale", *(str(side) for side in scales)]
    rows = [places, ["progress", *(f"{p:.3g}" for p in progress)], [name, *(f"{schedule.at(p):.3g}" for p in progress)]]
    return [f"  {row[0]:9}" + "".join(f"{entry:>8}" for entry in row[1:]) for row in rows]
