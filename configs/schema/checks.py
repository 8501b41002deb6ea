"""Which settings go together: all checks that need more than one setting."""

import json
from collections.abc import Iterator

from mclr.combinations import WITH_REFERENCE, objective_conflicts
from mclr.configs.schema.config import RunConfig, flatten, settings_of
from mclr.configs.schema.model import VAE_FACTOR, DiffusionModel
from mclr.models.options import TRAINING, hints_of
from mclr.models.registry import NETWORKS

OF_FLOWS = ("heun_tau", "euler_maruyama")  # as in mclr/solvers.py, which needs torch
SOLVER = "sample.steps sample.solver sample.guided_channels sample.sigma_min sample.sigma_max sample.rho sample.churn"  # of diffusion alone


def conflicts(config: RunConfig) -> list[str]:
    """The faults of a configuration, one line each."""
    checks = (_objective, _null_condition, _needs, _numbers, _net)
    return [fault for check in checks for fault in check(config)]


def _needs(config: RunConfig) -> Iterator[str]:
    """Settings without effect. A row: settings, what they need if they differ from their defaults, whether it is there."""
    model, objective, engine, sample = config.model, config.objective, config.engine, config.sample
    backbone = model.posterior.backbone if isinstance(model, DiffusionModel) else None
    diffusion, which = model.paradigm == "diffusion", f"{model.name} is a {model.paradigm} model"
    form = getattr(model.net, "form", None)
    bounded = objective.contrast != "uniform" or objective.bound is not None or objective.name in WITH_REFERENCE
    folder = f"a dataset folder; data.path={config.data.path} is a stream"
    rows = [
        ("model.class_map", "weights; give them by --init", model.weights),
        ("model.posterior.channels", "model.posterior.backbone=null, since a ConvNeXt has its own widths", backbone is None),
        ("model.noise_mean model.noise_std", "a network without a form of its own, such as edm2", form is None),
        ("data.balanced train.monitor_every train.keep_best", folder, not config.data.streamed),
        ("data.label", "a stream as data.path", config.data.streamed),
        ("train.keep_best", "a loss that has a lowest value: another contrast than uniform, or objective.bound", bounded),
        ("objective.generated", "objective.name=ddo", objective.name == "ddo"),
        ("engine.reference", "objective.name=cc_dpo, cca or ddo", objective.name in WITH_REFERENCE),
        ("engine.zero", "engine.kind=deepspeed or auto", engine.kind != "local"),
        ("engine.offload", "engine.zero=1, 2 or 3", engine.zero),
        (SOLVER, f"a diffusion model; {which}", diffusion),
        ("sample.top_k sample.top_p sample.more_smooth", f"a next_scale model; {which}", not diffusion),
        (
            "sample.guide.weights",
            "sample.gamma, the weight of guidance",
            sample.gamma or sample.schedule.kind == "negative_window",
        ),
        ("sample.guide.condition", "sample.guide.weights", sample.guide.weights),
        ("objective.guide.weights", "objective.contrast=null", objective.contrast == "null"),
        ("objective.guide.condition", "objective.guide.weights", objective.guide.weights),
        ("sample.churn", "sample.solver=heun", sample.solver == "heun"),
        ("sample.churn_min sample.churn_max sample.churn_noise", "sample.churn > 0", sample.churn),
    ]
    for key, schedule in (("objective.schedule", objective.schedule), ("sample.schedule", sample.schedule)):
        for kind, names in (("interval", ("low", "high")), ("negative_window", ("turn", "below"))):
            rows.append((" ".join(f"{key}.{name}" for name in names), f"{key}.kind={kind}", schedule.kind == kind))
    values, settings = flatten(config), settings_of(NETWORKS[model.kind])
    for keys, needed, there in rows:
        for key in keys.split() if not there else ():
            if key in values and values[key] != settings[key].get("default"):
                value = values[key] if isinstance(values[key], str) else json.dumps(values[key])
                yield f"{key}={value} needs {needed}"


