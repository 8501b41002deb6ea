"""Sets of uint8 images, read a batch at a time from a folder, an .npz file, a dataset folder or memory.

N images of a set; B of a batch; C H W image.
"""

import hashlib
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mclr.configs.schema import DatasetInfo
from mclr.errors import UserError
from mclr.train.data.dataset import SplitReader
from mclr.train.data.folders import images_below, taken
from mclr.train.data.images import condition_of, format_of, image_paths, read_images
from mclr.train.system.files import checksum, regular

JPEG = {"JPEG", "MPO"}


@dataclass(frozen=True)
class ImageSet:
    """N images of one shape (C, H, W) in a fixed order.

    read(first, end): uint8 [B, C, H, W]; callers ask in rising order. c_N: conditions, None if they are unknown. checksum: of the images
    and their conditions. jpeg: some images are JPEG files. found: one line that says what was taken from a folder and what was skipped.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]
    checksum: Callable[[], str]
    c_N: Tensor | None = None
    jpeg: bool = False
    found: str = ""


def in_memory_images(image_NCHW: Tensor, c_N: Tensor) -> ImageSet:
    return ImageSet(
        "memory", len(image_NCHW), tuple(image_NCHW.shape[1:]), lambda first, end: image_NCHW[first:end], lambda: "memory", c_N
    )


def find_images(folder: Path) -> list[Path]:
    """The images of a folder of samples, in the order of their seeds; of another folder all images below it, by path."""
    if not folder.is_dir():
        return []
    return image_paths(folder) or [folder / name for name in images_below(folder)[0]]


def open_folder(folder: Path, with_conditions: bool) -> ImageSet:
    """The images of a folder. with_conditions: read conditions from names like NAME-CONDITION.png; None if no name has one.

    Raises UserError if the folder is empty, or if only some names have a condition; on reading, if an image is unreadable or not of the
    shape of the first.
    """
    paths, found, formats = image_paths(folder), "", Counter[str]()
    if not paths:
        names, skipped = images_below(folder)
        paths = [folder / name for name in names]
        formats.update(format_of(path) or "unreadable" for path in paths)
        found = taken(folder, formats, skipped)
    if not paths:
        raise UserError(f"{folder} holds no images: give another folder")
    shape = read_images(paths[:1]).shape[1:]
    # NAME-CONDITION
    some_named = with_conditions and any(re.fullmatch(r".+-\d+", path.stem, re.DOTALL) for path in paths)
    c_N = torch.tensor([condition_of(path) for path in paths]) if some_named else None

    def read(first: int, end: int) -> Tensor:
        images_BCHW = read_images(paths[first:end])
        if images_BCHW.shape[1:] != shape:
            raise UserError(f"{paths[first]} is of shape {images_BCHW.shape[1:]}, the images before it of {shape}: remove it")
        return torch.from_numpy(images_BCHW)

    @cache
    def checksum_of_all() -> str:
        sums = hashlib.sha256()
        for path in paths:
            sums.update(os.fsencode(f"{path.name}\n") + hashlib.sha256(path.read_bytes()).digest())
        return sums.hexdigest()

    return ImageSet(str(folder), len(paths), shape, read, checksum_of_all, c_N, not JPEG.isdisjoint(formats), found)


def npz_names(path: Path) -> list[str]:
    """Names of the arrays in an .npz file. Raises UserError if it is not one."""
    try:
        with zipfile.ZipFile(regular(path)) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no readable .npz file ({error}): give another") from error


def open_npz(path: Path) -> ImageSet:
    """The images of an .npz file in ADM's layout: arr_0 uint8 [N, H, W, C], and perhaps conditions arr_1.

    Images stay in the file until they are read. Raises UserError for other content, and on reading damaged bytes.
    """
    advice = "write it again by numpy.savez(FILE, images, conditions)"
    damaged = f"{path} is no readable .npz of arr_0 (uint8 NHWC) and, if known, arr_1 (conditions): {advice}"
    try:
        # the file stays open while images are read
        file = zipfile.ZipFile(path).open("arr_0.npy")  # noqa: SIM115
        read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        shape, by_columns, dtype = read_header[np.lib.format.read_magic(file)[0]](file)
        start = file.tell()
        with np.load(path) as arrays:
            conditions = arrays["arr_1"] if "arr_1" in arrays.files else None
    # decoders raise almost any error on damaged bytes, and numpy's advice does not fit here
    except Exception as error:
        raise UserError(damaged) from error
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or not shape[0] or by_columns:
        raise UserError(f"the images of {path} are {dtype} of shape {shape}, not uint8 of (N, H, W, 1 or 3): {advice}")
    count, H, W, C = shape
    if conditions is not None and (
        conditions.shape != (count,) or not np.issubdtype(conditions.dtype, np.integer) or not (conditions >= 0).all()
    ):
        raise UserError(f"the conditions of {path} are not one whole number per image: {advice}")

    def read(first: int, end: int) -> Tensor:
        try:
            file.seek(start + first * H * W * C)
            data = file.read((end - first) * H * W * C)
            image_BHWC = np.frombuffer(data, np.uint8).reshape(end - first, H, W, C)
        except Exception as error:
            raise UserError(damaged) from error
        return torch.from_numpy(image_BHWC.transpose(0, 3, 1, 2).copy())

    c_N = None if conditions is None else torch.from_numpy(conditions.astype(np.int64))
    return ImageSet(str(path), count, (C, H, W), read, lambda: checksum(path), c_N)


def open_splits(info: DatasetInfo, splits: tuple[str, ...]) -> ImageSet:
    """The images of these splits of a dataset, one split after the other."""
    readers = [SplitReader(info, split) for split in splits]
    where = [(reader, i) for reader in readers for i in range(len(reader.samples))]

    def read(first: int, end: int) -> Tensor:
        parts = [[i for owner, i in where[first:end] if owner is reader] for reader in readers]
        return torch.cat([reader.images(part) for reader, part in zip(readers, parts, strict=True) if part])

    sums = [shard.sha256 for split in splits for shard in info.splits[split].shards]
    return ImageSet(
        info.name,
        len(where),
        info.image_shape,
        read,
        lambda: hashlib.sha256("".join(sums).encode()).hexdigest(),
        torch.cat([reader.c_N for reader in readers]),
    )
