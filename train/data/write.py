"""Writes dataset folders: of the digits, of images in a folder or zip file, of drawn samples."""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from webdataset import TarWriter

from mclr.configs.schema import Data, is_stream
from mclr.errors import UserError
from mclr.train.data.dataset import TOKENS, UNFINISHED, DatasetInfo, SplitReader, open_dataset
from mclr.train.data.folders import File, Found, Kinds, count, find_images, listed, taken
from mclr.train.data.images import MEGAPIXELS, center_crop, decode, png
from mclr.train.data.shards import Shard
from mclr.train.data.source import permutation
from mclr.train.system.files import in_memory, lock, new_folder, write_file, write_json

CHUNK = 64  # images that are decoded at a time
PER_SHARD = 1000


def prepare_digits(out: str | Path) -> DatasetInfo:
    """scikit-learn's 1,797 scanned digits, 8x8 gray, as a dataset folder: 1,500 train and 297 val, split by seed 0.

    Values 0..16 become round(v * 255 / 16). A dataset of the digits at `out` is reused. Raises UserError where anything else is there.
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
    # slow to import
    from sklearn.datasets import load_digits

    digits = load_digits()
    image_N1HW = np.round(digits.images * 255 / 16).astype(np.uint8)[:, None]
    order = permutation(0, 0, len(image_N1HW)).tolist()
    with new_folder(out) as folder:
        splits = {}
        for split, indices in (("train", order[:1500]), ("val", order[1500:])):
            samples = ((png(image_N1HW[i]), int(digits.target[i])) for i in _progress(indices, split))
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
    if channels not in (1, 3):
        raise UserError(f"channels is {channels}: it must be 1 (gray) or 3 (RGB)")
    if resolution < 1 or shard_size < 1:
        raise UserError(f"resolution is {resolution} and shard size {shard_size}: both must be at least 1")
    if not (0 <= (val_share or 0) < 1 and 0 <= seed < 2**64):
        raise UserError(f"val share is {val_share} and seed {seed}: the share must be in [0, 1), the seed in [0, 2^64)")
    # not resolve(), which raises at a loop of links
    if Path(os.path.realpath(src)) in Path(os.path.realpath(out)).parents:
        raise UserError(f"{out} lies inside the images of {src}: choose a place outside")
    found = find_images(src)
    splits, how = split_images(found, val_share, seed)
    count = sum(map(len, splits.values()))
    header = {
        "name": src.resolve().stem if found.archive else src.resolve().name,
        "resolution": resolution,
        "channels": channels,
        "num_classes": len(found.class_names),
        "class_names": found.class_names,
        "source": f"{count} images of {src.resolve()} ({found.fingerprint()}), {how}",
        "seed": seed,
    }
    if info := _existing(out, header):
        return info
    with _unfinished(out, header | {"shard_size": shard_size, "megapixels": megapixels}) as (folder, state):
        print(*found.said, sep="\n", flush=True)
        note = partial(write_json, folder / UNFINISHED, state)
        for split, files in splits.items():
            made = state["splits"].setdefault(split, {"taken": 0, "shards": []})
            write_split(folder, split, _encode(found, files, split, state), shard_size, made["shards"], note)
        try:
            _refuse_unreadable(src, count, state["unreadable"])
        except UserError:
            shutil.rmtree(folder)
            raise
        _finish(folder, header, {split: made["shards"] for split, made in state["splits"].items()})
    print(taken(src, state["formats"], found.skipped))
    info = open_dataset(out)
    for split in [split for split, made in info.splits.items() if made.count]:
        filled = set(SplitReader(info, split).c_N.tolist())
        if missing := [name for c, name in enumerate(info.class_names) if c not in filled]:
            print(f"{len(missing)} of {info.num_classes} classes have no image in {split}, like {missing[0]}", file=sys.stderr)
    return info


def _refuse_unreadable(src: Path, count: int, unreadable: Kinds) -> None:
    """Say how many of `count` images cannot be read, and why. Raises UserError where they are more than 1%."""
    bad = sum(n for n, _ in unreadable.values())
    says = f"{bad} of {count} images in {src} cannot be read: {listed(unreadable)}"
    if bad > 0.01 * count:
        raise UserError(f"{says}; that is more than 1%: remove or replace them")
    if bad:
        print(f"{says}; they are left out", file=sys.stderr)


def split_images(found: Found, val_share: float | None, seed: int) -> tuple[dict[str, list[File]], str]:
    """(the images of train and of val in the order in which they are written, how they were split).

    Splits of the folder's own are kept. Else all images are shuffled by the seed, and the last val_share (default 0.1) of them is val;
    of each class at least one image goes to train. Raises UserError where no image is left to train on.
    """

    def shuffled(files: list[File]) -> list[File]:
        return [files[i] for i in permutation(seed, 0, len(files)).tolist()]

    if found.held_out is not None:
        if val_share is not None:
            raise UserError(f"{found.src} has splits of its own: leave out the val share")
        return {"train": shuffled(found.files), "val": shuffled(found.held_out)}, "splits of its own"
    val_share = 0.1 if val_share is None else val_share
    files = shuffled(found.files)
    num_train = len(files) - round(val_share * len(files))
    if num_train == 0:
        raise UserError(f"{found.src} has {len(files)} images and a val share of {val_share} leaves none to train on: lower it")
    train, trained = files[:num_train], {c for _, c in files[:num_train]}
    val: list[File] = []
    for file in files[num_train:]:
        (val if file[1] in trained else train).append(file)
        trained.add(file[1])
    return {"train": train, "val": val}, f"val share {val_share}"


@contextmanager
def _unfinished(out: Path, header: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(the folder at `out`, the state of its making, which UNFINISHED there holds). At the end UNFINISHED is removed.

    A stopped run leaves its finished shards and UNFINISHED. The next run goes on from there if its header is the same, else it begins
    anew.
    """
    header = json.loads(json.dumps(header))
    begun: dict[str, Any] = {"header": header, "formats": {}, "unreadable": {}, "splits": {}}
    if not (out / UNFINISHED).is_file():
        with new_folder(out) as folder:
            write_json(folder / UNFINISHED, begun)
    out = Path(os.path.realpath(out))
    with ExitStack() as stack:
        # some file systems have no locks
        with suppress(OSError):
            held, ours = lock(out / "lock")
            stack.enter_context(held)
            if not ours or (out / "dataset.json").exists():
                raise UserError(f"another process makes {out}: wait for it, or choose another place")
        state: dict[str, Any] = {}
        with suppress(ValueError):
            state = json.loads((out / UNFINISHED).read_bytes())
        if state.get("header") != header:
            print(f"{out} holds an unfinished dataset of other images or settings: it is begun anew", flush=True)
            for split in ("train", "val"):
                shutil.rmtree(out / split, ignore_errors=True)
            state = begun
        for torn in out.glob("**/.tmp-*"):
            torn.unlink()
        if shards := sum(len(made["shards"]) for made in state["splits"].values()):
            print(f"{out}: going on after {shards} finished shards", flush=True)
        try:
            yield out, state
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            raise UserError(f"cannot write {out} ({error.strerror}): make room, and the same command goes on") from error
        for name in (UNFINISHED, "lock"):
            (out / name).unlink(missing_ok=True)


