"""What a diffusion network is asked and what its answer means: one value object for each form of network.

A network of any form learns from x + sigma n, by the squared error of its answer against a target. `level` is the noise level as the
form counts it, and `state` the noisy sample that a solver moves along: sigma and x + sigma n, or for Flow tau and (1 - tau) x + tau n,
where sigma = tau / (1 - tau). B samples; R rows; images and answers are [B, C, H, W]; a level is a number, or [B].
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

Level = Any
TIMESTEPS = 1000  # of DDPM


def wide(level: Level) -> Level:
    """[B] -> [B, 1, 1, 1]; numbers stay as they are."""
    return level[:, None, None, None] if isinstance(level, Tensor) else level


@dataclass(frozen=True)
class Form:
    """What most forms share: the state is x + sigma n, every sigma will do, and all rows weigh the same."""

    def draw(self, draws: Any) -> Tensor:
        """The noise law of training: level_B."""
        raise NotImplementedError

    def target(self, x: Tensor, noise: Tensor, state: Tensor, level_B: Tensor) -> Tensor:
        """What the network should answer."""
        raise NotImplementedError

    def denoised(self, answer: Tensor, state: Tensor, level_B: Tensor) -> Tensor:
        """The denoised images that an answer means; affine in the answer, so that guidance may mix answers."""
        raise NotImplementedError

    def state(self, x: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        return x + wide(level_B) * noise

    def asked(self, state: Tensor, level_B: Tensor) -> tuple[Tensor, Tensor]:
        """(input, time) of the network."""
        return state, level_B

    def sigma(self, level: Level) -> Level:
        return level

    def noisy(self, state: Tensor, level_B: Tensor) -> Tensor:
        """x + sigma n of a state."""
        return state

    def of_sigma(self, noisy: Tensor, sigma: Level) -> tuple[Tensor, Level]:
        """(state, level) of x + sigma n: the inverse of sigma() and noisy()."""
        return noisy, sigma

    def known(self, sigma: float) -> float:
        """The nearest sigma that the network knows."""
        return sigma

    def grid(self, sigmas: list[float], last: float) -> list[float]:
        """The levels of a solver in the form's own coordinates, as many as there are sigmas; the last one is 0.

        last: the last but one of a flow, 0 for equal steps. Raises ValueError for a number of steps that the form cannot make.
        """
        return sigmas

    def start(self, noise: Tensor, level: float) -> Tensor:
        """The state at the first level of the grid."""
        return noise * level

    def log_weight(self, rest: Any) -> Tensor:
        """Logarithm of the weight of each row's value. rest: of the network's answer."""
        return torch.zeros(())

    def aux(self, error_R: Tensor, answer: Tensor, rest: Any, inputs: dict[str, Tensor], index_R: Tensor) -> Tensor:
        """The calibration loss of each row. error_R: the squared error of the answer, without gradient."""
        return torch.zeros_like(error_R)


def scales(sigma_B: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out), [B, 1, 1, 1]: denoised = c_skip noisy + c_out raw (EDM, arXiv 2206.00364, table 1)."""
    sigma_B111 = sigma_B[:, None, None, None]
    norm_B111 = (sigma_B111**2 + sigma_data**2).sqrt()
    return sigma_data**2 / norm_B111**2, sigma_B111 * sigma_data / norm_B111


