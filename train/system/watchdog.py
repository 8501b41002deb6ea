"""The watchdog records what each rank is doing, and ends a run in which a rank makes no more progress."""

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

BYTES = 80  # length of a beat: it is padded, because the next one overwrites it
Beats = dict[int, tuple[int, str, float]]  # of each rank: step, phase, seconds since 1970 of its last beat


class Watchdog:
    """Writes step, phase and time to RUN/watchdog/RANK whenever this rank begins something, for all ranks and users to read.

    waited: seconds spent in phase "data". After `timeout` seconds without progress of this rank, a thread picks the culprit among the
    ranks that made none in the last half of that time: a dead process, else the rank with the lowest step, else the one silent longest.
    The lowest other of them (a single rank itself) prints the culprit and exits with status 1; then the launcher ends the job. The
    thread also updates the file's time of change, by which other ranks see that this process lives.
    """

    def __init__(self, run: Path, rank: int, ranks: int, timeout: float):
        self.folder, self.rank, self.ranks, self.timeout = run / "watchdog", rank, ranks, timeout
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
        """This rank begins a phase, or makes progress in it."""
        now = time.monotonic()
        self.waited += now - self.since if self.phase == "data" else 0.0
        self.phase, self.since = phase, now
        self.step = self.step if step is None else step
        self._write()

    def beat(self) -> None:
        """This rank makes progress in its phase."""
        self.enter(self.phase)

    def close(self) -> None:
        self.enter("ended")
        self.ended.set()
        self.watcher.join()
        os.close(self.file)

    def _write(self) -> None:
        beat = f"{self.step} {self.phase} {datetime.now().astimezone().isoformat(timespec='milliseconds')}"
        # a full disk need not stop the run here: the next checkpoint reports it
        with suppress(OSError):
            os.pwrite(self.file, beat.ljust(BYTES - 1).encode() + b"\n", 0)

    def _watch(self) -> None:
        halfway: Beats = {}
        while not self.ended.wait(min(self.timeout / 10, 10)):
            with suppress(OSError):
                os.utime(self.file)
            silent = time.monotonic() - self.since
            halfway = (halfway or read_beats(self.folder, self.ranks)) if silent > self.timeout / 2 else {}
            if silent <= self.timeout:
                continue
            others, blame = self._blame(halfway)
            # the others wait for the launcher to end them, then print the same
            if self.rank != others[0] and (self.ended.wait(PATIENCE) or time.monotonic() - self.since <= self.timeout):
                continue
            # by tqdm, which keeps it apart from a progress bar
            tqdm.write(f"error: {blame}: the same command goes on from the newest checkpoint", file=sys.stderr)
            sys.stderr.flush()
            # sys.exit would end this thread only
            os._exit(1)

    def _blame(self, halfway: Beats) -> tuple[list[int], str]:
        """(all silent ranks but the culprit, or the culprit if it is alone; the message about it). halfway: the beats of a while ago."""
        silence = time.monotonic() - self.since
        beats = {rank: beat for rank, beat in read_beats(self.folder, self.ranks).items() if halfway.get(rank, beat) == beat}
        beats |= {self.rank: (self.step, self.phase, time.time() - silence)}
        # steps before times, because clocks of machines differ
        culprit = min(beats, key=lambda rank: (self._lives(rank), beats[rank][0], beats[rank][2]))
        step, phase, then = beats[culprit]
        blame = f"rank {culprit} has been silent for {time.time() - then:.0f} s, since phase {phase} of step {step}"
        return sorted(beats.keys() - {culprit}) or [culprit], blame

    def _lives(self, rank: int) -> bool:
        try:
            changed = (self.folder / f"{rank:05d}").stat().st_mtime
        except OSError:
            return False
        return time.time() - changed < self.timeout / 2


def read_beats(folder: Path, ranks: int) -> Beats:
    """The last beats of the ranks whose file can be read."""
    beats = {}
    for rank in range(ranks):
        # the file may not be there yet, or still be empty
        with suppress(OSError, ValueError):
            step, phase, then = (folder / f"{rank:05d}").read_text().split()
            beats[rank] = (int(step), phase, datetime.fromisoformat(then).timestamp())
    return beats
