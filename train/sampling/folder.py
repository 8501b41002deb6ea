"""The folder of samples: images, the record of how they were made, npz and dataset."""

import json
import os
import shutil
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mclr.configs.schema import NextScaleModel, RunConfig, Sample
from mclr.errors import UserError
from mclr.next_scale import NextScale
from mclr.train.data.encoders import ROUNDING, VAE_WEIGHTS, find_vae
from mclr.train.data.images import condition_of, image_grid, image_paths, png, read_images
from mclr.train.data.write import prepare_samples
from mclr.train.sampling.generate import Model, WorkCounter, load_generator
from mclr.train.system.console import progress_bar
from mclr.train.system.files import checksum, in_memory, regular, write_file, write_json
from mclr.train.system.ranks import collective, from_rank_0, own_device, world
from mclr.train.training.networks import schedule_table
from mclr.train.weights.folder import find_weights, sha256

CHUNK = 1024  # images read at a time
MOST_IMAGES = 10_000_000  # of one call, each a file


def draw(
    config: RunConfig,
    weights: Path,
    out: Path,
    conditions: list[int],
    seeds: range,
    keep_tokens: bool = False,
    shared: bool = False,
) -> None:
    """Write the images of these seeds that `out` does not hold yet, its contact sheet and its sample.json.

    The image of a seed depends on its seed, its condition conditions[seed % len], the weights and config.sample alone: it always has
    the place seed % batch of a full micro-batch.
    keep_tokens: of a token model, also write what was drawn, before it is decoded. shared: all ranks call, and share the
    micro-batches. Raises UserError when `out` cannot be written, or holds images made otherwise.
    """
    asked = f"{seeds.stop - seeds.start} images from seed {seeds.start}"
    if not seeds or seeds.start < 0:
        raise UserError(f"{asked}: there must be at least one, and seeds start at 0")
    # len() of a longer range overflows
    if seeds.stop - seeds.start > MOST_IMAGES or seeds.start >= 2**63:
        raise UserError(f"{asked}: draw at most {MOST_IMAGES} at a time, from a seed below 2^63")
    rank, _, ranks = world() if shared else (0, 0, 1)
    agree = collective if shared else nullcontext
    paths = {s: out / "images" / f"{s:06d}-{conditions[s % len(conditions)]}.png" for s in seeds}
    record, missing = {}, {}
    with agree():
        # Only rank 0 looks: others might look when there are new images already.
        if rank == 0:
            record = record_of(config, weights, conditions, seeds)
            refuse_other(out, record, read_record(out))
            missing = {s: p for s, p in paths.items() if not p.exists() or (keep_tokens and not token_path(p).exists())}
    missing = from_rank_0(missing) if shared else missing
    if not missing:
        if rank == 0:
            if not (out / "grid.png").exists():  # stopped just before it
                write_file(out / "grid.png", contact_sheet(list(paths.values()), columns=len(conditions)))
            print(f"{out} is complete: {len(seeds)} images of these settings; nothing to draw")
        return
    with agree():
        model = load_generator(config, weights, own_device()).counted()
    with agree():
        if rank == 0:
            make_folder(out, record, keep_tokens)
    turns = turns_of(missing, model.batch, ranks)
    with progress_bar(len(missing), begun=0, quiet=rank != 0) as bar:
        for turn in turns:
            with agree():
                # A last turn may have no block for this rank.
                for block in turn[rank : rank + 1]:
                    draw_block(model, block, conditions, keep_tokens)
            # The images of a micro-batch come all at once.
            bar.update(sum(map(len, turn)))
    if rank == 0:
        write_file(out / "grid.png", contact_sheet(list(paths.values()), columns=len(conditions)))
        finish(out, record, model, config.sample.guide, len(missing), len(turns) * model.batch)


