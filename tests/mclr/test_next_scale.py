"""The VAR paradigm: how a code is picked, exact likelihood, and sampling against a sampler without caches and shortcuts."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from toy import SCALES, Given, K, V, float64, logits_of, toy, wave

from mclr.guidance import Guidance, mix
from mclr.likelihood import Draws
from mclr.models.var import VAR, VARConfig
from mclr.models.vqvae import VQVAE, VQVAEConfig
from mclr.next_scale import NextScale, blend, pick, scale_progress
from mclr.objective import Objective
from mclr.schedule import Schedule

ALMOST_ONE = 1 - 2**-24  # the largest fp32 uniform


def frequencies(logits_V: torch.Tensor, top_k: int = 0, top_p: float = 1.0, n: int = 20_000) -> torch.Tensor:
    """Share of each code over an even grid of uniforms: exact to 1 / n."""
    uniform_Bl = ((torch.arange(n) + 0.5) / n)[:, None]
    drawn = pick(logits_V.expand(n, 1, -1), uniform_Bl, top_k, top_p)
    assert drawn.shape == (n, 1) and drawn.dtype == torch.int64
    return drawn[:, 0].bincount(minlength=len(logits_V)) / n


def kept(prob_V: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """By definition: the top_k most likely codes, renormalised; of these the fewest whose mass reaches top_p, renormalised."""
    order = sorted(range(len(prob_V)), key=lambda v: (-prob_V[v], v))
    order = order[: top_k or None]
    total = sum(prob_V[v] for v in order)
    chosen, mass = [], 0.0
    for v in order:
        if mass >= top_p:
            break
        chosen.append(v)
        mass += prob_V[v] / total
    mask = torch.zeros_like(prob_V)
    mask[chosen] = 1
    return prob_V * mask / (prob_V * mask).sum()


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 1.0), (1, 1.0), (100, 1.0), (0, 0.7), (0, 0.01), (5, 0.8), (3, 0.95)])
def test_codes_are_picked_with_the_frequencies_of_the_definition(top_k, top_p):
    for phase in range(3):
        logits_V = 2 * wave(9, phase=phase).float()
        expected = kept(logits_V.softmax(-1), top_k, top_p)
        measured = frequencies(logits_V, top_k, top_p)
        assert (measured - expected).abs().max() < 1e-3
        assert measured[expected == 0].eq(0).all() and measured[expected > 0.001].ne(0).all()


def test_ties_go_to_the_lower_code():
    """top_k keeps exactly k of equally likely codes, so that a sample does not depend on the sorting of a machine."""
    logits_V = torch.tensor([1.0, 3.0, 3.0, 1.0, 3.0])
    assert frequencies(logits_V, top_k=2).tolist() == [0, 0.5, 0.5, 0, 0]
    assert frequencies(logits_V, top_k=1).tolist() == [0, 1, 0, 0, 0]
    assert frequencies(torch.zeros(200), top_k=100)[:100].min() > 0


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.6)])
def test_the_ends_of_the_uniform_pick_codes_that_are_kept(top_k, top_p):
    for seed in range(50):
        logits_V = 3 * wave(64, phase=seed).float()
        logits_V[::7] = -torch.inf
        expected = kept(logits_V.softmax(-1), top_k, top_p)
        ends = pick(logits_V.expand(2, 1, -1), torch.tensor([[0.0], [ALMOST_ONE]]), top_k, top_p)[:, 0]
        # the most likely first where the codes are sorted, else the first that can be
        first = expected.argmax() if top_k or top_p < 1 else expected.gt(0).nonzero()[0, 0]
        assert ends[0] == first and expected[ends[1]] > 0


def test_every_token_is_picked_from_its_own_logits():
    logits = torch.full((2, 3, 4), -torch.inf)
    codes = torch.tensor([[0, 3, 1], [2, 2, 0]])
    logits.scatter_(-1, codes[..., None], 0.0)
    assert torch.equal(pick(logits, torch.full((2, 3), 0.5), 0, 1.0), codes)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 1.0), (0, 0.7), (5, 0.8)])
@pytest.mark.parametrize("progress", [0.0, 1 / 3, 1.0])
def test_blends_are_the_gumbel_softmax_of_the_likely_codes(top_k, top_p, progress):
    """By definition, token by token; the noise belongs to the code, whatever its rank."""
    logits_BlV = 2 * wave(2, 3, 9).float()
    uniform_BlV = (wave(2, 3, 9, phase=1).float() + 1) / 2
    shares = blend(logits_BlV, uniform_BlV, top_k, top_p, progress)
    tau = max(0.27 * (1 - 0.95 * progress), 0.005)
    for b in range(2):
        for token in range(3):
            logits_V = logits_BlV[b, token].double()
            gumbel_V = -(-uniform_BlV[b, token].double().log()).log()
            odds_V = ((logits_V * (1 + progress) + gumbel_V) / tau).exp()
            odds_V[kept(logits_V.softmax(-1), top_k, top_p) == 0] = 0
            assert torch.allclose(shares[b, token].double(), odds_V / odds_V.sum(), rtol=1e-3, atol=1e-6)


def test_blends_at_the_ends_of_the_uniform():
    """Of an only code the share is 1, and of many the shares are numbers."""
    logits_BlV = 3 * wave(1, 4, 16).float()
    for uniform in (0.0, ALMOST_ONE):
        uniform_BlV = torch.full((1, 4, 16), uniform)
        only = torch.nn.functional.one_hot(logits_BlV.argmax(-1), 16).float()
        assert torch.equal(blend(logits_BlV, uniform_BlV, 1, 1.0, 0.5), only)
        assert torch.allclose(blend(logits_BlV, uniform_BlV, 0, 1.0, 0.5).sum(-1), torch.ones(1, 4))


@float64()
def test_log_likelihood_is_a_distribution_over_codes():
    """exp(value) sums to 1 over the codes of a token; the rows and conditions are those asked for; nothing to calibrate."""
    case = toy("tokens")
    probe = case.paradigm.probe(case.x_B, Given())
    index_R, c_R = torch.tensor([3, 0, 3]), torch.tensor([1, K, 2])
    prediction = case.paradigm.predict(case.net, probe, index_R, c_R)
    probe.inputs["tokens"] = case.x_B.clone()
    total = 0
    for code in range(V):
        probe.inputs["tokens"][:, 4] = code
        scores = case.paradigm.log_likelihood(prediction, probe, index_R)
        assert scores.value_RT.shape == (3, 14) and scores.aux_R.eq(0).all()
        logits = logits_of(case.net, probe.inputs["teacher"], c_R, index_R)[:, 4]
        assert torch.allclose(scores.value_RT[:, 4], logits[:, code] - logits.logsumexp(-1), rtol=1e-12)
        total = total + scores.value_RT[:, 4].exp()
    assert torch.allclose(total, torch.ones(3))


def test_progress_is_that_of_the_scale():
    case = toy("tokens", torch.float32)
    probe, _ = case.ask(Objective())
    assert probe.progress_BT[0].tolist() == [0.0] + [0.5] * 4 + [1.0] * 9 and probe.progress_BT.shape == (8, 14)
    assert torch.equal(probe.inputs["teacher"], case.paradigm.tokenizer.teacher(case.x_B))
    assert case.paradigm.dims == 14 and scale_progress(SCALES) == [0.0, 0.5, 1.0]
    assert scale_progress((1,)) == [0.0]


@cache
def networks(guide_is_shared: bool = False):
    """A tiny VAR in which every path is alive (a fresh one is almost unconditional), a guide of another size and form, five scales."""
    torch.manual_seed(0)
    scales = (1, 2, 3, 4, 5)
    tokenizer = VQVAE(VQVAEConfig(1, ch=8, ch_mult=(1,), num_res_blocks=1, z_channels=4, vocab_size=16, scales=scales)).eval()
    tokenizer.codebook.weight.data.normal_()
    nets = []
    for shared, depth, width in ((not guide_is_shared, 2, 16), (guide_is_shared, 3, 24)):
        sizes = VARConfig(K, depth, width, 2, patch_nums=scales, vocab_size=16, z_channels=4)
        nets.append(VAR(replace(sizes, shared_aln=shared, attn_l2_norm=shared)).eval().requires_grad_(False))
        for parameter in nets[-1].parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return *nets, NextScale(scales, K, tokenizer, top_k=12, top_p=0.95)


def plain_sample(paradigm, net, guide, guide_c_B, weights, c_B, draws):
    """No cache, no skipping: at every scale both networks read all tokens so far in one pass."""
    tokens_BL = torch.zeros(len(c_B), paradigm.dims, dtype=torch.long)
    start = 0
    for side, weight in zip(paradigm.scales, weights, strict=True):
        here = slice(start, start + side * side)
        teacher = paradigm.tokenizer.teacher(tokens_BL)
        logits = mix(logits_of(net, teacher, c_B)[:, here], logits_of(guide, teacher, guide_c_B)[:, here], weight)
        tokens_BL[:, here] = pick(logits, draws.uniform(side * side), paradigm.top_k, paradigm.top_p)
        start = here.stop
    return tokens_BL


class Weights(list):
    """Weights of five scales, also such as no schedule has."""

    is_zero = False

    def at(self, progress: float) -> float:
        return self[round(4 * progress)]


class Watched:
    """A network that writes down the conditions of its calls, and how many tokens each adds to the cache."""

    def __init__(self, net):
        self.net, self.new_cache, self.calls = net, net.new_cache, []

    def __call__(self, teacher_BlE, c_R, cache):
        before = cache.length
        answer = self.net(teacher_BlE, c_R, cache=cache)
        self.calls.append((c_R.tolist(), cache.length - before))
        return answer


# guidance -> its weights at the scales, and how many tokens each call of the guide reads
GUIDED = {
    "between the scales": (Schedule("interval", 2.0, low=0.1, high=0.2), [0.0] * 5, []),
    "constant": (Schedule("constant", 1.5), [1.5] * 5, [1, 4, 9, 16, 25]),
    "ramp": (Schedule("ramp", 2.0), [0.0, 0.5, 1.0, 1.5, 2.0], [5, 9, 16, 25]),
    "coarse": (Schedule("interval", 2.0, high=0.4), [2.0, 2.0, 0.0, 0.0, 0.0], [1, 4]),
    "interval": (Schedule("interval", 3.0, low=0.5, high=0.75), [0.0, 0.0, 3.0, 3.0, 0.0], [14, 16]),
    "interval at the end": (Schedule("interval", 3.0, low=0.8), [0.0, 0.0, 0.0, 0.0, 3.0], [55]),
    "window": (Schedule("negative_window", 2.0, turn=0.6, below=1.0), [2.0, 2.0, 2.0, -1.0, -1.0], [1, 4, 9, 16, 25]),
    "negative alone": (Schedule("negative_window", 0.0, turn=0.6, below=0.9), [0.0, 0.0, 0.0, -0.9, -0.9], [30, 25]),
    "a gap": (Weights([2.0, 0.0, 0.0, -1.0, 3.0]), [2.0, 0.0, 0.0, -1.0, 3.0], [1, 29, 25]),
    "two gaps": (Weights([0.0, 2.0, 0.0, 3.0, 0.0]), [0.0, 2.0, 0.0, 3.0, 0.0], [5, 25]),
}


@pytest.mark.parametrize("guide_is_shared", [False, True], ids=["shared modulation", "own modulation"])
@pytest.mark.parametrize("autoguidance", [False, True])
@pytest.mark.parametrize("name", GUIDED)
def test_sampling_with_shortcuts_equals_plain_sampling(name, autoguidance, guide_is_shared):
    """Caches, and scales that the guide skips: it catches up in one block-causal pass, in front of and behind others in its cache."""
    net, other, drawn = networks(guide_is_shared)
    gamma, weights, blocks = GUIDED[name]
    c_B, seeds = torch.arange(24) % K, list(range(24))
    guide_c_B = c_B if autoguidance else torch.full_like(c_B, K)
    asked = (net, other if autoguidance else net, guide_c_B)
    for paradigm in (drawn, replace(drawn, top_k=1)):
        expected, unguided = (plain_sample(paradigm, *asked, each, c_B, Draws(0, seeds)) for each in (weights, [0.0] * 5))
        assert not any(weights) or (expected != unguided).any(0).sum() >= 2
        watched, guide = Watched(net), Watched(other) if autoguidance else None
        assert torch.equal(paradigm.sample(watched, c_B, Guidance(gamma, guide), Draws(0, seeds)), expected)
        calls = watched.calls + (guide.calls if guide else [])
        assert [tokens for c, tokens in watched.calls if c == c_B.tolist()] == [1, 4, 9, 16, 25]
        assert [call for call in calls if call[0] != c_B.tolist()] == [
            (guide_c_B.tolist(), n) for n in blocks if not autoguidance
        ]
        assert guide is None or guide.calls == [(c_B.tolist(), n) for n in blocks]


SEEDS, MIXED = [5, 3, 11, 0, 8, 2], torch.tensor([0, 1, 2, 0, 1, 2])


def in_pieces(paradigm, net, pieces):
    """Samples of MIXED, drawn in micro-batches."""
    guidance = Guidance(Schedule("ramp", 1.5))
    return torch.cat([paradigm.sample(net, MIXED[a:b], guidance, Draws(0, SEEDS[a:b])) for a, b in pieces])


def test_samples_do_not_depend_on_the_micro_batch():
    net, _, paradigm = networks()
    whole = in_pieces(paradigm, net, [(0, 6)])
    assert len(whole.unique(dim=0)) == 6
    for pieces in ([(0, 2), (2, 6)], [(i, i + 1) for i in range(6)]):
        assert torch.equal(in_pieces(paradigm, net, pieces), whole)


def test_smooth_samples_against_plain_sampling():
    """No cache: at every scale both networks read what the blends so far add up to; the last blend is part of what is decoded."""
    net, _, paradigm = networks()
    smooth, tokenizer, draws = replace(paradigm, more_smooth=True), paradigm.tokenizer, Draws(0, SEEDS)
    f_hat, teacher = tokenizer.start(6), torch.zeros(6, 0, 4)
    for k, side in enumerate(paradigm.scales):
        logits, null = (logits_of(net, teacher, c_B) for c_B in (MIXED, torch.full_like(MIXED, K)))
        shares = mix(logits, null, 1.5 * k / 4)[:, -side * side :]
        shares = blend(shares, draws.uniform(side * side, 16), paradigm.top_k, paradigm.top_p, k / 4)
        f_hat, following = tokenizer.advance(f_hat, shares, k)
        teacher = torch.cat([teacher, following], 1)
    sampled = in_pieces(smooth, net, [(0, 6)])
    # the temperature of the last scale multiplies the rounding of its logits by 150
    assert sampled.shape == (6, 4, 5, 5) and torch.allclose(sampled, f_hat, atol=1e-3)
    assert not torch.allclose(sampled, tokenizer.replay(in_pieces(paradigm, net, [(0, 6)]))[0], atol=0.1)
    assert torch.allclose(in_pieces(smooth, net, [(0, 1), (1, 3), (3, 6)]), sampled, atol=1e-3)


def test_a_blend_of_one_code_is_that_code():
    """Greedy: the feature map is the one of the greedy tokens, and so is the image."""
    net, _, paradigm = networks()
    greedy = replace(paradigm, top_k=1)
    f_hat, tokens = (in_pieces(each, net, [(0, 6)]) for each in (replace(greedy, more_smooth=True), greedy))
    assert torch.allclose(f_hat, paradigm.tokenizer.replay(tokens)[0], atol=1e-6)
    assert torch.allclose(paradigm.tokenizer.decode(f_hat), paradigm.tokenizer.decode(tokens), atol=1e-5)


def test_unguided_samples_follow_the_likelihood():
    """The first token over many seeds: the frequencies are the model's own probabilities, within five standard errors."""
    net, _, paradigm = networks()
    paradigm, N = NextScale((1,), K, paradigm.tokenizer), 4000
    c_N = torch.ones(N).long()
    first = paradigm.sample(net, c_N, Guidance(), Draws(0, list(range(N))))[:, 0]
    prob = logits_of(net, torch.zeros(1, 0, 4), c_N[:1])[0, 0].softmax(-1)
    error = 5 * (prob * (1 - prob) / N).sqrt() + 1 / N
    assert ((first.bincount(minlength=16) / N - prob).abs() < error).all() and prob.max() < 0.95


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": ()}, r"scales=\(\): must be one or more sides"),
        ({"scales": (2, 4)}, r"scales=\(2, 4\): .* the first of them 1"),
        ({"scales": (1, 0)}, r"scales=\(1, 0\): must be"),
        ({"null": 0}, "null=0 is out of range"),
        ({"top_k": -1}, "top_k=-1 is out of range"),
        ({"top_p": 0.0}, "top_p=0.0 is out of range"),
        ({"top_p": 1.5}, "top_p=1.5 is out of range"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        NextScale(**{"scales": SCALES, "null": K, "tokenizer": None} | settings)
