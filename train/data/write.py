"""Writes dataset folders: of the digits, of images in a folder or zip file, of drawn samples."""

import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from webdataset import TarWriter

from mclr.configs.schema import DATASET, UNFINISHED, Data, DatasetInfo, Shard, is_stream
from mclr.errors import UserError
from mclr.train.data.dataset import TOKENS, SplitReader, open_dataset
from mclr.train.data.folders import File, Found, find_images, listed, taken
from mclr.train.data.images import MEGAPIXELS, center_crop, decode, png
from mclr.train.data.source import permutation
from mclr.train.system.files import in_memory, lock, new_folder, write_file, write_json

CHUNK = 64  # images that are decoded at a time
PER_SHARD = 1000
Encoded = tuple[bytes, int]  # PNG file, condition


def prepare_digits(out: str | Path) -> DatasetInfo:
    """scikit-learn's 1,797 scanned digits, 8x8 gray, as a dataset folder: 1,500 train and 297 val, split by seed 0.

    Values 0..16 become round(v * 255 / 16). A dataset of the digits at `out` is reused. Raises UserError where anything else is there.
    """
    source = "scikit-learn load_digits: optical recognition of handwritten digits (UCI), test part"
    header = _header("digits", 8, 1, tuple("0123456789"), source)
    return _write(out, header, {"train": _digits(slice(1500)), "val": _digits(slice(1500, None))}, 375)


def _digits(which: slice) -> Iterator[Encoded]:
    # slow to import
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i in permutation(0, 0, len(digits.images))[which].tolist():
        yield png(np.round(digits.images[i] * 255 / 16).astype(np.uint8)[None]), int(digits.target[i])


def open_or_prepare(name: str, path: str | Path) -> DatasetInfo:
    """The dataset folder at `path`; the digits are prepared there on first use."""
    if name == "digits" and not is_stream(str(path)) and not Path(path).exists():
        try:
            return prepare_digits(path)
        except UserError:
            # unless another process has prepared them meanwhile
            if not Path(path, DATASET).exists():
                raise
    return open_dataset(path)


def prepare_images(
    src: str | Path,
    out: str | Path,
    resolution: int,
    channels: int = 3,
    val_share: float | None = None,
    seed: int = 0,
    shard_size: int = PER_SHARD,
    megapixels: float = MEGAPIXELS,
) -> DatasetInfo:
    """Write the images that find_images finds as a dataset folder of square crops.

    The same dataset at `out` is reused. After an interruption the same call goes on after the last finished shard. Unreadable images are
    left out, and the reason is printed. Raises UserError for unusable arguments or folders, and where more than 1% of the images are
    unreadable. Many parameters: one for each option of `mclr prepare images`.
    """
    src, out = Path(src), Path(out)
    if not (0 <= (val_share or 0) < 1 and 0 <= seed < 2**64):
        raise UserError(f"val share is {val_share} and seed {seed}: the share must be in [0, 1), the seed in [0, 2^64)")
    if not (0 < resolution <= 2**16 and channels in (1, 3) and shard_size > 0):
        given = f"resolution {resolution}, channels {channels}, shard size {shard_size}"
        raise UserError(f"{given}: 1 to {2**16} pixels, 1 or 3 channels and 1 or more images per shard are possible")
    # not resolve(), which raises at a loop of links
    place = Path(os.path.realpath(out))
    if Path(os.path.realpath(src)) in place.parents:
        raise UserError(f"{out} lies inside the images of {src}: choose a place outside")
    found = find_images(src)
    splits, how = split_images(found, val_share, seed)
    number = sum(map(len, splits.values()))
    source = f"{number} images of {src.resolve()} ({found.fingerprint()}), {how}"
    header = _header(place.name, resolution, channels, found.class_names, source, seed)
    if info := _existing(out, header):
        return info
    with _unfinished(out, header | {"shard_size": shard_size, "megapixels": megapixels}) as state:
        print(*found.said, sep="\n", flush=True)
        for split, files in splits.items():
            made = state["splits"].setdefault(split, {"taken": 0, "shards": []})
            for shard in _write_split(out, split, _encode(found, files, split, state), shard_size, len(made["shards"])):
                made["shards"].append(shard)
                write_json(out / UNFINISHED, state)
        unreadable = state["unreadable"]
        bad = sum(map(len, unreadable.values()))
        says = f"{bad} of {number} images in {src} cannot be read: {listed(unreadable)}"
        if bad > 0.01 * number:
            shutil.rmtree(place)
            raise UserError(f"{says}; that is more than 1%: remove or replace them")
        if bad:
            print(f"{says}; they are left out", file=sys.stderr)
        info = _finish(out, header, {split: made["shards"] for split, made in state["splits"].items()})
    print(taken(src, state["formats"], found.tree.skipped))
    lost = {name for names in unreadable.values() for name in names}
    for split, files in splits.items():
        missing = sorted(set(range(info.num_classes)) - {c for name, c in files if name not in lost})
        if files and missing:
            like = info.class_names[missing[0]]
            print(f"{len(missing)} of {info.num_classes} classes have no image in {split}, like {like}", file=sys.stderr)
    return info


