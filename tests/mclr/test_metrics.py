"""Metrics against closed forms, brute force over small sets, and cases where the answer is known by construction."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from mclr import metrics
from mclr.metrics import (
    Moments,
    class_accuracy,
    class_frechet_distance,
    frechet_distance,
    frechet_from_moments,
    icr,
    inception_score,
    moments,
    neighbour_radii,
    neighbour_scores,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_of_singular_covariances():
    # Fewer rows than features, and a constant feature: exact zero with itself, the shift alone with a shifted copy.
    few = 100 * draw(5, 64)
    few[:, 0] = 3
    assert frechet_distance(few, few.clone()) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(few, few + 1) == pytest.approx(64, rel=1e-10)
    # Gaussians on orthogonal axes share nothing: the overlap is 0.
    along_x, along_y = torch.diag(torch.tensor([4.0, 0.0])), torch.diag(torch.tensor([0.0, 9.0]))
    assert frechet_from_moments(torch.zeros(2), along_x, torch.zeros(2), along_y) == pytest.approx(13, rel=1e-6)
    assert frechet_distance(torch.zeros(4, 3), torch.ones(4, 3)) == pytest.approx(3)


def test_frechet_equals_the_matrix_square_root_of_scipy():
    a, b = 3 * draw(40, 7) @ draw(7, 7, seed=2) + 5, draw(50, 7, seed=1) @ draw(7, 7, seed=3)
    cov_a, cov_b = (np.cov(x.numpy(), rowvar=False) for x in (a, b))
    shift = a.mean(0).numpy() - b.mean(0).numpy()
    expected = shift @ shift + np.trace(cov_a + cov_b - 2 * scipy.linalg.sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("sizes", [[60], [1, 59], [7, 20, 33]])
def test_running_moments_do_not_depend_on_batches_or_on_large_means(sizes):
    # sums of squares would lose all digits here
    rows = draw(60, 3) + 1e8
    running = Moments()
    for part in rows.split(sizes):
        running.add(part)
    assert running.count == 60
    torch.testing.assert_close(running.gaussian(), (rows.mean(0), torch.cov(rows.T)), rtol=1e-7, atol=1e-7)


def test_class_frechet_sees_swapped_conditions():
    # The union of the two conditions is the same set, so FD is blind to the swap.
    parts = [draw(30, 4), draw(30, 4, seed=1) + 10]
    right, wrong = dict(enumerate(map(moments, parts))), dict(enumerate(map(moments, parts[::-1])))
    assert class_frechet_distance(right, right) == pytest.approx(0, abs=1e-9)
    assert class_frechet_distance(wrong, right) > 300
    by_hand = [frechet_distance(parts[i], parts[1 - i]) for i in (0, 1)]
    assert class_frechet_distance(wrong, right) == pytest.approx(sum(by_hand) / 2)


def brute_force(real: torch.Tensor, fake: torch.Tensor, k: int) -> dict[str, float]:
    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return math.dist(a.tolist(), b.tolist())

    def radius(rows: torch.Tensor, i: int) -> float:
        return sorted(distance(rows[i], rows[j]) for j in range(len(rows)) if j != i)[k - 1]

    real_radius, fake_radius = ([radius(rows, i) for i in range(len(rows))] for rows in (real, fake))
    gap = [[distance(r, f) for f in fake] for r in real]
    rows, columns = range(len(real)), range(len(fake))
    return {
        "precision": sum(any(gap[i][j] <= real_radius[i] for i in rows) for j in columns) / len(fake),
        "recall": sum(any(gap[i][j] <= fake_radius[j] for j in columns) for i in rows) / len(real),
        "density": sum(gap[i][j] < real_radius[i] for i in rows for j in columns) / (k * len(fake)),
        "coverage": sum(any(gap[i][j] < real_radius[i] for j in columns) for i in rows) / len(real),
    }


@pytest.mark.parametrize("k", [1, 3, 5])
def test_manifold_metrics_equal_brute_force(k, monkeypatch):
    # The chunks are uneven on purpose.
    monkeypatch.setattr(metrics, "CHUNK", 7)
    real, fake = draw(30, 3), 1.3 * draw(23, 3, seed=1) + 0.2
    assert neighbour_scores(real, fake, (k, k)) == pytest.approx(brute_force(real, fake, k), rel=1e-12)
    both, other = neighbour_scores(real, fake, (k, 2), neighbour_radii(real, (k, 2))), brute_force(real, fake, 2)
    assert both == pytest.approx({**brute_force(real, fake, k), "density": other["density"], "coverage": other["coverage"]})


def test_manifold_metrics_of_identical_and_disjoint_sets():
    rows = draw(40, 8)
    assert set(neighbour_scores(rows, rows).values()) == {1}
    assert set(neighbour_scores(rows, rows + 100).values()) == {0}


def test_dropped_mode_costs_recall_and_coverage_alone():
    two_modes = torch.cat([draw(50, 2), draw(50, 2, seed=1) + 50])
    expected = {"precision": 1, "recall": 0.5, "density": 1, "coverage": 0.5}
    assert neighbour_scores(two_modes, two_modes[:50]) == expected


def test_outlier_fools_precision_but_not_density():
    # One real outlier's ball spans the gap, where all the fake rows lie: precision 1, although nothing real is there.
    real = torch.cat([draw(50, 2), torch.full((1, 2), 100.0)])
    fake = draw(50, 2, seed=1) + 50
    scores = neighbour_scores(real, fake)
    assert scores["precision"] == 1 and scores["density"] <= 1 / 5
    # One fake outlier fools recall in the same way; coverage, whose balls are real, does not move.
    fake = torch.cat([draw(50, 2) + 100, torch.full((1, 2), -100.0)])
    scores = neighbour_scores(draw(50, 2), fake)
    assert scores["recall"] == 1 and scores["coverage"] == 0


def test_manifold_metrics_survive_duplicates():
    # Far from the origin and from each other: the product form of the distance would not see that these rows coincide.
    rows = (1e6 * draw(10, 64) + 1e6).repeat(4, 1)
    scores = neighbour_scores(rows, rows)
    assert scores["precision"] == scores["recall"] == 1
    assert neighbour_radii(rows)[:, 0].tolist() == 40 * [0]


def test_near_duplicates_in_single_precision_are_told_apart(monkeypatch):
    # copies of few images that differ in the last bits, as the same image in other batches does: rounding of |x|^2 is larger than that
    def copies(count: int, seed: int) -> torch.Tensor:
        rows = (20 * draw(5, 64) + 3).repeat(count, 1).float()
        flips = draw(*rows.shape, seed=seed) > 2.3
        return torch.where(flips, rows.nextafter(torch.tensor(math.inf)), rows)

    real, fake = copies(8, seed=1), copies(7, seed=2)
    expected = {**brute_force(real, fake, 3), **{name: brute_force(real, fake, 5)[name] for name in ("density", "coverage")}}
    assert all(0 < value < 1 for value in expected.values())
    assert neighbour_scores(real, fake) == pytest.approx(expected, rel=1e-12)
    # one of each image, so that the fake balls alone are small
    few = torch.cat([real[:5], real[:1] + 9])
    assert neighbour_scores(few, fake)["recall"] == brute_force(few, fake, 3)["recall"]
    monkeypatch.setattr(metrics, "_recompute", lambda *args: None)
    wrong = neighbour_scores(real, fake)
    assert all(wrong[name] != pytest.approx(value, rel=0.01) for name, value in expected.items())


@pytest.mark.parametrize("scale", [0, 1, 1e9])
def test_error_of_squared_distances_is_bounded(scale):
    a, b = draw(30, 512) + 1e3, draw(20, 512, seed=1) + 1e3
    b[0] *= 1 + scale
    ((_, square, slack),) = metrics._squares(a, b, iter)
    exact = torch.tensor([[math.dist(x, y) ** 2 for y in b.tolist()] for x in a.tolist()], dtype=torch.float64)
    assert 0 < (square - exact).abs().max() < slack / 2


def test_class_accuracy():
    c, scores = torch.tensor([0, 1, 2, 2]), torch.eye(3)[[0, 1, 2, 0]]
    assert class_accuracy(scores, c) == 0.75


def test_inception_score_is_a_mean_over_splits():
    for prob, expected in ((torch.eye(4).repeat(5, 1), 4), (torch.full((20, 4), 0.25), 1), (torch.eye(4)[[2] * 6], 1)):
        assert inception_score(prob) == pytest.approx(expected)
    # each half holds one class alone: 1 apart, 2 together
    prob = torch.eye(2).repeat_interleave(10, 0)
    assert inception_score(prob, split=10) == pytest.approx(1) and inception_score(prob) == pytest.approx(2)
    prob = (2 * draw(30, 5)).softmax(1).numpy()
    expected = np.mean([np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()) for p in (prob[:20], prob[20:])])
    assert inception_score(torch.from_numpy(prob), split=20) == pytest.approx(expected, rel=1e-12)


def views(pairs: int, width: int, contamination: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views of each of so many images, in features of this ICR: S_s = (1 / ICR - 1) S_xi, seen through an oblique map."""
    shared = (1 / contamination - 1) ** 0.5 * draw(pairs, width)
    oblique = draw(width, width, seed=3) + 2 * torch.eye(width)
    return (shared + draw(pairs, width, seed=1)) @ oblique, (shared + draw(pairs, width, seed=2)) @ oblique


