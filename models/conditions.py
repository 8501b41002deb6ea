"""A network's conditions carried over to another set of conditions: the layer that embeds them, and nothing else.

sources: for every new condition c the old one, sources[c], or None = fresh. K old and k new conditions; D width; E embedding.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from mclr.kernels.magnitude import normalize

VAR_LAYER, EDM2_LAYER = "embed_condition.weight", "condition_linear.weight"
Sources = Sequence[int | None]


def map_conditions(old: Mapping[str, Tensor], fresh: Mapping[str, Tensor], sources: Sources) -> dict[str, Tensor]:
    """State dict of a VAR or EDM2 -> the same for the new conditions. fresh: of a new network of k conditions."""
    if VAR_LAYER in old:
        return dict(old) | {VAR_LAYER: map_rows(old[VAR_LAYER], sources)}
    return dict(old) | {EDM2_LAYER: map_columns(old[EDM2_LAYER], fresh[EDM2_LAYER], sources)}


def map_rows(old_KD: Tensor, sources: Sources) -> Tensor:
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
