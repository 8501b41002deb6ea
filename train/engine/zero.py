"""DeepSpeedEngine (ZeRO 0 to 3), the reference network in shards (Sharded), and functions over shards."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mclr.kernels.magnitude import EPS
from mclr.kernels.weight_norm import force_weights
from mclr.train.engine.base import Engine, Frozen, RowCounter, clipped, start_moments

BUCKET = 10**8  # elements that DeepSpeed sends at a time, and that ZeRO 3 keeps gathered: 400 MB each; larger than any weight


class DeepSpeedEngine(Engine):
    """DeepSpeed over any number of ranks. It equals Engine on the whole batch to 1e-5 in fp32 (tests/engine/test_engine.py).

    offload: fp32 masters and moments are kept in host memory (ZeRO 1 to 3). Many parameters: those of Engine and DeepSpeed's own.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        clip: float,
        accumulation: int,
        bf16: bool,
        micro_batch: int,
        zero: int,
        offload: bool,
    ):
        # imported here: a bare GPU machine has no DeepSpeed
        from deepspeed import utils

        # not Engine's own: DeepSpeed must split the optimizer's weights before they have moments, and has an autocast of its own
        RowCounter.__init__(self, net, bf16=False)
        self.utils, self.saves = utils, dist.get_rank() == 0
        self.shapes = {name: p.shape for name, p in net.named_parameters()}
        config = deepspeed_config(net, micro_batch, accumulation, bf16, zero) | {"gradient_clipping": clip if zero else 0.0}
        if offload:
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
            # torch's own fused AdamW needs no compiler
            config["zero_force_ds_cpu_optimizer"] = False
        self.engine = self.forward = initialize(net, config, optimizer)
        self.zero, self.clip, self.lockstep = zero, clip, zero == 3
        # under ZeRO: the inner AdamW, which owns this rank's flat fp32 shard
        self.optimizer = self.engine.optimizer.optimizer if zero else self.engine.optimizer
        if zero == 3:
            # ZeRO 3 steps one flat group at a time
            flat = self.engine.optimizer.fp32_partitioned_groups_flat
        else:
            flat = [p for group in self.optimizer.param_groups for p in group["params"]]
        start_moments(self.optimizer, flat)
        if zero in (1, 2):
            # links each weight to its slice of the flat moments; DeepSpeed does this in its first step, but for one group only
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        # DeepSpeed counts micro-batches in step(); it updates weights only at the last one, in our step()
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def step(self, lr: float) -> Tensor:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        if self.zero:
            self.engine.step()
            self.stepped = self.engine.was_step_applied()
            return torch.as_tensor(self.engine.get_global_grad_norm())
        # ZeRO 0: the averaged gradients are in the network, and DeepSpeed does not tell their norm
        norm, self.stepped = clipped(self.net, self.clip)
        self.engine.step()
        return norm

    @torch.no_grad()
    def force_weights(self, weights: list[nn.Parameter]) -> None:
        if self.zero == 3:
            # ranks hold parts of rows and exchange the sum of squares of every row
            partitioned: list[Any] = weights
            force_shards([p.ds_tensor[: numel_here(p.ds_shape)] for p in partitioned], [p.ds_shape for p in partitioned])
            for p in partitioned:
                self.utils.safe_set_local_fp32_param(p, p.ds_tensor)
            return
        force_weights(weights)
        for w in weights if self.zero else ():
            # from the network's whole copy to this rank's shard of the masters: no communication
            self._set_weight(w, w)

    def shard(self, whole: Tensor) -> Tensor:
        return shard_of(whole)

    def shards(self) -> dict[str, Tensor]:
        if self.zero != 3:
            # the weights of an fp32 network are a copy of the masters
            return super().shards()
        parameters: Any = self.net.named_parameters()
        return {name: p.ds_tensor[: numel_here(self.shapes[name])] for name, p in parameters}

    def gather(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        whole = {}
        for name, shard in shards.items():
            shape = self.shapes[name]
            part = padded(shard, shape)
            parts = [torch.empty_like(part) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
            dist.gather(part, parts)
            if parts is not None:
                whole[name] = torch.cat(parts)[: shape.numel()].view(shape).cpu()
        return whole

    def _weight(self, p: nn.Parameter) -> Tensor:
        return self.utils.safe_get_full_fp32_param(p) if self.zero == 3 else super()._weight(p)

    def _set_weight(self, p: Any, value: Tensor) -> None:
        """Set a weight in the network and in this rank's shard of the masters, from which ZeRO overwrites the network."""
        if self.zero == 3:
            p.ds_tensor.copy_(padded(shard_of(value), value.shape))
            self.utils.safe_set_local_fp32_param(p, p.ds_tensor)
            return
        super()._set_weight(p, value)
        if self.zero:
            self.utils.safe_set_full_fp32_param(p, value)

    def _moment(self, p: nn.Parameter, key: str) -> Tensor:
        return self.utils.safe_get_full_optimizer_state(p, key) if self.zero else super()._moment(p, key)

    def _set_moment(self, p: nn.Parameter, key: str, value: Tensor) -> None:
        if self.zero == 3:
            self.utils.safe_set_local_optimizer_state(p, padded(shard_of(value), value.shape), key)
        elif self.zero:
            self.utils.safe_set_full_optimizer_state(p, value, key)
        else:
            super()._set_moment(p, key, value)


class Sharded(Frozen):
    """The reference network in shards over the ranks (ZeRO 3), when it is too large for one. No gradient, no dropout."""

    def __init__(self, net: nn.Module, bf16: bool) -> None:
        # not in bf16: DeepSpeed has an autocast of its own
        super().__init__(net, bf16=False)
        for p in net.parameters():
            # folded weights may be channels last, which DeepSpeed cannot send
            p.data = p.data.contiguous()
        self.forward = initialize(net, deepspeed_config(net, 1, 1, bf16, zero=3))


def deepspeed_config(net: nn.Module, micro_batch: int, accumulation: int, bf16: bool, zero: int) -> dict[str, Any]:
    """DeepSpeed's configuration. It sets what matters here, because defaults change from version to version."""
    bucket = bucket_of(sum(p.numel() for p in net.parameters()))
    stage: dict[str, Any] = {"stage": zero, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if zero == 3:
        # by default a network of up to 1e9 weights stays gathered from forward to backward
        stage |= dict.fromkeys(("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size"), bucket)
        # 0: no weight is also kept whole, where forced normalisation would miss it
        stage["stage3_param_persistence_threshold"] = 0
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        # the default is the model's type
        "data_types": {"grad_accum_dtype": "fp32"},
        # an empty list: weights and gradients are sent in fp32
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "zero_optimization": stage,
        "steps_per_print": 10**9,
    }


def bucket_of(count: int) -> int:
    """Elements of DeepSpeed's buckets for a network of `count` elements; even, as DeepSpeed requires."""
    return min(BUCKET, count + count % 2)


def initialize(net: nn.Module, config: dict[str, Any], optimizer: torch.optim.Optimizer | None = None) -> Any:
    """DeepSpeed's engine. Collective."""
    import deepspeed
    from deepspeed.utils import set_z3_leaf_module

    # ZeRO 3 gathers the weights of a block together: an EDM2 block reads weights of its layers, and few large messages are faster
    for block in getattr(net, "blocks", ()):
        set_z3_leaf_module(block, True)
    # DeepSpeed 0.19 cannot broadcast 0-d weights: ZeRO 3 gets vectors of 1, the other stages skip weights that have this mark
    scalars: list[Any] = [p for p in net.parameters() if p.ndim == 0]
    for p in scalars:
        dist.broadcast(p.data, 0)
        if config["zero_optimization"]["stage"] == 3:
            p.data = p.data.view(1)
        else:
            p.ds_optim_param = True
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    for p in scalars:
        p.ds_shape = torch.Size()
    return engine


def numel_of_shard(shape: torch.Size) -> int:
    """Elements of a shard; the last shards are padded to it."""
    return -(-shape.numel() // dist.get_world_size())


def numel_here(shape: torch.Size) -> int:
    """Elements of this rank's shard without padding."""
    size = numel_of_shard(shape)
    return min(size, max(shape.numel() - dist.get_rank() * size, 0))


def shard_of(whole: Tensor) -> Tensor:
    """This rank's shard; a view."""
    first = dist.get_rank() * numel_of_shard(whole.shape)
    return whole.flatten()[first : first + numel_here(whole.shape)]


def padded(shard: Tensor, shape: torch.Size) -> Tensor:
    return F.pad(shard, (0, numel_of_shard(shape) - len(shard)))


def force_shards(shards: list[Tensor], shapes: list[torch.Size]) -> None:
    """Normalise the rows of weights that are divided among the ranks, in place. shapes: of the whole weights.

    Collective: the ranks sum one vector, with one number per row of every weight.
    """
    squares = [torch.zeros(shape[0], device=shard.device) for shard, shape in zip(shards, shapes, strict=True)]
    # per shard: the rows it touches, zero where other ranks hold them; its slice of these rows; their numbers
    views = []
    for shard, shape, squares_R in zip(shards, shapes, squares, strict=True):
        fan_in = shape[1:].numel()
        row, before = divmod(dist.get_rank() * numel_of_shard(shape), fan_in)
        rows = F.pad(shard, (before, -(before + len(shard)) % fan_in)).view(-1, fan_in) if len(shard) else shard.view(0, fan_in)
        here = slice(row, row + len(rows))
        squares_R[here] = rows.square().sum(1)
        views.append((rows, slice(before, before + len(shard)), here))
    sums = torch.cat(squares)
    dist.all_reduce(sums)
    split = sums.split([len(each) for each in squares])
    for shard, (rows, part, here), squares_R in zip(shards, views, split, strict=True):
        rms_R = (squares_R[here] / rows.shape[1]).sqrt()
        shard.copy_((rows / (rms_R + EPS)[:, None]).flatten()[part])
