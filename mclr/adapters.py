"""Networks of your own as the paradigms expect them: a denoiser, or logits of tokens.

R rows; B samples; C, H, W image; L tokens; l tokens of one call; V codes. Conditions are int64; the index after the last condition is
the null condition, which the network has to know too: an embedding of num_classes + 1 entries.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mclr.forms import scales
from mclr.guidance import mix
from mclr.likelihood import ask, network


class FromDenoiser(nn.Module):
    """A network for mclr.Diffusion out of a denoiser: a module (whose parameters stay reachable) or a function.

    denoise: (noisy [R, C, H, W], sigma [R], c [R]) -> the denoised images [R, C, H, W], or a tuple of them and a learned log-variance
    [R] (EDM2, arXiv 2312.02696, eq. 21). noisy = x + sigma * noise. sigma_data: that of mclr.EDM, standard deviation of x. One with a
    dial also takes strength [R], which is left out where it is 0.
    """

    def __init__(self, denoise: Callable[..., Any], sigma_data: float = 0.5):
        super().__init__()
        self.denoise, self.sigma_data = network(denoise, "denoise"), sigma_data

    def forward(
        self, noisy_BCHW: Tensor, sigma_B: Tensor, c_R: Tensor, index_R: Tensor | None = None, *strength_R: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(raw [R, C, H, W], log-variance [R]): c_skip noisy + c_out raw is the denoised image (mclr/forms.py)."""
        if index_R is not None:
            noisy_BCHW, sigma_B = noisy_BCHW[index_R], sigma_B[index_R]
        hint = "a denoiser takes (noisy, sigma, c), c up to the null condition, and gives images like noisy"
        denoised, logvar_R = ask(self.denoise, noisy_BCHW.shape, hint, noisy_BCHW, sigma_B, c_R, *strength_R, alone=True)
        c_skip, c_out = scales(sigma_B, self.sigma_data)
        return (denoised - c_skip * noisy_BCHW) / c_out, torch.zeros_like(sigma_B) if logvar_R is None else logvar_R


class FromLogits(nn.Module):
    """A network for mclr.NextScale out of one that gives logits: a module (whose parameters stay reachable) or a function.

    logits: (teacher inputs, c [R]) -> logits [R, l + 1, V]. The tokenizer makes the teacher inputs from the tokens. A multi-scale one
    gives [R, l, E]. PlainSequence gives the tokens before each token, [R, l] int64. The logits of a token may depend on the
    inputs of coarser scales and of its own alone. Sampling runs the network on all inputs so far at every scale: no cache is needed.
    One with a dial also takes strength [R], which is left out where it is 0.
    """

    def __init__(self, logits: Callable[..., Tensor]):
        super().__init__()
        self.logits = network(logits, "logits")

    def new_cache(self, rows: int) -> list[Tensor]:
        """The teacher inputs of the calls so far."""
        return []

    def forward(
        self,
        teacher_Bl: Tensor,
        c_R: Tensor,
        index_R: Tensor | None = None,
        *strength_R: Tensor,
        cache: list[Tensor] | None = None,
    ) -> tuple[Tensor, Callable[..., Tensor]]:
        """(logits [R, l, V], head): of all tokens, or with a cache of the new ones."""
        teacher_Rl, new = (teacher_Bl if index_R is None else teacher_Bl[index_R]), 0
        if cache is not None:
            new = max(teacher_Rl.shape[1], 1)
            cache.append(teacher_Rl)
            teacher_Rl = torch.cat(cache, 1)
        hint = "logits takes (teacher inputs, c), c up to the null condition, and gives one row more than inputs"
        wanted = (len(c_R), teacher_Rl.shape[1] + 1)
        logits_RlV, _ = ask(self.logits, wanted, hint, teacher_Rl, c_R, *strength_R, alone=True)
        return logits_RlV[:, -new:].float(), own_logits


def own_logits(
    logits_RlV: Tensor,
    tokens_Bl: Tensor | None = None,
    index_R: Tensor | None = None,
    guide_RlV: Tensor | None = None,
    mix_Rl: Tensor | None = None,
) -> Tensor:
    """The head of a network whose hidden states are its logits (mclr/next_scale.py): the logits, or log p of the tokens [R, l]."""
    if tokens_Bl is None:
        return logits_RlV
    mixed = logits_RlV if guide_RlV is None or mix_Rl is None else mix(logits_RlV, guide_RlV, mix_Rl)
    return mixed.log_softmax(-1).gather(-1, tokens_Bl[index_R][..., None])[..., 0]


class PlainSequence:
    """The tokenizer of plain sequences: each token sees the tokens before it. For NextScale((1,) * L, null, PlainSequence())."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = device

    def teacher(self, tokens_BL: Tensor) -> Tensor:
        """The tokens before each token but the first, [B, L - 1]."""
        return tokens_BL[:, :-1]

    def start(self, batch: int) -> Tensor:
        """What sampling begins with: nothing."""
        return torch.zeros(batch, dtype=torch.int64, device=self.device)

    def advance(self, f_hat: Tensor, tokens_B1: Tensor, scale: int) -> tuple[Tensor, Tensor]:
        """(nothing, the teacher input of the next token)."""
        return f_hat, tokens_B1


from_denoiser, from_logits = FromDenoiser, FromLogits
