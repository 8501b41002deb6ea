"""How a training run begins: what it reads is checked, the ranks meet, everything is built, and trained. Also what a dry run tells."""

import math
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mclr.configs.schema import DiffusionModel, RunConfig, dump, flatten
from mclr.errors import UserError
from mclr.train.data.cache import data_line, precision_of, through_cache
from mclr.train.data.dataset import SplitReader, open_dataset
from mclr.train.data.encoders import VAE_WEIGHTS, find_vae
from mclr.train.data.source import Source
from mclr.train.data.write import open_or_prepare
from mclr.train.system.files import checksum
from mclr.train.system.gpus import peak_flops
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
from mclr.train.system.watchdog import Watchdog
from mclr.train.training.build import Networks, build_networks, build_task, choose_kernels, open_source, posterior_warmup
from mclr.train.training.class_map import FRESH, SAME, class_map, class_names
from mclr.train.training.compute import calls_of, rows_per_sample
from mclr.train.training.held_out import RANKING, HeldOut, fixed, readers_of, refuse_unready
from mclr.train.training.log import RunFolder
from mclr.train.training.loop import Session
from mclr.train.training.memorisation import Monitor
from mclr.train.training.networks import build_classifier, build_encoder, build_guide, build_net, build_objective, schedule_table
from mclr.train.training.previews import Preview
from mclr.train.training.state import Keeper
from mclr.train.training.throughput import Throughput
from mclr.train.weights.folder import find_weights, inherited, named_weights, refuse_misfit, sha256
from mclr.train.weights.model_card import run_notes


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
    if engine.here() == "deepspeed" and not launched():
        raise UserError("engine.kind=deepspeed needs a launcher: use `deepspeed train/run.py ...`, or --engine local")
    if engine.here() == "local" and engine.zero:
        raise UserError(
            f"engine.zero={engine.zero} needs a launcher: use `deepspeed train/run.py ...`, or engine.zero=0 engine.offload=false"
        )
    if engine.here() == "local" and engine.reference == "sharded":
        raise UserError(
            "engine.reference=sharded needs ranks that share it: start with a launcher, or set engine.reference=whole"
        )
    return max(d for d in shares if d <= (config.train.micro_batch or config.train.batch))


@dataclass(frozen=True)
class Inputs:
    """What a run reads, found good. held_out: the splits that the monitor and keep_best look at, where one is asked for.

    kernels, data: what is said of the operations and of the data at the start, in lines.
    """

    networks: Networks
    source: Source
    held_out: dict[str, SplitReader]
    kernels: str
    data: list[str]


def start(config: RunConfig, out: Path, micro_batch: int, command: str, no_lock: bool = False) -> int:
    """Read what the run reads, meet the other ranks, build and train. Returns what Session.run() returns.

    Rank 0 finds everything good before it writes to the run folder, and before the ranks meet.
    """
    device, interrupt, inputs, folder = own_device(), Interrupt(), None, None
    with ExitStack() as held:
        if world()[0] == 0:
            inputs = open_inputs(config, device, held)
            encoder, source, init = inputs.networks.encoder, inputs.source, config.model.weights
            notes = run_notes(config) | inherited(init) | {"init": init, "command": command, "out": str(out)}
            notes |= {"inputs": checksums_of(config) | precision_of(source, encoder)}
            notes |= {"data_images": len(source), "classes": source.info.class_names}
            folder = RunFolder(out, flatten(config), dump(config), notes, no_lock)
        several = group(config.engine.here() == "deepspeed", config.engine.timeout)
        with several, on_signals(interrupt.notice), report_once(), closing(folder) if folder else nullcontext():
            with collective():
                inputs = inputs or open_inputs(config, device, held)
            if any(data != inputs.data for data in gather_objects(inputs.data)):
                raise UserError("a cache was finished while the ranks started, and some read it: run the same command again")
            try:
                return build_and_run(config, inputs, out, folder, micro_batch, device, interrupt)
            except torch.OutOfMemoryError as error:
                smaller = f"halve train.micro_batch (now {micro_batch}), which leaves the result as it is"
                raise UserError(f"out of GPU memory: {smaller}") from error


def open_inputs(config: RunConfig, device: torch.device, held: ExitStack) -> Inputs:
    """Build the networks and open the data; `held` closes it. Raises UserError where something is missing, damaged or does not fit."""
    data, settings = config.data, config.train
    kernels, networks = choose_kernels(config.engine.kernels, device), build_networks(config, device)
    if world()[0] == 0 and not data.streamed:
        open_or_prepare(data.name, data.path)
    source = held.enter_context(closing(open_source(config)))
    source = through_cache(source, networks.encoder, data, config.model)
    held_out = {}
    if settings.keep_best or settings.monitor_every:
        refuse_unready(source.info, settings)
        held_out = readers_of(source.info, data.damaged)
        # damage is found now, not at the first checkpoint
        for reader in held_out.values() if world()[0] == 0 else ():
            for _ in fixed(reader, min(RANKING, len(reader.samples))):
                pass
    return Inputs(networks, source, held_out, kernels, data_line(source, networks.encoder, data))


