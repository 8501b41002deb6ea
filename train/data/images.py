"""Images: reads files of any format, crops and converts them, writes PNG files and sheets."""

import io
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from mclr.errors import UserError
from mclr.train.system.files import in_memory, regular

PNG = ("PNG",)
# formats that Pillow passes to other programs (PostScript to Ghostscript) or recognises without reading; IPTC is no image
NOT_READ = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC"}
MEGAPIXELS = 256.0  # largest image that is read, in units of 2^20 pixels: 768 MiB as RGB
MOST_ASPECT = 32  # a longer image is cut to its middle before it is resized
# Pillow's own limits refuse sound images: those of 179 megapixels, and PNG files with a text of 1 MiB
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**27


@cache
def formats() -> tuple[str, ...]:
    """The formats that this Pillow reads and recognises by their first bytes."""
    Image.init()
    return tuple(name for name, (_, recognises) in Image.OPEN.items() if recognises and name not in NOT_READ)


@cache
def endings() -> dict[str, str]:
    """Ending of a file's name in lower case -> format, for all formats that this Pillow reads."""
    formats()
    return {end: name for end, name in Image.EXTENSION.items() if name in Image.OPEN and name not in NOT_READ}


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """The centre square at resolution x resolution, as ImageNet is prepared for diffusion models (Dhariwal & Nichol 2021).

    The image is halved by a box filter while it is twice too large, resized (bicubic) until the shorter side fits, then cropped.
    """
    longest = MOST_ASPECT * min(image.size)
    if max(image.size) > longest:
        # to resize all of it would take many times the memory of the result
        image = _centre(image, min(image.width, longest), min(image.height, longest))
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return _centre(image, resolution, resolution)


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def open_image(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """An image in one of these formats of Pillow, not decoded yet. Raises whatever Pillow does on damaged bytes."""
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        # Pillow's message names an address in memory
        raise ValueError("no PNG file" if formats == PNG else "in no format that Pillow here reads") from None


def format_of(file: Path | IO[bytes]) -> str | None:
    """The format of an image file, by its content; None where this Pillow reads no image there."""
    # decoders raise nearly anything on other bytes
    with suppress(Exception), Image.open(regular(file) if isinstance(file, Path) else file, formats=formats()) as image:
        return image.format
    return None


def decode(data: bytes, name: str = "", channels: int | None = None, megapixels: float = MEGAPIXELS) -> tuple[Image.Image, str]:
    """(the image in a file: upright, opaque (over white), 8 bits per channel; the format of the file).

    The format is known by the content, or by the ending of `name` where the format has no signature. channels: 1 gray, 3 RGB, None as in
    the file. Raises ValueError where the image is larger than `megapixels` or its pixels have no known range, and on damaged bytes
    whatever Pillow raises.
    """
    own = endings().get(Path(name).suffix.lower())
    with open_image(data, formats() if own in (None, *formats()) else (*formats(), str(own))) as image:
        if image.width * image.height > megapixels * 2**20:
            raise ValueError(f"larger than the {megapixels:g} megapixels of `mclr prepare images --megapixels`")
        kind, gray = str(image.format), image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I;16")
        upright = ImageOps.exif_transpose(image)
    if upright.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits have no known range")
    # Pillow would clip 16 bits at 255
    if upright.mode.startswith("I;16"):
        upright = Image.fromarray(np.round(np.asarray(upright) / 257).astype(np.uint8))
    if upright.has_transparency_data:
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
    return upright.convert("L" if channels == 1 or (channels is None and gray) else "RGB"), kind


def read_images(paths: Iterable[Path]) -> np.ndarray:
    """Image files of one size -> uint8 [N, C, H, W], C = 1 or 3. Raises UserError with the file that is unreadable or differs."""
    images: list[np.ndarray] = []
    for path in paths:
        try:
            pixels = np.asarray(decode(regular(path).read_bytes(), path.name)[0])
        # decoders raise nearly anything on damaged bytes
        except Exception as error:
            raise UserError(f"{path} is no readable image ({error}): remove or replace it") from error
        image_CHW = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        if images and image_CHW.shape != images[0].shape:
            raise UserError(f"{path} is of shape {image_CHW.shape}, the images before it of {images[0].shape}: remove it")
        images.append(image_CHW)
    return np.stack(images)


def image_paths(folder: Path) -> list[Path]:
    """The images of a samples folder in the order of their seeds."""
    return sorted((folder / "images").glob("[!.]*.png"), key=lambda path: (len(path.stem.partition("-")[0]), path.name))


def condition_of(path: Path) -> int:
    """The condition in the name of an image, SEED-CONDITION.png. Raises UserError where there is none."""
    condition = path.stem.rpartition("-")[2]
    if not condition.isdigit() or path.stem == condition:
        raise UserError(f"{path} does not say its condition: name it SEED-CONDITION.png, as in 000012-3.png")
    return int(condition)


def png(image_CHW: np.ndarray) -> bytes:
    """PNG file of one uint8 image of one or three channels."""
    image = Image.fromarray(image_CHW[0] if len(image_CHW) == 1 else image_CHW.transpose(1, 2, 0))
    return in_memory(image.save, format="PNG")


def image_grid(images_NCHW: np.ndarray, rows: int, columns: int, scale: int) -> bytes:
    """PNG file of the first rows * columns uint8 images, row by row, with a white line between them, enlarged without blur."""
    framed_NCHW = np.pad(images_NCHW[: rows * columns], [(0, 0), (0, 0), (0, 1), (0, 1)], constant_values=255)
    _, channels, height, width = framed_NCHW.shape
    grid = framed_NCHW.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    grid_HWC = grid.reshape(rows * height, columns * width, channels)[:-1, :-1]
    picture = Image.fromarray(grid_HWC.repeat(scale, 0).repeat(scale, 1).repeat(3 // channels, 2))
    return in_memory(picture.save, format="PNG", optimize=True)
