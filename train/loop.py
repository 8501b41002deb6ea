"""The training loop: steps, averages, logs, snapshots, checkpoints, and a clean end whatever ends it."""

import json
import math
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from configs.schema import Train
from kernels.choice import using
from mclr.errors import UserError
from mclr.likelihood import Draws
from mclr.posterior import NoisyPosterior, fold_bins
from train.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from train.ema import EMA, averages_of, rewind_snapshots, write_snapshot
from train.engine import Engine, buffers_of
from train.grids import Grid
from train.log import RunFolder
from train.meter import Meter
from train.monitor import Monitor, mle_loss, open_images
from train.pulse import Pulse
from train.ranks import Interrupt, from_rank_0, together, world
from train.step import Task, train_step
from train.weights import describe, save_weights


@dataclass
class Progress:
    """What a run has done so far, over all ranks; part of every checkpoint.

    rows: run through the network with gradient; one cut short after a scale counts by its share of the tokens. flops: of forwards
    (1x) and backwards (2x), the posterior classifier's included. skipped: steps that were not finite and changed nothing. held_out:
    loss of maximum likelihood on held-out images at this checkpoint, where the best is kept.
    """

    images: int = 0
    rows: float = 0.0
    rows_no_grad: float = 0.0
    flops: float = 0.0
    posterior_flops: float = 0.0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    held_out: float | None = None


