"""Training samples streamed from shards outside of a dataset folder: URLs and commands in webdataset's notation.

Shards are tar files of KEY.jpg (or another image) and KEY.cls (or .json: data.label), as webdataset's ImageNet has them. Images of any
size are cropped and resized as `mclr prepare images` does it. A key ends at the first dot of a file's name. A sample's files follow each
other. Each reader of each rank draws shards with replacement, so any number of shards serves any number of readers. Samples have no fixed
positions: after each start they come in another order. C H W image.
"""

import errno
import io
import os
import random
import select
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, Queue
from subprocess import TimeoutExpired
from threading import Event, Thread
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from webdataset import ResampledShards, shuffle
from webdataset.gopen import Pipe, gopen
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys, tar_file_expander

from mclr.configs.schema import Data, DatasetInfo, Images
from mclr.errors import UserError
from mclr.train.data.dataset import READERS, Batch
from mclr.train.data.images import center_crop, decode
from mclr.train.data.shards import Damaged, image_kind, label_of
from mclr.train.data.source import Source
from mclr.train.system.ranks import world

SHUFFLED = 500  # samples among which a reader draws the next
READY = 32  # images that a reader holds decoded
TRIES = 6  # of a shard that cannot be read
PAUSE = 2.0  # seconds before the second try, doubled for each further one: a minute in all
STALLED = 60.0  # a command is ended, as a failed try, after so many seconds without a byte
PATIENCE = 300.0  # the stream has failed after so many seconds without an image
PARTING = 5.0  # seconds that the readers of a closed stream have to end
FEW = 10  # damaged samples that are always tolerated: of few samples their share says nothing
REMEMBERED = 2**16  # positions whose keys are kept
# exit statuses of a command whose pipe we closed early: -SIGPIPE, the shell's 141, curl's 23
UNREAD = (-13, 141, 23)


class Drawn(NamedTuple):
    """One sample: "URL:KEY", image uint8 [C, H, W] or why there is none, condition."""

    key: str
    image: np.ndarray | Damaged
    c: int


class Output(io.FileIO):
    """What a command prints. Raises TimeoutError where nothing comes for STALLED seconds."""

    def readinto(self, buffer: Any) -> int | None:
        poll = select.poll()
        poll.register(self, select.POLLIN)
        if not poll.poll(1000 * STALLED):
            raise TimeoutError(errno.ETIMEDOUT, f"nothing came for {STALLED:.0f} s")
        return super().readinto(buffer)


