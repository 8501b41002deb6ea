"""Which rows are scored: the matched one of every sample, and the mismatched ones that the contrast still needs.

B samples; T terms; K classes (the null condition is index K); R rows.
"""

import torch
from torch import Tensor

from mclr.likelihood import Rows


def draw_other(c_B: Tensor, uniform_B: Tensor, num_classes: int) -> Tensor:
    """A condition c~ != c, uniform over the other classes, by inverse CDF of one uniform. Returns [B, 1]."""
    drawn = (uniform_B * (num_classes - 1)).long().clamp(max=num_classes - 2)
    return (drawn + (drawn >= c_B))[:, None]


def draw_any(uniform_B: Tensor, num_classes: int) -> Tensor:
    """A condition uniform over all classes, by inverse CDF. Returns [B, 1]."""
    return (uniform_B * num_classes).long().clamp(max=num_classes - 1)[:, None]


def draw_marginal(uniform_B: Tensor, num_classes: int, null_share: float) -> Tensor:
    """A condition as in training: null (num_classes) with probability null_share, else any class. Inverse CDF. Returns [B, 1]."""
    c_B1 = draw_any(uniform_B / (1 - null_share), num_classes)
    return torch.where(uniform_B[:, None] < 1 - null_share, c_B1, num_classes)


def kept(posterior_BTK: Tensor, truncate: float) -> Tensor:
    """The classes that draw_posterior may draw, bool [B, T, K]: all but the least likely, which together have at most `truncate`.

    truncate is a share of the mass, not a smallest probability, so it means the same for 10 and for 1,000 classes.
    """
    rising, order = posterior_BTK.double().sort(-1)
    keep_BTK = rising.cumsum(-1) > truncate * rising.sum(-1, keepdim=True)
    return torch.zeros_like(posterior_BTK, dtype=torch.bool).scatter(-1, order, keep_BTK)


def draw_posterior(posterior_BTK: Tensor, uniform_B: Tensor, truncate: float) -> Tensor:
    """c~ ~ p(c~ | x_t) per term, by inverse CDF of one uniform per sample, [B, T].

    Drawn among the kept classes, renormalised: an under-confident posterior would leave the objective unbounded below where
    p(c|x_t) is small (derived).
    """
    cdf = (posterior_BTK * kept(posterior_BTK, truncate)).double().cumsum(-1)
    drawn = (cdf <= uniform_B.double()[:, None, None] * cdf[..., -1:]).sum(-1)
    return drawn.clamp(max=posterior_BTK.shape[-1] - 1)


def matched_rows(c_B: Tensor, lam_BT: Tensor, mix_BT: Tensor | None = None) -> Rows:
    """One row per sample and no contrast value."""
    index = torch.arange(len(c_B), device=c_B.device)
    return Rows(index, c_B, index[:, None].expand_as(lam_BT), lam_BT, torch.zeros_like(lam_BT), mix_BT)


def generated_rows(c_P: Tensor, lam_BT: Tensor, weight_BT: Tensor) -> Rows:
    """One row per sample: B real ones, then the generated ones that are their contrast. c_P: conditions of both, P = 2B."""
    index_P = torch.arange(len(c_P), device=c_P.device)
    batch = len(lam_BT)
    # A sample without a ratio needs no generated partner.
    needed = lam_BT.ne(0).any(1)
    index_R = torch.cat([index_P[:batch], index_P[batch:][needed]])
    contrast_B = index_P[:batch].clone()
    contrast_B[needed] = batch + index_P[: int(needed.sum())]
    return Rows(index_R, c_P[index_R], contrast_B[:, None].expand_as(lam_BT), lam_BT, weight_BT)


def paired_rows(c_B: Tensor, contrast_c_BT: Tensor, null: int, lam_BT: Tensor, weight_BT: Tensor) -> Rows:
    """Matched rows, then one row for each distinct (sample, c~) that some term needs.

    A term needs no row where c~ = c (the matched row is its contrast) or where lam is 0. All terms that drew the same c~ share a row.
    """
    batch, device = len(c_B), c_B.device
    index = torch.arange(batch, device=device)
    contrast_c_BT = contrast_c_BT.expand_as(lam_BT)
    needed = (contrast_c_BT != c_B[:, None]) & (lam_BT * weight_BT != 0)
    pair, which = (index[:, None] * (null + 1) + contrast_c_BT)[needed].unique(return_inverse=True)
    contrast_BT = index[:, None].expand_as(lam_BT).clone()
    contrast_BT[needed] = batch + which
    index_R, c_R = torch.cat([index, pair // (null + 1)]), torch.cat([c_B, pair % (null + 1)])
    return Rows(index_R, c_R, contrast_BT, lam_BT, weight_BT.expand_as(lam_BT))
