"""`mclr train --plan`: what a run needs on 1 to 1,024 GPUs. Nothing is allocated or written: networks and rows are fake tensors
(train/planning/footprint.py).

P parameters, N ranks, a micro-batches per step. Weights, gradients, moments and averages are fp32; bytes on one GPU:

| what      | local, ZeRO 0 | ZeRO 1         | ZeRO 2         | ZeRO 3                      |
| ---       | ---           | ---            | ---            | ---                         |
| weights   | 4P            | 4P             | 4P             | 4P/N                        |
| gathered  |               |                |                | 4m + 4 min(P, b + block)    |
| gradients | 4P            | 4p, a > 1: 4P  | 4p, a > 1: 8p  | 4P/N                        |
| optimizer | 8P            | 12P/N          | 12P/N          | 12P/N                       |
| buckets   | N > 1: 4f     | 8b             | 8b             | 8b                          |
| sent      | 8P            | 12P            | (8a + 4) P     | 4aP (1 + forwards) + 4aP'   |

optimizer: two moments; with ZeRO also fp32 masters. p: elements of all weights of which a rank holds a part; for the rank with most.
buckets: DeepSpeed's, b = min(P, 1e8) elements (train/engine/zero.py), and a flattened copy; without ZeRO one of f = min(P, 5e8).
gathered: DeepSpeed fetches up to b elements ahead, beside the largest block. The message that brought them, m = max(b, block), is
freed when its last part is used. This is a bound: 70 to 100 % of it were measured on 2 ranks. sent: per step, in rings, times
(N - 1)/N. P' = P - b: backward gathers again all but the b elements left from forward; P' = P where the step has a forward without
gradient. Averages: 4P/N each. Reference: whole, with linear layers in 2 bytes under bf16; or sharded like the weights of ZeRO 3; or another
network as guide, 4 bytes per parameter, whose FLOPs are taken for those of the network.
Classifier of the posterior: 16 bytes per parameter, at every stage. offload: the optimizer and its gradients are in host memory.
tests/planning/test_plan.py compares weights, gathered, gradients, optimizer, averages and bytes sent with those of a step.

Activations: as footprint.py counts them, or the gradients that ZeRO 1 and 2 flatten for AdamW, 4P/N, where those are more. MARGIN is
kept free for what is not counted: tokenizer or VAE (0.4 GiB), workspaces of libraries, fragments.

Time of a step = FLOPs / (peak x MFU) + sent / (REACHED x link), without overlap. MFU, REACHED and NETWORK are assumptions. A row costs
3 forwards with gradient (4 with activation checkpointing) and 1 without. Encoding of images is not in the table, since
`mclr prepare cache` does it once; a line above the table says what a VAE would add.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator

import torch

from mclr.configs.schema import DiffusionModel, RunConfig
from mclr.errors import UserError
from mclr.models.options import SCALES_256, SCALES_512, VQVAEConfig
from mclr.models.vqvae import VQVAE
from mclr.train.data.encoders import RGB, BareLatents, Encoder, Tokens
from mclr.train.engine.zero import bucket_of
from mclr.train.planning.footprint import Model
from mclr.train.system.gpus import GPU, GPUS, NODE, gpu_named
from mclr.train.training.build import is_sharded
from mclr.train.training.launch import rank_shares
from mclr.train.training.networks import build_encoder

COUNTS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)  # of GPUs, where none is asked for
MOST = 1024
GIB = 2**30
MARGIN = 0.05  # share of a GPU's memory, for what is not counted
MFU = 0.4
REACHED = 0.8  # of a link's bandwidth
NETWORK = 200e9  # bytes per second between machines of NODE GPUs; the rings of NCCL use all network cards
VAE_FLOPS = 1.1e12 / 512**2  # of the encoder of Stable Diffusion's VAE, per pixel, in fp32
IMAGENET = {"channels": 3, "num_classes": 1000}
# first letters of the presets of published networks -> pixels and scales of the data that they were trained on
PUBLISHED = {
    "edm2-img64": (64, None),
    "edm2-img512": (512, None),
    "var-d36-s": (512, SCALES_512),
    **dict.fromkeys(("dit-xl-2-512", "sit-xl-2-512"), (512, None)),
    **dict.fromkeys(("dit-", "sit-"), (256, None)),
    **dict.fromkeys(("var-d16", "var-d20", "var-d24", "var-d30"), (256, SCALES_256)),
}


def published_scale(model: str) -> tuple[int, tuple[int, ...] | None] | None:
    """(pixels, scales of the tokens) of the ImageNet that a preset's published network was trained on; None for other presets."""
    return next((made_for for start, made_for in PUBLISHED.items() if model.startswith(start)), None)


