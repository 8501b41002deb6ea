"""Samples in shards, which are tar files of KEY.png + KEY.cls: an index of them, reading one, and what a streamed sample holds."""

import gc
import hashlib
import json
import tarfile
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mclr.errors import UserError
from mclr.train.data.images import PNG, endings, open_image
from mclr.train.system.files import regular, write_file

INDEX = "index.json"
FIRST = ("jpg", "jpeg", "png", "webp")  # kinds of images that are read first where a sample has several


@dataclass(frozen=True)
class Shard:
    """A tar file as dataset.json records it; file is relative to the dataset folder ("train/000000.tar")."""

    file: str
    count: int
    bytes: int
    sha256: str


class Sample(NamedTuple):
    """One sample of a shard: its condition c, and where its image lies in the tar file (offset and size in bytes)."""

    file: str
    key: str
    offset: int
    size: int
    c: int


def load_index(folder: Path, shards: list[Shard]) -> dict[str, list[Sample]]:
    """{shard: its samples}, from index.json where that fits the shard, else from the tar file.

    A missing or stale index.json is written anew, unless the folder is read-only. Raises UserError where a shard without an index is not
    the one in dataset.json.
    """
    saved = _saved_index(folder)
    index = {}
    for shard in shards:
        sha256, samples = saved.get(shard.file, ("", []))
        index[shard.file] = samples if sha256 == shard.sha256 and _fit(samples, shard) else _index_shard(folder, shard)
    if any(saved.get(shard.file) != (shard.sha256, index[shard.file]) for shard in shards):
        record = {shard.file: [shard.sha256, [sample[1:] for sample in index[shard.file]]] for shard in shards}
        with suppress(UserError):
            write_file(folder / INDEX, json.dumps(record, separators=(",", ":")).encode())
    return index


class Damaged(UserError):
    """An image that cannot be decoded. Training alone may pass over it (dataset.py, SplitReader)."""


def read_image(folder: Path, sample: Sample, shape: tuple[int, int, int]) -> np.ndarray:
    """One sample's image, uint8 [C, H, W]. Raises Damaged, with shard and key, where it cannot be decoded or has another shape.

    Raises UserError where the shard is missing, unreadable or cut short.
    """
    channels, height, width = shape
    path = folder / sample.file
    place = f"{path}: the image of sample {sample.key}"
    try:
        with open(path, "rb") as stream:
            stream.seek(sample.offset)
            data = stream.read(sample.size)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): put it back, and the same command goes on") from error
    if len(data) < sample.size:
        raise UserError(f"{path} ends within sample {sample.key}: put the whole file back, and the same command goes on")
    mode = {1: "L", 3: "RGB"}[channels]
    try:
        image = open_image(data, PNG)
        # an image of another size is refused below, so its pixels are not decoded
        if fits := (image.mode, image.size) == (mode, (width, height)):
            image.load()
    # decoders raise nearly anything on damaged bytes
    except Exception as error:
        raise Damaged(f"{place} is damaged ({error}): copy the shard again, or prepare the dataset again") from error
    if not fits:
        raise Damaged(f"{place} is {image.mode} {image.width}x{image.height}, but dataset.json says {mode} {width}x{height}")
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def image_kind(sample: dict[str, Any]) -> str:
    """The kind of the image among a sample's files. Raises ValueError where there is none."""
    if kinds := [kind for kind in (*FIRST, *sample) if kind in sample and f".{kind}" in endings()]:
        return kinds[0]
    raise _lacks(sample, "image")


def label_of(sample: dict[str, Any], label: str) -> int:
    """The condition of a sample. label: the kind of file that holds it, or json.NAME for an entry of the .json.

    Raises ValueError where there is none.
    """
    kind, *names = label.split(".")
    if kind not in sample:
        raise _lacks(sample, f".{kind}")
    if not names:
        return int(sample[kind])
    value = json.loads(sample[kind])
    for name in names:
        if not isinstance(value, dict) or name not in value:
            has = ", ".join(value) if isinstance(value, dict) else f"{value!r:.40}"
            raise ValueError(f"its .{kind} has no {name} for data.label={label}, but {has}")
        value = value[name]
    return int(value)


