"""Encoders: from images to what a paradigm models, and back.

B samples; C, H, W image or latents; L tokens. Images are in [-1, 1]. An image is mirrored before it is encoded: mirrored latents are not
the latents of the mirrored image. So a cache stores what both images give.
"""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mclr.configs.schema import VAE_FACTOR, Data
from mclr.errors import UserError
from mclr.likelihood import Draws
from mclr.models.vqvae import VQVAE
from mclr.train.system.hub import fetch

VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
VAE_BATCH = 8  # images that go through a VAE at a time


class Encoder(Protocol):
    """encode: image -> what can be stored, the same at every visit. draw: stored -> x of one visit, with the sample's own random numbers.
    decode: x -> image."""

    def shape(self, data: Data) -> tuple[int, int, int] | None:
        """(C, H, W) of x for these images; None where x is tokens."""

    def encode(self, image_BCHW: Tensor) -> Tensor: ...
    def decode(self, x_B: Tensor) -> Tensor: ...
    def draw(self, stored_B: Tensor, draws: Draws) -> Tensor:
        return stored_B


class RGB(Encoder):
    """Diffusion in pixels: x is the image itself, in [-1, 1]."""

    @staticmethod
    def shape(data: Data) -> tuple[int, int, int]:
        return data.channels, data.resolution, data.resolution

    def encode(self, image_BCHW: Tensor) -> Tensor:
        return image_BCHW

    def decode(self, x_B: Tensor) -> Tensor:
        return x_B.clamp(-1, 1)


class BareLatents(RGB):
    """Latents without a VAE: the source gives x itself."""

    @staticmethod
    def shape(data: Data) -> tuple[int, int, int]:
        return Latents.CHANNELS, data.resolution // VAE_FACTOR, data.resolution // VAE_FACTOR


class Tokens(Encoder):
    """Next-scale models: x is tokens [B, L] of a frozen multi-scale tokenizer."""

    def __init__(self, tokenizer: VQVAE):
        self.tokenizer = tokenizer.eval().requires_grad_(False)

    @staticmethod
    def shape(data: Data) -> None:
        return None

    @torch.no_grad()
    def encode(self, image_BCHW: Tensor) -> Tensor:
        return self.tokenizer.encode(image_BCHW)

    @torch.no_grad()
    def decode(self, x_B: Tensor) -> Tensor:
        return self.tokenizer.decode(x_B)


class Latents(Encoder):
    """Diffusion in the latents of a frozen Stable Diffusion VAE, in fp32: x is [B, 4, H/8, W/8], of mean 0 and standard deviation .5.

    Stored are mean and standard deviation of the VAE's posterior, [B, 8, H/8, W/8]; every visit draws x from it. As in EDM2 (arXiv
    2312.02696, appendix), the VAE reads images in [0, 1]; MEAN and STD are EDM2's, one number per channel. They describe latents as the
    VAE gives them, with root mean square sqrt(mean(MEAN^2 + STD^2)) = 5.3. Stable Diffusion's factor .18215, which would make that
    about 1, is not applied.
    """

    CHANNELS = 4
    MEAN = (5.81, 3.25, 0.12, -2.15)
    STD = (4.17, 4.62, 3.71, 3.28)
    SIGMA_DATA = 0.5
    SD_FACTOR = 0.18215

    def __init__(self, vae: Any, scaling: str = "edm2"):
        """scaling: edm2, or sd, as for DiT and SiT: the VAE reads images in [-1, 1], and latents are multiplied by .18215."""
        self.vae, self.scaling = vae.eval().requires_grad_(False), scaling
        self.mean_C11, self.std_C11 = (torch.tensor(v, device=vae.device)[:, None, None] for v in (self.MEAN, self.STD))

    shape = staticmethod(BareLatents.shape)

    @torch.no_grad()
    def encode(self, image_BCHW: Tensor) -> Tensor:
        seen_BCHW = image_BCHW if self.scaling == "sd" else image_BCHW / 2 + 0.5
        posteriors = [self.vae.encode(image).latent_dist for image in seen_BCHW.split(VAE_BATCH)]
        return torch.cat([torch.cat([posterior.mean, posterior.std], dim=1) for posterior in posteriors])

    def draw(self, stored_B: Tensor, draws: Draws) -> Tensor:
        mean_BCHW, std_BCHW = stored_B.chunk(2, dim=1)
        latent_BCHW = mean_BCHW + std_BCHW * draws.normal(*mean_BCHW.shape[1:])
        if self.scaling == "sd":
            return latent_BCHW * self.SD_FACTOR
        return (latent_BCHW - self.mean_C11) / self.std_C11 * self.SIGMA_DATA

    @torch.no_grad()
    def decode(self, x_B: Tensor) -> Tensor:
        if self.scaling == "sd":
            latent_BCHW = x_B.float() / self.SD_FACTOR
        else:
            latent_BCHW = x_B.float() / self.SIGMA_DATA * self.std_C11 + self.mean_C11
        image_BCHW = torch.cat([self.vae.decode(latent).sample for latent in latent_BCHW.split(VAE_BATCH)])
        return (image_BCHW if self.scaling == "sd" else image_BCHW * 2 - 1).clamp(-1, 1)


