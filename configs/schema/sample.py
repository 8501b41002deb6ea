"""The sample section: how images are drawn."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mclr.configs.schema.schedule import Schedule
from mclr.configs.schema.section import Count, NotNegative, Positive, Section


class Sample(Section):
    steps: Count = 32
    solver: Literal["heun", "euler", "sde"] = "heun"
    batch: Count = 64
    gamma: float = 0.0  # extra guidance weight; 0: none
    schedule: Schedule = Schedule()
    guide: str | None = None  # weights (autoguidance); None: the same network under the null condition
    top_k: Annotated[int, Field(ge=0)] = 0  # 0: all
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    more_smooth: bool = False  # of tokens: blends of codes instead of codes; for pictures, never for scores
    churn: NotNegative = 0.0  # of heun: noise added again, over all steps (EDM, algorithm 2: S_churn); 0: none
    churn_min: NotNegative = 0.0  # sigma down to which it is added
    churn_max: Positive | None = None  # sigma up to which it is added; None: all
    churn_noise: Positive = 1.0  # its standard deviation
    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    rho: Positive = 7.0

    @model_validator(mode="after")
    def _check(self) -> "Sample":
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min={self.sigma_min} must be below sigma_max={self.sigma_max}")
        if self.guide is not None and self.gamma == 0 and self.schedule.kind != "negative_window":
            raise ValueError(f"guide={self.guide} has no effect with gamma=0.0; set sample.gamma, or sample.guide=null")
        if self.churn and self.solver != "heun":
            raise ValueError(f"churn={self.churn} needs solver=heun")
        if self.churn_max is not None and self.churn_min >= self.churn_max:
            raise ValueError(f"churn_min={self.churn_min} must be below churn_max={self.churn_max}")
        for key in ("churn_min", "churn_max", "churn_noise"):
            if not self.churn and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}={getattr(self, key)} has no effect with churn=0.0")
        return self
