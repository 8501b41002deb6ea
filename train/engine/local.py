"""LocalEngine: plain torch in one process; what every engine must equal."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mclr.kernels.weight_norm import force_weights
from mclr.train.engine.base import MOMENTS, RowCounter, autocast_of, buffers_of, clipped, start_moments


class LocalEngine(RowCounter):
    """One process, plain torch. accumulation: backward calls per step. clip: largest gradient norm, 0 = none."""

    lockstep, stepped = False, False

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer, clip: float, accumulation: int, bf16: bool):
        super().__init__(net)
        self.optimizer, self.clip, self.accumulation = optimizer, clip, accumulation
        self.autocast = autocast_of(net, bf16)
        start_moments(optimizer, net.parameters())

    def __call__(self, *inputs: Tensor) -> Any:
        self.count(inputs)
        with self.autocast:
            return self.net(*inputs)

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self, lr: float) -> Tensor:
        norm, self.stepped = clipped(self.net, self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def force_weights(self, weights: list[nn.Parameter]) -> None:
        force_weights(weights)

    def shards(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.net.named_parameters()}

    def split(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: whole[name].to(p.device, copy=True) for name, p in self.net.named_parameters()}

    def gather(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: shard.cpu() for name, shard in shards.items()}

    def save(self) -> dict[str, Tensor]:
        state = {name: t.cpu() for name, t in buffers_of(self.net).items()}
        for name, p in self.net.named_parameters():
            state[f"weight:{name}"] = p.detach().cpu()
            state |= {f"{key}:{name}": self.optimizer.state[p][key].cpu() for key in MOMENTS}
            state["step"] = self.optimizer.state[p]["step"].to("cpu", copy=True)
        return state

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, p in self.net.named_parameters():
            p.copy_(state[f"weight:{name}"])
            for key in MOMENTS:
                self.optimizer.state[p][key].copy_(state[f"{key}:{name}"])
            self.optimizer.state[p]["step"].copy_(state["step"])
        for name, t in buffers_of(self.net).items():
            t.copy_(state[name])
