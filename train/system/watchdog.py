"""The pulse of a rank: what it is doing, how long it waited for data, and the end of a run in which one has gone silent."""

import os
import sys
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

from mclr.errors import UserError
from mclr.train.system.ranks import PATIENCE

BYTES = 80  # of a pulse, padded: it is overwritten in place


class Watchdog:
    """Writes RUN/pulse/RANK at every change of phase: step, phase and the time, so that any rank, and anybody, can read them.

    waited: seconds spent in phase "data". A thread looks whether this rank has gone on within `timeout` seconds. If not, some rank
    holds up all: one whose process does not live, else the one in the earliest step, else the one that has been silent longest. Its
    step and phase are told in one line by the first of the others (by itself where it is alone), and this process ends with status 1,
    upon which its launcher ends the rest. That a process lives, whatever its main thread waits for, is told by the time of change of
    its file.
    """

    def __init__(self, run: Path, rank: int, ranks: int, timeout: float):
        self.folder, self.rank, self.ranks, self.timeout = run / "pulse", rank, ranks, timeout
        self.step, self.phase, self.since, self.waited = 0, "start", time.monotonic(), 0.0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = os.open(self.folder / f"{rank:05d}", os.O_CREAT | os.O_WRONLY, 0o666)
        except OSError as error:
            raise UserError(f"cannot write {self.folder} ({error.strerror}): make it writable, with room to spare") from error
        self._write()
        self.ended = threading.Event()
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()

    def enter(self, phase: str, step: int | None = None) -> None:
        """From now on this rank does something else, or the same once more."""
        now = time.monotonic()
        self.waited += now - self.since if self.phase == "data" else 0.0
        self.phase, self.since = phase, now
        self.step = self.step if step is None else step
        self._write()

    def close(self) -> None:
        self.enter("ended")
        self.ended.set()
        self.watcher.join()
        os.close(self.file)

    def _write(self) -> None:
        beat = f"{self.step} {self.phase} {datetime.now().astimezone().isoformat(timespec='milliseconds')}"
        # a full disk stops the run where that costs something: at a checkpoint
        with suppress(OSError):
            os.pwrite(self.file, beat.ljust(BYTES - 1).encode() + b"\n", 0)

    def _watch(self) -> None:
        while not self.ended.wait(min(self.timeout / 10, 10)):
            with suppress(OSError):
                os.utime(self.file)
            if not self._silent():
                continue
            others, told = self._blame()
            # one voice; whoever else is alive follows if the launcher does not end it
            if self.rank != others[0] and (self.ended.wait(PATIENCE) or not self._silent()):
                continue
            # not into the line of a progress bar
            tqdm.write(f"error: {told}: the same command goes on from the newest checkpoint", file=sys.stderr)
            sys.stderr.flush()
            # not sys.exit: the main thread waits for somebody and will not hear of it
            os._exit(1)

    def _silent(self) -> bool:
        return time.monotonic() - self.since > self.timeout

    def _blame(self) -> tuple[list[int], str]:
        """(all ranks but the one that holds them up, or it where it is alone; what to say of it)."""
        beats = read_beats(self.folder, self.ranks) or {self.rank: (self.step, self.phase, time.time() - self.timeout)}
        # steps before times: those are of several machines' clocks. Within a step, who waits may have come before who holds up
        silent = min(beats, key=lambda rank: (self._lives(rank), beats[rank][0], beats[rank][2]))
        step, phase, then = beats[silent]
        told = f"rank {silent} has been silent for {time.time() - then:.0f} s, since phase {phase} of step {step}"
        return [rank for rank in beats if rank != silent] or [silent], told

    def _lives(self, rank: int) -> bool:
        try:
            changed = (self.folder / f"{rank:05d}").stat().st_mtime
        except OSError:
            return False
        return time.time() - changed < self.timeout / 2


def read_beats(folder: Path, ranks: int) -> dict[int, tuple[int, str, float]]:
    """Rank -> (step, phase, seconds since 1970 when it entered that), of those whose folder this is."""
    pulses = {}
    for rank in range(ranks):
        # not there yet, or not written yet
        with suppress(OSError, ValueError):
            step, phase, then = (folder / f"{rank:05d}").read_text().split()
            pulses[rank] = (int(step), phase, datetime.fromisoformat(then).timestamp())
    return pulses
