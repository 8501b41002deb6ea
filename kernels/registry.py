"""The list of operations, which tests, compile report and bench read."""

import re

from mclr.kernels import modulated_norm, norm_silu, scale_silu, sum_clip, token_logp, weight_norm
from mclr.kernels.choice import RESULTS, WINNERS

OPS = {
    op.name: op
    for op in (
        modulated_norm.MODULATED_NORM,
        modulated_norm.GATED_NORM,
        token_logp.OP,
        norm_silu.OP,
        scale_silu.OP,
        sum_clip.OP,
        weight_norm.USED_WEIGHTS,
        weight_norm.FORCE_WEIGHTS,
    )
}


def refuse_unknown(winners: dict[str, list[str]]) -> None:
    """Raises ValueError if the winners name an unknown operation, or a family that is not written as sm_90."""
    for family, names in winners.items():
        if not re.fullmatch(r"sm_\d{2,3}", family):
            raise ValueError(f"{RESULTS}: {family} is no GPU family, which is written as sm_90")
        for name in names:
            if name not in OPS:
                raise ValueError(f"{RESULTS}: unknown operation {name} for {family}")


refuse_unknown(WINNERS)