@dataclass(frozen=True)
class EDM(Form):
    """EDM and EDM2 (arXiv 2206.00364, 2312.02696): the answer is of unit variance, and comes with a learned log-variance u of its error.

    ln sigma ~ N(noise_mean, noise_std^2) in training (EDM2, section 2); sigma_data: standard deviation of the data.
    """

    noise_mean: float = -0.4
    noise_std: float = 1.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not (self.sigma_data > 0 and self.noise_std > 0):
            raise ValueError(f"sigma_data={self.sigma_data}, noise_std={self.noise_std}: both must be > 0")

    def draw(self, draws: Any) -> Tensor:
        return (draws.normal() * self.noise_std + self.noise_mean).exp()

    def target(self, x: Tensor, noise: Tensor, state: Tensor, level_B: Tensor) -> Tensor:
        """(x - c_skip noisy) / c_out: the squared error is EDM's, weighted by c_out^-2 (derived).

        Where sigma is small, the target comes from x - noisy, which loses fewer digits than the difference of two products.
        """
        sigma = wide(level_B)
        norm = (sigma**2 + self.sigma_data**2).sqrt()
        small = (x - state) + (sigma / norm) ** 2 * state
        large = x - (self.sigma_data / norm) ** 2 * state
        return torch.where(sigma < self.sigma_data, small, large) * (norm / (sigma * self.sigma_data))

    def denoised(self, answer: Tensor, state: Tensor, level_B: Tensor) -> Tensor:
        c_skip, c_out = scales(level_B, self.sigma_data)
        return c_skip * state + c_out * answer

    def log_weight(self, rest: Any) -> Tensor:
        return -rest

    def aux(self, error_R: Tensor, answer: Tensor, rest: Any, inputs: dict[str, Tensor], index_R: Tensor) -> Tensor:
        """-value + aux has exactly the gradient of EDM2's loss (eq. 21).

        The split is derived: with u inside the value a ratio could drive u to -infinity.
        """
        return error_R * (-rest).exp() + rest