def _lacks(sample: dict[str, Any], what: str) -> ValueError:
    kinds = [kind for kind in sample if not kind.startswith("__")]
    more = f" and {len(kinds) - 4} more" if len(kinds) > 4 else ""
    why = "a sample's files must follow each other in the tar file"
    if any("." in kind for kind in kinds):
        why = "a key ends at the first dot of a file's name, as webdataset splits it: rename files with several dots"
    elif "json" in kinds and what != "image":
        why = "data.label=json.NAME reads the entry NAME of the .json"
    return ValueError(f"it has no {what}, but {', '.join(f'.{kind}' for kind in kinds[:4])}{more}; {why}")


def _saved_index(folder: Path) -> dict[str, tuple[str, list[Sample]]]:
    """{shard: (sha256, samples)} of index.json; empty where the file is missing or malformed."""
    try:
        stat = regular(folder / INDEX).stat()
        return _parsed_index(folder / INDEX, stat.st_size, stat.st_mtime_ns)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


# kept for the readers of both splits; no more than one, since 4 million samples take most of a gigabyte
@lru_cache(maxsize=1)
def _parsed_index(path: Path, size: int, changed: int) -> dict[str, tuple[str, list[Sample]]]:
    # else the garbage collector visits the millions of tuples again and again
    gc.disable()
    try:
        record = json.loads(path.read_bytes())
        return {file: (sha256, [Sample(file, *row) for row in rows]) for file, (sha256, rows) in record.items()}
    finally:
        gc.enable()


def _fit(samples: list[Sample], shard: Shard) -> bool:
    """Whether these samples of index.json can be those of the shard. Their types are not checked yet."""
    return len(samples) == shard.count and all(
        type(key) is str
        and type(c) is int
        and type(offset) is int
        and type(size) is int
        and 0 <= offset <= offset + size <= shard.bytes
        for _, key, offset, size, c in samples
    )


def _index_shard(folder: Path, shard: Shard) -> list[Sample]:
    path = folder / shard.file
    place: dict[str, tuple[int, int]] = {}
    condition: dict[str, int] = {}
    key = "(none yet)"
    try:
        with open(path, "rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        if sha256 != shard.sha256:
            differs = f"has sha256 {sha256[:8]}..., but dataset.json says {shard.sha256[:8]}..."
            raise UserError(f"{path} {differs}: copy it again, or remove the dataset and prepare it again")
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                # as webdataset does: the key ends at the first dot
                key, _, kind = member.name.partition(".")
                # tarfile loops on a negative size, and fills the memory for a sparse file
                if not 0 <= member.size <= shard.bytes - member.offset_data:
                    raise ValueError(f"{member.name} is not within the file")
                if kind in ("png", "cls") and not member.isreg():
                    raise ValueError(f"{member.name} is no regular file")
                if kind == "png":
                    place[key] = member.offset_data, member.size
                elif kind == "cls":
                    content = tar.extractfile(member)
                    assert content is not None
                    condition[key] = int(content.read())
    except UserError:
        raise
    # tarfile raises nearly anything on damaged headers
    except Exception as error:
        raise UserError(f"{path}: damaged at or after sample {key} ({error}): remove the dataset and prepare it again") from error
    if place.keys() != condition.keys():
        key = min(place.keys() ^ condition.keys())
        raise UserError(f"{path}: sample {key} lacks its .png or its .cls: remove the dataset and prepare it again")
    if len(place) != shard.count:
        raise UserError(
            f"{path}: holds {len(place)} samples, but dataset.json says {shard.count}: remove the dataset and prepare it again"
        )
    return [Sample(shard.file, key, offset, size, condition[key]) for key, (offset, size) in place.items()]
