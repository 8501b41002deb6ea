"""The EDM paradigm: noise law, denoising surrogate of the log-likelihood, sampling.

B samples; R scored rows; C, H, W image; T = 1 term per row. The network: net(noisy_BCHW, sigma_B, c_R, index_R) -> (raw_RCHW,
logvar_R). Row r is sample index_R[r] under condition c_R[r]; without index_R rows are samples. raw: its answer, of unit variance, from
which the denoised image is made (Diffusion.denoised).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mclr.guidance import Guidance, mix
from mclr.likelihood import Draws, Net, Prediction, Probe, Scores, ask, network
from mclr.solvers import SOLVERS, sigma_grid

HINT = "give it as mclr.from_denoiser makes it, with one condition more than classes, the null condition"
LOG_RANGE = (math.log(80.0), math.log(0.002))


def progress_of(sigma: Tensor) -> Tensor:
    """Noise level -> progress: 0 at sigma = 80, 1 at sigma = 0.002, linear in ln sigma, clipped."""
    high, low = LOG_RANGE
    return ((high - sigma.log()) / (high - low)).clip(0, 1)


def sigma_of(progress: float) -> float:
    """The inverse of progress_of."""
    high, low = LOG_RANGE
    return math.exp(high + progress * (low - high))


def scales(sigma_B: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out), [B, 1, 1, 1]: denoised = c_skip noisy + c_out raw (EDM, arXiv 2206.00364, table 1)."""
    sigma_B111 = sigma_B[:, None, None, None]
    norm_B111 = (sigma_B111**2 + sigma_data**2).sqrt()
    return sigma_data**2 / norm_B111**2, sigma_B111 * sigma_data / norm_B111


def denoising_value(
    raw_RCHW: Tensor, x_BCHW: Tensor, noisy_BCHW: Tensor, sigma_B: Tensor, index_R: Tensor, sigma_data: float
) -> Tensor:
    """value_R: minus the squared error of each row's denoised image, weighted to unit size and averaged over its dimensions.

    value = -(sigma^2 + s^2) / (sigma s)^2 * mean (D - x)^2, s = sigma_data (EDM, arXiv 2206.00364, table 1), computed as
    -mean (raw - target)^2, target = (x - c_skip noisy) / c_out (derived: the weight is c_out^-2). Where sigma is small, the target
    comes from x - noisy, which loses fewer digits than the difference of two products.
    """
    sigma = sigma_B[:, None, None, None]
    norm = (sigma**2 + sigma_data**2).sqrt()
    small = (x_BCHW - noisy_BCHW) + (sigma / norm) ** 2 * noisy_BCHW
    large = x_BCHW - (sigma_data / norm) ** 2 * noisy_BCHW
    target = torch.where(sigma < sigma_data, small, large) * (norm / (sigma * sigma_data))
    return -(raw_RCHW.to(target.dtype) - target[index_R]).square().flatten(1).mean(1)


