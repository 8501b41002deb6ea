"""One training step: it never learns which paradigm, objective or engine runs."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mclr.likelihood import Draws, Paradigm, score
from mclr.objective import Objective
from mclr.posterior import NoisyPosterior, PrefixPosterior, calibration
from mclr.train.data.dataset import Batch
from mclr.train.data.encoders import Encoder, from_uint8, mirrored
from mclr.train.data.source import Source
from mclr.train.engine.base import Engine, Frozen
from mclr.train.engine.zero import Sharded

# where the random numbers of generated samples begin: beyond all positions of training
GENERATED = 2**62


def ignore(phase: str) -> None:
    """For whoever does not want to hear what a step is doing."""


@dataclass
class Task:
    """What one run optimises, and on what: fixed for its lifetime.

    normalised: weights kept at unit magnitude (EDM2's forced weight normalisation). reference: the network as it was before
    fine-tuning; generated: samples drawn from it; both None where the objective asks for none. null: index of the null condition.
    posterior_warmup: images that the classifier learns from before there is any ratio.
    """

    source: Source
    encoder: Encoder
    paradigm: Paradigm
    objective: Objective
    engine: Engine
    normalised: list[nn.Parameter]
    posterior: NoisyPosterior | PrefixPosterior | None
    posterior_engine: Engine | None
    posterior_lr: float
    posterior_warmup: int
    reference: Frozen | Sharded | None
    generated: Source | None
    null: int
    seed: int
    drop_condition: float
    flip: bool
    bf16: bool
    device: torch.device

    def samples(self, first: int, count: int, enter: Callable[[str], None] = ignore) -> tuple[Tensor, Tensor, Tensor, Draws]:
        """(x, conditions, conditions before some were dropped, random numbers) of the samples at these global positions.

        P = B samples, or 2B where the objective asks for generated ones: as many of those after the real ones.
        """
        enter("data")
        keys, batches = list(range(first, first + count)), [self.source.batch(first, count)]
        if self.generated is not None:
            keys += [GENERATED + position for position in keys]
            batches.append(self.generated.batch(first, count))
        enter("compute")
        draws = Draws(self.seed, keys, self.device)
        flips = (draws.uniform() < 0.5).split(count) if self.flip else [None] * len(batches)
        stored_P = torch.cat([self.encode(*each) for each in zip(batches, flips, strict=True)])
        true_c_P = torch.cat([batch.c_B for batch in batches]).to(self.device)
        dropped_P = draws.uniform() < self.drop_condition
        # a generated sample keeps the condition it was drawn for
        dropped_P[count:] = False
        return self.encoder.draw(stored_P, draws), torch.where(dropped_P, self.null, true_c_P), true_c_P, draws

    def encode(self, batch: Batch, flip_B: Tensor | None = None) -> Tensor:
        """What the encoder may store of a batch, its images mirrored where flip_B says so.

        Drawn tokens are taken as they are: decoded, rounded and encoded again most of them would be others.
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

    stopped: asked before every micro-batch; when it says yes, the step is given up with the weights as they were. enter: is told what
    comes next: "meet" (the other ranks), "data" (waiting for files), "compute" or "optimizer".
    Returns averages over the positions, 0-d tensors, or None when given up. Losses are divided by the number of samples, never by
    that of rows.
    """
    totals: dict[str, Tensor] = {}
    for first in range(positions.start, positions.stop, micro_batch):
        enter("meet")
        if stopped():
            return None
        x_P, c_P, true_c_P, draws = task.samples(first, micro_batch, enter)
        probe = task.paradigm.probe(x_P, draws)

        posterior_BTK, posterior_loss_B = task.posterior(probe, true_c_P) if task.posterior else (None, None)
        # a classifier that knows nothing yet draws any condition: that ratio has no bound, and the network would not recover
        objective = task.objective if first >= task.posterior_warmup else replace(task.objective, lam=0.0)
        rows = objective.rows(probe, c_P, task.null, draws, posterior_BTK)
        scores = score(task.paradigm, task.engine, probe, rows, task.null, task.reference, task.engine.lockstep)
        loss_B, metrics = objective(scores, rows)
        task.engine.backward(loss_B.mean())
        metrics["loss"] = loss_B.detach().mean()
        if posterior_BTK is not None:
            metrics |= calibration(posterior_BTK, true_c_P, task.objective.truncate)
        if task.posterior_engine is not None and posterior_loss_B is not None:
            task.posterior_engine.backward(posterior_loss_B.mean())
            metrics["posterior_loss"] = posterior_loss_B.detach().mean()
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0) + value * micro_batch / len(positions)

    enter("optimizer")
    totals["gradient_norm"] = task.engine.step(lr)
    if task.normalised and task.engine.stepped:
        task.engine.force_weights(task.normalised)
    if task.posterior_engine is not None:
        task.posterior_engine.step(task.posterior_lr)
    return totals
