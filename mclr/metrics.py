"""How good samples are: pure functions of feature arrays, in float64, that return plain numbers.

N rows of the first set (or the real one); M rows of the second (or the fake one); D features; K conditions.
A feature is whatever the judge says it is; distances carry its units, every other number is a share or a ratio.
All of them raise ValueError for arrays of the wrong shape, non-finite entries or too few rows.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

# Rows of a distance matrix held at once: 256 x 50,000 float64 values are 0.1 GB, of which finding neighbours takes some copies.
CHUNK = 256
Gaussian = tuple[Tensor, Tensor]  # mean [D] and covariance [D, D]


class Moments:
    """Mean [D] and covariance [D, D] of rows that come a batch at a time, in float64.

    Each batch is summed around its own mean, so that large means cost no digits. Source: Chan et al. 1982, "Updating formulae and a
    pairwise algorithm for computing sample variances", eq. 2.1.
    """

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
        """The covariance is the unbiased one, divided by N - 1. N >= 2."""
        if self.count < 2:
            raise ValueError(f"{self.count} rows of features; at least 2 are needed")
        return self.mean_D, self.scatter_DD / (self.count - 1)


def moments(features_ND: Tensor) -> Gaussian:
    """Mean [D] and unbiased covariance [D, D] of the rows, float64. N >= 2."""
    _checked(features_ND, "features", rows=2)
    running = Moments()
    for (rows,) in _chunks(features_ND):
        running.add(rows)
    return running.gaussian()


def frechet_from_moments(mean_a_D: Tensor, cov_a_DD: Tensor, mean_b_D: Tensor, cov_b_DD: Tensor) -> float:
    """Squared 2-Wasserstein distance of two Gaussians, |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2).

    Units: feature units squared. Singular covariances are fine. Source: Heusel et al. 2017 (arXiv 1706.08500), eq. 6.
    """
    mean_a_1D, mean_b_1D = _same_judge(*(_checked(mean_D[None], "means", 1).double() for mean_D in (mean_a_D, mean_b_D)))
    cov_a_DD, cov_b_DD = (_checked(cov_DD, "covariances", 1).double() for cov_DD in (cov_a_DD, cov_b_DD))
    # tr (A^1/2 B A^1/2)^1/2 is the sum of the singular values of A^1/2 B^1/2; so no square root of a rounding error is taken.
    overlap = torch.linalg.svdvals(_square_root(cov_a_DD) @ _square_root(cov_b_DD)).sum()
    distance = (mean_a_1D - mean_b_1D).square().sum() + cov_a_DD.trace() + cov_b_DD.trace() - 2 * overlap
    return max(distance.item(), 0.0)


def frechet_distance(features_a_ND: Tensor, features_b_MD: Tensor) -> float:
    """Fréchet distance (FD) between Gaussians fitted to two sets. N, M >= 2; biased upwards unless N, M >> D."""
    return frechet_from_moments(*moments(features_a_ND), *moments(features_b_MD))


def class_frechet_distance(a: Mapping[int, Gaussian], b: Mapping[int, Gaussian]) -> float:
    """Mean over conditions of the FD between the Gaussians of that condition: also sees a right image under a wrong condition.

    Both sets need all conditions. Source: derived from frechet_distance; the mean has equal weights.
    """
    if missing := sorted(a.keys() ^ b.keys()):
        raise ValueError(f"condition {missing[0]} is in one set alone; both sets need at least 2 rows of each")
    if not a:
        raise ValueError("there are no conditions")
    return sum(frechet_from_moments(*a[c], *b[c]) for c in sorted(a)) / len(a)


def precision_recall(real_ND: Tensor, fake_MD: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of the fake rows on the real manifold, and of the real rows on the fake one; both in [0, 1].

    A manifold is the union of closed balls that reach to each row's k-th neighbour. N, M > k.
    Source: Kynkäänniemi et al. 2019 (arXiv 1904.06991), eq. 1 and 2. One outlier owns a huge ball: see density_coverage.
    """
    real_ND, fake_MD = _checked_pair(real_ND, fake_MD, rows=k + 1)
    return _share_inside(fake_MD, real_ND, _radii(real_ND, k)), _share_inside(real_ND, fake_MD, _radii(fake_MD, k))