def _numbers(config: RunConfig) -> Iterator[str]:
    """Numbers of one section that do not go together."""
    values, train, model = flatten(config), config.train, config.model
    for low, high in (("schedule.low", "schedule.high"), ("sigma_min", "sigma_max"), ("churn_min", "churn_max")):
        for section in ("objective", "sample"):
            lower, upper = values.get(f"{section}.{low}"), values.get(f"{section}.{high}")
            if upper is not None and lower >= upper:
                yield f"{section}.{low}={lower} must be below {section}.{high}={upper}"
    if train.ema_std != 0 and not 0.01 <= train.ema_std <= 0.25:
        yield f"train.ema_std={train.ema_std} is out of range: must be 0 (no average), or >= 0.01 and <= 0.25"
    # their file names have three decimals
    if len({f"{each:.3f}" for each in train.snapshot_stds}) < len(train.snapshot_stds):
        yield f"train.snapshot_stds={list(train.snapshot_stds)} must differ in their first three decimals"
    if isinstance(model, DiffusionModel) and config.objective.contrast in ("posterior", "weighted"):
        warmup, images = model.posterior.warmup_images, train.images
        if not model.posterior.weights and warmup >= images:
            way_out = f"set it to a third of that, model.posterior.warmup_images={images // 3}"
            yield f"model.posterior.warmup_images={warmup} leaves nothing of train.images={images} to the ratio; {way_out}"


def _objective(config: RunConfig) -> Iterator[str]:
    objective, model, name = config.objective, config.model, config.objective.name
    diffusion = model.paradigm == "diffusion"
    dial, classes = model.strength.max, config.data.num_classes
    yield from objective_conflicts(objective, objective.lam, objective.schedule, "objective.", diffusion, classes, dial)
    strength = config.sample.strength
    if strength and not dial:
        yield f"sample.strength={strength} needs a dial, and {model.name} has none: train one by model.strength.max={strength}"
    elif strength > dial:
        yield f"sample.strength={strength} is out of range: the dial of {model.name} goes from 0 to {dial}"
    if dial and "strength_max" not in hints_of(NETWORKS[model.kind].config):
        yield f"model.strength.max={dial}: a network of kind {model.kind} has no dial; leave it out"
    if name == "ddo" and objective.generated is None:
        yield "missing key objective.generated; objective ddo needs a dataset folder made by `mclr sample --dataset`"
    if name in WITH_REFERENCE:
        if model.weights is None:
            yield f"objective {name} compares with the network before fine-tuning; give its weights by --init"
        # at the start the network equals the reference and the ratio must be 0; dropout would make it differ
        for key in TRAINING:
            if getattr(model.net, key, 0) != 0:
                yield f"objective {name} compares whole networks; set model.net.{key}=0"
        if diffusion and config.engine.precision == "bf16":
            coarse = "a diffusion model, whose ratio is a small difference times all dimensions; set engine.precision=fp32"
            yield f"engine.precision=bf16 is too coarse for objective {name} of {coarse}"


def _null_condition(config: RunConfig) -> Iterator[str]:
    sample, untrained = config.sample, "the null condition, which train.drop_condition=0 leaves untrained"
    if config.train.drop_condition != 0:
        return
    if config.objective.contrast == "null" and config.objective.guide.weights is None:
        yield f"objective.contrast=null needs {untrained}; set train.drop_condition=0.1, or objective.guide.weights=WEIGHTS"
    if sample.guide.weights is None and (sample.gamma != 0 or sample.schedule.kind == "negative_window"):
        guided = f"sample.gamma={sample.gamma} with sample.schedule.kind={sample.schedule.kind}"
        yield f"{guided} needs {untrained}; set sample.guide.weights=WEIGHTS, or train.drop_condition=0.1"


def _net(config: RunConfig) -> Iterator[str]:
    model, data = config.model, config.data
    misfits = NETWORKS[model.kind].config.misfits
    if not isinstance(model, DiffusionModel):
        yield from (f"model.net.{misfit}" for misfit in misfits(model.net, None))
        return
    form, solver = getattr(model.net, "form", "edm"), config.sample.solver
    if solver in OF_FLOWS and not form.startswith("flow"):
        yield f"sample.solver={solver} is for flows, and {model.name} is of the form {form}: choose heun, euler or sde"
    if model.vae is not None and model.latents != ("edm2" if form == "edm" else "sd"):
        yield f"model.latents={model.latents} is not how networks of the form {form} are published: leave it as the preset has it"
    side, images = data.resolution, f"{data.resolution}-pixel images"
    if model.vae is not None:
        if data.channels != 3 or side % VAE_FACTOR:
            have = f"data.channels={data.channels} and data.resolution={side}; set model.vae=null for pixels"
            yield f"model.vae={model.vae} reads 3 channels and a side that is a multiple of {VAE_FACTOR}, not {have}"
            return
        side //= VAE_FACTOR
        images += f", latents of side {side}"
    yield from (f"model.net.{misfit}: choose a --model for {images}, or set that key" for misfit in misfits(model.net, side))
