"""A training step without chance: all outcomes with their probabilities, and networks that are tables. Inside `float64` alone.

S states, the inputs on which a network is asked (noisy points, or the tokens so far); X what it answers there (D dimensions, or V
logits); B outcomes; T terms; N intervals of the uniform that draws c~; K conditions (the null condition is index K).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from toy import Given, wave

from mclr.adapters import PlainSequence, from_logits
from mclr.analytic import Mixture
from mclr.contrast import kept
from mclr.diffusion import Diffusion, progress_of
from mclr.forms import DDPM, EDM, Flow, Form, ddpm_table
from mclr.likelihood import Guide, Paradigm, Probe, score
from mclr.next_scale import NextScale
from mclr.objective import Objective

K = 3


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference, over the largest of b."""
    assert a.shape == b.shape and a.dtype == b.dtype == torch.float64
    return ((a - b).abs().max() / b.abs().max()).item()


def every_draw(objective: Objective, posterior_BTK: Tensor) -> tuple[Tensor, Tensor]:
    """Uniforms [B, N], one in each interval within which no term's c~ changes, and the lengths of the intervals."""
    batch = len(posterior_BTK)
    if objective.contrast == "posterior":
        drawn_BTK = posterior_BTK * kept(posterior_BTK, objective.truncate)
        jumps_BN = (drawn_BTK / drawn_BTK.sum(-1, keepdim=True)).cumsum(-1)[..., :-1].flatten(1)
    else:
        count = {"weighted": K, "uniform": K - 1}.get(objective.contrast, 1)
        jumps_BN = (torch.arange(1, count) / count).expand(batch, -1)
    edges_BN = torch.cat([torch.zeros(batch, 1), jumps_BN, torch.ones(batch, 1)], 1).sort(1).values
    return (edges_BN[:, 1:] + edges_BN[:, :-1]) / 2, edges_BN.diff()


@dataclass
class World:
    """All outcomes of a training step, and what can be known about them.

    net: table [S, K + 1, X] -> the network that holds it (the last of K + 1 is the null condition). answers: table -> what that network
    answers, and table_of its inverse. exact_SKX: what a perfect network answers. posterior_SK: p(c | state).
    """

    paradigm: Paradigm
    net: Callable[[Tensor], Any]
    answers: Callable[[Tensor], Tensor]
    table_of: Callable[[Tensor], Tensor]
    prior_K: Tensor
    probe: Probe
    state_BT: Tensor
    c_B: Tensor
    chance_B: Tensor
    progress_S: Tensor
    posterior_SK: Tensor
    exact_SKX: Tensor

    def __post_init__(self) -> None:
        # what a perfect network answers under the null condition, and the table of a network that has learned nothing
        self.marginal_SX = torch.einsum("sk,skx->sx", self.posterior_SK, self.exact_SKX)
        self.table_SKX = wave(*self.exact_SKX.shape, phase=3)

    def expected_loss_B(
        self, objective: Objective, net: Any, c_B: Tensor, belief_SKK: Tensor | None = None, guide: Guide | None = None
    ) -> Tensor:
        """Over every c~. belief_SKK: what a sample of condition k takes for p(c~ | state) (row k); the exact posterior unless given."""
        belief_BTK = self.posterior_SK[self.state_BT] if belief_SKK is None else belief_SKK[self.state_BT, self.c_B[:, None]]
        uniform_BN, chance_BN = every_draw(objective, belief_BTK)
        copies = torch.arange(len(c_B)).repeat_interleave(uniform_BN.shape[1])
        probe = Probe({name: x[copies] for name, x in self.probe.inputs.items()}, self.probe.progress_BT[copies])
        rows = objective.rows(probe, c_B[copies], K, Given(uniform_BN.flatten()), belief_BTK[copies])
        loss_N, _ = objective(score(self.paradigm, net, probe, rows, guide=guide), rows)
        return (chance_BN * loss_N.view_as(chance_BN)).sum(1)

    def expected_loss(self, objective: Objective, table_SKX: Tensor, null_SX=None, belief_SKK=None, guide=None) -> Tensor:
        """Of a network with this table. null_SX: its table of the null condition; that of the exact marginal unless given."""
        null_SX = self.table_of(self.marginal_SX) if null_SX is None else null_SX
        net = self.net(torch.cat([table_SKX, null_SX[:, None]], 1))
        return self.chance_B @ self.expected_loss_B(objective, net, self.c_B, belief_SKK, guide)

    @cached_property
    def mass_SK1(self) -> Tensor:
        """How much each entry weighs in maximum likelihood, whose gradient is this times (answers - exact)."""
        table = self.table_SKX.cos().requires_grad_()
        (grad,) = torch.autograd.grad(self.expected_loss(Objective(), table), table)
        return (grad / (self.answers(table) - self.exact_SKX)).mean(-1, keepdim=True).detach()

    def pull(self, objective: Objective, table_SKX: Tensor, *others: Any) -> Tensor:
        """The gradient of the expected loss in the table, over mass: answers - exact for maximum likelihood."""
        table = table_SKX.detach().requires_grad_()
        return torch.autograd.grad(self.expected_loss(objective, table, *others), table)[0] / self.mass_SK1


