"""The two classifiers: shapes, determinism, what the noise level changes, that each can learn real digits by heart, and the cost."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mclr.configs.schema import load
from mclr.errors import UserError
from mclr.likelihood import Draws
from mclr.models.edm2 import EDM2, EDM2Config
from mclr.models.features import ImageClassifier, ImageClassifierConfig, NoiseClassifier, NoiseClassifierConfig, channel_mult_for
from mclr.train.training.networks import build_classifier, build_encoder, build_net
from mclr.train.weights.folder import load_net, save_weights

DIGITS = ImageClassifierConfig(img_channels=1, num_classes=10)
NOISY_DIGITS = NoiseClassifierConfig(img_channels=1, num_classes=10)
CONVNEXT = NoiseClassifierConfig(img_channels=1, num_classes=10, backbone="convnext_atto")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def digits(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scans [B, 1, 8, 8] in [-1, 1] and their conditions [B]."""
    scans = load_digits()
    return torch.from_numpy(scans.images[:rows]).float()[:, None] / 8 - 1, torch.from_numpy(scans.target[:rows])


def doubled(image: torch.Tensor) -> torch.Tensor:
    """At 16 pixels a side, the least that a ConvNeXt takes."""
    return F.interpolate(image, scale_factor=2)


def parameters(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(("size", "channels", "mult"), [(8, 1, (1, 2)), (28, 1, (1, 2, 2)), (64, 3, (1, 2, 2, 4))])
def test_shapes_at_any_size(size, channels, mult):
    image, sigma = torch.zeros(2, channels, size, size), torch.tensor([0.002, 80.0])
    judge = ImageClassifier(ImageClassifierConfig(channels, 7, channel_mult=mult))
    assert judge.features(image).shape == (2, 32 * mult[-1])
    assert judge(image).shape == (2, 7)
    assert NoiseClassifier(NoiseClassifierConfig(channels, 7, channel_mult=mult))(image, sigma).shape == (2, 7)


def test_size_follows_the_resolution():
    assert parameters(ImageClassifier(DIGITS)) < 100_000
    assert 60_000 < parameters(NoiseClassifier(NOISY_DIGITS)) < 100_000
    mults = {4: (1, 2), 8: (1, 2), 16: (1, 2, 2), 28: (1, 2, 2, 4), 32: (1, 2, 2, 4), 512: (1, 2, 2, 4)}
    assert {size: channel_mult_for(size) for size in mults} == mults
    assert channel_mult_for(8) == DIGITS.channel_mult == NOISY_DIGITS.channel_mult


def test_rows_do_not_see_each_other():
    image, _ = digits(6)
    judge, sigma = ImageClassifier(DIGITS), torch.linspace(0.1, 2, 6)
    assert torch.equal(judge(image), judge(image))
    torch.testing.assert_close(judge(image)[2:3], judge(image[2:3]), atol=1e-5, rtol=1e-5)
    for config, x in ((NOISY_DIGITS, image), (CONVNEXT, doubled(image))):
        posterior = NoiseClassifier(config)
        torch.testing.assert_close(posterior(x, sigma)[2:3], posterior(x[2:3], sigma[2:3]), atol=1e-5, rtol=1e-5)
        assert torch.equal(posterior.train()(x, sigma), posterior.eval()(x, sigma))


@pytest.mark.parametrize("config", [NOISY_DIGITS, CONVNEXT], ids=["ours", "timm"])
def test_sigma_enters_by_the_scaling_and_beside_it(config):
    """Beside it: by the modulation of our blocks, or by the channels of a ConvNeXt after the image's."""
    posterior, image = NoiseClassifier(config), doubled(digits(2)[0])
    low, high = torch.full((2,), 0.1), torch.full((2,), 3.0)
    scale = ((high**2 + 0.25) / (low**2 + 0.25)).sqrt()[:, None, None, None]
    assert not torch.allclose(posterior(image, low), posterior(image, high), atol=1e-3)
    # the same scaled input: what is left of the difference does not come from the scaling
    assert not torch.allclose(posterior(image, low), posterior(image * scale, high), atol=1e-3)
    beside = (
        [posterior.trunk.net.stem[0].weight[:, 1:]] if config.backbone else [b.modulation.weight for b in posterior.trunk.blocks]
    )
    for weight in beside:
        torch.nn.init.zeros_(weight)
    torch.testing.assert_close(posterior(image, low), posterior(image * scale, high), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [NOISY_DIGITS, CONVNEXT], ids=["ours", "timm"])
def test_noise_classifier_answers_in_fp32_over_the_whole_noise_law(config):
    posterior = NoiseClassifier(config).bfloat16()
    sigma = torch.tensor([0.002, 0.5, 80.0])
    logits = posterior(sigma[:, None, None, None] * torch.ones(3, 1, 16, 16), sigma)
    assert logits.dtype == torch.float32 and logits.isfinite().all()


def fit(net: torch.nn.Module, inputs: tuple, c: torch.Tensor, steps: int) -> torch.Tensor:
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(*inputs), c).backward()
        optimizer.step()
    return net(*inputs).argmax(1)


