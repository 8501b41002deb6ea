"""p(c | what the network sees): Bayes' rule by enumeration for tokens, the contract of the classifier, and its calibration."""

import itertools

import pytest
import torch
from toy import K, ToyClassifier, ToyTokenizer, ToyTokens, V, float64, logits_of, toy, wave

from mclr.contrast import draw_posterior
from mclr.next_scale import NextScale
from mclr.objective import Objective
from mclr.posterior import calibration, fold_bins, noisy_posterior, prefix_posterior


@pytest.mark.parametrize("scales", [(1, 1, 1), (1, 1, 1, 1), (1, 2)], ids=str)
@float64()
def test_prefix_posterior_is_bayes_rule_by_enumeration(scales):
    """Over every token sequence there is: p(c | scales before) = sum of p(c, sequence) over all that share those scales."""
    scale_L = [k for k, side in enumerate(scales) for _ in range(side * side)]
    L = len(scale_L)
    tokens_NL = torch.tensor(list(itertools.product(range(V), repeat=L)))
    paradigm, net = NextScale(scales, K, ToyTokenizer(scales)), ToyTokens(scales)
    probe = paradigm.probe(tokens_NL, None)
    everyone = torch.arange(len(tokens_NL))
    joint = []
    for c in range(K):
        logits = logits_of(net, probe.inputs["teacher"], torch.full_like(everyone, c))
        joint.append(logits.softmax(-1).gather(-1, tokens_NL[..., None])[..., 0].prod(1) / K)
    joint_NK = torch.stack(joint, 1)
    assert torch.allclose(joint_NK.sum(0), torch.full((K,), 1 / K))

    posterior_NLK = prefix_posterior(paradigm, net, probe)
    assert posterior_NLK.shape == (len(tokens_NL), L, K)
    for t in range(L):
        before = scale_L.index(scale_L[t])
        prefix_N = (tokens_NL[:, :before] * V ** torch.arange(before)).sum(1)
        total_K = torch.zeros(V**L, K).index_add_(0, prefix_N, joint_NK)[prefix_N]
        assert (posterior_NLK[:, t] - total_K / total_K.sum(1, keepdim=True)).abs().max() < 1e-12
    assert (posterior_NLK[:, -1] - 1 / K).abs().max() > 0.1


def test_prefix_posterior_carries_no_gradient_and_is_fp32():
    case = toy("tokens", torch.float32)
    probe, _ = case.ask(Objective())
    posterior, _ = case.posterior(probe, case.c_B)
    assert posterior.dtype == torch.float32 and not posterior.requires_grad


def test_noisy_posterior_is_the_classifier_at_the_noisy_point():
    """Softmax without gradient, the plain cross-entropy with it (no label smoothing), both of one forward."""
    classifier, asked = ToyClassifier().to(torch.float32), []

    def counted(*inputs):
        asked.append(inputs)
        return classifier(*inputs)

    noisy, sigma = wave(6, 1, 2, 2, phase=1).float(), torch.linspace(0.5, 2, 6)
    true_c_B = torch.tensor([0, 1, 2, 0, 1, 2])
    posterior_B1K, loss_B = noisy_posterior(counted, 3, (noisy, sigma), true_c_B)
    assert len(asked) == 1 and asked[0][0] is noisy and asked[0][1] is sigma
    logits = classifier(noisy, sigma)
    assert not posterior_B1K.requires_grad and torch.equal(posterior_B1K, logits.softmax(-1).detach()[:, None])
    assert torch.allclose(loss_B, -logits.log_softmax(-1)[torch.arange(6), true_c_B])
    (grad,) = torch.autograd.grad(loss_B.sum(), classifier.weight)
    assert grad.abs().max() > 0


def drawn_conditions(posterior_BTK: torch.Tensor) -> torch.Tensor:
    """True conditions [B] of a calibrated posterior that is the same for all terms of a sample."""
    return torch.multinomial(posterior_BTK[:, 0], 1)[:, 0]


def ece_of(posterior_BTK: torch.Tensor, c_B: torch.Tensor) -> float:
    return fold_bins({name: float(value) for name, value in calibration(posterior_BTK, c_B, 0.02).items()})["posterior_ece"]


