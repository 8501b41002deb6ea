"""train/bench_pair.py: full-size networks take a training step on a CPU, and every way to score the pair gives the same loss."""

import dataclasses
import math

import pytest
import torch

from mclr.schedule import NONE
from train.bench_pair import ARMS, GAMMA, RESOLUTION, build, peak_memory, sample_once, train_once

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("model", RESOLUTION)
def test_a_pair_at_full_size(model):
    """310M and 280M parameters: about a minute and 8 GiB each on two cores."""
    peak_memory(reset=True)
    full = build(model, CPU)
    still = dataclasses.replace(full, lr=0.0)
    train_once(still, *ARMS["fp32, one forward"])  # an EDM2's weights come to unit magnitude
    loss = {arm: train_once(still, *how)[1] for arm, how in ARMS.items()}
    assert loss["fp32, one forward"] == pytest.approx(loss["fp32, two forwards"], rel=1e-5)
    assert loss["bf16, one forward"] == pytest.approx(loss["fp32, two forwards"], rel=1e-2)
    # the uniform ratio of one sample has no bound: what a step must do is to move the loss
    train_once(full, bf16=True, paired=True)
    after = train_once(full, bf16=True, paired=True)[1]
    assert math.isfinite(after) and after != loss["bf16, one forward"]
    assert peak_memory() < 12


@pytest.mark.slow
def test_var_samples_at_full_size_with_and_without_guidance():
    full = build("var-d16", CPU)
    for gamma in (NONE, GAMMA):
        tokens_BL = sample_once(full, gamma, bf16=True, images=1)[1]
        assert tokens_BL.shape == (1, 680) and tokens_BL.min() >= 0 and tokens_BL.max() < 4096
