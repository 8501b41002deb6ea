"""Carry a network over to other conditions: only the layer that embeds the conditions changes.

sources[c]: the old condition that the new condition c takes over; None: a fresh one. K old and k new conditions; D width; E embedding.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mclr.errors import UserError
from mclr.kernels.magnitude import normalize

Sources = Sequence[int | None]


def map_conditions(net: Any, old: Mapping[str, Tensor], sources: Sources) -> dict[str, Tensor]:
    """State dict of a network of other conditions -> state dict for `net`, whose own embedding provides the fresh conditions.

    Raises UserError for a network without condition_layer.
    """
    layer = getattr(net, "condition_layer", None)
    if layer is None:
        raise UserError(f"a {type(net).__name__} cannot map its conditions: leave out model.class_map")
    return dict(old) | {layer: net.map_layer(old[layer], net.state_dict()[layer], sources)}


def map_rows(old_KD: Tensor, fresh_kD: Tensor, sources: Sources) -> Tensor:
    """VAR's embedding [K+1, D] -> [k+1, D]: mapped rows are copied, and the last row stays the null condition.

    A fresh row is a copy of the null condition's: under it the network starts as if unconditional. fresh_kD is not used.
    """
    null = len(old_KD) - 1
    return old_KD[[null if source is None else source for source in (*sources, None)]]


def map_columns(old_EK: Tensor, fresh_Ek: Tensor, sources: Sources) -> Tensor:
    """EDM2's weight [E, K] -> [E, k]. A mapped condition gets its column of the normalised old weight, a fresh one that of fresh_Ek.

    The null condition is an all-zero vector before and after. Mapped embeddings are rescaled (derived): the network divides row e by
    its RMS r_e, so it embeds condition c as w_ec / r_e. The normalised old weight has r_e = 1; the new one has the RMS of its k
    entries: 1 for a permutation, 1 +- O(1 / sqrt(k)) otherwise.
    """
    unit_EK, new_Ek = normalize(old_EK.float()), fresh_Ek.clone()
    for c, source in enumerate(sources):
        if source is not None:
            new_Ek[:, c] = unit_EK[:, source]
    return new_Ek