def train(
    task: Task,
    settings: Train,
    micro_batch: int,
    path: Path,
    run: RunFolder | None,
    interrupt: Interrupt,
    pulse: Pulse,
    grid: Grid,
    peak: float | None,
    notes: dict[str, Any],
) -> int:
    """Train until settings.images have been seen, or the compute of settings.mle_images is spent.

    Returns 0, or 128 + the signal that ended the run after a checkpoint.
    path: the run folder; run: the same, held by rank 0, None elsewhere. peak: FLOP/s of a device, where known. notes: kept beside the
    weights; notes["init"]: where they started. Raises UserError when too many steps in a row are not finite; the newest checkpoint
    then still stands.
    """
    rank, _, ranks = world()
    averages = averages_of(task.engine.pieces(), settings)
    progress = resume(task, averages, path, rank)
    if run is not None:
        run.rewind(progress.images)
        rewind_snapshots(path, progress.images)
    # the others are needed where each has a part of the network
    reads = rank == 0 or task.engine.lockstep
    monitor = None
    if settings.monitor_every and reads:
        monitor = Monitor(task, settings.monitor_every, settings.log_every * settings.batch)
    held_out = open_images(task.source.info) if settings.keep_best and reads else {}
    flops = forward_flops(task)
    budget = 3 * flops["net"] * settings.mle_images if settings.mle_images else math.inf

    def done() -> bool:
        return progress.flops >= budget or progress.images >= settings.images

    def end() -> int:
        """Images seen at the end, as far as the cost of those seen so far tells."""
        affordable = progress.images * budget / progress.flops if progress.flops else math.inf
        return max(progress.images, math.ceil(min(settings.images, affordable)))

    def checkpoint() -> None:
        pulse.enter("checkpoint")
        if held_out:
            progress.held_out = mle_loss(task, held_out)["mle_loss_val"]
        save(task, averages, progress, path, settings, rank, notes)

    share, meter = settings.batch // ranks, Meter(vars(progress), peak, task.device)
    begun = checkpointed = progress.images
    if rank == 0 and not done() and (path / "weights").exists():
        print(f"this run had finished at {begun} images; it goes on to train.images={settings.images}")
    with progress_bar(end(), begun, quiet=rank != 0 or done()) as bar:
        while not done():
            started = time.perf_counter()
            pulse.enter("start", progress.images // settings.batch + 1)
            # dropout draws from torch's global generator: keyed by the step, so that a resumed run repeats it
            torch.manual_seed(((settings.seed * 1_000_003 + progress.images) * 1_021 + rank) % 2**63)
            first = progress.images + rank * share
            positions = range(first, first + share)
            for source in filter(None, (task.source, task.generated)):
                # its own of the first step, too: else they would come after the next one's
                source.prefetch(positions)
                source.prefetch(range(first + settings.batch, first + settings.batch + share))
            lr = settings.lr * min(1.0, (progress.images + settings.batch) / max(settings.warmup_images, 1))
            metrics = train_step(task, positions, micro_batch, lr, lambda: interrupt.agreed(task.device), pulse.enter)
            if metrics is None:
                break
            progress.images += settings.batch
            for ema in averages.values():
                ema.update(task.engine.pieces(), progress.images, settings.batch)
            pulse.enter("meet")
            sums = add_up(metrics | rows_of(task) | meter.share(pulse.seconds.pop("data", 0.0), task.source.damaged), task.device)
            meter.step(sums)
            means = fold_bins({name: sums[name] / ranks for name in metrics})
            count_compute(progress, sums, flops)
            progress.seconds += time.perf_counter() - started

            pulse.enter("log")
            count_skipped(progress, means, settings, task.source, run, path, checkpointed)
            bar.total = end()
            bar.update(settings.batch)
            if progress.images // settings.batch % settings.log_every == 0 or done():
                counts = {"images": progress.images, "rows": round(progress.rows, 3), "flops": progress.flops}
                # how far plain maximum likelihood would have come at the same cost: the length of a fair control
                counts |= {"mle_images": round(progress.flops / (3 * flops["net"])), "posterior_flops": progress.posterior_flops}
                readings = monitor.read(progress.images) if monitor else {}
                if run is not None:
                    means["skipped"], seconds = progress.skipped, round(progress.seconds, 3)
                    run.log(**counts, seconds=seconds, **means, **meter.read(vars(progress)), **readings)
                bar.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
            if rank == 0 and notes["init"] is None and progress.images == settings.batch:
                left = bar.format_interval(progress.seconds * (end() / settings.batch - 1))
                bar.write(f"no released weights were given: training from scratch, about {left} to go by the first step")
            # before the checkpoint: a run that goes on from there does not come by here again
            if grid.due(progress.images, progress.images - settings.batch, done()):
                pulse.enter("grid")
                grid.draw(progress.images)
            if settings.snapshot_every and (progress.images % settings.snapshot_every < settings.batch or done()):
                pulse.enter("snapshot")
                snapshot(task, averages, settings, progress, path, rank)
            if progress.images - checkpointed >= settings.checkpoint_every:
                checkpoint()
                checkpointed = progress.images
    if progress.images > checkpointed:
        checkpoint()
    if not done():
        if rank == 0:
            print(f"stopped by a signal at {progress.images} images; the same command goes on from there")
        return 128 + interrupt.signal
    pulse.enter("weights")
    weights = task.engine.gather(averages["ema"].average if "ema" in averages else task.engine.pieces())
    with together():
        if rank == 0:
            export(task, weights, progress, path, notes)
    return 0


def progress_bar(images: int, begun: int, quiet: bool) -> tqdm:
    """Images, speed and time left, on stderr; rarely where that is a file."""
    every = 1 if sys.stderr.isatty() else 30
    return tqdm(total=images, initial=begun, unit="img", disable=quiet, mininterval=every, smoothing=0.1)


class NotFinite(UserError):
    """The end of a run that went wrong. images: seen until then."""

    def __init__(self, message: str, images: int):
        super().__init__(message)
        self.images = images


def count_skipped(
    progress: Progress,
    means: dict[str, float],
    settings: Train,
    source: Any,
    run: RunFolder | None,
    path: Path,
    checkpointed: int,
) -> None:
    """Where a step was not finite, which left the weights as they were: count it, and have its samples written down.

    Raises NotFinite where that happens too often in a row.
    """
    name = next((name for name in ("gradient_norm", *means) if not math.isfinite(means[name])), None)
    if name is None:
        progress.skipped_in_a_row = 0
        return
    progress.skipped += 1
    progress.skipped_in_a_row += 1
    if run is not None:
        keys = source.keys(progress.images - settings.batch, settings.batch)
        run.note_skipped(images=progress.images, loss=means["loss"], keys=keys)
    if progress.skipped_in_a_row > settings.max_skipped:
        kept = f"; {path} keeps its checkpoint of {checkpointed} images" if checkpointed else ""
        times = f"{progress.skipped_in_a_row} steps in a row"
        what = f"{name} is {means[name]} at {progress.images} images, {times}"
        way_out = "start again with a lower train.lr or objective.lam and another --out"
        raise NotFinite(f"{what}: {way_out}{kept}", progress.images)


def resume(task: Task, averages: dict[str, EMA], path: Path, rank: int) -> Progress:
    """Load the newest whole checkpoint of the run folder, if there is one, into engines and averages. Collective.

    Raises UserError when there are checkpoints and none is whole, or when a rank does not see it.
    """
    newest = None
    with together():
        # one rank reads and checks it all
        if rank == 0:
            newest, damaged = newest_checkpoint(path)
            if damaged and newest is None:
                raise UserError(
                    f"no checkpoint in {path / 'checkpoints'} is whole (newest: {damaged[0].name}): remove that folder to start from "
                    f"the beginning, or choose another --out"
                )
            for bad in damaged:
                print(f"checkpoint {bad} is damaged and left out")
            if newest is not None:
                print(f"going on from {newest}")
    newest = from_rank_0(newest)
    if newest is None:
        return Progress()
    with together():
        if not newest.exists():
            raise UserError(f"{newest} is not seen here: put the run folder on storage that all ranks see")
        tensors, state = load_checkpoint(newest)
        model, engine = tensors["model"], tensors["engine"]
        for name, _ in task.engine.net.named_parameters():
            engine.setdefault(f"weight:{name}", model[name])
        task.engine.load(engine | {name: model[name.removeprefix("buffer:")] for name in buffers_of(task.engine.net)})
        if task.posterior_engine is not None:
            task.posterior_engine.load(tensors["posterior"])
        for name, ema in averages.items():
            ema.average = task.engine.split(model if name == "ema" else tensors[name])
    return Progress(**state)


def snapshot(task: Task, averages: dict[str, EMA], settings: Train, progress: Progress, path: Path, rank: int) -> None:
    """Write one snapshot per width in settings.snapshot_stds. Collective."""
    whole = {ema.std: task.engine.gather(ema.average) for ema in averages.values() if ema.std in settings.snapshot_stds}
    with together():
        if rank == 0:
            for std, average in whole.items():
                write_snapshot(path, average, std, progress.images)


def save(
    task: Task, averages: dict[str, EMA], progress: Progress, path: Path, settings: Train, rank: int, notes: dict[str, Any]
) -> None:
    """Write a checkpoint; collective, since gathering the engines' states is."""
    engine = task.engine.save()
    tensors = {"engine": engine} | {name: task.engine.gather(ema.average) for name, ema in averages.items()}
    if task.posterior_engine is not None:
        tensors["posterior"] = task.posterior_engine.save()
    with together():
        if rank == 0:
            # as `mclr sample` and `mclr convert` read weights, and no tensor twice
            average = tensors.pop("ema", None) or taken(engine, "weight:")
            tensors["model"] = average | taken(engine, "buffer:")
            about = describe(task.engine.net, tensors["model"], notes | {"images_seen": progress.images})
            save_checkpoint(path, progress.images, tensors, vars(progress), about, settings.keep, settings.keep_best)


def taken(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those entries of an engine's state, which then lacks them, by the rest of their names."""
    return {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}


def export(task: Task, weights: dict[str, Tensor], progress: Progress, path: Path, notes: dict[str, Any]) -> None:
    """Write RUN/weights of a finished run, with notes and the last line of its metrics, unless they are there.

    Those of a shorter run are removed first: the checkpoint holds all that is needed to write them, again if need be.
    """
    folder = path / "weights"
    try:
        if json.loads((folder / "config.json").read_text())["images_seen"] == progress.images:
            print(f"finished already: {progress.images} images, weights in {folder}")
            return
    except (OSError, ValueError, KeyError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    metrics = path / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    notes = notes | {"images_seen": progress.images, "metrics": json.loads(lines[-1]) if lines else {}}
    save_weights(folder, task.engine.net, weights, **notes)
    print(f"finished: {progress.images} images in {progress.seconds:.0f} s, weights in {folder}")


def add_up(values: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Sums over the ranks of numbers and 0-d tensors, in one collective."""
    sums = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values.values()])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return dict(zip(values, sums.tolist(), strict=True))


def rows_of(task: Task) -> dict[str, float]:
    """Rows that this rank ran through network and posterior classifier since the last call."""
    rows = {"rows": task.engine.rows["grad"], "rows_no_grad": task.engine.rows["no_grad"], "posterior_rows": 0}
    engines: list[Engine] = [task.engine]
    if task.posterior_engine is not None:
        rows["posterior_rows"] = task.posterior_engine.rows["grad"]
        engines.append(task.posterior_engine)
    if task.reference is not None:
        rows["rows_no_grad"] += task.reference.rows["no_grad"]
        task.reference.rows.update(no_grad=0)
    for engine in engines:
        engine.rows.update(grad=0, no_grad=0)
    return rows


def count_compute(progress: Progress, sums: dict[str, float], flops: dict[str, int]) -> None:
    """Add one step's rows of all ranks to progress."""
    rows, no_grad, posterior_rows = (sums[name] for name in ("rows", "rows_no_grad", "posterior_rows"))
    progress.rows += rows
    progress.rows_no_grad += no_grad
    progress.posterior_flops += flops["posterior"] * 3 * posterior_rows
    progress.flops += flops["net"] * (3 * rows + no_grad) + flops["posterior"] * 3 * posterior_rows


@torch.no_grad()
def forward_flops(task: Task) -> dict[str, int]:
    """Floating-point operations of one row's forward, counted by torch: of the network, and of the posterior's classifier."""
    batch = task.source.batch(0, 1)
    draws = Draws(0, [0], task.device)
    x_B = task.encoder.draw(task.encode(batch), draws)
    probe = task.paradigm.probe(x_B, draws)
    index = torch.zeros(1, dtype=torch.int64, device=task.device)
    counted = {"net": 0, "posterior": 0}
    # plain operations: what torch.compile, fused attention and our kernels run is not counted everywhere
    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        with FlopCounterMode(display=False) as counter, using("torch"):
            prediction = task.paradigm.predict(task.engine.net, probe, index, batch.c_B.to(task.device))
            task.paradigm.log_likelihood(prediction, probe, index)
        counted["net"] = counter.get_total_flops()
        if isinstance(task.posterior, NoisyPosterior) and task.posterior_engine is not None:
            with FlopCounterMode(display=False) as counter:
                task.posterior_engine.net(probe.inputs["noisy"], probe.inputs["sigma"])
            counted["posterior"] = counter.get_total_flops()
    return counted
