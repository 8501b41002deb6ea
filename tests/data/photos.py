"""What the tests of data share: image files, tar files, a tiny VAE, and the one line of a command that is refused."""

import io
import tarfile
from pathlib import Path

import torch
from PIL import Image

from mclr.train.system.console import run
from mclr.train.system.files import in_memory


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    return in_memory(image.save, format=kind, **options)


def save(path: Path, color=0, size=(8, 8), mode: str = "RGB", **options) -> Path:
    """An image of one colour, for which red alone may stand, in a folder that need not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, (color, 50, 50) if mode == "RGB" and isinstance(color, int) else color).save(path, **options)
    return path


def save_noise(folder: Path, count: int, side: int) -> Path:
    """Random images in class folders 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    for i, image in enumerate(torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)):
        (folder / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(folder / f"{i % 2}" / f"{i}.png")
    return folder


def read(folder: Path) -> dict[str, bytes]:
    """The files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def members(path: Path) -> list[tuple[str, bytes]]:
    """(name, content) of the files in a tar file."""
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def save_tar(path: Path, members) -> Path:
    """A tar file of (name, content)."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def save_tiny_vae(folder: Path, **options) -> Path:
    """An untrained VAE of the form of Stable Diffusion's, of a few kB."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    widths = options.pop("block_out_channels", (8, 16, 16, 16))
    form = {"down_block_types": ("DownEncoderBlock2D",) * len(widths), "up_block_types": ("UpDecoderBlock2D",) * len(widths)}
    AutoencoderKL(**(form | {"block_out_channels": widths, "norm_num_groups": 8} | options)).save_pretrained(folder)
    return folder


def refused(main, argv, capsys) -> str:
    """The one line that a command prints before it exits with status 2."""
    capsys.readouterr()
    assert run(main, [str(arg) for arg in argv]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    return printed.err
