"""The paradigm of denoisers: noise, denoising surrogate of the log-likelihood, sampling. What answers mean is in mclr/forms.py.

B samples; R scored rows; C, H, W image; T = 1 term per row. The network: net(input_BCHW, time_B, c_R, index_R, strength_R) ->
(answer_RCHW, rest). Row r is sample index_R[r] under condition c_R[r]; without index_R rows are samples. strength_R is given to networks
with a dial. rest: the log-variance [R] of EDM2, what says the variance in DiT, nothing in a flow.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mclr.forms import EDM, Flow, Form
from mclr.guidance import Guidance, mix
from mclr.likelihood import Draws, Net, Prediction, Probe, Scores, ask, network
from mclr.solvers import LAST_TAU, OF_FLOWS, OWN, SOLVERS, sigma_grid

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


@dataclass(frozen=True)
class Diffusion:
    """The paradigm of denoisers: how images are noised, scored and sampled. Raises ValueError for settings that do not fit.

    shape: (C, H, W) of a sample. null: index of the null condition. form: what the network is asked and what it answers; the rest
    belongs to sampling (EDM, arXiv 2206.00364, table 1; churn: algorithm 2, 0 for none). guided_channels: guidance acts on the first
    so many channels; None: on all.
    """

    shape: tuple[int, int, int]
    null: int
    form: Form = field(default_factory=EDM)
    steps: int = 32
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    solver: str = "heun"
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    churn_noise: float = 1.0
    guided_channels: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))  # a list would equal no shape of a tensor
        if self.null < 1 or self.steps < 1:
            raise ValueError(f"null={self.null}, steps={self.steps}: both must be >= 1")
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"sigma_min={self.sigma_min}, sigma_max={self.sigma_max}: both must be > 0, sigma_min the smaller one"
            )
        if self.solver not in SOLVERS:
            raise ValueError(f"solver={self.solver} is unknown: expected {', '.join(SOLVERS)}")
        if self.churn and self.solver != "heun":
            raise ValueError(f"churn={self.churn} needs solver=heun, not {self.solver}")
        if self.solver in OF_FLOWS and not isinstance(self.form, Flow):
            raise ValueError(
                f"solver={self.solver} is for flows: expected {', '.join(name for name in SOLVERS if name not in OF_FLOWS)}"
            )
        if self.solver in OWN:
            self.form.grid([0.0] * (self.steps + 1), 0.0)

    @property
    def dims(self) -> int:
        return math.prod(self.shape)

    def check(self, x_B: Tensor) -> None:
        if x_B.shape[1:] != self.shape or not x_B.is_floating_point():
            raise ValueError(f"x must be floats [B, {', '.join(map(str, self.shape))}], not {x_B.dtype} {list(x_B.shape)}")

    def probe(self, x_B: Tensor, draws: Draws) -> Probe:
        """One noise level and one noise per sample. x_B: [B, C, H, W]."""
        level_B = self.form.draw(draws)
        noise = draws.normal(*self.shape)
        state = self.form.state(x_B, noise, level_B)
        inputs = {"target": self.form.target(x_B, noise, state, level_B), "state": state, "level": level_B}
        return Probe(inputs, progress_of(self.form.sigma(level_B))[:, None])

    def noisy(self, probe: Probe) -> tuple[Tensor, Tensor]:
        """(x + sigma n, sigma) of a probe: what a classifier of noisy images is asked."""
        state, level_B = probe.inputs["state"], probe.inputs["level"]
        return self.form.noisy(state, level_B), self.form.sigma(level_B)

    def predict(self, net: Net, probe: Probe, index_R: Tensor, c_R: Tensor, terms: int | None = None) -> Prediction:
        """(answer_RCHW, rest): the mixture of answers makes the mixture of denoised images."""
        asked = self.form.asked(probe.inputs["state"], probe.inputs["level"])
        return ask(net, (len(c_R), *self.shape), HINT, *asked, c_R, index_R, *probe.told(index_R))

    def log_likelihood(
        self, prediction: Prediction, probe: Probe, index_R: Tensor, guide: Prediction | None = None, mix_RT: Tensor | None = None
    ) -> Scores:
        """-(mean squared error of the answer), times the form's weight, which is held constant: aux alone calibrates it.

        EDM: err = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 * mean over dimensions of (D - x)^2, weight exp(-u).
        """
        answer, rest = prediction
        target = probe.inputs["target"]

        def value(answer: Tensor) -> Tensor:
            return -(answer.to(target.dtype) - target[index_R]).square().flatten(1).mean(1)

        value_R = value(answer)
        aux_R = self.form.aux(-value_R.detach(), answer, rest, probe.inputs, index_R)
        if guide is not None and mix_RT is not None:
            value_R = value(mix(answer, guide[0], mix_RT))
        return Scores((value_R * self.form.log_weight(rest).detach().exp())[:, None], aux_R)

    def compared(self, value_RT: Tensor, prediction: Prediction, frozen: Prediction) -> Tensor:
        own, reference = (self.form.log_weight(rest).detach() for _, rest in (prediction, frozen))
        return value_RT * (reference - own).exp()[..., None]

    @torch.no_grad()
    def sample(self, net: Net, c_B: Tensor, guidance: Guidance, draws: Draws) -> Tensor:
        """Images [B, C, H, W], one forward per evaluation and a second one where gamma is not 0."""
        net = network(net, "net")
        guide = guidance.guide_for(net, self.null)
        form, channels, dial = self.form, self.guided_channels, guidance.told(net, c_B)

        def denoise(state: Tensor, level: float) -> Tensor:
            level_B = torch.full((len(state),), level, device=state.device)
            asked = form.asked(state, level_B)
            pred = ask(net, state.shape, HINT, *asked, c_B, *dial)[0]
            weight = guidance.gamma.at(float(progress_of(form.sigma(torch.tensor(level)))))
            if weight != 0:
                mixed = mix(pred, ask(guide.net, state.shape, HINT, *asked, guide.conditions(c_B))[0], weight)
                pred = mixed if channels is None else torch.cat([mixed[:, :channels], pred[:, channels:]], 1)
            return form.denoised(pred.float(), state, level_B)

        def noise() -> Tensor:
            return draws.normal(*self.shape)

        sigmas = sigma_grid(self.steps, self.sigma_min, self.sigma_max, self.rho)
        if self.solver in OWN:
            levels = form.grid(sigmas, LAST_TAU if self.solver == "euler_maruyama" else 0.0)
            return SOLVERS[self.solver](denoise, form.start(noise(), levels[0]), levels, noise)
        sigmas = [form.known(sigma) for sigma in sigmas]
        churn = (self.churn, self.churn_min, self.churn_max, self.churn_noise) if self.churn else ()
        return SOLVERS[self.solver](
            lambda x, sigma: denoise(*form.of_sigma(x, sigma)), noise() * sigmas[0], sigmas, noise, *churn
        )
