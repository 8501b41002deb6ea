"""The objective section, and the schedule of a weight (objective.lam, sample.gamma)."""

from typing import Annotated, Literal

from pydantic import BeforeValidator

from mclr.configs.schema.section import Fraction, Positive, Section, setting


class Schedule(Section):
    """The shape of a weight over progress (mclr/schedule.py). configs/README.md says what progress is."""

    kind: Literal["constant", "ramp", "interval", "negative_window"] = setting(
        "constant", "Shape: the same everywhere; rising from 0; 0 outside an interval; negative from some progress on"
    )
    low: Fraction = setting(0.0, "Of interval: progress at which the weight begins")
    high: Fraction = setting(1.0, "Of interval: progress at which the weight ends")
    turn: Fraction = setting(0.5, "Of negative_window: progress from which the weight is negative")
    below: float = setting(1.0, "Of negative_window: from there on the weight is minus this", gt=0, le=1)


Contrast = Literal["auto", "uniform", "weighted", "posterior", "null", "none", "marginal", "generated"]


class Objective(Section):
    """What training minimises (mclr/objective.py); mclr/combinations.py says which settings go together."""

    name: Literal["mle", "mclr", "unlearn", "cc_dpo", "cca", "ddo"] = setting(..., "Objective, as mclr/README.md explains it")
    # YAML reads the word null as nothing.
    contrast: Annotated[Contrast, BeforeValidator(lambda value: "null" if value is None else value)] = setting(
        "auto", "What the matched condition is compared with; auto: for mclr posterior (diffusion) or null (next_scale)"
    )
    lam: float = setting(..., "Strength; mclr's optimum is guidance of total weight 1 + lam; of ddo: its alpha")
    schedule: Schedule = Schedule()
    bound: Positive | None = setting(
        None, "Of mclr on tokens: ratio in nats beyond which the contrast has no gradient; null: none"
    )
    beta: Positive | None = setting(None, "Of cc_dpo, cca, ddo: scale of the log-likelihood ratio to the reference")
    generated: str | None = setting(None, "Of ddo: dataset folder of samples of the reference, made by `mclr sample --dataset`")
    truncate: float = setting(0.02, "Share of the posterior, its least likely classes, that is never drawn", ge=0, lt=0.5)
