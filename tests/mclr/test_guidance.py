"""One line of guidance: its shapes, its special weights, and that the inverse undoes it."""

import pytest
import torch
from toy import wave

from mclr.guidance import Guidance, mix
from mclr.schedule import NONE

IMAGES, GUIDE_IMAGES = wave(3, 2, 4, 4), wave(3, 2, 4, 4, phase=1)
LOGITS, GUIDE_LOGITS = wave(3, 5, 7), wave(3, 5, 7, phase=1)


def test_one_weight_per_image():
    weight_R1 = torch.tensor([[0.0], [2.0], [-0.5]], dtype=torch.float64)
    mixed = mix(IMAGES, GUIDE_IMAGES, weight_R1)
    for row, weight in enumerate([0.0, 2.0, -0.5]):
        assert torch.equal(mixed[row], IMAGES[row] + weight * (IMAGES[row] - GUIDE_IMAGES[row]))


def test_one_weight_per_token():
    weight_RL = wave(3, 5, phase=2)
    mixed = mix(LOGITS, GUIDE_LOGITS, weight_RL)
    for row in range(3):
        for token in range(5):
            pred, guide = LOGITS[row, token], GUIDE_LOGITS[row, token]
            assert torch.equal(mixed[row, token], pred + weight_RL[row, token] * (pred - guide))


@pytest.mark.parametrize(("pred", "guide", "terms"), [(IMAGES, GUIDE_IMAGES, 1), (LOGITS, GUIDE_LOGITS, 5)])
@pytest.mark.parametrize("weight", [0.3, 1.0, 7.5, -0.4])
def test_negative_weights_undo_positive_ones(pred, guide, terms, weight):
    """g = -w / (1 + w), so that 1 + g = b = 1 / (1 + w): the objective's inverse of the sampler's guidance, and back."""
    for form in (float, lambda number: torch.full((3, terms), number, dtype=torch.float64)):
        guided = mix(pred, guide, form(weight))
        assert (guided - pred).abs().max() > 0.1
        assert (mix(guided, guide, form(-weight / (1 + weight))) - pred).abs().max() < 1e-13


def test_special_weights():
    assert torch.equal(mix(LOGITS, GUIDE_LOGITS, 0.0), LOGITS)
    assert torch.allclose(mix(LOGITS, GUIDE_LOGITS, -1.0), GUIDE_LOGITS)
    assert torch.allclose(mix(IMAGES, GUIDE_IMAGES, 1.0), 2 * IMAGES - GUIDE_IMAGES)


def test_no_guidance_is_the_default():
    assert Guidance() == Guidance(NONE, None) and Guidance().gamma.at(0.5) == 0
    with pytest.raises(ValueError, match="guide= has no effect without gamma"):
        Guidance(guide=mix)
