"""The training loss: from samples and conditions to one number per sample. Also forced weight normalisation (project).

B samples; P = B, or 2B with generated samples; R scored rows; T terms. Conditions are int64, 0 .. null - 1; null is the null condition.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mclr.combinations import objective_conflicts
from mclr.diffusion import Diffusion
from mclr.kernels.weight_norm import force_weights
from mclr.likelihood import Draws, Net, Paradigm, guide_of, network, refuse_strength, score
from mclr.objective import Objective
from mclr.posterior import calibration, noisy_posterior, prefix_posterior

# Where the random numbers of generated samples begin: beyond all positions of training.
GENERATED = 2**62


@dataclass(frozen=True)
class Loss:
    """criterion(net, x, c, first=position) -> (loss, metrics) of one micro-batch, for a training loop of your own.

    A Model may stand for its network, here and in the call. paradigm: Diffusion or NextScale. objective: what is optimised.
    posterior: for the contrasts posterior and weighted. Diffusion: a network classifier(noisy [B, C, H, W], sigma [B]) -> logits
    [B, K], such as mclr.load("digits-posterior"). Where its parameters are trainable, its cross-entropy is part of the loss; its
    gradients are separate from the network's. Tokens need none: Bayes' rule on the network itself gives the posterior.
    reference: for cc_dpo, cca and ddo, a frozen copy of the network before fine-tuning. guide: for the contrast null, a Guide, or a
    network (autoguidance), frozen; None: the network itself under the null condition.
    drop_condition: share of the samples that learn the null condition. seed: of all random numbers.
    warmup: a batch that begins before this position has no ratio, so that a posterior from scratch can learn first.
    Raises ValueError for parts that do not fit together.
    """

    paradigm: Paradigm
    objective: Objective
    posterior: Net | None = None
    reference: Net | None = None
    guide: Any = None
    drop_condition: float = 0.1
    seed: int = 0
    warmup: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.objective, Objective) or not hasattr(self.paradigm, "probe"):
            wanted = "give a paradigm, such as model.paradigm, and an Objective, such as Objective('mclr', 'null', lam=1.0)"
            given = f"{type(self.paradigm).__name__}, {type(self.objective).__name__}"
            raise ValueError(f"Loss is given {given}: {wanted}")
        for name in ("posterior", "reference"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, network(given, name))
        object.__setattr__(self, "guide", guide_of(self.guide))
        objective, diffusion = self.objective, isinstance(self.paradigm, Diffusion)
        for fault in objective_conflicts(
            objective,
            objective.given,
            objective.schedule,
            diffusion=diffusion,
            conditions=self.paradigm.null,
            strength_max=objective.strength_max,
        ):
            raise ValueError(fault)
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed} is out of range: must be >= 0 and < 2^64")
        if not 0 <= self.drop_condition <= 1:
            raise ValueError(f"drop_condition={self.drop_condition} is out of range: must be >= 0 and <= 1")
        if objective.contrast == "null" and self.guide is None and self.drop_condition == 0:
            raise ValueError(
                "contrast=null needs the null condition, which drop_condition=0 leaves untrained; set 0.1, or give guide="
            )
        if self.guide is not None and objective.contrast != "null":
            raise ValueError(f"guide= has no effect with contrast={objective.contrast}: it is for contrast=null")
        if objective.needs_reference != (self.reference is not None):
            how = "needs reference=, a frozen copy of" if objective.needs_reference else "takes no reference="
            raise ValueError(f"objective {objective.name} {how} the network before fine-tuning")
        needs_classifier = objective.needs_posterior and diffusion
        if needs_classifier and self.posterior is None:
            raise ValueError(f"contrast={objective.contrast} needs posterior=, a network classifier(noisy, sigma) -> logits")
        if not needs_classifier and self.posterior is not None:
            which = f"contrast={objective.contrast}" if diffusion else "tokens, whose posterior comes from the network itself"
            raise ValueError(f"posterior= has no effect with {which}: leave it out")
        if self.warmup != 0 and not objective.needs_posterior:
            raise ValueError(f"warmup={self.warmup} is for a posterior that learns; contrast={objective.contrast} has none")

    def __call__(
        self, net: Net, x: Tensor, c: Tensor, *, first: int, generated: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(mean loss, 0-d and ready for backward; metrics, 0-d without gradient).

        x: images or latents [B, C, H, W], or tokens [B, L] int64. c: their conditions [B]. first: position of the first sample in
        training, as in step * B: positions and the seed decide all random numbers. generated: for ddo, (x, c) of as many samples
        drawn from the reference. Raises ValueError for samples or conditions that do not fit. Waits for the device, to check c.
        """
        if self.objective.needs_generated != (generated is not None):
            how = "needs generated=(x, c), samples of the reference" if generated is None else "takes no generated="
            raise ValueError(f"objective {self.objective.name} {how}")
        net = network(net, "net")
        refuse_strength(net, self.objective.strength_max)
        given = {"": (x, c)} if generated is None else {"": (x, c), "generated ": generated}
        for name, (x_B, c_B) in given.items():
            if not isinstance(x_B, Tensor) or not isinstance(c_B, Tensor):
                raise ValueError(f"{name}x and c must be tensors, not {type(x_B).__name__} and {type(c_B).__name__}")
            self.paradigm.check(x_B)
            if len(x_B) != len(x) or len(x) == 0:
                raise ValueError(f"{name}x has {len(x_B)} samples: must be {len(x) or '1 or more'}")
            if c_B.dtype != torch.int64 or c_B.shape != x.shape[:1]:
                raise ValueError(f"{name}c must be int64 of shape [{len(x)}], like x, not {c_B.dtype} {list(c_B.shape)}")
            if c_B.min() < 0 or c_B.max() >= self.paradigm.null:
                raise ValueError(f"{name}c has conditions {c_B.min()} .. {c_B.max()}: must be 0 .. {self.paradigm.null - 1}")
        if first < 0:
            raise ValueError(f"first={first} is a position: must be >= 0")
        x_P, c_P = (torch.cat([part.to(x.device) for part in parts]) for parts in zip(*given.values(), strict=True))
        draws = self.draws(range(first, first + len(x)), x.device)
        dropped_c_P = self.drop(c_P, draws, len(x))
        loss_B, posterior_loss_B, metrics = self.per_sample(net, x_P, dropped_c_P, c_P, draws, first)
        loss = loss_B.mean()
        if posterior_loss_B is not None and posterior_loss_B.requires_grad:
            loss = loss + posterior_loss_B.mean()
        return loss, metrics

    def draws(self, positions: range, device: torch.device) -> Draws:
        """Random numbers of the samples at these positions, and then of as many generated ones where the objective needs them."""
        generated = [GENERATED + position for position in positions] if self.objective.needs_generated else []
        return Draws(self.seed, [*positions, *generated], device)

    def drop(self, c_P: Tensor, draws: Draws, real: int) -> Tensor:
        """The conditions, null for a share of the first `real` samples. A generated sample keeps the condition it was drawn for."""
        dropped_P = draws.uniform() < self.drop_condition
        dropped_P[real:] = False
        return torch.where(dropped_P, self.paradigm.null, c_P)

    def per_sample(
        self, net: Net, x_P: Tensor, c_P: Tensor, true_c_P: Tensor, draws: Draws, first: int
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """(loss [B], the posterior's cross-entropy [B] or None, metrics): unreduced, fp32.

        Only the posterior's logits are checked. Waits for the device unless the contrast is none: the number of rows depends on draws.
        c_P: conditions, null where dropped; true_c_P: before that. net: with lockstep=True it runs equally often on all ranks.
        """
        probe = self.paradigm.probe(x_P, draws)
        posterior_BTK, posterior_loss_B = None, None
        if self.posterior is not None and isinstance(self.paradigm, Diffusion):
            noisy = self.paradigm.noisy(probe)
            posterior_BTK, posterior_loss_B = noisy_posterior(self.posterior, self.paradigm.null, noisy, true_c_P)
        elif self.objective.needs_posterior:
            posterior_BTK = prefix_posterior(self.paradigm, net, probe)
        # A classifier that knows nothing yet draws any condition: that ratio has no bound, and the network would not recover.
        objective = self.objective if first >= self.warmup else replace(self.objective, lam=0.0, strength_max=0.0)
        if objective.strength_max:
            probe = replace(probe, strength_B=objective.strength_max * draws.uniform())
        rows = objective.rows(probe, c_P, self.paradigm.null, draws, posterior_BTK, self.drop_condition)
        lockstep = getattr(net, "lockstep", False)
        loss_B, metrics = objective(score(self.paradigm, net, probe, rows, self.reference, self.guide, lockstep), rows)
        metrics["loss"] = loss_B.detach().mean()
        if posterior_BTK is not None:
            metrics |= calibration(posterior_BTK, true_c_P, self.objective.truncate)
        if posterior_loss_B is not None:
            metrics["posterior_loss"] = posterior_loss_B.detach().mean()
        return loss_B, posterior_loss_B, metrics


@torch.no_grad()
def project(net: nn.Module) -> list[nn.Parameter]:
    """Bring the weights under forced normalisation to unit magnitude, and return them. Call it after every optimizer step.

    EDM2 (arXiv 2312.02696, section 2.3) trains so. Networks without a method magnitude_preserving are left as they are.
    """
    forcing: list[Any] = [module for module in network(net, "net").modules() if hasattr(module, "magnitude_preserving")]
    forced = [weight for module in forcing for weight in module.magnitude_preserving()]
    if forced:
        force_weights(forced)
    return forced