def published_data(model: str, data: str) -> list[str]:
    """Overrides that describe the data of a published network, where no data was given."""
    found = published_scale(model) if data == "digits" else None
    return [f"data.{k}={v}" for k, v in {"name": "imagenet", "resolution": found[0], **IMAGENET}.items()] if found else []


def encoder_of(config: RunConfig) -> Encoder:
    """The encoder of a run, without loading a VAE; nor a tokenizer, where the data is that of a published network."""
    if isinstance(config.model, DiffusionModel):
        return BareLatents() if config.model.vae else RGB()
    published = published_scale(config.model.name)
    if published and published[1] and config.data.resolution == published[0] and config.data.channels == IMAGENET["channels"]:
        return Tokens(VQVAE(VQVAEConfig(ch=32, ch_mult=(1,) * 5, num_res_blocks=1, scales=published[1])))
    return build_encoder(config, torch.device("cpu"))


def largest_share(groups: tuple[tuple[int, ...], ...], ranks: int) -> int:
    """Elements of all weights of which a rank holds a part at ZeRO 1 and 2, for the rank with most.

    DeepSpeed divides the elements of a group in order.
    """
    totals = [0] * ranks
    for sizes in groups:
        part, first = math.ceil(sum(sizes) / ranks), 0
        for size in sizes:
            for rank in range(first // part, (first + size - 1) // part + 1):
                totals[rank] += size
            first += size
    return max(totals)


def memory_of(model: Model, ranks: int, micro_batch: int) -> dict[str, float]:
    """Part -> bytes on one of so many GPUs, by the table above."""
    train, zero, P, share = model.config.train, model.config.engine.zero, model.count, 1 / ranks
    accumulates = train.batch // ranks > micro_batch
    bucket = bucket_of(P)
    touched = 4 * largest_share(model.groups, ranks)
    # gradients of the last micro-batch go straight into a bucket
    gradients = (4 * P, 4 * P if accumulates else touched, touched * (2 if accumulates else 1), 4 * P * share)[zero]
    # ZeRO 1 and 2 flatten the gradients for AdamW
    optimizer, stepping = (12 * P * share if zero else 8 * P), (4 * P * share if zero in (1, 2) else 0)
    if model.config.engine.offload:
        # gradients left on the GPU: at ZeRO 1 those that accumulate, else none
        gradients, optimizer, stepping = (4 * P if zero == 1 and accumulates else 0), 0, 0
    flat = 4 * min(P, 500_000_000) if ranks > 1 else 0
    averages = {train.ema_std, *(train.snapshot_stds if train.snapshot_every else ())} - {0.0}
    gathered = 4 * (max(bucket, model.block) + min(P, bucket + model.block))
    reference = 4 * P * share + gathered if sharded(model, ranks) else model.reference
    return {
        "weights": 4 * P * (share if zero == 3 else 1) + model.buffers,
        "gathered": gathered if zero == 3 and ranks > 1 else 0,
        "gradients": gradients,
        "optimizer": optimizer,
        "averages": len(averages) * 4 * P * share,
        "reference": reference if model.objective.needs_reference else model.guide,
        "classifier": 16 * model.posterior,
        "buckets": 8 * bucket if zero else flat,
        "activations": max(model.activations(micro_batch, zero == 3), stepping),
    }


def sent_by(model: Model, ranks: int, micro_batch: int) -> float:
    """Bytes that a rank sends per step, in rings: an all-reduce sends a tensor twice, all-gather and reduce-scatter once."""
    config, P = model.config, model.count
    zero, steps = config.engine.zero, config.train.batch // ranks // micro_batch
    calls = model.calls(zero == 3)
    # with two kinds of forwards DeepSpeed, which learns the order of one, fetches nothing ahead and keeps nothing
    again = P if calls.free else P - bucket_of(P)
    sent = {0: 2 * P, 1: 3 * P, 2: (2 * steps + 1) * P, 3: steps * (P * (1 + len(calls.grad + calls.free)) + again)}[zero]
    if sharded(model, ranks):
        sent += steps * len(calls.reference) * P
    return 4 * (sent + 2 * model.posterior) * (ranks - 1) / ranks


def sharded(model: Model, ranks: int) -> bool:
    """Whether the ranks divide the reference."""
    return model.objective.needs_reference and is_sharded(model.config.engine.reference, model.count, ranks)


def rows_of(model: Model) -> tuple[float, float]:
    """The most rows per image, (with, without) gradient."""
    calls = model.calls(model.config.engine.zero == 3)
    return calls.samples * model.share_of(calls.grad), calls.samples * model.share_of(calls.free + calls.reference)


def flops_per_image(model: Model) -> float:
    """The most FLOPs that one image costs, without its encoding."""
    rows, free = rows_of(model)
    with_gradient = 4 if model.config.engine.activation_checkpointing else 3
    return (with_gradient * rows + free) * model.flops + 3 * model.classifier_flops


def seconds_per_step(model: Model, ranks: int, micro_batch: int, gpu: GPU) -> float:
    """Seconds of one step, without encoding."""
    flops = model.config.train.batch / ranks * flops_per_image(model)
    link = gpu.link if ranks <= NODE else min(gpu.link, NETWORK)
    return flops / (gpu.peak(model.config.engine.precision) * MFU) + sent_by(model, ranks, micro_batch) / (link * REACHED)


def largest_that_fits(model: Model, ranks: int, memory: float) -> int | None:
    """The largest micro-batch whose bytes are no more than `memory`; None where not even the smallest fits."""

    def without_gradients(micro_batch: int) -> float:
        parts = memory_of(model, ranks, micro_batch)
        return sum(parts.values()) - parts["gradients"]

    sizes = rank_shares(model.config, ranks)
    # only the gradients may shrink where a micro-batch grows
    sizes = sizes[: bisect_right(sizes, memory, key=without_gradients)]
    return next((n for n in reversed(sizes) if sum(memory_of(model, ranks, n).values()) <= memory), None)


def way_out(config: RunConfig, ranks: int) -> str:
    """Advice for a run that fits with no micro-batch."""
    engine = config.engine
    ways = [] if engine.activation_checkpointing else ["engine.activation_checkpointing=true"]
    ways += ["--engine zero3"] if ranks > 1 and engine.zero < 3 else []
    ways += ["engine.offload=true"] if engine.zero and not engine.offload else []
    return "use " + " or ".join(ways or ["more GPUs, or larger ones"])


HEAD = (
    *("GPUs", "images", "weights", "gathered", "gradients", "optimizer", "averages", "reference", "classifier", "buckets"),
    *("activations", "total", "most images", "GB sent", "s/step", "images/s", "rows/s"),
)


def heading(model: Model, name: str) -> Iterator[str]:
    config, gpu, (rows, free) = model.config, GPUS[name], rows_of(model)
    data, engine = config.data, config.engine
    ways = [f"ZeRO {engine.zero}", engine.precision]
    ways += [way.replace("_", " ") for way in ("offload", "activation_checkpointing") if getattr(engine, way)]
    yield f"plan       {config.model.name}, {model.count / 1e6:.2f}M parameters"
    yield f"objective  {config.objective.name}, contrast {model.objective.contrast}"
    yield f"data       {data.name}: {data.num_classes} classes, {data.channels} x {data.resolution}^2"
    yield f"engine     {', '.join(ways)}, on {name}: {gpu.memory:g} GiB each, of which {1 - MARGIN:.0%} are planned with"
    yield f"rows       at most {rows:g} with gradient and {free:g} without per image, {flops_per_image(model) / 1e12:.3g} TFLOP"
    yield (
        f"assumed    MFU {MFU:g}, links at {REACHED:.0%} ({gpu.link / 1e9:g} GB/s; {NETWORK / 1e9:g} between machines of {NODE}), "
        "nothing overlapped"
    )
    if isinstance(config.model, DiffusionModel) and config.model.vae:
        seconds = VAE_FLOPS * data.resolution**2 / (gpu.fp32 * MFU)
        yield f"encoding   not in the table: once by `mclr prepare cache`, else {1000 * seconds:.3g} ms of a GPU per image and visit"
    yield "GiB per GPU; images: per forward of one GPU; most images: as many as fit"


def line_of(model: Model, ranks: int, gpu: GPU) -> tuple[list[str], list[str]]:
    """(one line of the table, in the order of HEAD; advice for so many GPUs)."""
    config, batch = model.config, model.config.train.batch
    micro_batch = max(d for d in rank_shares(config, ranks) if d <= (config.train.micro_batch or batch))
    parts = memory_of(model, ranks, micro_batch).values()
    largest = largest_that_fits(model, ranks, gpu.memory * (1 - MARGIN) * GIB)
    seconds = seconds_per_step(model, ranks, micro_batch, gpu)
    line = [f"{ranks}", f"{micro_batch}", *(f"{part / GIB:.2f}" for part in (*parts, sum(parts)))]
    line += [f"{largest or 'none'}", f"{sent_by(model, ranks, micro_batch) / 1e9:.1f}"]
    for rate in (seconds, batch / seconds, batch * sum(rows_of(model)) / seconds):
        line.append(f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}")
    where, advice = f"{ranks} GPU" + "s" * (ranks > 1), []
    if largest is None:
        advice.append(f"nothing fits on {where}: {way_out(config, ranks)}")
    elif largest < micro_batch:
        advice.append(f"{micro_batch} images do not fit on {where}: use train.micro_batch={largest}")
    if config.engine.offload:
        # masters, moments and gradients
        advice.append(f"in host memory on {where}: {16 * model.count / ranks / GIB:.1f} GiB per GPU")
    return line, advice


def plan(config: RunConfig, gpus: int | None, gpu: str | None) -> Iterator[str]:
    """The lines of a plan. gpus: how many; None: a table over COUNTS. gpu: a key of GPUS; None: this machine's, else h100.

    Raises UserError for an unknown GPU, and for a number of GPUs that cannot share the batch.
    """
    here = gpu_named(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    name = (gpu or here or "h100").lower()
    if name not in GPUS:
        raise UserError(f"unknown GPU {gpu}: give one of {', '.join(GPUS)}")
    # without a number, those of COUNTS that can share the batch
    counts = [n for n in COUNTS if config.train.batch % n == 0 and (n == 1 or config.engine.kind != "local")]
    if gpus is not None:
        if not 1 <= gpus <= MOST:
            raise UserError(f"--gpus {gpus}: must be 1 to {MOST}")
        rank_shares(config, gpus)
        counts = [gpus]
    model = Model(config, encoder_of(config))
    yield from heading(model, name)
    found = [line_of(model, ranks, GPUS[name]) for ranks in counts]
    table = [HEAD, *(line for line, _ in found)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    for _, advice in found:
        yield from advice
