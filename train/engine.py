"""Engines carry a network through optimisation: LocalEngine (plain torch, the reference) and DeepSpeedEngine (ZeRO 0, 1, 2).

Both keep fp32 weights (bf16 runs the forward under autocast), and save and load one state that knows nothing of ranks or stages.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine(Protocol):
    """net: the network itself. rows: how many it was run on, with and without gradient, since the last reset."""

    net: nn.Module
    rows: dict[str, float]

    def __call__(self, *inputs: Tensor) -> Any: ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch; losses of a step are averaged over its micro-batches and ranks."""

    def step(self, lr: float) -> Tensor:
        """One optimizer step at this learning rate; the gradient's norm before clipping, 0-d."""

    def project(self, weights: list[nn.Parameter], projection: Callable[[Sequence[Tensor]], None]) -> None:
        """Have these weights projected, in place."""

    def weights(self) -> dict[str, Tensor]:
        """The fp32 weights by name: views, whole on every rank."""

    def save(self) -> dict[str, Tensor]:
        """On rank 0, in host memory: weights, moments and buffers by name ("weight:NAME", "exp_avg:NAME", "exp_avg_sq:NAME",
        "buffer:NAME") and the number of steps ("step"). Elsewhere empty. Collective."""

    def load(self, state: dict[str, Tensor]) -> None:
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
    # on CPUs torch fuses only when told to
    fused = True if next(net.parameters()).device.type == "cpu" else None
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)


def start_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give AdamW the state that its first step would, so that there is one to save and to load into at any time."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {"step": torch.zeros(())} | {key: torch.zeros_like(p) for key in MOMENTS}


def buffers_of(net: nn.Module) -> dict[str, Tensor]:
    """What belongs to a network's state and is not trained (random frequencies), as "buffer:NAME"; views."""
    trained = dict(net.named_parameters())
    return {f"buffer:{name}": t for name, t in net.state_dict().items() if name not in trained}


def autocast_of(net: nn.Module, bf16: bool) -> torch.autocast:
    return torch.autocast(next(net.parameters()).device.type, torch.bfloat16, enabled=bf16)


class _RowCounter:
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


class Frozen(_RowCounter):
    """A network that only answers: the reference. No gradient, no dropout."""

    def __init__(self, net: nn.Module, bf16: bool) -> None:
        super().__init__(net.requires_grad_(False))
        self.autocast = autocast_of(net, bf16)

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Any:
        self.count(inputs)
        with self.autocast:
            return self.net(*inputs)


