"""The training loop: steps, averages, logs, snapshots, checkpoints, and a clean end whatever ends it."""

import math
import time
from pathlib import Path
from typing import Any

import torch

from mclr.configs.schema import Train
from mclr.errors import UserError
from mclr.posterior import fold_bins
from mclr.train.engine.checkpoint import best_checkpoint, checkpoints
from mclr.train.engine.ema import averages_of, rewind_snapshots
from mclr.train.system.console import progress_bar
from mclr.train.system.ranks import Interrupt, collective, gather_objects, world
from mclr.train.system.watchdog import Watchdog
from mclr.train.training.log import RunFolder
from mclr.train.training.memorisation import Monitor, mle_loss, open_images
from mclr.train.training.previews import Preview
from mclr.train.training.state import RunState, add_up, count_compute, export, forward_flops, resume, rows_of, save, snapshot
from mclr.train.training.step import Task, train_step
from mclr.train.training.throughput import Throughput


def train(
    task: Task,
    settings: Train,
    micro_batch: int,
    path: Path,
    run: RunFolder | None,
    interrupt: Interrupt,
    watchdog: Watchdog,
    preview: Preview,
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
    averages = averages_of(task.engine.shards(), settings)
    progress = resume(task, averages, path, rank, watchdog.beat)
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
        watchdog.enter("checkpoint")
        if held_out:
            progress.held_out = mle_loss(task, held_out)["mle_loss_val"]
        save(task, averages, progress, path, settings, notes, watchdog.beat)

    share, throughput = settings.batch // ranks, Throughput(vars(progress), peak, task.device)
    begun = checkpointed = progress.images
    if rank == 0 and not done() and (path / "weights").exists():
        print(f"this run had finished at {begun} images; it goes on to train.images={settings.images}")
    with progress_bar(end(), begun, quiet=rank != 0 or done()) as bar:
        while not done():
            started = time.perf_counter()
            watchdog.enter("start", progress.images // settings.batch + 1)
            # dropout draws from torch's global generator: keyed by the step, so that a resumed run repeats it
            torch.manual_seed(((settings.seed * 1_000_003 + progress.images) * 1_021 + rank) % 2**63)
            first = progress.images + rank * share
            positions = range(first, first + share)
            for source in (task.source, task.generated):
                if source is not None:
                    # its own of the first step, too: else they would come after the next one's
                    source.prefetch(positions)
                    source.prefetch(range(first + settings.batch, first + settings.batch + share))
            lr = settings.lr * min(1.0, (progress.images + settings.batch) / max(settings.warmup_images, 1))
            metrics = train_step(task, positions, micro_batch, lr, lambda: interrupt.agreed(task.device), watchdog.enter)
            if metrics is None:
                break
            progress.images += settings.batch
            shards = task.engine.shards() if averages else {}
            for ema in averages.values():
                ema.update(shards, progress.images, settings.batch)
            watchdog.enter("meet")
            sums = add_up(metrics | rows_of(task), task.device)
            means = fold_bins({name: sums[name] / ranks for name in metrics})
            count_compute(progress, sums, flops)
            progress.seconds += time.perf_counter() - started

            watchdog.enter("log")
            count_skipped(progress, task, positions, means, settings, run, path, checkpointed)
            bar.total = end()
            bar.update(settings.batch)
            if progress.images // settings.batch % settings.log_every == 0 or done():
                counts = {"images": progress.images, "rows": round(progress.rows, 3), "flops": progress.flops}
                # how far plain maximum likelihood would have come at the same cost: the length of a fair control
                counts |= {"mle_images": round(progress.flops / (3 * flops["net"])), "posterior_flops": progress.posterior_flops}
                readings = monitor.read(progress.images) if monitor else {}
                readings |= throughput.read(vars(progress), watchdog.waited, task.source.damaged)
                watchdog.waited = 0.0
                if run is not None:
                    run.log(**counts, seconds=round(progress.seconds, 3), **means, skipped=progress.skipped, **readings)
                bar.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
            if rank == 0 and notes["init"] is None and progress.images == settings.batch:
                left = bar.format_interval(progress.seconds * (end() / settings.batch - 1))
                bar.write(f"no released weights were given: training from scratch, about {left} to go by the first step")
            # before the checkpoint: a run that goes on from there does not come by here again
            if preview.due(progress.images, progress.images - settings.batch, done()):
                watchdog.enter("grid")
                preview.draw(progress.images)
            if settings.snapshot_every and (progress.images % settings.snapshot_every < settings.batch or done()):
                watchdog.enter("snapshot")
                snapshot(task, averages, settings, progress, path, rank, watchdog.beat)
            if progress.images - checkpointed >= settings.checkpoint_every:
                checkpoint()
                checkpointed = progress.images
    if progress.images > checkpointed:
        checkpoint()
    if not done():
        if rank == 0:
            print(f"stopped by a signal at {progress.images} images; the same command goes on from there")
        return 128 + interrupt.signal
    watchdog.enter("weights")
    weights = task.engine.gather(averages["ema"].average if "ema" in averages else task.engine.shards())
    with collective(watchdog.beat) as working:
        if rank == 0:
            export(task, weights, progress, path, notes, working)
            if settings.keep_best and (best := best_checkpoint(checkpoints(path))):
                print(f"best checkpoint: {best[0]}, held-out loss {best[1]:.4g}")
    return 0


class NotFinite(UserError):
    """The end of a run that went wrong. images: seen until then."""

    def __init__(self, message: str, images: int):
        super().__init__(message)
        self.images = images


def count_skipped(
    progress: RunState,
    task: Task,
    positions: range,
    means: dict[str, float],
    settings: Train,
    run: RunFolder | None,
    path: Path,
    checkpointed: int,
) -> None:
    """Where the engine made no step, since the gradient was not finite: count it, and have its samples written down. Collective.

    positions: of this rank's samples. Raises NotFinite where that happens too often in a row.
    """
    if task.engine.stepped:
        progress.skipped_in_a_row = 0
        return
    progress.skipped += 1
    progress.skipped_in_a_row += 1
    # each rank knows its own: which sample stood for a damaged one, what a stream gave
    keys = gather_objects(task.source.keys(positions.start, len(positions)))
    if run is not None:
        run.note_skipped(images=progress.images, loss=means["loss"], keys=[key for each in keys for key in each])
    if progress.skipped_in_a_row > settings.max_skipped:
        kept = f"; {path} keeps its checkpoint of {checkpointed} images" if checkpointed else ""
        times = f"{progress.skipped_in_a_row} step{'s' * (progress.skipped_in_a_row > 1)} in a row"
        what = f"gradient_norm is {means['gradient_norm']} at {progress.images} images, {times}"
        way_out = "start again with a lower train.lr or objective.lam and another --out"
        raise NotFinite(f"{what}: {way_out}{kept}", progress.images)
