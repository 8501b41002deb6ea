"""One training step: it never learns which paradigm, objective or engine runs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mclr.likelihood import Draws, Paradigm, score
from mclr.objective import Objective
from mclr.posterior import NoisyPosterior, PrefixPosterior, calibration
from models.blocks import normalize
from train.data import Source
from train.encoders import Encoder, from_uint8
from train.engine import Engine, Frozen

# where the random numbers of generated samples begin: beyond all positions of training
GENERATED = 2**62


@dataclass
class Task:
    """What one run optimises, and on what: fixed for its lifetime.

    normalised: weights kept at unit magnitude (EDM2's forced weight normalisation). reference: the network as it was before
    fine-tuning; generated: samples drawn from it; both None where the objective asks for none. null: index of the null condition.
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
    reference: Frozen | None
    generated: Source | None
    null: int
    seed: int
    drop_condition: float
    flip: bool
    device: torch.device


def train_step(
    task: Task, positions: range, micro_batch: int, lr: float, stopped: Callable[[], object]
) -> dict[str, Tensor] | None:
    """Train on the samples at these global positions (this rank's share of the batch), micro_batch at a time.

    stopped: asked before every micro-batch; when it says yes, the step is given up with the weights as they were.
    Returns averages over the positions, 0-d tensors, or None when given up. Losses are divided by the number of samples, never by
    that of rows.
    """
    totals: dict[str, Tensor] = {}
    for first in range(positions.start, positions.stop, micro_batch):
        if stopped():
            return None
        batch, keys = task.source.batch(first, micro_batch), list(range(first, first + micro_batch))
        if task.generated is not None:
            batch = batch.cat(task.generated.batch(first, micro_batch))
            keys += [GENERATED + position for position in keys]
        draws = Draws(task.seed, keys, task.device)
        x_B = task.encoder.encode(to_image(batch.image_BCHW.to(task.device), draws, task.flip))
        true_c_B = batch.c_B.to(task.device)
        c_B = torch.where(draws.uniform() < task.drop_condition, task.null, true_c_B)
        c_B[micro_batch:] = true_c_B[micro_batch:]  # a generated sample keeps the condition it was drawn for
        probe = task.paradigm.probe(x_B, draws)

        posterior_BTK, posterior_loss_B = task.posterior(probe, true_c_B) if task.posterior else (None, None)
        rows = task.objective.rows(probe, c_B, task.null, draws, posterior_BTK)
        scores = score(task.paradigm, task.engine, probe, rows, task.null, task.reference)
        loss_B, metrics = task.objective(scores, rows)
        task.engine.backward(loss_B.mean())
        metrics["loss"] = loss_B.detach().mean()
        if posterior_BTK is not None:
            metrics |= calibration(posterior_BTK, true_c_B, task.objective.truncate)
        if task.posterior_engine is not None and posterior_loss_B is not None:
            task.posterior_engine.backward(posterior_loss_B.mean())
            metrics["posterior_loss"] = posterior_loss_B.detach().mean()
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0) + value * micro_batch / len(positions)

    totals["gradient_norm"] = task.engine.step(lr)
    task.engine.project(task.normalised, normalize)
    if task.posterior_engine is not None:
        task.posterior_engine.step(task.posterior_lr)
    return totals


def to_image(image_BCHW: Tensor, draws: Draws, flip: bool) -> Tensor:
    """uint8 -> [-1, 1], mirrored left to right for half of the samples when `flip`."""
    image = from_uint8(image_BCHW)
    if flip:
        image = torch.where(draws.uniform()[:, None, None, None] < 0.5, image.flip(-1), image)
    return image
