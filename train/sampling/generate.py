"""mclr.load: a model out of weights or of a run, and images out of a model. Every random number of an image comes from its seed."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mclr.configs.schema import FILE, RunConfig
from mclr.diffusion import Diffusion
from mclr.errors import UserError
from mclr.guidance import Guidance
from mclr.likelihood import ENCODING, SAMPLING, Draws, Guide, guide_of
from mclr.models.registry import NETWORKS, fold
from mclr.schedule import Schedule
from mclr.train.data.encoders import Encoder, Latents, Tokens, from_uint8, to_uint8
from mclr.train.engine.base import rows_in
from mclr.train.sampling.find import find_generator
from mclr.train.system.ranks import own_device
from mclr.train.training.build import choose_kernels
from mclr.train.training.networks import build_encoder, build_guidance, build_guide, build_net, build_paradigm, guide_misfit
from mclr.train.weights.folder import (
    BUNDLED,
    find_weights,
    load_into,
    load_net,
    read_config,
    save_weights,
)


def whole(name: str, value: Any, least: int = 0) -> int:
    """The integer that was given. Raises ValueError for what is no whole number from `least` to 2^63 - 1."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not least <= number < 2**63:
        raise ValueError(f"{name}={value!r} must be a whole number from {least} to 2^63 - 1")
    return number


def conditions_of(classes: Iterable[int | str], count: int, names: Sequence[str] = ()) -> list[int]:
    """The numbers of conditions that are given by number or name. count: of all, without the null condition. Raises ValueError."""
    if isinstance(classes, str) or not isinstance(classes, Iterable):
        raise ValueError(f"classes={classes!r} is no list: give a list of conditions, as in [3]")
    found = []
    for each in classes:
        c = names.index(each) if each in names else each
        if isinstance(c, str) and not c.isdecimal():
            raise ValueError(f"no class is named {each!r}: give numbers{f', or names like {names[0]}' if names else ''}")
        found.append(whole("class", int(c) if isinstance(c, str) else c))
        if found[-1] >= count:
            raise ValueError(f"class {each} is out of range: must be 0 .. {count - 1}")
    return found