def split_images(found: Found, val_share: float | None, seed: int) -> tuple[dict[str, list[File]], str]:
    """(the images of train and of val in the order in which they are written, how they were split).

    Splits of the folder's own are kept. Else all images are shuffled by the seed, and the last val_share (default 0.1) of them is val;
    of each class at least one image goes to train. Raises UserError where no image is left to train on.
    """

    def shuffled(files: list[File]) -> list[File]:
        return [files[i] for i in permutation(seed, 0, len(files)).tolist()]

    if found.held_out is not None:
        if val_share is not None:
            raise UserError(f"{found.tree.src} has splits of its own: leave out the val share")
        return {"train": shuffled(found.files), "val": shuffled(found.held_out)}, "splits of its own"
    val_share = 0.1 if val_share is None else val_share
    files = shuffled(found.files)
    num_train = len(files) - round(val_share * len(files))
    if num_train == 0:
        raise UserError(
            f"a val share of {val_share} leaves none of the {len(files)} images of {found.tree.src} to train on: lower it"
        )
    train, trained = files[:num_train], {c for _, c in files[:num_train]}
    val: list[File] = []
    for file in files[num_train:]:
        (val if file[1] in trained else train).append(file)
        trained.add(file[1])
    return {"train": train, "val": val}, f"val share {val_share}"


