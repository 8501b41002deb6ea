"""Caches of what a frozen encoder stores of every image: a VAE's posteriors or a tokenizer's tokens. Training reads them, not images.

A cache of the train split lies in DATA/cache/CHECKSUM: files of CHUNK samples in shard order (npy, records [n, V]) and, once all are
there, cache.json. Files are written atomically and independently, so a job resumes at the first missing file and ranks need no
coordination. Every record holds its own CRC-32, which is checked at every reading. Files are read, not mapped: a process that maps a file
dies without a message when the file is cut off or its disk fails.

B samples of a batch; n samples of a file; V views of a sample: the image and, for runs that mirror images, its mirror image.
"""

import hashlib
import json
import zlib
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch

from mclr.configs.schema import DATASET, Data, DiffusionModel, NextScaleModel
from mclr.errors import UserError
from mclr.train.data.dataset import Batch
from mclr.train.data.encoders import VAE_WEIGHTS, Encoder, Latents, Tokens, find_vae, from_uint8
from mclr.train.data.source import Source
from mclr.train.system.console import progress_bar
from mclr.train.system.files import checksum, in_memory, lock, write_file, write_json
from mclr.train.system.ranks import world
from mclr.train.weights.folder import find_weights, sha256

FOLDER, RECORD = "cache", "cache.json"
CHUNK = 256  # samples of a file: 32 MiB of latents of 512 pixels in fp32
BATCH = 16  # images that are encoded at a time
Model = DiffusionModel | NextScaleModel


@dataclass(frozen=True)
class CacheKey:
    """Everything that decides the content of a cache. The checksum of it is the name of the folder.

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


def storage(encoder: Encoder, data: Data) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """How an encoded image is stored: (shape, possible dtypes, the exact one first). No dtypes for pixels, which need no cache."""
    if isinstance(encoder, Latents):
        channels, *sides = encoder.shape(data)
        return (2 * channels, *sides), ("float32", "float16")
    if isinstance(encoder, Tokens):
        tokens = encoder.tokenizer.config
        return (sum(side**2 for side in tokens.scales),), (np.min_scalar_type(tokens.vocab_size - 1).name,)
    return (), ()


class Cache:
    """The files of one cache, written or not yet."""

    def __init__(self, dataset: Path, key: CacheKey):
        self.key = key
        name = hashlib.sha256(json.dumps(asdict(key)).encode()).hexdigest()[:16]
        self.folder = dataset / FOLDER / name
        self.record = np.dtype([("crc", "<u4"), ("x", np.dtype(key.dtype).newbyteorder("<"), key.shape)])
        self.stride = key.views * self.record.itemsize  # bytes of a sample
        # bytes of the npy header: numpy pads it, so that it does not depend on the number of records
        self.offset = len(in_memory(np.save, arr=np.empty((0, key.views), self.record)))
        self.files = [self.folder / f"{k:06d}.npy" for k in range(-(-key.count // key.chunk))]
        self.complete = (self.folder / RECORD).exists()

    def samples(self, k: int) -> list[int]:
        """Those of file k, numbered in shard order."""
        return list(range(k * self.key.chunk, min((k + 1) * self.key.chunk, self.key.count)))

    def missing(self) -> list[int]:
        """The files that are not there, or not of their size."""
        sizes = [self.offset + len(self.samples(k)) * self.stride for k in range(len(self.files))]
        return [k for k, file in enumerate(self.files) if not file.exists() or file.stat().st_size != sizes[k]]

    def write(self, k: int, x_nV: np.ndarray) -> None:
        """Write file k. Raises UserError where the disk is full, or the numbers do not fit the cache's type."""
        records_nV = np.empty(x_nV.shape[:2], self.record)
        with np.errstate(over="ignore"):
            records_nV["x"] = x_nV
        if not np.isfinite(records_nV["x"]).all():
            why = f"the encoder gives numbers that {self.key.dtype} does not hold"
            raise UserError(f"{why}: give weights that are whole, or no --half")
        for i, records_V in zip(self.samples(k), records_nV, strict=True):
            records_V["crc"] = self._crcs(i, records_V)
        write_file(self.files[k], in_memory(np.save, arr=records_nV))

    def finish(self, command: str) -> bool:
        """Remove what a killed job left, and record that the cache is complete. False where another rank has done so."""
        # else one of two jobs could remove the file that the other is writing
        held, _ = lock(self.folder / "lock", wait=True, none=True)
        with held:
            if (self.folder / RECORD).exists():
                return False
            for torn in self.folder.glob(".tmp-*"):
                torn.unlink()
            write_json(self.folder / RECORD, asdict(self.key) | {"command": command})
        return True

    def check(self) -> None:
        """Raises UserError where a file is missing or cut off."""
        if missing := self.missing():
            raise self._damaged(f"{self.files[missing[0]].name} is missing or cut off")

    def read(self, i: int) -> np.ndarray:
        """What is stored of sample i, [V, ...]. Raises UserError where it is damaged."""
        k, place = divmod(i, self.key.chunk)
        try:
            with open(self.files[k], "rb") as file:
                file.seek(self.offset + place * self.stride)
                records_V = np.frombuffer(file.read(self.stride), self.record)
            if len(records_V) != self.key.views or (records_V["crc"] != self._crcs(i, records_V)).any():
                raise ValueError("its checksum differs")
        except (OSError, ValueError) as error:
            raise self._damaged(f"sample {i} in {self.files[k].name}: {error}") from error
        return records_V["x"]

    def _damaged(self, why: str) -> UserError:
        return UserError(f"{self.folder} is damaged ({why}): remove this folder, and make it again with `mclr prepare cache`")

    def _crcs(self, i: int, records_V: np.ndarray) -> list[int]:
        # the sum starts at the number of the view, so that the record of another sample does not fit
        return [zlib.crc32(x.tobytes(), i * self.key.views + view) for view, x in enumerate(records_V["x"])]