@dataclass
class Model:
    """A generator that samples and can be trained: what mclr.load returns.

    net: the network, in evaluation mode; it answers as the paradigm expects (mclr/diffusion.py, mclr/next_scale.py).
    paradigm: Diffusion or NextScale, with the settings of sampling. encoder: from images to samples x and back.
    guidance: that of the settings. batch: images per micro-batch. bf16: whether the network samples in that precision.
    image_shape: (C, H, W). class_names: of the conditions, where the weights record them. notes: what save() records.
    work: rows so far of the network and its guide, once counted().
    """

    net: Any
    paradigm: Any
    encoder: Encoder
    guidance: Guidance
    batch: int
    bf16: bool
    image_shape: tuple[int, int, int]
    class_names: Sequence[str]
    notes: dict[str, Any]
    device: torch.device
    work: float = 0.0

    def encode(self, images: Tensor, first: int | None = None) -> Tensor:
        """Images, uint8 [N, C, H, W] -> samples x: images in [-1, 1], latents, or tokens [N, L].

        first: position of the first image in training, as in Loss. Latents of a VAE need it: they are random, and positions decide
        their random numbers. Raises ValueError for images of another shape or type, and for latents without a position.
        """
        if first is None and isinstance(self.encoder, Latents):
            raise ValueError("latents of a VAE are random: give first=, the position of the first image, as to the loss")
        first = whole("first", first or 0)
        if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.shape[1:] != self.image_shape:
            found = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images must be a tensor, uint8 [N, {', '.join(map(str, self.image_shape))}], not {found}")
        stored_N = self.encoder.encode(from_uint8(images.to(self.device)))
        return self.encoder.draw(stored_N, Draws(ENCODING, list(range(first, first + len(images))), self.device))

    def decode(self, x_N: Tensor) -> Tensor:
        """Samples x -> images [N, C, H, W] in [-1, 1]."""
        return self.encoder.decode(x_N)

    def sample(
        self,
        classes: Iterable[int | str],
        seed: int = 0,
        gamma: float | Schedule | None = None,
        steps: int | None = None,
        guide: Any = None,
        strength: float | None = None,
        exact: bool = False,
    ) -> Tensor:
        """Images of these conditions (numbers, or names where the weights record them), uint8 [N, C, H, W], in host memory.

        seed: image i has the seed `seed + i`, which decides all its random numbers. gamma: extra weight of guidance, over
        the progress that the settings say; a Schedule says its own; None: the guidance of the settings. steps: of a diffusion model's
        sampler. guide: the network, Model or mclr.Guide that guides; None: that of the settings, by default the null condition.
        strength: where the dial stands, from 0, plain, to the end of the network's; None: as the settings say, by default 0.
        exact: the same bits as `mclr sample`, at the cost of full micro-batches. Otherwise few images take a short batch, which
        rounds otherwise: diffusion differs by less than 1e-4 before it becomes uint8, and rarely a token differs.
        Raises ValueError for conditions, settings or a strength that the model does not have, and for a guide without gamma.
        """
        paradigm, seed = self.paradigm, whole("seed", seed)
        conditions = conditions_of(classes, paradigm.null, self.class_names)
        if not conditions:
            raise ValueError("there are no classes: give one for every image")
        if steps is not None:
            if not isinstance(paradigm, Diffusion):
                raise ValueError(f"steps={steps} has no effect on tokens: leave it out")
            paradigm = replace(paradigm, steps=whole("steps", steps, least=1))
        gamma = self.guidance.gamma if gamma is None else gamma
        if not isinstance(gamma, Schedule):
            gamma = replace(self.guidance.gamma, weight=gamma)
        if guide is None and not gamma.is_zero:
            guide = self.guidance.guide
        elif guide is not None:
            guide = self.fitting(guide)
        strength = self.guidance.strength if strength is None else strength
        if not isinstance(strength, Real):
            raise ValueError(f"strength={strength!r} must be a number")
        this = replace(self, paradigm=paradigm, guidance=Guidance(gamma, guide, strength))
        # `mclr sample` draws full micro-batches, in which the image of a seed has the place seed % batch.
        before, after = (seed % self.batch, -(seed + len(conditions)) % self.batch) if exact else (0, 0)
        c_N = torch.nn.functional.pad(torch.tensor(conditions), (before, after))
        x_N = this.draw(c_N, range(seed - before, seed + len(conditions) + after), short=not exact)
        return this.images(x_N)[before : before + len(conditions)]

    def fitting(self, guide: Any) -> Guide:
        """A Guide, or the one that a network or a Model makes. Raises ValueError for a guide of other samples."""
        made = guide_of(guide)
        assert made is not None
        misfit = guide_misfit(
            self.net, made.net, "diffusion" if isinstance(self.paradigm, Diffusion) else "next_scale", made.null
        )
        if misfit is None and isinstance(guide, Model) and isinstance(self.encoder, Tokens):
            encoders: list[Any] = [self.encoder, guide.encoder]
            here, there = (encoder.tokenizer.state_dict() for encoder in encoders)
            if here.keys() != there.keys() or any(not torch.equal(here[k], there[k].to(here[k])) for k in here):
                misfit = "is of another tokenizer"
        if misfit:
            raise ValueError(f"guide= {misfit}: give a guide for the same samples")
        return made

    @torch.no_grad()
    def draw(self, c_N: Tensor, seeds: Sequence[int], short: bool = False) -> Tensor:
        """Samples x [N, ...] of these conditions, in micro-batches of one shape: the last one is padded.

        short: padded to a power of two instead, where fewer samples are left.
        """
        drawn = []
        nets = [net for net in self.nets() if getattr(net, "training", False)]
        try:
            for net in nets:
                net.eval()
            for first in range(0, len(seeds), self.batch):
                left = min(self.batch, len(seeds) - first)
                width = min(1 << (left - 1).bit_length(), self.batch) if short else self.batch
                index = [min(i, len(seeds) - 1) for i in range(first, first + width)]
                draws = Draws(SAMPLING, [seeds[i] for i in index], self.device)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    x = self.paradigm.sample(self.net, c_N[index].to(self.device), self.guidance, draws)
                drawn.append(x[:left])
        finally:
            for net in nets:
                net.train()
        return torch.cat(drawn)

    def images(self, x_N: Tensor) -> Tensor:
        """Samples x -> uint8 images [N, C, H, W] in host memory, decoded one micro-batch at a time."""
        return torch.cat([to_uint8(self.encoder.decode(x)).cpu() for x in x_N.split(self.batch)])

    def save(self, folder: str | Path, replace: bool = False) -> None:
        """Write a weights folder that mclr.load and every command read. Raises UserError where the folder exists, unless replace."""
        save_weights(folder, self.net, replace=replace, **self.notes)

    def nets(self) -> list[Any]:
        """The network, and its guide where another one is."""
        return [self.net, *([self.guidance.guide.net] if self.guidance.guide else [])]

    def to(self, device: torch.device | str) -> "Model":
        """Move everything to a device; returns this model."""
        self.device = torch.device(device)
        for module in self.nets():
            if isinstance(module, nn.Module):
                module.to(self.device)
        for name, part in vars(self.encoder).items():
            setattr(self.encoder, name, part.to(self.device) if hasattr(part, "to") else part)
        return self

    def counted(self) -> "Model":
        """This model, from now on for sampling alone: constants are folded, and the rows of the network and its guide are counted."""

        def count(module: nn.Module, inputs: tuple, cache: dict[str, Any]) -> None:
            self.work += rows_in(module, *inputs, **cache)

        for module in self.nets():
            fold(module.requires_grad_(False))
            module.register_forward_pre_hook(count, with_kwargs=True)
        return self

    def per_image(self, count: int) -> float:
        """Forwards per image, of a guide too; the scales of a token model are shares of one. count: images, padding included."""
        return round(self.work / count, 9)


