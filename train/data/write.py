"""Dataset folders are written: the digits, images of a folder or archive, drawn samples."""

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
from PIL import Image
from tqdm import tqdm
from webdataset import TarWriter

from mclr.configs.schema import Data, is_stream
from mclr.errors import UserError
from mclr.train.data.dataset import TOKENS, UNFINISHED, DatasetInfo, SplitReader, open_dataset
from mclr.train.data.folders import File, Found, Kinds, count, find_images, listed, taken
from mclr.train.data.images import MEGAPIXELS, center_crop, decode
from mclr.train.data.shards import Shard
from mclr.train.data.source import permutation
from mclr.train.system.files import in_memory, lock, new_folder, write_file, write_json

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
    val_share: float | None = None,
    seed: int = 0,
    shard_size: int = 1000,
    megapixels: float = MEGAPIXELS,
) -> DatasetInfo:
    """The images that find_images finds, as a dataset folder of square crops; the arguments are those of `mclr prepare images`.

    The same dataset at `out` is reused, and a run that was stopped goes on after its last finished shard. Raises UserError for unusable
    arguments or folders, and when more than 1% of the images cannot be read; up to that share they are left out, with the reason on
    stderr. Many parameters: one for each option of the command.
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
        for split, files in splits.items():
            made = state["splits"].setdefault(split, {"taken": 0, "shards": []})
            samples = _encode(found, files, split, header, megapixels, state)
            write_split(folder, split, samples, shard_size, made["shards"], partial(write_json, folder / UNFINISHED, state))
        try:
            _refuse_unreadable(src, count, state["unreadable"])
        except UserError:
            shutil.rmtree(folder)
            raise
        _finish(folder, header, {split: split_record(made["shards"]) for split, made in state["splits"].items()})
    print(taken(src, state["formats"], found.skipped))
    info = open_dataset(out)
    for split in ("train", "val") if val_share != 0 else ("train",):
        filled = set(SplitReader(info, split).c_N.tolist()) if info.splits[split].count else set()
        if missing := [name for c, name in enumerate(info.class_names) if c not in filled]:
            print(f"{len(missing)} of {info.num_classes} classes have no image in {split}, like {missing[0]}", file=sys.stderr)
    return info


def _refuse_unreadable(src: Path, count: int, unreadable: Kinds) -> None:
    """Say which of `count` images cannot be read, and why. Raises UserError where they are more than 1%."""
    bad = sum(n for n, _ in unreadable.values())
    says = f"{bad} of {count} images in {src} cannot be read: {listed(unreadable)}"
    if bad > 0.01 * count:
        raise UserError(f"{says}; that is more than 1%: remove or replace them")
    if bad:
        print(f"{says}; they are left out", file=sys.stderr)


def split_images(found: Found, val_share: float | None, seed: int) -> tuple[dict[str, list[File]], str]:
    """(the images of train and of val as they are written, how they were split).

    They are put into the order permutation(seed, 0): the last val_share (default .1) is val, but every class keeps an image in train.
    Where the folder has splits of its own, those are taken. Raises UserError where no image is left to train on.
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
    """(the folder at `out`, the state of its making, as UNFINISHED there holds it). At the end UNFINISHED is removed.

    A stopped run leaves its finished shards and UNFINISHED. The next run with the same header goes on from there, one with another header
    begins anew.
    """
    header = json.loads(json.dumps(header))
    begun: dict[str, Any] = {"header": header, "formats": {}, "unreadable": {}, "splits": {}}
    if not (out / UNFINISHED).is_file():
        with new_folder(out) as folder:
            write_json(folder / UNFINISHED, begun)
    out = Path(os.path.realpath(out))
    with ExitStack() as stack:
        # a file system may have no locks
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


def write_split(
    folder: Path,
    split: str,
    samples: Iterator[tuple[bytes, int]],
    per_shard: int,
    shards: list[dict[str, Any]] | None = None,
    finished: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Write (PNG file, condition) pairs into folder/split/*.tar; returns what dataset.json says of the split.

    shards: those that an earlier run has finished; new ones are added. finished: called after each.
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
    return split_record(shards)


def split_record(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """What dataset.json says of a split with these shards."""
    return {"count": sum(shard["count"] for shard in shards), "shards": shards}


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
    found: Found, files: list[File], split: str, header: dict[str, Any], megapixels: float, state: dict[str, Any]
) -> Iterator[tuple[bytes, int]]:
    """(PNG file, condition) of each image that can be read, in order, after those that `state` says were taken; it counts all of them."""

    def encode(name: str) -> tuple[bytes, str] | Exception:
        try:
            image, kind = decode(found.read(name), name, header["channels"], megapixels)
            return _png(center_crop(image, header["resolution"])), kind
        # decoders raise nearly anything on bad files; each is counted and reported
        except Exception as error:
            return error

    files, made = files[state["splits"][split]["taken"] :], state["splits"][split]
    with ThreadPoolExecutor() as threads:
        # a chunk at a time: memory holds what the threads have encoded and nobody has written yet
        chunks = ([name for name, _ in files[start : start + CHUNK]] for start in range(0, len(files), CHUNK))
        encoded = chain.from_iterable(threads.map(encode, chunk) for chunk in chunks)
        for (name, c), result in zip(_progress(files, split), encoded, strict=True):
            made["taken"] += 1
            if isinstance(result, Exception):
                why = result.strerror if isinstance(result, OSError) and result.strerror else str(result)
                # one kind, whatever name or number of bytes the message adds
                count(state["unreadable"], re.sub(r" *(\(.*?\)|'.*?')", "", why) or type(result).__name__, name)
            else:
                state["formats"][result[1]] = state["formats"].get(result[1], 0) + 1
                yield result[0], c


def _png(image: Image.Image) -> bytes:
    return in_memory(image.save, format="PNG")


def _progress(items: list, split: str) -> tqdm:
    # disable=None: no bar where stderr is not a terminal
    return tqdm(items, split, unit="image", disable=None)
