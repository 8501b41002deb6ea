"""Dataset folders are written: the digits, images of a folder or archive, drawn samples."""

import hashlib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm
from webdataset import TarWriter

from mclr.configs.schema import Data, is_stream
from mclr.errors import UserError
from mclr.train.data.dataset import TOKENS, DatasetInfo, SplitReader, open_dataset
from mclr.train.data.folders import FORMATS, Images, find_images
from mclr.train.data.images import center_crop, convert, open_image
from mclr.train.data.shards import Shard
from mclr.train.data.source import permutation
from mclr.train.system.files import in_memory, new_folder, write_file, write_json

CHUNK = 64


def prepare_digits(out: str | Path) -> DatasetInfo:
    """scikit-learn's 1,797 scanned digits, 8x8 gray, as a dataset folder: 1,500 train and 297 val, split by seed 0.

    Values 0..16 become round(v * 255 / 16). The same dataset at `out` is reused; anything else there is a UserError.
    """
    header = {
        "name": "digits",
        "resolution": 8,
        "channels": 1,
        "num_classes": 10,
        "class_names": tuple("0123456789"),
        "source": "scikit-learn load_digits: optical recognition of handwritten digits (UCI), test part",
        "seed": 0,
    }
    if info := _existing(out, header):
        return info
    # slow to import and used here alone
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * 255 / 16).astype(np.uint8)
    order = permutation(0, 0, len(images)).tolist()
    with new_folder(out) as folder:
        splits = {}
        for split, indices in (("train", order[:1500]), ("val", order[1500:])):
            samples = ((_png(Image.fromarray(images[i])), int(digits.target[i])) for i in _progress(indices, split))
            splits[split] = write_split(folder, split, samples, per_shard=375)
        _finish(folder, header, splits)
    return open_dataset(out)


def open_or_prepare(name: str, path: str | Path) -> DatasetInfo:
    """The dataset folder at `path`; the digits are prepared there on first use."""
    if name == "digits" and not is_stream(str(path)) and not Path(path).exists():
        try:
            return prepare_digits(path)
        except UserError:
            # unless another process has prepared them meanwhile
            if not Path(path, "dataset.json").exists():
                raise
    return open_dataset(path)


def prepare_images(
    src: str | Path,
    out: str | Path,
    resolution: int,
    channels: int = 3,
    val_share: float = 0.1,
    seed: int = 0,
    shard_size: int = 1000,
) -> DatasetInfo:
    """Images, src/CLASS/*.png or others that find_images finds, as a dataset folder: square crops of resolution^2, gray or RGB.

    The images, sorted by name, are put into the order permutation(seed, 0):
    its last val_share is val. The same dataset at `out` is reused. Raises UserError for unusable arguments or folders, and
    when more than 1% of the images cannot be read; up to that share they are named on stderr and left out.
    """
    src, out = Path(src), Path(out)
    if channels not in (1, 3):
        raise UserError(f"channels is {channels}: it must be 1 (gray) or 3 (RGB)")
    if resolution < 1 or shard_size < 1:
        raise UserError(f"resolution is {resolution} and shard size {shard_size}: both must be at least 1")
    if not (0 <= val_share < 1 and 0 <= seed < 2**64):
        raise UserError(f"val share is {val_share} and seed {seed}: the share must be in [0, 1), the seed in [0, 2^64)")
    # resolve() would raise at a loop of links
    if Path(os.path.realpath(src)) in Path(os.path.realpath(out)).parents:
        raise UserError(f"{out} lies inside the images of {src}: choose a place outside")
    images = find_images(src)
    class_names, files = images.class_names, images.files
    num_train = len(files) - round(val_share * len(files))
    if num_train == 0:
        raise UserError(f"{src} has {len(files)} images and a val share of {val_share} leaves none to train on: lower it")
    header = {
        "name": src.resolve().stem if images.archive else src.resolve().name,
        "resolution": resolution,
        "channels": channels,
        "num_classes": len(class_names),
        "class_names": class_names,
        "source": f"{len(files)} images of {src.resolve()} ({images.fingerprint()}), val share {val_share}",
        "seed": seed,
    }
    if info := _existing(out, header):
        return info
    order = permutation(seed, 0, len(files)).tolist()
    unreadable: list[str] = []
    with new_folder(out) as folder:
        splits = {}
        for split, indices in (("train", order[:num_train]), ("val", order[num_train:])):
            samples = _encode(images, [files[i] for i in indices], split, resolution, channels, unreadable)
            splits[split] = write_split(folder, split, samples, shard_size)
        if unreadable:
            names = ", ".join(sorted(unreadable)[:5])
            count = f"{len(unreadable)} of {len(files)} images in {src} cannot be read ({names}{', ...' * (len(unreadable) > 5)})"
            if len(unreadable) > 0.01 * len(files):
                raise UserError(f"{count}, more than 1%: remove or replace them")
            print(f"{count} and are left out", file=sys.stderr)
        _finish(folder, header, splits)
    return open_dataset(out)


