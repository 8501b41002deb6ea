"""`python -m train.bench_pair`: a training step on one matched/mismatched pair at full size; VAR's sampling without guidance.

Random weights, images of noise. The plain way to score a pair is fp32 and one forward per condition. All arms run in one process on
one network and take turns, so that a slow minute of the machine hits each of them: read the ratios.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.schema import load
from kernels.weight_norm import force_weights
from mclr.guidance import Guidance
from mclr.likelihood import Draws, Net, Paradigm, Probe, Rows, Scores, score
from mclr.next_scale import NextScale
from mclr.objective import Objective
from mclr.schedule import NONE, Schedule
from models.edm2 import EDM2
from models.vqvae import VQVAE, VQVAEConfig
from train.build import build_net, build_objective, build_paradigm
from train.cli import Parser, run
from train.encoders import RGB, Encoder, Tokens
from train.engine import LocalEngine, autocast_of, make_optimizer

RESOLUTION = {"var-d16": 256, "edm2-img64-s": 64}
CLASSES = 1000
# nothing but the pair: a contrast row for every sample, of all its terms
PAIR = ("objective.contrast=uniform", "objective.schedule.kind=constant", "train.batch=1")
# arm -> bf16 autocast; both rows in one forward
ARMS = {"fp32, two forwards": (False, False), "fp32, one forward": (False, True), "bf16, one forward": (True, True)}
PHASES = ("forward", "backward", "optimizer")
GAMMA = Schedule("ramp", 1.5)


@dataclass(frozen=True)
class FullSize:
    """A network with one sample to train it on."""

    paradigm: Paradigm
    objective: Objective
    engine: LocalEngine
    normalised: list[nn.Parameter]
    probe: Probe
    rows: Rows
    lr: float


def build(model: str, device: torch.device) -> FullSize:
    resolution = RESOLUTION[model]
    data = (f"data.resolution={resolution}", "data.channels=3", f"data.num_classes={CLASSES}")
    config = load(model, "mclr", "digits", "local", [*data, *PAIR])
    torch.manual_seed(0)
    encoder: Encoder = RGB()
    if config.model.paradigm == "next_scale":
        encoder = Tokens(VQVAE(VQVAEConfig()).to(device).eval())
    net = build_net(config, encoder).to(device).train()
    with torch.no_grad():
        for p in net.parameters():
            # gains that start at 0 would cut an untrained EDM2 off from its input and its condition
            if p.ndim == 0:
                p.fill_(1.0)
    train = config.train
    optimizer = make_optimizer(net, train.lr, train.betas, train.eps, train.weight_decay)
    engine = LocalEngine(net, optimizer, config.engine.gradient_clipping, accumulation=1, bf16=False)
    paradigm, objective, draws = build_paradigm(config, encoder), build_objective(config), Draws(0, [0], device)
    image_BCHW = draws.normal(3, resolution, resolution).clamp(-1, 1)
    probe = paradigm.probe(encoder.draw(encoder.encode(image_BCHW), draws), draws)
    rows = objective.rows(probe, torch.tensor([3], device=device), CLASSES, draws, None)
    normalised = net.magnitude_preserving() if isinstance(net, EDM2) else []
    return FullSize(paradigm, objective, engine, normalised, probe, rows, train.lr)


def score_separately(paradigm: Paradigm, net: Net, probe: Probe, rows: Rows) -> Scores:
    """score() by a forward for each row."""
    parts = []
    for index_R, c_R in zip(rows.index_R.split(1), rows.c_R.split(1), strict=True):
        parts.append(paradigm.log_likelihood(paradigm.predict(net, probe, index_R, c_R), probe, index_R))
    return Scores(torch.cat([part.value_RT for part in parts]), torch.cat([part.aux_R for part in parts]))


def train_once(full: FullSize, bf16: bool, paired: bool) -> tuple[dict[str, float], float]:
    """One training step: (seconds of each phase, loss)."""
    engine, net = full.engine, full.engine.net
    engine.autocast = autocast_of(net, bf16)
    clock = [now(net)]
    if paired:
        scores = score(full.paradigm, engine, full.probe, full.rows, CLASSES)
    else:
        scores = score_separately(full.paradigm, engine, full.probe, full.rows)
    loss_B, _ = full.objective(scores, full.rows)
    clock.append(now(net))
    engine.backward(loss_B.mean())
    clock.append(now(net))
    engine.step(full.lr)
    if full.normalised:
        engine.project(full.normalised, force_weights)
    clock.append(now(net))
    return {phase: end - begin for phase, (begin, end) in zip(PHASES, pairwise(clock), strict=True)}, loss_B.mean().item()


@torch.no_grad()
def sample_once(full: FullSize, gamma: Schedule, bf16: bool, images: int) -> tuple[float, Tensor]:
    """The sampler's loop without decoding: (seconds, samples)."""
    net = full.engine.net.eval()
    device = next(net.parameters()).device
    with autocast_of(net, bf16):
        started = now(net)
        x_B = full.paradigm.sample(
            net, torch.arange(images, device=device), Guidance(gamma), Draws(0, list(range(images)), device)
        )
        return now(net) - started, x_B


