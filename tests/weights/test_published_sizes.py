"""The presets of every published size: their networks have the published names and shapes, their recipes the published numbers."""

import dataclasses
import gzip
import json

import pytest
import torch
from golden_weights import FOLDER
from photos import save_tiny_vae

from mclr.configs.schema import PRESETS, load
from mclr.models.edm2 import EDM2, EDM2Config
from mclr.models.options import SCALES_256, SCALES_512
from mclr.models.registry import NETWORKS, kind_of
from mclr.models.vqvae import VQVAE, VQVAEConfig
from mclr.train.training.networks import build_classifier, build_encoder, build_guide, build_net, build_paradigm
from mclr.train.weights.folder import save_weights

NAMES: dict[str, dict[str, tuple[int, ...]]] = {}
for file in ("published_names.json.gz", "published_names_dit.json.gz"):
    with gzip.open(FOLDER / file) as stored:
        for model, entries in json.loads(stored.read()).items():
            NAMES[model.replace("-256", "")] = {name: tuple(shape) for name, shape in entries.items()}
MODELS = [model for model in NAMES if not model.startswith("vae")]
TOKENIZERS = {"vae_ch160v4096z32": SCALES_256, "vae_ch160v4096z32@512": SCALES_512}
# width x 64, rate, dropout (arXiv 2312.02696, appendix B)
WIDTHS = {
    "xxs": (1, 0.0170, 0.0),
    "xs": (2, 0.0120, 0.0),
    "s": (3, 0.0100, 0.0),
    "m": (4, 0.0090, 0.1),
    "l": (5, 0.0080, 0.1),
    "xl": (6, 0.0070, 0.1),
    "xxl": (7, 0.0065, 0.1),
}
# images of the whole training, in Mi; steps until the rate falls; mean and standard deviation of ln sigma
LENGTHS = {
    512: ({"xxs": 2048, "xs": 2048, "s": 2048, "m": 2048, "l": 1792, "xl": 1280, "xxl": 896}, 70_000, -0.4, 1.0),
    64: ({"xs": 1024, "s": 1024, "m": 2048, "l": 1024, "xl": 640}, 35_000, -0.8, 1.6),
}
# std of the averages with the best FID, total weight of guidance there
AVERAGES = {
    512: {"xs": 0.135, "s": 0.130, "m": 0.100, "l": 0.085, "xl": 0.085, "xxl": 0.070},
    64: {"s": 0.075, "m": 0.060, "l": 0.040, "xl": 0.040},
}
GUIDED = {"xs": 1.4, "s": 1.4, "m": 1.2, "l": 1.2, "xl": 1.2, "xxl": 1.2}


