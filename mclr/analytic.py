"""A labelled Gaussian mixture whose density, denoisers, posterior and samples are known at every noise level: an oracle.

B points; K conditions (the null condition is index K); D dimensions, for the diffusion paradigm an image [D, 1, 1].
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mclr.likelihood import Draws


@dataclass(frozen=True)
class Mixture:
    """Condition c has the prior prior_K[c] and the density N(mean_KD[c], diag(variance_KD[c])); isotropic: variance [K, 1].

    Noise of level sigma adds sigma^2 to every variance, so all is exact, by Bayes' rule and Tweedie's formula (derived). Points come
    as [B, D] or as images; sigma_B is one noise level each, 0 allowed.
    """

    prior_K: Tensor
    mean_KD: Tensor
    variance_KD: Tensor

    @property
    def null(self) -> int:
        return len(self.prior_K)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a sample as an image."""
        return (self.mean_KD.shape[1], 1, 1)

    def log_density(self, x_B: Tensor, sigma_B: Tensor) -> Tensor:
        """log p(x_t | c), [B, K], in nats."""
        variance_BKD = self.variance_KD + sigma_B[:, None, None] ** 2
        offset_BKD = x_B.flatten(1)[:, None] - self.mean_KD
        return -(offset_BKD**2 / variance_BKD + (2 * math.pi * variance_BKD).log()).sum(-1) / 2

    def log_joint(self, x_B: Tensor, sigma_B: Tensor) -> Tensor:
        """log p(x_t, c), [B, K]; its logsumexp is the marginal. As logits it is the perfect classifier of noisy_posterior."""
        return self.log_density(x_B, sigma_B) + self.prior_K.log()

    def posterior(self, x_B: Tensor, sigma_B: Tensor) -> Tensor:
        """p(c | x_t), [B, K]."""
        return self.log_joint(x_B, sigma_B).softmax(-1)

    def spread(self, sigma_B: Tensor) -> Tensor:
        """Standard deviation of x given x_t and c, [B, K, D]: the same at every x_t."""
        sigma_B11 = sigma_B[:, None, None]
        return (sigma_B11 * (self.variance_KD / (self.variance_KD + sigma_B11**2)).sqrt()).expand(-1, *self.mean_KD.shape)

    def denoisers(self, x_B: Tensor, sigma_B: Tensor) -> Tensor:
        """E[x | x_t, c] for every condition, then E[x | x_t] for the null condition: [B, K + 1, D]."""
        share_BKD = self.variance_KD / (self.variance_KD + sigma_B[:, None, None] ** 2)
        denoised_BKD = self.mean_KD + share_BKD * (x_B.flatten(1)[:, None] - self.mean_KD)
        marginal_BD = (self.posterior(x_B, sigma_B)[..., None] * denoised_BKD).sum(1)
        return torch.cat([denoised_BKD, marginal_BD[:, None]], 1)

    def denoise(self, noisy_RCHW: Tensor, sigma_R: Tensor, c_R: Tensor) -> tuple[Tensor, Tensor]:
        """(denoised_RCHW, log-variance 0): what a perfectly trained network makes of these rows."""
        denoised_RD = self.denoisers(noisy_RCHW, sigma_R)[torch.arange(len(c_R)), c_R]
        return denoised_RD.view_as(noisy_RCHW), torch.zeros_like(sigma_R)

    def sample(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Images [B, D, 1, 1] and their conditions [B]."""
        cdf_K = self.prior_K.cumsum(0)
        c_B = torch.searchsorted(cdf_K, draws.uniform().to(cdf_K) * cdf_K[-1], right=True)
        x_B = self.mean_KD[c_B] + self.variance_KD[c_B].sqrt() * draws.normal(self.mean_KD.shape[1])
        return x_B[..., None, None], c_B
