"""p(c | what the network sees): a noise-conditional classifier for diffusion, Bayes' rule on the model itself for tokens.

B samples; T terms; K classes.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from mclr.likelihood import Net, Paradigm, Probe, ask

BINS, BIN = 10, "posterior_bin_"


def noisy_posterior(classifier: Net, conditions: int, noisy: tuple[Tensor, Tensor], c_B: Tensor) -> tuple[Tensor, Tensor]:
    """(p(c | x_t) [B, 1, K] without gradient, cross-entropy [B] with the true conditions c_B), from one forward.

    classifier(noisy_BCHW, sigma_B) -> logits_BK. noisy: its two inputs (Diffusion.noisy). conditions: K.
    Raises ValueError for logits of another shape.
    No label smoothing: an under-confident posterior unbounds MCLR.
    """
    hint = "give posterior=classifier(noisy, sigma) -> logits, one per condition"
    logits_BK = ask(classifier, (len(c_B), conditions), hint, *noisy, alone=True)[0].float()
    if logits_BK.ndim != 2:
        raise ValueError(f"the classifier gives {list(logits_BK.shape)}: {hint}")
    return logits_BK.detach().softmax(-1)[:, None], cross_entropy(logits_BK, c_B, reduction="none")


@torch.no_grad()
def prefix_posterior(paradigm: Paradigm, net: Net, probe: Probe) -> Tensor:
    """p(c | coarser scales) [B, L, K] by Bayes' rule from the network's own values: exact for the model, K rows per sample.

    All tokens of a scale share the posterior given the scales before it; the prior over the classes is uniform. The last scale is
    never needed, so rows end before it.
    """
    batch, K = len(probe.progress_BT), paradigm.null
    index = torch.arange(batch, device=probe.progress_BT.device)
    # The number of tokens before each token's scale: the prefix that its logits come from.
    progress_L = probe.progress_BT[0].contiguous()
    first_L = torch.searchsorted(progress_L, progress_L)
    terms = int(first_L[-1])
    total_BLK = torch.zeros(batch, terms + 1, K, dtype=torch.float64, device=index.device)
    for c in range(K if terms else 0):
        prediction = paradigm.predict(net, probe, index, torch.full_like(index, c), terms)
        total_BLK[:, 1:, c] = paradigm.log_likelihood(prediction, probe, index).value_RT.double().cumsum(1)
    return total_BLK[:, first_L].softmax(-1).float()


def calibration(posterior_BTK: Tensor, c_B: Tensor, truncate: float) -> dict[str, Tensor]:
    """Calibration of the posterior on samples of known conditions c_B: 0-d tensors, averages over samples x terms.

    posterior_bin_0 ... 9: hit minus confidence where the largest probability lies in that one of ten equal bins, 0 elsewhere; they can
    be averaged over micro-batches and ranks, as their absolute values (fold_bins) cannot. posterior_tail: share whose own class is in
    the tail that `truncate` never draws; at most `truncate` where the posterior is calibrated, more where it is over-confident.
    """
    c_BT1 = c_B[:, None, None].expand(*posterior_BTK.shape[:2], 1)
    confidence_BT1, guess_BT1 = posterior_BTK.max(-1, keepdim=True)
    excess_BT1 = (guess_BT1 == c_BT1).float() - confidence_BT1
    # Clamp for NaN images too: their step is skipped, and must not end the run.
    bin_BT = (confidence_BT1[..., 0] * BINS).long().clamp(0, BINS - 1)
    # Sum over masks: the rounding of a scatter-add varies on a GPU.
    gap_N = (excess_BT1 * one_hot(bin_BT, BINS)).mean((0, 1))
    p_BTK = posterior_BTK.double()
    no_likelier_BT = (p_BTK * (p_BTK <= p_BTK.gather(-1, c_BT1))).sum(-1)
    tail_BT = no_likelier_BT <= truncate * p_BTK.sum(-1)
    return {f"{BIN}{n}": gap for n, gap in enumerate(gap_N)} | {"posterior_tail": tail_BT.float().mean()}


def fold_bins(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics averaged over a whole batch, with the bins of `calibration` folded into posterior_ece, where there are any.

    posterior_ece: expected calibration error, |accuracy - confidence| averaged over the bins by their share of samples x terms (Guo et
    al. 2017, arXiv 1706.04599, Eq. 3), on the training images of one step. Small batches bias it upward: a perfect posterior
    reads up to 1.1 / sqrt(batch), .14 at 64 samples (derived), so compare readings of one train.batch.
    """
    rest = {name: value for name, value in metrics.items() if not name.startswith(BIN)}
    ece = sum(abs(value) for name, value in metrics.items() if name.startswith(BIN))
    return rest | {"posterior_ece": ece} if len(rest) < len(metrics) else rest
