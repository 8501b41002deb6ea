"""Caches of what a frozen encoder stores: a VAE's posteriors, a tokenizer's tokens; made once, read in place of the images.

A cache lies in DATA/cache/CHECKSUM and is of one split, train: files of CHUNK samples in shard order (npy, records [n, V]) and,
once all are there, cache.json. A file appears whole or not at all, and holds nothing of its neighbours: so a stopped job goes on after
its last file, and ranks share the files without a word. A record holds its own CRC-32, looked at whenever it is read: nothing is
checked beforehand, and no damage is trained on. Records are read, not mapped: a process whose map loses its end, or its disk, dies
without a word.

B samples of a batch; n samples of a file; V views of a sample: the image and, where a run mirrors images, its mirror image, encoded
like any other. A run without mirroring would never read that second view, which doubles work and disk.
"""

import hashlib
import json
import zlib
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mclr.configs.schema import DiffusionModel, RunConfig
from mclr.errors import UserError
from mclr.train.data.encoders import VAE_WEIGHTS, Encoder, Latents, find_vae, from_uint8
from mclr.train.data.source import Batch, Source
from mclr.train.system.files import checksum, lock, write_file, write_json
from mclr.train.system.ranks import world
from mclr.train.weights.folder import find_weights, sha256

FOLDER, RECORD = "cache", "cache.json"
CHUNK = 256  # samples of a file: 32 MiB of latents of 512 pixels in fp32
BATCH = 16  # images that are encoded at a time


@dataclass(frozen=True)
class Form:
    """All that decides the content of a cache; the checksum of this names its folder.

    what: latents or tokens; encoder: sha256 of its weights; dataset: sha256 of dataset.json; dtype and shape: of one view;
    chunk: samples of a file.
    """

    what: str
    encoder: str
    dataset: str
    dtype: str
    shape: tuple[int, ...]
    views: int
    count: int
    chunk: int


def form_of(config: RunConfig, encoder: Encoder, source: Source, dtype: str, views: int) -> Form:
    model = config.model
    if isinstance(model, DiffusionModel):
        assert model.vae is not None
        what, weights = "latents", checksum(find_vae(model.vae) / VAE_WEIGHTS)
    else:
        what, weights = "tokens", sha256(find_weights(model.tokenizer))
    dataset, shape = checksum(source.info.path / "dataset.json"), encoder.storage(config.data)[0]
    return Form(what, weights, dataset, dtype, shape, views, len(source), CHUNK)


