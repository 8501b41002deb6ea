"""`mclr sample`: images from a run or from weights. Every random number of an image comes from its own seed.

So neither the number of images nor the order nor a resume nor the number of ranks changes one. N images of a call; C H W image;
L tokens of an image.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# other distributions own packages named `models` or `kernels`, and an editable install comes after them
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mclr.configs.schema import FILE, PRESETS, NextScaleModel, RunConfig, Sample, load
from mclr.errors import UserError
from mclr.guidance import Guidance
from mclr.likelihood import Draws, Net, Paradigm
from mclr.models.edm2 import EDM2
from mclr.next_scale import NextScale
from mclr.train.cli import Parser, run_rank
from mclr.train.data.encoders import ROUNDING, VAE_WEIGHTS, Encoder, find_vae, to_uint8
from mclr.train.prepare import prepare_samples
from mclr.train.report import image_grid
from mclr.train.system.files import checksum, in_memory, regular, write_file, write_json
from mclr.train.system.ranks import from_rank_0, group, on_signals, one_voice, own_device, together, world
from mclr.train.training.build import (
    build_encoder,
    build_guidance,
    build_guide,
    build_net,
    build_paradigm,
    choose_kernels,
    schedule_table,
)
from mclr.train.training.loop import progress_bar
from mclr.train.weights.folder import find_weights, load_into, presets_of, read_config, sha256

EXAMPLE = """examples:
  mclr sample runs/mine --out samples/mine --per-class 50
  mclr sample edm2-digits --out samples/guided --count 200 sample.gamma=0.5 sample.steps=18
  mclr sample runs/mine --out samples/auto sample.gamma=0.5 sample.guide=edm2-digits
  deepspeed train/sample.py runs/mine --out samples/mine --count 50000 --npz        on all GPUs; or torchrun -m train.sample

