"""The schedule of a weight, as objective.schedule and sample.schedule hold it."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mclr.configs.schema.section import Fraction, Section


class Schedule(Section):
    """The shape of a weight over progress (mclr/schedule.py); the weight itself is objective.lam or sample.gamma.

    Bounds are progresses: of a noise level (4.382 - ln sigma) / 10.597, mclr/diffusion.py; of scale k of K k / (K - 1). `mclr train
    --dry-run` and `mclr sample` show the weight at each, with its sigma or scale.
    """

    kind: Literal["constant", "ramp", "interval", "negative_window"] = "constant"
    low: Fraction = 0.0  # interval: first progress of the weight
    high: Fraction = 1.0  # interval: last progress of the weight
    turn: Fraction = 0.5  # negative_window: progress at which the weight turns negative
    below: Annotated[float, Field(gt=0, le=1)] = 1.0  # negative_window: the weight is -below from there on

    @model_validator(mode="after")
    def _check(self) -> "Schedule":
        owner = {"low": "interval", "high": "interval", "turn": "negative_window", "below": "negative_window"}
        for name, kind in owner.items():
            if kind != self.kind and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}={getattr(self, name)} has no effect with kind={self.kind}; it belongs to kind={kind}")
        if self.low >= self.high:
            raise ValueError(f"low={self.low} must be below high={self.high}")
        return self
