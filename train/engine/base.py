"""Engine carries a network through optimisation, Frozen is the reference network; zero.py holds both for many ranks.

Engines keep fp32 weights (bf16 runs the forward under autocast). They save and load one state that depends on neither ranks nor stages.
A shard is rank r's slice of the flattened tensor, split into world_size equal slices (the last ones may be short or empty).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mclr.kernels.weight_norm import force_weights
from mclr.models.registry import share_of

MOMENTS = ("exp_avg", "exp_avg_sq")


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
    # fused: one pass over each weight, without temporaries
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def start_moments(optimizer: torch.optim.Optimizer, weights: Iterable[Tensor]) -> None:
    """Give AdamW the state that its first step would make, so that it can be saved and loaded at any time."""
    for w in weights:
        optimizer.state[w] = {"step": torch.zeros((), device=w.device)} | {key: torch.zeros_like(w) for key in MOMENTS}


def buffers_of(net: nn.Module) -> dict[str, Tensor]:
    """The untrained part of a network's state (random frequencies), as "buffer:NAME"; views."""
    trained = dict(net.named_parameters())
    return {f"buffer:{name}": t for name, t in net.state_dict().items() if name not in trained}


def autocast_of(net: nn.Module, bf16: bool) -> torch.autocast:
    return torch.autocast(next(net.parameters()).device.type, torch.bfloat16, enabled=bf16)


@contextmanager
def eval_mode(net: nn.Module, bf16: bool) -> Iterator[None]:
    """Inside, a network in training runs without gradient, dropout or compiled code.

    Code compiled here for other shapes could serve training afterwards, with other rounding.
    """
    training = net.training
    net.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), autocast_of(net, bf16):
            yield
    finally:
        net.train(training)


def rows_in(net: Any, *inputs: Any, cache: Any = None) -> float:
    """Rows of a call of a network: the last input has an entry for every row. A row cut short, or cached, counts by its share."""
    return len(inputs[-1]) * share_of(net, *inputs, cache=cache)


def clipped(net: nn.Module, clip: float) -> tuple[Tensor, bool]:
    """(norm of the gradients, whether it is finite). Scales them down to norm `clip` (0: never), and drops them when not finite."""
    norm = nn.utils.clip_grad_norm_(net.parameters(), clip or math.inf)
    finite = bool(norm.isfinite())
    if not finite:
        # without gradients an optimizer changes nothing, not even moments and counters
        net.zero_grad(set_to_none=True)
    return norm, finite


class RowCounter:
    """A network that counts its rows with and without gradient: the unit in which costs of runs are compared."""

    def __init__(self, net: nn.Module, bf16: bool) -> None:
        self.net, self.autocast = net, autocast_of(net, bf16)
        # DeepSpeed puts a module of its own here, with the network inside
        self.forward: Callable[..., Any] = net
        self.rows = {"grad": 0.0, "no_grad": 0.0}

    def __call__(self, *inputs: Tensor) -> Any:
        grad = torch.is_grad_enabled()
        self.rows["grad" if grad else "no_grad"] += rows_in(self.net, *inputs)
        # rows without gradient only serve comparisons, which need the network without dropout
        self.net.train(grad)
        with self.autocast:
            return self.forward(*inputs)


class Frozen(RowCounter):
    """The reference network, whole on this rank: no gradient, no dropout.

    Under bf16 it stores its linear layers in bf16: bit-equal to autocast, which would cast them at every call, in half the memory.
    """

    def __init__(self, net: nn.Module, bf16: bool) -> None:
        super().__init__(net.requires_grad_(False), bf16)
        if bf16:
            for module in net.modules():
                if isinstance(module, nn.Linear):
                    module.bfloat16()

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Any:
        return super().__call__(*inputs)


class Engine(RowCounter):
    """Plain torch in one process. DeepSpeedEngine (zero.py) does the same over many ranks.

    accumulation: backward calls per step. clip: largest gradient norm, 0 = none.
    stepped: whether the last step was made; a step is left out when its gradient is not finite.
    lockstep: whether all ranks must run the network equally often, because each holds a shard of every weight.
    """

    stepped, lockstep = False, False
    # whether this rank keeps what save() returns
    saves = True

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer, clip: float, accumulation: int, bf16: bool):
        super().__init__(net, bf16)
        self.optimizer, self.clip, self.accumulation = optimizer, clip, accumulation
        start_moments(optimizer, net.parameters())

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch; losses of a step are averaged over its micro-batches and ranks."""
        (loss / self.accumulation).backward()

    def step(self, lr: float) -> Tensor:
        """One optimizer step at this learning rate; the gradient's norm before clipping, 0-d. Waits for the device."""
        norm, self.stepped = clipped(self.net, self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def force_weights(self, weights: list[nn.Parameter]) -> None:
        """Bring the rows of these weights, some of the network's, to unit magnitude: EDM2's forced weight normalisation."""
        force_weights(weights)

    def shard(self, whole: Tensor) -> Tensor:
        """This rank's shard of a whole tensor; a view."""
        return whole

    def shards(self) -> dict[str, Tensor]:
        """This rank's shards of the fp32 weights, by name; read only."""
        return {name: self.shard(p.detach()) for name, p in self.net.named_parameters()}

    def split(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's shards of whole tensors that are named and shaped like the weights; copies."""
        return {name: self.shard(whole[name]).to(p.device, copy=True) for name, p in self.net.named_parameters()}

    def gather(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole tensors, from the shards of all ranks: on rank 0 in host memory, elsewhere empty. Collective."""
        return {name: shard.cpu() for name, shard in shards.items()}

    @torch.no_grad()
    def save(self) -> dict[str, Tensor]:
        """The state by name: "weight:NAME", "exp_avg:NAME", "exp_avg_sq:NAME", "buffer:NAME" and the number of steps, "step".

        On rank 0 in host memory, elsewhere empty. Collective.
        """
        state = {name: t.cpu() for name, t in buffers_of(self.net).items() if self.saves}
        for name, p in self.net.named_parameters():
            whole = {f"weight:{name}": self._weight(p)} | {f"{key}:{name}": self._moment(p, key) for key in MOMENTS}
            if self.saves:
                state |= {key: value.cpu() for key, value in whole.items()}
                state["step"] = next(iter(self.optimizer.state.values()))["step"].to("cpu", copy=True)
        return state

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved state. Called on every rank."""
        for name, p in self.net.named_parameters():
            self._set_weight(p, state[f"weight:{name}"].to(p.device))
            for key in MOMENTS:
                self._set_moment(p, key, state[f"{key}:{name}"].to(p.device))
        for moments in self.optimizer.state.values():
            moments["step"].copy_(state["step"])
        for name, t in buffers_of(self.net).items():
            t.copy_(state[name])

    def _weight(self, p: nn.Parameter) -> Tensor:
        return p.detach()

    def _set_weight(self, p: Any, value: Tensor) -> None:
        p.copy_(value)

    def _moment(self, p: nn.Parameter, key: str) -> Tensor:
        return self.optimizer.state[p][key]

    def _set_moment(self, p: nn.Parameter, key: str, value: Tensor) -> None:
        self.optimizer.state[p][key].copy_(value)
