"""A network's conditions carried over to another set of conditions: the layer that embeds them, and nothing else.

sources: for every new condition c the old one, sources[c], or None = fresh. K old and k new conditions; D width; E embedding.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mclr.errors import UserError
from mclr.kernels.magnitude import normalize

Sources = Sequence[int | None]


def map_conditions(net: Any, old: Mapping[str, Tensor], sources: Sources) -> dict[str, Tensor]:
    """State dict of a network of other conditions -> that of `net`, whose own embedding gives the fresh ones.

    Raises UserError for a network that does not say how.
    """
    layer = getattr(net, "condition_layer", None)
    if layer is None:
        raise UserError(f"a {type(net).__name__} cannot map its conditions: leave out model.class_map")
    return dict(old) | {layer: net.map_layer(old[layer], net.state_dict()[layer], sources)}


def map_rows(old_KD: Tensor, fresh_kD: Tensor, sources: Sources) -> Tensor:
    """VAR's class embedding [K+1, D] -> [k+1, D]: mapped rows are copied, the null condition stays the last row.

    Fresh rows start as the null condition's: there the network begins unconditional.
    """
    null = len(old_KD) - 1
    return old_KD[[null if source is None else source for source in (*sources, None)]]


def map_columns(old_EK: Tensor, fresh_Ek: Tensor, sources: Sources) -> Tensor:
    """EDM2's condition_linear [E, K] -> [E, k]: mapped columns come from the unit-magnitude weight, fresh ones from fresh_Ek, N(0, 1).

    The null condition is the all-zero one-hot before and after. What changes (derived): the network divides row e by its RMS r_e and
    by sqrt(k), and feeds a one-hot times sqrt(k), so that condition c is embedded as w_ec / r_e. Of the old unit-magnitude weight
    r_e = 1; of the new one r_e is the RMS of the k entries put here. So a mapped condition's embedding is divided by r_e, entry by
    entry: by 1 for a permutation, by 1 +- O(1 / sqrt(k)) elsewhere.
    """
    unit_EK, new_Ek = normalize(old_EK.float()), fresh_Ek.clone()
    for c, source in enumerate(sources):
        if source is not None:
            new_Ek[:, c] = unit_EK[:, source]
    return new_Ek
