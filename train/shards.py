"""The samples inside a dataset's shards (tar files of KEY.png + KEY.cls): where they lie, and how one is read."""

import hashlib
import io
import json
import tarfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from mclr.errors import UserError
from train.files import write_file

INDEX = "index.json"


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
    """The samples of every shard, by its file name; from index.json where that fits the shard, else from the tar file.

    A missing or stale index.json is written anew; where the folder is read-only the index stays in memory.
    Raises UserError naming the shard when a tar file without an index entry is not the one that dataset.json records.
    """
    saved = _saved_index(folder)
    index = {}
    for shard in shards:
        sha256, samples = saved.get(shard.file, ("", []))
        index[shard.file] = samples if sha256 == shard.sha256 else _index_shard(folder, shard)
    if any(saved.get(shard.file) != (shard.sha256, index[shard.file]) for shard in shards):
        record = {shard.file: [shard.sha256, [sample[1:] for sample in index[shard.file]]] for shard in shards}
        with suppress(UserError):
            write_file(folder / INDEX, json.dumps(record, separators=(",", ":")).encode())
    return index


def read_image(folder: Path, sample: Sample, shape: tuple[int, int, int]) -> np.ndarray:
    """One sample's image, uint8 [C, H, W]; UserError naming shard and key when it is damaged or not of this shape."""
    channels, height, width = shape
    place = f"{folder / sample.file}: the image of sample {sample.key}"
    try:
        with open(folder / sample.file, "rb") as stream:
            stream.seek(sample.offset)
            image = Image.open(io.BytesIO(stream.read(sample.size)), formats=["PNG"])
            image.load()
    # a decoder that meets damaged bytes raises nearly anything
    except Exception as error:
        # Pillow names what it read from, here an address in memory
        why = "no PNG file" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{place} is damaged ({why}): copy the shard again, or prepare the dataset again") from error
    mode = {1: "L", 3: "RGB"}[channels]
    if (image.mode, image.size) != (mode, (width, height)):
        raise UserError(f"{place} is {image.mode} {image.width}x{image.height}, but dataset.json says {mode} {width}x{height}")
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def _saved_index(folder: Path) -> dict[str, tuple[str, list[Sample]]]:
    """{shard: (sha256, samples)} of index.json; empty when it is missing or not as we write it: the tar files still know."""
    try:
        record = json.loads((folder / INDEX).read_bytes())
        return {file: (sha256, [Sample(file, *row) for row in rows]) for file, (sha256, rows) in record.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


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
                if kind == "png":
                    place[key] = member.offset_data, member.size
                elif kind == "cls":
                    content = tar.extractfile(member)
                    assert content is not None
                    condition[key] = int(content.read())
    # ValueError: a condition that is no whole number
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged at or after sample {key} ({error}): remove the dataset and prepare it again") from error
    if place.keys() != condition.keys():
        key = min(place.keys() ^ condition.keys())
        raise UserError(f"{path}: sample {key} lacks its .png or its .cls: remove the dataset and prepare it again")
    if len(place) != shard.count:
        raise UserError(
            f"{path}: holds {len(place)} samples, but dataset.json says {shard.count}: remove the dataset and prepare it again"
        )
    return [Sample(shard.file, key, offset, size, condition[key]) for key, (offset, size) in place.items()]
