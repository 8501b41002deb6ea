"""The list of operations, which tests, compile report and bench read."""

from mclr.kernels import modulated_norm, norm_silu, scale_silu, sum_clip, token_logp, weight_norm

OPS = {
    op.name: op
    for op in (
        modulated_norm.OP,
        token_logp.OP,
        norm_silu.OP,
        scale_silu.OP,
        sum_clip.OP,
        weight_norm.USED_WEIGHTS,
        weight_norm.FORCE_WEIGHTS,
    )
}
