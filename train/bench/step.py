"""`python -m train.bench.step`: what a whole training step and a whole sampling call cost, by objective, precision and arm.

The digits have their bundled weights and real data; full sizes random weights and noise, no files. An arm is a way to run the same step:
eager     plain torch
ours      our Triton kernels
compiled  torch.compile (the head of a VAR is called from outside of it)
separate  plain torch, the mismatched rows in a forward of their own
All rows of a model run in one process and take turns, so that a slow minute of the machine hits each of them: read the ratios.

Times are medians (20th to 80th percentile, from three rounds on). Work: FLOPs, one step of maximum likelihood being 1. rows/s: with and
without gradient. MFU: FLOPs of forwards (1x) and backwards (2x) as torch counts them, against a matrix
product of the same type and run. Peak memory: of tensors on a GPU, of the process on a CPU, with all that the table's rows keep.
Sampling is the sampler's loop, without decoding, by the first objective's network; `mclr sample` does not compile, nor is it here.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mclr.configs.schema import RunConfig, load
from mclr.errors import UserError
from mclr.guidance import Guidance
from mclr.kernels.bench import reached
from mclr.kernels.choice import using
from mclr.kernels.op import DTYPES
from mclr.likelihood import Draws
from mclr.models.registry import fold
from mclr.posterior import NoisyPosterior
from mclr.schedule import NONE, Schedule
from mclr.train.bench.synthetic import build_noise
from mclr.train.engine.base import autocast_of
from mclr.train.system.console import Parser, run
from mclr.train.training.build import build_networks, build_task, compile_every_length, open_source
from mclr.train.training.networks import build_schedule
from mclr.train.training.state import RunState, add_up, count_compute, forward_flops, rows_of
from mclr.train.training.step import Task, train_step

EXAMPLE = """examples:
  python -m train.bench.step --rounds 20
  python -m train.bench.step --model var-d16 --arms eager separate --precision bf16 --pairs 4
  python -m train.bench.step sample.steps=18 --model edm2-digits --objective mle "mclr posterior" --sampling"""
DIGITS = ("edm2-digits", "var-digits")
FULL = {"edm2-img64-s": 64, "edm2-img512-l": 512, "var-d16": 256, "var-d30": 256}  # pixels
# objective -> preset and settings; of the reference objectives one, since they cost the same
OBJECTIVES = {
    "mle": ("mle", ()),
    "mclr posterior": ("mclr", ("objective.contrast=posterior",)),
    "mclr weighted": ("mclr", ("objective.contrast=weighted",)),
    "mclr null": ("mclr", ("objective.contrast=null",)),
    "mclr uniform": ("mclr", ("objective.contrast=uniform", "objective.schedule.kind=constant")),
    "mclr uniform, progress <= 0.5": (
        "mclr",
        ("objective.contrast=uniform", "objective.schedule.kind=interval", "objective.schedule.high=0.5"),
    ),
    "cca": ("cca", ()),
}
PAIR = "mclr uniform"
WARM_UP = 2
GAMMA = 1.5  # time does not depend on it
BANDS = (0.0, 0.15, 0.3, 0.5, 0.8, 1.25, 2.0, 3.5)  # of sigma

# objective, precision, arm; its columns: none where a GPU's memory was too small
Table = dict[tuple[str, str, str], dict[str, float]]


class Separate(nn.Module):
    """A network that runs the matched rows in one forward and all others in another."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, *inputs: Tensor) -> tuple:
        *shared, c_R, index_R = inputs
        matched = [len(shared[0])]
        parts = zip(c_R.tensor_split(matched), index_R.tensor_split(matched), strict=True)
        answers = [self.net(*shared, c, index) for c, index in parts if len(c)]
        return tuple(torch.cat(each) if isinstance(each[0], Tensor) else each[0] for each in zip(*answers, strict=True))


def itself(net: nn.Module) -> nn.Module:
    return net


# arm -> the word for `using`; what an engine calls in place of the network
ARMS: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "eager": ("torch", itself),
    "ours": ("triton", itself),
    "compiled": ("torch", lambda net: torch.compile(net)),
    "separate": ("torch", Separate),
}