def cache_for(source: Source, encoder: Encoder, data: Data, model: Model, dtype: str, views: int) -> Cache:
    """The cache of this dataset and encoder."""
    if isinstance(model, DiffusionModel):
        assert model.vae is not None
        # the VAE sees other images for the other latents
        what = "latents" if model.latents == "edm2" else "latents-sd"
        weights = checksum(find_vae(model.vae) / VAE_WEIGHTS)
    else:
        what, weights = "tokens", sha256(find_weights(model.tokenizer))
    dataset, shape = checksum(source.info.path / DATASET), storage(encoder, data)[0]
    return Cache(source.info.path, CacheKey(what, weights, dataset, dtype, shape, views, len(source), CHUNK))


class CachedSource(Source):
    """A source that reads its samples from a complete cache and never opens an image."""

    def __init__(self, source: Source, cache: Cache):
        """Raises UserError where a file of the cache is missing or cut off."""
        super().__init__(source.split, source.seed, source.balanced)
        cache.check()
        self.cache, self.coming = cache, {}

    def prefetch(self, positions: range) -> None:
        for i in self.indices(positions):
            if i not in self.coming:
                self.coming[i] = self.split.readers.submit(self.cache.read, i)

    def batch(self, first: int, count: int) -> Batch:
        positions = range(first, first + count)
        self.prefetch(positions)
        indices = self.indices(positions)
        read = {i: self.coming.pop(i).result() for i in dict.fromkeys(indices)}
        stored_BV = np.stack([read[i] for i in indices])
        dtype = np.int64 if stored_BV.dtype.kind == "u" else np.float32
        stored = torch.from_numpy(stored_BV.astype(dtype, copy=False))
        return Batch(torch.empty(0), self.split.c_N[indices], stored_BV=stored)


def through_cache(source: Source, encoder: Encoder, data: Data, model: Model) -> Source:
    """The source, or one that reads a complete cache which fits the run. An exact cache is preferred to one in half precision.

    Raises UserError where that cache is damaged.
    """
    # a stream has no splits, and no folder
    if not source.info.splits or not (source.info.path / FOLDER).is_dir() or source.split.tokens_NL is not None:
        return source
    for dtype in storage(encoder, data)[1]:
        for views in (2,) if data.flip else (1, 2):
            cache = cache_for(source, encoder, data, model, dtype, views)
            if cache.complete:
                return CachedSource(source, cache)
    return source


