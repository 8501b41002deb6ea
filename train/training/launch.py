"""How a training run begins: what it reads is checked, the ranks meet, everything is built, and trained."""

import math
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NoReturn

from mclr.configs.schema import DiffusionModel, RunConfig, flatten
from mclr.errors import UserError
from mclr.train.system.ranks import (
    Interrupt,
    collective,
    gather_objects,
    group,
    launched,
    on_signals,
    own_device,
    report_once,
    world,
)


def end_early(number: int, frame: Any) -> NoReturn:
    """Ends a run that has not begun to train."""
    print("interrupted", file=sys.stderr)
    raise SystemExit(128 + number)


def rank_shares(config: RunConfig, ranks: int) -> list[int]:
    """The micro-batches that one rank's images can be divided into, the smallest first.

    Raises UserError when the batch cannot be shared by so many ranks, or by the engine not at all.
    """
    batch = config.train.batch
    if batch % ranks:
        raise UserError(f"train.batch={batch} cannot be shared by {ranks} ranks: make it a multiple of {ranks}")
    if ranks > 1 and config.engine.kind == "local":
        raise UserError(f"engine.kind=local runs on one rank, not {ranks}: use engine.kind=deepspeed")
    share = batch // ranks
    return sorted({d for i in range(1, math.isqrt(share) + 1) if share % i == 0 for d in (i, share // i)})


def micro_batch_of(config: RunConfig, ranks: int) -> int:
    """Images per forward of one rank: the largest share of its images that train.micro_batch allows.

    Raises UserError as rank_shares() does, and for an engine that needs a launcher.
    """
    shares, engine = rank_shares(config, ranks), config.engine
    if engine.here() == "local" and engine.zero:
        raise UserError(
            f"engine.zero={engine.zero} needs a launcher: use `deepspeed train/run.py ...`, or engine.zero=0 engine.offload=false"
        )
    if engine.here() == "local" and engine.reference == "sharded":
        raise UserError(
            "engine.reference=sharded needs ranks that share it: start with a launcher, or set engine.reference=whole"
        )
    if engine.here() == "deepspeed" and not launched():
        raise UserError("engine.kind=deepspeed needs a launcher: use `deepspeed train/run.py ...`, or --engine local")
    return max(d for d in shares if d <= (config.train.micro_batch or config.train.batch))


def start(config: RunConfig, out: Path, micro_batch: int, command: str, no_lock: bool = False) -> int:
    """Read what the run reads, meet the other ranks, build and train. Returns what train() returns."""
    import torch

    from mclr.train.data.cache import data_line, precision_of, through_cache
    from mclr.train.data.source import Source
    from mclr.train.data.write import open_or_prepare
    from mclr.train.system.gpus import peak_flops
    from mclr.train.system.watchdog import Watchdog
    from mclr.train.training.build import build_networks, build_task, choose_kernels, open_source
    from mclr.train.training.log import RunFolder
    from mclr.train.training.loop import train
    from mclr.train.training.previews import Preview
    from mclr.train.weights.folder import inherited
    from mclr.train.weights.model_card import run_notes

    rank, _, ranks = world()
    device = own_device()
    kernels = choose_kernels(config, device)
    run_folder, notes = None, {"init": config.model.weights, "command": command, "out": str(out)} | run_notes(config)
    with ExitStack() as sources:

        def opened() -> Source:
            return sources.enter_context(closing(open_source(config)))

        if rank == 0:
            # all that the run reads is found good before anything is written and before the ranks meet
            new_digits = config.data.name == "digits" and not config.data.streamed and not Path(config.data.path).exists()
            networks, inputs = build_networks(config, device), inputs_of(config)
            if not new_digits:
                source = through_cache(opened(), networks.encoder, config.data, config.model)
                inputs |= precision_of(source, networks.encoder)
            notes |= {"inputs": inputs} | inherited(config.model.weights)
            run_folder = RunFolder(out, config, inputs, no_lock)
            if new_digits:
                open_or_prepare(config.data.name, config.data.path)
                source = opened()
            notes |= {"data_images": len(source), "classes": source.info.class_names}
        interrupt, timeout = Interrupt(), config.engine.timeout
        with group(config.engine.here() == "deepspeed", timeout), on_signals(interrupt.notice), report_once():
            with collective():
                if rank != 0:
                    networks = build_networks(config, device)
                    source = through_cache(opened(), networks.encoder, config.data, config.model)
            about, read = describe(config, ranks, micro_batch, networks.net), data_line(source, networks.encoder, config.data)
            if any(other != read for other in gather_objects(read)):
                raise UserError("a cache was finished while the ranks started, and some read it: run the same command again")
            try:
                task = build_task(config, source, networks, device, micro_batch)
                if rank == 0:
                    print(about, *read, kernels, sep="\n")
                with closing(Watchdog(out, rank, ranks, timeout)) as watchdog:
                    preview, peak = Preview(task, config, run_folder), peak_flops(device, config.engine.precision)
                    return train(task, config.train, micro_batch, out, run_folder, interrupt, watchdog, preview, peak, notes)
            except torch.OutOfMemoryError as error:
                smaller = f"halve train.micro_batch (now {micro_batch}), which leaves the result as it is"
                raise UserError(f"out of GPU memory: {smaller}") from error
            finally:
                if run_folder is not None:
                    run_folder.close()


def inputs_of(config: RunConfig) -> dict[str, str]:
    """Setting -> checksum of the weights, the class map or the dataset that it names; without digits that are still to be prepared."""
    from mclr.train.data.encoders import VAE_WEIGHTS, find_vae
    from mclr.train.system.files import checksum
    from mclr.train.training.class_map import FRESH, SAME
    from mclr.train.weights.folder import find_weights, named_weights, sha256

    model, named = config.model, named_weights(flatten(config))
    # how a run is sampled decides nothing of it
    inputs = {key: sha256(find_weights(name)) for key, name in named.items() if key != "sample.guide"}
    files = {"model.class_map": Path(model.class_map)} if model.class_map not in (None, FRESH, SAME) else {}
    if isinstance(model, DiffusionModel) and model.vae is not None:
        files["model.vae"] = find_vae(model.vae) / VAE_WEIGHTS
    for key, path in (("data.path", config.data.path), ("objective.generated", config.objective.generated)):
        # which holds the checksums of the shards
        if path is not None and (file := Path(path) / "dataset.json").exists():
            files[key] = file
    return inputs | {key: checksum(file) for key, file in files.items()}


def planned(config: RunConfig) -> Any:
    """The network of a run, without memory. Raises UserError where weights that the run names are missing, or do not fit it."""
    import torch

    from mclr.train.training.class_map import class_map
    from mclr.train.training.networks import build_encoder, build_net
    from mclr.train.weights.folder import find_weights, named_weights, refuse_misfit

    encoder = build_encoder(config, torch.device("cpu"))
    with torch.device("meta"):
        net = build_net(config, encoder)
    folders = {key: find_weights(name) for key, name in named_weights(flatten(config)).items()}
    if weights := folders.get("model.weights"):
        refuse_misfit(net, weights, any_conditions=class_map(config, weights) is not None)
    return net


def describe(config: RunConfig, ranks: int, micro_batch: int, net: Any) -> str:
    """The run in a few lines: what is trained, on what, how, at what cost."""
    from mclr.train.training.build import posterior_warmup
    from mclr.train.training.networks import build_objective, schedule_table

    count = sum(p.numel() for p in net.parameters())
    objective, settings, engine = build_objective(config), config.train, config.engine
    ways = [*([f"ZeRO {engine.zero}"] if engine.here() == "deepspeed" else []), engine.precision]
    ways += [way.replace("_", " ") for way in ("offload", "activation_checkpointing", "compile") if getattr(engine, way)]
    tokens = config.model.paradigm == "next_scale"
    # matched rows; one contrast row per sample, or per scale of it where each draws its own
    scales = len(net.config.patch_nums) if tokens and objective.contrast == "posterior" else 1
    most = 1 if objective.contrast in ("none", "null") else 1 + scales
    # null rows; every condition of the posterior by Bayes' rule; all rows again through the reference
    free = 1 if objective.contrast == "null" else config.data.num_classes if tokens and objective.needs_posterior else 0
    free += most if objective.needs_reference else 0
    lam, schedule = config.objective.lam, config.objective.schedule.kind
    table = schedule_table("lam", objective.schedule, net.config.patch_nums if tokens else None)
    budget = f", or until the compute of {settings.mle_images} images of mle is spent" if settings.mle_images else ""
    vae, classifier = None, []
    if isinstance(config.model, DiffusionModel):
        vae, fitted = config.model.vae, config.model.posterior.weights
        if objective.needs_posterior:
            how = f"weights {fitted}" if fitted else f"from scratch, no ratio for the first {posterior_warmup(config)} images"
            if not (fitted or posterior_warmup(config)):
                how = "from scratch, with a ratio at once: that diverged on the digits, set model.posterior.warmup_images"
            classifier = [f"posterior  {how}"]
    source = f"weights {config.model.weights}" if config.model.weights else "no weights given (--init): from scratch"
    return "\n".join(
        [
            f"model      {config.model.name} ({config.model.paradigm}), {count / 1e6:.2f}M parameters, {source}",
            f"objective  {config.objective.name}, contrast {objective.contrast}, lam {lam} ({schedule})",
            *table,
            *classifier,
            f"data       {config.data.name}: {config.data.num_classes} classes, {config.data.channels} x {config.data.resolution}^2"
            + (f", latents {net.config.img_channels} x {net.config.img_resolution}^2 of {vae}" if vae else ""),
            f"engine     {engine.here()}, {', '.join(ways)}, {ranks} rank(s), "
            f"{settings.batch // ranks // micro_batch} x {micro_batch} images per rank and step",
            f"rows       {settings.batch} samples per step, at most {most * settings.batch} rows with gradient, "
            f"{free * settings.batch} without",
            f"length     {settings.images} images = {-(-settings.images // settings.batch)} steps{budget}",
        ]
    )
