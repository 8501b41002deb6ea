"""The names of objectives, contrasts and schedules, and which settings go together: for mclr.Objective and for the configuration.

This file imports no torch, so that the configuration can be checked at once.
"""

import math
from collections.abc import Iterator
from typing import Any

# The contrasts that each objective allows. For mclr the best one depends on the paradigm: posterior for diffusion, null for tokens.
CONTRASTS = {
    "mle": ("none",),
    "mclr": ("posterior", "null", "weighted", "uniform"),
    "unlearn": ("uniform",),
    "cc_dpo": ("uniform",),
    "cca": ("marginal",),
    "ddo": ("generated",),
}
WITH_REFERENCE = ("cc_dpo", "cca", "ddo")
SCHEDULES = ("constant", "ramp", "interval", "negative_window")  # kinds, which mclr/schedule.py computes


def objective_conflicts(
    objective: Any,
    lam: float | None,
    schedule: Any,
    prefix: str = "",
    diffusion: bool = False,
    conditions: int | None = None,
    strength_max: float = 0.0,
) -> Iterator[str]:
    """What is wrong with the settings of an objective, one line each.

    objective: has name, contrast, bound, beta and truncate. lam: the weight of `schedule`, which has kind and below; None: not given.
    prefix: stands before the names of settings, as in objective.lam. diffusion: whether the model is a diffusion model.
    conditions: their number, without the null condition; None: not known yet. strength_max: of the dial, 0 for none.
    """
    name, contrast, bound, beta = objective.name, objective.contrast, objective.bound, objective.beta
    yield from dial_conflicts(name, lam, schedule, prefix, strength_max)
    missing, lam = lam is None and name != "mle" and not strength_max, lam or 0.0
    if name not in CONTRASTS:
        yield f"{prefix}name={name} is unknown: expected {', '.join(CONTRASTS)}"
        return
    if not contrast:
        yield f"{prefix}name={name} needs {prefix}contrast={' or '.join(CONTRASTS[name])}"
    elif contrast not in CONTRASTS[name]:
        yield f"{prefix}contrast={contrast} is not for {prefix}name={name}: expected {' or '.join(CONTRASTS[name])}"
    if name != "mle" and conditions is not None and conditions < 2:
        yield f"objective {name} needs two conditions or more; {'data.num_classes' if prefix else 'null'}={conditions}"
    if not math.isfinite(lam):
        yield f"{prefix}lam={lam} is not finite"
    if name == "mle" and lam != 0:
        yield f"{prefix}lam={lam} has no effect with {prefix}name=mle; there it must be 0"
    yield from reference_conflicts(name, beta, None if missing else lam, schedule, prefix)
    if name in ("mclr", "unlearn"):
        negative_window = schedule.kind == "negative_window"
        if contrast == "uniform":
            if lam < 0:
                yield f"{prefix}lam={lam} is out of range: must be >= 0 with {prefix}contrast=uniform"
            if negative_window:
                yield f"{prefix}schedule.kind=negative_window needs another contrast; uniform allows no negative lam"
        elif lam <= -1:
            yield f"{prefix}lam={lam} is out of range: must be > -1 with {prefix}contrast={contrast}"
        # There lam = -below, and at lam = -1 nothing is left to learn.
        if negative_window and schedule.below == 1:
            yield f"{prefix}schedule.below=1.0 is out of range: must be > 0 and < 1 in training"
    if bound is not None:
        # The bound compares two values of one token in nats. Diffusion has a surrogate, and `null` has no contrast value.
        if name != "mclr" or contrast == "null" or diffusion:
            yield f"{prefix}bound={bound} needs mclr, a next_scale model and the contrast uniform, weighted or posterior"
        elif not bound > 0:
            yield f"{prefix}bound={bound} is out of range: must be > 0"
    if not 0 <= objective.truncate < 0.5:
        yield f"{prefix}truncate={objective.truncate} is out of range: must be >= 0 and < 0.5"
    if missing:
        yield f"missing key {prefix}lam; objective {name} needs it, like {prefix}lam=1.0"


def dial_conflicts(name: str, lam: float | None, schedule: Any, prefix: str, strength_max: float) -> Iterator[str]:
    """The rules of a dial, for objective_conflicts."""
    dial = f"{'model.strength.max' if prefix else 'strength_max'}={strength_max}"
    if not 0 <= strength_max < math.inf:
        yield f"{dial} is out of range: must be >= 0 and finite"
    elif strength_max and name != "mclr":
        yield f"{dial} needs {prefix}name=mclr: no other objective has a dial"
    elif strength_max and lam is not None:
        yield f"{prefix}lam={lam} and {dial}: give one of them; with a dial every sample draws its own lam, from 0 to the dial's end"
    elif strength_max and schedule.kind == "negative_window":
        yield f"{dial} needs another {prefix}schedule.kind than negative_window, whose lam is not in proportion to a strength"


def reference_conflicts(name: str, beta: float | None, lam: float | None, schedule: Any, prefix: str) -> Iterator[str]:
    """The rules of a reference, for objective_conflicts."""
    if name in WITH_REFERENCE:
        if beta is None:
            yield f"missing key {prefix}beta; objective {name} needs it, like {prefix}beta=0.1"
        elif beta <= 0:
            yield f"{prefix}beta={beta} is out of range: must be > 0"
        if lam is not None and (lam <= 0 or schedule.kind != "constant"):
            yield f"objective {name} needs {prefix}lam > 0 and {prefix}schedule.kind=constant: its ratio is of whole samples"
    elif beta is not None:
        yield f"{prefix}beta={beta} has no effect with {prefix}name={name}; only {', '.join(WITH_REFERENCE)} have it"
