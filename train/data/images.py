"""Images: read from files, cropped and converted, written as PNG, laid out as a sheet."""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mclr.errors import UserError
from mclr.train.system.files import in_memory, regular


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """The centre square at resolution x resolution, as ImageNet is prepared for diffusion models (Dhariwal & Nichol 2021).

    Halved by a box filter while twice too large, then bicubic until the shorter side fits, then cropped.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def convert(image: Image.Image, mode: str) -> Image.Image:
    """The image upright, opaque (over white) and 8 bits per channel; ValueError where the pixels have no known range."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no known range")
    # Pillow would clip 16 bits at 255
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert(mode)


def open_image(data: bytes, formats: list[str]) -> Image.Image:
    """An image in one of these formats of Pillow, not decoded yet. Raises whatever Pillow does on damaged bytes."""
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        # Pillow names what it read from, here an address in memory
        raise ValueError(f"no {' or '.join(formats)} file") from None


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


def png(image_CHW: np.ndarray) -> bytes:
    """PNG file of one uint8 image of one or three channels."""
    image = Image.fromarray(image_CHW[0] if len(image_CHW) == 1 else image_CHW.transpose(1, 2, 0))
    return in_memory(image.save, format="PNG")


def image_grid(images_NCHW: np.ndarray, rows: int, columns: int, scale: int) -> bytes:
    """PNG file of the first rows * columns images (uint8), row by row, one white pixel between them, then enlarged without blur.

    Raises ValueError when there are too few images or they are no uint8 pictures of one or three channels.
    """
    images_NCHW = np.asarray(images_NCHW)
    if images_NCHW.dtype != np.uint8 or images_NCHW.ndim != 4 or images_NCHW.shape[1] not in (1, 3):
        raise ValueError(f"images must be uint8 [N, 1 or 3, H, W], not {images_NCHW.dtype} {images_NCHW.shape}")
    if len(images_NCHW) < rows * columns:
        raise ValueError(f"{len(images_NCHW)} images do not fill {rows} x {columns} places")
    framed_NCHW = np.pad(images_NCHW[: rows * columns], [(0, 0), (0, 0), (0, 1), (0, 1)], constant_values=255)
    _, channels, height, width = framed_NCHW.shape
    grid = framed_NCHW.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    grid_HWC = grid.reshape(rows * height, columns * width, channels)[:-1, :-1]
    picture = Image.fromarray(grid_HWC.repeat(scale, 0).repeat(scale, 1).repeat(3 // channels, 2))
    return in_memory(picture.save, format="PNG", optimize=True)
