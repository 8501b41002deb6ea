"""Which conditions are drawn, how often, and which rows they need."""

import pytest
import torch

from mclr.contrast import draw_any, draw_other, draw_posterior, matched_rows, paired_rows

ALMOST_ONE = 1 - 2**-24  # the largest fp32 uniform


def grid(n: int) -> torch.Tensor:
    """n uniforms, one in the middle of each of n equal intervals."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_another_class_is_never_the_own_one_and_each_other_as_likely(classes):
    for c in (0, classes // 2, classes - 1):
        uniform_B = grid(4 * (classes - 1))
        drawn_B1 = draw_other(torch.full_like(uniform_B, c).long(), uniform_B, classes)
        assert drawn_B1.shape == (len(uniform_B), 1)
        assert drawn_B1[:, 0].bincount(minlength=classes).tolist() == [4 * (k != c) for k in range(classes)]
    ends = torch.tensor([0.0, ALMOST_ONE])
    assert draw_other(torch.tensor([0, classes - 1]), ends, classes)[:, 0].tolist() == [1, classes - 2]
    assert draw_other(torch.tensor([classes - 1, 0]), ends, classes)[:, 0].tolist() == [0, classes - 1]


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_any_class_is_as_likely_as_any_other(classes):
    assert draw_any(grid(4 * classes), classes)[:, 0].bincount().tolist() == [4] * classes
    assert draw_any(torch.tensor([0.0, ALMOST_ONE]), classes).tolist() == [[0], [classes - 1]]


def frequencies(posterior_K: list[float], truncate: float, n: int = 10_000) -> list[float]:
    posterior_BTK = torch.tensor(posterior_K).expand(n, 1, -1)
    drawn = draw_posterior(posterior_BTK, grid(n), truncate)
    assert drawn.shape == (n, 1)
    return (drawn[:, 0].bincount(minlength=len(posterior_K)) / n).tolist()


@pytest.mark.parametrize(
    ("posterior", "truncate", "expected"),
    [
        ([0.1, 0.0, 0.55, 0.35, 0.0], 0.0, [0.1, 0, 0.55, 0.35, 0]),
        ([0.004, 0.4, 0.015, 0.02, 0.561], 0.02, [0, 0.4 / 0.981, 0, 0.02 / 0.981, 0.561 / 0.981]),
        # the most likely class stays
        ([0.2, 0.45, 0.35], 0.9, [0, 1, 0]),
        ([0.25] * 4, 0.9, [0, 0, 0, 1]),
    ],
)
def test_draws_have_the_frequencies_of_the_posterior_without_its_tail(posterior, truncate, expected):
    assert frequencies(posterior, truncate) == pytest.approx(expected, abs=1e-4)


def test_truncation_of_a_flat_posterior_over_many_classes_keeps_most_of_them():
    drawn = frequencies([1 / 1000] * 1000, 0.02)
    assert sum(share > 0 for share in drawn) == pytest.approx(980, abs=1)


def test_a_truncated_class_is_drawn_at_neither_end_of_the_uniform():
    posterior = torch.tensor([0.001, 0.3, 0.001, 0.697, 0.001]).expand(2, 1, 5)
    assert draw_posterior(posterior, torch.tensor([0.0, ALMOST_ONE]), 0.02).tolist() == [[1], [3]]


def test_every_term_is_drawn_from_its_own_posterior():
    posterior_BTK = torch.tensor([[[1.0, 0.0, 0.0], [0.3, 0.4, 0.3]], [[0.0, 0.0, 1.0], [0.3, 0.4, 0.3]]])
    assert draw_posterior(posterior_BTK, torch.tensor([0.5, 0.8]), 0.0).tolist() == [[0, 1], [2, 2]]


def random_rows(batch: int, terms: int, classes: int, seed: int, share: float = 0.8):
    """Rows for conditions, draws and strengths at random, a share of the terms with strength; and what they were made from."""
    generator = torch.Generator().manual_seed(seed)
    c_B = torch.randint(classes + 1, (batch,), generator=generator)
    contrast_BT = torch.randint(classes, (batch, terms), generator=generator)
    lam_BT = torch.rand(batch, terms, generator=generator) * (torch.rand(batch, terms, generator=generator) < share)
    weight_BT = torch.rand(batch, terms, generator=generator)
    return paired_rows(c_B, contrast_BT, classes, lam_BT, weight_BT), c_B, contrast_BT, lam_BT, weight_BT


@pytest.mark.parametrize(("batch", "terms", "classes"), [(8, 1, 10), (5, 14, 3), (7, 30, 10), (1, 1, 2), (16, 4, 1000)])
def test_every_term_finds_the_row_it_needs_and_no_row_is_superfluous(batch, terms, classes):
    for seed in range(5):
        rows, c_B, contrast_BT, lam_BT, weight_BT = random_rows(batch, terms, classes, seed)
        own = torch.arange(batch)[:, None].expand_as(lam_BT)
        assert torch.equal(rows.index_R[:batch], own[:, 0]) and torch.equal(rows.c_R[:batch], c_B)
        needed = (contrast_BT != c_B[:, None]) & (lam_BT != 0)
        assert torch.equal(rows.contrast_BT != own, needed)
        # the row of a term is one of its own sample, under the condition that it drew
        assert torch.equal(rows.index_R[rows.contrast_BT], own)
        assert torch.equal(rows.c_R[rows.contrast_BT][needed], contrast_BT[needed])
        # a row serves all terms that drew its condition: as many rows as distinct pairs
        pairs = {(b, int(contrast_BT[b, t])) for b, t in needed.nonzero().tolist()}
        scored = list(zip(rows.index_R.tolist(), rows.c_R.tolist(), strict=True))[batch : batch + len(pairs)]
        assert set(scored) == pairs and rows.contrast_BT.max() == batch - 1 + len(pairs)
        assert len(rows.c_R) == len(rows.index_R) == batch + len(pairs)
        assert torch.equal(rows.lam_BT, lam_BT) and torch.equal(rows.weight_BT, weight_BT) and rows.mix_BT is None


def test_one_draw_for_all_terms_is_one_row_per_sample():
    lam_BT = torch.ones(6, 9)
    rows = paired_rows(torch.zeros(6).long(), torch.tensor([[1]] * 6), 2, lam_BT, torch.ones(6, 1))
    assert rows.c_R.tolist() == [0] * 6 + [1] * 6
    assert torch.equal(rows.contrast_BT, torch.arange(6, 12)[:, None].expand(6, 9))
    assert rows.weight_BT.shape == (6, 9)


def test_terms_without_strength_or_weight_need_no_row():
    ones, zeros = torch.ones(8, 2), torch.zeros(8, 2)
    c_B, other = torch.zeros(8).long(), torch.ones(8, 1).long()
    assert len(paired_rows(c_B, other, 2, zeros, ones).c_R) == 8
    assert len(paired_rows(c_B, other, 2, ones, zeros).c_R) == 8
    assert len(paired_rows(c_B, other, 2, -ones, ones).c_R) == 16


def test_matched_rows_are_the_samples_themselves():
    c_B, lam_BT, mix_BT = torch.tensor([3, 1, 2]), torch.rand(3, 4), torch.rand(3, 4)
    rows = matched_rows(c_B, lam_BT, mix_BT)
    assert rows.index_R.tolist() == [0, 1, 2] and torch.equal(rows.c_R, c_B)
    assert torch.equal(rows.contrast_BT, torch.arange(3)[:, None].expand(3, 4))
    assert torch.equal(rows.lam_BT, lam_BT) and rows.weight_BT.eq(0).all() and torch.equal(rows.mix_BT, mix_BT)