@contextmanager
def _unfinished(out: Path, header: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The state of the dataset that is made at `out`, as UNFINISHED there holds it until the end.

    A stopped run leaves its finished shards and UNFINISHED, from where a run with the same header goes on. Raises UserError for another.
    """
    state = json.loads(json.dumps({"header": header, "formats": {}, "unreadable": {}, "splits": {}}))
    if not (out / UNFINISHED).is_file():
        with new_folder(out) as folder:
            write_json(folder / UNFINISHED, state)
    held, ours = lock(out / "lock", none=True)
    with held:
        if not ours or (out / DATASET).exists():
            raise UserError(f"another process makes {out}: wait for it, or choose another place")
        begun: dict[str, Any] = {}
        with suppress(ValueError):
            begun = json.loads((out / UNFINISHED).read_bytes())
        if begun.get("header") != state["header"]:
            raise UserError(f"{out} holds an unfinished dataset of other images or settings: remove it, or choose another place")
        state = begun
        for torn in out.glob("**/.tmp-*"):
            torn.unlink()
        if shards := sum(len(made["shards"]) for made in state["splits"].values()):
            print(f"{out}: going on after {shards} finished shards", flush=True)
        yield state
        for name in (UNFINISHED, "lock"):
            (out / name).unlink(missing_ok=True)


def prepare_samples(
    images: list[tuple[Path, int]], tokens: list[Path], out: Path, data: Data, drawn: dict[str, Any]
) -> DatasetInfo:
    """Write drawn images (PNG file, condition) as a dataset folder with an empty val split. The same dataset at `out` is reused.

    data: the data of the network that drew them; drawn: the settings of the drawing; tokens: if a token model drew them, one file for each
    image (npy, [L]).
    """
    source = f"{len(images)} images drawn by weights {drawn['weights']}"
    names = tuple(map(str, range(data.num_classes)))
    header = _header(f"samples-{data.name}", data.resolution, data.channels, names, source) | {"drawn": drawn, "tokens": None}
    drawn_NL = b""
    if tokens:
        drawn_NL = in_memory(np.save, arr=np.stack([np.load(path, allow_pickle=False) for path in tokens]))
        header["tokens"] = hashlib.sha256(drawn_NL).hexdigest()
    samples = ((path.read_bytes(), c) for path, c in images)
    return _write(out, header, {"train": samples, "val": iter(())}, PER_SHARD, drawn_NL)


def _header(name: str, resolution: int, channels: int, names: tuple[str, ...], source: str, seed: int = 0) -> dict[str, Any]:
    """What dataset.json says of all samples."""
    image = {"name": name, "resolution": resolution, "channels": channels, "num_classes": len(names)}
    return image | {"class_names": names, "source": source, "seed": seed}


def _existing(out: str | Path, header: dict[str, Any]) -> DatasetInfo | None:
    """The dataset at `out`, None where there is none. Raises UserError where `header` describes another one, or `out` names a stream."""
    if is_stream(str(out)):
        raise UserError(f"{out} would be taken for a stream: choose another name for the dataset folder")
    if not os.path.exists(Path(out, DATASET)):
        return None
    info = open_dataset(out)
    for key, value in header.items():
        # a dataset folder may be renamed
        if key != "name" and (found := getattr(info, key)) != value:
            raise UserError(f"{out} already holds another dataset ({key}: {found}): remove it or choose another place")
    return info


def _write(
    out: str | Path, header: dict[str, Any], splits: dict[str, Iterator[Encoded]], per_shard: int, tokens: bytes = b""
) -> DatasetInfo:
    """Write a dataset folder as a whole. The same dataset at `out` is reused."""
    if info := _existing(out, header):
        return info
    with new_folder(out) as folder:
        if tokens:
            write_file(folder / TOKENS, tokens)
        _finish(folder, header, {name: list(_write_split(folder, name, each, per_shard)) for name, each in splits.items()})
    return open_dataset(out)


def _write_split(
    folder: Path, split: str, samples: Iterator[Encoded], per_shard: int, begun: int = 0
) -> Iterator[dict[str, Any]]:
    """Write samples into folder/split/*.tar after the shards that an earlier run has begun with: what dataset.json says of each."""
    (folder / split).mkdir(exist_ok=True)
    for number, first in enumerate(samples, begun):
        file, keys = f"{split}/{number:06d}.tar", list[str]()
        sha256 = write_file(folder / file, _tar(chain([first], islice(samples, per_shard - 1)), number * per_shard, keys))
        yield Shard(file=file, count=len(keys), bytes=(folder / file).stat().st_size, sha256=sha256).model_dump()


def _tar(samples: Iterable[Encoded], start: int, keys: list[str]) -> Iterator[bytes]:
    """A shard, a sample at a time. keys: gets the key of each sample; the first is `start`."""
    buffer = io.BytesIO()
    # no time stamps: the same images give the same shards
    with TarWriter(buffer, encoder=False, mtime=0) as tar:
        for png, c in samples:
            keys.append(f"{start + len(keys):08d}")
            tar.write({"__key__": keys[-1], "png": png, "cls": str(c).encode()})
            yield buffer.getvalue()
            buffer.seek(0)
            buffer.truncate()
    yield buffer.getvalue()


def _finish(folder: Path, header: dict[str, Any], shards: dict[str, list[dict[str, Any]]]) -> DatasetInfo:
    """Write dataset.json with the shards of each split, check all shards, and write their index."""
    splits = {split: {"count": sum(shard["count"] for shard in made), "shards": made} for split, made in shards.items()}
    write_json(folder / DATASET, header | {"splits": splits})
    return SplitReader(open_dataset(folder), "train").info


def _encode(found: Found, files: list[File], split: str, state: dict[str, Any]) -> Iterator[Encoded]:
    """Each readable image, in order. Begins after those that `state` says were taken, and counts there."""
    header, made = state["header"], state["splits"][split]

    def encode(name: str) -> tuple[bytes, str] | Exception:
        try:
            image, kind = decode(found.tree.read(name), name, header["channels"], header["megapixels"])
            return in_memory(center_crop(image, header["resolution"]).save, format="PNG"), kind
        # decoders raise nearly anything on bad files
        except Exception as error:
            return error

    files = files[made["taken"] :]
    with ThreadPoolExecutor() as threads:
        # a chunk at a time: what is encoded and not yet written fills memory
        chunks = ([name for name, _ in files[start : start + CHUNK]] for start in range(0, len(files), CHUNK))
        encoded = chain.from_iterable(threads.map(encode, chunk) for chunk in chunks)
        # disable=None: no bar where stderr is not a terminal
        for (name, c), result in zip(tqdm(files, split, unit="image", disable=None), encoded, strict=True):
            made["taken"] += 1
            if isinstance(result, Exception):
                why = result.strerror if isinstance(result, OSError) and result.strerror else str(result)
                # names and numbers are removed, so that the same reason is counted as one
                why = re.sub(r" *(\(.*?\)|'.*?')", "", why) or type(result).__name__
                state["unreadable"].setdefault(why, []).append(name)
            else:
                state["formats"][result[1]] = state["formats"].get(result[1], 0) + 1
                yield result[0], c
