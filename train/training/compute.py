"""What a run computes: the forwards that an objective asks for, the FLOPs of one, and the rows that were run.

A row is one sample under one condition. A row that is cut short after a scale counts by its share of the tokens.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mclr.diffusion import Diffusion
from mclr.kernels.choice import using
from mclr.likelihood import Draws
from mclr.next_scale import scale_progress
from mclr.objective import Objective
from mclr.train.engine.base import Engine, Frozen
from mclr.train.training.step import Task


@dataclass(frozen=True)
class Forward:
    """One call of the network in a micro-batch: rows per sample, on so many leading terms (None: all)."""

    rows: int
    terms: int | None = None


@dataclass(frozen=True)
class Calls:
    """The most forwards that a micro-batch may need: with gradient, without (free), and of the reference. samples: of one image."""

    grad: tuple[Forward, ...]
    free: tuple[Forward, ...] = ()
    reference: tuple[Forward, ...] = ()
    samples: int = 1


def rows_per_sample(forwards: tuple[Forward, ...], terms: int) -> float:
    """Rows per sample; a row that is cut short counts by its share of the terms of a whole one."""
    return sum(forward.rows * (forward.terms or terms) / terms for forward in forwards)


def calls_of(objective: Objective, scales: tuple[int, ...] | None, num_classes: int, lockstep: bool) -> Calls:
    """scales: sides of the token maps; None: diffusion. lockstep: of ZeRO 3, where no row is cut short."""
    contrast, reference = objective.contrast, objective.needs_reference
    if contrast == "none":
        return Calls((Forward(1),))
    if contrast == "generated":
        return Calls((Forward(1),), (), (Forward(1),), samples=2)
    if scales is None:
        if contrast == "null":
            return Calls((Forward(1),), (Forward(1),))
        return Calls((Forward(2),), (), (Forward(2),) if reference else ())
    ends = list(accumulate(side * side for side in scales))
    # a term needs a contrast where its weight is not 0
    needed = [end for end, progress in zip(ends, scale_progress(scales), strict=True) if objective.schedule.at(progress)]
    if contrast == "null":
        return Calls((Forward(1),), (Forward(1, needed[-1]),) if needed else ())
    before = ends[-2] if len(ends) > 1 else 0
    free = (Forward(1, before),) * (num_classes if objective.needs_posterior and before else 0)
    drawn = needed if contrast == "posterior" else needed[-1:]
    if reference or lockstep:
        every = (Forward(1 + len(drawn)),)
        return Calls(every, free, every if reference else ())
    rows = Counter([ends[-1], *drawn])
    return Calls(tuple(Forward(count, terms) for terms, count in rows.items()), free)


def add_up(values: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Sums over the ranks of numbers and 0-d tensors, in one collective."""
    # numbers go to the device together
    numbers = torch.tensor([0.0 if isinstance(v, Tensor) else v for v in values.values()], dtype=torch.float64).to(device)
    found = [v.to(device, torch.float64) if isinstance(v, Tensor) else numbers[i] for i, v in enumerate(values.values())]
    sums = torch.stack(found)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return dict(zip(values, sums.tolist(), strict=True))


def rows_of(task: Task) -> dict[str, float]:
    """Rows that this rank ran through network, reference, posterior classifier and guide since the last call."""
    rows = {"rows": task.engine.rows["grad"], "rows_no_grad": task.engine.rows["no_grad"], "posterior_rows": 0, "guide_rows": 0}
    engines: list[Engine] = [task.engine]
    if task.posterior_engine is not None:
        rows["posterior_rows"] = task.posterior_engine.rows["grad"]
        engines.append(task.posterior_engine)
    if isinstance(task.loss.reference, Frozen):
        rows["rows_no_grad"] += task.loss.reference.rows["no_grad"]
        task.loss.reference.rows.update(no_grad=0)
    if (guide := task.loss.guide) is not None:
        rows["guide_rows"] = guide.net.rows["no_grad"]
        guide.net.rows.update(no_grad=0)
    for engine in engines:
        engine.rows.update(grad=0, no_grad=0)
    return rows


@torch.no_grad()
def forward_flops(task: Task) -> dict[str, int]:
    """FLOPs of one row's forward, counted by torch: of the network ("net"), the posterior classifier ("posterior") and the guide."""
    batch = task.source.batch(0, 1)
    draws = Draws(0, [0], task.device)
    x_B = task.encoder.draw(task.encode(batch), draws)
    probe = task.loss.paradigm.probe(x_B, draws)
    index = torch.zeros(1, dtype=torch.int64, device=task.device)

    def value(net: Any, c_B: Tensor) -> None:
        prediction = task.loss.paradigm.predict(net, probe, index, c_B.to(task.device))
        task.loss.paradigm.log_likelihood(prediction, probe, index)

    counted = {"net": flops_of(lambda: value(task.engine.net, batch.c_B)), "posterior": 0, "guide": 0}
    if (guide := task.loss.guide) is not None:
        # in its own precision: it may store linear layers in bf16
        with guide.net.autocast:
            counted["guide"] = flops_of(lambda: value(guide.net.net, guide.conditions(batch.c_B)))
    if task.posterior_engine is not None:
        classifier, paradigm = task.posterior_engine.net, task.loss.paradigm
        assert isinstance(paradigm, Diffusion)
        counted["posterior"] = flops_of(lambda: classifier(*paradigm.noisy(probe)))
    return counted


def flops_of(run: Callable[[], Any]) -> int:
    """FLOPs of a call, without gradient, as torch counts them."""
    # plain operations: torch does not count all of what compiled code, fused attention and our kernels run
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        torch.compiler.set_stance("force_eager"),
        using("torch"),
        FlopCounterMode(display=False) as counter,
    ):
        run()
    return counter.get_total_flops()