WIDE = [(pairs, 256, 0.2) for pairs in (512, 600, 1000)]


@pytest.mark.parametrize(
    ("pairs", "width", "contamination"), [*((4000, 8, share) for share in (0.05, 0.2, 0.5, 0.9, 1.0)), *WIDE]
)
def test_monitor_reads_the_contamination_of_gaussian_views(pairs, width, contamination):
    """At 1 they share nothing; few rows do not bias it."""
    assert icr(*views(pairs, width, contamination)) == pytest.approx(contamination, rel=0.03)


def test_monitor_without_debiasing_would_read_003_for_020():
    h1, h2 = views(300, 256, 0.2)
    plain = torch.linalg.solve(torch.cov((h1 - h2).T) / 2, torch.cov(((h1 + h2) / 2).T)).trace() - 256 / 2
    assert 256 / (256 + plain.item()) == pytest.approx(0.03, abs=0.005)
    # the debiased estimate would be right on average only
    with pytest.raises(ValueError, match="300 rows of views; at least 512"):
        icr(h1, h2)


GOOD, C = draw(10, 3), torch.arange(10) % 2
BROKEN = GOOD.clone()
BROKEN[3, 1] = math.nan


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet_distance(GOOD, GOOD[:1]), "1 rows of features; at least 2"),
        (lambda: frechet_distance(GOOD, BROKEN), "1 of 10 rows of features are not finite"),
        (lambda: frechet_distance(GOOD, GOOD[:, :2]), "3 and 2 features"),
        (lambda: frechet_distance(GOOD, GOOD[0]), r"must be \[rows, features\]"),
        (lambda: class_frechet_distance({0: moments(GOOD), 1: moments(GOOD)}, {0: moments(GOOD)}), "condition 1 is in one set"),
        (lambda: class_frechet_distance({}, {}), "no conditions"),
        (lambda: frechet_from_moments(GOOD[0], BROKEN, GOOD[0], GOOD), "covariances are not finite"),
        (lambda: neighbour_scores(GOOD, GOOD[:3], (3, 2)), "3 rows of fake features; at least 4"),
        (lambda: neighbour_scores(BROKEN, GOOD), "real features are not finite"),
        (lambda: neighbour_scores(GOOD[:5], GOOD), "5 rows of real features; at least 6"),
        (lambda: neighbour_scores(GOOD, GOOD[:, :2]), "3 and 2 features"),
        (lambda: neighbour_radii(GOOD[:5]), "5 rows of features; at least 6"),
        (lambda: class_accuracy(GOOD, C[:3]), "one per row is needed"),
        (lambda: class_accuracy(BROKEN, C), "1 of 10 rows of scores are not finite"),
        (lambda: inception_score(GOOD), "softmax"),
        (lambda: icr(GOOD, GOOD[:5]), "not two of each image"),
        (lambda: icr(GOOD[:5], GOOD[:5]), "5 rows of views; at least 6"),
        (lambda: icr(GOOD, BROKEN), "1 of 10 rows of views are not finite"),
        (lambda: icr(GOOD, GOOD), "do not differ in some direction"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
