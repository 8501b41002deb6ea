"""The folder of samples: images, the record of how they were made, npz and dataset."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mclr.configs.schema import Data, Sample
from mclr.errors import UserError
from mclr.next_scale import NextScale
from mclr.train.data.images import condition_of, image_grid, image_paths, png, read_images
from mclr.train.data.write import prepare_samples
from mclr.train.sampling.generate import Model
from mclr.train.system.console import progress_bar
from mclr.train.system.files import CannotWrite, in_memory, regular, write_file, write_json
from mclr.train.system.ranks import collective, from_rank_0, world
from mclr.train.training.networks import schedule_table

CHUNK = 1024  # images read at a time
MOST_IMAGES = 10_000_000  # of one call, each a file


def draw(
    load: Callable[[], Model], record: dict[str, Any], out: Path, conditions: list[int], seeds: range, keep_tokens: bool = False
) -> dict[str, Any]:
    """Write the images of these seeds that `out` does not hold yet, its contact sheet and its sample.json. Returns the settings.

    The image of a seed depends on its seed, its condition conditions[seed % len] and the generator alone: it always has the place
    seed % batch of a full micro-batch. The ranks of a process group all call this and share the micro-batches.
    load, record: the generator, and what record_of says of it. keep_tokens: of a token model, also write what was drawn, before it is
    decoded. Raises UserError when `out` cannot be written, or holds images made otherwise.
    """
    count = seeds.stop - seeds.start  # len() of a long range overflows
    if not 1 <= count <= MOST_IMAGES or not 0 <= seeds.start < 2**63:
        raise UserError(
            f"{count} images from seed {seeds.start}: draw 1 to {MOST_IMAGES} at a time, from a seed of 0 to 2^63 - 1"
        )
    paths = {s: out / "images" / f"{s:06d}-{conditions[s % len(conditions)]}.png" for s in seeds}
    settings = record["settings"] | {"conditions": conditions, "seed": seeds[0]}
    record = record | {"settings": settings, "count": count}
    rank, missing = world()[0] if dist.is_initialized() else 0, {}
    with collective():
        # Only rank 0 looks: others might look when there are new images already.
        if rank == 0:
            refuse_other(out, record)
            missing = {s: p for s, p in paths.items() if not p.exists() or (keep_tokens and not token_path(p).exists())}
    missing = from_rank_0(missing)
    said = f"{out} is complete: {count} images of these settings; nothing to draw"
    if missing:
        try:
            said = draw_missing(load, record, missing, out, keep_tokens)
        except KeyboardInterrupt:
            there = sum(path.exists() for path in paths.values())
            raise KeyboardInterrupt(f"{out} holds {there} of {len(paths)} images; the same command draws the rest") from None
    if rank == 0:
        if missing or not (out / "grid.png").exists():  # stopped just before it
            write_file(out / "grid.png", contact_sheet(list(paths.values()), columns=len(conditions)))
        print(said)
    return settings


def draw_missing(
    load: Callable[[], Model], record: dict[str, Any], missing: dict[int, Path], out: Path, keep_tokens: bool
) -> str:
    """Draw these seeds, write their images and sample.json. missing: seed -> path of its image. Returns what was done, in words."""
    rank, _, ranks = world() if dist.is_initialized() else (0, 0, 1)
    with collective():
        model = load().counted()
        if rank == 0:
            try:
                for folder in ("images", "tokens") if keep_tokens else ("images",):
                    (out / folder).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CannotWrite(out, error) from error
            write_json(out / "sample.json", record)
            # what was made from fewer images
            (out / "samples.npz").unlink(missing_ok=True)
            shutil.rmtree(out / "dataset", ignore_errors=True)
    # a block: the missing seeds of one micro-batch; a turn: one block for every rank, the last one perhaps for some
    blocks = [dict(block) for _, block in groupby(missing.items(), lambda item: item[0] // model.batch)]
    turns = [blocks[first : first + ranks] for first in range(0, len(blocks), ranks)]
    with progress_bar(len(missing), begun=0, quiet=rank != 0) as bar:
        for turn in turns:
            with collective():
                for block in turn[rank : rank + 1]:
                    draw_block(model, block, record["settings"]["conditions"], keep_tokens)
            # The images of a micro-batch come all at once.
            bar.update(sum(map(len, turn)))
    # each rank draws as many images as rank 0, padding included
    record["forwards_per_image"] = forwards = model.per_image(len(turns) * model.batch)
    gamma, guide = model.guidance.gamma, model.guidance.guide
    how = "no guidance" if gamma.is_zero else f"guidance {gamma.weight:g}" + f" ({gamma.kind})" * (gamma.kind != "constant")
    if model.guidance.strength:
        how += f", strength {model.guidance.strength:g}"
    if guide is not None:
        nets: list[Any] = [guide.net, model.net]
        other, own = (sum(p.numel() for p in net.parameters()) for net in nets)
        record["guide_size"] = other / own  # parameters
        how += f" by {record['guide']}{' under its null condition' * (guide.null is not None)} ({other / own:.3g} x the model's size)"
    if rank == 0:
        write_json(out / "sample.json", record)
    scales = model.paradigm.scales if isinstance(model.paradigm, NextScale) else None
    said = f"{out}: {len(missing)} images drawn, {forwards:g} network forwards per image, {how}"
    return "\n".join([said, *schedule_table("gamma", gamma, scales)])


def draw_block(model: Model, wanted: dict[int, Path], conditions: list[int], keep_tokens: bool) -> None:
    """Draw one full micro-batch and write its wanted images. Raises UserError where the GPU has no memory for it."""
    first = min(wanted) // model.batch * model.batch
    seeds = range(first, first + model.batch)
    try:
        x_N = model.draw(torch.tensor([conditions[s % len(conditions)] for s in seeds]), seeds)
        images_NCHW = model.images(x_N).numpy()
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of GPU memory: lower sample.batch (now {model.batch})") from error
    for s, path in wanted.items():
        if keep_tokens:
            write_file(token_path(path), in_memory(np.save, arr=x_N[s - first].cpu().numpy()))
        write_file(path, png(images_NCHW[s - first]))


def refuse_other(out: Path, record: dict[str, Any]) -> None:
    """Raises UserError where the folder holds images of other settings, or more images than asked for."""
    there = read_record(out)
    if there is None:
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"{out} holds files of unknown origin: choose another folder with --out")
        return
    way_out = "remove it, or choose another folder"
    # A setting that did not exist when the folder was made had its default.
    before = {f"sample.{key}": field.default for key, field in Sample.model_fields.items()} | there["settings"]
    for key, value in record["settings"].items():
        if before.get(key) != value:
            raise UserError(f"{out} holds images of {key}={json.dumps(before.get(key)):.60}: {way_out}")
    if there["count"] > record["count"]:
        raise UserError(f"{out} holds {there['count']} images, more than {record['count']}: {way_out}")


def read_record(folder: Path) -> dict[str, Any] | None:
    """sample.json of a folder, None where there is none. Raises UserError when it is damaged."""
    path = folder / "sample.json"
    try:
        record = json.loads(regular(path).read_bytes())
        if not isinstance(record["settings"], dict) or not isinstance(record["count"], int):
            raise ValueError("settings or count are of the wrong type")
        record["forwards_per_image"], record["data"]["name"], record["data"]["path"]  # they must be there
        return record
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no record of samples ({error}): draw them again into another folder") from error


def contact_sheet(paths: list[Path], columns: int) -> bytes:
    """PNG file of the first images: one condition per column where they are few, at most ten rows, each image 64 pixels or more."""
    columns = min(columns if 1 < columns <= 16 else 10, len(paths))
    rows = min(len(paths) // columns, 10)
    images_NCHW = read_images(paths[: rows * columns])
    return image_grid(images_NCHW, rows, columns, scale=max(64 // images_NCHW.shape[2], 1))


def write_npz(folder: Path) -> None:
    """samples.npz beside the images: arr_0 uint8 [N, H, W, C], arr_1 conditions, as ADM's evaluator reads them."""
    paths = image_paths(folder)
    C, H, W = read_images(paths[:1]).shape[1:]
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), H, W, C)}
    temporary = folder / f".tmp-{os.getpid()}.npz"
    try:
        with open(temporary, "wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                # No time stamps, so that equal images give equal files; in chunks, since many images do not fit in memory.
                with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(member, header)
                    for first in range(0, len(paths), CHUNK):
                        # Read each chunk with the first image, whose shape the header has: other shapes are refused.
                        chunk = read_images([paths[0], *paths[first : first + CHUNK]])[1:]
                        member.write(chunk.transpose(0, 2, 3, 1).tobytes())
                c_N = np.array([condition_of(path) for path in paths])
                archive.writestr(zipfile.ZipInfo("arr_1.npy"), in_memory(np.save, arr=c_N))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / "samples.npz")
    except OSError as error:
        raise CannotWrite(folder / "samples.npz", error) from error
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{folder / 'samples.npz'}: {len(paths)} images")


def write_dataset(folder: Path, data: Data, settings: dict[str, Any], tokens: bool) -> None:
    """Write DIR/dataset: a dataset folder of the images. settings: those that drew them. tokens: and of the tokens they are made of."""
    images = [(path, condition_of(path)) for path in image_paths(folder)]
    drawn = [token_path(path) for path, _ in images] if tokens else []
    info = prepare_samples(images, drawn, folder / "dataset", data, settings)
    print(f"{info.path}: {info.splits['train'].count} images")


def token_path(image: Path) -> Path:
    """Where the tokens of an image of a samples folder are kept."""
    return image.parent.parent / "tokens" / f"{image.stem}.npy"
