"""The EDM paradigm: noise law, denoising surrogate of the log-likelihood, sampling.

B samples; R scored rows; C, H, W image; T = 1 term per row. The network: net(noisy_RCHW, sigma_R, c_R) -> (denoised_RCHW, logvar_R).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mclr.guidance import Guidance, mix
from mclr.likelihood import Draws, LogLik, Net, Probe
from mclr.solvers import SOLVERS, churned_heun, sigma_grid

LOG_RANGE = (math.log(80.0), math.log(0.002))


def progress_of(sigma: Tensor) -> Tensor:
    """Noise level -> progress: 0 at sigma = 80, 1 at sigma = 0.002, linear in ln sigma, clipped."""
    high, low = LOG_RANGE
    return ((high - sigma.log()) / (high - low)).clip(0, 1)


def sigma_of(progress: float) -> float:
    """The inverse of progress_of."""
    high, low = LOG_RANGE
    return math.exp(high + progress * (low - high))


@dataclass(frozen=True)
class Diffusion:
    """shape: (C, H, W) of a sample. null: index of the null condition. ln sigma ~ N(noise_mean, noise_std^2) in training (EDM2,
    arXiv 2312.02696, section 2); sigma_data: standard deviation of the data; the rest belongs to sampling (EDM, table 1; churn:
    algorithm 2, 0 for none)."""

    shape: tuple[int, int, int]
    null: int
    noise_mean: float = -0.4
    noise_std: float = 1.0
    sigma_data: float = 0.5
    steps: int = 32
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    solver: str = "heun"
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    churn_noise: float = 1.0

    def __post_init__(self) -> None:
        assert not self.churn or self.solver == "heun"

    @property
    def dims(self) -> int:
        return math.prod(self.shape)

    def probe(self, x_B: Tensor, draws: Draws) -> Probe:
        """One noise level and one noise per sample. x_B: [B, C, H, W]."""
        sigma_B = (draws.normal() * self.noise_std + self.noise_mean).exp()
        noisy = x_B + sigma_B[:, None, None, None] * draws.normal(*self.shape)
        return Probe({"x": x_B, "noisy": noisy, "sigma": sigma_B}, progress_of(sigma_B)[:, None])

    def predict(self, net: Net, probe: Probe, index_R: Tensor, c_R: Tensor, terms: int | None = None) -> tuple[Tensor, Tensor]:
        """(denoised_RCHW, logvar_R): the image that guidance mixes, and the learned log-variance u. There is one term."""
        return net(probe.inputs["noisy"][index_R], probe.inputs["sigma"][index_R], c_R)

    def log_likelihood(
        self, prediction: tuple[Tensor, Tensor], probe: Probe, index_R: Tensor, mixed: Tensor | None = None
    ) -> LogLik:
        """-(weighted squared error) exp(-u) with u held constant; u is calibrated by aux alone, on the matched rows.

        err = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 * mean over dimensions of (D - x)^2. -value + aux has exactly the
        gradient of EDM2's loss (eq. 21); the split is derived: with u inside the value a ratio could drive u to -infinity.
        """
        denoised, logvar_R = prediction
        x, sigma_R = probe.inputs["x"][index_R], probe.inputs["sigma"][index_R]
        weight_R = (sigma_R**2 + self.sigma_data**2) / (sigma_R * self.sigma_data) ** 2

        def err_R(image: Tensor) -> Tensor:
            return weight_R * (image.float() - x).square().flatten(1).mean(1)

        own_R = err_R(denoised)
        value_R = -(own_R if mixed is None else err_R(mixed)) * (-logvar_R.detach()).exp()
        return LogLik(value_R[:, None], own_R.detach() * (-logvar_R).exp() + logvar_R)

    @torch.no_grad()
    def sample(self, net: Net, c_B: Tensor, guidance: Guidance, draws: Draws) -> Tensor:
        """Images [B, C, H, W], one forward per evaluation and a second one where gamma is not 0."""
        null_B = torch.full_like(c_B, self.null)

        def denoise(x: Tensor, sigma: float) -> Tensor:
            sigma_B = torch.full((len(x),), sigma, device=x.device)
            pred = net(x, sigma_B, c_B)[0]
            weight = guidance.gamma.at(float(progress_of(torch.tensor(sigma))))
            if weight == 0:
                return pred
            guide = net(x, sigma_B, null_B)[0] if guidance.guide is None else guidance.guide(x, sigma_B, c_B)[0]
            return mix(pred, guide, weight)

        def noise() -> Tensor:
            return draws.normal(*self.shape)

        sigmas = sigma_grid(self.steps, self.sigma_min, self.sigma_max, self.rho)
        x = noise() * sigmas[0]
        if self.churn:
            return churned_heun(denoise, x, sigmas, noise, self.churn, self.churn_min, self.churn_max, self.churn_noise)
        return SOLVERS[self.solver](denoise, x, sigmas, noise)
