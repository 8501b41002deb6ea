"""Engines carry a network through optimisation: LocalEngine (plain torch, the reference) and DeepSpeedEngine (ZeRO 0 to 3).

Both keep fp32 weights (bf16 runs the forward under autocast), and save and load one state that knows nothing of ranks or stages.
A piece is what one rank holds of a tensor: of its elements in order, divided into as many equal parts as there are ranks, the part with
the rank's number, the last ones shorter or empty. It is what ZeRO 3 keeps of a weight.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.magnitude import EPS
from kernels.weight_norm import force_weights

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 10**8  # elements that DeepSpeed sends at a time, and that ZeRO 3 keeps gathered: 400 MB of each; larger than any weight


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

    def pieces(self) -> dict[str, Tensor]:
        """This rank's pieces of the fp32 weights, by name, to be read."""

    def split(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's pieces of such tensors, by the names of weights; copies."""

    def gather(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole tensors that all ranks' pieces make, on rank 0 in host memory, elsewhere empty. Collective."""

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
def answering(net: nn.Module, bf16: bool) -> Iterator[None]:
    """Inside, a network that is being trained answers without gradient, dropout or compiled code: code that was made for other shapes
    might serve training afterwards, with another rounding."""
    training = net.training
    net.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), autocast_of(net, bf16):
            yield
    finally:
        net.train(training)


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


class LocalEngine(_RowCounter):
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

    def pieces(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.net.named_parameters()}

    def split(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: whole[name].to(p.device, copy=True) for name, p in self.net.named_parameters()}

    def gather(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: piece.cpu() for name, piece in pieces.items()}

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


def clipped(net: nn.Module, clip: float) -> tuple[Tensor, bool]:
    """(norm of the gradients, which are then scaled down to `clip` (0: not); whether it is finite: otherwise they are dropped)."""
    norm = nn.utils.clip_grad_norm_(net.parameters(), clip or math.inf)
    finite = bool(norm.isfinite())
    if not finite:
        # of weights without gradients an optimizer changes nothing, their moments and counters included
        net.zero_grad(set_to_none=True)
    return norm, finite


class DeepSpeedEngine(_RowCounter):
    """DeepSpeed over any number of ranks, as LocalEngine on the whole batch would (tests/test_engine.py: to 1e-5 in fp32).

    offload: masters and moments lie in host memory (ZeRO 1 to 3).
    """

    stepped = False

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
        super().__init__(net)
        self.shapes = {name: p.shape for name, p in net.named_parameters()}
        config = deepspeed_config(net, micro_batch, accumulation, bf16, zero) | {"gradient_clipping": clip if zero else 0.0}
        if offload:
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
            # torch's own fused AdamW needs no compiler
            config["zero_force_ds_cpu_optimizer"] = False
        self.engine = initialize(net, config, optimizer)
        self.zero, self.clip, self.lockstep = zero, clip, zero == 3
        # what steps: with ZeRO an AdamW on this rank's flat share of the fp32 masters
        self.optimizer = self.engine.optimizer.optimizer if zero else self.engine.optimizer
        if zero == 3:
            # shown to AdamW one after the other, in its steps
            flat = self.engine.optimizer.fp32_partitioned_groups_flat
        else:
            flat = [p for group in self.optimizer.param_groups for p in group["params"]]
        start_moments(self.optimizer, flat)
        if zero in (1, 2):
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
        if self.zero:
            self.engine.step()
            self.stepped = self.engine.was_step_applied()
            return torch.as_tensor(self.engine.get_global_grad_norm())
        # the averaged gradients lie in the network, and DeepSpeed does not tell their norm
        norm, self.stepped = clipped(self.net, self.clip)
        self.engine.step()
        return norm

    @torch.no_grad()
    def force_weights(self, weights: list[nn.Parameter]) -> None:
        if self.zero == 3:
            from deepspeed.utils import safe_set_local_fp32_param

            # ranks hold parts of rows: what goes between them is the sum of squares of every row
            partitioned: list[Any] = weights
            force_pieces([p.ds_tensor[: numel_here(p.ds_shape)] for p in partitioned], [p.ds_shape for p in partitioned])
            for p in partitioned:
                safe_set_local_fp32_param(p, p.ds_tensor)
            return
        force_weights(weights)
        for w in weights if self.zero else ():
            # from the network's whole copy of the masters, to this rank's share of them: nothing goes between ranks
            self._set_weight(w, w)

    @torch.no_grad()
    def pieces(self) -> dict[str, Tensor]:
        # of fp32 networks ZeRO leaves a copy of the masters, of ZeRO 3's pieces, in the network
        if self.zero == 3:
            parameters: Any = self.net.named_parameters()
            return {name: p.ds_tensor[: numel_here(self.shapes[name])] for name, p in parameters}
        return {name: piece_of(p.detach()) for name, p in self.net.named_parameters()}

    def split(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        device = next(self.net.parameters()).device
        return {name: piece_of(whole[name]).to(device, copy=True) for name in self.shapes}

    def gather(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        whole = {}
        for name, piece in pieces.items():
            shape = self.shapes[name]
            part = padded(piece, shape)
            parts = [torch.empty_like(part) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
            dist.gather(part, parts)
            if parts is not None:
                whole[name] = torch.cat(parts)[: shape.numel()].view(shape).cpu()
        return whole

    @torch.no_grad()
    def save(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for name, p in self.net.named_parameters():
            whole = {f"weight:{name}": self._weight(p)} | {f"{key}:{name}": self._moment(p, key) for key in MOMENTS}
            if dist.get_rank() == 0:
                state |= {key: value.cpu() for key, value in whole.items()}
                state["step"] = next(iter(self.optimizer.state.values()))["step"].to("cpu", copy=True)
        if dist.get_rank() == 0:
            state |= {name: t.cpu() for name, t in buffers_of(self.net).items()}
        return state

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, p in self.net.named_parameters():
            self._set_weight(p, state[f"weight:{name}"].to(p.device))
            for key in MOMENTS:
                self._set_moment(p, key, state[f"{key}:{name}"].to(p.device))
        for moments in self.optimizer.state.values():
            moments["step"].copy_(state["step"])
        for name, t in buffers_of(self.net).items():
            t.copy_(state[name])

    def _weight(self, p: nn.Parameter) -> Tensor:
        if self.zero == 3:
            from deepspeed.utils import safe_get_full_fp32_param

            return safe_get_full_fp32_param(p)
        return p.detach()

    def _set_weight(self, p: Any, value: Tensor) -> None:
        """In the network, and in this rank's share of the fp32 masters: ZeRO would overwrite the network from those."""
        if self.zero == 3:
            from deepspeed.utils import safe_set_local_fp32_param

            p.ds_tensor.copy_(padded(piece_of(value), value.shape))
            safe_set_local_fp32_param(p, p.ds_tensor)
            return
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
        if self.zero == 3:
            from deepspeed.utils import safe_set_local_optimizer_state

            safe_set_local_optimizer_state(p, padded(piece_of(value), value.shape), key)
        elif self.zero:
            from deepspeed.utils import safe_set_full_optimizer_state

            safe_set_full_optimizer_state(p, value, key)
        else:
            self.optimizer.state[p][key].copy_(value)


class Sharded(_RowCounter):
    """A network that only answers, divided among the ranks (ZeRO 3): a reference too large for each to hold. No gradient, no dropout."""

    def __init__(self, net: nn.Module, bf16: bool) -> None:
        super().__init__(net.requires_grad_(False))
        for p in net.parameters():
            # folded weights are channels last, which DeepSpeed cannot send
            p.data = p.data.contiguous()
        self.engine = initialize(net, deepspeed_config(net, 1, 1, bf16, zero=3))

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Any:
        self.count(inputs)
        return self.engine(*inputs)


def deepspeed_config(net: nn.Module, micro_batch: int, accumulation: int, bf16: bool, zero: int) -> dict[str, Any]:
    """What is not left to DeepSpeed's defaults, which change from version to version."""
    bucket = bucket_of(sum(p.numel() for p in net.parameters()))
    stage: dict[str, Any] = {"stage": zero, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if zero == 3:
        # by default a network of up to 1e9 weights would stay whole from forward to backward
        stage |= dict.fromkeys(("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size"), bucket)
        # no weight is kept whole beside its pieces, where forced normalisation would miss it
        stage["stage3_param_persistence_threshold"] = 0
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        # sums would be in the model's type
        "data_types": {"grad_accum_dtype": "fp32"},
        # weights and gradients go between ranks in fp32: with modules listed here they would not
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "zero_optimization": stage,
        "steps_per_print": 10**9,
    }


def bucket_of(count: int) -> int:
    """Elements of DeepSpeed's buckets for a network of so many; even, as it insists."""
    return min(BUCKET, count + count % 2)


def initialize(net: nn.Module, config: dict[str, Any], optimizer: torch.optim.Optimizer | None = None) -> Any:
    """DeepSpeed's engine. Collective."""
    import deepspeed
    from deepspeed.utils import set_z3_leaf_module

    # ZeRO 3 gathers a block's weights together: EDM2's reads those of its layers, and few large messages go faster than many
    for block in getattr(net, "blocks", ()):
        set_z3_leaf_module(block, True)
    # DeepSpeed 0.19 fails to copy 0-d weights from rank 0 to the others: ZeRO 3 is shown vectors of 1, the rest leaves out what has a mark
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


def numel_of_pieces(shape: torch.Size) -> int:
    """Elements of a piece, the last ones padded."""
    return -(-shape.numel() // dist.get_world_size())


def numel_here(shape: torch.Size) -> int:
    """Elements of this rank's piece, which may be one of the last."""
    size = numel_of_pieces(shape)
    return min(size, max(shape.numel() - dist.get_rank() * size, 0))


def piece_of(whole: Tensor) -> Tensor:
    """This rank's piece; a view."""
    first = dist.get_rank() * numel_of_pieces(whole.shape)
    return whole.flatten()[first : first + numel_here(whole.shape)]


def padded(piece: Tensor, shape: torch.Size) -> Tensor:
    return F.pad(piece, (0, numel_of_pieces(shape) - len(piece)))


def force_pieces(pieces: list[Tensor], shapes: list[torch.Size]) -> None:
    """force_weights, in place, of weights of these shapes of which every rank has a piece.

    Collective: what goes between ranks is one sum, of a number per row of every weight.
    """
    squares = [torch.zeros(shape[0], device=piece.device) for piece, shape in zip(pieces, shapes, strict=True)]
    views = []  # of each piece the rows that it has a part of, zero where that belongs to others; the part; the first row
    for piece, shape, squares_R in zip(pieces, shapes, squares, strict=True):
        fan_in = shape[1:].numel()
        row, before = divmod(dist.get_rank() * numel_of_pieces(shape), fan_in)
        rows = F.pad(piece, (before, -(before + len(piece)) % fan_in)).view(-1, fan_in) if len(piece) else piece.view(0, fan_in)
        here = slice(row, row + len(rows))
        squares_R[here] = rows.square().sum(1)
        views.append((rows, slice(before, before + len(piece)), here))
    sums = torch.cat(squares)
    dist.all_reduce(sums)
    split = sums.split([len(each) for each in squares])
    for piece, (rows, part, here), squares_R in zip(pieces, views, split, strict=True):
        rms_R = (squares_R[here] / rows.shape[1]).sqrt()
        piece.copy_((rows / (rms_R + EPS)[:, None]).flatten()[part])
