"""Every objective for every form of diffusion network, against formulas written out; and two forms as one objective.

Behind the network of every form stands one denoiser D(x + sigma n, sigma, c). The noise that it sees is (x + sigma n - D) / sigma. What
the network answers is one function of (D, that noise, sigma); its target is the same function of (x, n, sigma).
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import test_objective
import torch
from test_objective import FAMILY, MLE, by_definition, close, null_by_definition
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from toy import GENERATED, MISMATCHED, RAMP, SHAPE, Draws64, K, ToyDenoiser, float64, toy, wave

from mclr.diffusion import Diffusion
from mclr.forms import DDPM, EDM, FORMS, Flow, Form, wide
from mclr.likelihood import Probe, Scores
from mclr.loss import Loss
from mclr.objective import Objective

OBJECTIVES = {"mle": MLE, **{name: Objective("mclr", name, RAMP) for name in (*MISMATCHED, "null")}, **FAMILY}
SD, BETA = 0.7, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
KEPT = (1 - BETA).cumprod(0)
SIGMA = ((1 - KEPT) / KEPT).sqrt()


def bound(x: Tensor, denoised: Tensor, noisy: Tensor, sigma: Tensor, rest: Tensor) -> Tensor:
    """KL(q(x_t-1 | x_t, x) || p(x_t-1 | x_t)) of DDPM in bits per dimension, t > 0 (arXiv 2102.09672, eq. 10 to 15)."""
    t = (SIGMA - sigma[:, None]).abs().argmin(1)
    beta, kept, before = (wide(each) for each in (BETA[t], KEPT[t], KEPT[t - 1]))
    variance, f = beta * (1 - before) / (1 - kept), (rest + 1) / 2
    old = (1 - beta).sqrt() * (1 - before) * kept.sqrt() * noisy
    means = ((before.sqrt() * beta * image + old) / (1 - kept) for image in (x, denoised))
    stds = variance.sqrt(), beta ** (f / 2) * variance ** ((1 - f) / 2)
    return kl_divergence(*map(Normal, means, stds)).mean((1, 2, 3)) / math.log(2)


@dataclass(frozen=True)
class Written:
    """A form written out, in the place of a paradigm whose networks are denoisers.

    law: of sigma in training. sigma: of the time told to a network. scale: x + sigma n over a network's input. answer: see above. factor:
    of mean (D - x)^2 in the squared error. rest: of the answer.
    """

    form: Form
    law: Callable[[Any], Tensor]
    sigma: Callable[[Tensor], Tensor]
    scale: Callable[[Tensor], Any]
    answer: Callable[[Tensor, Tensor, Tensor], Tensor]
    factor: Callable[[Tensor], Tensor]
    rest: str = ""

    def probe(self, x: Tensor, draws: Any) -> Probe:
        sigma, n = self.law(draws), draws.normal(*SHAPE)
        progress = ((math.log(80) - sigma.log()) / math.log(80 / 0.002)).clip(0, 1)
        return Probe({"x": x, "noise": n, "state": x + wide(sigma) * n, "level": sigma}, progress[:, None])

    def answers(self, denoise: Any, noisy: Tensor, sigma: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        denoised, u = denoise(noisy, sigma, c)
        answer = self.answer(denoised, (noisy - denoised) / wide(sigma), wide(sigma))
        return answer, {"": answer[:, :0], "u": u, "variance": wide(u) + denoised}[self.rest]

    def predict(self, net: Any, probe: Probe, index: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.answers(net.denoise, probe.inputs["state"][index], probe.inputs["level"][index], c)

    def log_likelihood(self, prediction: tuple[Tensor, Tensor], probe: Probe, index: Tensor) -> Scores:
        """-mean (answer - target)^2, of EDM times exp(-u). EDM learns u from err exp(-u) + u, DDPM its variance from the bound."""
        (answer, rest), (x, n, noisy, sigma) = prediction, (each[index] for each in probe.inputs.values())
        error = (answer - self.answer(x, n, wide(sigma))).square().mean((1, 2, 3))
        if self.rest == "u":
            return Scores((-error * (-rest.detach()).exp())[:, None], error.detach() * (-rest).exp() + rest)
        denoised = noisy - wide(sigma) * answer.detach()
        return Scores(-error[:, None], bound(x, denoised, noisy, sigma, rest) if self.rest else torch.zeros(len(error)))

    def net(self, denoise: Any, seen: Tensor, time: Tensor, c: Tensor, index: Any = slice(None)) -> tuple[Tensor, Tensor]:
        """A network of this form."""
        sigma = self.sigma(time[index])
        return self.answers(denoise, seen[index] * wide(self.scale(sigma)), sigma, c)


WRITTEN = {
    "edm": Written(EDM(-0.8, 1.3, SD), lambda draws: (1.3 * draws.normal() - 0.8).exp(), lambda time: time, lambda s: 1,
                   lambda x, n, s: (s / SD * x - SD * n) / (s**2 + SD**2).sqrt(), lambda s: (s**2 + SD**2) / (s * SD) ** 2, "u"),
    "flow": Written(Flow(), lambda draws: 1 / (1 / draws.uniform() - 1), lambda time: time / (1 - time), lambda s: 1 + s,
                    lambda x, n, s: n - x, lambda s: (1 + 1 / s) ** 2),
    "ddpm": Written(DDPM(), lambda draws: SIGMA[(1000 * draws.uniform()).long()], lambda time: SIGMA[time],
                    lambda s: (1 + s**2).sqrt(), lambda x, n, s: n, lambda s: 1 / s**2),
}  # fmt: skip
TO_DATA = {"form": Flow(to_data=True), "sigma": lambda time: 1 / time - 1, "answer": lambda x, n, s: x - n}
WRITTEN |= {"flow_to_data": replace(WRITTEN["flow"], **TO_DATA), "ddpm, variance": replace(WRITTEN["ddpm"], rest="variance")}
assert set(FORMS.values()) < {written.form for written in WRITTEN.values()}  # all of them are tested


def log_ratio(case: Any, probe: Probe, c: int) -> Tensor:
    """log p(x|c) of the network minus that of the reference, [B], both under the uncertainty of the reference."""
    index = torch.arange(len(probe.progress_BT))
    (own, _), (frozen, rest) = (case.paradigm.predict(net, probe, index, 0 * index + c) for net in (case.net, case.reference))
    mine, other = (case.paradigm.log_likelihood((answer, rest), probe, index).value_RT for answer in (own, frozen))
    return math.prod(SHAPE) * (mine - other)[:, 0]


def loss_of(case: Any, objective: Objective, classifier: Any) -> Tensor:
    """loss_B of mclr.Loss with networks of the form."""
    both = (case.x_B, case.generated_B), (case.c_B, GENERATED)
    x, c = (torch.cat(pair if objective.needs_generated else pair[:1]) for pair in both)
    net, frozen = (partial(case.paradigm.net, each.denoise) for each in (case.net, case.reference))
    parts = classifier if objective.needs_posterior else None, frozen if objective.needs_reference else None
    criterion = Loss(Diffusion(SHAPE, K, case.paradigm.form), objective, *parts, drop_condition=0.25)
    return criterion.per_sample(net, x, c, c % K, Draws64(0, list(range(len(c)))), 0)[0]


@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize("name", OBJECTIVES)
@float64()
def test_every_loss_of_every_form_is_its_published_formula(name, form):
    """With its gradient. The ratio to the reference is that of the form's squared error; the posterior is asked where the form is."""
    case, objective, asked = replace(toy("diffusion"), paradigm=WRITTEN[form]), OBJECTIVES[name], []
    case.reference.uncertainty.data *= -2  # another u than the network's
    found = loss_of(case, objective, lambda *inputs: asked.append(inputs) or case.posterior.args[0](*inputs))
    inputs = case.paradigm.probe(case.x_B, Draws64(0, list(range(8)))).inputs
    assert len(asked) == objective.needs_posterior and all(map(close, sum(asked, ()), (inputs["state"], inputs["level"])))
    with mock.patch.object(test_objective, "log_ratio", log_ratio):
        expected = (null_by_definition if name == "null" else by_definition)(case, objective)
    gradients = partial(torch.autograd.grad, inputs=[*case.net.parameters()], allow_unused=True, materialize_grads=True)
    found, expected, plain = ([each, *gradients(each.mean())] for each in (found, expected, by_definition(case, MLE)))
    assert all(map(close, found, expected))
    assert [close(each, mle, 1e-3) for each, mle in zip(expected[:3], plain, strict=False)] == 3 * [name == "mle"]


