"""The objective section. What goes with which objective: mclr/combinations.py."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from mclr.configs.schema.schedule import Schedule
from mclr.configs.schema.section import Positive, Section

Contrast = Literal["auto", "uniform", "weighted", "posterior", "null", "none", "marginal", "generated"]


class Objective(Section):
    name: Literal["mle", "mclr", "unlearn", "cc_dpo", "cca", "ddo"]
    # YAML reads the word null as nothing.
    contrast: Annotated[Contrast, BeforeValidator(lambda value: "null" if value is None else value)] = "auto"
    lam: float
    schedule: Schedule = Schedule()
    bound: Positive | None = None  # nats
    beta: Positive | None = None  # of cc_dpo, cca, ddo: scale of the log-likelihood ratio to the reference
    generated: str | None = None  # of ddo: dataset folder of samples of the reference, as `mclr sample --dataset` makes it
    truncate: Annotated[float, Field(ge=0, lt=0.5)] = 0.02  # share of the posterior (its least likely classes) never drawn
