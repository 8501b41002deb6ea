"""The loss on fixed images with fixed random numbers, so that readings compare: of maximum likelihood, and of the run's own objective.

B images of a forward; P = B, or 2B where the objective takes generated samples too.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mclr.configs.schema import DatasetInfo, Train
from mclr.errors import UserError
from mclr.likelihood import LOSS
from mclr.loss import Loss
from mclr.objective import Objective
from mclr.train.data.dataset import Batch, SplitReader
from mclr.train.data.source import permutation
from mclr.train.engine.base import Engine, Frozen, eval_mode
from mclr.train.system.files import ignore
from mclr.train.system.ranks import collective, world
from mclr.train.training.step import Task

READING = 640  # samples of a reading of the monitor; those of a small split in turn
RANKING = 2048  # samples of the loss that ranks checkpoints: with a contrast it is noisier, by .03 on the digits with 640
BATCH = 64  # images of a forward


def readers_of(info: DatasetInfo, tolerated: float = 0.0) -> dict[str, SplitReader]:
    """Split -> its images, of those of "train" and "val" that have any. tolerated: share of a split that may be damaged."""
    return {split: SplitReader(info, split, tolerated) for split in ("train", "val") if info.splits[split].count}


def refuse_unready(info: DatasetInfo, settings: Train) -> None:
    """Raises UserError where the run is to look at held-out images, and the data has none."""
    for key in ("keep_best", "monitor_every"):
        if (value := getattr(settings, key)) and not (info.splits and info.splits["val"].count):
            raise UserError(
                f"train.{key}={json.dumps(value)} needs held-out images, {info.path} has none: prepare it with --val-share 0.1, or "
                f"leave train.{key} out"
            )


def fixed(reader: SplitReader, count: int | None = None) -> Iterator[tuple[range, Batch]]:
    """`count` (READING) samples of a split in batches, each with its positions: always the same ones; those of a small split in turn."""
    order = permutation(0, 0, len(reader.samples))
    for first in range(0, count or READING, BATCH):
        positions = range(first, first + BATCH)
        yield positions, reader.batch([int(order[p % len(order)]) for p in positions])


@contextmanager
def beside_training(together: bool, beat: Callable[[], None]) -> Iterator[Callable[[], None] | None]:
    """Work that interrupts training on all ranks. Rank 0 does it alone, or all ranks do `together`, where they share the network.

    Collective. Yields the function to call at every sign of progress, so that no watchdog takes the work for a hang; None on a rank
    that has nothing to do.
    """
    with collective(beat) as working:
        # where all ranks work, rank 0 must not talk to the others in between: each beats for itself
        yield (beat if together else working) if together or world()[0] == 0 else None


@contextmanager
def with_weights(engine: Engine, given: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the network has these weights in place of those that are trained; of some of its weights, or none.

    given: whole weights, or this rank's shards where the engine is in lockstep.
    """
    own = engine.shards() if engine.lockstep else {name: p.detach() for name, p in engine.net.named_parameters()}
    before = {name: own[name].to("cpu", copy=True) for name in given}
    try:
        for name, w in given.items():
            own[name].copy_(w)
        yield
    finally:
        for name, w in before.items():
            own[name].copy_(w)


def mle_loss(task: Task, reader: SplitReader, beat: Callable[[], None] = ignore) -> float:
    """The loss of plain maximum likelihood, every image under its own condition, without dropout or mirroring."""
    return _means(task, Loss(task.loss.paradigm, Objective()), task.engine.net, reader, READING, beat)["loss"]


class WithoutU:
    """A network whose learned log-variance u is 0, where it has one. Called past its engine, which would count the rows."""

    def __init__(self, engine: Engine):
        self.net, self.lockstep = engine.net, engine.lockstep

    def __call__(self, *inputs: Any) -> tuple[Tensor, Any]:
        answer, rest = self.net(*inputs)
        return answer, torch.zeros_like(rest) if isinstance(rest, Tensor) else rest


@dataclass(frozen=True)
class HeldOut:
    """The held-out images whose loss ranks the checkpoints of a run.

    classifier: of the posterior, the same at every reading; None: the one that the run trains, or none is needed.
    """

    task: Task
    reader: SplitReader
    classifier: nn.Module | None

    def loss(self, beat: Callable[[], None] = ignore) -> float:
        """The run's own objective: lowest is best; it may be negative. beat: called after every batch, so that no watchdog takes this
        for a hang.

        mle: mle_loss. Else it is phi of mclr/objective.py alone, and for diffusion with the learned log-variance u set to 0:
        null: (1 + lam) times the loss of maximum likelihood of the inversely guided network, whose lowest value depends on data alone.
        posterior, weighted: for diffusion the weighted squared distance to the guided denoiser (1 + lam) D_c - lam D_0, plus a constant
        that depends on data, draws and posterior; so a posterior that learns in the same run moves the loss, and ranks less well.
        With a dial, all of this over the strengths drawn. With a reference: the loss of telling the two apart. Uniform contrasts without
        a bound have no lowest loss.
        The loss as it is trained would not do: u differs between checkpoints, and with aux, which holds the error constant in its
        gradient alone, the sum is lowest at half of lam (derived; on the digits it puts the base before every checkpoint of mclr).
        """
        loss, engine, trained = self.task.loss, self.task.engine, self.task.posterior_engine
        if loss.objective.contrast == "none":
            return mle_loss(self.task, self.reader, beat)
        classifier = self.classifier if trained is None or self.classifier is not None else trained.net
        reference = loss.reference.net if isinstance(loss.reference, Frozen) else None
        guide = None if loss.guide is None else replace(loss.guide, net=loss.guide.net.net)
        for net in (classifier, reference, guide and guide.net):
            if net is not None:
                net.eval()
        loss = replace(loss, posterior=classifier, reference=reference, guide=guide)
        found = _means(self.task, loss, WithoutU(engine), self.reader, RANKING, beat)
        return found["loss"] - found["aux"]


@torch.no_grad()
def _means(task: Task, loss: Loss, net: Any, reader: SplitReader, count: int, beat: Callable[[], None]) -> dict[str, float]:
    """loss and aux of a loss, averaged over `count` samples."""
    found: list[dict[str, Tensor]] = []
    for positions, batch in fixed(reader, count):
        batches = [batch]
        if loss.objective.needs_generated and task.generated is not None:
            batches.append(task.generated.batch(positions.start, len(positions)))
        draws = replace(loss, seed=LOSS).draws(positions, task.device)
        c_P = torch.cat([each.c_B for each in batches]).to(task.device)
        x_P = task.encoder.draw(torch.cat([task.encode(each) for each in batches]), draws)
        with eval_mode(task.engine.net, task.bf16):
            found.append(loss.per_sample(net, x_P, c_P, c_P, draws, first=loss.warmup)[2])
        beat()
    return {name: torch.stack([each[name] for each in found]).mean().item() for name in ("loss", "aux")}