class Reader(Thread):
    """Draws shards at random, with replacement, and puts their decoded samples into `ready`. An error goes there too, and ends it.

    url: of the shard that it reads now; command: what gives its bytes, None for a file.
    """

    def __init__(self, data: Data, urls: list[str], seed: str):
        super().__init__(daemon=True)
        self.data, self.urls, self.seed = data, urls, seed
        self.ready: Queue[Drawn | Exception] = Queue(READY)
        self.closed, self.url = Event(), ""
        self.command: Pipe | None = None

    def run(self) -> None:
        try:
            for sample in shuffle(SHUFFLED, rng=random.Random(self.seed))(self._samples()):
                # else up to SHUFFLED more samples would come
                if self.closed.is_set():
                    return
                self.ready.put(self._decode(sample))
        except Exception as error:
            self.ready.put(error)

    def close(self) -> None:
        """Tell the thread to end, and end its command."""
        self.closed.set()
        end(self.command)

    def _samples(self) -> Iterator[dict[str, Any]]:
        """An endless stream of samples, shard after shard: the files of each by kind."""
        number = random.Random(self.seed).getrandbits(31)
        for drawn in ResampledShards(self.urls, deterministic=True, worker_seed=lambda: number):
            yield from self._shard(drawn["url"])
            if self.closed.is_set():
                return

    def _decode(self, sample: dict[str, Any]) -> Drawn:
        """The sample, decoded or Damaged. Raises UserError where its condition is out of range."""
        key, size = f"{sample['__url__']}:{sample['__key__']}", self.data.resolution
        try:
            c, kind = label_of(sample, self.data.label), image_kind(sample)
            image = center_crop(decode(sample[kind], f".{kind}", self.data.channels)[0], size)
        # decoders raise nearly anything on damaged bytes
        except Exception as error:
            return Drawn(key, Damaged(f"sample {key} is damaged ({error}): see how its shard was written"), -1)
        if not 0 <= c < self.data.num_classes:
            known = f"0..{self.data.num_classes - 1}"
            raise UserError(f"sample {key} has condition {c}, outside of {known}: correct data.num_classes")
        return Drawn(key, np.asarray(image).reshape(size, size, -1).transpose(2, 0, 1), c)

    def _shard(self, url: str) -> Iterator[dict[str, Any]]:
        """The samples of a tar file in order. After an error it begins again at the first sample.

        Raises UserError where there is no file, or none of TRIES tries reaches its end.
        """
        for tried in range(TRIES):
            empty = True
            try:
                with self._opened(url) as stream:
                    for sample in group_by_keys(tar_file_expander([{"url": url, "stream": stream}])):
                        empty = False
                        yield sample
                    # a command may fail after the last whole file
                    while stream.read(2**16):
                        pass
                if empty:
                    raise ValueError("it holds no samples")
                return
            # files, commands, tar files and URLs raise nearly anything
            except Exception as error:
                if self.closed.is_set():
                    return
                # a missing file is not tried again
                if tried == TRIES - 1 or isinstance(error, FileNotFoundError | IsADirectoryError):
                    # webdataset adds the name of the stream after @
                    why = getattr(error, "strerror", None) or str(next(iter(error.args), error)).partition(" @ ")[0]
                    raise UserError(f"shard {url} cannot be read ({why}): see that it is there and whole, then go on") from error
                tqdm.write(f"shard {url}: {error}; trying again ({tried + 2} of {TRIES})", file=sys.stderr)
            if self.closed.wait(PAUSE * 2**tried):
                return

    @contextmanager
    def _opened(self, url: str) -> Iterator[IO[bytes]]:
        """The bytes behind a URL. Raises OSError where its command failed or stalled.

        The tar file alone does not show that: one that is cut between two samples looks whole.
        """
        self.url, error = url, None
        # gsutil starts other processes, so it needs its own session, which webdataset would not give it
        command = f"pipe:gsutil cat {shlex.quote(url)}" if url.startswith("gs://") else url
        if command.startswith("pipe:"):
            stream = Pipe(["sh", "-c", command.removeprefix("pipe:")], mode="rb", start_new_session=True)
        # gopen() reads a # as the end of a URL, but names of files may hold it
        else:
            stream = gopen(url) if "://" in url or url.startswith("file:") else open(url, "rb")  # noqa: SIM115 (closed below)
        if not isinstance(stream, Pipe):
            with stream:
                yield stream
            return
        # set last: from now on close() may end the command
        self.command = stream
        try:
            # not the Pipe: it would wait for the ended command, whose PID may then be reused
            yield io.BufferedReader(Output(stream.stream.fileno(), closefd=False))
        except BaseException as raised:
            error = raised
            raise
        finally:
            self.command, status = None, 0
            stream.stream.close()
            try:
                status = stream.proc.wait(timeout=1)
            except TimeoutExpired:
                end(stream)
                stream.proc.wait()
            # where we stopped early, the exit status means nothing
            if status and not isinstance(error, GeneratorExit | TimeoutError) and not (error and status in UNREAD):
                # curl: 22 is no such page, 6 and 7 are no such host
                raise OSError(status, f"its command ended with status {status}")


def end(command: Pipe | None) -> None:
    """Kill a command and all processes that it started, which would keep its output open.

    Its reader forgets it before it waits for the process, so this PID cannot have been reused.
    """
    # a command run by sudo belongs to another user
    with suppress(ProcessLookupError, PermissionError):
        if command is not None:
            # _opened() starts each command in its own session; webdataset starts curl in ours, and curl starts no other process
            pid = command.proc.pid
            (os.killpg if os.getpgid(pid) == pid else os.kill)(pid, signal.SIGKILL)


