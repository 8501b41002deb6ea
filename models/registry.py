"""The list of networks: what each kind is, which options build it, and the words of its model card. Without torch.

To add a network: one file in models/, its options without torch (like models/options.py), one entry here, a YAML in configs/model/ that
says model.kind. models/README.md lists what a network may have besides; whoever needs it asks by name.
"""

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from mclr.models.options import DiTConfig, EDM2Config, ImageClassifierConfig, NoiseClassifierConfig, VARConfig, VQVAEConfig


@dataclass(frozen=True)
class Network:
    """One kind of network.

    place: "module:class"; the class takes the config as its one argument and keeps it as `config`. A module whose networks others
    publish holds PUBLISHED, a models.convert.Published. config: dataclass of its options, which does not import torch. about, use: what
    its model card says, the latter a command. paradigm: of generators, what they answer as: diffusion or next_scale.
    """

    place: str
    config: type
    about: str
    use: str
    paradigm: str | None = None

    @property
    def net(self) -> Any:
        """The class of the network."""
        return resolve_name(self.place)

    @property
    def published(self) -> Any:
        """How its published state dicts are named and recognised (models.convert.Published); None where there are none."""
        return getattr(resolve_name(self.place.partition(":")[0]), "PUBLISHED", None)


SAMPLE, TRAIN = "mclr sample FOLDER --model {model} --data {data} --out samples/mine", "mclr train --model MODEL --data {data}"
JUDGE = "mclr evaluate SAMPLES --reference {data} --judge FOLDER"
NETWORKS = {
    "edm2": Network("mclr.models.edm2:EDM2", EDM2Config, "An EDM2 diffusion network", SAMPLE, "diffusion"),
    "dit": Network("mclr.models.dit:DiT", DiTConfig, "A DiT or SiT diffusion network", SAMPLE, "diffusion"),
    "var": Network(
        "mclr.models.var:VAR", VARConfig, "A VAR next-scale network", SAMPLE + " model.tokenizer={tokenizer}", "next_scale"
    ),
    "vqvae": Network(
        "mclr.models.vqvae:VQVAE",
        VQVAEConfig,
        "A multi-scale VQVAE, the tokenizer of VAR networks",
        TRAIN + " model.tokenizer=FOLDER",
    ),
    "image_classifier": Network(
        "mclr.models.features:ImageClassifier", ImageClassifierConfig, "A classifier of images, the judge of samples", JUDGE
    ),
    "noise_classifier": Network(
        "mclr.models.features:NoiseClassifier",
        NoiseClassifierConfig,
        "A classifier of noisy images, the posterior of diffusion runs",
        TRAIN + " model.posterior.weights=FOLDER",
    ),
}


def kind_of(net: Any) -> str:
    """The kind of a network, a key of NETWORKS, told by its options. Raises ValueError for options that are not there."""
    for kind, network in NETWORKS.items():
        if network.config is type(net.config):
            return kind
    raise ValueError(f"{type(net).__name__} is not in models/registry.py: add a line for it")


def kinds_of(paradigm: str) -> list[str]:
    """The kinds of networks that generate for a paradigm."""
    return [kind for kind, network in NETWORKS.items() if network.paradigm == paradigm]


def fold(net: Any) -> None:
    """Compute the constants of a network's weights, once and for all, before it is sampled; nothing for most networks."""
    if hasattr(net, "fold"):
        net.fold()


def share_of(net: Any, *inputs: Any, cache: Any = None) -> float:
    """Cost of one row of this call, as a share of a whole row: less than 1 if only some tokens are computed."""
    return net.tokens_of(*inputs, cache=cache) / net.tokens if hasattr(net, "tokens_of") else 1.0
