"""Guidance: pred + weight * (pred - guide), one formula for the sampler and, inverted, for the objective."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mclr.likelihood import Guide, guide_of, refuse_strength
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

    gamma: extra weight over progress; where it is 0 the second forward is skipped. guide: a Guide, or a network (autoguidance); None:
    the same network under the null condition. strength: where the dial of the network stands, 0 for none; a guide's stands at 0.
    Raises ValueError for a guide without gamma, and a strength that no dial has.
    """

    gamma: Schedule = NONE
    guide: Any = None
    strength: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise ValueError(f"strength={self.strength} is out of range: must be >= 0 and finite")
        object.__setattr__(self, "guide", guide_of(self.guide))
        if self.guide is not None and self.gamma.is_zero:
            raise ValueError("guide= has no effect without gamma: give gamma=, the extra weight of guidance")

    def guide_for(self, net: Any, null: int) -> Guide:
        """The guide of a network with this null condition."""
        return self.guide or Guide(net, null)

    def told(self, net: Any, c_B: Tensor) -> list[Tensor | None]:
        """The last inputs of a network whose dial does not stand at 0, after the conditions: no index, the strength of every sample.

        Raises ValueError where its dial does not go so far.
        """
        refuse_strength(net, self.strength)
        return [None, torch.full(c_B.shape, self.strength, device=c_B.device)] if self.strength else []