class Stream(Source):
    """A source without an order: a batch is whatever samples come next."""

    def __init__(self, data: Data, seed: int):
        """Start to read and wait for the first image. Raises UserError where none comes, or data.path cannot be expanded."""
        self.data, about = data, data.model_dump(include=set(Images.model_fields)) | {"source": data.path, "seed": seed}
        names = tuple(map(str, range(data.num_classes)))
        self.info = DatasetInfo.model_construct(path=Path(data.path), class_names=names, splits={}, **about)
        try:
            urls = expand_urls(data.path)
        # braces that do not close, or variables that are not set
        except (ValueError, AssertionError) as error:
            how = "write shards as in name-{000..099}.tar"
            raise UserError(f"data.path={data.path} cannot be expanded ({error}): {how}") from error
        self.taken = self.unreadable = 0
        self.found: set[str] = set()
        self.given: dict[int, str] = {}
        # the start time is part of the seed, so that a resumed run does not begin with the same samples
        rank, started = world()[0], time.time_ns()
        self.readers = [Reader(data, urls, f"{seed} {rank} {reader} {started}") for reader in range(READERS)]
        for reader in self.readers:
            reader.start()
        self.first = [self._take()]

    def __len__(self) -> int:
        """Unknown."""
        return 0

    @property
    def damaged(self) -> int:
        """Samples that this process has found damaged and passed over."""
        return len(self.found)

    def batch(self, first: int, count: int) -> Batch:
        """The next samples, whatever the positions. Where no more come or too many are damaged, closes the stream and raises UserError."""
        drawn = [self.first.pop() if self.first else self._take() for _ in range(count)]
        self.given.update((first + i, each.key) for i, each in enumerate(drawn))
        while len(self.given) > REMEMBERED:
            del self.given[next(iter(self.given))]
        images = [each.image for each in drawn]
        return Batch(torch.from_numpy(np.stack(images)), torch.tensor([each.c for each in drawn]))  # type: ignore[arg-type]

    def keys(self, first: int, count: int) -> list[str]:
        """URL:KEY of the samples at these global positions, which must be among the last REMEMBERED."""
        return [self.given[position] for position in range(first, first + count)]

    def prefetch(self, positions: range) -> None:
        """Nothing to do: the readers are always ahead."""

    def close(self) -> None:
        """End the readers and their commands. Commands have their own sessions, so they would outlive the run."""
        for reader in self.readers:
            reader.close()
        parted = time.monotonic() + PARTING
        for reader in self.readers:
            while reader.is_alive() and time.monotonic() < parted:
                # meanwhile it may have started a command, or may wait for a free place in its queue
                reader.close()
                with suppress(Empty):
                    reader.ready.get(timeout=0.05)

    def _take(self) -> Drawn:
        """The next image. On an error or a signal the stream is closed."""
        try:
            return self._next()
        except BaseException:
            self.close()
            raise

    def _next(self) -> Drawn:
        """The next image, from the readers in turn; damaged samples on the way are counted."""
        patience_ends = time.monotonic() + PATIENCE
        while (left := patience_ends - time.monotonic()) > 0:
            reader = self.readers[self.taken % len(self.readers)]
            try:
                drawn = reader.ready.get(timeout=left)
            except Empty:
                break
            if isinstance(drawn, Exception):
                raise drawn
            self.taken += 1
            if not isinstance(drawn.image, Damaged):
                return drawn
            if not self.data.damaged:
                raise drawn.image
            if drawn.key not in self.found:
                self.found.add(drawn.key)
                tqdm.write(f"passed over: {drawn.image}", file=sys.stderr)
            self.unreadable += 1
            if self.unreadable > max(FEW, self.data.damaged * self.taken):
                what = f"{self.unreadable} of {self.taken} samples read from {self.data.path} are damaged"
                raise UserError(f"{what}, more than data.damaged={self.data.damaged:g}; {drawn.image}")
        raise UserError(f"no image came from {reader.url} for {PATIENCE:.0f} s: see that it is there and can be reached")
