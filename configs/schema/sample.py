"""The sample section: how images are drawn."""

from typing import Literal

from mclr.configs.schema.objective import Schedule
from mclr.configs.schema.section import Count, NotNegative, Positive, Section, Whole, setting


class Sample(Section):
    """How images are drawn, by `mclr sample` and for pictures during training."""

    steps: Count = setting(32, "Diffusion: steps of the solver")
    solver: Literal["heun", "euler", "sde"] = setting("heun", "Diffusion: the solver (mclr/solvers.py)")
    batch: Count = setting(64, "Images drawn at once")
    gamma: float = setting(0.0, "Extra weight of guidance, whose total weight is 1 + gamma; 0: no guidance")
    schedule: Schedule = Schedule()
    guide: str | None = setting(None, "Weights of another network that guides; null: the same network under the null condition")
    top_k: Whole = setting(0, "Tokens: draw among the k likeliest codes; 0: all")
    top_p: float = setting(1.0, "Tokens: draw among the likeliest codes of this total probability", gt=0, le=1)
    more_smooth: bool = setting(False, "Tokens: blend codes, as VAR does for pictures; never for scores")
    churn: NotNegative = setting(0.0, "Heun: noise added again, over all steps (EDM, algorithm 2: S_churn); 0: none")
    churn_min: NotNegative = setting(0.0, "Heun: lowest sigma at which noise is added again")
    churn_max: Positive | None = setting(None, "Heun: highest sigma at which noise is added again; null: all")
    churn_noise: Positive = setting(1.0, "Heun: standard deviation of the noise added again")
    sigma_min: Positive = setting(0.002, "Diffusion: lowest noise level")
    sigma_max: Positive = setting(80.0, "Diffusion: highest noise level")
    rho: Positive = setting(7.0, "Diffusion: exponent of the spacing of noise levels (EDM, equation 5)")
