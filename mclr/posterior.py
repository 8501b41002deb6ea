"""p(c | what the network sees): a noise-conditional classifier for diffusion, Bayes' rule on the model itself for tokens.

B samples; T terms; K classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from mclr.contrast import kept
from mclr.likelihood import Net, Paradigm, Probe

BINS = 10


@dataclass(frozen=True)
class NoisyPosterior:
    """p(c | x_t) from classifier(noisy_BCHW, sigma_B) -> logits_BK, trained in the same job on the same probes."""

    classifier: Net

    def __call__(self, probe: Probe, c_B: Tensor) -> tuple[Tensor, Tensor]:
        """(posterior [B, 1, K] without gradient, cross-entropy [B] with the true conditions c_B), from one forward.

        No label smoothing: an under-confident posterior unbounds MCLR.
        """
        logits_BK = self.classifier(probe.inputs["noisy"], probe.inputs["sigma"]).float()
        return logits_BK.detach().softmax(-1)[:, None], cross_entropy(logits_BK, c_B, reduction="none")


@dataclass(frozen=True)
class PrefixPosterior:
    """p(c | coarser scales) by Bayes' rule from the network's own values: exact for the model, K rows per sample without gradient.

    Every token of a scale shares the posterior given the scales before it; the prior over the classes is uniform.
    """

    paradigm: Paradigm
    net: Net
    num_classes: int

    @torch.no_grad()
    def __call__(self, probe: Probe, c_B: Tensor) -> tuple[Tensor, None]:
        """(posterior [B, L, K], None): nothing is trained, the true conditions c_B are not looked at."""
        batch, K = len(probe.progress_BT), self.num_classes
        index = torch.arange(batch, device=probe.progress_BT.device)
        total_BLK = []
        for c in range(K):
            prediction = self.paradigm.predict(self.net, probe, index, torch.full_like(index, c))
            value_BL = self.paradigm.log_likelihood(prediction, probe, index).value_RT
            total_BLK.append(value_BL.double().cumsum(1))
        total = torch.stack(total_BLK, -1)
        # tokens before the first of each token's own scale: the prefix that its logits were computed from
        progress = probe.progress_BT[0]
        first_L = torch.searchsorted(progress.contiguous(), progress.contiguous())
        before = torch.cat([torch.zeros_like(total[:, :1]), total], 1)[:, first_L]
        return before.softmax(-1).float(), None


def calibration(posterior_BTK: Tensor, c_B: Tensor, truncate: float) -> dict[str, Tensor]:
    """How far this batch lets the posterior be trusted, given its true conditions c_B: two 0-d tensors.

    posterior_ece: expected calibration error, |accuracy - confidence| averaged over samples x terms in ten equal-width bins of the
    largest probability (Guo et al. 2017, arXiv 1706.04599, Eq. 3). Small batches bias it upward: a perfect posterior does not read
    0 but up to 1.1 / sqrt(B), .14 at 64 samples (derived), so compare readings of one batch size.
    posterior_tail: share of samples x terms whose own class is in the tail that `truncate` never draws; at most `truncate` where the
    posterior is calibrated, more where it is over-confident.
    """
    c_BT1 = c_B[:, None, None].expand(*posterior_BTK.shape[:2], 1)
    confidence_BT1, guess_BT1 = posterior_BTK.max(-1, keepdim=True)
    excess_BT1 = (guess_BT1 == c_BT1).float() - confidence_BT1
    bin_BT = (confidence_BT1[..., 0] * BINS).long().clamp(max=BINS - 1)
    # sums over masks: a scatter-add would not repeat its rounding on a GPU
    gap_N = (excess_BT1 * one_hot(bin_BT, BINS)).sum((0, 1)).abs()
    return {
        "posterior_ece": gap_N.sum() / excess_BT1.numel(),
        "posterior_tail": 1 - kept(posterior_BTK, truncate).gather(-1, c_BT1).float().mean(),
    }