@dataclass(frozen=True)
class Diffusion:
    """The paradigm of denoisers: how images are noised, scored and sampled. Raises ValueError for settings that do not fit.

    shape: (C, H, W) of a sample. null: index of the null condition. ln sigma ~ N(noise_mean, noise_std^2) in training (EDM2,
    arXiv 2312.02696, section 2); sigma_data: standard deviation of the data; the rest belongs to sampling (EDM, table 1; churn:
    algorithm 2, 0 for none).
    """

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
        object.__setattr__(self, "shape", tuple(self.shape))  # a list would equal no shape of a tensor
        if self.null < 1 or self.steps < 1:
            raise ValueError(f"null={self.null}, steps={self.steps}: both must be >= 1")
        if not (0 < self.sigma_min < self.sigma_max and self.sigma_data > 0 and self.noise_std > 0):
            given = f"sigma_min={self.sigma_min}, sigma_max={self.sigma_max}, sigma_data={self.sigma_data}, noise_std={self.noise_std}"
            raise ValueError(f"{given}: all must be > 0, and sigma_min below sigma_max")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver={self.solver} is unknown: expected {', '.join(SOLVERS)}")
        if self.churn and self.solver != "heun":
            raise ValueError(f"churn={self.churn} needs solver=heun, not {self.solver}")

    @property
    def dims(self) -> int:
        return math.prod(self.shape)

    def check(self, x_B: Tensor) -> None:
        if x_B.shape[1:] != self.shape or not x_B.is_floating_point():
            raise ValueError(f"x must be floats [B, {', '.join(map(str, self.shape))}], not {x_B.dtype} {list(x_B.shape)}")

    def probe(self, x_B: Tensor, draws: Draws) -> Probe:
        """One noise level and one noise per sample. x_B: [B, C, H, W]."""
        sigma_B = (draws.normal() * self.noise_std + self.noise_mean).exp()
        noisy = x_B + sigma_B[:, None, None, None] * draws.normal(*self.shape)
        return Probe({"x": x_B, "noisy": noisy, "sigma": sigma_B}, progress_of(sigma_B)[:, None])

    def denoised(self, raw_BCHW: Tensor, noisy_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
        """The denoised images of a network's answers, fp32."""
        c_skip, c_out = scales(sigma_B, self.sigma_data)
        return c_skip * noisy_BCHW + c_out * raw_BCHW.float()

    def predict(self, net: Net, probe: Probe, index_R: Tensor, c_R: Tensor, terms: int | None = None) -> Prediction:
        """(raw_RCHW, logvar_R): the answer, whose mixture makes the mixture of denoised images, and the learned log-variance u."""
        return ask(net, (len(c_R), *self.shape), HINT, probe.inputs["noisy"], probe.inputs["sigma"], c_R, index_R)

    def log_likelihood(
        self, prediction: Prediction, probe: Probe, index_R: Tensor, guide: Tensor | None = None, mix_RT: Tensor | None = None
    ) -> Scores:
        """-(weighted squared error) exp(-u) with u held constant; u is calibrated by aux alone, on the matched rows.

        err = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 * mean over dimensions of (D - x)^2. -value + aux has exactly the
        gradient of EDM2's loss (eq. 21); the split is derived: with u inside the value a ratio could drive u to -infinity.
        """
        raw, logvar_R = prediction
        given = (probe.inputs["x"], probe.inputs["noisy"], probe.inputs["sigma"], index_R, self.sigma_data)
        value_R = denoising_value(raw, *given)
        err_R = -value_R.detach()
        if guide is not None and mix_RT is not None:
            value_R = denoising_value(mix(raw, guide, mix_RT), *given)
        return Scores((value_R * (-logvar_R.detach()).exp())[:, None], err_R * (-logvar_R).exp() + logvar_R)

    def compared(self, value_RT: Tensor, prediction: Prediction, frozen: Prediction) -> Tensor:
        return value_RT * (prediction[1].detach() - frozen[1]).exp()[:, None]

    @torch.no_grad()
    def sample(self, net: Net, c_B: Tensor, guidance: Guidance, draws: Draws) -> Tensor:
        """Images [B, C, H, W], one forward per evaluation and a second one where gamma is not 0."""
        net, null_B = network(net, "net"), torch.full_like(c_B, self.null)

        def denoise(x: Tensor, sigma: float) -> Tensor:
            sigma_B = torch.full((len(x),), sigma, device=x.device)
            pred = ask(net, x.shape, HINT, x, sigma_B, c_B)[0]
            weight = guidance.gamma.at(float(progress_of(torch.tensor(sigma))))
            if weight != 0:
                guide, guide_c_B = (net, null_B) if guidance.guide is None else (guidance.guide, c_B)
                pred = mix(pred, ask(guide, x.shape, HINT, x, sigma_B, guide_c_B)[0], weight)
            return self.denoised(pred, x, sigma_B)

        def noise() -> Tensor:
            return draws.normal(*self.shape)

        sigmas = sigma_grid(self.steps, self.sigma_min, self.sigma_max, self.rho)
        x = noise() * sigmas[0]
        churn = (self.churn, self.churn_min, self.churn_max, self.churn_noise) if self.churn else ()
        return SOLVERS[self.solver](denoise, x, sigmas, noise, *churn)