@dataclass(frozen=True)
class Flow(Form):
    """Linear flows: the answer is the velocity n - x at time tau (REPA, arXiv 2410.06940).

    to_data: time runs to the data, the network is told 1 - tau and answers x - n (SiT, arXiv 2401.08740).
    """

    to_data: bool = False

    def draw(self, draws: Any) -> Tensor:
        return draws.uniform()

    def state(self, x: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        return (1 - wide(level_B)) * x + wide(level_B) * noise

    def target(self, x: Tensor, noise: Tensor, state: Tensor, level_B: Tensor) -> Tensor:
        return x - noise if self.to_data else noise - x

    def asked(self, state: Tensor, level_B: Tensor) -> tuple[Tensor, Tensor]:
        return state, 1 - level_B if self.to_data else level_B

    def denoised(self, answer: Tensor, state: Tensor, level_B: Tensor) -> Tensor:
        return state + (1 if self.to_data else -1) * wide(level_B) * answer

    def sigma(self, level: Level) -> Level:
        return level / (1 - level)

    def noisy(self, state: Tensor, level_B: Tensor) -> Tensor:
        return state / (1 - wide(level_B))

    def of_sigma(self, noisy: Tensor, sigma: Level) -> tuple[Tensor, Level]:
        return noisy / (1 + wide(sigma)), sigma / (1 + sigma)

    def grid(self, sigmas: list[float], last: float) -> list[float]:
        """Equal steps from 1 to 0; with `last`, equal steps to that, then 0."""
        steps = len(sigmas) - 1
        return (
            [1 + i / (steps - 1) * (last - 1) for i in range(steps)] + [0.0]
            if last
            else [1 - i / steps for i in range(steps + 1)]
        )


@cache
def ddpm_table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sigma, ln beta, ln of the posterior variance) of every timestep, fp64: betas linear from 1e-4 to .02 (arXiv 2006.11239)."""
    beta = np.linspace(1e-4, 0.02, TIMESTEPS)
    kept = np.cumprod(1 - beta)
    before = np.append(1, kept[:-1])
    variance = beta * (1 - before) / (1 - kept)
    # that of the first step is 0; its logarithm is that of the second one
    variance[0] = variance[1]
    return ((1 - kept) / kept) ** 0.5, np.log(beta), np.log(variance)


@dataclass(frozen=True)
class DDPM(Form):
    """DiT (arXiv 2212.09748): the answer is the noise n, at one of 1,000 timesteps.

    The rest of the answer, where there is any, says the variance of a step of the reverse process (arXiv 2102.09672, eq. 15); aux trains
    it by the variational bound.
    """

    def draw(self, draws: Any) -> Tensor:
        uniform_B = draws.uniform()
        return self._sigmas(uniform_B)[(uniform_B * TIMESTEPS).long()]

    def target(self, x: Tensor, noise: Tensor, state: Tensor, level_B: Tensor) -> Tensor:
        return noise

    def denoised(self, answer: Tensor, state: Tensor, level_B: Tensor) -> Tensor:
        return state - wide(level_B) * answer

    def asked(self, state: Tensor, level_B: Tensor) -> tuple[Tensor, Tensor]:
        return state / (1 + wide(level_B) ** 2).sqrt(), self.timestep(level_B)

    def timestep(self, sigma_B: Tensor) -> Tensor:
        """The timestep of the nearest sigma, int64."""
        log_sigmas = self._sigmas(sigma_B).log()
        return torch.bucketize(sigma_B.log(), (log_sigmas[1:] + log_sigmas[:-1]) / 2)

    def known(self, sigma: float) -> float:
        return float(ddpm_table()[0][int(self.timestep(torch.tensor([sigma])))]) if sigma else sigma

    def grid(self, sigmas: list[float], last: float) -> list[float]:
        """Every so many timesteps from the first one, as DDIM takes them (arXiv 2010.02502)."""
        steps = len(sigmas) - 1
        timesteps = range(0, TIMESTEPS, -(-TIMESTEPS // steps))
        if len(timesteps) != steps:
            raise ValueError(
                f"steps={steps}: {TIMESTEPS} timesteps have no {steps} at equal distances, but {len(timesteps)}: give these"
            )
        return [float(ddpm_table()[0][t]) for t in reversed(timesteps)] + [0.0]

    def start(self, noise: Tensor, level: float) -> Tensor:
        """What the network sees is noise of unit variance."""
        return noise * math.sqrt(1 + level**2)

    def aux(self, error_R: Tensor, answer: Tensor, rest: Any, inputs: dict[str, Tensor], index_R: Tensor) -> Tensor:
        """KL(q(x_t-1 | x_t, x) || N(mu, exp l)) in bits per dimension, mu from the answer held constant.

        l = f ln beta + (1 - f) ln variance, f = (rest + 1) / 2 (arXiv 2102.09672, eq. 15). At timestep 0 it is -log2 of the probability of
        x in a bin of 2/255.
        """
        if rest is None or not rest.numel():
            return torch.zeros_like(error_R)
        sigma_B, noise = inputs["level"].double(), inputs["target"]
        t_B = self.timestep(inputs["level"])
        log_beta, log_variance = (
            wide(torch.from_numpy(table).to(sigma_B.device)[t_B])[index_R].float() for table in ddpm_table()[1:]
        )
        share = (rest.float() + 1) / 2
        log_own = share * log_beta + (1 - share) * log_variance
        # of x_t-1: c1 (x - D) = c1 sigma (answer - n), c1 = beta sqrt(a_t-1) / (1 - a_t), which is 1 at timestep 0
        before = self._sigmas(sigma_B)[(t_B - 1).clamp(min=0)].double()
        kept, kept_before = 1 / (1 + sigma_B**2), torch.where(t_B > 0, 1 / (1 + before**2), 1)
        weight_B = (1 - kept / kept_before) * kept_before.sqrt() / (1 - kept) * sigma_B
        shift = wide(weight_B.float())[index_R] * (answer.detach().float() - noise[index_R])
        bound = 0.5 * (log_own - log_variance + (log_variance.exp() + shift**2) / log_own.exp() - 1)
        std, cdf = (log_own / 2).exp(), torch.special.ndtr
        x = inputs["state"][index_R] - wide(inputs["level"])[index_R] * noise[index_R]
        below = torch.where(x < -0.999, 0.0, cdf((shift - 1 / 255) / std))
        above = torch.where(x > 0.999, 1.0, cdf((shift + 1 / 255) / std))
        bits = torch.where(wide(t_B)[index_R] == 0, -(above - below).clamp(min=1e-12).log(), bound)
        return bits.flatten(1).mean(1) / math.log(2)

    @staticmethod
    def _sigmas(like: Tensor) -> Tensor:
        """sigma of every timestep, rising, fp32."""
        return torch.from_numpy(ddpm_table()[0]).to(like.device, torch.float32)


# by the option `form` of a network (models/options.py)
FORMS: dict[str, Form] = {"ddpm": DDPM(), "flow": Flow(), "flow_to_data": Flow(to_data=True)}
