"""`python -m train.bench.step`: measures whole training steps and sampling calls, by objective, precision and arm.

The presets on digits use their bundled weights and real data. Full sizes use random weights and noise, and need no files. An arm is a
way to run the same step:
eager     plain torch
ours      our Triton kernels
compiled  torch.compile (the head of a VAR stays outside)
All rows of a model run in one process and take turns: compare their times.

Times are medians (20th to 80th percentile). Work is in FLOPs; a step of maximum likelihood is 1. rows/s counts rows with and without
gradient. MFU: FLOPs of forwards (1x) and backwards (2x), as torch counts them, over those of a matrix product in the same dtype and run.
Peak memory: of tensors on a GPU, of the process on a CPU; it includes what all rows of the table keep. Sampling runs the sampler's loop
without decoding, on the network of the first objective, sample.batch images at a time; it is not compiled, as in `mclr sample`.
"""

import argparse
import math
from copy import copy
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mclr.configs.schema import RunConfig, load
from mclr.errors import UserError
from mclr.guidance import Guidance
from mclr.kernels.op import DTYPES
from mclr.kernels.timing import Turn, above_0, number, rates, spread, table, take_turns, time_cell
from mclr.likelihood import Draws
from mclr.models.registry import fold
from mclr.models.vqvae import VQVAE, VQVAEConfig
from mclr.schedule import NONE, Schedule
from mclr.train.data.dataset import Batch
from mclr.train.data.encoders import RGB, BareLatents, Encoder, Tokens
from mclr.train.data.source import Source
from mclr.train.engine.base import autocast_of
from mclr.train.system.console import Parser, run
from mclr.train.training.build import Networks, build_networks, build_task, compile_every_length, open_source
from mclr.train.training.compute import add_up, forward_flops, rows_of
from mclr.train.training.networks import build_classifier, build_guide, build_net, build_objective, build_schedule
from mclr.train.training.state import RunState
from mclr.train.training.step import Task, train_step

EXAMPLE = """examples:
  python -m train.bench.step --rounds 20
  python -m train.bench.step train.batch=4 --model var-d16 --arms eager --precision bf16
  python -m train.bench.step sample.steps=18 --model edm2-digits --objective mle "mclr posterior" --sampling"""
DIGITS = ("edm2-digits", "var-digits")
FULL = {"edm2-img64-s": 64, "edm2-img512-l": 512, "var-d16": 256, "var-d30": 256}  # pixels
# objective -> preset and settings. All objectives with a reference cost the same; cca stands for them
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
HEAD = ["objective", "precision", "arm", "ms per step (p20–p80)", "time, first = 1", "work, mle = 1", "rows/s", "images/s", "MFU"]
SAMPLING = ["precision", "arm", "plain images/s", "guided images/s", "time, plain / guided"]

# arm -> mode of the kernels
ARMS = {"eager": "torch", "ours": "triton", "compiled": "torch"}
# (objective, precision, arm) -> the numbers of a row; empty if it ran out of memory
Rows = dict[tuple[str, str, str], dict[str, float]]


class Noise(Source):
    """Gives the same samples at every position. Reading them takes no time, so that only the step is measured."""

    def __init__(self, samples: Batch):
        self.samples = samples

    def batch(self, first: int, count: int) -> Batch:
        """The first `count` samples, at any position."""
        tokens_BL = self.samples.tokens_BL
        return Batch(self.samples.image_BCHW[:count], self.samples.c_B[:count], None if tokens_BL is None else tokens_BL[:count])


def build_noise(config: RunConfig, device: torch.device) -> tuple[Source, Networks]:
    """(train.batch samples of what the network models: images, latents or tokens; networks without a reference).

    The tokenizer has the published number of codes, but is small: nothing is encoded or decoded.
    """
    torch.manual_seed(config.train.seed)
    # draw the weights on the device: on a CPU billions of them take minutes
    with torch.device(device):
        encoder: Encoder
        if config.model.paradigm == "next_scale":
            encoder = Tokens(VQVAE(VQVAEConfig(ch=32, ch_mult=(1,) * 5, num_res_blocks=1)))
        else:
            encoder = BareLatents() if config.model.vae else RGB()
        net = build_net(config, encoder)
        noisy = config.model.paradigm == "diffusion" and build_objective(config).needs_posterior
        classifier = build_classifier(config) if noisy else None
    with torch.no_grad():
        for p in net.parameters():
            # gains start at 0 and would hide input and condition from an untrained EDM2
            if p.ndim == 0:
                p.fill_(1.0)
    draws = Draws(config.train.seed, list(range(config.train.batch)))
    c_B = (config.data.num_classes * draws.uniform()).long()
    if isinstance(encoder, Tokens):
        tokens = encoder.tokenizer.config
        length = sum(side**2 for side in tokens.scales)
        samples = Batch(torch.empty(0), c_B, (tokens.vocab_size * draws.uniform(length)).long())
    else:
        shape = encoder.shape(config.data)
        assert shape is not None
        samples = Batch((256 * draws.uniform(*shape)).to(torch.uint8), c_B)
    guide = build_guide(config, net, "objective")
    return Noise(samples), Networks(encoder, net, classifier, reference=None, generated=None, guide=guide)