def build(model: str, objective: str, overrides: list[str], device: torch.device) -> tuple[Task, RunConfig]:
    """What one objective trains, in fp32; train.batch samples per step. Raises UserError where settings are at odds."""
    preset, settings = OBJECTIVES[objective]
    if model in DIGITS:
        # its webdataset is not on every machine with a GPU
        from mclr.train.data.write import open_or_prepare

        config = load(model, preset, "digits", "local", [*settings, *overrides])
        open_or_prepare("digits", config.data.path)
        source, networks = open_source(config), build_networks(config, device)
    else:
        if preset == "cca":
            raise UserError(f"cca compares with trained weights, {model} has random ones here: choose another --objective")
        ours = [f"data.resolution={FULL[model]}", "data.channels=3", "data.num_classes=1000", "engine.precision=fp32"]
        # nothing but the pair: a sample that drops its condition would have no contrast row
        ours += ["train.drop_condition=0"] * (objective == PAIR)
        ours += ["model.posterior.warmup_images=0"] * model.startswith("edm2")
        config = load(model, preset, "digits", "local", [*ours, *settings, *overrides])
        source, networks = build_noise(config, device)
    return build_task(config, source, networks, device, config.train.batch), config


def as_run_by(task: Task, arm: str, precision: str) -> Task:
    """The same task, on the same weights and moments; its steps want `using` this arm's kernels."""

    def copied(engine: Any, wrap: Callable[[nn.Module], Any] = itself) -> Any:
        found = copy(engine)
        if engine is not None:
            found.net, found.autocast = wrap(engine.net), autocast_of(engine.net, precision == "bf16")
        return found

    engine = copied(task.engine, ARMS[arm][1])
    # as in a run: the classifier is compiled too, the reference is not
    posterior_engine = copied(task.posterior_engine, ARMS[arm][1] if arm == "compiled" else itself)
    posterior = NoisyPosterior(posterior_engine) if posterior_engine else task.posterior and replace(task.posterior, net=engine)
    engines = {"engine": engine, "posterior_engine": posterior_engine, "reference": copied(task.reference)}
    return replace(task, posterior=posterior, **engines)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(reset: bool = False) -> float:
    """GiB that the process (on a GPU: its tensors) took at most since the last reset. Linux alone."""
    if torch.cuda.is_available():
        found = torch.cuda.max_memory_allocated() / 2**30
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return found
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(line.split()[1]) / 2**20


@cache
def flops_per_second(device: torch.device, precision: str) -> float:
    """Of a matrix product, in this run."""
    return 1e12 * reached(device, DTYPES[precision])["product_tflops"]


def measure_training(built: dict[str, tuple[Task, RunConfig]], precisions: list[str], arms: list[str], rounds: int) -> Table:
    """ms, low, high of a step; images and rows per second; work in steps of maximum likelihood, by FLOPs; mfu; memory in GiB."""
    keys = list(product(built, precisions, arms))
    tasks = {(o, precision, arm): as_run_by(built[o][0], arm, precision) for o, precision, arm in keys}
    flops = {objective: forward_flops(task) for objective, (task, _) in built.items()}
    seconds: dict[tuple, list[float]] = {key: [] for key in keys}
    spent, memory = {key: RunState() for key in keys}, dict.fromkeys(keys, 0.0)
    for step in range(WARM_UP + rounds):
        # a copy: what is out of memory takes no more turns
        for key, task in list(tasks.items()):
            (objective, _, arm), train = key, built[key[0]][1].train
            positions = range(step * train.batch, (step + 1) * train.batch)
            peak_memory(reset=True)
            try:
                with using(ARMS[arm][0]):
                    began = now(task.device)
                    train_step(task, positions, train.batch, train.lr, lambda: False)
                    seconds[key].append(now(task.device) - began)
            except torch.OutOfMemoryError:
                del tasks[key]
                for engine in filter(None, (task.engine, task.posterior_engine)):
                    engine.net.zero_grad()
            memory[key] = max(memory[key], peak_memory())
            rows = add_up(rows_of(task), task.device)
            if step >= WARM_UP:
                count_compute(spent[key], rows, flops[objective])
    table: Table = {key: {} for key in keys}
    for key, task in tasks.items():
        objective, precision, _ = key
        times = sorted(1000 * each for each in seconds[key][WARM_UP:])
        ms = statistics.median(times)
        step_flops, batch = spent[key].flops / rounds, built[objective][1].train.batch
        table[key] = {"ms": ms, "images": 1000 * batch / ms, "memory": memory[key]}
        if rounds >= 3:
            table[key] |= {"low": times[round(0.2 * (rounds - 1))], "high": times[round(0.8 * (rounds - 1))]}
        table[key]["rows"] = 1000 * (spent[key].rows + spent[key].rows_no_grad) / rounds / ms
        table[key]["work"] = step_flops / (3 * flops[objective]["net"] * batch)
        table[key]["mfu"] = step_flops / (ms / 1000) / flops_per_second(task.device, precision)
    return table


