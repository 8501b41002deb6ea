"""Guidance: pred + weight * (pred - guide), one formula for the sampler and, inverted, for the objective."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mclr.likelihood import network
from mclr.schedule import NONE, Schedule


def mix(pred: Tensor, guide: Tensor, weight: Tensor | float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598) of total weight 1 + weight.

    pred, guide: raw answers [R, C, H, W] or logits [R, l, V]; only something affine may follow.
    weight: a number, or [R, T] (T = 1 or L); negative undoes guidance.
    """
    if isinstance(weight, Tensor):
        weight = weight.reshape(*weight.shape, *[1] * (pred.ndim - weight.ndim))
    return pred + weight * (pred - guide)


@dataclass(frozen=True)
class Guidance:
    """How strongly samples are guided, and by which network.

    gamma: extra weight over progress; where it is 0 the second forward is skipped. guide: another network, of the same sigma_data,
    given the same condition (autoguidance, arXiv 2406.02507); None: the same network under the null condition.
    Raises ValueError for a guide without gamma.
    """

    gamma: Schedule = NONE
    guide: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if self.guide is not None:
            object.__setattr__(self, "guide", network(self.guide, "guide"))
        if self.guide is not None and self.gamma.is_zero:
            raise ValueError("guide= has no effect without gamma: give gamma=, the extra weight of guidance")