def build(model: str, objective: str, overrides: list[str], device: torch.device) -> tuple[Task, RunConfig]:
    """(the training task of one objective in fp32, its settings). Raises UserError if settings do not go together."""
    preset, settings = OBJECTIVES[objective]
    if model in DIGITS:
        # this imports webdataset, which a bare machine with a GPU lacks
        from mclr.train.data.write import open_or_prepare

        config = load(model, preset, "digits", "local", [*settings, *overrides])
        open_or_prepare("digits", config.data.path)
        source, networks = open_source(config), build_networks(config, device)
    else:
        if preset == "cca":
            raise UserError(f"cca compares with trained weights, and {model} has random ones here: choose another --objective")
        ours = [f"data.resolution={FULL[model]}", "data.channels=3", "data.num_classes=1000", "engine.precision=fp32"]
        # pairs alone: a sample without condition has no contrast row
        ours += ["train.drop_condition=0"] * (objective == PAIR)
        ours += ["model.posterior.warmup_images=0"] * model.startswith("edm2")
        config = load(model, preset, "digits", "local", [*ours, *settings, *overrides])
        source, networks = build_noise(config, device)
    return build_task(config, source, networks, device, config.train.batch), config


def as_run_by(task: Task, arm: str, precision: str) -> Task:
    """The same task, on the same weights and optimizer state, as an arm runs it. ARMS holds the mode of its kernels."""

    def copied(engine: Any, compiles: bool = arm == "compiled") -> Any:
        found = copy(engine)
        if engine is not None:
            if compiles:
                found.forward = torch.compile(engine.net)
            found.autocast = autocast_of(engine.net, precision == "bf16")
        return found

    # a run compiles the classifier too, but not the reference
    engine, posterior_engine = copied(task.engine), copied(task.posterior_engine)
    loss = replace(task.loss, posterior=posterior_engine, reference=copied(task.loss.reference, compiles=False))
    return replace(task, loss=loss, engine=engine, posterior_engine=posterior_engine)


def peak_memory(reset: bool = False) -> float:
    """Peak memory in GiB since the last reset: of tensors on a GPU, else of the process. Linux only."""
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
    """The rate of a matrix product in this run."""
    return 1e12 * rates(device, DTYPES[precision])["product_tflops"]


def measure_training(built: dict[str, tuple[Task, RunConfig]], precisions: list[str], arms: list[str], rounds: int) -> Rows:
    """ms, p20, p80 of a step; images and rows per second; work in steps of maximum likelihood; mfu; peak memory in GiB."""
    flops = {objective: forward_flops(task) for objective, (task, _) in built.items()}
    tasks = {key: as_run_by(built[key[0]][0], key[2], key[1]) for key in product(built, precisions, arms)}
    spent, memory = {key: RunState() for key in tasks}, dict.fromkeys(tasks, 0.0)
    device = next(iter(tasks.values())).device

    def step(key: tuple[str, str, str], i: int) -> None:
        train = built[key[0]][1].train
        train_step(tasks[key], range(i * train.batch, (i + 1) * train.batch), train.batch, train.lr, lambda: False)

    turns = {key: Turn(partial(step, key), rounds, ARMS[key[2]], warm_up=WARM_UP) for key in tasks}

    def count(key: tuple[str, str, str]) -> None:
        memory[key] = max(memory[key], peak_memory(reset=True))
        rows = add_up(rows_of(tasks[key]), device)
        if turns[key].failed:
            for engine in filter(None, (tasks[key].engine, tasks[key].posterior_engine)):
                engine.net.zero_grad()
        elif turns[key].times:
            spent[key].count(rows, flops[key[0]])

    peak_memory(reset=True)
    take_turns(turns, device, count)
    found: Rows = {key: {} for key in tasks}
    for key, turn in turns.items():
        if not turn.failed:
            objective, precision, _ = key
            row, batch, rows = spread(turn.times), built[objective][1].train.batch, spent[key].rows + spent[key].rows_no_grad
            per_second, step_flops = 1000 / row["ms"], spent[key].flops / rounds
            row |= {"memory": memory[key], "images": batch * per_second, "rows": rows / rounds * per_second}
            row["work"] = step_flops / (3 * flops[objective]["net"] * batch)
            row["mfu"] = step_flops * per_second / flops_per_second(device, precision)
            found[key] = row
    return found


def training_table(rows: Rows) -> str:
    first = next((row["ms"] for row in rows.values() if row), 0.0)
    lines = []
    for key, row in rows.items():
        cells = ["out of memory", *[""] * 6]
        if row:
            cells = [time_cell(row), f"{row['ms'] / first:.2f}", f"{row['work']:.2f}", number(row["rows"]), number(row["images"])]
            cells += [f"{100 * row['mfu']:.0f} %", f"{row['memory']:.1f}"]
        lines.append([*key, *cells])
    return table([*HEAD, "peak GiB"], lines, left=3)