def training_table(table: Table) -> str:
    heads = ["ms per step (p20–p80)", "time, first = 1", "work, mle = 1", "rows/s", "images/s", "MFU", "peak GiB"]
    lines = [f"| objective | precision | arm | {' | '.join(heads)} |", "| --- | --- | --- " + "| ---: " * len(heads) + "|"]
    first = next((row["ms"] for row in table.values() if row), 0.0)
    for key, row in table.items():
        cells = ["out of memory", *[""] * (len(heads) - 1)]
        if row:
            spread = f" ({row['low']:,.0f}–{row['high']:,.0f})" if "low" in row else ""
            cells = [f"{row['ms']:,.0f}{spread}", f"{row['ms'] / first:.2f}", f"{row['work']:.2f}"]
            cells += [per_second(row["rows"]), per_second(row["images"]), f"{100 * row['mfu']:.0f} %", f"{row['memory']:.1f}"]
        lines.append(f"| {' | '.join([*key, *cells])} |")
    return "\n".join(lines)


def per_second(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


@torch.no_grad()
def computed_shares(task: Task, batch: int, batches: int = 20) -> list[tuple[float, float, float]]:
    """(lowest sigma, share of all samples, share of these whose contrast row is computed) of each band of noise levels.

    task: of diffusion with the contrast `posterior`, whose draw is mostly the condition itself where the image is still clear.
    """
    seen = []
    for first in range(0, batches * batch, batch):
        x_P, c_P, true_c_P, draws = task.samples(first, batch)
        probe = task.paradigm.probe(x_P, draws)
        assert isinstance(task.posterior, NoisyPosterior)
        rows = task.objective.rows(probe, c_P, task.null, draws, task.posterior(probe, true_c_P)[0])
        computed_B = rows.contrast_BT[:, 0] != rows.index_R[: len(c_P)]
        seen.append(torch.stack([probe.inputs["sigma"], computed_B.float()]))
    sigma, computed = torch.cat(seen, 1)
    edges = [*BANDS, float("inf")]
    bands = [(low, (sigma >= low) & (sigma < high)) for low, high in pairwise(edges)]
    return [(low, band.float().mean().item(), computed[band].mean().item()) for low, band in bands if band.any()]


def draw(task: Task, gamma: Schedule, precision: str, arm: str, images: int) -> tuple[float, Tensor]:
    """(seconds, samples) of one call of the sampler."""
    net, device = task.engine.net.eval(), task.device
    draws = Draws(0, list(range(images)), device)
    with using(ARMS[arm][0]), autocast_of(net, precision == "bf16"):
        began = now(device)
        x_B = task.paradigm.sample(net, torch.arange(images, device=device) % task.null, Guidance(gamma), draws)
        return now(device) - began, x_B


def measure_sampling(
    task: Task, guided: Schedule, precisions: list[str], arms: list[str], rounds: int, images: int
) -> dict[tuple[str, str], tuple[float, float]]:
    """Precision and arm -> median seconds (without guidance, with guidance) of drawing some images. One warm-up. No training after it."""
    # as `mclr sample` does
    fold(task.engine.net)
    turns: dict[tuple, list[float]] = {key: [] for key in product(precisions, arms, (NONE, guided))}
    for _ in range(1 + rounds):
        for (precision, arm, gamma), seconds in turns.items():
            seconds.append(draw(task, gamma, precision, arm, images)[0])
    medians = {key: statistics.median(seconds[1:]) for key, seconds in turns.items()}
    return {key: (medians[*key, NONE], medians[*key, guided]) for key in product(precisions, arms)}


def measure_model(model: str, args: argparse.Namespace, device: torch.device) -> None:
    """Print the tables of one model."""
    gpu, digits = device.type == "cuda", model in DIGITS
    precisions = args.precision or (["fp32"] if digits else ["fp32", "bf16"])
    rounds = args.rounds or (20 if digits or gpu else 3)
    overrides = [*([] if digits else [f"train.batch={32 if gpu else 1}"]), *args.overrides]
    overrides += [f"train.batch={args.pairs}"] if args.pairs else []
    objectives = args.objective or (list(OBJECTIVES) if digits else [PAIR])
    if "compiled" in args.arms:
        torch.compiler.reset()
        compile_every_length()
    built = {objective: build(model, objective, overrides, device) for objective in objectives}
    task, config = built[objectives[0]]
    batch, machine = config.train.batch, torch.cuda.get_device_name(device) if gpu else f"{torch.get_num_threads()} threads"
    peaks = ", ".join(f"{flops_per_second(device, each) / 1e12:.3g} TFLOP/s in {each}" for each in precisions)
    print(f"**{model}**, {machine}, {batch} samples per step, {rounds} steps of each row; a matrix product reaches {peaks}\n")
    print(training_table(measure_training(built, precisions, args.arms, rounds)))
    if digits and "mclr posterior" in built and config.model.paradigm == "diffusion":
        print("\nWhere the posterior contrast computes a row:\n")
        print("| sigma from | share of samples | of these with a contrast row |\n| --- | ---: | ---: |")
        for low, share, computed in computed_shares(build(model, "mclr posterior", overrides, device)[0], batch):
            print(f"| {low:g} | {share:.3f} | {computed:.3f} |")
    arms = [arm for arm in args.arms if arm in ("eager", "ours")]
    if arms and (args.sampling or config.model.paradigm == "next_scale"):
        images, guided = args.images or batch, build_schedule(config.sample.schedule, GAMMA)
        print(f"\nSampling {images} at a time:\n\n| precision | arm | plain images/s | guided images/s | time, plain / guided |")
        print("| --- | --- | ---: | ---: | ---: |")
        for key, (plain, other) in measure_sampling(task, guided, precisions, arms, rounds, images).items():
            print(f"| {' | '.join(key)} | {per_second(images / plain)} | {per_second(images / other)} | {plain / other:.2f} |")
    print(flush=True)


def arguments(argv: list[str] | None, gpu: bool) -> argparse.Namespace:
    parser = Parser("python -m train.bench.step", description=__doc__, epilog=EXAMPLE)
    several: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    arms = ["eager", "ours", "compiled"] if gpu else ["eager"]
    add = parser.add_argument
    add("overrides", nargs="*", metavar="section.key=value", help="settings of every row; give them first")
    add("--model", choices=[*DIGITS, *FULL], default=DIGITS, help="of %(choices)s (default: the two on digits)", **several)
    add(
        "--objective",
        choices=OBJECTIVES,
        help=f"of %(choices)s; quote those of several words (default: all; at full size {PAIR})",
        **several,
    )
    add("--arms", choices=ARMS, default=arms, help=f"of %(choices)s (default here: {' '.join(arms)})", **several)
    add("--precision", choices=["fp32", "bf16"], help="of %(choices)s (default: fp32; at full size both)", **several)
    add("--pairs", type=int, help="samples per step (default: train.batch; at full size 1, on a GPU 32)")
    add("--rounds", type=int, help="steps and samplings of every row that are timed (default: 20; at full size on a CPU 3)")
    add("--images", type=int, help="drawn at a time (default: as many as samples per step)")
    add("--sampling", action="store_true", help="measure sampling of diffusion models too, which takes long")
    args = parser.parse_intermixed_args(argv)
    for name in ("pairs", "rounds", "images"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} {value}: at least 1")
    for override in args.overrides:
        if override.startswith(("engine.kind=", "engine.precision=", "engine.compile=", "engine.kernels=")):
            parser.error(f"{override}: --arms and --precision say how a step is run (--arms ours runs our kernels)")
    if "ours" in args.arms and not gpu:
        args.arms = [arm for arm in args.arms if arm != "ours"]
        if not args.arms:
            parser.error("--arms ours needs a GPU: on a CPU it would run what eager does")
        print("ours is left out: on a CPU it would run what eager does\n")
    return args


def main(argv: list[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    args, device = arguments(argv, gpu), torch.device("cuda" if gpu else "cpu")
    for model in args.model:
        try:
            measure_model(model, args, device)
        except torch.OutOfMemoryError as error:
            raise UserError(f"out of GPU memory with {model}: lower --pairs or --images") from error
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
