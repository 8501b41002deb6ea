"""A generator out of a run or of weights, and images out of a generator: every random number of an image comes from its seed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mclr.configs.schema import FILE, PRESETS, RunConfig, load
from mclr.errors import UserError
from mclr.guidance import Guidance
from mclr.likelihood import Draws, Net, Paradigm
from mclr.models.registry import fold
from mclr.train.data.encoders import Encoder, to_uint8
from mclr.train.engine.base import rows_in
from mclr.train.training.build import choose_kernels
from mclr.train.training.networks import build_encoder, build_guidance, build_guide, build_net, build_paradigm
from mclr.train.weights.folder import find_weights, load_into, presets_of, read_config

SAMPLING = 2**63  # seed of all sampling: beyond those of training, whose random numbers no image must repeat


class WorkCounter:
    """A network that counts its work while it is used as the network itself. sums: the counter that gets it (default: this one)."""

    def __init__(self, net: Any, sums: "WorkCounter | None" = None):
        self.net, self.sums = net, sums or self
        self.work = 0.0  # rows of all calls

    def __call__(self, *inputs: Any, **cache: Any) -> Any:
        self.sums.work += rows_in(self.net, *inputs, **cache)
        return self.net(*inputs, **cache)

    def new_cache(self, rows: int) -> Any:
        return self.net.new_cache(rows)

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.net.parameters())

    def per_image(self, count: int) -> float:
        """Forwards that one of `count` images took; the scales of a token model are shares of one.

        Those of a guide count as one each whatever its size, which stands beside them (`guide_size` in sample.json). count includes
        images that only fill up a micro-batch.
        """
        return round(self.work / count, 9)


def generate(
    paradigm: Paradigm, net: Net, guidance: Guidance, c_N: Tensor, seeds: list[int], batch: int, device: torch.device
) -> Tensor:
    """Samples x [N, ...] of these conditions, in full micro-batches (the last one padded, so that kernels meet one shape)."""
    drawn = []
    for first in range(0, len(seeds), batch):
        index = [min(i, len(seeds) - 1) for i in range(first, first + batch)]
        x = paradigm.sample(net, c_N[index].to(device), guidance, Draws(SAMPLING, [seeds[i] for i in index], device))
        drawn.append(x[: len(seeds) - first])
    return torch.cat(drawn)


def to_images(encoder: Encoder, x_N: Tensor, batch: int) -> Tensor:
    """Samples -> uint8 images [N, C, H, W], decoded `batch` at a time."""
    return torch.cat([to_uint8(encoder.decode(x)).cpu() for x in x_N.split(batch)])


def find_generator(source: str, model: str | None, data: str | None, overrides: Sequence[str]) -> tuple[RunConfig, Path]:
    """(config, weights folder) of a run folder, or of weights with their presets. Raises UserError when there is neither."""
    settings = Path(source) / FILE
    if settings.is_file():
        if model or data:
            raise UserError(f"{source} is a run, its settings say which model and data: leave out --model and --data")
        if not (Path(source) / "weights").is_dir():
            raise UserError(f"run {source} has no weights: it has not finished; repeat its `mclr train` command, which goes on")
        resolved = str(settings)  # in place of all four presets, so that overrides go on top
        return load(resolved, resolved, resolved, resolved, list(overrides)), Path(source) / "weights"
    weights = find_weights(source)
    if model is None:
        if not (PRESETS / "model" / f"{source}.yaml").is_file():
            presets = presets_of(read_config(weights))
            fitting = f" ({' or '.join(presets)}, by their size)" if presets else ""
            raise UserError(f"no preset is named like the weights {source}: say by --model which one they belong to{fitting}")
        model = source
    # the objective says nothing about sampling
    return load(model, "mle", data or "digits", "auto", list(overrides)), weights


def load_generator(config: RunConfig, weights: Path, device: torch.device) -> tuple[WorkCounter, Paradigm, Encoder, Guidance]:
    """(network, paradigm, encoder, guidance): all that sampling by config.sample takes, in evaluation mode.

    The network also counts the work of the guide. Raises UserError where weights or guide do not fit the config.
    """
    choose_kernels(config, device)
    encoder = build_encoder(config, device)
    net = build_net(config, encoder)
    load_into(net, weights)
    guide = build_guide(config, net)
    for module in (net, guide):
        if module is not None:
            module.to(device).eval().requires_grad_(False)
            fold(module)
    counted = WorkCounter(net)
    guidance = build_guidance(config, None if guide is None else WorkCounter(guide, sums=counted))
    return counted, build_paradigm(config, encoder), encoder, guidance


def parse_classes(text: str | None, num_classes: int) -> list[int]:
    """ "0,3,7" -> conditions; None: all of them."""
    if text is None:
        return list(range(num_classes))
    try:
        conditions = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--classes {text}: give conditions separated by commas, as in 0,3,7") from None
    if len(set(conditions)) < len(conditions) or not all(0 <= c < num_classes for c in conditions):
        raise UserError(f"--classes {text}: give different conditions of 0..{num_classes - 1}")
    return conditions
