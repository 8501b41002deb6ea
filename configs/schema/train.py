"""The train section: length, learning rate, averages, checkpoints, logs."""

from typing import Annotated, Literal

from mclr.configs.schema.section import Count, Dropout, Fraction, NotNegative, Positive, Section, Whole, setting
from mclr.models.options import Within

Stds = Annotated[tuple[Annotated[float, Within(ge=0.01, le=0.25)], ...], Within(min_length=2, max_length=16)]
Betas = Annotated[tuple[Dropout, Dropout], Within()]
Trackers = Annotated[tuple[Literal["tensorboard", "wandb"], ...], Within(min_length=0, max_length=2)]


class Train(Section):
    """How training runs. Lengths and intervals are in images seen, over all ranks."""

    seed: int = setting(0, "Seed of all random numbers", ge=0, lt=2**63)
    images: Count = setting(..., "Images seen in total")
    mle_images: Count | None = setting(None, "Stop at the compute that mle needs for so many images; null: at train.images")
    batch: int = setting(..., "Images per step, over all ranks", gt=0, lt=2**31)
    micro_batch: Count | None = setting(None, "Most images per forward of one rank; null: batch / ranks")
    lr: Positive = setting(..., "Learning rate of AdamW")
    betas: Betas = setting((0.9, 0.99), "Decay rates of AdamW's averages of the gradient and of its square")
    eps: Positive = setting(1e-8, "Epsilon of AdamW")
    weight_decay: NotNegative = setting(0.0, "Weight decay of AdamW")
    warmup_images: Whole = setting(0, "Images over which the learning rate rises from 0; 0: none")
    drop_condition: Fraction = setting(0.1, "Share of images whose condition is replaced by the null condition")
    ema_std: float = setting(0.0, "Relative width of the averaged weights (arXiv 2312.02696, section 3), 0.01 to 0.25; 0: none")
    snapshot_every: Whole = setting(0, "Images between snapshots of averages, for `mclr convert --ema-std`; 0: none")
    snapshot_stds: Stds = setting((0.05, 0.1), "Relative widths of the averages in snapshots, two or more")
    checkpoint_every: Count = setting(1_000_000, "Images between checkpoints")
    keep: Count = setting(2, "Checkpoints that stay; if the newest is damaged, the run goes on from the one before")
    keep_best: bool = setting(False, "Keep also the checkpoint with the lowest loss of the run's objective on held-out images")
    max_skipped: Whole = setting(10, "Steps in a row that may be skipped as their gradient is not finite; one more ends the run")
    log_every: Count = setting(10, "Steps between lines of metrics.jsonl")
    log_to: Trackers = setting((), "Trackers that get the same numbers as metrics.jsonl")
    grid_every: Whole = setting(0, "Images between pictures of samples, always of the same seeds; 0: none")
    monitor_every: Whole = setting(0, "Images between readings of the memorisation monitor; 0: none")
