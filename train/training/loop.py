"""The training loop: steps, averages, logs, snapshots, checkpoints, and a clean end whatever ends it."""

import math
import time
from dataclasses import dataclass

import torch

from mclr.errors import UserError
from mclr.posterior import fold_bins
from mclr.train.engine.ema import rewind_snapshots
from mclr.train.system.console import progress_bar
from mclr.train.system.ranks import Interrupt, gather_objects, world
from mclr.train.system.watchdog import Watchdog
from mclr.train.training.compute import add_up, forward_flops, rows_of
from mclr.train.training.memorisation import Monitor
from mclr.train.training.previews import Preview
from mclr.train.training.state import Keeper
from mclr.train.training.step import Task, train_step
from mclr.train.training.throughput import Throughput


@dataclass
class Session:
    """A run on this rank, from its newest checkpoint to its end. Its methods are collective.

    It trains until settings.images have been seen, or the compute of settings.mle_images is spent. micro_batch: images of a forward.
    """

    task: Task
    micro_batch: int
    keeper: Keeper
    interrupt: Interrupt
    watchdog: Watchdog
    throughput: Throughput
    preview: Preview
    monitor: Monitor

    def __post_init__(self) -> None:
        self.settings, self.folder, (self.rank, _, self.ranks) = self.keeper.settings, self.keeper.folder, world()
        self.state = self.keeper.resume()
        if self.folder is not None:
            self.folder.rewind(self.state.images)
            rewind_snapshots(self.folder.path, self.state.images)
        self.checkpointed = self.state.images
        self.throughput.start(vars(self.state))
        self.flops = forward_flops(self.task)
        self.budget = 3 * self.flops["net"] * (self.settings.mle_images or math.inf)

    def run(self) -> int:
        """Train to the end. Returns 0, or 128 + the signal that ended the run after a checkpoint.

        Raises UserError when too many steps in a row are not finite; the newest checkpoint then still stands.
        """
        begun = self.state.images
        if self.rank == 0 and not self.done() and (self.keeper.path / "weights").exists():
            print(f"this run had finished at {begun} images; it goes on to train.images={self.settings.images}")
        with progress_bar(self.end(), begun, quiet=self.rank != 0 or self.done()) as self.bar:
            while not self.done() and self.step():
                self.log()
                self.save()
        return self.finish()

    def done(self) -> bool:
        return self.state.flops >= self.budget or self.state.images >= self.settings.images

    def end(self) -> int:
        """Images seen at the end, estimated from the cost of those seen so far."""
        state = self.state
        affordable = state.images * self.budget / state.flops if state.flops else math.inf
        return max(state.images, math.ceil(min(self.settings.images, affordable)))

    def step(self) -> bool:
        """Train on the next batch. False where a signal made the ranks give it up: the weights are as they were."""
        task, settings, state = self.task, self.settings, self.state
        started = time.perf_counter()
        self.watchdog.enter("start", state.images // settings.batch + 1)
        # dropout draws from torch's global generator: seeded by the step, so that a resumed run repeats it
        torch.manual_seed(((settings.seed * 1_000_003 + state.images) * 1_021 + self.rank) % 2**63)
        share = settings.batch // self.ranks
        first = state.images + self.rank * share
        self.positions = range(first, first + share)
        for source in (task.source, task.generated):
            if source is not None:
                # this step's samples before the next step's: of the first step nobody has asked for them
                source.prefetch(self.positions)
                source.prefetch(range(first + settings.batch, first + settings.batch + share))
        lr = settings.lr * min(1.0, (state.images + settings.batch) / max(settings.warmup_images, 1))
        metrics = train_step(
            task, self.positions, self.micro_batch, lr, lambda: self.interrupt.agreed(task.device), self.watchdog.enter
        )
        if metrics is None:
            return False
        state.images += settings.batch
        shards = task.engine.shards() if self.keeper.averages else {}
        for ema in self.keeper.averages.values():
            ema.update(shards, state.images, settings.batch)
        self.watchdog.enter("meet")
        sums = add_up(metrics | rows_of(task), task.device)
        self.means = fold_bins({name: sums[name] / self.ranks for name in metrics})
        state.count(sums, self.flops)
        state.seconds += time.perf_counter() - started
        return True

    def log(self) -> None:
        """Say what the last step did: a line of metrics where one is due, the progress bar, a gradient that was not finite."""
        settings, state = self.settings, self.state
        self.watchdog.enter("log")
        self.count_skipped()
        self.bar.total = self.end()
        self.bar.update(settings.batch)
        if state.images // settings.batch % settings.log_every == 0 or self.done():
            # what plain maximum likelihood would have trained on at the same cost: the length of a fair control
            mle_images = round(state.flops / (3 * self.flops["net"]))
            readings = self.monitor.read(state.images)
            readings |= self.throughput.read(vars(state), self.watchdog.waited, self.task.source.damaged)
            self.watchdog.waited = 0.0
            if self.folder is not None:
                self.folder.log(
                    images=state.images,
                    rows=round(state.rows, 3),
                    flops=state.flops,
                    mle_images=mle_images,
                    posterior_flops=state.posterior_flops,
                    seconds=round(state.seconds, 3),
                    **self.means,
                    skipped=state.skipped,
                    **readings,
                )
            self.bar.set_postfix(loss=f"{self.means['loss']:.4f}", refresh=False)

    def count_skipped(self) -> None:
        """Count and write down a step that changed nothing, since its gradient was not finite.

        Raises UserError where that happens too often in a row.
        """
        state, means = self.state, self.means
        if self.task.engine.stepped:
            state.skipped_in_a_row = 0
            return
        state.skipped += 1
        state.skipped_in_a_row += 1
        # each rank knows its own samples: which one stood for a damaged one, what a stream gave
        keys = gather_objects(self.task.source.keys(self.positions.start, len(self.positions)))
        if self.folder is not None:
            self.folder.note_skipped(images=state.images, loss=means["loss"], keys=[key for each in keys for key in each])
        if state.skipped_in_a_row > self.settings.max_skipped:
            kept = f"; {self.keeper.path} keeps its checkpoint of {self.checkpointed} images" if self.checkpointed else ""
            times = f"{state.skipped_in_a_row} step{'s' * (state.skipped_in_a_row > 1)} in a row"
            what = f"gradient_norm is {means['gradient_norm']} at {state.images} images, {times}"
            way_out = "start again with a lower train.lr or objective.lam and another --out"
            raise UserError(f"{what}: {way_out}{kept}")

    def save(self) -> None:
        """Write the picture, the snapshots and the checkpoint that are due after a step, in this order: a run that goes on from
        the checkpoint does not come back to the others."""
        settings, images = self.settings, self.state.images
        if self.preview.due(images, images - settings.batch, self.done()):
            self.watchdog.enter("grid")
            self.preview.write(images)
        if settings.snapshot_every and (images % settings.snapshot_every < settings.batch or self.done()):
            self.watchdog.enter("snapshot")
            self.keeper.snapshot(self.state)
        if images - self.checkpointed >= settings.checkpoint_every:
            self.checkpoint()

    def checkpoint(self) -> None:
        self.watchdog.enter("checkpoint")
        self.keeper.checkpoint(self.state)
        self.checkpointed = self.state.images

    def finish(self) -> int:
        """Write the last checkpoint, and the weights of a run that is done. Returns the exit status."""
        if self.state.images > self.checkpointed:
            self.checkpoint()
        if not self.done():
            if self.rank == 0:
                print(f"stopped by a signal at {self.state.images} images; the same command goes on from there")
            return 128 + self.interrupt.signal
        self.watchdog.enter("weights")
        self.keeper.export(self.state)
        return 0