The images are DIR/images/SEED-CONDITION.png; seeds count from --seed, conditions take turns. DIR/grid.png shows the first of
them, DIR/sample.json says how they were made. Guidance is off unless sample.gamma is set; sample.guide lets another network be
the guide. Running the same command again draws what is missing; a larger --count adds images."""

CHUNK = 1024  # images read at a time
MOST_IMAGES = 10_000_000  # of one call, each a file
SAMPLING = 2**63  # seed of all sampling: beyond those of training, whose random numbers no image must repeat


class WorkCounter:
    """A network that counts its work while it is used as the network itself. sums: the counter that gets it (default: this one)."""

    def __init__(self, net: Any, sums: "WorkCounter | None" = None):
        self.net, self.sums = net, sums or self
        self.work = 0  # rows of all calls; of a token model rows times tokens

    def __call__(self, *inputs: Any, **cache: Any) -> Any:
        answer = self.net(*inputs, **cache)
        # hidden states [R, l, D] of l new tokens, or answers [R, C, H, W]
        self.sums.work += answer[0].shape[0] * (answer[0].shape[1] if answer[0].ndim == 3 else 1)
        return answer

    def new_cache(self, rows: int) -> Any:
        return self.net.new_cache(rows)

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.net.parameters())

    def per_image(self, count: int, tokens_per_image: int | None) -> float:
        """Forwards that one of `count` images took; of a token model, tokens forwarded as a share of the image's L.

        Those of a guide count as one each whatever its size, which stands beside them (`guide_size` in sample.json). count includes
        images that only fill up a micro-batch. tokens_per_image: L of a token model, None of the others.
        """
        return self.work / (count * (tokens_per_image or 1))


def generate(
    paradigm: Paradigm, net: Net, guidance: Guidance, c_N: Tensor, seeds: list[int], batch: int, device: torch.device
) -> Tensor:
    """Samples x [N, ...] of these conditions, in full micro-batches (the last one padded, so that kernels meet one shape)."""
    drawn = []
    for first in range(0, len(seeds), batch):
        index = [min(i, len(seeds) - 1) for i in range(first, first + batch)]
        x = paradigm.sample(net, c_N[index].to(device), guidance, Draws(SAMPLING, [seeds[i] for i in index], device))
        drawn.append(x[: len(seeds) - first])
    return torch.cat(drawn)


def to_images(encoder: Encoder, x_N: Tensor, batch: int) -> Tensor:
    """Samples -> uint8 images [N, C, H, W], decoded `batch` at a time."""
    return torch.cat([to_uint8(encoder.decode(x)).cpu() for x in x_N.split(batch)])


def main(argv: list[str] | None = None) -> int:
    parser = Parser("mclr sample", description="Draw images.", epilog=EXAMPLE)
    parser.add_argument(
        "source",
        metavar="RUN_OR_WEIGHTS",
        help="a finished run, or weights: a folder, a bundled name, a published file, hf://ORG/REPO[/FILE][@REV]",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    number = parser.add_mutually_exclusive_group()
    number.add_argument("--count", type=int, metavar="N", help="images in all (default: 100)")
    number.add_argument("--per-class", type=int, metavar="N", help="images of every condition")
    parser.add_argument("--classes", metavar="0,3,7", help="draw these conditions alone (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first image (default: %(default)s)")
    parser.add_argument("--model", help="preset of the weights (default: the one of their name); a run has its own")
    parser.add_argument(
        "--data", help="preset or dataset folder the weights were trained on (default: digits); a run has its own"
    )
    parser.add_argument("--npz", action="store_true", help="also write DIR/samples.npz (arr_0: uint8 NHWC, arr_1: conditions)")
    parser.add_argument("--dataset", action="store_true", help="also write DIR/dataset, a dataset folder for objective.generated")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # inserted by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    rank = world()[0]
    with on_signals(signal.SIG_DFL) if rank else nullcontext():
        with one_voice():
            args = parser.parse_intermixed_args(argv)
            config, weights = find_generator(args.source, args.model, args.data, args.overrides)
            conditions = parse_classes(args.classes, config.data.num_classes)
            keep_tokens = args.dataset and isinstance(config.model, NextScaleModel)
            if args.dataset and config.sample.more_smooth:
                raise UserError("sample.more_smooth=true makes pictures of no tokens: leave out --dataset, or set it to false")
        count = args.per_class * len(conditions) if args.per_class is not None else 100 if args.count is None else args.count
        # a program whose ranks have met already asks one of them
        launched = "WORLD_SIZE" in os.environ and not torch.distributed.is_initialized()
        with group(launched), one_voice():
            draw(config, weights, args.out, conditions, args.seed, count, keep_tokens, shared=launched)
            if rank == 0 and args.npz:
                write_npz(args.out)
            if rank == 0 and args.dataset:
                write_dataset(args.out, config)
    return 0


def find_generator(source: str, model: str | None, data: str | None, overrides: Sequence[str]) -> tuple[RunConfig, Path]:
    """(config, weights folder) of a run folder, or of weights with their presets. Raises UserError when there is neither."""
    settings = Path(source) / FILE
    if settings.is_file():
        if model or data:
            raise UserError(f"{source} is a run, its settings say which model and data: leave out --model and --data")
        if not (Path(source) / "weights").is_dir():
            raise UserError(f"run {source} has no weights: it has not finished; repeat its `mclr train` command, which goes on")
        resolved = str(settings)  # in place of all four presets, so that overrides go on top
        return load(resolved, resolved, resolved, resolved, list(overrides)), Path(source) / "weights"
    weights = find_weights(source)
    if model is None:
        if not (PRESETS / "model" / f"{source}.yaml").is_file():
            presets = presets_of(read_config(weights))
            fitting = f" ({' or '.join(presets)}, by their size)" if presets else ""
            raise UserError(f"no preset is named like the weights {source}: say by --model which one they belong to{fitting}")
        model = source
    # the objective says nothing about sampling
    return load(model, "mle", data or "digits", "auto", list(overrides)), weights


def load_generator(config: RunConfig, weights: Path, device: torch.device) -> tuple[WorkCounter, Paradigm, Encoder, Guidance]:
    """(network, paradigm, encoder, guidance): all that sampling by config.sample takes, in evaluation mode.

    The network also counts the work of the guide. Raises UserError where weights or guide do not fit the config.
    """
    choose_kernels(config, device)
    encoder = build_encoder(config, device)
    net = build_net(config, encoder)
    load_into(net, weights)
    guide = build_guide(config, net)
    for module in (net, guide):
        if module is not None:
            module.to(device).eval().requires_grad_(False)
            if isinstance(module, EDM2):
                module.fold()
    counted = WorkCounter(net)
    guidance = build_guidance(config, None if guide is None else WorkCounter(guide, sums=counted))
    return counted, build_paradigm(config, encoder), encoder, guidance


def parse_classes(text: str | None, num_classes: int) -> list[int]:
    """ "0,3,7" -> conditions; None: all of them."""
    if text is None:
        return list(range(num_classes))
    try:
        conditions = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--classes {text}: give conditions separated by commas, as in 0,3,7") from None
    if len(set(conditions)) < len(conditions) or not all(0 <= c < num_classes for c in conditions):
        raise UserError(f"--classes {text}: give different conditions of 0..{num_classes - 1}")
    return conditions


def draw(
    config: RunConfig,
    weights: Path,
    out: Path,
    conditions: list[int],
    seed: int,
    count: int,
    keep_tokens: bool = False,
    shared: bool = False,
) -> None:
    """Write the images of seeds seed .. seed + count - 1 that `out` does not hold yet, its contact sheet and its sample.json.

    An image depends on its seed, its condition, the weights and config.sample alone: the image of a seed is always at place
    seed % batch of a full micro-batch, its neighbours those of the neighbouring seeds.
    keep_tokens: of a token model, also write what was drawn, before it is decoded. shared: all ranks call, and deal the micro-batches
    among them.
    Raises UserError when `out` cannot be written, or holds images made otherwise.
    """
    if count < 1 or seed < 0:
        raise UserError(f"{count} images from seed {seed}: there must be at least one, and seeds start at 0")
    if count > MOST_IMAGES or seed >= 2**63:
        raise UserError(f"{count} images from seed {seed}: draw at most {MOST_IMAGES} at a time, from a seed below 2^63")
    paths = {s: out / "images" / f"{s:06d}-{conditions[s % len(conditions)]}.png" for s in range(seed, seed + count)}
    rank, _, ranks = world() if shared else (0, 0, 1)
    agree = together if shared else nullcontext
    record, missing = {}, {}
    with agree():
        # others might look when there are new images already
        if rank == 0:
            record = record_of(config, weights, conditions, seed, count)
            refuse_other(out, record, read_record(out))
            missing = {s: p for s, p in paths.items() if not p.exists() or (keep_tokens and not token_path(p).exists())}
    if shared:
        missing = from_rank_0(missing)
    if not missing:
        if rank == 0:
            if not (out / "grid.png").exists():  # stopped just before it
                write_file(out / "grid.png", contact_sheet(list(paths.values()), columns=len(conditions)))
            print(f"{out} is complete: {count} images of these settings; nothing to draw")
        return
    with agree():
        device = own_device()
        net, paradigm, encoder, guidance = load_generator(config, weights, device)
    with agree():
        if rank == 0:
            make_folder(out, record, keep_tokens)

    batch = config.sample.batch
    wanted: dict[int, list[int]] = {}  # seeds of each micro-batch
    for s in missing:
        wanted.setdefault(s // batch, []).append(s)
    blocks = list(wanted)
    turns = [blocks[i : i + ranks] for i in range(0, len(blocks), ranks)]
    with progress_bar(len(missing), begun=0, quiet=rank != 0) as bar:
        for turn in turns:
            with agree():
                # none in a last turn that is short
                for block in turn[rank : rank + 1]:
                    seeds = range(block * batch, (block + 1) * batch)
                    c_N = torch.tensor([conditions[s % len(conditions)] for s in seeds])
                    try:
                        with torch.autocast(device.type, torch.bfloat16, enabled=config.engine.precision == "bf16"):
                            x_N = generate(paradigm, net, guidance, c_N, list(seeds), batch, device)
                        images_NCHW = to_images(encoder, x_N, batch).numpy()
                    except torch.OutOfMemoryError as error:
                        raise UserError(f"out of GPU memory: lower sample.batch (now {batch})") from error
                    for s in wanted[block]:
                        if keep_tokens:
                            write_file(token_path(missing[s]), in_memory(np.save, arr=x_N[s - seeds[0]].cpu().numpy()))
                        write_file(missing[s], png(images_NCHW[s - seeds[0]]))
            # a batch at a time: its images come all at once, and one of them would foretell nothing
            bar.update(sum(len(wanted[block]) for block in turn))
    if rank != 0:
        return
    tokens = paradigm.dims if isinstance(config.model, NextScaleModel) else None
    made: dict[str, Any] = {"forwards_per_image": net.per_image(len(turns) * batch, tokens)}
    gamma = guidance.gamma
    how = "no guidance" if gamma.is_zero else f"guidance {gamma.weight:g}" + f" ({gamma.kind})" * (gamma.kind != "constant")
    if isinstance(guidance.guide, WorkCounter):
        made["guide_size"] = guidance.guide.parameter_count() / net.parameter_count()
        how += f" by {config.sample.guide} ({made['guide_size']:.3g} x the model's size)"
    write_file(out / "grid.png", contact_sheet(list(paths.values()), columns=len(conditions)))
    write_json(out / "sample.json", record | made)
    print(f"{out}: {len(missing)} images drawn, {made['forwards_per_image']:g} network forwards per image, {how}")
    scales = paradigm.scales if isinstance(paradigm, NextScale) else None
    print("".join(f"{line}\n" for line in schedule_table("gamma", gamma, scales)), end="")


def record_of(config: RunConfig, weights: Path, conditions: list[int], seed: int, count: int) -> dict[str, Any]:
    """sample.json as long as nothing is drawn. settings: all that decides an image, which one folder has one of."""
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
            "seed": seed,
            "rounding": ROUNDING,
        },
        "count": count,
        "model": config.model.name,
        "from": str(weights),
        "guide": guide and str(guide),
        "guide_size": None,  # its parameters as a share of the model's
        "data": {"name": config.data.name, "path": config.data.path},
        "forwards_per_image": None,
    }


def make_folder(out: Path, record: dict[str, Any], keep_tokens: bool) -> None:
    """Make the folder ready for images, and take away what was made of fewer of them."""
    try:
        for folder in ("images", "tokens") if keep_tokens else ("images",):
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {out} ({error.strerror}): choose another folder with --out") from error
    write_json(out / "sample.json", record)
    (out / "samples.npz").unlink(missing_ok=True)
    shutil.rmtree(out / "dataset", ignore_errors=True)


def refuse_other(out: Path, record: dict[str, Any], there: dict[str, Any] | None) -> None:
    """Raises UserError where the folder holds images that were not made by these settings, or more of them."""
    if there is None:
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"{out} holds files of unknown origin: choose another folder with --out")
        return
    way_out = "remove it, or choose another folder"
    # settings that are newer than the folder had their defaults
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


def read_images(paths: Iterable[Path]) -> np.ndarray:
    """PNG files of one size -> uint8 [N, C, H, W], C = 1 or 3. Raises UserError naming the file at fault."""
    images: list[np.ndarray] = []
    for path in paths:
        try:
            with Image.open(regular(path)) as image:
                pixels, mode = np.asarray(image), image.mode
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{path} is no readable image ({error}): remove it and draw it again") from error
        if mode not in ("L", "RGB"):
            raise UserError(f"{path} is of mode {mode}: save it as 8-bit gray (L) or RGB")
        image_CHW = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        if images and image_CHW.shape != images[0].shape:
            raise UserError(f"{path} is of shape {image_CHW.shape}, the images before it of {images[0].shape}: remove it")
        images.append(image_CHW)
    return np.stack(images)


def image_paths(folder: Path) -> list[Path]:
    """The images of a samples folder in the order of their seeds."""
    return sorted((folder / "images").glob("*.png"), key=lambda path: (len(path.stem.partition("-")[0]), path.name))


def condition_of(path: Path) -> int:
    """The condition in the name of an image, SEED-CONDITION.png. Raises UserError when there is none."""
    condition = path.stem.rpartition("-")[2]
    if not condition.isdigit() or path.stem == condition:
        raise UserError(f"{path} does not say its condition: name it SEED-CONDITION.png, as in 000012-3.png")
    return int(condition)


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
                # no time stamps: the same images give the same file; chunk by chunk: many images do not fit in memory
                with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(member, header)
                    for first in range(0, len(paths), CHUNK):
                        # beside the first image, whose shape is the header's
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
    """A dataset folder beside the images, of them and of the tokens they were decoded from."""
    paths, record = image_paths(folder), read_record(folder)
    assert record is not None
    tokens = [token_path(path) for path in paths] if isinstance(config.model, NextScaleModel) else []
    images = [(path, condition_of(path)) for path in paths]
    info = prepare_samples(images, tokens, folder / "dataset", config.data, record["settings"])
    print(f"{info.path}: {info.splits['train'].count} images")


def token_path(image: Path) -> Path:
    """Where the tokens of an image of a samples folder are kept."""
    return image.parent.parent / "tokens" / f"{image.stem}.npy"


def png(image_CHW: np.ndarray) -> bytes:
    """PNG file of one uint8 image of one or three channels."""
    image = Image.fromarray(image_CHW[0] if len(image_CHW) == 1 else image_CHW.transpose(1, 2, 0))
    return in_memory(image.save, format="PNG")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


if __name__ == "__main__":
    run_rank(main)
