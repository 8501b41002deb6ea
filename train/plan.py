"""`mclr train --plan`: what a run takes on 1 to 1,024 GPUs. Nothing is allocated or written: networks and rows are fake tensors.

P parameters, N ranks, a micro-batches per step. Weights, gradients, moments and averages are fp32; bytes on one GPU:

| what      | local, ZeRO 0 | ZeRO 1         | ZeRO 2         | ZeRO 3                      |
| ---       | ---           | ---            | ---            | ---                         |
| weights   | 4P            | 4P             | 4P             | 4P/N                        |
| gathered  |               |                |                | 4 min(P, 1.5b + block)      |
| gradients | 4P            | 4p, a > 1: 4P  | 4p, a > 1: 8p  | 4P/N                        |
| optimizer | 8P            | 12P/N          | 12P/N          | 12P/N                       |
| buckets   | N > 1: 4f     | 8b             | 8b             | 8b                          |
| sent      | 8P            | 12P            | (8a + 4) P     | 4aP (1 + forwards) + 4aP'   |

optimizer: two moments, with ZeRO fp32 masters. p: the weights of which a rank has a part, whole; of the rank that has most. buckets:
DeepSpeed's, b = min(P, 1e8) elements (train/engine.py), and what is flattened out of it; without ZeRO f = min(P, 5e8) alone. gathered
(derived from DeepSpeed's rule of release): what backward uses within b elements stays after forward, the last b/2; with the largest
block in use and b fetched ahead. sent: per step, in rings, times (N - 1)/N; P' = P - b/2 is what backward gathers again, P where a
forward without gradient lies in between.
Averages: 4P/N each. Reference: whole, its Linears in 2 bytes under bf16; or sharded, as weights of ZeRO 3. Classifier of the
posterior: 16 bytes per parameter, at every stage. offload: optimizer and the gradients for it lie in host memory.
tests/test_plan.py compares weights, gradients, optimizer, averages and bytes sent with a step's, at every stage.

Activations: the most bytes alive in forward and backward beyond weights, counted while they run on fake CPU tensors, with all rows that
the objective may ask for (conditions that coincide save some); a gradient is dropped when it is done. Or, where that is more, what
AdamW makes in its step: 4 bytes per element that it steps, 8 at ZeRO 1 and 2, which flatten its gradients. Not counted are
tokenizer or VAE (.4 GiB), libraries' workspaces, fragments: MARGIN is left for them. Kernels and engine.compile are taken for plain torch.

Time of a step = FLOPs / (peak x MFU) + sent / (REACHED x link), nothing overlapped: MFU, REACHED and NETWORK are assumed. FLOPs: a
row with gradient 3 forwards, one without 1, as torch counts a forward; activation checkpointing one more; and a VAE's encoder.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from configs.schema import DiffusionModel, RunConfig
from kernels.choice import using
from mclr.errors import UserError
from mclr.likelihood import Paradigm, Probe
from mclr.next_scale import NextScale, scale_progress
from mclr.objective import Objective
from models.features import NoiseClassifier, NoiseClassifierConfig
from models.vqvae import VQVAE, VQVAEConfig
from train.build import LARGE, build_classifier, build_encoder, build_net, build_objective, build_paradigm
from train.encoders import RGB, Encoder, Tokens
from train.engine import autocast_of, bucket_of, make_optimizer
from train.gpus import GPUS, NODE, gpu_named
from train.noise import BareLatents
from train.published import SCALES_256, SCALES_512
from train.weights import find_weights, read_config, settings_of

COUNTS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)  # of GPUs, where none is asked for
MOST = 1024
POINTS = (1, 2, 4, 8, 16, 32, 64)  # micro-batches that are run on fake tensors
GIB = 2**30
MARGIN = 0.05  # of a GPU's memory, for what is not counted
MFU = 0.4
REACHED = 0.8  # of a link's bandwidth
NETWORK = 200e9  # bytes per second between machines of NODE GPUs; each ring of NCCL takes its own way out, so all of it is used
VAE_FLOPS = 1.1e12 / 512**2  # of the encoder of Stable Diffusion's VAE, per pixel, in fp32
IMAGENET = {"channels": 3, "num_classes": 1000}
# presets of published networks, by how their names begin -> pixels and scales of what they were trained on
PUBLISHED = {
    "edm2-img64": (64, None),
    "edm2-img512": (512, None),
    "var-d36-s": (512, SCALES_512),
    **dict.fromkeys(("var-d16", "var-d20", "var-d24", "var-d30"), (256, SCALES_256)),
}


def published_scale(model: str) -> tuple[int, tuple[int, ...] | None] | None:
    """(pixels, scales of the tokens) of ImageNet as the published network of this preset models it; None for any other preset."""
    return next((made_for for start, made_for in PUBLISHED.items() if model.startswith(start)), None)


def published_data(model: str, data: str) -> list[str]:
    """Overrides that stand for the data of a published network where no other than the default were given."""
    found = published_scale(model) if data == "digits" else None
    return [f"data.{k}={v}" for k, v in {"name": "imagenet", "resolution": found[0], **IMAGENET}.items()] if found else []


class Watch(TorchDispatchMode):
    """Follows the storages made inside by fake tensors: bytes alive now, and at most. A value that is asked for reads 0.

    known: storages that are not counted, whose views may come by.
    """

    def __init__(self, known: Set[int] = frozenset()):
        super().__init__()
        self.known = known
        self.alive: dict[int, ref] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known and key not in self.alive:
                    self.alive[key] = ref(storage, self._forget(key, size))
                    self.now += size
                    self.most = max(self.most, self.now)
        return out

    def _forget(self, key: int, size: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            del self.alive[key]
            self.now -= size

        return forget


@dataclass(frozen=True)
class Forward:
    """One call of the network in a micro-batch: rows per sample, on so many leading terms (None: all)."""

    rows: int
    terms: int | None = None


@dataclass(frozen=True)
class Calls:
    """The most that an objective asks of a network: forwards with and without gradient, and of the reference; for `samples` per image."""

    grad: tuple[Forward, ...]
    free: tuple[Forward, ...] = ()
    reference: tuple[Forward, ...] = ()
    samples: int = 1


def calls_of(objective: Objective, scales: tuple[int, ...] | None, num_classes: int, lockstep: bool) -> Calls:
    """scales: sides of the token maps; None: diffusion. lockstep: of ZeRO 3, where no row is cut short."""
    contrast, reference = objective.contrast, objective.needs_reference
    if contrast == "none":
        return Calls((Forward(1),))
    if contrast == "generated":
        return Calls((Forward(1),), (), (Forward(1),), samples=2)
    if scales is None:
        if contrast == "null":
            return Calls((Forward(1),), (Forward(1),))
        return Calls((Forward(2),), (), (Forward(2),) if reference else ())
    ends = list(accumulate(side * side for side in scales))
    # a term needs a contrast where its weight is not 0
    needed = [end for end, progress in zip(ends, scale_progress(scales), strict=True) if objective.lam.at(progress)]
    if contrast == "null":
        return Calls((Forward(1),), (Forward(1, needed[-1]),) if needed else ())
    before = ends[-2] if len(ends) > 1 else 0
    free = (Forward(1, before),) * (num_classes if objective.needs_posterior and before else 0)
    drawn = needed if contrast == "posterior" else needed[-1:]
    if reference or lockstep:
        every = (Forward(1 + len(drawn)),)
        return Calls(every, free, every if reference else ())
    rows = Counter([ends[-1], *drawn])
    return Calls(tuple(Forward(count, terms) for terms, count in rows.items()), free)


@dataclass(frozen=True)
class Sizes:
    """What the networks of a run are made of. groups: elements of every weight, as the optimizer groups them; block: of the largest
    block; reference: bytes; classifier: parameters; flops: of one row's forward, and of one of the classifier."""

    groups: tuple[tuple[int, ...], ...]
    block: int
    buffers: int
    reference: int
    classifier: int
    flops: int
    classifier_flops: int

    @property
    def count(self) -> int:
        return sum(map(sum, self.groups))


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU; host: in host memory, per rank."""

    weights: float
    gathered: float
    gradients: float
    optimizer: float
    averages: float
    reference: float
    classifier: float
    buckets: float
    activations: float
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum(vars(self).values()) - self.host


class Model:
    """The networks of a run as fake tensors, and what they were found to take."""

    def __init__(self, config: RunConfig):
        self.config, self.bf16 = config, config.engine.precision == "bf16"
        self.objective = build_objective(config)
        encoder = encoder_of(config)
        self.scales = encoder.tokenizer.config.scales if isinstance(encoder, Tokens) else None
        self.paradigm: Paradigm = build_paradigm(config, encoder)
        self.shape = encoder.shape(config.data)
        self.code_width = encoder.tokenizer.config.z_channels if isinstance(encoder, Tokens) else 0
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake, Watch():
            self.net = build_net(config, encoder).train()
            self.net.activation_checkpointing = config.engine.activation_checkpointing  # type: ignore[assignment]
            self.classifier = self._classifier()
            self.sizes = self._sizes()
        self.measured = cache(self._measured)

    def _classifier(self) -> NoiseClassifier | None:
        model = self.config.model
        if not (isinstance(model, DiffusionModel) and self.objective.needs_posterior):
            return None
        if model.posterior.weights is None:
            return build_classifier(self.config)
        return NoiseClassifier(NoiseClassifierConfig(**settings_of(read_config(find_weights(model.posterior.weights)))))

    def _sizes(self) -> Sizes:
        optimizer = make_optimizer(self.net, 0.0, (0.0, 0.0), 0.0, 0.0)
        blocks = [sum(p.numel() for p in block.parameters()) for block in self.net.blocks]  # type: ignore[union-attr]
        linear = sum(p.numel() for m in self.net.modules() if isinstance(m, nn.Linear) for p in m.parameters())
        return Sizes(
            groups=tuple(tuple(p.numel() for p in group["params"]) for group in optimizer.param_groups),
            block=max(blocks, default=0),
            buffers=sum(t.nbytes for t in self.net.buffers()),
            # as Frozen stores it
            reference=4 * sum(p.numel() for p in self.net.parameters()) - (2 * linear if self.bf16 else 0),
            classifier=sum(p.numel() for p in self.classifier.parameters()) if self.classifier else 0,
            flops=self._flops(lambda probe: self._values(probe, Forward(1), 1)),
            classifier_flops=self._flops(self._classify) if self.classifier else 0,
        )

    def _flops(self, run: Callable[[Probe], Any]) -> int:
        # plain operations, as train/loop.py counts them
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), using("torch"), FlopCounterMode(display=False) as counter:
            run(self._probe(1))
        return counter.get_total_flops()

    def _probe(self, samples: int) -> Probe:
        if isinstance(self.paradigm, NextScale):
            tokens = torch.zeros(samples, self.paradigm.dims, dtype=torch.int64)
            teacher = torch.zeros(samples, self.paradigm.dims - 1, self.code_width)
            return Probe({"tokens": tokens, "teacher": teacher}, torch.zeros(tokens.shape))
        assert self.shape is not None
        x, noisy = torch.zeros(samples, *self.shape), torch.zeros(samples, *self.shape)
        return Probe({"x": x, "noisy": noisy, "sigma": torch.zeros(samples)}, torch.zeros(samples, 1))

    def _values(self, probe: Probe, forward: Forward, samples: int) -> Tensor:
        """The sum of what all rows of one forward are scored with."""
        index = torch.zeros(forward.rows * samples, dtype=torch.int64)
        prediction = self.paradigm.predict(self.net, probe, index, torch.zeros_like(index), forward.terms)
        mixed = {}
        if self.objective.contrast == "null" and torch.is_grad_enabled():
            mixed = {"guide": prediction[0].detach().clone(), "mix_RT": torch.zeros(probe.progress_BT.shape)}
        found = self.paradigm.log_likelihood(prediction, probe, index, **mixed)
        return found.value_RT.sum() + found.aux_R.sum()

    def _classify(self, probe: Probe) -> Tensor:
        assert self.classifier is not None
        return self.classifier(probe.inputs["noisy"], probe.inputs["sigma"]).sum()

    def activations(self, micro_batch: int, lockstep: bool) -> float:
        """Most bytes alive in forward and backward of this many images: counted at POINTS, linear between and beyond."""
        if micro_batch in POINTS:
            return self.measured(micro_batch, lockstep)[1]
        low, high = next(((a, b) for a, b in pairwise(POINTS) if micro_batch < b), POINTS[-2:])
        (_, first), (_, last) = self.measured(low, lockstep), self.measured(high, lockstep)
        return first + (last - first) * (micro_batch - low) / (high - low)

    def _measured(self, micro_batch: int, lockstep: bool) -> tuple[int, int]:
        """(bytes saved for backward, most bytes alive in forward and backward)."""
        calls, saved = self.calls(lockstep), {}
        samples = calls.samples * micro_batch
        nets = [self.net, *([self.classifier] if self.classifier else [])]
        parameters = [p for net in nets for p in net.parameters()]
        known = {t.untyped_storage()._cdata for t in (*parameters, *(t for net in nets for t in net.buffers()))}

        def keep(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage._cdata not in known:
                saved[storage._cdata] = storage
            return t

        hooks = [p.register_post_accumulate_grad_hook(drop_gradient) for p in parameters]
        with self.fake, using("torch"), Watch(known) as watch:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast_of(self.net, self.bf16):
                probe = self._probe(samples)
                loss = sum((self._values(probe, forward, samples) for forward in calls.grad), torch.zeros(()))
                if self.classifier is not None:
                    loss = loss + self._classify(probe)
            held = sum(storage.nbytes() for storage in saved.values())
            saved.clear()
            loss.backward()
        for hook in hooks:
            hook.remove()
        return held, watch.most

    def calls(self, lockstep: bool) -> Calls:
        return calls_of(self.objective, self.scales, self.config.data.num_classes, lockstep)

    def share_of(self, forwards: tuple[Forward, ...]) -> float:
        """Rows per sample; one that is cut short counts by its share of the terms."""
        terms = self.paradigm.dims if self.scales else 1
        return sum(forward.rows * (forward.terms or terms) / terms for forward in forwards)


def drop_gradient(p: Tensor) -> None:
    p.grad = None


def encoder_of(config: RunConfig) -> Encoder:
    """What a run would encode with, without a VAE; without a tokenizer where the data is what a published network was trained on."""
    if isinstance(config.model, DiffusionModel):
        return BareLatents() if config.model.vae else RGB()
    published = published_scale(config.model.name)
    if published and published[1] and config.data.resolution == published[0] and config.data.channels == IMAGENET["channels"]:
        return Tokens(VQVAE(VQVAEConfig(ch=32, ch_mult=(1,) * 5, num_res_blocks=1, scales=published[1])))
    return build_encoder(config, torch.device("cpu"))


def largest_share(groups: tuple[tuple[int, ...], ...], ranks: int) -> int:
    """Elements of the weights of which a rank has a part at ZeRO 1 and 2, whole; of the rank that has most. DeepSpeed divides a group's
    elements in order."""
    totals = [0] * ranks
    for sizes in groups:
        part, first = math.ceil(sum(sizes) / ranks), 0
        for size in sizes:
            for rank in range(first // part, (first + size - 1) // part + 1):
                totals[rank] += size
            first += size
    return max(totals)


def memory_of(model: Model, ranks: int, micro_batch: int) -> Memory:
    """Bytes on one of so many GPUs, by the table above."""
    config, sizes = model.config, model.sizes
    zero, offload, P, share = config.engine.zero, config.engine.offload, sizes.count, 1 / ranks
    accumulates = config.train.batch // ranks > micro_batch
    bucket = bucket_of(P)
    partial = 4 * largest_share(sizes.groups, ranks)
    # those of the last micro-batch go straight into a bucket
    gradients = (4 * P, 4 * P if accumulates else partial, partial * (2 if accumulates else 1), 4 * P * share)[zero]
    optimizer = 12 * P * share if zero else 8 * P
    buckets = 8 * bucket if zero else 4 * min(P, 500_000_000) if ranks > 1 else 0
    gathered = 4 * min(P, bucket * 3 // 2 + sizes.block)
    settings = config.train
    averages = {settings.ema_std, *(settings.snapshot_stds if settings.snapshot_every else ())} - {0.0}
    reference = 0.0
    if model.objective.needs_reference:
        reference = 4 * P * share + gathered if sharded(model, ranks) else sizes.reference
    host = 0.0
    if offload:
        host = optimizer + 4 * P * share
        # what is left of the gradients on the GPU: at ZeRO 1 those that accumulate, else the one under way
        gradients, optimizer = 4 * P if zero == 1 and accumulates else 0, 0.0
    stepping = 0 if offload else 4 * P * share * (2 if zero < 3 else 1) if zero else 4 * P
    return Memory(
        weights=4 * P * (share if zero == 3 else 1) + sizes.buffers,
        gathered=gathered if zero == 3 else 0,
        gradients=gradients,
        optimizer=optimizer,
        averages=len(averages) * 4 * P * share,
        reference=reference,
        classifier=16 * sizes.classifier,
        buckets=buckets,
        activations=max(model.activations(micro_batch, zero == 3), stepping),
        host=host,
    )


def sent_by(model: Model, ranks: int, micro_batch: int) -> float:
    """Bytes that a rank sends per step, in rings: an all-reduce sends a tensor twice, all-gather and reduce-scatter once."""
    config, P = model.config, model.sizes.count
    zero, steps = config.engine.zero, config.train.batch // ranks // micro_batch
    calls = model.calls(zero == 3)
    # between a forward and its backward the last weights stay; another forward in between drops them
    again = P if len(calls.grad + calls.free) > 1 else P - bucket_of(P) // 2
    sent = {0: 2 * P, 1: 3 * P, 2: (2 * steps + 1) * P, 3: steps * (P * (1 + len(calls.grad + calls.free)) + again)}[zero]
    if sharded(model, ranks):
        sent += steps * len(calls.reference) * P
    return 4 * (sent + 2 * model.sizes.classifier) * (ranks - 1) / ranks


def sharded(model: Model, ranks: int) -> bool:
    """Whether the ranks divide the reference (train/build.py, is_sharded)."""
    how = model.config.engine.reference
    large = model.sizes.count > LARGE and ranks > 1
    return model.objective.needs_reference and (how == "sharded" or (how == "auto" and large))


def flops_per_image(model: Model) -> float:
    """The most that one image costs, its VAE left out."""
    calls = model.calls(model.config.engine.zero == 3)
    with_gradient = 4 if model.config.engine.activation_checkpointing else 3
    rows = with_gradient * model.share_of(calls.grad) + model.share_of(calls.free) + model.share_of(calls.reference)
    return calls.samples * rows * model.sizes.flops + 3 * model.sizes.classifier_flops


def seconds_per_step(model: Model, ranks: int, micro_batch: int, gpu: str) -> float:
    config, about = model.config, GPUS[gpu]
    images = config.train.batch / ranks
    seconds = images * flops_per_image(model) / ({"bf16": about.bf16, "fp32": about.fp32}[config.engine.precision] * MFU)
    if isinstance(config.model, DiffusionModel) and config.model.vae:
        seconds += images * VAE_FLOPS * config.data.resolution**2 / (about.fp32 * MFU)
    link = about.link if ranks <= NODE else min(about.link, NETWORK)
    return seconds + sent_by(model, ranks, micro_batch) / (link * REACHED)


def shares(config: RunConfig, ranks: int) -> list[int]:
    """The micro-batches that a rank's images can be divided into, the smallest first."""
    share = config.train.batch // ranks
    return sorted({d for i in range(1, math.isqrt(share) + 1) if share % i == 0 for d in (i, share // i)})


def largest_that_fits(model: Model, ranks: int, memory: float) -> int | None:
    """The largest micro-batch whose bytes are no more than `memory`; None where not even the smallest fits."""
    fitting = (n for n in reversed(shares(model.config, ranks)) if memory_of(model, ranks, n).total <= memory)
    return next(fitting, None)


def way_out(config: RunConfig, ranks: int) -> str:
    """What more could make a run fit where no micro-batch does."""
    engine = config.engine
    ways = [] if engine.activation_checkpointing else ["engine.activation_checkpointing=true"]
    ways += ["--engine zero3"] if ranks > 1 and engine.zero < 3 else []
    ways += ["engine.offload=true"] if engine.zero and not engine.offload else []
    return "use " + " or ".join(ways or ["more GPUs, or larger ones"])


HEAD = (
    *("GPUs", "images", "weights", "gathered", "gradients", "optimizer", "averages", "reference", "classifier", "buckets"),
    *("activations", "total", "most images", "GB sent", "s/step", "images/s", "rows/s"),
)


def plan(config: RunConfig, gpus: int | None, gpu: str | None) -> Iterator[str]:
    """The lines of a plan. gpus: how many, None: a table over COUNTS. gpu: a key of GPUS, None: that of this machine, else an h100.

    Raises UserError for a GPU that is not known, and for a number of GPUs that the batch or the engine cannot be shared by.
    """
    here = gpu_named(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    name = (gpu or here or "h100").lower()
    if name not in GPUS:
        raise UserError(f"unknown GPU {gpu}: give one of {', '.join(GPUS)}")
    if gpus is not None and not 1 <= gpus <= MOST:
        raise UserError(f"--gpus {gpus}: must be 1 to {MOST}")
    batch, engine = config.train.batch, config.engine
    counts: tuple[int, ...] = COUNTS if gpus is None else (gpus,)
    if gpus is not None and batch % gpus:
        raise UserError(f"train.batch={batch} cannot be shared by {gpus} ranks: make it a multiple of {gpus}")
    if gpus is not None and gpus > 1 and engine.kind == "local":
        raise UserError(f"engine.kind=local runs on one rank, not {gpus}: use engine.kind=deepspeed")
    counts = tuple(n for n in counts if batch % n == 0 and (n == 1 or engine.kind != "local"))

    model = Model(config)
    sizes, calls = model.sizes, model.calls(engine.zero == 3)
    rows = calls.samples * model.share_of(calls.grad)
    free = calls.samples * (model.share_of(calls.free) + model.share_of(calls.reference))
    room = GPUS[name].memory * (1 - MARGIN) * GIB
    stage = f"ZeRO {engine.zero}" + (", offload" if engine.offload else "")
    stage += ", activation checkpointing" if engine.activation_checkpointing else ""
    data = config.data
    yield f"plan       {config.model.name}, {sizes.count / 1e6:.2f}M parameters"
    yield f"objective  {config.objective.name}, contrast {model.objective.contrast}"
    yield f"data       {data.name}: {data.num_classes} classes, {data.channels} x {data.resolution}^2"
    yield f"engine     {stage}, {engine.precision}, on {name}: {GPUS[name].memory:g} GiB each, of which {1 - MARGIN:.0%} are planned with"
    yield f"rows       at most {rows:g} with gradient and {free:g} without per image, {flops_per_image(model) / 1e12:.3g} TFLOP"
    yield (
        f"assumed    MFU {MFU:g}, links at {REACHED:.0%} ({GPUS[name].link / 1e9:g} GB/s; {NETWORK / 1e9:g} between machines of {NODE}), "
        "nothing overlapped"
    )
    yield "GiB per GPU; images: per forward of one GPU; most images: as many as fit"
    table: list[tuple[str, ...]] = [HEAD]
    advice = []
    for ranks in counts:
        most = config.train.micro_batch or batch
        micro_batch = max(d for d in shares(config, ranks) if d <= most)
        memory, largest = memory_of(model, ranks, micro_batch), largest_that_fits(model, ranks, room)
        seconds = seconds_per_step(model, ranks, micro_batch, name)
        parts = [value for key, value in vars(memory).items() if key != "host"]
        cells = [f"{ranks}", f"{micro_batch}", *(f"{part / GIB:.2f}" for part in parts), f"{memory.total / GIB:.2f}"]
        rates = (seconds, batch / seconds, batch * (rows + free) / seconds)
        cells += [f"{largest or 'none'}", f"{sent_by(model, ranks, micro_batch) / 1e9:.1f}"]
        table.append((*cells, *(f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}" for rate in rates)))
        where = f"{ranks} GPU" + "s" * (ranks > 1)
        if largest is None:
            advice.append(f"nothing fits on {where}: {way_out(config, ranks)}")
        elif largest < micro_batch:
            advice.append(f"{micro_batch} images do not fit on {where}: use train.micro_batch={largest}")
        if memory.host:
            advice.append(f"in host memory on {where}: {memory.host / GIB:.1f} GiB per GPU")
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    yield from advice
