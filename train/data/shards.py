"""Samples in shards, which are tar files of KEY.png + KEY.cls: an index of them, reading one, and what a streamed sample holds."""

import errno
import hashlib
import io
import json
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np

from mclr.configs.schema import Shard
from mclr.errors import UserError
from mclr.train.data.images import PNG, endings, open_image
from mclr.train.system.files import in_memory, regular, write_file

INDEX = "index.npz"
FIRST = ("jpg", "jpeg", "png", "webp")  # kinds of images that are read first where a sample has several


def load_index(folder: Path, shards: list[Shard]) -> dict[str, np.ndarray]:
    """{shard: its samples}, from index.npz where that knows all shards, else from the tar files.

    A sample has a key, a condition c, and the file, offset and length (in bytes) of its image. A missing or stale index.npz is written
    anew, unless the folder is read-only. Raises UserError where a shard without an index is not the one in dataset.json.
    """
    names = {shard.file: f"{shard.file}:{shard.count}:{shard.sha256}" for shard in shards}
    # a zip file knows the checksums of what it holds; a damaged one raises nearly anything
    with suppress(Exception), ZipFile(regular(folder / INDEX)) as archive:
        return {file: np.load(io.BytesIO(archive.read(f"{name}.npy"))) for file, name in names.items()}
    index = {shard.file: _index_shard(folder, shard) for shard in shards}
    with suppress(UserError):
        write_file(folder / INDEX, in_memory(np.savez, **{names[file]: samples for file, samples in index.items()}))
    return index


def _index_shard(folder: Path, shard: Shard) -> np.ndarray:
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
        texts = [("file", f"U{len(shard.file)}"), ("key", f"U{max(map(len, place), default=1)}")]
        numbers = [(name, np.int64) for name in ("offset", "length", "c")]
        return np.array([(shard.file, key, *place[key], condition[key]) for key in place], texts + numbers)
    # tarfile raises nearly anything on damaged headers
    except Exception as error:
        where = f" at or after sample {key}" * bool(key)
        raise UserError(f"{path} is damaged{where} ({error}): copy it again, or prepare the dataset again") from error


class Damaged(UserError):
    """An image that cannot be decoded. Training alone may pass over it (dataset.py, SplitReader)."""


def read_image(folder: Path, sample: np.record, shape: tuple[int, int, int]) -> np.ndarray:
    """One sample's image, uint8 [C, H, W]. Raises Damaged, with shard and key, where it cannot be decoded or has another shape.

    Raises UserError where the shard is missing, unreadable or cut short.
    """
    channels, height, width = shape
    path, expected = folder / sample.file, ({1: "L", 3: "RGB"}[channels], (width, height))
    try:
        with open(path, "rb") as stream:
            stream.seek(sample.offset)
            data = stream.read(sample.length)
        if len(data) < sample.length:
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
