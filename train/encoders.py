"""Encoders: from images to what a paradigm models, and back."""

from typing import Protocol

import torch
from torch import Tensor

from models.vqvae import VQVAE


class Encoder(Protocol):
    def encode(self, image_BCHW: Tensor) -> Tensor: ...
    def decode(self, x_B: Tensor) -> Tensor: ...


class RGB:
    """Diffusion in pixels: x is the image itself, in [-1, 1]."""

    def encode(self, image_BCHW: Tensor) -> Tensor:
        return image_BCHW

    def decode(self, x_B: Tensor) -> Tensor:
        return x_B.clamp(-1, 1)


class Tokens:
    """Next-scale models: x is the tokens [B, L] of a frozen multi-scale tokenizer."""

    def __init__(self, tokenizer: VQVAE):
        self.tokenizer = tokenizer.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, image_BCHW: Tensor) -> Tensor:
        return self.tokenizer.encode(image_BCHW)

    @torch.no_grad()
    def decode(self, x_B: Tensor) -> Tensor:
        return self.tokenizer.decode(x_B)


def from_uint8(image_BCHW: Tensor) -> Tensor:
    """uint8 -> [-1, 1] as u / 127.5 - 1, fp32."""
    return image_BCHW.float() / 127.5 - 1


def mirrored(image_BCHW: Tensor, flip_B: Tensor) -> Tensor:
    """The images, those with flip_B left to right."""
    return torch.where(flip_B[:, None, None, None], image_BCHW.flip(-1), image_BCHW)


def to_uint8(image_BCHW: Tensor) -> Tensor:
    """[-1, 1] -> uint8 by round(127.5 x + 127.5), half to even: the inverse of from_uint8 on every u."""
    return (image_BCHW.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