def density_coverage(real_ND: Tensor, fake_MD: Tensor, k: int = 5) -> tuple[float, float]:
    """Density: real balls around a fake row, mean over rows, divided by k (may exceed 1). Coverage: share of real balls hit.

    The balls reach to the k-th real neighbour and are open, so that a set has density exactly 1 with itself. N, M > k.
    Source: Naeem et al. 2020 (arXiv 2002.09797), section 3.2.
    """
    real_ND, fake_MD = _checked_pair(real_ND, fake_MD, rows=k + 1)
    radius_N = _radii(real_ND, k)
    hits_N = torch.cat([(_distances(rows, fake_MD) < r[:, None]).sum(1) for rows, r in _chunks(real_ND, radius_N)])
    return hits_N.sum().item() / (k * len(fake_MD)), (hits_N > 0).double().mean().item()


def class_accuracy(prediction: Tensor, c_N: Tensor) -> float:
    """Share of the rows that the judge puts under their own condition. prediction: scores [N, K], or conditions [N]."""
    _same_rows(prediction, c_N)
    if not prediction.isfinite().all():
        raise ValueError("the predictions hold non-finite values")
    predicted_N = prediction.argmax(1) if prediction.ndim == 2 else prediction
    return (predicted_N == c_N).double().mean().item()


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
    The trace is debiased for Gaussian features, E[S^-1] = (N - 1) / (N - D - 2) Sigma^-1; so an estimate may exceed 1 a little.
    Raises ValueError, beside the rest, where the views do not differ in some direction. Source: arXiv 2606.09718; debiasing derived.
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
    # the mean of two views holds half of S_xi
    trace = (N - D - 2) / (N - 1) * torch.cholesky_solve(mean_DD, factor_DD).trace().item() - D / 2
    return D / (D + trace)


def _square_root(cov_DD: Tensor) -> Tensor:
    """Symmetric square root; directions below the rounding error of the largest eigenvalue count as empty."""
    value_D, vector_DD = torch.linalg.eigh(cov_DD)
    rounding = len(value_D) * torch.finfo(value_D.dtype).eps * value_D.abs().max()
    return vector_DD * value_D.where(value_D > rounding, 0).sqrt() @ vector_DD.T


def _radii(features_ND: Tensor, k: int) -> Tensor:
    """Distance of every row to its k-th neighbour [N]; k + 1 because a row is its own nearest."""
    return torch.cat([_distances(rows, features_ND).kthvalue(k + 1, dim=1).values for (rows,) in _chunks(features_ND)])


def _share_inside(query_ND: Tensor, centre_MD: Tensor, radius_M: Tensor) -> float:
    """Share of the query rows inside at least one closed ball."""
    inside_N = torch.cat([(_distances(rows, centre_MD) <= radius_M).any(1) for (rows,) in _chunks(query_ND)])
    return inside_N.double().mean().item()


def _distances(a_ND: Tensor, b_MD: Tensor) -> Tensor:
    """Euclidean [N, M] float64, as differences: the usual matrix product loses the distances between near-duplicates."""
    a_ND = a_ND.double()
    # piece by piece: copies of whole sets in float64 would take twice the memory of the sets
    pieces = [torch.cdist(a_ND, b.double(), compute_mode="donot_use_mm_for_euclid_dist") for b in b_MD.split(32 * CHUNK)]
    return torch.cat(pieces, dim=1)


def _chunks(*arrays: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching pieces of CHUNK rows."""
    return zip(*(array.split(CHUNK) for array in arrays), strict=True)


def _same_rows(features: Tensor, c_N: Tensor) -> None:
    if c_N.ndim != 1 or len(features) != len(c_N) or len(c_N) == 0:
        raise ValueError(f"conditions {tuple(c_N.shape)} do not go with values {tuple(features.shape)}: one per row is needed")


def _checked_pair(real_ND: Tensor, fake_MD: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    return _same_judge(_checked(real_ND, "real features", rows), _checked(fake_MD, "fake features", rows))


def _same_judge(a_ND: Tensor, b_MD: Tensor) -> tuple[Tensor, Tensor]:
    if a_ND.shape[1] != b_MD.shape[1]:
        raise ValueError(f"the two sets have {a_ND.shape[1]} and {b_MD.shape[1]} features; they need the same judge")
    return a_ND, b_MD


def _checked(array: Tensor, name: str, rows: int) -> Tensor:
    """The array itself, or a ValueError that says what is wrong with it."""
    if array.ndim != 2:
        raise ValueError(f"{name} must be [rows, features], not {tuple(array.shape)}")
    if len(array) < rows:
        raise ValueError(f"{len(array)} rows of {name}; at least {rows} are needed")
    if bad := int((~array.isfinite()).any(1).sum()):
        raise ValueError(f"{bad} of {len(array)} rows of {name} are not finite")
    return array
