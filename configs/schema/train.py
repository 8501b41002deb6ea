"""The train section: length, rate, averages, checkpoints, logs."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mclr.configs.schema.section import Count, Dropout, EMAStd, Fraction, NotNegative, Positive, Section


class Train(Section):
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    images: Count  # seen in total
    mle_images: Count | None = None  # end before that when the compute of so many images of plain maximum likelihood is spent
    batch: Annotated[int, Field(gt=0, lt=2**31)]  # images per step, over all ranks
    micro_batch: Count | None = None  # most images per forward of one rank; None: batch / ranks
    lr: Positive
    betas: Annotated[tuple[Dropout, Dropout], Field(strict=False)] = (0.9, 0.99)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    warmup_images: Annotated[int, Field(ge=0)] = 0
    drop_condition: Fraction = 0.1
    ema_std: float = 0.0  # relative width of the averaged weights (arXiv 2312.02696, section 3); 0: no average
    snapshot_every: Annotated[int, Field(ge=0)] = 0  # images between snapshots of averages, for `mclr convert --ema-std`; 0: none
    # relative widths of those averages
    snapshot_stds: Annotated[tuple[EMAStd, ...], Field(strict=False, min_length=2)] = (0.05, 0.1)
    checkpoint_every: Count = 1_000_000  # images
    keep: Count = 2  # checkpoints; the one before the newest serves when that is damaged
    keep_best: bool = False  # and the one of the lowest loss of maximum likelihood on held-out images
    # steps in a row with a gradient that is not finite, which change nothing; one more ends the run
    max_skipped: Annotated[int, Field(ge=0)] = 10
    log_every: Count = 10  # steps
    log_to: Annotated[tuple[Literal["tensorboard", "wandb"], ...], Field(strict=False)] = ()  # beside metrics.jsonl
    grid_every: Annotated[int, Field(ge=0)] = 0  # images between pictures of samples, always of the same seeds; 0: none
    # images between readings of the memorisation monitor (train/training/memorisation.py); 0: off
    monitor_every: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check(self) -> "Train":
        if self.ema_std != 0 and not 0.01 <= self.ema_std <= 0.25:
            raise ValueError(f"ema_std={self.ema_std} is out of range: must be 0 (no average), or >= 0.01 and <= 0.25")
        # their files are named by three
        if len({f"{std:.3f}" for std in self.snapshot_stds}) < len(self.snapshot_stds):
            raise ValueError(f"snapshot_stds={list(self.snapshot_stds)} must differ in their first three decimals")
        return self