@pytest.mark.parametrize(("source", "form"), itertools.permutations(WRITTEN, 2))
@float64()
def test_a_network_of_another_form_denoises_the_same_and_its_value_differs_by_the_factor(source, form):
    """A network of `source` made one of `form`, from the least noise of DDPM to the most. Of EDM the factor is times exp(-u)."""
    net, written, c = ToyDenoiser(), WRITTEN[form], torch.tensor([0, 1, 2, K])
    x, n, sigma = wave(4, *SHAPE), wave(4, *SHAPE, phase=1), SIGMA[[0, 100, 600, 999]]
    noisy, index = x + wide(sigma) * n, torch.arange(4)
    wanted, u = net.denoise(noisy, sigma, c)

    def denoiser(form: Form, net: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        at = form.of_sigma(*inputs[:2])
        return form.denoised(net(*form.asked(*at), inputs[2])[0], *at), u

    net = partial(written.net, partial(denoiser, WRITTEN[source].form, partial(WRITTEN[source].net, net.denoise)))
    state, level = written.form.of_sigma(noisy, sigma)
    assert all(map(close, (denoiser(written.form, net, noisy, sigma, c)[0], written.form.state(x, n, level)), (wanted, state)))
    paradigm, target = Diffusion(SHAPE, K, written.form), written.form.target(x, n, state, level)
    probe = Probe({"target": target, "state": state, "level": level}, torch.zeros(4, 1))
    assert all(map(close, paradigm.noisy(probe), (noisy, sigma)))
    value = paradigm.log_likelihood(paradigm.predict(net, probe, index, c), probe, index).value_RT[:, 0]
    factor = written.factor(sigma) * ((-u).exp() if form == "edm" else 1)
    assert close(value / factor, -(wanted - x).square().mean((1, 2, 3)))
