"""One training step: the samples of a run, and the optimizer step on their loss (mclr/loss.py)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mclr.likelihood import Draws
from mclr.loss import Loss
from mclr.train.data.dataset import Batch
from mclr.train.data.encoders import Encoder, from_uint8, mirrored
from mclr.train.data.source import Source
from mclr.train.engine.base import Engine


def ignore(phase: str) -> None:
    """Report no phase of a step."""


@dataclass
class Task:
    """What one run optimises, and on what: fixed for its lifetime.

    normalised: weights kept at unit magnitude (EDM2's forced weight normalisation). posterior_engine: carries the classifier of
    loss.posterior, None where there is none. generated: samples of the reference, None where the objective asks for none.
    """

    source: Source
    encoder: Encoder
    loss: Loss
    engine: Engine
    normalised: list[nn.Parameter]
    posterior_engine: Engine | None
    posterior_lr: float
    generated: Source | None
    flip: bool
    bf16: bool
    device: torch.device

    def samples(self, first: int, count: int, enter: Callable[[str], None] = ignore) -> tuple[Tensor, Tensor, Tensor, Draws]:
        """(x, conditions, conditions before some were dropped, random numbers) of the samples at these global positions.

        P = B samples, or 2B where the objective asks for generated ones: as many of those after the real ones.
        """
        enter("data")
        batches = [self.source.batch(first, count)]
        if self.generated is not None:
            batches.append(self.generated.batch(first, count))
        enter("compute")
        draws = self.loss.draws(range(first, first + count), self.device)
        flips = (draws.uniform() < 0.5).split(count) if self.flip else [None] * len(batches)
        stored_P = torch.cat([self.encode(*each) for each in zip(batches, flips, strict=True)])
        true_c_P = torch.cat([batch.c_B for batch in batches]).to(self.device)
        c_P = self.loss.drop(true_c_P, draws, count)
        return self.encoder.draw(stored_P, draws), c_P, true_c_P, draws

    def encode(self, batch: Batch, flip_B: Tensor | None = None) -> Tensor:
        """What the encoder may store of a batch, with the images mirrored where flip_B is true.

        Drawn tokens are used as they are: most would change if they were decoded, rounded and encoded again.
        """
        if batch.tokens_BL is not None:
            return batch.tokens_BL.to(self.device)
        if batch.stored_BV is not None:
            stored_BV = batch.stored_BV.to(self.device)
            return stored_BV[:, 0] if flip_B is None else stored_BV[torch.arange(len(flip_B), device=self.device), flip_B.long()]
        image_BCHW = from_uint8(batch.image_BCHW.to(self.device))
        return self.encoder.encode(image_BCHW if flip_B is None else mirrored(image_BCHW, flip_B))


def train_step(
    task: Task,
    positions: range,
    micro_batch: int,
    lr: float,
    stopped: Callable[[], object],
    enter: Callable[[str], None] = ignore,
) -> dict[str, Tensor] | None:
    """Train on the samples at these global positions (this rank's share of the batch), micro_batch at a time.

    stopped: asked before every micro-batch; a true answer gives up the step and leaves the weights as they were. enter: called with
    the phase that begins: "meet" (the other ranks), "data" (waiting for files), "compute" or "optimizer".
    Returns averages over the positions, 0-d tensors, or None when the step was given up. Losses are divided by the number of
    samples, never by that of rows.
    """
    totals: dict[str, Tensor] = {}
    for first in range(positions.start, positions.stop, micro_batch):
        enter("meet")
        if stopped():
            return None
        x_P, c_P, true_c_P, draws = task.samples(first, micro_batch, enter)
        loss_B, posterior_loss_B, metrics = task.loss.per_sample(task.engine, x_P, c_P, true_c_P, draws, first)
        task.engine.backward(loss_B.mean())
        if task.posterior_engine is not None and posterior_loss_B is not None:
            task.posterior_engine.backward(posterior_loss_B.mean())
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0) + value * micro_batch / len(positions)

    enter("optimizer")
    totals["gradient_norm"] = task.engine.step(lr)
    if task.normalised and task.engine.stepped:
        task.engine.force_weights(task.normalised)
    if task.posterior_engine is not None:
        task.posterior_engine.step(task.posterior_lr)
    return totals