def posteriors(batch: int, terms: int = 1) -> torch.Tensor:
    """Ten classes, from nearly even to nearly sure, [B, T, 10]."""
    return (torch.randn(batch, 1, 10) * torch.rand(batch, 1, 1) * 5).softmax(-1).expand(-1, terms, -1)


@pytest.mark.parametrize("terms", [1, 3])
def test_a_calibrated_posterior_reads_the_noise_floor(terms):
    """Up to 1.1 / sqrt(B), as the docstring says: little for many samples, and not little for 64."""
    torch.manual_seed(0)

    def ece(batch: int) -> float:
        posterior_BTK = posteriors(batch, terms)
        return ece_of(posterior_BTK, drawn_conditions(posterior_BTK))

    assert ece(100_000) < 1.1 / 100_000**0.5
    floor = sum(ece(64) for _ in range(200)) / 200
    assert 0.6 / 8 < floor < 1.1 / 8


@pytest.mark.parametrize(("confidence", "right", "expected"), [(0.95, 60, 0.35), (0.55, 90, 0.35), (1.0, 100, 0.0)])
def test_over_and_under_confidence_read_their_size(confidence, right, expected):
    posterior_B1K = torch.full((100, 1, 10), (1 - confidence) / 9)
    posterior_B1K[..., 3] = confidence
    c_B = torch.where(torch.arange(100) < right, 3, 7)
    assert ece_of(posterior_B1K, c_B) == pytest.approx(expected, abs=1e-6)


def test_terms_and_bins_do_not_cancel():
    """Sure and wrong at one term, modest and right at the other: .9 and .4 beside accuracies 0 and 1 average |-.9| and |.6|."""
    posterior_BTK = torch.tensor([[[0.9, 0.05, 0.05], [0.3, 0.4, 0.3]]]).expand(4, 2, 3)
    assert ece_of(posterior_BTK, torch.ones(4).long()) == pytest.approx((0.9 + 0.6) / 2)


def test_micro_batches_read_what_the_whole_batch_reads():
    torch.manual_seed(0)
    posterior_B1K, c_B = posteriors(64), torch.randint(10, (64,))
    parts = [calibration(p, c, 0.02) for p, c in zip(posterior_B1K.split(4), c_B.split(4), strict=True)]
    means = {name: float(sum(part[name] for part in parts)) / len(parts) for name in parts[0]}
    found = fold_bins(means | {"loss": 0.5})
    assert found.keys() == {"posterior_ece", "posterior_tail", "loss"} and found["loss"] == 0.5
    assert found["posterior_ece"] == pytest.approx(ece_of(posterior_B1K, c_B), rel=1e-5)
    assert found["posterior_tail"] == pytest.approx(calibration(posterior_B1K, c_B, 0.02)["posterior_tail"].item())
    assert fold_bins({"loss": 0.5}) == {"loss": 0.5}


def test_the_tail_is_counted():
    """At 2 % class 3 is cut at the first term (.01; with .02 more it would be too much), and all but class 0 at the second."""
    posterior_BTK = torch.tensor([[[0.90, 0.07, 0.02, 0.01], [0.985, 0.009, 0.003, 0.003]]]).expand(4, 2, 4)
    found = calibration(posterior_BTK, torch.arange(4), 0.02)["posterior_tail"]
    assert found.shape == () and found == pytest.approx((1 + 3) / 8)
    assert calibration(posterior_BTK, torch.arange(4), 0.0)["posterior_tail"] == 0


def test_the_tail_is_what_is_never_drawn():
    torch.manual_seed(0)
    for posterior_11K in posteriors(20).split(1):
        uniform_N = (torch.arange(20_000) + 0.5) / 20_000
        drawn = set(draw_posterior(posterior_11K.expand(20_000, -1, -1), uniform_N, 0.1)[:, 0].tolist())
        tail = {c for c in range(10) if calibration(posterior_11K, torch.tensor([c]), 0.1)["posterior_tail"] == 1}
        assert tail == set(range(10)) - drawn