def draw(task: Task, gamma: Schedule, precision: str, images: int, _: int = 0) -> Tensor:
    """Draw samples in one call of the sampler."""
    net, device = task.engine.net.eval(), task.device
    with autocast_of(net, precision == "bf16"):
        c_B = torch.arange(images, device=device) % task.loss.paradigm.null
        return task.loss.paradigm.sample(net, c_B, Guidance(gamma), Draws(0, list(range(images)), device))


def measure_sampling(
    task: Task, guided: Schedule, precisions: list[str], arms: list[str], rounds: int, images: int
) -> dict[tuple[str, str], tuple[float, float]]:
    """(precision, arm) -> images per second (without guidance, with guidance). The task cannot be trained afterwards."""
    # `mclr sample` folds, too
    fold(task.engine.net)
    turns = {
        (precision, arm, gamma): Turn(partial(draw, task, gamma, precision, images), rounds, ARMS[arm], warm_up=1)
        for precision, arm, gamma in product(precisions, arms, (NONE, guided))
    }
    take_turns(turns, task.device)
    rate = {key: 1000 * images / spread(turn.times)["ms"] if turn.times else math.nan for key, turn in turns.items()}
    return {key: (rate[*key, NONE], rate[*key, guided]) for key in product(precisions, arms)}


def measure_model(model: str, args: argparse.Namespace, device: torch.device) -> None:
    """Print the tables of one model."""
    gpu, digits = device.type == "cuda", model in DIGITS
    precisions = args.precision or (["fp32"] if digits else ["fp32", "bf16"])
    rounds = args.rounds or (20 if digits or gpu else 3)
    few = [] if digits else [f"{key}={32 if gpu else 1}" for key in ("train.batch", "sample.batch")]
    objectives = args.objective or (list(OBJECTIVES) if digits else [PAIR])
    if "compiled" in args.arms:
        torch.compiler.reset()
        compile_every_length()
    built = {objective: build(model, objective, [*few, *args.overrides], device) for objective in objectives}
    task, config = built[objectives[0]]
    batch, machine = config.train.batch, torch.cuda.get_device_name(device) if gpu else f"{torch.get_num_threads()} threads"
    peaks = ", ".join(f"{flops_per_second(device, each) / 1e12:.3g} TFLOP/s in {each}" for each in precisions)
    print(f"**{model}**, {machine}, {batch} samples per step, {rounds} steps of each row; a matrix product reaches {peaks}\n")
    print(training_table(measure_training(built, precisions, args.arms, rounds)))
    arms = [arm for arm in args.arms if arm in ("eager", "ours")]
    if arms and args.sampling:
        # the time does not depend on the weight of guidance
        images, guided = config.sample.batch, build_schedule(config.sample.schedule, 1.5)
        found = measure_sampling(task, guided, precisions, arms, rounds, images)
        lines = [[*key, number(plain), number(both), f"{both / plain:.2f}"] for key, (plain, both) in found.items()]
        print(f"\nSampling {images} at a time:\n\n{table(SAMPLING, lines, left=2)}")
    print(flush=True)


def main(argv: list[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    parser = Parser("python -m train.bench.step", description=__doc__, epilog=EXAMPLE)
    several: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    arms = ["eager", "ours", "compiled"] if gpu else ["eager"]
    objectives = f"of %(choices)s; quote those of several words (default: all; at full size {PAIR})"
    add = parser.add_argument
    add("overrides", nargs="*", metavar="section.key=value", help="settings of every row, as train.batch=8; give them first")
    add("--model", choices=[*DIGITS, *FULL], default=DIGITS, help="of %(choices)s (default: the two on digits)", **several)
    add("--objective", choices=OBJECTIVES, help=objectives, **several)
    add("--arms", choices=ARMS, default=arms, help=f"of %(choices)s (default here: {' '.join(arms)})", **several)
    add("--precision", choices=["fp32", "bf16"], help="of %(choices)s (default: fp32; at full size both)", **several)
    rounds = "steps and samplings of every row (default: 20; at full size on a CPU 3)"
    add("--rounds", type=above_0(int), metavar="N", help=rounds)
    add("--sampling", action="store_true", help="measure the sampler, too")
    args = parser.parse_intermixed_args(argv)
    for override in args.overrides:
        if override.startswith(("engine.kind=", "engine.precision=", "engine.compile=", "engine.kernels=")):
            parser.error(f"{override}: use --arms and --precision in its place (--arms ours: with our kernels)")
    if "ours" in args.arms and not gpu:
        parser.error("--arms ours needs a GPU: on a CPU it would do the same as eager")
    device = torch.device("cuda" if gpu else "cpu")
    for model in args.model:
        try:
            measure_model(model, args, device)
        except torch.OutOfMemoryError as error:
            raise UserError(f"out of GPU memory with {model}: lower train.batch or sample.batch") from error
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