def turns_of(missing: dict[int, Path], batch: int, ranks: int) -> list[list[dict[int, Path]]]:
    """What each rank draws in each turn: the missing seeds of one micro-batch, seed -> path of its image."""
    blocks: dict[int, dict[int, Path]] = {}
    for s, path in missing.items():
        blocks.setdefault(s // batch, {})[s] = path
    rows = list(blocks.values())
    return [rows[i : i + ranks] for i in range(0, len(rows), ranks)]


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


def finish(out: Path, record: dict[str, Any], model: Model, guide_name: str | None, count: int, drawn: int) -> None:
    """Write sample.json and say what was done. count: new images; drawn: those that this rank drew, padding included."""
    made: dict[str, Any] = {"forwards_per_image": model.net.per_image(drawn)}
    gamma, guide = model.guidance.gamma, model.guidance.guide
    how = "no guidance" if gamma.is_zero else f"guidance {gamma.weight:g}" + f" ({gamma.kind})" * (gamma.kind != "constant")
    if isinstance(guide, WorkCounter):
        made["guide_size"] = guide.parameter_count() / model.net.parameter_count()
        how += f" by {guide_name} ({made['guide_size']:.3g} x the model's size)"
    write_json(out / "sample.json", record | made)
    print(f"{out}: {count} images drawn, {made['forwards_per_image']:g} network forwards per image, {how}")
    scales = model.paradigm.scales if isinstance(model.paradigm, NextScale) else None
    print("".join(f"{line}\n" for line in schedule_table("gamma", gamma, scales)), end="")


def record_of(config: RunConfig, weights: Path, conditions: list[int], seeds: range) -> dict[str, Any]:
    """sample.json before anything is drawn. settings: all that decides an image; all images of a folder share them."""
    guide = find_weights(config.sample.guide) if config.sample.guide else None
    tokenizer = vae = None
    if isinstance(config.model, NextScaleModel):
        tokenizer = sha256(find_weights(config.model.tokenizer))
    elif config.model.vae:
        vae = checksum(find_vae(config.model.vae) / VAE_WEIGHTS)
    return {
        "settings": {
            "weights": sha256(weights),
            "tokenizer": tokenizer,
            "vae": vae,
            **{f"sample.{key}": value for key, value in config.sample.model_dump(mode="json").items()},
            "sample.guide": guide and sha256(guide),
            "precision": config.engine.precision,
            "conditions": conditions,
            "seed": seeds[0],
            "rounding": ROUNDING,
        },
        "count": len(seeds),
        "model": config.model.name,
        "from": str(weights),
        "guide": guide and str(guide),
        "guide_size": None,  # its parameters as a share of the model's
        "data": {"name": config.data.name, "path": config.data.path},
        "forwards_per_image": None,
    }


def make_folder(out: Path, record: dict[str, Any], keep_tokens: bool) -> None:
    """Make the folders for images, and remove what was made from fewer images. Raises UserError where that is impossible."""
    try:
        for folder in ("images", "tokens") if keep_tokens else ("images",):
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {out} ({error.strerror}): choose another folder with --out") from error
    write_json(out / "sample.json", record)
    (out / "samples.npz").unlink(missing_ok=True)
    shutil.rmtree(out / "dataset", ignore_errors=True)


def refuse_other(out: Path, record: dict[str, Any], there: dict[str, Any] | None) -> None:
    """Raises UserError where the folder holds images of other settings, or more images than asked for."""
    if there is None:
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"{out} holds files of unknown origin: choose another folder with --out")
        return
    way_out = "remove it, or choose another folder"
    # A setting that did not exist when the folder was made had its default.
    before = {f"sample.{key}": field.default for key, field in Sample.model_fields.items()} | there["settings"]
    for key, value in record["settings"].items():
        if before.get(key) != value:
            raise UserError(f"{out} holds images of {key}={_short(before.get(key))}: {way_out}")
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
    except (OSError, ValueError, LookupError, TypeError) as error:
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
                archive.writestr(
                    zipfile.ZipInfo("arr_1.npy"), in_memory(np.save, arr=np.array([condition_of(path) for path in paths]))
                )
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / "samples.npz")
    except OSError as error:
        raise UserError(
            f"cannot write {folder / 'samples.npz'} ({error.strerror}): make room, or choose another --out"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{folder / 'samples.npz'}: {len(paths)} images")


def write_dataset(folder: Path, config: RunConfig) -> None:
    """Write DIR/dataset: a dataset folder of the images, and of the tokens that they were decoded from."""
    paths, record = image_paths(folder), read_record(folder)
    assert record is not None
    tokens = [token_path(path) for path in paths] if isinstance(config.model, NextScaleModel) else []
    images = [(path, condition_of(path)) for path in paths]
    info = prepare_samples(images, tokens, folder / "dataset", config.data, record["settings"])
    print(f"{info.path}: {info.splits['train'].count} images")


def token_path(image: Path) -> Path:
    """Where the tokens of an image of a samples folder are kept."""
    return image.parent.parent / "tokens" / f"{image.stem}.npy"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