def answer_of(form: Form, denoised: Tensor, state: Tensor, level_B: Tensor) -> Tensor:
    """The answer that means these denoised images: the inverse of form.denoised, which is affine."""
    zero, one = (form.denoised(torch.full_like(state, x), state, level_B) for x in (0.0, 1.0))
    return (denoised - zero) / (one - zero)


@dataclass
class OfForm:
    """A network of any form out of a denoiser: denoise(state, level, c) -> the denoised images. Both as the form counts them."""

    form: Form
    denoise: Callable[..., Tensor]

    def __call__(self, seen: Tensor, time_B: Tensor, c_R: Tensor, index_R: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state, level_B = seen, time_B
        if isinstance(self.form, DDPM):
            level_B = torch.from_numpy(ddpm_table()[0]).float()[time_B]
            state = seen * (1 + level_B.view(-1, 1, 1, 1) ** 2).sqrt()
        elif isinstance(self.form, Flow) and self.form.to_data:
            level_B = 1 - time_B
        if index_R is not None:
            state, level_B = state[index_R], level_B[index_R]
        rest = torch.zeros_like(level_B) if isinstance(self.form, EDM) else state.new_zeros(0)
        return answer_of(self.form, self.denoise(state, level_B, c_R), state, level_B), rest


def points(oracle: Mixture, x_SD: Tensor, sigma_S: Tensor, form: Form) -> World:
    """Noisy points of a mixture, each with every condition and two values of x: those of the mean and variance of x given both.

    The loss is quadratic in x, so two values are exact. The state that a network sees is the number of the point.
    """
    exact_SKD, spread_SKD = oracle.denoisers(x_SD, sigma_S)[:, :K], oracle.spread(sigma_S)
    posterior_SK, progress_S = oracle.posterior(x_SD, sigma_S), progress_of(sigma_S)
    state_B, c_B, side_B = torch.cartesian_prod(torch.arange(len(x_SD)), torch.arange(K), torch.tensor([-1, 1])).unbind(1)
    x_B = (exact_SKD[state_B, c_B] + side_B[:, None] * spread_SKD[state_B, c_B])[..., None, None]
    number, sigma_B = state_B.view(-1, 1, 1, 1).expand_as(x_B).to(x_B), sigma_S[state_B]
    level_B = form.of_sigma(number, sigma_B)[1]
    inputs = {"target": answer_of(form, x_B, number, level_B), "state": number, "level": level_B}

    def net(table_SCD: Tensor) -> Any:
        return OfForm(form, lambda number_R, level_R, c_R: table_SCD[number_R[:, 0, 0, 0].round().long(), c_R][..., None, None])

    outcomes = (Probe(inputs, progress_S[state_B, None]), state_B[:, None], c_B, posterior_SK[state_B, c_B] / 2)
    known = (progress_S, posterior_SK, exact_SKD)
    return World(Diffusion(oracle.shape, K, form), net, torch.clone, torch.clone, oracle.prior_K, *outcomes, *known)


def language(logits_SKV: Tensor, L: int) -> World:
    """All sequences of L tokens of V codes under equally likely conditions; a state is the tokens so far.

    States are numbered breadth first: 0 has no tokens, and s V + 1 + v is s followed by v.
    """
    S, _, V = logits_SKV.shape
    exact_SKV, prior_K = logits_SKV.softmax(-1), torch.full((K,), 1 / K)
    joint = [prior_K]  # p(k, tokens so far) of all states, whole sequences included
    for s, v in itertools.product(range(S), range(V)):
        joint.append(joint[s] * exact_SKV[s, :, v])
    posterior_SK, chance_NK = torch.stack(joint[:S]), torch.stack(joint[S:])
    tokens_BL = torch.tensor(list(itertools.product(range(V), repeat=L))).repeat_interleave(K, 0)

    def states(tokens_Bl: Tensor) -> Tensor:
        """The state before every token, and after the last: [B, l + 1]."""
        state_B = [torch.zeros(len(tokens_Bl), dtype=torch.long)]
        for v_B in tokens_Bl.unbind(1):
            state_B.append(state_B[-1] * V + 1 + v_B)
        return torch.stack(state_B, 1)

    def net(table_SCV: Tensor) -> Any:
        return from_logits(lambda tokens_Rl, c_R: table_SCV[states(tokens_Rl), c_R[:, None]])

    paradigm = NextScale((1,) * L, K, PlainSequence())
    probe, state_BT, progress_S = paradigm.probe(tokens_BL, Given()), states(tokens_BL[:, :-1]), torch.zeros(S)
    progress_S[state_BT] = probe.progress_BT
    outcomes = (probe, state_BT, torch.arange(K).repeat(len(chance_NK)), chance_NK.flatten())
    known = (progress_S, posterior_SK / posterior_SK.sum(1, keepdim=True), exact_SKV)
    return World(paradigm, net, lambda table: table.softmax(-1), torch.log, prior_K, *outcomes, *known)
