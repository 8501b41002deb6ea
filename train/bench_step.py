"""`python -m train.bench_step`: what one training step of each objective costs, beside a step of maximum likelihood.

All arms run in one process and take turns, so that a slow minute of the machine hits each of them: read the ratios.
"""

import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch

from configs.schema import load
from mclr.posterior import NoisyPosterior
from train.build import build_networks, build_task, open_source
from train.cli import Parser, run
from train.loop import Progress, add_up, count_compute, forward_flops, rows_of
from train.prepare import open_or_prepare
from train.step import Task, train_step

# arm -> objective preset and settings; of the reference objectives one, since they cost the same
ARMS = {
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
WARM_UP = 2
BANDS = (0.0, 0.15, 0.3, 0.5, 0.8, 1.25, 2.0, 3.5)  # of sigma


def build(model: str, arm: str, overrides: list[str]) -> tuple[Task, int, float]:
    """(task, images per step, learning rate) of one arm."""
    objective, settings = ARMS[arm]
    config = load(model, objective, "digits", "local", [*settings, *overrides])
    open_or_prepare("digits", config.data.path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = config.train.batch
    return build_task(config, open_source(config), build_networks(config, device), device, batch), batch, config.train.lr


def measure(model: str, rounds: int, overrides: list[str]) -> dict[str, dict[str, float]]:
    """Arm -> milliseconds of a step (median, fastest, slowest), and its work in steps of maximum likelihood by FLOPs."""
    arms = {arm: build(model, arm, overrides) for arm in ARMS}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for step in range(WARM_UP + rounds):
        for arm, (task, batch, lr) in arms.items():
            started = time.perf_counter()
            train_step(task, range(step * batch, (step + 1) * batch), batch, lr, lambda: False)
            if task.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[arm].append(time.perf_counter() - started)
    found = {}
    for arm, (task, batch, _) in arms.items():
        times, flops, spent = [1000 * s for s in seconds[arm][WARM_UP:]], forward_flops(task), Progress()
        count_compute(spent, add_up(rows_of(task), task.device), flops)
        found[arm] = {"median": statistics.median(times), "fastest": min(times), "slowest": max(times)}
        found[arm]["work"] = spent.flops / (3 * flops["net"] * batch * (WARM_UP + rounds))
    return found


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


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m train.bench_step", description=__doc__, epilog="example: python -m train.bench_step --rounds 20")
    parser.add_argument("--model", default="edm2-digits,var-digits", help="presets, separated by commas (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="steps of every arm that are timed (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of every arm")
    args = parser.parse_intermixed_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: at least one step must be timed")
    for model in args.model.split(","):
        found = measure(model, args.rounds, args.overrides)
        print(f"**{Path(model).stem}**, {torch.get_num_threads()} threads, {args.rounds} steps of each arm, taking turns\n")
        print("| objective | ms per step (fastest, slowest) | time, mle = 1 | work, mle = 1 |\n| --- | ---: | ---: | ---: |")
        for arm, values in found.items():
            ratio = values["median"] / found["mle"]["median"]
            spread = f"{values['median']:.0f} ({values['fastest']:.0f}, {values['slowest']:.0f})"
            print(f"| {arm} | {spread} | {ratio:.2f} | {values['work']:.2f} |")
        if load(model, "mle", "digits", "local", args.overrides).model.paradigm == "diffusion":
            task, batch, _ = build(model, "mclr posterior", args.overrides)
            print("\n| sigma from | share of samples | of these with a contrast row |\n| --- | ---: | ---: |")
            for low, share, computed in computed_shares(task, batch):
                print(f"| {low:g} | {share:.3f} | {computed:.3f} |")
        print(flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
