"""The likelihood-ratio objective: raise log p(x|c) - log p(x|c~), as one formula with named instances.

B samples; T terms per sample (1 for diffusion, L tokens); R scored rows; K classes. Values are per dimension, up is good.

    loss = phi(v+, v-) + aux        per sample; v+ of the matched condition, v- of the contrast; averaged over terms

v is the value of each term (mle, mclr, unlearn), or beta times the log-likelihood ratio to a frozen reference, one term per sample
(cc_dpo, cca, ddo). lam(progress) is the strength. Where lam = 0 the loss is plain maximum likelihood in every objective, and so it is for
samples whose condition was dropped (not in cca). README.md lists the objectives, the contrasts, their sources and what `bound` does;
tests/mclr/test_theorem.py checks the optima.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mclr.combinations import CONTRASTS, objective_conflicts
from mclr.contrast import draw_any, draw_marginal, draw_other, draw_posterior, generated_rows, matched_rows, paired_rows
from mclr.likelihood import Draws, Probe, Rows, Scores
from mclr.schedule import Schedule

# phi of v+ and v-, of each term, lam and the weight w of the contrast; -1 marks a contrast of cca that counts as matched
PHI: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "mle": lambda plus, minus, lam, w: -plus,
    "mclr": lambda plus, minus, lam, w: -(1 + lam) * plus + lam * w * minus,
    "unlearn": lambda plus, minus, lam, w: -plus + lam / (1 + lam) * w * minus,
    "cc_dpo": lambda plus, minus, lam, w: -lam * logsigmoid(plus - minus),
    "ddo": lambda plus, minus, lam, w: -logsigmoid(plus) - lam * logsigmoid(-minus),
    "cca": lambda plus, minus, lam, w: (-logsigmoid(plus) - lam.where(w > 0, 1) * logsigmoid(-w * minus)) / lam.clamp(min=1),
}


@dataclass(frozen=True)
class Objective:
    """One objective. Raises ValueError for settings that do not go together.

    name: one of PHI. contrast: one of combinations.CONTRASTS; without one, the only one that the objective has (mclr has four).
    lam: strength, a number or a Schedule over progress; all but mle need it. bound: in nats, for tokens. truncate: share of the
    posterior, its least likely classes, that is never drawn. beta: scale of the ratio to the reference, for cc_dpo, cca and ddo.
    strength_max: of mclr with a dial. In place of lam every sample draws a strength, uniform in [0, strength_max], and the network is
    told; lam may be a Schedule of weight 1, which the strength is multiplied by. Given a strength s the terms are those of lam = s,
    so one network has the optimum of every s (derived).
    """

    name: str = "mle"
    contrast: str = ""
    lam: Schedule | float | None = None
    bound: float | None = None
    truncate: float = 0.02
    beta: float | None = None
    strength_max: float = 0.0

    def __post_init__(self) -> None:
        if not self.contrast and len(CONTRASTS.get(self.name, ())) == 1:
            object.__setattr__(self, "contrast", CONTRASTS[self.name][0])
        for fault in objective_conflicts(self, self.given, self.schedule, strength_max=self.strength_max):
            raise ValueError(fault)

    @property
    def schedule(self) -> Schedule:
        """lam as a function of progress; with a dial that of strength 1."""
        if isinstance(self.lam, Schedule):
            return self.lam
        if self.lam is None and self.strength_max:
            return Schedule("constant", 1.0)
        return Schedule("constant", self.lam or 0.0)

    @property
    def given(self) -> float | None:
        """The weight of lam. None where lam is not given, or is no more than the shape of a dial."""
        if isinstance(self.lam, Schedule):
            return None if self.strength_max and self.lam.weight == 1 else self.lam.weight
        return self.lam

    @property
    def needs_posterior(self) -> bool:
        """Whether the contrast depends on p(c|x_t)."""
        return self.contrast in ("weighted", "posterior")

    @property
    def needs_reference(self) -> bool:
        """Whether values are ratios to a frozen network."""
        return self.beta is not None

    @property
    def needs_generated(self) -> bool:
        """Whether the contrast is with samples of the reference."""
        return self.contrast == "generated"

    def rows(
        self, probe: Probe, c_B: Tensor, null: int, draws: Draws, posterior_BTK: Tensor | None, null_share: float = 0.0
    ) -> Rows:
        """What has to be scored for these samples. c_B: int64, null where the condition was dropped: those samples get lam = 0.

        With `generated`, probe and c_B hold as many generated samples after the real ones. posterior_BTK: p(c | what the network
        sees when it scores the term); needed by `weighted` and `posterior`. null_share: share of dropped conditions in training, which
        `marginal` repeats.
        """
        uniform_B = draws.uniform()
        lam_BT = self.schedule(probe.progress_BT)
        if probe.strength_B is not None:
            lam_BT = lam_BT * probe.strength_B[:, None]
        if self.contrast == "marginal":
            other_B1 = draw_marginal(uniform_B, null, null_share)
            weight_BT = torch.where((other_B1 == null) | (other_B1 == c_B[:, None]), -1.0, torch.ones_like(lam_BT))
            return paired_rows(c_B, other_B1, null, lam_BT, weight_BT)
        lam_BT = lam_BT * (c_B != null)[:, None]
        one_BT = torch.ones_like(lam_BT)
        if self.contrast == "none":
            return matched_rows(c_B, torch.zeros_like(lam_BT))
        if self.contrast == "null":
            return matched_rows(c_B, lam_BT, mix_BT=-lam_BT / (1 + lam_BT))
        if self.contrast == "generated":
            half = len(c_B) // 2
            return generated_rows(c_B, lam_BT[:half], one_BT[:half])
        if self.contrast == "uniform":
            return paired_rows(c_B, draw_other(c_B, uniform_B, null), null, lam_BT, one_BT)
        assert posterior_BTK is not None
        if self.contrast == "posterior":
            return paired_rows(c_B, draw_posterior(posterior_BTK, uniform_B, self.truncate), null, lam_BT, one_BT)
        other_B1 = draw_any(uniform_B, null)
        weight_BT = null * posterior_BTK.gather(-1, other_B1[..., None].expand(-1, posterior_BTK.shape[1], 1))[..., 0]
        return paired_rows(c_B, other_B1, null, lam_BT, weight_BT)

    def __call__(self, scores: Scores, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        """loss_B, unreduced, fp32, and metrics: 0-d tensors, averages over the batch (PYTHON.md says what each is)."""
        batch = len(rows.lam_BT)
        matched_BT = scores.value_RT[:batch]
        if self.beta is None:
            plus, minus = matched_BT, scores.value_RT.gather(0, rows.contrast_BT)
            if self.bound is not None:
                minus = torch.maximum(minus, plus.detach() - self.bound)
            loss_B = PHI[self.name](plus, minus, rows.lam_BT, rows.weight_BT).mean(1)
        else:
            assert scores.delta_R is not None
            # one term per sample: lam and contrast are the same for all terms
            lam_B, weight_B = rows.lam_BT[:, 0], rows.weight_BT[:, 0]
            plus, minus = self.beta * scores.delta_R[:batch], self.beta * scores.delta_R[rows.contrast_BT[:, 0]]
            loss_B = torch.where(lam_B == 0, -matched_BT.mean(1), PHI[self.name](plus, minus, lam_B, weight_B))
        aux_B = scores.aux_R[:batch]
        metrics = {"value": matched_BT.detach().mean(), "aux": aux_B.detach().mean()}
        if self.beta is not None:
            mismatched_B = (rows.weight_BT[:, 0] > 0) & (lam_B != 0)
            metrics["delta"] = ((plus - minus).detach() / self.beta * mismatched_B).sum() / mismatched_B.sum().clamp(min=1)
        elif self.contrast not in ("none", "null"):
            metrics["ratio"] = (plus - minus).detach().mean()
        if self.contrast not in ("none", "null"):
            own_BT = torch.arange(batch, device=matched_BT.device)[:, None]
            metrics["contrast_share"] = (rows.contrast_BT != own_BT).float().mean()
        return loss_B + aux_B, metrics