def build_and_run(
    config: RunConfig,
    inputs: Inputs,
    out: Path,
    folder: RunFolder | None,
    micro_batch: int,
    device: torch.device,
    interrupt: Interrupt,
) -> int:
    """Build what trains, say what it is, and train."""
    (rank, _, ranks), settings, ranking = world(), config.train, None
    about = describe(config, inputs.networks.net, micro_batch)
    task = build_task(config, inputs.source, inputs.networks, device, micro_batch)
    if rank == 0:
        print(*about, *inputs.data, inputs.kernels, sep="\n")
    if settings.keep_best:
        # the classifier that the run begins with, where it has weights: so that all checkpoints are asked the same
        given = isinstance(config.model, DiffusionModel) and config.model.posterior.weights and task.posterior_engine is not None
        ranking = HeldOut(task, inputs.held_out["val"], build_classifier(config).to(device) if given else None)
    with closing(Watchdog(out, rank, ranks, config.engine.timeout)) as watchdog:
        return Session(
            task,
            micro_batch,
            Keeper(task, settings, out, folder, ranking, watchdog.beat),
            interrupt,
            watchdog,
            Throughput(peak_flops(device, config.engine.precision), device),
            Preview(task, settings.grid_every, config.sample, folder, watchdog.beat),
            Monitor(task, inputs.held_out, settings.monitor_every, settings.log_every * settings.batch, watchdog.beat),
        ).run()


def checksums_of(config: RunConfig) -> dict[str, str]:
    """Setting -> checksum of the weights, the class map or the dataset that it names."""
    model = config.model
    # how a run is sampled decides nothing of it
    inputs = {
        key: sha256(find_weights(name)) for key, name in named_weights(flatten(config)).items() if key != "sample.guide.weights"
    }
    files = {"model.class_map": Path(model.class_map)} if model.class_map not in (None, FRESH, SAME) else {}
    if isinstance(model, DiffusionModel) and model.vae is not None:
        files["model.vae"] = find_vae(model.vae) / VAE_WEIGHTS
    for key, path in (("data.path", config.data.path), ("objective.generated", config.objective.generated)):
        # it holds the checksums of the shards; a stream has none
        if path is not None and (file := Path(path) / "dataset.json").exists():
            files[key] = file
    return inputs | {key: checksum(file) for key, file in files.items()}


def planned(config: RunConfig) -> nn.Module:
    """The network of a run, without memory. Raises UserError where what the run needs is missing, or does not fit it."""
    encoder = build_encoder(config, torch.device("cpu"))
    with torch.device("meta"):
        net = build_net(config, encoder)
    folders = {key: find_weights(name) for key, name in named_weights(flatten(config)).items()}
    build_guide(config, net, "objective", class_names(config.data))
    if weights := folders.get("model.weights"):
        refuse_misfit(
            net, weights, any_conditions=class_map(config.model, config.data, weights, config.objective.generated) is not None
        )
    if not config.data.streamed and (Path(config.data.path) / "dataset.json").exists():
        refuse_unready(open_dataset(config.data.path), config.train)
    return net


def describe(config: RunConfig, net: nn.Module, micro_batch: int) -> list[str]:
    """The run in a few lines: what is trained, on what, how, at what cost."""
    model, data, settings, engine, ranks = config.model, config.data, config.train, config.engine, world()[2]
    objective, options = build_objective(config), vars(net.config)
    calls = calls_of(objective, options.get("patch_nums"), data.num_classes, engine.zero == 3)
    grad, free, reference = (
        math.ceil(settings.batch * calls.samples * rows_per_sample(each, getattr(net, "tokens", 1)))
        for each in (calls.grad, calls.free, calls.reference)
    )
    lam = config.objective.lam if config.objective.lam is not None else f"0 to {objective.strength_max:g}, drawn for every sample"
    guide = config.objective.guide
    begins = f"from the weights {model.weights}" if model.weights else "from random weights (others: --init WEIGHTS)"
    vae = model.vae if isinstance(model, DiffusionModel) else None
    latents = f", latents {options['img_channels']} x {options['img_resolution']}^2 of {vae}" if vae else ""
    ways = [*([f"ZeRO {engine.zero}"] if engine.here() == "deepspeed" else []), engine.precision]
    ways += [way.replace("_", " ") for way in ("offload", "activation_checkpointing", "compile") if getattr(engine, way)]
    share = f"{settings.batch // ranks // micro_batch} x {micro_batch} images per rank and step"
    budget = f", or until the compute of {settings.mle_images} images of mle is spent" if settings.mle_images else ""
    return [
        f"model      {model.name} ({model.paradigm}), {sum(p.numel() for p in net.parameters()) / 1e6:.2f}M parameters, {begins}",
        f"objective  {objective.name}, contrast {objective.contrast}, lam {lam} ({config.objective.schedule.kind})",
        *(
            [f"guide      {guide.weights}, under {'the null' if guide.condition == 'null' else 'each'} condition"]
            if guide.weights
            else []
        ),
        *schedule_table("lam / s" if objective.strength_max else "lam", objective.schedule, options.get("patch_nums")),
        *posterior_lines(config),
        f"data       {data.name}: {data.num_classes} classes, {data.channels} x {data.resolution}^2{latents}",
        f"engine     {engine.here()}, {', '.join(ways)}, {ranks} rank(s), {share}",
        f"rows       {settings.batch} samples per step, at most {grad} rows with gradient, {free + reference} without",
        f"length     {settings.images} images = {-(-settings.images // settings.batch)} steps{budget}",
    ]


def posterior_lines(config: RunConfig) -> list[str]:
    """Where the posterior classifier of a diffusion run comes from; nothing where there is none."""
    model = config.model
    if not (isinstance(model, DiffusionModel) and build_objective(config).needs_posterior):
        return []
    if model.posterior.weights:
        return [f"posterior  weights {model.posterior.weights}"]
    if warmup := posterior_warmup(config):
        return [f"posterior  from scratch, no ratio for the first {warmup} images"]
    return ["posterior  from scratch, with a ratio at once: that diverged on the digits, set model.posterior.warmup_images"]
