"""How a weight depends on progress: the same object serves lam in training and gamma in sampling."""

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from mclr.combinations import SCHEDULES


@dataclass(frozen=True)
class Schedule:
    """Weight as a function of progress in [0, 1] (0 pure noise or coarsest scale, 1 data or finest scale).

    | kind            | weight at progress p                                                        |
    | constant        | weight                                                                      |
    | ramp            | weight * p, VAR's rising guidance (arXiv 2404.02905)                        |
    | interval        | weight where low <= p <= high, else 0 (arXiv 2404.07724)                    |
    | negative_window | +weight before `turn` (high noise), -below from `turn` on (derived)         |
    """

    kind: str
    weight: float
    low: float = 0.0
    high: float = 1.0
    turn: float = 0.5
    below: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"schedule kind {self.kind!r} is not one of {', '.join(SCHEDULES)}")
        if not isinstance(self.weight, Real) or not math.isfinite(self.weight):
            raise ValueError(f"weight={self.weight!r} of a schedule must be a finite number")
        if not (0 <= self.low <= self.high <= 1 and 0 <= self.turn <= 1 and 0 < self.below <= 1):
            raise ValueError(f"{self} is out of range: needs 0 <= low <= high <= 1, 0 <= turn <= 1 and 0 < below <= 1")

    def __call__(self, progress: Tensor) -> Tensor:
        """Weights of the shape of `progress`, fp32."""
        progress = progress.float()
        full = torch.full_like(progress, self.weight)
        if self.kind == "ramp":
            return full * progress
        if self.kind == "interval":
            return full * ((progress >= self.low) & (progress <= self.high))
        if self.kind == "negative_window":
            return torch.where(progress < self.turn, full, torch.full_like(progress, -self.below))
        return full

    def at(self, progress: float) -> float:
        """The weight at one progress."""
        return float(self(torch.tensor(progress)))

    @property
    def is_zero(self) -> bool:
        """Whether the weight is 0 everywhere."""
        return self.weight == 0 and self.kind != "negative_window"

    @property
    def bounds(self) -> tuple[float, ...]:
        """The progresses at which the weight jumps."""
        return {"interval": (self.low, self.high), "negative_window": (self.turn,)}.get(self.kind, ())


NONE = Schedule("constant", 0.0)