def prepare_samples(
    images: list[tuple[Path, int]], tokens: list[Path], out: Path, data: Data, drawn: dict[str, Any]
) -> DatasetInfo:
    """Write drawn images (PNG file, condition) as a dataset folder with an empty val split. The same dataset at `out` is reused.

    data: the data of the network that drew them; drawn: the settings of the drawing; tokens: if a token model drew them, one file for each
    image (npy, [L]).
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
        _finish(folder, header, {"train": write_split(folder, "train", samples), "val": []})
    return open_dataset(out)


def write_split(
    folder: Path,
    split: str,
    samples: Iterator[tuple[bytes, int]],
    per_shard: int = PER_SHARD,
    shards: list[dict[str, Any]] | None = None,
    finished: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """Write (PNG file, condition) pairs into folder/split/*.tar; returns what dataset.json says of each shard.

    shards: those that an earlier run has finished, to which new ones are added. finished: called after each new one.
    """
    (folder / split).mkdir(exist_ok=True)
    shards = [] if shards is None else shards
    for first in samples:
        file, begun = f"{split}/{len(shards):06d}.tar", folder / split / f".tmp-{os.getpid()}"
        count = 0
        try:
            # no time stamps: the same images give the same shards
            with open(begun, "wb") as stream, TarWriter(stream, encoder=False, mtime=0) as tar:
                for png, c in chain([first], islice(samples, per_shard - 1)):
                    key = f"{len(shards) * per_shard + count:08d}"
                    tar.write({"__key__": key, "png": png, "cls": str(c).encode()})
                    count += 1
            with open(begun, "rb") as written:
                sha256 = hashlib.file_digest(written, "sha256").hexdigest()
                os.fsync(written.fileno())
            os.replace(begun, folder / file)
        finally:
            begun.unlink(missing_ok=True)
        shards.append(asdict(Shard(file, count, (folder / file).stat().st_size, sha256)))
        finished()
    return shards


def _existing(out: str | Path, header: dict[str, Any]) -> DatasetInfo | None:
    """The dataset at `out`, None where there is none. Raises UserError where `header` describes another one, or `out` names a stream."""
    if is_stream(str(out)):
        raise UserError(f"{out} would be taken for a stream: choose another name for the dataset folder")
    if not os.path.exists(Path(out, "dataset.json")):
        return None
    info = open_dataset(out)
    for name, value in header.items():
        if (found := getattr(info, name)) != value:
            raise UserError(f"{out} already holds another dataset ({name}: {found}): remove it or choose another place")
    return info


def _finish(folder: Path, header: dict[str, Any], shards: dict[str, list[dict[str, Any]]]) -> None:
    """Write dataset.json with the shards of each split, check all shards, and write their index."""
    splits = {split: {"count": sum(shard["count"] for shard in made), "shards": made} for split, made in shards.items()}
    write_json(folder / "dataset.json", header | {"splits": splits})
    SplitReader(open_dataset(folder), "train")


def _encode(found: Found, files: list[File], split: str, state: dict[str, Any]) -> Iterator[tuple[bytes, int]]:
    """(PNG file, condition) of each readable image, in order. Begins after those that `state` says were taken, and counts there."""
    header = state["header"]

    def encode(name: str) -> tuple[bytes, str] | Exception:
        try:
            image, kind = decode(found.read(name), name, header["channels"], header["megapixels"])
            return in_memory(center_crop(image, header["resolution"]).save, format="PNG"), kind
        # decoders raise nearly anything on bad files
        except Exception as error:
            return error

    made = state["splits"][split]
    files = files[made["taken"] :]
    with ThreadPoolExecutor() as threads:
        # a chunk at a time: what is encoded and not yet written fills memory
        chunks = ([name for name, _ in files[start : start + CHUNK]] for start in range(0, len(files), CHUNK))
        encoded = chain.from_iterable(threads.map(encode, chunk) for chunk in chunks)
        for (name, c), result in zip(_progress(files, split), encoded, strict=True):
            made["taken"] += 1
            if isinstance(result, Exception):
                why = result.strerror if isinstance(result, OSError) and result.strerror else str(result)
                # names and numbers are removed, so that the same reason is counted as one
                count(state["unreadable"], re.sub(r" *(\(.*?\)|'.*?')", "", why) or type(result).__name__, name)
            else:
                state["formats"][result[1]] = state["formats"].get(result[1], 0) + 1
                yield result[0], c


def _progress(items: list, split: str) -> tqdm:
    # disable=None: no bar where stderr is not a terminal
    return tqdm(items, split, unit="image", disable=None)