def prepare_samples(
    images: list[tuple[Path, int]], tokens: list[Path], out: Path, data: Data, drawn: dict[str, Any]
) -> DatasetInfo:
    """Drawn images (PNG file, condition) as a dataset folder without a val split. data: of the network they were drawn from.

    tokens: of a token model, one file (npy, [L]) per image; drawn: the settings they were drawn by. The same dataset at `out` is reused.
    """
    header = {
        "name": f"samples-{data.name}",
        "resolution": data.resolution,
        "channels": data.channels,
        "num_classes": data.num_classes,
        "class_names": tuple(str(c) for c in range(data.num_classes)),
        "source": f"{len(images)} images drawn by weights {drawn['weights']}",
        "seed": 0,
        "drawn": drawn,
        "tokens": None,
    }
    data_NL = b""
    if tokens:
        data_NL = in_memory(np.save, arr=np.stack([np.load(path, allow_pickle=False) for path in tokens]))
        header["tokens"] = hashlib.sha256(data_NL).hexdigest()
    if info := _existing(out, header):
        return info
    with new_folder(out) as folder:
        if tokens:
            write_file(folder / TOKENS, data_NL)
        samples = ((path.read_bytes(), c) for path, c in images)
        splits = {"train": write_split(folder, "train", samples, 1000), "val": write_split(folder, "val", iter(()), 1000)}
        _finish(folder, header, splits)
    return open_dataset(out)


def write_split(folder: Path, split: str, samples: Iterator[tuple[bytes, int]], per_shard: int) -> dict[str, Any]:
    """Write (PNG file, condition) pairs into folder/split/*.tar; what dataset.json says of the split."""
    (folder / split).mkdir()
    shards: list[Shard] = []
    for first in samples:
        file = f"{split}/{len(shards):06d}.tar"
        count = 0
        # no time stamps, so that the same images give the same shards
        with open(folder / file, "wb") as stream, TarWriter(stream, encoder=False, mtime=0) as tar:
            for png, c in chain([first], islice(samples, per_shard - 1)):
                key = f"{len(shards) * per_shard + count:08d}"
                tar.write({"__key__": key, "png": png, "cls": str(c).encode()})
                count += 1
        with open(folder / file, "rb") as written:
            sha256 = hashlib.file_digest(written, "sha256").hexdigest()
        shards.append(Shard(file, count, (folder / file).stat().st_size, sha256))
    return {"count": sum(shard.count for shard in shards), "shards": [asdict(shard) for shard in shards]}


def _existing(out: str | Path, header: dict[str, Any]) -> DatasetInfo | None:
    """The dataset at `out` if it is the one that `header` describes; None if there is none; UserError if it is another, or out names
    a stream."""
    if is_stream(str(out)):
        raise UserError(f"{out} would be taken for a stream: choose another name for the dataset folder")
    if not os.path.exists(Path(out, "dataset.json")):
        return None
    info = open_dataset(out)
    for name, value in header.items():
        if (found := getattr(info, name)) != value:
            raise UserError(f"{out} already holds another dataset ({name}: {found}): remove it or choose another place")
    return info


def _finish(folder: Path, header: dict[str, Any], splits: dict[str, Any]) -> None:
    """Write dataset.json, read everything back, and leave the index beside it."""
    write_json(folder / "dataset.json", header | {"splits": splits})
    SplitReader(open_dataset(folder), "train")


def _encode(
    images: Images, files: list[tuple[str, int]], split: str, resolution: int, channels: int, unreadable: list[str]
) -> Iterator[tuple[bytes, int]]:
    """(PNG file, condition) of each image that can be read, in order; the others are appended to `unreadable`."""

    def encode(name: str) -> bytes | None:
        try:
            with open_image(images.read(name), FORMATS) as image:
                return _png(center_crop(convert(image, {1: "L", 3: "RGB"}[channels]), resolution))
        # decoders raise nearly anything on bad files; each is counted and reported
        except Exception:
            return None

    names = [name for name, _ in files]
    with ThreadPoolExecutor() as threads:
        # a chunk at a time: whatever the threads have encoded and nobody has written yet sits in memory
        chunks = (names[start : start + CHUNK] for start in range(0, len(names), CHUNK))
        encoded = chain.from_iterable(threads.map(encode, chunk) for chunk in chunks)
        for (name, c), png in zip(_progress(files, split), encoded, strict=True):
            if png is None:
                unreadable.append(name)
            else:
                yield png, c


def _png(image: Image.Image) -> bytes:
    return in_memory(image.save, format="PNG")


def _progress(items: list, split: str) -> tqdm:
    # disable=None: no bar where stderr is not a terminal
    return tqdm(items, split, unit="image", disable=None)
