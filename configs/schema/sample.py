"""The sample section: how images are drawn."""

from typing import Annotated, Literal

from pydantic import BeforeValidator

from mclr.configs.schema.objective import Guide, Schedule
from mclr.configs.schema.section import Count, NotNegative, Positive, Section, Whole, setting


class Sample(Section):
    """How images are drawn, by `mclr sample` and for pictures during training."""

    steps: Count = setting(32, "diffusion: steps of the solver")
    solver: Literal["heun", "euler", "sde", "heun_tau", "euler_maruyama"] = setting(
        "heun",
        "diffusion: the solver. heun: second order, two forwards per step; euler: one forward, on the network's own grid (DDIM for DiT); "
        "sde: heun with new noise per step; of flows, in equal steps of time: heun_tau, and euler_maruyama, one forward and new noise",
    )
    batch: Count = setting(64, "Images drawn at once")
    gamma: float = setting(0.0, "Extra weight of guidance, whose total weight is 1 + gamma; 0: no guidance")
    schedule: Schedule = Schedule()
    strength: NotNegative = setting(0.0, "Where the dial stands, from 0, plain, to model.strength.max")
    guided_channels: Count | None = setting(None, "diffusion: guidance acts on the first so many channels; null: on all")
    # a name alone is its weights: so runs from before there was a condition are read
    guide: Annotated[
        Guide, BeforeValidator(lambda value: {"weights": value} if value is None or isinstance(value, str) else value)
    ] = Guide()
    top_k: Whole = setting(0, "next_scale: draw among the k likeliest codes; 0: among all")
    top_p: float = setting(1.0, "next_scale: draw among the likeliest codes of this total probability", gt=0, le=1)
    more_smooth: bool = setting(False, "next_scale: blend codes, as VAR does for pictures; not for scores")
    churn: NotNegative = setting(0.0, "heun: noise added again, over all steps (EDM, algorithm 2: S_churn); 0: none")
    churn_min: NotNegative = setting(0.0, "heun: lowest sigma at which noise is added again")
    churn_max: Positive | None = setting(None, "heun: highest sigma at which noise is added again; null: no limit")
    churn_noise: Positive = setting(1.0, "heun: standard deviation of the noise added again")
    sigma_min: Positive = setting(0.002, "diffusion: lowest noise level")
    sigma_max: Positive = setting(80.0, "diffusion: highest noise level")
    rho: Positive = setting(7.0, "diffusion: exponent of the spacing of noise levels (EDM, equation 5)")
