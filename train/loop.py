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
from train.engine import Engine
from train.log import RunFolder
from train.monitor import Monitor
from train.ranks import Interrupt, together, world
from train.step import Task, train_step
from train.weights import save_weights


@dataclass
class Progress:
    """What a run has done so far, over all ranks; part of every checkpoint.

    rows: run through the network with gradient; one cut short after a scale counts by its share of the tokens. flops: of forwards
    (1x) and backwards (2x), the posterior classifier's included.
    """

    images: int = 0
    rows: float = 0.0
    rows_no_grad: float = 0.0
    flops: float = 0.0
    posterior_flops: float = 0.0
    seconds: float = 0.0


def train(
    task: Task,
    settings: Train,
    micro_batch: int,
    path: Path,
    run: RunFolder | None,
    interrupt: Interrupt,
    notes: dict[str, Any],
) -> int:
    """Train until settings.images have been seen, or the compute of settings.mle_images is spent.

    Returns 0, or 128 + the signal that ended the run after a checkpoint.
    path: the run folder; run: the same, held by rank 0, None elsewhere. notes: kept beside the weights; notes["init"]: where they
    started. Raises UserError when the loss is not finite; the newest checkpoint then still stands.
    """
    rank, _, ranks = world()
    # the only rank that writes
    averages = averages_of(task.engine.weights(), settings) if rank == 0 else {}
    with together():
        progress = resume(task, averages, path, rank)
    if add_up({"images": progress.images}, task.device)["images"] != ranks * progress.images:
        raise UserError(f"the ranks find different checkpoints in {path}: put the run folder on storage that all of them see")
    if run is not None:
        run.rewind(progress.images)
        rewind_snapshots(path, progress.images)
    monitor = None
    if run is not None and settings.monitor_every:
        monitor = Monitor(task, settings.monitor_every, settings.log_every * settings.batch)
    flops = forward_flops(task)
    budget = 3 * flops["net"] * settings.mle_images if settings.mle_images else math.inf

    def done() -> bool:
        return progress.flops >= budget or progress.images >= settings.images

    def end() -> int:
        """Images seen at the end, as far as the cost of those seen so far tells."""
        affordable = progress.images * budget / progress.flops if progress.flops else math.inf
        return max(progress.images, math.ceil(min(settings.images, affordable)))

    share = settings.batch // ranks
    begun = checkpointed = progress.images
    if rank == 0 and not done() and (path / "weights").exists():
        print(f"this run had finished at {begun} images; it goes on to train.images={settings.images}")
    with progress_bar(end(), begun, quiet=rank != 0 or done()) as bar:
        while not done():
            started = time.perf_counter()
            # dropout draws from torch's global generator: keyed by the step, so that a resumed run repeats it
            torch.manual_seed(((settings.seed * 1_000_003 + progress.images) * 1_021 + rank) % 2**63)
            first = progress.images + rank * share
            for source in (task.source, task.generated):
                if source is not None:
                    source.prefetch(range(first + settings.batch, first + settings.batch + share))
            warmup = min(1.0, (progress.images + settings.batch) / max(settings.warmup_images, 1))
            positions = range(first, first + share)
            metrics = train_step(task, positions, micro_batch, settings.lr * warmup, lambda: interrupt.agreed(task.device))
            if metrics is None:
                break
            progress.images += settings.batch
            for ema in averages.values():
                ema.update(task.engine.weights(), progress.images, settings.batch)
            sums = add_up(metrics | rows_of(task), task.device)
            means = fold_bins({name: sums[name] / ranks for name in metrics})
            count_compute(progress, sums, flops)
            progress.seconds += time.perf_counter() - started

            refuse_infinite(means, progress.images, path, checkpointed)
            bar.total = end()
            bar.update(settings.batch)
            if run is not None and (progress.images // settings.batch % settings.log_every == 0 or done()):
                counts = {"images": progress.images, "rows": round(progress.rows, 3), "flops": progress.flops}
                # how far plain maximum likelihood would have come at the same cost: the length of a fair control
                counts |= {"mle_images": round(progress.flops / (3 * flops["net"])), "posterior_flops": progress.posterior_flops}
                readings = monitor.read(progress.images) if monitor else {}
                run.log(**counts, seconds=round(progress.seconds, 3), **means, **readings)
                bar.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
            if rank == 0 and notes["init"] is None and progress.images == settings.batch:
                left = bar.format_interval(progress.seconds * (end() / settings.batch - 1))
                bar.write(f"no released weights were given: training from scratch, about {left} to go by the first step")
            # before the checkpoint: a run that goes on from there does not come by here again
            if settings.snapshot_every and (progress.images % settings.snapshot_every < settings.batch or done()):
                snapshot(averages, settings, progress, path, rank)
            if progress.images - checkpointed >= settings.checkpoint_every:
                checkpoint(task, averages, progress, path, settings.keep, rank)
                checkpointed = progress.images
    if progress.images > checkpointed:
        checkpoint(task, averages, progress, path, settings.keep, rank)
    if not done():
        if rank == 0:
            print(f"stopped by a signal at {progress.images} images; the same command goes on from there")
        return 128 + interrupt.signal
    with together():
        if rank == 0:
            export(task, averages, progress, path, notes)
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


def refuse_infinite(means: dict[str, float], images: int, path: Path, checkpointed: int) -> None:
    """Raise NotFinite when a step went wrong: before its weights are saved."""
    for name in ("loss", *means):
        if not math.isfinite(means[name]):
            kept = f"; {path} keeps its checkpoint of {checkpointed} images" if checkpointed else ""
            what = f"{name} is {means[name]} at {images} images"
            raise NotFinite(f"{what}: start again with a lower train.lr or objective.lam and another --out{kept}", images)


def resume(task: Task, averages: dict[str, EMA], path: Path, rank: int) -> Progress:
    """Load the newest whole checkpoint of the run folder, if there is one, into engines and averages.

    Raises UserError when there are checkpoints and none is whole.
    """
    newest, damaged = newest_checkpoint(path)
    if damaged and newest is None:
        raise UserError(
            f"no checkpoint in {path / 'checkpoints'} is whole (newest: {damaged[0].name}): remove that folder to start from the "
            f"beginning, or choose another --out"
        )
    if newest is None:
        return Progress()
    if rank == 0:
        for bad in damaged:
            print(f"checkpoint {bad} is damaged and left out")
        print(f"going on from {newest}")
    tensors, state = load_checkpoint(newest)
    task.engine.load(tensors["engine"])
    if task.posterior_engine is not None:
        task.posterior_engine.load(tensors["posterior"])
    for name, ema in averages.items():
        ema.average = {key: t.to(task.device) for key, t in tensors[name].items()}
    return Progress(**state)


def snapshot(averages: dict[str, EMA], settings: Train, progress: Progress, path: Path, rank: int) -> None:
    """Write one snapshot per width in settings.snapshot_stds."""
    with together():
        if rank == 0:
            for ema in averages.values():
                if ema.std in settings.snapshot_stds:
                    write_snapshot(path, ema, progress.images)


def checkpoint(task: Task, averages: dict[str, EMA], progress: Progress, path: Path, keep: int, rank: int) -> None:
    """Write a checkpoint; collective, since gathering the engines' states is."""
    tensors = {"engine": task.engine.save()} | {name: ema.average for name, ema in averages.items()}
    if task.posterior_engine is not None:
        tensors["posterior"] = task.posterior_engine.save()
    with together():
        if rank == 0:
            save_checkpoint(path, progress.images, tensors, vars(progress), keep)


def export(task: Task, averages: dict[str, EMA], progress: Progress, path: Path, notes: dict[str, Any]) -> None:
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
    weights = averages["ema"].average if "ema" in averages else task.engine.weights()
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
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter, using("torch"):
            prediction = task.paradigm.predict(task.engine.net.forward, probe, index, batch.c_B.to(task.device))
            task.paradigm.log_likelihood(prediction, probe, index)
        counted["net"] = counter.get_total_flops()
        if isinstance(task.posterior, NoisyPosterior) and task.posterior_engine is not None:
            with FlopCounterMode(display=False) as counter:
                task.posterior_engine.net.forward(probe.inputs["noisy"], probe.inputs["sigma"])
            counted["posterior"] = counter.get_total_flops()
    return counted
