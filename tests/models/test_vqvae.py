"""The tokenizer against numbers of the published implementation, and its training."""

import pytest
import torch
import torch.nn.functional as F
from golden_weights import load_golden, load_rule, relative_rms

from mclr.errors import UserError
from mclr.models.vqvae import PUBLISHED, VQVAE, VQVAEConfig

DIGITS = VQVAEConfig(img_channels=1, ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8, vocab_size=64, scales=(1, 2, 3, 4))


def published_net(file):
    arrays, config, names = load_golden(file)
    config["scales"] = tuple(config.pop("v_patch_nums"))
    return load_rule(VQVAE(VQVAEConfig(**config)), names, PUBLISHED), arrays


@pytest.fixture(scope="module", params=["vqvae_tiny.npz", "vqvae_10scales.npz"])
def published(request):
    net, arrays = published_net(request.param)
    if "image_uint8" in arrays:
        arrays["image"] = arrays.pop("image_uint8") / 127.5 - 1
    return net, arrays


@torch.no_grad()
def test_features_codes_f_hat_and_teacher(published):
    net, arrays = published
    features = net.features(arrays["image"])
    tokens_BL, f_hats = net.quantize(features)
    assert torch.equal(tokens_BL, arrays["codes"])
    found = {"features": features, "f_hat": f_hats[-1], "teacher_input": net.teacher(arrays["codes"])}
    assert all(relative_rms(value, arrays[name]) < 1e-5 for name, value in found.items())


@torch.no_grad()
def test_encode_and_decode():
    """decode takes tokens or their feature map."""
    net, arrays = published_net("vqvae_tiny.npz")
    assert torch.equal(net.encode(arrays["image"]), arrays["codes"])
    image = net.decode(arrays["codes"])
    assert torch.equal(net.decode(net.replay(arrays["codes"])[0]), image)
    assert relative_rms(image, arrays["reconstruction"]) < 1e-5
    assert image.abs().max() == 1, "the clamp has nothing to do here, so this test could not see it"


@pytest.mark.parametrize(
    "scales, expected", [(4, [0, 1, 2, 3]), (10, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]), (1, [0]), (2, [0, 3]), (3, [0, 2, 3])]
)
def test_phi_index(scales, expected):
    net = VQVAE(VQVAEConfig(img_channels=1, ch=8, ch_mult=(1,), z_channels=4, vocab_size=8, scales=tuple(range(1, scales + 1))))
    assert [net.phi_index(scale) for scale in range(scales)] == expected


@torch.no_grad()
def test_a_blend_of_codes_adds_up_like_its_codes():
    """A scale is affine in the vectors of its codes; one code alone is itself."""
    net, arrays = published_net("vqvae_tiny.npz")
    one_Bl, other_Bl = arrays["codes"][:, 1:5], arrays["codes"][:, 2:6]
    one, other = (F.one_hot(tokens_Bl, net.config.vocab_size).float() for tokens_Bl in (one_Bl, other_Bl))
    start = net.advance(net.start(len(one)), arrays["codes"][:, :1], 0)[0]
    f_one, f_other = net.advance(start, one_Bl, 1), net.advance(start, other_Bl, 1)
    assert relative_rms(f_one[0], f_other[0]) > 0.01
    for shares, weight in ((one, 1.0), (0.3 * one + 0.7 * other, 0.3)):
        for blended, a, b in zip(net.advance(start, shares, 1), f_one, f_other, strict=True):
            assert relative_rms(blended, weight * a + (1 - weight) * b) < 1e-5


def digit_batch():
    torch.manual_seed(0)
    images = F.interpolate(torch.rand(8, 1, 3, 3), size=8, mode="bicubic").clamp(0, 1) * 2 - 1
    return VQVAE(DIGITS), images


def test_tiny_tokenizer_learns_a_batch():
    net, images = digit_batch()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    errors = []
    for _ in range(30):
        reconstruction, vq_loss, tokens = net(images)
        error = F.mse_loss(reconstruction, images)
        optimizer.zero_grad()
        (error + vq_loss).backward()
        optimizer.step()
        errors.append(error.item())
    assert tokens.shape == (8, 30) and tokens.dtype == torch.int64
    # A decoder that ignores the tokens cannot do better than the variance within the batch.
    assert errors[-1] < 0.4 * images.var(0, correction=0).mean(), errors
    net.eval()
    assert torch.equal(net.encode(images), net.quantize(net.features(images))[0])
    with torch.no_grad():
        decoded, reconstruction = net.decode(net.encode(images)), net(images)[0]
    torch.testing.assert_close(decoded, reconstruction.clamp(-1, 1), rtol=1e-4, atol=1e-5)


def test_gradients_of_training():
    """Straight-through: the reconstruction moves encoder and decoder; the quantisation loss encoder, codebook and phi."""
    net, images = digit_batch()
    reconstruction, vq_loss, _ = net(images)

    def reached(loss):
        net.zero_grad()
        loss.backward(retain_graph=True)
        return {name.split(".")[0] for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}

    assert reached(reconstruction.square().mean()) == {"encoder", "to_features", "from_features", "decoder"}
    assert reached(vq_loss) == {"encoder", "to_features", "codebook", "phis"}


def test_gradient_passes_straight_through():
    """The encoder's features receive exactly the gradient of f_hat."""
    net, images = digit_batch()
    f = net.features(images).detach().requires_grad_()
    net.features = lambda image: f
    f_hat = net.quantize(f)[1][-1].detach().requires_grad_()
    net(images)[0].square().sum().backward()
    net.decoder(net.from_features(f_hat)).square().sum().backward()
    assert relative_rms(f.grad, f_hat.grad) < 1e-4


def test_quantisation_loss_is_the_papers():
    """Mean over scales of (1 + beta) |f - f_hat_k|^2 in value; the gradient of f carries beta alone."""
    net, images = digit_batch()
    f = net.features(images).detach().requires_grad_()
    net.features = lambda image: f
    _, vq_loss, _ = net(images)
    vq_loss.backward()
    with torch.no_grad():
        f_hats = net.quantize(f)[1]
        errors = torch.stack([f - f_hat for f_hat in f_hats])
    torch.testing.assert_close(vq_loss, 1.25 * errors.square().mean())
    assert relative_rms(f.grad, 0.25 * 2 * errors.mean(0) / f.numel()) < 1e-5


def test_wrong_image_size_is_an_error_in_one_line():
    net, _ = digit_batch()
    with pytest.raises(UserError, match="3x8x8 but this tokenizer reads 1x8x8"):
        net.encode(torch.zeros(1, 3, 8, 8))
