"""What all benches share: timing work in turns, the rates of this machine, medians, tables, arguments."""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from mclr.kernels.choice import using


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and whose description keeps its line breaks."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())} (`{self.prog} --help` shows the arguments)\n")


def above_0(kind: type) -> Callable[[str], Any]:
    """The type of an argument that is a finite number above 0."""

    def read(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: a finite number above 0 is needed")
        return value

    # argparse names it where the text is no number
    read.__name__ = kind.__name__
    return read


@dataclass
class Turn:
    """Work that takes turns with other work, and its times so far.

    work(i): call number i. kernels: the mode in which it runs (choice.using). A round is `calls` calls, timed together; the first
    `warm_up` rounds do not count. times, host: of every round that counts, the milliseconds per call, on the device and on the host (until
    everything was launched). failed: why it takes no more turns, or empty.
    """

    work: Callable[[int], Any]
    rounds: int
    kernels: str = "auto"
    calls: int = 1
    warm_up: int = 0
    done: int = 0
    times: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    failed: str = ""

    def take(self, device: torch.device) -> None:
        first = self.done * self.calls
        with using(self.kernels):
            ms, host = clocked(lambda i: self.work(first + i), self.calls, device)
        if self.done >= self.warm_up:
            self.times.append(ms)
            self.host.append(host)
        self.done += 1


def take_turns(turns: Mapping[Any, Turn], device: torch.device, after: Callable[[Any], None] = lambda key: None) -> None:
    """Time all work round by round, so that a slow minute of the machine hits everything. after(key) runs after each turn, untimed.

    Work that runs out of memory takes no more turns.
    """
    while left := {key: turn for key, turn in turns.items() if turn.done < turn.warm_up + turn.rounds and not turn.failed}:
        for key, turn in left.items():
            try:
                turn.take(device)
            except torch.OutOfMemoryError as error:
                turn.failed = brief(error)
            after(key)


def clocked(work: Callable[[int], Any], calls: int, device: torch.device) -> tuple[float, float]:
    """Milliseconds per call of work(0), work(1), ...: (until the device is done, until the host has launched everything)."""
    gpu = device.type == "cuda"
    if gpu:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
    began = time.perf_counter()
    for i in range(calls):
        work(i)
    host = 1000 * (time.perf_counter() - began)
    if gpu:
        end.record()
        torch.cuda.synchronize(device)
    return (start.elapsed_time(end) if gpu else host) / calls, host / calls


def rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The rates of this machine in this run: GB/s of a copy (read and written), TFLOP/s of a matrix product."""
    size, side = (1 << 30, 8192) if device.type == "cuda" else (1 << 26, 1024)
    a = torch.zeros(size // dtype.itemsize, dtype=dtype, device=device)
    b, m = torch.zeros_like(a), torch.randn(side, side, device=device).to(dtype)
    work: tuple[Callable[[int], Any], ...] = (lambda i: b.copy_(a), lambda i: m @ m)
    copy, product = (min(clocked(f, 5, device)[0] for _ in range(5)) for f in work)
    return {"copy_gbs": 2 * size / copy / 1e6, "product_tflops": 2 * side**3 / product / 1e9}


def spread(times: Sequence[float]) -> dict[str, float]:
    """ms: the median. p20, p80: the 20th and 80th percentile."""
    p20, p80 = (sorted(times)[round(share * (len(times) - 1))] for share in (0.2, 0.8))
    return {"ms": statistics.median(times), "p20": p20, "p80": p80}


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def number(value: float) -> str:
    """Three significant digits; above 100 a whole number."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def time_cell(row: Mapping[str, Any], mark: str = "") -> str:
    """The times of a row as `ms (p20–p80)`."""
    return f"{number(row['ms'])}{mark} ({number(row['p20'])}–{number(row['p80'])})"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> str:
    """A Markdown table. The first `left` columns are text, the others numbers."""
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
