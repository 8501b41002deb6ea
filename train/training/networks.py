"""Networks, paradigms, objectives and guidance, built from the sections of the configuration."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mclr.configs.schema import DiffusionModel, NextScaleModel, RunConfig
from mclr.configs.schema import Schedule as ScheduleConfig
from mclr.diffusion import Diffusion, sigma_of
from mclr.errors import UserError
from mclr.guidance import Guidance
from mclr.likelihood import Net, Paradigm
from mclr.models.features import CONVNEXT_SMALLEST, NoiseClassifier, channel_mult_for
from mclr.models.options import GIVEN, NoiseClassifierConfig, hints_of
from mclr.models.registry import NETWORKS, kinds_of
from mclr.models.vqvae import VQVAE
from mclr.next_scale import NextScale, scale_progress
from mclr.objective import Objective
from mclr.schedule import Schedule
from mclr.train.data.encoders import RGB, Encoder, Latents, Tokens, load_vae
from mclr.train.weights.folder import find_weights, load_net, read_config, sha256


def build_encoder(config: RunConfig, device: torch.device) -> Encoder:
    """The encoder of a run. Raises UserError when the VAE cannot be loaded, or the tokenizer is for other images than the data."""
    if isinstance(config.model, DiffusionModel):
        return Latents(load_vae(config.model.vae, device)) if config.model.vae else RGB()
    tokenizer = load_net(config.model.tokenizer, "vqvae")
    assert isinstance(tokenizer, VQVAE)
    tokens, data = tokenizer.config, config.data
    read = (tokens.img_channels, tokens.scales[-1] << (len(tokens.ch_mult) - 1))
    if read != (data.channels, data.resolution):
        raise UserError(
            f"model.tokenizer={config.model.tokenizer} is for {read[0]} x {read[1]}^2 images, {data.name} has {data.channels} x "
            f"{data.resolution}^2: for published weights give model.tokenizer= the converted vae_ch160v4096z32.pth (at 512 pixels with "
            f"its scales, `mclr convert --help`), for your own one by `mclr prepare tokenizer WEIGHTS --data {data.path}`"
        )
    return Tokens(tokenizer.to(device))


def build_net(config: RunConfig, encoder: Encoder) -> nn.Module:
    """The generator, freshly initialised from torch's global generator. Raises UserError for an engine option that it lacks."""
    data, model, network = config.data, config.model, NETWORKS[config.model.kind]
    given: dict[str, Any] = {"num_classes": data.num_classes}
    if isinstance(model, DiffusionModel):
        shape = encoder.shape(data)
        assert shape is not None
        given |= {"img_resolution": shape[1], "img_channels": shape[0], "sigma_data": model.sigma_data}
    else:
        assert isinstance(encoder, Tokens)
        tokens = encoder.tokenizer.config
        given |= {"vocab_size": tokens.vocab_size, "z_channels": tokens.z_channels, "patch_nums": tokens.scales}
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
    data, model, sample = config.data, config.model, config.sample
    x_shape = encoder.shape(data)
    if isinstance(model, DiffusionModel):
        assert x_shape is not None
        return Diffusion(
            shape=x_shape,
            null=data.num_classes,
            noise_mean=model.noise_mean,
            noise_std=model.noise_std,
            sigma_data=model.sigma_data,
            steps=sample.steps,
            sigma_min=sample.sigma_min,
            sigma_max=sample.sigma_max,
            rho=sample.rho,
            solver=sample.solver,
            churn=sample.churn,
            churn_min=sample.churn_min,
            churn_max=math.inf if sample.churn_max is None else sample.churn_max,
            churn_noise=sample.churn_noise,
        )
    assert isinstance(encoder, Tokens)
    tokenizer = encoder.tokenizer
    return NextScale(tokenizer.config.scales, data.num_classes, tokenizer, sample.top_k, sample.top_p, sample.more_smooth)