def resolution_of(model: str) -> int:
    return 64 if "img64" in model else 512 if "512" in model or model.endswith("-s") else 256


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_tiny_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Resolution -> a tokenizer of published scales, codes and width, and little else."""
    folders = {}
    for resolution, scales in ((256, SCALES_256), (512, SCALES_512)):
        folders[resolution] = tmp_path_factory.mktemp("weights") / "tokenizer"
        small = VQVAEConfig(ch=32, ch_mult=(1,) * 5, num_res_blocks=1, scales=scales)
        save_weights(folders[resolution], VQVAE(small))
    return folders


@pytest.fixture
def argv_of(vae, tokenizers, tmp_path):
    """Model -> the arguments of `mclr train` that no preset can know: data, tokenizer or VAE."""

    def argv(model: str) -> list[str]:
        resolution = resolution_of(model)
        described = {"name": "imagenet", "resolution": resolution, "channels": 3, "num_classes": 1000, "source": "", "seed": 0}
        described |= {"class_names": [str(c) for c in range(1000)]}
        described |= {"splits": {split: {"count": 0, "shards": []} for split in ("train", "val")}}
        (tmp_path / "dataset.json").write_text(json.dumps(described))
        found = [f"model.vae={vae}"] if "img512" in model or "it-" in model else []
        if model.startswith("var"):
            found = [f"model.tokenizer={tokenizers[resolution]}"]
        return ["--model", model, "--data", str(tmp_path), *found]

    return argv


def load_with(argv: list[str], *overrides: str):
    _, model, _, data, *given = argv
    return load(model, "mclr", data, "local", [*given, *overrides])


def assert_published(net, name: str):
    """Names and shapes, constants included, are those of the published state dict: no fewer and no more."""
    family = NETWORKS[kind_of(net)].published
    ours = family.entries(net) | family.constants(net.config)
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == NAMES[name]


def test_an_unconditional_network_may_guide(tmp_path):
    """As EDM2 guides all of its sizes, by an unconditional XS."""
    small = EDM2Config(
        8, 1, 10, model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=16
    )
    save_weights(tmp_path / "guide", EDM2(dataclasses.replace(small, num_classes=0)))
    config = load("edm2-digits", "mclr", "digits", "local", [f"sample.guide.weights={tmp_path / 'guide'}", "sample.gamma=0.4"])
    made = build_guide(config, EDM2(small), "sample")
    assert made is not None and made.null is None
    guide = made.net
    assert guide.config.num_classes == 0
    x, sigma = torch.zeros(2, 1, 8, 8), torch.ones(2)
    assert torch.equal(guide(x, sigma, torch.tensor([0, 9]))[0], guide(x, sigma, torch.tensor([10, 10]))[0])


def test_every_published_size_has_a_preset():
    presets = {path.stem for path in (PRESETS / "model").glob("*.yaml")}
    assert set(MODELS) == presets - {"edm2-digits", "sit-digits", "var-digits", "edm2-32px"} and len(MODELS) == 28
    assert set(NAMES) == {*MODELS, *TOKENIZERS}


@pytest.mark.parametrize("model", MODELS)
def test_the_network_of_a_preset_is_the_published_one(model, argv_of):
    config = load_with(argv_of(model))
    encoder = build_encoder(config, torch.device("cpu"))
    with torch.device("meta"):
        net = build_net(config, encoder)
        assert_published(net, model)
        if config.model.paradigm == "diffusion":
            channels, side = (4, resolution_of(model) // 8) if config.model.vae else (3, 64)
            assert build_paradigm(config, encoder).shape == (channels, side, side)
            assert build_classifier(config).config.img_channels == channels


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_published_tokenizers_are_the_default_one(name):
    with torch.device("meta"):
        assert_published(VQVAE(VQVAEConfig(scales=TOKENIZERS[name])), name)


@pytest.mark.parametrize("model", [model for model in MODELS if model.startswith("edm2")])
def test_edm2_recipes(model, argv_of):
    resolution, size = resolution_of(model), model.rpartition("-")[2]
    width, rate, dropout = WIDTHS[size]
    lengths, decay, mean, std = LENGTHS[resolution]
    config = load_with(argv_of(model))
    train, net, sample = config.train, config.model.net, config.sample
    assert (config.model.name, net.model_channels, net.dropout) == (model, 64 * width, dropout)
    assert (config.model.noise_mean, config.model.noise_std, config.model.sigma_data) == (mean, std, 0.5)
    # the rate at which the published training ended
    steps = lengths[size] * 2**20 / train.batch
    assert train.lr == round(rate * (decay / steps) ** 0.5, 4)
    assert (train.batch, train.betas, train.warmup_images, train.drop_condition) == (2048, (0.9, 0.99), 10_000_000, 0)
    assert train.ema_std == AVERAGES[resolution].get(size, AVERAGES[resolution]["xs" if resolution == 512 else "s"])
    assert config.objective.lam == pytest.approx(GUIDED.get(size, 1.4) - 1)
    grid = (sample.solver, sample.steps, sample.sigma_min, sample.sigma_max, sample.rho, sample.gamma)
    assert grid == ("heun", 32, 0.002, 80, 7, 0)


@pytest.mark.parametrize("model", [model for model in MODELS if model.startswith("var")])
def test_var_recipes(model, argv_of):
    config = load_with(argv_of(model))
    train, net, sample = config.train, config.model.net, config.sample
    depth = int(model.split("-")[1].removeprefix("d"))
    assert (config.model.name, net.depth, net.shared_aln) == (model, depth, model.endswith("-s"))
    assert net.drop_path == round(0.1 * depth / 24, 4)
    assert (train.lr, train.batch, train.images, train.drop_condition) == (2e-5, 256, 1_281_167, 0.1)
    assert (sample.top_k, sample.top_p, sample.schedule.kind, sample.gamma) == (900, 0.96, "ramp", 0)
