"""Scores of samples: pure functions of feature arrays, in float64, that return plain numbers.

N rows of the first set (or the real one); M rows of the second (or the fake one); D features; K conditions.
A feature is whatever the judge says it is; distances carry its units, every other number is a share or a ratio.
All of them raise ValueError for arrays of the wrong shape, non-finite entries or too few rows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

# Rows of a distance matrix held at once: 256 x 50,000 float64 values are 0.1 GB, of which finding neighbours takes some copies.
CHUNK = 256
NEIGHBOURS = (3, 5)  # k of precision and recall, k of density and coverage
Progress = Callable[[list[slice]], Iterable[slice]]  # hands on the chunks of a pass one by one, as tqdm does
Gaussian = tuple[Tensor, Tensor]  # mean [D] and covariance [D, D]


class Moments:
    """Mean [D] and covariance [D, D] of rows that come in batches, each summed around its own mean (Chan et al. 1982, eq. 2.1)."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, rows_BD: Tensor) -> None:
        rows_BD = _checked(rows_BD, "features", rows=1).double()
        mean_D = rows_BD.mean(0)
        if not self.count:
            self.mean_D, self.scatter_DD = torch.zeros_like(mean_D), mean_D.new_zeros(len(mean_D), len(mean_D))
        shift_D, share = mean_D - self.mean_D, len(rows_BD) / (self.count + len(rows_BD))
        centred_BD = rows_BD - mean_D
        self.scatter_DD.addmm_(centred_BD.T, centred_BD).addr_(shift_D, shift_D, alpha=self.count * share)
        self.mean_D += shift_D * share
        self.count += len(rows_BD)

    def gaussian(self) -> Gaussian:
        """The covariance is the unbiased one. Raises ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"{self.count} rows of features; at least 2 are needed")
        return self.mean_D, self.scatter_DD / (self.count - 1)


def moments(features_ND: Tensor) -> Gaussian:
    """Mean [D] and unbiased covariance [D, D] of two rows or more."""
    running = Moments()
    for rows in _checked(features_ND, "features", rows=2).split(CHUNK):
        running.add(rows)
    return running.gaussian()


def frechet_from_moments(mean_a_D: Tensor, cov_a_DD: Tensor, mean_b_D: Tensor, cov_b_DD: Tensor) -> float:
    """Squared 2-Wasserstein distance of two Gaussians, |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2).

    Units: feature units squared. Singular covariances are fine. Source: Heusel et al. 2017 (arXiv 1706.08500), eq. 6.
    """
    mean_a_1D, mean_b_1D = _checked_pair(mean_a_D[None].double(), mean_b_D[None].double(), "means", 1)
    cov_a_DD, cov_b_DD = _checked_pair(cov_a_DD.double(), cov_b_DD.double(), "covariances", 1)
    # tr (A^1/2 B A^1/2)^1/2 is the sum of the singular values of A^1/2 B^1/2; so no square root of a rounding error is taken.
    overlap = torch.linalg.svdvals(_square_root(cov_a_DD) @ _square_root(cov_b_DD)).sum()
    distance = (mean_a_1D - mean_b_1D).square().sum() + cov_a_DD.trace() + cov_b_DD.trace() - 2 * overlap
    return max(distance.item(), 0.0)


def frechet_distance(features_a_ND: Tensor, features_b_MD: Tensor) -> float:
    """Fréchet distance (FD) between Gaussians fitted to two sets. N, M >= 2; biased upwards unless N, M >> D."""
    return frechet_from_moments(*moments(features_a_ND), *moments(features_b_MD))


def class_frechet_distance(a: Mapping[int, Gaussian], b: Mapping[int, Gaussian]) -> float:
    """Mean over conditions of the FD within each, which both sets need: also sees a right image under a wrong condition (derived)."""
    if missing := sorted(a.keys() ^ b.keys()):
        raise ValueError(f"condition {missing[0]} is in one set alone; both sets need at least 2 rows of each")
    if not a:
        raise ValueError("there are no conditions")
    return sum(frechet_from_moments(*a[c], *b[c]) for c in sorted(a)) / len(a)


def neighbour_radii(features_ND: Tensor, k: tuple[int, ...] = NEIGHBOURS, progress: Progress = iter) -> Tensor:
    """Distance of every row to its k-th neighbour, float64 [N, len(k)], in one pass over the chunks. N > k; as exact as one distance."""
    most = max(k) + 1  # each row is its own nearest neighbour
    radii_NK = torch.empty(len(_checked(features_ND, "features", most)), len(k), dtype=torch.float64, device=features_ND.device)
    for rows, square_BN, slack in _squares(features_ND, features_ND, progress):
        farthest_B1 = square_BN.topk(most, largest=False).values[:, -1:]
        _recompute(square_BN, square_BN <= farthest_B1 + slack, features_ND[rows], features_ND)
        radii_NK[rows] = square_BN.topk(most, largest=False).values[:, list(k)].sqrt()
    return radii_NK


def neighbour_scores(
    real_ND: Tensor,
    fake_MD: Tensor,
    k: tuple[int, int] = NEIGHBOURS,
    real_radii_N2: Tensor | None = None,
    progress: Progress = iter,
) -> dict[str, float]:
    """precision, recall, density and coverage, in one pass over the distances beside those for radii. N, M > k.

    precision: share of the fake rows on the real manifold; recall: of the real rows on the fake one. A manifold is the union of closed
    balls that reach to each row's k[0]-th neighbour (Kynkäänniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2).
    density: real balls around a fake row, mean over rows, divided by k[1] (may exceed 1); coverage: share of real balls hit. These
    balls are open and reach to the k[1]-th real neighbour, so that outliers matter less (Naeem et al. 2020, arXiv 2002.09797, section 3.2).
    real_radii: neighbour_radii(real, k), where they are known. Every comparison is that of distances computed as differences.
    """
    real_ND, fake_MD = _checked_pair(real_ND, fake_MD, "features", rows=max(k) + 1)
    real_N2 = (neighbour_radii(real_ND, k, progress) if real_radii_N2 is None else real_radii_N2).square()
    fake_1M = neighbour_radii(fake_MD, k[:1], progress).square().T
    on_real_M = torch.zeros(len(fake_MD), dtype=torch.bool, device=fake_MD.device)
    on_fake_N, hits_N = real_N2.new_empty(len(real_ND), dtype=torch.bool), real_N2.new_empty(len(real_ND), dtype=torch.int64)
    for rows, square_BM, slack in _squares(real_ND, fake_MD, progress):
        closed_B1, open_B1 = real_N2[rows].split(1, dim=1)
        close_BM = torch.zeros_like(square_BM, dtype=torch.bool)
        for bound in (closed_B1, open_B1, fake_1M):
            close_BM |= (square_BM - bound).abs_() <= slack
        _recompute(square_BM, close_BM, real_ND[rows], fake_MD)
        on_real_M |= (square_BM <= closed_B1).any(0)
        on_fake_N[rows] = (square_BM <= fake_1M).any(1)
        hits_N[rows] = (square_BM < open_B1).sum(1)
    return {
        "precision": on_real_M.double().mean().item(),
        "recall": on_fake_N.double().mean().item(),
        "density": hits_N.sum().item() / (k[1] * len(fake_MD)),
        "coverage": (hits_N > 0).double().mean().item(),
    }


def class_accuracy(prob_NK: Tensor, c_N: Tensor) -> float:
    """Share of the rows that the judge puts under their own condition. prob_NK: its scores of the conditions."""
    if c_N.shape != _checked(prob_NK, "scores", rows=1).shape[:1]:
        raise ValueError(f"conditions {tuple(c_N.shape)} do not go with scores {tuple(prob_NK.shape)}: one per row is needed")
    return (prob_NK.argmax(1) == c_N).double().mean().item()


def inception_score(prob_NK: Tensor, split: int = 5000) -> float:
    """exp of the mean KL(p(c|x) || mean over x of p(c|x)), between 1 and K, of every `split` rows in their order; the mean of those.

    prob_NK: rows sum to 1. Source: Salimans et al. 2016 (arXiv 1606.03498), section 4; splits of 5,000 as ADM (arXiv 2105.05233).
    """
    scores = []
    for part in _checked(prob_NK, "probabilities", rows=2).split(split):
        part = part.double()
        if (part < 0).any() or (part.sum(1) - 1).abs().max() > 1e-3:
            raise ValueError("the probabilities of a row must be nonnegative and sum to 1 (logits need a softmax first)")
        scores.append((torch.special.entr(part.mean(0)).sum() - torch.special.entr(part).sum(1).mean()).exp().item())
    return sum(scores) / len(scores)


def icr(h1_ND: Tensor, h2_ND: Tensor) -> float:
    """Invariant contamination ratio D / (D + tr(S_xi^-1 S_s)): how much of the features is not a property of the image.

    h1, h2: features of two independent views of each image, s + xi_1 and s + xi_2: S_s is the covariance of what the views of an
    image share, S_xi that of what they do not. 1: they share nothing. N >= 2 D; unchanged by any invertible linear map.
    The trace is debiased for Gaussian features, E[S^-1] = (N - 1) / (N - D - 2) Sigma^-1 (derived); so an estimate may exceed 1 a
    little. Source: arXiv 2606.09718.
    """
    if h1_ND.shape != h2_ND.shape or h1_ND.ndim != 2:
        raise ValueError(f"views {tuple(h1_ND.shape)} and {tuple(h2_ND.shape)} are not two of each image")
    N, D = h1_ND.shape
    _, residual_DD = moments(_checked(h1_ND, "views", 2 * D).double() - _checked(h2_ND, "views", 2 * D).double())
    _, mean_DD = moments((h1_ND.double() + h2_ND.double()) / 2)
    try:
        factor_DD = torch.linalg.cholesky(residual_DD / 2)
    except torch.linalg.LinAlgError as error:
        raise ValueError("the two views of the images do not differ in some direction of feature space") from error
    # The covariance of the mean of two views holds half of S_xi.
    trace = (N - D - 2) / (N - 1) * torch.cholesky_solve(mean_DD, factor_DD).trace().item() - D / 2
    return D / (D + trace)


def _square_root(cov_DD: Tensor) -> Tensor:
    """Symmetric square root; directions below the rounding error of the largest eigenvalue count as empty."""
    value_D, vector_DD = torch.linalg.eigh(cov_DD)
    rounding = len(value_D) * torch.finfo(value_D.dtype).eps * value_D.abs().max()
    return vector_DD * value_D.where(value_D > rounding, 0).sqrt() @ vector_DD.T


def _squares(a_ND: Tensor, b_MD: Tensor, progress: Progress) -> Iterator[tuple[slice, Tensor, float]]:
    """For CHUNK rows of a at a time: (which rows, their squared distances to b, float64 [B, M], twice a bound on their error).

    |a|^2 + |b|^2 - 2 ab by a matrix product, around the mean of a. With X the largest |x|^2, the error is about 1e-14 X as measured at
    D = 1024, and never above 2 (D + 8) eps X: (D + 3) eps / 2 (|a| + |b|)^2 of sums over D, the rest of centring and norms (derived).
    Not clamped at 0: it is recomputed (_recompute) where an error of that size matters.
    """
    # Centre copies in place: a difference would hold a third set in memory.
    a_ND, b_MD = (rows.to(torch.float64, copy=True) for rows in (a_ND, b_MD))
    centre_D = a_ND.mean(0)
    a_ND -= centre_D
    b_MD -= centre_D
    a_N, b_M = (torch.linalg.vector_norm(rows, dim=1).square() for rows in (a_ND, b_MD))
    slack = 4 * (len(centre_D) + 8) * torch.finfo(torch.float64).eps * max(a_N.max().item(), b_M.max().item())
    for rows in progress([slice(first, first + CHUNK) for first in range(0, len(a_ND), CHUNK)]):
        yield rows, torch.addmm(b_M, a_ND[rows], b_MD.T, alpha=-2).add_(a_N[rows, None]), slack


def _recompute(square_BM: Tensor, close_BM: Tensor, a_BD: Tensor, b_MD: Tensor) -> None:
    """Recompute squared distances as differences, in place, at least where `close` marks that rounding could decide.

    These are duplicates, near-duplicates and ties: few, unless the features are degenerate. Then it is slow but right.
    """
    # A few rows at a time: columns that are close to one of them are recomputed for all.
    for square, close, a in zip(*(rows.split(16) for rows in (square_BM, close_BM, a_BD)), strict=True):
        for j_P in close.any(0).nonzero()[:, 0].split(32 * CHUNK):
            distance = torch.cdist(a.double(), b_MD[j_P].double(), compute_mode="donot_use_mm_for_euclid_dist")
            square[:, j_P] = distance.square()


def _checked_pair(a_ND: Tensor, b_MD: Tensor, name: str, rows: int) -> tuple[Tensor, Tensor]:
    if _checked(a_ND, f"real {name}", rows).shape[1] != _checked(b_MD, f"fake {name}", rows).shape[1]:
        raise ValueError(f"the two sets have {a_ND.shape[1]} and {b_MD.shape[1]} features; they need the same judge")
    return a_ND, b_MD


def _checked(array: Tensor, name: str, rows: int) -> Tensor:
    """The array itself. Raises ValueError where it is of another shape, too short or not finite."""
    if array.ndim != 2:
        raise ValueError(f"{name} must be [rows, features], not {tuple(array.shape)}")
    if len(array) < rows:
        raise ValueError(f"{len(array)} rows of {name}; at least {rows} are needed")
    if bad := int((~array.isfinite()).any(1).sum()):
        raise ValueError(f"{bad} of {len(array)} rows of {name} are not finite")
    return array