def cache_of(source: Source) -> Cache | None:
    """The cache that a source reads; None where it reads images."""
    return source.cache if isinstance(source, CachedSource) else None


def data_line(source: Source, encoder: Encoder, data: Data) -> list[str]:
    """What a run prints about its data at its start: that it streams, which cache it reads, or that no cache fits."""
    if not source.info.splits:
        return ["data       streamed, shards drawn with replacement: a resumed run sees other samples"]
    if cache := cache_of(source):
        return [f"data       {cache.key.what} ({cache.key.dtype}) from {cache.folder}"]
    place = source.info.path / FOLDER
    # drawn tokens are used as they are
    if not place.is_dir() or not storage(encoder, data)[1] or source.split.tokens_NL is not None:
        return []
    return [f"data       nothing in {place} is complete and fits this run: every image is encoded at every visit"]


def precision_of(source: Source, encoder: Encoder) -> dict[str, str]:
    """The precision of a run's latents, which belongs to its inputs: a resumed run may gain or lose a cache, but not change this.

    Tokens are the same with and without a cache. So are fp32 latents, up to rounding in batches of another size.
    """
    if not isinstance(encoder, Latents):
        return {}
    cache = cache_of(source)
    return {"latents": cache.key.dtype if cache else "float32"}


def make_cache(
    source: Source, encoder: Encoder, data: Data, model: Model, half: bool, device: torch.device, command: str
) -> None:
    """Write this rank's share of the missing files. The rank that finds all files written completes the cache.

    half: store latents in fp16. It halves the disk and keeps 11 bits of mean and standard deviation: x moves by 2.5e-4 of its standard
    deviation (root mean square; latents of EDM2's statistics, tests/data/test_cache.py). Raises UserError where there is nothing to
    cache, an image is damaged, or the disk is full.
    """
    dtypes = storage(encoder, data)[1]
    if not dtypes or source.split.tokens_NL is not None:
        why = "models pixels" if not dtypes else "finds the tokens in the data as they were drawn"
        raise UserError(f"{model.name} {why}: there is nothing to cache")
    if half and "float16" not in dtypes:
        raise UserError(f"{model.name} models tokens, which are whole numbers: leave out --half")
    dtype, views = "float16" if half else dtypes[0], 2 if data.flip else 1
    cache = cache_for(source, encoder, data, model, dtype, views)
    key, reader, (rank, _, ranks) = cache.key, source.split, world()
    content = f"{key.what} of {key.count} images{' and their mirror images' * (views - 1)}"
    content += f", {dtype}, {key.count * cache.stride / 2**20:,.1f} MiB"
    if cache.complete:
        cache.check()
        if rank == 0:
            print(f"{cache.folder} is complete: {content}")
        return
    cache.folder.mkdir(parents=True, exist_ok=True)
    missing = cache.missing()
    # dealt by number, not among the missing ones: ranks start at different times and may find different files
    todo = [k for k in missing if k % ranks == rank]
    begun = key.count - sum(len(cache.samples(k)) for k in missing)
    with progress_bar(key.count, begun, quiet=rank != 0) as bar:
        for k, following in zip_longest(todo, todo[1:]):
            samples = cache.samples(k)
            reader.read_ahead(samples + ([] if following is None else cache.samples(following)))
            encoded = []
            for first in range(0, len(samples), BATCH):
                image_BCHW = from_uint8(reader.images(samples[first : first + BATCH]).to(device))
                both = (image_BCHW, image_BCHW.flip(-1))[:views]
                encoded.append(torch.stack([encoder.encode(view) for view in both], dim=1).cpu())
            cache.write(k, torch.cat(encoded).numpy())
            # we assume that the other ranks have done as much
            bar.update(min(len(samples) * ranks, key.count - bar.n))
    if left := len(cache.missing()):
        if rank == 0:
            how = "run the same command when they are there"
            print(f"{cache.folder}: {left} of {len(cache.files)} files are still being made elsewhere: {how}")
    elif cache.finish(command):
        print(f"{cache.folder}: {content}")
