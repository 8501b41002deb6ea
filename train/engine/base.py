"""Engines carry a network through optimisation: LocalEngine (plain torch, the reference) here, DeepSpeedEngine in train/engine/zero.py.

Both keep fp32 weights (bf16 runs the forward under autocast), and save and load one state that knows nothing of ranks or stages.
A shard is what one rank holds of a tensor: of its elements in order, divided into as many equal parts as there are ranks, the part with
the rank's number, the last ones shorter or empty. It is what ZeRO 3 keeps of a weight.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine(Protocol):
    """net: the network itself. rows: how many it was run on, with and without gradient, since the last reset.

    stepped: whether the last step was made: not where its gradient was not finite.
    lockstep: whether all ranks must run the network equally often, since each holds a part of every weight.
    """

    net: nn.Module
    rows: dict[str, float]
    stepped: bool
    lockstep: bool

    def __call__(self, *inputs: Tensor) -> Any: ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch; losses of a step are averaged over its micro-batches and ranks."""

    def step(self, lr: float) -> Tensor:
        """One optimizer step at this learning rate; the gradient's norm before clipping, 0-d. Waits for the device."""

    def force_weights(self, weights: list[nn.Parameter]) -> None:
        """Bring the rows of these weights, some of the network's, to unit magnitude: EDM2's forced weight normalisation."""

    def shards(self) -> dict[str, Tensor]:
        """This rank's shards of the fp32 weights, by name, to be read."""

    def split(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's shards of such tensors, by the names of weights; copies."""

    def gather(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole tensors that all ranks' shards make, on rank 0 in host memory, elsewhere empty. Collective."""

    def save(self) -> dict[str, Tensor]:
        """On rank 0, in host memory: weights, moments and buffers by name ("weight:NAME", "exp_avg:NAME", "exp_avg_sq:NAME",
        "buffer:NAME") and the number of steps ("step"). Elsewhere empty. Collective."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what save gave, on every rank."""


def make_optimizer(
    net: nn.Module, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW; only the weights of linear layers and convolutions decay: gains, biases, positions and embeddings are left free."""
    embeddings = {id(module.weight) for module in net.modules() if isinstance(module, nn.Embedding)}
    decaying: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, p in net.named_parameters():
        decays = name.endswith("weight") and p.ndim >= 2 and id(p) not in embeddings
        (decaying if decays else free).append(p)
    groups = [{"params": g, "weight_decay": d} for g, d in ((decaying, weight_decay), (free, 0.0)) if g]
    # in one pass over each weight, without temporaries
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def start_moments(optimizer: torch.optim.Optimizer, weights: Iterable[Tensor]) -> None:
    """Give AdamW the state that its first step would, so that there is one to save and to load into at any time."""
    for w in weights:
        optimizer.state[w] = {"step": torch.zeros((), device=w.device)} | {key: torch.zeros_like(w) for key in MOMENTS}


def buffers_of(net: nn.Module) -> dict[str, Tensor]:
    """What belongs to a network's state and is not trained (random frequencies), as "buffer:NAME"; views."""
    trained = dict(net.named_parameters())
    return {f"buffer:{name}": t for name, t in net.state_dict().items() if name not in trained}


def autocast_of(net: nn.Module, bf16: bool) -> torch.autocast:
    return torch.autocast(next(net.parameters()).device.type, torch.bfloat16, enabled=bf16)


@contextmanager
def eval_mode(net: nn.Module, bf16: bool) -> Iterator[None]:
    """Inside, a network that is being trained answers without gradient, dropout or compiled code: code that was made for other shapes
    might serve training afterwards, with another rounding."""
    training = net.training
    net.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), autocast_of(net, bf16):
            yield
    finally:
        net.train(training)


class RowCounter:
    """Counts rows forwarded with and without gradient: the unit in which runs are made equal."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.rows = {"grad": 0.0, "no_grad": 0.0}
        self.tokens = getattr(net, "tokens", 1)  # of a whole row

    def count(self, inputs: tuple[Tensor, ...]) -> None:
        # teacher inputs [B, L-1, E]: a row cut short after a scale counts by its share of the tokens
        tokens = inputs[0].shape[1] + 1 if inputs[0].ndim == 3 else 1
        # what comes first may be held once per sample; what comes last has an entry for every row
        self.rows["grad" if torch.is_grad_enabled() else "no_grad"] += len(inputs[-1]) * tokens / self.tokens
        # rows without gradient are answers to compare with: no dropout in them
        self.net.train(torch.is_grad_enabled())


class Frozen(RowCounter):
    """A network that only answers: the reference, whole on this rank. No gradient, no dropout.

    Under bf16 what autocast would cast at every call is stored so: the answers are bit-equal, in half the memory.
    """

    def __init__(self, net: nn.Module, bf16: bool) -> None:
        super().__init__(net.requires_grad_(False))
        self.autocast = autocast_of(net, bf16)
        if bf16:
            for module in net.modules():
                if isinstance(module, nn.Linear):
                    module.bfloat16()

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Any:
        self.count(inputs)
        with self.autocast:
            return self.net(*inputs)


def clipped(net: nn.Module, clip: float) -> tuple[Tensor, bool]:
    """(norm of the gradients, which are then scaled down to `clip` (0: not); whether it is finite: otherwise they are dropped)."""
    norm = nn.utils.clip_grad_norm_(net.parameters(), clip or math.inf)
    finite = bool(norm.isfinite())
    if not finite:
        # of weights without gradients an optimizer changes nothing, their moments and counters included
        net.zero_grad(set_to_none=True)
    return norm, finite
