"""The list of networks: what each kind is, which configuration builds it, and the words of its model card.

To add a network: one file in models/, one entry here, a YAML in configs/model/. A network may also have these methods; whoever
needs one asks for it by name, and a network without it does without:

| method | for |
| --- | --- |
| magnitude_preserving() -> list of parameters | weights that training keeps at unit magnitude (mclr.project) |
| fold() | constant weights are computed once, before sampling |
| blocks | modules that run one after the other: compiled and gathered one at a time |
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from mclr.models.edm2 import EDM2, EDM2Config
from mclr.models.features import ImageClassifier, ImageClassifierConfig, NoiseClassifier, NoiseClassifierConfig
from mclr.models.var import VAR, VARConfig
from mclr.models.vqvae import VQVAE, VQVAEConfig


@dataclass(frozen=True)
class Network:
    """One kind of network.

    net, config: its class and the dataclass that builds it. about, use: what its model card says, the latter a command.
    paradigm: of generators, diffusion or next_scale: what the network answers as (mclr/diffusion.py, mclr/next_scale.py).
    """

    net: type[nn.Module]
    config: type
    about: str
    use: str
    paradigm: str | None = None


NETWORKS: dict[str, Network] = {
    "edm2": Network(
        EDM2,
        EDM2Config,
        "An EDM2 diffusion network",
        "mclr sample FOLDER --model {model} --data {data} --out samples/mine",
        paradigm="diffusion",
    ),
    "var": Network(
        VAR,
        VARConfig,
        "A VAR next-scale network",
        "mclr sample FOLDER --model {model} --data {data} --out samples/mine model.tokenizer={tokenizer}",
        paradigm="next_scale",
    ),
    "vqvae": Network(
        VQVAE,
        VQVAEConfig,
        "A multi-scale VQVAE, the tokenizer of VAR networks",
        "mclr train --model MODEL --data {data} model.tokenizer=FOLDER",
    ),
    "image_classifier": Network(
        ImageClassifier,
        ImageClassifierConfig,
        "A classifier of images, the judge of samples",
        "mclr evaluate SAMPLES --reference {data} --judge FOLDER",
    ),
    "noise_classifier": Network(
        NoiseClassifier,
        NoiseClassifierConfig,
        "A classifier of noisy images, the posterior of diffusion runs",
        "mclr train --model MODEL --data {data} model.posterior.weights=FOLDER",
    ),
}


def kind_of(net: nn.Module) -> str:
    """The kind of a network, a key of NETWORKS. Raises ValueError for a class that is not there."""
    for kind, network in NETWORKS.items():
        if network.net is type(net):
            return kind
    raise ValueError(f"{type(net).__name__} is not in models/registry.py: add a line for it")


def forced_weights(net: Any) -> list[nn.Parameter]:
    """The weights that training keeps at unit magnitude; none of most networks."""
    return net.magnitude_preserving() if hasattr(net, "magnitude_preserving") else []


def fold(net: Any) -> None:
    """Compute the constants of a network's weights, once and for all, before it is sampled; nothing for most networks."""
    if hasattr(net, "fold"):
        net.fold()