def now(net: nn.Module) -> float:
    if next(net.parameters()).is_cuda:
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


def measure_training(full: FullSize, rounds: int) -> dict[str, dict[str, float]]:
    """Arm -> median seconds of each phase and of the pair (forward and backward), and the most memory, GiB. One warm-up."""
    seconds: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    memory = dict.fromkeys(ARMS, 0.0)
    for _ in range(1 + rounds):
        for arm, (bf16, paired) in ARMS.items():
            peak_memory(reset=True)
            seconds[arm].append(train_once(full, bf16, paired)[0])
            memory[arm] = max(memory[arm], peak_memory())
    found = {}
    for arm, timed in seconds.items():
        found[arm] = {phase: statistics.median(each[phase] for each in timed[1:]) for phase in PHASES}
        found[arm]["pair"] = statistics.median(each["forward"] + each["backward"] for each in timed[1:])
        found[arm]["memory"] = memory[arm]
    return found


def measure_sampling(full: FullSize, rounds: int, images: int) -> dict[str, tuple[float, float]]:
    """Precision -> median seconds (without guidance, with guidance) of drawing some images. One warm-up."""
    found = {}
    for precision, bf16 in (("fp32", False), ("bf16", True)):
        times = [[sample_once(full, gamma, bf16, images)[0] for gamma in (NONE, GAMMA)] for _ in range(1 + rounds)]
        plain, guided = (statistics.median(column) for column in zip(*times[1:], strict=True))
        found[precision] = (plain, guided)
    return found


def main(argv: list[str] | None = None) -> int:
    example = "example: python -m train.bench_pair --rounds 3"
    parser = Parser("python -m train.bench_pair", description=__doc__, epilog=example)
    parser.add_argument("--model", choices=RESOLUTION, nargs="+", default=list(RESOLUTION), help="(default: both)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="measurements of every arm, after one warm-up (default: %(default)s)"
    )
    parser.add_argument("--images", type=int, default=2, help="drawn at a time (default: %(default)s)")
    args = parser.parse_args(argv)
    if min(args.rounds, args.images) < 1:
        parser.error("--rounds and --images must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for model in args.model:
        full = build(model, device)
        print(f"**{model}**, {torch.get_num_threads()} threads, one pair, medians of {args.rounds}\n")
        print(
            "| arm | forward s | backward s | optimizer s | pair, first row = 1 | peak GiB |\n| --- | ---: | ---: | ---: | ---: | ---: |"
        )
        found = measure_training(full, args.rounds)
        first = next(iter(found.values()))
        for arm, values in found.items():
            phases = " | ".join(f"{values[phase]:.2f}" for phase in PHASES)
            print(f"| {arm} | {phases} | {values['pair'] / first['pair']:.2f} | {values['memory']:.1f} |")
        full.engine.optimizer.zero_grad(set_to_none=True)
        # a guided evaluation of a diffusion model is two of one size, and there are 63 of them: nothing to learn, for many minutes
        if isinstance(full.paradigm, NextScale):
            print(f"\n| sampling {args.images} images | plain s | guided s | plain / guided |\n| --- | ---: | ---: | ---: |")
            for precision, (plain, guided) in measure_sampling(full, args.rounds, args.images).items():
                print(f"| {precision} | {plain:.2f} | {guided:.2f} | {plain / guided:.2f} |")
        print(flush=True)
        del full
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
