"""The objective section, and the schedule of a weight (objective.lam, sample.gamma)."""

from itertools import chain
from typing import Annotated, Literal

from pydantic import BeforeValidator

from mclr.combinations import CONTRASTS, SCHEDULES
from mclr.configs.schema.section import Fraction, Positive, Section, setting

ALL = tuple(dict.fromkeys(chain(["auto"], *CONTRASTS.values())))


class Schedule(Section):
    """The shape of a weight over progress (mclr/schedule.py). configs/README.md says what progress is."""

    kind: Literal[SCHEDULES] = setting(
        "constant",
        "constant: the weight everywhere; ramp: weight x progress; interval: the weight from low to high, else 0; "
        "negative_window: the weight before turn, minus below from turn on",
    )
    low: Fraction = setting(0.0, "interval: progress at which the weight begins")
    high: Fraction = setting(1.0, "interval: progress at which the weight ends")
    turn: Fraction = setting(0.5, "negative_window: progress from which the weight is negative")
    below: float = setting(1.0, "negative_window: size of the negative weight; in training less than 1", gt=0, le=1)


# YAML reads the word null as nothing
NULL = BeforeValidator(lambda value: "null" if value is None else value)


class Guide(Section):
    """The network that guides: what the sampler's answers, or those in training, are pushed away from."""

    weights: str | None = setting(
        None, "Weights of the guide, of the same form; null: the network itself, under the null condition"
    )
    condition: Annotated[Literal["own", "null"], NULL] = setting(
        "own", "What the weights are given. own: the sample's condition (autoguidance); null: their null condition"
    )


class Objective(Section):
    """What training minimises (mclr/objective.py); mclr/combinations.py says which settings go together."""

    name: Literal[tuple(CONTRASTS)] = setting(
        ...,
        "mle: maximum likelihood, plain training; mclr: likelihood under the sample's own condition against that under a contrast; "
        "unlearn: plain training, and less likelihood under the contrast; cc_dpo, cca, ddo: likelihood ratios to the reference, a frozen "
        "copy of the weights at the start. Formulas: mclr/README.md",
    )
    contrast: Annotated[Literal[ALL], NULL] = setting(
        "auto",
        "What the sample's own condition is compared with. auto: the only one of the objective; of mclr posterior (diffusion) or null "
        "(next_scale). posterior: a condition drawn from p(c given the noisy sample); weighted: any condition, weighted by that; "
        "uniform: another condition at random; null: the null condition; none: nothing (mle); marginal: a condition as in training "
        "(cca); generated: samples of the reference (ddo)",
    )
    lam: float | None = setting(
        None,
        "Strength: of mclr, training aims at guidance of total weight 1 + lam; 0: plain training (mle); of ddo: its alpha; null: with a "
        "dial (model.strength.max), where every sample draws its own",
    )
    schedule: Schedule = Schedule()
    guide: Guide = Guide()
    bound: Positive | None = setting(
        None, "mclr of a next_scale model, not with contrast null: nats beyond which the contrast has no gradient; null: no bound"
    )
    beta: Positive | None = setting(None, "cc_dpo, cca, ddo (required there): factor of the ratio to the reference; else null")
    generated: str | None = setting(
        None, "ddo (required there): dataset folder of samples of the reference, made by `mclr sample --dataset`; else null"
    )
    truncate: float = setting(0.02, "posterior: total probability of the least likely conditions, never drawn", ge=0, lt=0.5)
