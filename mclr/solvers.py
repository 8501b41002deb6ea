"""Solvers of the probability-flow ODE dx/dsigma = (x - D(x; sigma)) / sigma and of the reverse SDE: pure functions of a denoiser.

All are called alike: the denoiser, x (noise at sigmas[0]), the noise levels, and a source of standard normal numbers like x, which
only the SDEs and a churned Heun draw from. Of a flow, dx/dtau = (x - D) / tau for x = (1 - tau) data + tau noise: the same equation, so
Euler and Heun serve it as they are. Euler in tau equals Euler in sigma (derived).
"""

import math
from collections.abc import Callable

from torch import Tensor

Denoiser = Callable[[Tensor, float], Tensor]
Noise = Callable[[], Tensor]


def sigma_grid(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> list[float]:
    """steps + 1 noise levels from sigma_max down to sigma_min, then 0 (EDM, arXiv 2206.00364, eq. 5)."""
    if steps == 1:
        return [sigma_max, 0.0]
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return [(high + i / (steps - 1) * (low - high)) ** rho for i in range(steps)] + [0.0]


def euler(denoise: Denoiser, x: Tensor, sigmas: list[float], noise: Noise) -> Tensor:
    """First order: one evaluation per step."""
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        x = x + (following - sigma) * (x - denoise(x, sigma)) / sigma
    return x


def heun(
    denoise: Denoiser,
    x: Tensor,
    sigmas: list[float],
    noise: Noise,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    churn_noise: float = 1.0,
) -> Tensor:
    """Second order: two evaluations per step, one in the last (EDM, algorithm 2: S_churn, S_min, S_max, S_noise).

    A step from sigma in [churn_min, churn_max] begins at (1 + min(churn / steps, sqrt(2) - 1)) sigma, with noise added to x.
    Many parameters: those of every solver, and EDM's four.
    """
    rise = min(churn / (len(sigmas) - 1), math.sqrt(2) - 1)
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        if rise and churn_min <= sigma <= churn_max:
            raised = (1 + rise) * sigma
            x = x + churn_noise * (raised**2 - sigma**2) ** 0.5 * noise()
            sigma = raised
        slope = (x - denoise(x, sigma)) / sigma
        guess = x + (following - sigma) * slope
        if following > 0:
            slope = (slope + (guess - denoise(guess, following)) / following) / 2
        x = x + (following - sigma) * slope
    return x


def sde(denoise: Denoiser, x: Tensor, sigmas: list[float], noise: Noise) -> Tensor:
    """The reverse SDE dx = 2 (x - D) dln(sigma) + sqrt(2) sigma dW by Heun's method: two evaluations per step, one in the last.

    With D held, a step is exact and of any length: DDPM's posterior (arXiv 2006.11239, eq. 7, for noise that is added). The second
    evaluation, at the end of that step with the same noise, makes it second order in distribution (derived).
    """
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        kept = (following / sigma) ** 2
        fresh = following * (1 - kept) ** 0.5 * noise()
        denoised = denoise(x, sigma)
        if following > 0:
            guess = denoised + kept * (x - denoised) + fresh
            denoised = (denoised + denoise(guess, following)) / 2
        x = denoised + kept * (x - denoised) + fresh
    return x


def euler_maruyama(denoise: Denoiser, x: Tensor, taus: list[float], noise: Noise) -> Tensor:
    """The reverse SDE of a flow with diffusion coefficient w = 2 tau, as REPA samples it (arXiv 2410.06940): one evaluation per step.

    x is (1 - tau) data + tau noise, v = (x - D) / tau the velocity, s = -((1 - tau) v + x) / tau the score. A step takes the drift
    v - w s / 2 and noise of variance w |step|; the last one takes the drift alone.
    """
    for tau, following in zip(taus, taus[1:], strict=False):
        velocity = (x - denoise(x, tau)) / tau
        x = x + (following - tau) * ((2 - tau) * velocity + x)
        if following > 0:
            x = x + (2 * tau * (tau - following)) ** 0.5 * noise()
    return x


SOLVERS = {"euler": euler, "heun": heun, "sde": sde, "heun_tau": heun, "euler_maruyama": euler_maruyama}
OWN = ("euler", "heun_tau", "euler_maruyama")  # solvers on the grid and in the coordinates of the form (mclr/forms.py)
OF_FLOWS = ("heun_tau", "euler_maruyama")
LAST_TAU = 0.04  # of euler_maruyama before 0
