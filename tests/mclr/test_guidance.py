"""One line of guidance: its shapes, its special weights, and that the inverse undoes it."""

import pytest
import torch
from toy import wave

from mclr.guidance import Guidance, mix
from mclr.schedule import NONE

IMAGES, GUIDE_IMAGES = wave(3, 2, 4, 4), wave(3, 2, 4, 4, phase=1)
LOGITS, GUIDE_LOGITS = wave(3, 5, 7), wave(3, 5, 7, phase=1)


@pytest.mark.parametrize(("pred", "guide", "terms"), [(IMAGES, GUIDE_IMAGES, 1), (LOGITS, GUIDE_LOGITS, 5)])
def test_one_weight_per_image_or_token(pred, guide, terms):
    weight_RT = wave(3, terms, phase=2)
    mixed = mix(pred, guide, weight_RT)
    for row in range(3):
        for term in range(terms):
            here = (row, term) if terms > 1 else (row,)
            assert torch.equal(mixed[here], pred[here] + weight_RT[row, term] * (pred[here] - guide[here]))
    assert torch.equal(mix(pred, guide, 0.0), pred)


@pytest.mark.parametrize(("pred", "guide", "terms"), [(IMAGES, GUIDE_IMAGES, 1), (LOGITS, GUIDE_LOGITS, 5)])
@pytest.mark.parametrize("weight", [0.3, 1.0, 7.5, -0.4])
def test_negative_weights_undo_positive_ones(pred, guide, terms, weight):
    """g = -w / (1 + w), so that 1 + g = b = 1 / (1 + w): the objective's inverse of the sampler's guidance, and back."""
    for form in (float, lambda number: torch.full((3, terms), number, dtype=torch.float64)):
        guided = mix(pred, guide, form(weight))
        assert (guided - pred).abs().max() > 0.1
        assert (mix(guided, guide, form(-weight / (1 + weight))) - pred).abs().max() < 1e-13


def test_no_guidance_is_the_default():
    assert Guidance() == Guidance(NONE, None) and Guidance().gamma.at(0.5) == 0
    with pytest.raises(ValueError, match="guide= has no effect without gamma"):
        Guidance(guide=mix)
