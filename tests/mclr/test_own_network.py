"""Networks that are not ours reach the guided optimum, with `import mclr` alone: a plain denoiser, and logits of a sequence."""

import pytest
import torch
from torch import nn

import mclr
from mclr.analytic import Mixture

K, LAM = 3, 0.7
ORACLE = Mixture(torch.tensor([0.4, 0.35, 0.25]), torch.tensor([[-1.0], [0.3], [1.2]]), torch.tensor([[0.2], [0.3], [0.15]]))


class Denoiser(nn.Module):
    """A network as it might come from elsewhere: D(noisy, sigma, c), one embedding more than there are classes."""

    def __init__(self, width: int = 64, conditions: int = K + 1):
        super().__init__()
        self.embedding = nn.Embedding(conditions, width)
        self.first = nn.Linear(2, width)
        self.rest = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, noisy, sigma, c):
        x, sigma = noisy.flatten(1), sigma[:, None]
        size = (1 + sigma**2).sqrt()
        out = self.rest(self.first(torch.cat([x / size, sigma.log() / 2], 1)) + self.embedding(c))
        return (x / size**2 + sigma / size * out).view_as(noisy)


def trained(denoiser, objective, posterior, steps=1100, batch=128):
    paradigm = mclr.Diffusion(shape=(1, 1, 1), null=K, form=mclr.EDM(-0.6, 1.4, 1.0))
    criterion = mclr.Loss(paradigm, objective, posterior=posterior)
    net = mclr.from_denoiser(denoiser, sigma_data=1.0)
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * min(1, step / 50) * (1 - step / steps)
        x, c = ORACLE.sample(mclr.Draws(1, list(range(step * batch, (step + 1) * batch))))
        loss, _ = criterion(net, x, c, first=step * batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, paradigm


def test_a_plain_denoiser_reaches_the_guided_optimum():
    """(1 + lam) D_c - lam D_0 within 5 % (relative RMS over noised data), where plain training is 20 % off and more."""
    torch.manual_seed(0)
    denoiser = Denoiser()
    objective = mclr.Objective("mclr", contrast="posterior", lam=LAM, truncate=0.0)
    net, paradigm = trained(denoiser, objective, ORACLE.log_joint)
    assert {id(p) for p in net.parameters()} == {id(p) for p in denoiser.parameters()}
    draws = mclr.Draws(2, list(range(4000)))
    x, c = ORACLE.sample(draws)
    noisy, sigma = paradigm.noisy(paradigm.probe(x, draws))
    conditional, marginal = (ORACLE.denoise(noisy, sigma, each)[0] for each in (c, torch.full_like(c, K)))
    guided = (1 + LAM) * conditional - LAM * marginal
    with torch.no_grad():
        mine = denoiser(noisy, sigma, c)

    def off(found, expected):
        return float(((found - expected).square().sum() / expected.square().sum()).sqrt())

    assert off(mine, guided) < 0.05 and off(conditional, guided) > 0.2, (off(mine, guided), off(conditional, guided))
    # the same noise becomes nearly the same samples, without guidance
    oracle, guidance = mclr.from_denoiser(ORACLE.denoise, sigma_data=1.0), mclr.Guidance(mclr.Schedule("constant", LAM))
    c, seeds = torch.arange(300) % K, list(range(300))
    asked = ((net, mclr.Guidance()), (oracle, guidance), (oracle, mclr.Guidance()))
    mine, guided, plain = (paradigm.sample(network, c, how, mclr.Draws(3, seeds)) for network, how in asked)
    assert off(mine, guided) < 0.1 and off(plain, guided) > 0.2, (off(mine, guided), off(plain, guided))


L, V = 5, 4


class Language(nn.Module):
    """Logits of the next token after the tokens before, [R, l + 1, V]: a small recurrent network of a user's own."""

    def __init__(self, conditions: int = K + 1):
        super().__init__()
        self.embedding, self.condition = nn.Embedding(V, 8), nn.Embedding(conditions, 8)
        self.memory, self.out = nn.GRU(8, 8, batch_first=True), nn.Linear(8, V)

    def forward(self, previous, c):
        seen = torch.cat([self.condition(c)[:, None], self.embedding(previous)], 1)
        return 3 * self.out(self.memory(seen)[0])


@pytest.fixture
def spoken():
    torch.manual_seed(0)
    language = Language()
    return language, mclr.from_logits(language), mclr.NextScale((1,) * L, K, mclr.PlainSequence())


X, C, TOKENS = torch.zeros(8, 1, 1, 1), torch.arange(8) % K, torch.arange(8 * L).view(8, L) % V
IMAGES, WORDS = mclr.Diffusion((1, 1, 1), K), mclr.NextScale((1,) * L, K, mclr.PlainSequence())
MISTAKES = {
    "a denoiser that is not wrapped": (IMAGES, Denoiser(), r"fails \(.*takes 4 pos.*: give it as mclr.from_denoiser makes it"),
    "logits that are not wrapped": (WORDS, Language(), r"fails \(.*: give it as mclr.from_logits makes it"),
    "no null condition": (IMAGES, mclr.from_denoiser(Denoiser(conditions=K)), r"fails \(index out of range.*up to the null condition"),
    "no null condition of tokens": (WORDS, mclr.from_logits(Language(conditions=K)), r"fails \(index out of range.*null condition"),
    "flat images": (IMAGES, mclr.from_denoiser(lambda noisy, sigma, c: noisy.flatten(1)), r"answers \[8, 1\], not \[8, 1, 1, 1\]:"),
    "a denoiser that forgets to return": (IMAGES, mclr.from_denoiser(lambda *_: None), r"answers nothing, not \[8, 1, 1, 1\]: a denoiser"),
    "logits of other tokens": (WORDS, mclr.from_logits(lambda t, c: torch.zeros(len(t), L - 1, V)), r"answers \[8, 4, 4\], not \[8, 5\]"),
    "arguments of another denoiser": (IMAGES, mclr.from_denoiser(lambda noisy, sigma: noisy), r"fails \(.*a denoiser takes \(noisy, si"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_a_network_of_ones_own_are_one_line(name):
    """In training and in sampling alike; a bare denoiser would otherwise be sampled, into nonsense."""
    paradigm, net, message = MISTAKES[name]
    criterion = mclr.Loss(paradigm, mclr.Objective("mclr", "null", lam=1.0), drop_condition=1.0)
    guidance = mclr.Guidance(mclr.Schedule("constant", 1.0))
    with pytest.raises(ValueError, match=message) as error:
        criterion(net, X if paradigm is IMAGES else TOKENS, C, first=0)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"give it as mclr.from_|takes|index out of range"):
        paradigm.sample(net, C, guidance, mclr.Draws(0, list(range(8))))


@pytest.mark.parametrize("contrast", ["", "null", "posterior"])
def test_logits_of_ones_own_have_a_loss_with_a_gradient(contrast, spoken):
    """Plain maximum likelihood is the cross-entropy of the network's own logits; the ratio changes it."""
    language, net, paradigm = spoken
    tokens, c = torch.arange(30).view(6, L) % V, torch.arange(6) % K
    criterion = mclr.Loss(paradigm, mclr.Objective("mclr" if contrast else "mle", contrast, lam=0.7 if contrast else 0.0))
    loss, metrics = criterion(net, tokens, c, first=0)
    loss.backward()
    assert all(p.grad is not None for p in language.parameters())
    kept = mclr.Loss(paradigm, mclr.Objective(), drop_condition=0.0)(net, tokens, c, first=0)[0]
    expected = nn.functional.cross_entropy(language(tokens[:, :-1], c).transpose(1, 2), tokens)
    assert torch.isclose(kept, expected, rtol=1e-6)
    assert bool(contrast) == (abs(metrics["loss"] + metrics["value"]) > 1e-4)


def test_logits_of_ones_own_are_sampled_and_guided(spoken):
    """With guidance the tokens are those of a network whose logits are mixed: (1 + gamma) z_c - gamma z_null."""
    language, net, paradigm = spoken
    c, seeds = torch.arange(3000) % K, list(range(3000))

    def mixed(previous, c):
        return 1.8 * language(previous, c) - 0.8 * language(previous, torch.full_like(c, K))

    guidance = mclr.Guidance(mclr.Schedule("constant", 0.8))
    guided = paradigm.sample(net, c, guidance, mclr.Draws(0, seeds))
    plain = paradigm.sample(mclr.from_logits(mixed), c, mclr.Guidance(), mclr.Draws(0, seeds))
    assert guided.shape == (3000, L) and (guided == plain).all(1).float().mean() >= 0.99
    # and they follow the logits: first token, by condition, within five standard errors
    share = torch.stack([torch.bincount(plain[c == k, 0], minlength=V) / 1000 for k in range(K)])
    expected = mixed(plain[:K, :0], torch.arange(K))[:, 0].softmax(-1)
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / 1000).sqrt() + 1e-3).all()