def find_vae(name: str) -> Path:
    """The folder of model.vae=name, with config.json and VAE_WEIGHTS. name: a path or hf://ORG/REPO. Raises UserError where it is none."""
    files = ("config.json", VAE_WEIGHTS)
    folder = fetch(name, files)
    if not all((folder / file).is_file() for file in files):
        raise UserError(f"model.vae={name} is no folder with {' and '.join(files)}: give one, or hf://stabilityai/sd-vae-ft-mse")
    return folder


def load_vae(name: str, device: torch.device) -> Any:
    """The AutoencoderKL of model.vae=name. Raises UserError where it cannot be read, or is not one of Stable Diffusion 1 or 2."""
    folder = find_vae(name)
    try:
        # slow to import, and an optional dependency
        from diffusers import AutoencoderKL
    except ImportError:
        raise UserError(f"model.vae={name} needs diffusers: pip install -e '.[vae]'") from None
    try:
        options = {"use_safetensors": True, "local_files_only": True, "low_cpu_mem_usage": False, "torch_dtype": torch.float32}
        vae = AutoencoderKL.from_pretrained(folder, **options)
    # diffusers raises nearly anything on damaged files
    except Exception as error:
        why = f"is no readable AutoencoderKL ({type(error).__name__})"
        raise UserError(f"model.vae={name} {why}: copy stabilityai/sd-vae-ft-mse again") from error
    config = vae.config
    found = (config.in_channels, config.latent_channels, 2 ** (len(config.block_out_channels) - 1), config.scaling_factor)
    # SDXL's VAE has the same shape but other latents: only its factor tells them apart
    if found != (3, Latents.CHANNELS, VAE_FACTOR, 0.18215):
        makes = f"{found[1]} channels at 1/{found[2]} of the side, scaling_factor {found[3]}"
        needed = f"EDM2's latents are 4 at 1/{VAE_FACTOR}, .18215; give stabilityai/sd-vae-ft-mse"
        raise UserError(f"model.vae={name} makes {makes}: {needed}")
    return vae.to(device)


def from_uint8(image_BCHW: Tensor) -> Tensor:
    """uint8 -> [-1, 1] as u / 127.5 - 1, fp32."""
    return image_BCHW.float() / 127.5 - 1


def mirrored(image_BCHW: Tensor, flip_B: Tensor) -> Tensor:
    """The images; those with flip_B are mirrored left to right."""
    return torch.where(flip_B[:, None, None, None], image_BCHW.flip(-1), image_BCHW)


ROUNDING = "round(127.5 x + 127.5), half to even, x in [-1, 1]"


def to_uint8(image_BCHW: Tensor) -> Tensor:
    """[-1, 1] -> uint8 as ROUNDING says: the inverse of from_uint8 on every u."""
    return (image_BCHW.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