def test_classifiers_learn_digits_by_heart():
    image, c = digits(40)
    assert torch.equal(fit(ImageClassifier(DIGITS), (image,), c, 40), c)
    draws = Draws(0, list(range(40)))
    sigma = (draws.normal() * 1.2 - 1.2).exp()
    noisy = image + sigma[:, None, None, None] * draws.normal(1, 8, 8)
    assert torch.equal(fit(NoiseClassifier(NOISY_DIGITS), (noisy, sigma), c, 80), c)
    assert torch.equal(fit(NoiseClassifier(CONVNEXT), (doubled(noisy), sigma), c, 15), c)


@pytest.mark.parametrize("name", ["convnext_tiny", "convnextv2_nano", "convnext_zepto_rms"])
def test_a_backbone_takes_any_size_and_has_no_batch_norm(name):
    with torch.device("meta"):
        posterior = NoiseClassifier(NoiseClassifierConfig(3, 7, backbone=name))
        for size in (16, 20, 64):
            assert posterior(torch.empty(2, 3, size, size), torch.empty(2)).shape == (2, 7)
    assert not any("BatchNorm" in type(module).__name__ for module in posterior.modules())


def test_a_backbone_survives_its_weights_folder(tmp_path):
    posterior, image, sigma = NoiseClassifier(CONVNEXT), doubled(digits(2)[0]), torch.tensor([0.1, 3.0])
    save_weights(tmp_path / "weights", posterior)
    loaded = load_net(str(tmp_path / "weights"), "noise_classifier")
    assert loaded.config == CONVNEXT and torch.equal(loaded(image, sigma), posterior(image, sigma))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["convnext_tinny"], "posterior backbone convnext_tinny is no ConvNeXt of timm; did you mean convnext_tiny?"),
        (["resnet18"], "posterior backbone resnet18 is no ConvNeXt of timm; did you mean convnext_tiny?"),
        (["convnext_tiny", "data.resolution=8"], "posterior backbone convnext_tiny needs images of 16 pixels or more, "
         "data.resolution=8: give model.posterior.backbone=null"),
    ],
)  # fmt: skip
def test_a_backbone_that_cannot_be_is_one_line(overrides, message):
    name, *others = overrides
    config = load("edm2-32px", "mclr", "digits", "local", ["data.resolution=32", f"model.posterior.backbone={name}", *others])
    with pytest.raises(UserError) as refused:
        build_classifier(config)
    assert str(refused.value) == message


def forward_flops(*inputs: torch.Tensor, net) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(*inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize(("size", "percent"), [("edm2-img64-s", 1.5), ("latents of edm2-img512-l", 1.0)])
def test_the_posterior_costs_at_most_3_percent_of_a_training_step(size, percent):
    """A step is three forwards of every row, of either network: their ratio is that of one forward where no sample has a contrast
    row (f = 0), when the generator costs least. percent: as the preset says."""
    with torch.device("meta"):
        if size == "edm2-img64-s":
            data = ["data.resolution=64", "data.channels=3", "data.num_classes=1000"]
            config = load(size, "mclr", "digits", "local", data)
            net, classifier = build_net(config, build_encoder(config, torch.device("meta"))), build_classifier(config)
            weights = 280_209_381
        else:
            net = EDM2(EDM2Config(64, 4, 1000, model_channels=320))
            classifier = NoiseClassifier(NoiseClassifierConfig(4, 1000, backbone="convnext_small"))
            weights = 777_498_085
        assert parameters(net) == weights and net.config.num_classes == classifier.config.num_classes == 1000
        x, sigma, c = torch.empty(1, net.config.img_channels, 64, 64), torch.empty(1), torch.empty(1, dtype=torch.int64)
        # forward() asks autocast for a dtype, which the meta device has none of: its two parts
        generator = forward_flops(x, sigma, c, net=lambda x, sigma, c: net.trunk(x, net.embed(sigma, c)))
        share = forward_flops(x, sigma, net=classifier) / generator
    assert share <= 0.03 and round(100 * share, 1) == percent
