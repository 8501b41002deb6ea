"""What the tests of mclr/ share: numbers that are not drawn, toy networks of a few dozen weights, and the whole core in fp64.

B samples; R scored rows; K conditions (the null condition is index K); T terms; L tokens; l tokens of one call; V codes; E channels.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from mclr.adapters import from_denoiser
from mclr.diffusion import Diffusion
from mclr.forms import DDPM, ddpm_table
from mclr.kernels.token_logp import token_logp
from mclr.likelihood import Draws, Paradigm, Probe, Rows, Scores, score
from mclr.next_scale import NextScale
from mclr.objective import Objective
from mclr.posterior import noisy_posterior, prefix_posterior
from mclr.schedule import Schedule

K, V, E, SHAPE, SCALES = 3, 5, 4, (1, 2, 2), (1, 2, 3)
CONDITIONS = torch.tensor([0, 1, 2, K, 0, 1, 2, 0])  # one of the eight was dropped
GENERATED = torch.tensor([1, 1, 2, 0, 0, 2, 1, 2])
KINDS = ("diffusion", "tokens")
MISMATCHED = ("uniform", "weighted", "posterior")
CONTRASTS = ("none", *MISMATCHED, "null")  # of mle and mclr
RAMP = Schedule("ramp", 0.7)


@contextmanager
def float64() -> Iterator[None]:
    """As a decorator or in a `with`: fp64 is the default, .float() gives it, and DDPM's sigmas have it: the code agrees to 1e-10."""
    sigmas = mock.patch.object(DDPM, "_sigmas", staticmethod(lambda like: torch.from_numpy(ddpm_table()[0])))
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double), sigmas:
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def wave(*shape: int, phase: float = 0.0) -> Tensor:
    """Fixed fp64 numbers in [-1, 1] that look random: the same with every release of torch."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(2.4 * i + 7.3 * (i + 1).sqrt() + phase).reshape(shape)


class Draws64(Draws):
    """The same numbers in fp64."""

    def normal(self, *shape: int) -> Tensor:
        return super().normal(*shape).double()

    def uniform(self, *shape: int) -> Tensor:
        return super().uniform(*shape).double()


@dataclass
class Given:
    """Draws that hand out the given numbers."""

    uniforms: Tensor | None = None
    normals: Tensor | None = None

    def uniform(self, *shape: int) -> Any:
        return self.uniforms

    def normal(self, *shape: int) -> Any:
        return self.normals


def logits_of(net: Any, *inputs: Any, **cache: Any) -> Tensor:
    """All logits of a token network."""
    h, head = net(*inputs, **cache)
    return head(h)


class Counted:
    """A network that writes down, for every forward, its rows and whether it carries gradient."""

    def __init__(self, net: Any):
        self.net, self.calls, self.conditions = net, [], []

    def __call__(self, *inputs: Any, **cache: Any) -> Any:
        c_R = next(each for each in inputs if not each.is_floating_point())
        self.calls.append((len(c_R), torch.is_grad_enabled()))
        self.conditions.append(c_R.tolist())
        return self.net(*inputs, **cache)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.net, name)


class ToyDenoiser(nn.Module):
    def __init__(self, phase: float = 0.0):
        super().__init__()
        self.slope = nn.Parameter(wave(K + 1, *SHAPE, phase=phase))
        self.shift = nn.Parameter(wave(K + 1, *SHAPE, phase=phase + 1))
        self.uncertainty = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))

    def denoise(self, noisy_RCHW: Tensor, sigma_R: Tensor, c_R: Tensor) -> tuple[Tensor, Tensor]:
        logvar_R = self.uncertainty[0] + self.uncertainty[1] * sigma_R.log()
        return (self.slope[c_R] * noisy_RCHW + self.shift[c_R]).tanh(), logvar_R

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return from_denoiser(self.denoise)(*inputs)


class ToyClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(2 * wave(math.prod(SHAPE), K, phase=2))

    def forward(self, noisy_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
        return noisy_BCHW.flatten(1) @ self.weight / sigma_B[:, None]


class ToyTokenizer:
    """Every token reads a weighted sum of the codes of all coarser scales."""

    def __init__(self, scales: tuple[int, ...], dtype: torch.dtype = torch.float64):
        scale_L = torch.tensor([k for k, side in enumerate(scales) for _ in range(side * side)])
        self.reads_LL = ((scale_L[:, None] > scale_L) * wave(len(scale_L), len(scale_L), phase=3)).to(dtype)
        self.code_VE = wave(V, E, phase=4).to(dtype)

    def teacher(self, tokens_BL: Tensor) -> Tensor:
        return (self.reads_LL @ self.code_VE[tokens_BL])[:, 1:]


class ToyTokens(nn.Module):
    def __init__(self, scales: tuple[int, ...], phase: float = 0.0):
        super().__init__()
        self.condition = nn.Parameter(wave(K + 1, E, phase=phase + 5))
        self.place = nn.Parameter(wave(sum(side * side for side in scales), E, phase=phase + 6))
        self.head = nn.Parameter(2 * wave(E, V, phase=phase + 7))

    def read(self, h_RlE: Tensor, *scored: Any) -> Tensor:
        return token_logp(h_RlE, self.head.T, self.head.new_zeros(V), *scored) if scored else h_RlE @ self.head

    def forward(self, teacher_BlE: Tensor, c_R: Tensor, index_R: Tensor | None = None) -> tuple[Tensor, Any]:
        teacher_RlE = teacher_BlE if index_R is None else teacher_BlE[index_R]
        first_R1E = teacher_RlE.new_zeros(len(teacher_RlE), 1, E)
        h_RLE = torch.cat([first_R1E, teacher_RlE], 1) + self.condition[c_R][:, None]
        return (h_RLE + self.place[: h_RLE.shape[1]]).tanh(), self.read


@dataclass
class Toy:
    """Eight samples, a network, a posterior, a reference and eight generated samples (their conditions: GENERATED) of one paradigm."""

    paradigm: Paradigm
    net: Any
    x_B: Tensor
    posterior: Any
    c_B: Tensor
    draws: type[Draws]
    reference: Any
    generated_B: Tensor

    def ask(self, objective: Objective, seed: int = 0) -> tuple[Probe, Rows]:
        """The probe of a training step and the rows that the objective wants of it."""
        x_B, c_B = self.x_B, self.c_B
        if objective.needs_generated:
            x_B, c_B = torch.cat([x_B, self.generated_B]), torch.cat([c_B, GENERATED])
        draws = self.draws(seed, list(range(len(c_B))))
        probe = self.paradigm.probe(x_B, draws)
        posterior_BTK = self.posterior(probe, c_B % K)[0] if objective.needs_posterior else None
        return probe, objective.rows(probe, c_B, K, draws, posterior_BTK, null_share=0.25)

    def score_rows(self, probe: Probe, rows: Rows, objective: Objective) -> Scores:
        return score(self.paradigm, self.net, probe, rows, self.reference if objective.needs_reference else None)

    def score(self, objective: Objective, seed: int = 0) -> tuple[Scores, Rows]:
        probe, rows = self.ask(objective, seed)
        return self.score_rows(probe, rows, objective), rows

    def loss(self, objective: Objective, seed: int = 0) -> Tensor:
        """loss_B of one training step."""
        return objective(*self.score(objective, seed))[0]

    def gradients(self, objective: Objective) -> dict[str, Tensor]:
        """Of the mean loss, by parameter name."""
        grads = torch.autograd.grad(self.loss(objective).mean(), list(self.net.parameters()))
        return dict(zip(dict(self.net.named_parameters()), grads, strict=True))

    def value(self, probe: Probe, c: Tensor | int) -> Scores:
        """Every sample scored under one condition (or one each), without any of the machinery of rows."""
        index_B = torch.arange(len(probe.progress_BT))
        prediction = self.paradigm.predict(self.net, probe, index_B, torch.zeros_like(index_B) + c)
        return self.paradigm.log_likelihood(prediction, probe, index_B)


def toy(kind: str, dtype: torch.dtype = torch.float64, c_B: Tensor = CONDITIONS) -> Toy:
    """kind: one of KINDS. In fp64 its numbers are exact only inside `float64`."""
    draws = Draws64 if dtype == torch.float64 else Draws
    if kind == "diffusion":
        denoiser, classifier = ToyDenoiser().to(dtype), ToyClassifier().to(dtype)
        x_B, generated_B = (wave(len(c_B), *SHAPE, phase=phase).to(dtype) for phase in (8, 10))
        reference = ToyDenoiser(phase=0.5).to(dtype)
        images = Diffusion(SHAPE, K)

        def at_noise(classifier: Any, probe: Probe, c_B: Tensor) -> tuple[Tensor, Tensor]:
            return noisy_posterior(classifier, K, images.noisy(probe), c_B)

        return Toy(images, denoiser, x_B, partial(at_noise, classifier), c_B, draws, reference, generated_B)
    paradigm = NextScale(SCALES, K, ToyTokenizer(SCALES, dtype))
    net = ToyTokens(SCALES).to(dtype)
    tokens_BL, generated_BL = ((wave(len(c_B), paradigm.dims, phase=phase) * 1000).long() % V for phase in (9, 11))
    reference = ToyTokens(SCALES, phase=0.5).to(dtype)

    def posterior(probe: Probe, c_B: Tensor) -> tuple[Tensor, None]:
        return prefix_posterior(paradigm, net, probe), None

    return Toy(paradigm, net, tokens_BL, posterior, c_B, draws, reference, generated_BL)
