"""Settings that are fine alone and cannot go together, and settings that would have no effect."""

import json
from collections.abc import Iterator

from mclr.combinations import WITH_REFERENCE, objective_conflicts
from mclr.configs.schema.config import RunConfig
from mclr.configs.schema.data import Data
from mclr.configs.schema.model import VAE_FACTOR, DiffusionModel
from mclr.configs.schema.sample import Sample


def conflicts(config: RunConfig) -> Iterator[str]:
    """Settings that are fine alone and cannot go together, and settings that would have no effect."""
    model, data, objective, sample = config.model, config.data, config.objective, config.sample
    name = objective.name
    yield from objective_conflicts(objective, objective.lam, objective.schedule, "objective.", model.paradigm == "diffusion")
    if name != "mle" and data.num_classes < 2:
        yield f"objective {name} needs two conditions or more; data.num_classes={data.num_classes}"
    if name in WITH_REFERENCE:
        if model.weights is None:
            yield f"objective {name} compares with the network before fine-tuning; give its weights by --init"
        # with weights equal to the reference's the ratio must be 0, not that of a thinned network to a whole one
        dropout = "dropout" if isinstance(model, DiffusionModel) else "drop_path"
        if getattr(model.net, dropout) != 0:
            yield f"objective {name} compares whole networks; set model.net.{dropout}=0"
        if model.paradigm == "diffusion" and config.engine.precision == "bf16":
            yield (
                f"engine.precision=bf16 is too coarse for objective {name} of a diffusion model, whose ratio is a small difference "
                "times all dimensions; set engine.precision=fp32"
            )
    if name == "ddo" and objective.generated is None:
        yield "missing key objective.generated; objective ddo needs a dataset folder made by `mclr sample --dataset`"
    if name != "ddo" and objective.generated is not None:
        yield f"objective.generated={objective.generated} has no effect with objective.name={name}; only ddo has it"
    if config.train.drop_condition == 0:
        untrained = "the null condition, which train.drop_condition=0 leaves untrained"
        if objective.contrast == "null":
            yield f"objective.contrast=null needs {untrained}; set train.drop_condition=0.1"
        if sample.guide is None and (sample.gamma != 0 or sample.schedule.kind == "negative_window"):
            guided = f"sample.gamma={sample.gamma} with sample.schedule.kind={sample.schedule.kind}"
            yield f"{guided} needs {untrained}; set sample.guide=WEIGHTS, or train.drop_condition=0.1"
    if config.engine.reference != "auto" and name not in WITH_REFERENCE:
        having = ", ".join(WITH_REFERENCE)
        yield f"engine.reference={config.engine.reference} has no effect with objective.name={name}; only {having} have one"
    if data.streamed:
        stream = f"data.path={data.path} is a stream"
        if data.balanced:
            yield f"data.balanced=true needs a dataset folder, which says how many samples there are; {stream}"
        for key in ("monitor_every", "keep_best"):
            if value := getattr(config.train, key):
                yield f"train.{key}={json.dumps(value)} needs the held-out images of a dataset folder; {stream}"
    owners = {
        "diffusion": ("steps", "solver", "sigma_min", "sigma_max", "rho", "churn"),
        "next_scale": ("top_k", "top_p", "more_smooth"),
    }
    for paradigm, names in owners.items():
        for key in names:
            value = getattr(sample, key)
            if paradigm != model.paradigm and value != Sample.model_fields[key].default:
                yield f"sample.{key}={value} has no effect: {model.name} is a {model.paradigm} model, this is for {paradigm}"
    if model.class_map is not None and model.weights is None:
        yield f"model.class_map={model.class_map} has no effect without weights; give them by --init"
    if isinstance(model, DiffusionModel) and objective.contrast in ("posterior", "weighted") and not model.posterior.weights:
        warmup, images = model.posterior.warmup_images, config.train.images
        if warmup >= images:
            way_out = f"set it to a third of that, model.posterior.warmup_images={images // 3}"
            yield f"model.posterior.warmup_images={warmup} leaves nothing of train.images={images} to the ratio; {way_out}"
    if isinstance(model, DiffusionModel):
        yield from _net_conflicts(model, data)


def _net_conflicts(model: DiffusionModel, data: Data) -> Iterator[str]:
    net, side, latents = model.net, data.resolution, ""
    if model.vae is not None:
        if data.channels != 3 or side % VAE_FACTOR:
            yield (
                f"model.vae={model.vae} reads 3 channels and a side that is a multiple of {VAE_FACTOR}, "
                f"not data.channels={data.channels} and data.resolution={side}; set model.vae=null for pixels"
            )
            return
        side //= VAE_FACTOR
        latents = f", latents of side {side},"
    halvings = len(net.channel_mult) - 1
    if side % 2**halvings:
        yield (
            f"data.resolution={data.resolution}{latents} cannot be halved {halvings} times, "
            "as the entries of model.net.channel_mult ask"
        )
        return
    channels = {side >> level: net.model_channels * mult for level, mult in enumerate(net.channel_mult)}
    for resolution in net.attn_resolutions:
        if resolution not in channels:
            have = ", ".join(map(str, channels))
            way_out = f"choose a --model for {data.resolution}-pixel images, or set that key"
            yield f"model.net.attn_resolutions: {resolution} is not a resolution of this net ({have}): {way_out}"
    # the middle of the net always has attention
    for resolution in {*net.attn_resolutions, side >> halvings} & channels.keys():
        if channels[resolution] % net.channels_per_head:
            yield (
                f"model.net.channels_per_head={net.channels_per_head} must divide the {channels[resolution]} channels "
                f"at resolution {resolution}"
            )
