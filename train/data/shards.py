"""Samples in shards, which are tar files of KEY.png + KEY.cls: an index of them, reading one, and what a streamed sample holds."""

import errno
import gc
import hashlib
import json
import tarfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mclr.configs.schema import Shard
from mclr.errors import UserError
from mclr.train.data.images import PNG, endings, open_image
from mclr.train.system.files import regular, write_file

INDEX = "index.json"
FIRST = ("jpg", "jpeg", "png", "webp")  # kinds of images that are read first where a sample has several


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
    saved = {}
    with suppress(OSError):
        stat = regular(folder / INDEX).stat()
        saved = _parsed_index(folder / INDEX, stat.st_size, stat.st_mtime_ns)
    known = {shard.file for shard in shards if _fits(saved.get(shard.file), shard)}
    index = {shard.file: saved[shard.file][1] if shard.file in known else _index_shard(folder, shard) for shard in shards}
    if len(known) < len(shards):
        record = {shard.file: [shard.sha256, [sample[1:] for sample in index[shard.file]]] for shard in shards}
        with suppress(UserError):
            write_file(folder / INDEX, json.dumps(record, separators=(",", ":")).encode())
    return index


# kept for the readers of both splits; no more than one, since 4 million samples take most of a gigabyte
@lru_cache(maxsize=1)
def _parsed_index(path: Path, size: int, changed: int) -> dict[str, tuple[str, list[Sample]]]:
    """{shard: (sha256, samples)} of index.json, whose types are not checked yet; empty where it is malformed."""
    # else the garbage collector visits the millions of tuples again and again
    gc.disable()
    try:
        record = json.loads(path.read_bytes())
        return {file: (sha256, [Sample(file, *row) for row in rows]) for file, (sha256, rows) in record.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}
    finally:
        gc.enable()


def _fits(saved: tuple[str, list[Sample]] | None, shard: Shard) -> bool:
    """Whether this entry of index.json can be that of the shard."""
    return (
        saved is not None
        and saved[0] == shard.sha256
        and len(saved[1]) == shard.count
        and all(
            type(key) is str and type(offset) is type(size) is type(c) is int and 0 <= offset <= offset + size <= shard.bytes
            for _, key, offset, size, c in saved[1]
        )
    )


def _index_shard(folder: Path, shard: Shard) -> list[Sample]:
    """The samples of a tar file. Raises UserError where it is damaged, or not the one in dataset.json."""
    path, key = folder / shard.file, ""
    place: dict[str, tuple[int, int]] = {}
    condition: dict[str, int] = {}
    try:
        with open(path, "rb") as stream:
            if (sha256 := hashlib.file_digest(stream, "sha256").hexdigest()) != shard.sha256:
                raise ValueError(f"its sha256 is {sha256[:8]}..., but dataset.json says {shard.sha256[:8]}...")
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
                    condition[key] = int(tar.extractfile(member).read())  # type: ignore[union-attr]
        if odd := place.keys() ^ condition.keys():
            key = min(odd)
            raise ValueError("its .png or its .cls is missing")
        if len(place) != shard.count:
            raise ValueError(f"it holds {len(place)} samples, but dataset.json says {shard.count}")
    # tarfile raises nearly anything on damaged headers
    except Exception as error:
        where = f" at or after sample {key}" * bool(key)
        raise UserError(f"{path} is damaged{where} ({error}): copy it again, or prepare the dataset again") from error
    return [Sample(shard.file, key, offset, size, condition[key]) for key, (offset, size) in place.items()]


class Damaged(UserError):
    """An image that cannot be decoded. Training alone may pass over it (dataset.py, SplitReader)."""


def read_image(folder: Path, sample: Sample, shape: tuple[int, int, int]) -> np.ndarray:
    """One sample's image, uint8 [C, H, W]. Raises Damaged, with shard and key, where it cannot be decoded or has another shape.

    Raises UserError where the shard is missing, unreadable or cut short.
    """
    channels, height, width = shape
    path, expected = folder / sample.file, ({1: "L", 3: "RGB"}[channels], (width, height))
    try:
        with open(path, "rb") as stream:
            stream.seek(sample.offset)
            data = stream.read(sample.size)
        if len(data) < sample.size:
            raise OSError(errno.EIO, f"it ends within sample {sample.key}")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): put it back, and the same command goes on") from error
    try:
        image = open_image(data, PNG)
        # before its pixels are decoded
        if (image.mode, image.size) != expected:
            raise ValueError(f"{image.mode} {image.width}x{image.height}, but dataset.json says {expected[0]} {width}x{height}")
        return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)
    # decoders raise nearly anything on damaged bytes
    except Exception as error:
        what = f"{path}: the image of sample {sample.key} is damaged ({error})"
        raise Damaged(f"{what}: copy the shard again, or prepare the dataset again") from error


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