def load(
    name: str | Path,
    device: torch.device | str | None = None,
    model: str | None = None,
    data: str | None = None,
    settings: Sequence[str] = (),
) -> Any:
    """A Model of a generator; of other weights (digits-posterior, digits-classifier) the network, frozen and in evaluation mode.

    name: a bundled name, a weights folder, a run folder, a published file, hf://ORG/REPO[/FILE][@REV] of either. device: default,
    a GPU where there is one. model: preset whose settings of sampling are used; default: the one that the weights record, or of their
    size. data: preset or dataset folder; default: images as the weights make them. settings: further ones, like "sample.solver=sde".
    A generator sets switches of the whole process: no TF32 in cuDNN, and the choice of kernels (engine.kernels).
    Raises UserError where there are no such weights or something does not fit, ValueError for what is no name.
    """
    if not isinstance(name, str | Path):
        raise ValueError(f"name={name!r:.40} is no name: give a bundled name, a folder or a file")
    if not (Path(name) / FILE).is_file():
        weights = find_weights(str(name))
        kind = read_config(weights)["kind"]
        if NETWORKS[kind].paradigm is None:
            return load_net(str(weights), kind).to(device or own_device()).requires_grad_(False)
    return load_generator(*find_generator(str(name), model, data, settings), device)


def load_generator(config: RunConfig, weights: Path, device: torch.device | str | None = None) -> Model:
    """The model that samples as config.sample says. Raises UserError where weights or guide do not fit the config."""
    device = own_device() if device is None else torch.device(device)
    choose_kernels(config.engine.kernels, device)
    encoder = build_encoder(config, device)
    net = build_net(config, encoder)
    load_into(net, weights)
    description = read_config(weights)
    if (dial := description["config"].get("strength_max", 0.0)) != config.model.strength.max:
        has = f"have a dial from 0 to {dial:g}" if dial else "have no dial"
        raise UserError(
            f"model.strength.max={config.model.strength.max:g}, but the weights {weights} {has}: leave that setting out"
        )
    guide = build_guide(config, net, "sample", description.get("classes", ()))
    for module in (net, *([guide.net] if guide else [])):
        module.to(device).eval()
    recorded = {key: description[key] for key in ("licence", "base", "classes", "inputs", "tokenizer") if key in description}
    return Model(
        net=net,
        paradigm=build_paradigm(config, encoder),
        encoder=encoder,
        guidance=build_guidance(config.sample, guide),
        batch=config.sample.batch,
        bf16=config.engine.precision == "bf16",
        image_shape=(config.data.channels, config.data.resolution, config.data.resolution),
        class_names=description.get("classes", ()),
        notes={
            "init": weights.name if weights.parent == BUNDLED else str(weights),
            "model": config.model.name,
            "data": config.data.name,
        }
        | recorded,
        device=device,
    )
