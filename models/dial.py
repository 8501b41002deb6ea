"""The dial: a network that is told the strength s of its answer, trained for every lam = s from 0 to its end.

R rows; D width. s is 0 or more; 0 is the plain network.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mclr.errors import UserError

FEATURES = 256


def features(value_B: Tensor) -> Tensor:
    """Cosines, then sines, of a number at falling frequencies: [B] -> [B, 256], fp32."""
    half = FEATURES // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, device=value_B.device))
    angles = value_B[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def log_strength(strength_R: Tensor | None, c_R: Tensor) -> Tensor:
    """ln(1 + s), [R] fp32. strength_R: None stands for 0."""
    return torch.zeros(c_R.shape, device=c_R.device) if strength_R is None else strength_R.float().log1p()


class Dial(nn.Module):
    """What the strength adds to the embedded condition of a row, [R, D]: 0 before training, and always for the null condition."""

    def __init__(self, D: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, D), nn.SiLU(), nn.Linear(D, D))
        for parameter in self.layers[2].parameters():
            nn.init.zeros_(parameter)

    def forward(self, strength_R: Tensor | None, c_R: Tensor, null: int) -> Tensor:
        return self.layers(features(log_strength(strength_R, c_R))) * (c_R != null)[:, None]


@torch.no_grad()
def folded(net: Any, strength: float) -> Any:
    """A copy without a dial that answers as this network at one strength. Raises UserError where there is no such network."""
    end = getattr(net.config, "strength_max", 0.0)
    if not end:
        raise UserError("these weights have no dial: leave out --strength")
    if not 0 <= strength <= end:
        raise UserError(f"--strength {strength:g} is out of range: the dial of these weights goes from 0 to {end:g}")
    if not hasattr(net, "embed_condition"):
        raise UserError(
            f"the dial of an {type(net).__name__} cannot be folded: it normalises the layer of its conditions, to which the strength "
            "would be added. Keep the weights as they are, and sample with sample.strength"
        )
    config = replace(net.config, strength_max=0.0)
    plain, entries = type(net)(config), net.state_dict()
    plain.load_state_dict({name: entries[name] for name in plain.state_dict()})
    c_K = torch.arange(config.num_classes)
    plain.embed_condition.weight[:-1] += net.dial(torch.full(c_K.shape, strength), c_K, config.num_classes)
    return plain
