"""The list of operations: tests, compile report and bench read it."""

from mclr.kernels import denoising_value, magnitude, modulated_norm, token_logp, weight_norm

OPS = {
    op.name: op
    for op in (
        denoising_value.OP,
        modulated_norm.MODULATED_NORM,
        modulated_norm.GATED_NORM,
        token_logp.OP,
        magnitude.NORM_SILU,
        magnitude.SCALE_SILU,
        magnitude.SUM_CLIP,
        weight_norm.USED_WEIGHTS,
        weight_norm.FORCE_WEIGHTS,
    )
}