class Cache:
    """The files of one cache, there or still to be written."""

    def __init__(self, dataset: Path, form: Form):
        self.form = form
        name = hashlib.sha256(json.dumps(asdict(form)).encode()).hexdigest()[:16]
        self.folder = dataset / FOLDER / name
        self.record = np.dtype([("crc", "<u4"), ("x", np.dtype(form.dtype).newbyteorder("<"), form.shape)])
        self.stride = form.views * self.record.itemsize  # bytes of a sample
        self.files = -(-form.count // form.chunk)
        self.complete = (self.folder / RECORD).exists()

    def samples(self, k: int) -> range:
        """Those of file k, numbered in shard order."""
        return range(k * self.form.chunk, min((k + 1) * self.form.chunk, self.form.count))

    def finished(self, k: int) -> bool:
        """Whether file k is there and of its size."""
        try:
            return self._file(k).stat().st_size == len(self._header(k)) + len(self.samples(k)) * self.stride
        except OSError:
            return False

    def write(self, k: int, x_nV: np.ndarray) -> None:
        """File k. Raises UserError where the disk is full, or the numbers do not fit the cache's type."""
        records_nV = np.empty(x_nV.shape[:2], self.record)
        with np.errstate(over="ignore"):
            records_nV["x"] = x_nV
        if not np.isfinite(records_nV["x"]).all():
            raise UserError(
                f"the encoder gives numbers that {self.form.dtype} does not hold: give weights that are whole, or no --half"
            )
        for i, records_V in zip(self.samples(k), records_nV, strict=True):
            records_V["crc"] = self._crcs(i, records_V)
        write_file(self._file(k), self._header(k) + records_nV.tobytes())

    def finish(self, command: str) -> bool:
        """Say that the cache is complete, and take away what a killed job left half-written. False where another rank has done so."""
        # else the one of two would take away what the other is writing
        try:
            held, _ = lock(self.folder / "lock", wait=True)
        # file systems without locks give no name
        except OSError as error:
            raise UserError(
                f"cannot lock {self.folder} ({error.strerror}): make the dataset folder one whose files have locks"
            ) from error
        with held:
            if (self.folder / RECORD).exists():
                return False
            for torn in self.folder.glob(".tmp-*"):
                torn.unlink()
            write_json(self.folder / RECORD, asdict(self.form) | {"command": command})
        return True

    def check(self) -> None:
        """Raises UserError where a complete cache is not what its name says, or a file is missing or cut off."""
        try:
            said = json.loads((self.folder / RECORD).read_bytes())
            for key, value in json.loads(json.dumps(asdict(self.form))).items():
                if said[key] != value:
                    raise ValueError(f"{RECORD} says {key} {said[key]}, this data and encoder have {value}")
            for k in range(self.files):
                if not self.finished(k):
                    raise ValueError(f"{self._file(k).name} is missing or cut off")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(error) from error

    def read(self, i: int) -> np.ndarray:
        """What is stored of sample i, [V, ...]. Raises UserError where its file is damaged at this place."""
        k, place = divmod(i, self.form.chunk)
        try:
            with open(self._file(k), "rb") as file:
                file.seek(len(self._header(k)) + place * self.stride)
                records_V = np.frombuffer(file.read(self.stride), self.record)
            if len(records_V) != self.form.views or (records_V["crc"] != self._crcs(i, records_V)).any():
                raise ValueError("its checksum differs")
        except (OSError, ValueError) as error:
            raise self._damaged(f"sample {i} in {self._file(k).name}: {error}") from error
        return records_V["x"]

    def _damaged(self, why: object) -> UserError:
        return UserError(
            f"{self.folder} is damaged ({why}): remove this folder, and make it again with `mclr prepare cache` if you like"
        )

    def _file(self, k: int) -> Path:
        return self.folder / f"{k:06d}.npy"

    def _header(self, k: int) -> bytes:
        return header(self.record, (len(self.samples(k)), self.form.views))

    def _crcs(self, i: int, records_V: np.ndarray) -> list[int]:
        # begun with the place of the view, so that a record of another sample shows
        return [zlib.crc32(x.tobytes(), i * self.form.views + view) for view, x in enumerate(records_V["x"])]


@lru_cache
def header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """How a npy file of such an array begins."""
    buffer = BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype.descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@dataclass(frozen=True, kw_only=True)
class CachedBatch(Batch):
    """stored_BV: what the encoder stores of every view, fp32 or int64; image_BCHW is empty."""

    stored_BV: Tensor


class CachedSource(Source):
    """A source, in its order, that reads its cache and never an image."""

    def __init__(self, source: Source, cache: Cache):
        """Raises UserError as Cache.check does."""
        vars(self).update(vars(source))
        cache.check()
        self.cache = cache
        self.coming: dict[int, Future[np.ndarray]] = {}

    def batch(self, first: int, count: int) -> CachedBatch:
        positions = range(first, first + count)
        self.prefetch(positions)
        indices = self._indices(positions)
        read = {i: self.coming.pop(i).result() for i in dict.fromkeys(indices)}
        stored_BV = np.stack([read[i] for i in indices])
        dtype = np.int64 if stored_BV.dtype.kind == "u" else np.float32
        stored = torch.from_numpy(stored_BV.astype(dtype, copy=False))
        return CachedBatch(torch.empty(0), self.reader.c_N[indices], stored_BV=stored)

    def prefetch(self, positions: range) -> None:
        for i in self._indices(positions):
            if i not in self.coming:
                self.coming[i] = self.reader.readers.submit(self.cache.read, i)


def through_cache(source: Source, encoder: Encoder, config: RunConfig) -> Source:
    """The source, read through its cache where one is complete and fits the run; the exact one where there are two.

    Raises UserError where that cache is damaged.
    """
    if not _has_caches(source) or source.tokens_NL is not None:
        return source
    for dtype in encoder.storage(config.data)[1]:
        for views in (2,) if config.data.flip else (1, 2):
            cache = Cache(source.info.path, form_of(config, encoder, source, dtype, views))
            if cache.complete:
                return CachedSource(source, cache)
    return source


def _has_caches(source: Source) -> bool:
    # a stream has no splits, and no folder
    return bool(source.info.splits) and (source.info.path / FOLDER).is_dir()


def data_line(source: Source, encoder: Encoder, config: RunConfig) -> list[str]:
    """What a run says at its start about a stream, about the cache that it reads, or about those that it leaves out; else nothing."""
    if not source.info.splits:
        return ["data       streamed, shards drawn with replacement: a resumed run sees other samples"]
    if isinstance(source, CachedSource):
        return [f"data       {source.cache.form.what} ({source.cache.form.dtype}) from {source.cache.folder}"]
    if not _has_caches(source) or not encoder.storage(config.data)[1]:
        return []
    return [
        f"data       nothing in {source.info.path / FOLDER} is complete and fits this run: every image is encoded at every visit"
    ]


def precision_of(source: Source, encoder: Encoder) -> dict[str, str]:
    """How exact a run's latents are, beside the checksums of what it reads: it may gain or lose a cache, but not that.

    Tokens are what the tokenizer gives, cached or not; latents in fp32 as well, up to the rounding of another batch size.
    """
    if not isinstance(encoder, Latents):
        return {}
    return {"latents": source.cache.form.dtype if isinstance(source, CachedSource) else "float32"}


def make_cache(config: RunConfig, source: Source, encoder: Encoder, half: bool, device: torch.device, command: str) -> None:
    """Write this rank's share of the files, going on where an earlier job stopped; who finds all of them there completes the cache.

    half: latents in fp16, half the disk: of mean and standard deviation 11 bits are left, so x moves by 2.5e-4 of its standard deviation
    (root mean square; latents of EDM2's statistics, tests/test_cache.py).
    Raises UserError where there is nothing to cache, an image is damaged, or the disk is full.
    """
    # which imports this file, by way of the step
    from mclr.train.system.console import progress_bar

    dtypes = encoder.storage(config.data)[1]
    if not dtypes or source.tokens_NL is not None:
        why = "models pixels" if not dtypes else "finds the tokens in the data as they were drawn"
        raise UserError(f"{config.model.name} {why}: there is nothing to cache")
    if half and "float16" not in dtypes:
        raise UserError(f"{config.model.name} models tokens, which are whole numbers: leave out --half")
    cache = Cache(
        source.info.path, form_of(config, encoder, source, "float16" if half else dtypes[0], 2 if config.data.flip else 1)
    )
    form, reader, (rank, _, ranks) = cache.form, source.reader, world()
    size = f"{form.dtype}, {form.count * cache.stride / 2**20:,.1f} MiB"
    content = f"{form.what} of {form.count} images{' and their mirror images' * (form.views - 1)}, {size}"
    if cache.complete:
        cache.check()
        if rank == 0:
            print(f"{cache.folder} is complete: {content}")
        return
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {cache.folder} ({error.strerror}): make the dataset folder writable") from error
    there = sum(len(cache.samples(k)) for k in range(cache.files) if cache.finished(k))
    # by number: ranks start at different times, and may find different files there
    todo = [k for k in range(rank, cache.files, ranks) if not cache.finished(k)]
    with progress_bar(form.count, begun=there, quiet=rank != 0) as bar:
        for k, following in zip(todo, [*todo, None][1:], strict=True):
            samples = list(cache.samples(k))
            reader.read_ahead(samples + ([] if following is None else list(cache.samples(following))))
            encoded = []
            for first in range(0, len(samples), BATCH):
                image_BCHW = from_uint8(reader.images(samples[first : first + BATCH]).to(device))
                views = (image_BCHW, image_BCHW.flip(-1))[: form.views]
                encoded.append(torch.stack([encoder.encode(view) for view in views], dim=1).cpu())
            cache.write(k, torch.cat(encoded).numpy())
            # the others are about as far
            bar.update(min(len(samples) * ranks, form.count - bar.n))
    if left := sum(not cache.finished(k) for k in range(cache.files)):
        if rank == 0:
            print(
                f"{cache.folder}: {left} of {cache.files} files are still being made elsewhere: run the same command when they are there"
            )
    elif cache.finish(command):
        print(f"{cache.folder}: {content}")