def build_classifier(config: RunConfig) -> NoiseClassifier:
    """The posterior classifier of a diffusion run: model.posterior.weights, or fresh from torch's global generator.

    Weights bring their own size. Raises UserError for weights of other data or another sigma_data, and for images too small for a
    ConvNeXt.
    """
    data, model = config.data, config.model
    assert isinstance(model, DiffusionModel)
    posterior, name = model.posterior, model.posterior.weights
    channels, side, _ = (Latents if model.vae else RGB).shape(data)
    needed: dict[str, Any] = {"img_channels": channels, "num_classes": data.num_classes, "sigma_data": model.sigma_data}
    if name is None:
        mult = channel_mult_for(side)
        classifier = NoiseClassifier(
            NoiseClassifierConfig(**needed, channels=posterior.channels, channel_mult=mult, backbone=posterior.backbone)
        )
    else:
        loaded = load_net(name, "noise_classifier")
        assert isinstance(loaded, NoiseClassifier)
        classifier = loaded
        for key, here in needed.items():
            if (there := getattr(classifier.config, key)) != here:
                raise UserError(
                    f"model.posterior.weights={name} has {key} {there}, this run has {here}: "
                    "fit another with `mclr prepare posterior`, or give null to start from scratch"
                )
    if classifier.config.backbone and side < CONVNEXT_SMALLEST:
        raise UserError(
            f"posterior backbone {classifier.config.backbone} needs images of {CONVNEXT_SMALLEST} pixels or more, "
            f"data.resolution={data.resolution}{f' makes latents of {side}' if model.vae else ''}: give model.posterior.backbone=null"
        )
    return classifier


def build_objective(config: RunConfig) -> Objective:
    """The objective of a run."""
    objective = config.objective
    return Objective(
        objective.name,
        objective.contrast,
        build_schedule(objective.schedule, objective.lam),
        bound=objective.bound,
        truncate=objective.truncate,
        beta=objective.beta,
    )


def build_guidance(config: RunConfig, guide: Net | None = None) -> Guidance:
    return Guidance(build_schedule(config.sample.schedule, config.sample.gamma), guide)


def build_guide(config: RunConfig, net: nn.Module) -> nn.Module | None:
    """The network of sample.guide; None where the guide is the null condition.

    net: the network to be guided. Raises UserError when the two are for different samples or tokenizers.
    """
    name, model = config.sample.guide, config.model
    if name is None:
        return None
    guide = load_net(name, *kinds_of(model.paradigm))
    if misfit := guide_misfit(net, guide, model.paradigm):
        raise UserError(f"sample.guide={name} {misfit}: give a guide for the same samples")
    if isinstance(model, NextScaleModel):
        # published weights do not record their tokenizer
        there = read_config(find_weights(name)).get("inputs", {}).get("model.tokenizer")
        if there not in (None, sha256(find_weights(model.tokenizer))):
            raise UserError(
                f"sample.guide={name} is of another tokenizer than {model.tokenizer}: give a guide for the same tokens"
            )
    return guide


def guide_misfit(net: Any, guide: Any, paradigm: str) -> str | None:
    """What keeps a network from guiding another one, in words; None where nothing does. paradigm: of net, a key of GIVEN."""
    # a network of a user's own has no options, and at most a sigma_data
    ours, theirs = (getattr(each, "config", each) for each in (net, guide))
    registered = [network.paradigm for network in NETWORKS.values() if network.config is type(theirs)]
    tokens = hasattr(guide, "new_cache")
    if not callable(guide) or paradigm not in (registered or [paradigm]) or tokens != (paradigm == "next_scale"):
        return f"is no generator of the paradigm {paradigm}"
    # answers are mixed before they become images, so both need the same sigma_data
    for key in GIVEN[paradigm]:
        here = getattr(ours, key, None)
        there = getattr(theirs, key, here)
        # an unconditional diffusion network guides any, as EDM2's guidance does
        if there != here and not (paradigm == "diffusion" and key == "num_classes" and there == 0):
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