class LocalEngine(_RowCounter):
    """One process, plain torch. accumulation: backward calls per step. clip: largest gradient norm, 0 = none."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer, clip: float, accumulation: int, bf16: bool):
        super().__init__(net)
        self.optimizer, self.clip, self.accumulation = optimizer, clip, accumulation
        self.autocast = autocast_of(net, bf16)
        start_moments(optimizer)

    def __call__(self, *inputs: Tensor) -> Any:
        self.count(inputs)
        with self.autocast:
            return self.net(*inputs)

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self, lr: float) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.clip or float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def project(self, weights: list[nn.Parameter], projection: Callable[[Sequence[Tensor]], None]) -> None:
        projection(weights)

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.net.named_parameters()}

    def save(self) -> dict[str, Tensor]:
        state = {name: t.cpu() for name, t in buffers_of(self.net).items()}
        for name, p in self.net.named_parameters():
            state[f"weight:{name}"] = p.detach().cpu()
            state |= {f"{key}:{name}": self.optimizer.state[p][key].cpu() for key in MOMENTS}
            state["step"] = self.optimizer.state[p]["step"].clone()
        return state

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        for name, p in self.net.named_parameters():
            p.copy_(state[f"weight:{name}"])
            for key in MOMENTS:
                self.optimizer.state[p][key].copy_(state[f"{key}:{name}"])
            self.optimizer.state[p]["step"].copy_(state["step"])
        for name, t in buffers_of(self.net).items():
            t.copy_(state[name])


class DeepSpeedEngine(_RowCounter):
    """DeepSpeed over any number of ranks, as LocalEngine on the whole batch would (tests/test_engine.py: to 1e-5 in fp32)."""

    def __init__(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        clip: float,
        accumulation: int,
        bf16: bool,
        micro_batch: int,
        zero: int,
    ):
        import deepspeed

        super().__init__(net)
        config = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            # each of these defaults to something else: clipping at 1.0, sums in the model's type, bf16 gradients between ranks
            "gradient_clipping": clip if zero else 0.0,
            "data_types": {"grad_accum_dtype": "fp32"},
            "torch_autocast": {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
            "zero_optimization": {"stage": zero},
            "steps_per_print": 10**9,
        }
        for p in net.parameters():
            if p.ndim == 0:
                # DeepSpeed 0.19 fails to copy 0-d weights from rank 0 to the others; it leaves out those with this mark
                p.ds_optim_param = True  # type: ignore[attr-defined]
                torch.distributed.broadcast(p.data, 0)
        self.engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
        self.zero, self.clip = zero, clip
        # what steps: with ZeRO an AdamW on this rank's flat share of the fp32 masters
        self.optimizer = self.engine.optimizer.optimizer if zero else self.engine.optimizer
        start_moments(self.optimizer)
        if zero:
            # ties each weight to its piece of the flat moments; DeepSpeed does so in its first step, but for one group of weights
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def __call__(self, *inputs: Tensor) -> Any:
        self.count(inputs)
        return self.engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        # DeepSpeed moves to the next micro-batch in step(); it applies the update only at the last one
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def step(self, lr: float) -> Tensor:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        # without ZeRO the averaged gradients lie in the network, and DeepSpeed does not tell their norm
        norm = None if self.zero else nn.utils.clip_grad_norm_(self.net.parameters(), self.clip or float("inf"))
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm() if norm is None else norm)

    @torch.no_grad()
    def project(self, weights: list[nn.Parameter], projection: Callable[[Sequence[Tensor]], None]) -> None:
        projection(weights)
        for p in weights if self.zero else ():
            self._set_weight(p, p)

    def weights(self) -> dict[str, Tensor]:
        # of fp32 networks ZeRO leaves a copy of the masters, just gathered from the ranks, in the network
        return {name: p.detach() for name, p in self.net.named_parameters()}

    @torch.no_grad()
    def save(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for name, p in self.net.named_parameters():
            whole = {f"weight:{name}": p.detach()} | {f"{key}:{name}": self._moment(p, key) for key in MOMENTS}
            if torch.distributed.get_rank() == 0:
                state |= {key: value.cpu() for key, value in whole.items()}
                state["step"] = next(iter(self.optimizer.state.values()))["step"].clone()
        if torch.distributed.get_rank() == 0:
            state |= {name: t.cpu() for name, t in buffers_of(self.net).items()}
        return state

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        for name, p in self.net.named_parameters():
            self._set_weight(p, state[f"weight:{name}"].to(p.device))
            for key in MOMENTS:
                self._set_moment(p, key, state[f"{key}:{name}"].to(p.device))
        for moments in self.optimizer.state.values():
            moments["step"].copy_(state["step"])
        for name, t in buffers_of(self.net).items():
            t.copy_(state[name])

    def _set_weight(self, p: nn.Parameter, value: Tensor) -> None:
        """In the network, and in this rank's share of the fp32 masters: ZeRO would overwrite the network from those."""
        p.copy_(value)
        if self.zero:
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(p, value)

    def _moment(self, p: nn.Parameter, key: str) -> Tensor:
        if self.zero:
            from deepspeed.utils import safe_get_full_optimizer_state

            return safe_get_full_optimizer_state(p, key)
        return self.optimizer.state[p][key]

    def _set_moment(self, p: nn.Parameter, key: str, value: Tensor) -> None:
        if self.zero:
            from deepspeed.utils import safe_set_full_optimizer_state

            safe_set_full_optimizer_state(p, value, key)
        else:
            self.optimizer.state[p][key].copy_(value)
