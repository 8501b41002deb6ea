"""train/scoring/extractors.py and models/inception.py: the input of a network, the files it takes, and how Inception pools.

The weights are random: no published score is checked here.
"""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torchvision.models.inception import Inception3

from mclr.errors import UserError
from mclr.models.inception import Inception, resize_as_tensorflow
from mclr.train.scoring.extractors import dinov2, dinov2_input, open_judge


def uint8(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.fixture(scope="module")
def inception():
    torch.manual_seed(0)
    net = Inception().eval()
    for module in net.modules():
        # with torch's default weights the output would hardly depend on the input
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return net


@pytest.fixture
def small_dinov2(monkeypatch):
    """One block of 32 features in place of ViT-L/14's 24 of 1024; gives a state dict of it as published, with 37 x 37 positions."""
    small = partial(timm.create_model, depth=1, embed_dim=32, num_heads=2)
    monkeypatch.setattr(timm, "create_model", small)
    torch.manual_seed(0)
    state_dict = small("vit_large_patch14_dinov2", num_classes=0, img_size=518).state_dict()
    return {**state_dict, "pos_embed": torch.randn(1, 1370, 32), "mask_token": torch.zeros(1, 32)}


def test_inception_takes_the_names_of_the_port(inception):
    def names(net):
        return {name: tuple(t.shape) for name, t in net.state_dict().items() if not name.startswith(("AuxLogits", "fc"))}

    own = names(inception.net)
    assert own == names(Inception3(init_weights=False)) and len(own) == 564
    assert inception.net.fc.weight.shape == (1008, 2048) and inception.net.fc.bias.shape == (1008,)


def test_inception_pools_as_the_tensorflow_graph(inception):
    """Constant planes stay constant under an average that leaves the padding out: hand-made pooling through the same convolution."""
    net = inception.net
    x = torch.rand(1, 768, 4, 4)
    padded, ones = (F.pad(each, (1, 1, 1, 1)) for each in (x, torch.ones_like(x)))
    mean = sum(padded[..., i : i + 4, j : j + 4] for i in range(3) for j in range(3)) / sum(
        ones[..., i : i + 4, j : j + 4] for i in range(3) for j in range(3)
    )
    with torch.no_grad():
        torch.testing.assert_close(net.Mixed_6d(x)[:, -192:], net.Mixed_6d.branch_pool(mean))
        for block, channels in ((net.Mixed_5b, 192), (net.Mixed_5d, 288), (net.Mixed_6b, 768), (net.Mixed_7b, 1280)):
            flat = torch.rand(1, channels, 1, 1).expand(1, channels, 5, 5)
            assert block.branch_pool(block.pool(flat)).std((2, 3)).max() < 1e-5
            width = block.branch_pool.conv.out_channels
            torch.testing.assert_close(block(flat)[:, -width:], block.branch_pool(flat))
        x = torch.randn(1, 2048, 3, 3)
        highest = torch.stack(
            [x[..., max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].amax((2, 3)) for i in range(3) for j in range(3)], -1
        )
        torch.testing.assert_close(net.Mixed_7c(x)[:, -192:], net.Mixed_7c.branch_pool(highest.view(1, 2048, 3, 3)))


@pytest.mark.parametrize(("size", "side"), [((4, 4), 8), ((5, 7), 3), ((6, 6), 6), ((2, 3), 299)])
def test_resizing_is_tensorflow_s(size, side):
    """Its definition, pixel by pixel: output i lies at i * size / side, between its floor and the next pixel or the edge."""
    x = uint8(1, 1, *size)[0, 0].double().numpy()
    out = np.zeros((side, side))
    for i, j in np.ndindex(side, side):
        y, z = i * size[0] / side, j * size[1] / side
        (a, b), (p, q) = divmod(y, 1), divmod(z, 1)
        a, p = int(a), int(p)
        c, r = min(a + 1, size[0] - 1), min(p + 1, size[1] - 1)
        out[i, j] = (1 - b) * ((1 - q) * x[a, p] + q * x[a, r]) + b * ((1 - q) * x[c, p] + q * x[c, r])
    ours = resize_as_tensorflow(torch.from_numpy(x)[None, None].float(), side)
    np.testing.assert_allclose(ours[0, 0], out, atol=1e-3)


def test_inception_sees_scaled_images_and_answers_in_adm_s_layout(inception):
    seen, maps = [], []
    hooks = [
        inception.net.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
        inception.net.Mixed_6d.branch1x1.register_forward_hook(lambda *args: maps.append(args[-1])),
        inception.net.Mixed_7c.register_forward_hook(lambda *args: maps.append(args[-1])),
    ]
    image = uint8(2, 3, 299, 299)
    with torch.no_grad():
        features, spatial, prob = inception(image)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(seen[0], (image.float() - 128) / 128)
    assert features.shape == (2, 2048) and spatial.shape == (2, 2023) and prob.shape == (2, 1008)
    torch.testing.assert_close(features, maps[1].mean((2, 3)))
    y, x, channel = 3, 11, 5
    assert maps[0].shape[2:] == (17, 17) and torch.equal(spatial[:, (y * 17 + x) * 7 + channel], maps[0][:, channel, y, x])
    # the bias of the last layer is left out
    torch.testing.assert_close(prob, (features @ inception.net.fc.weight.T).softmax(1))


def test_dinov2_sees_what_edm2_showed_it():
    image = uint8(2, 3, 40, 40)
    resized = F.interpolate(image.double(), size=(224, 224), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v, dtype=torch.double)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    expected = (resized / 255 - mean) / std
    # bicubic overshoots, and that is kept
    assert resized.min() < 0 and resized.max() > 255
    torch.testing.assert_close(dinov2_input(image).double(), expected, rtol=0, atol=1e-4)
    flat = torch.full((1, 1, 30, 30), 100, dtype=torch.uint8)
    torch.testing.assert_close(dinov2_input(flat)[0], ((100 / 255 - mean) / std).expand(3, 224, 224).float(), rtol=0, atol=1e-5)
    # larger images are smoothed first: a checkerboard of pixels becomes gray
    board = (255 * ((torch.arange(448)[:, None] + torch.arange(448)) % 2)).to(torch.uint8)[None, None]
    assert dinov2_input(board)[..., 20:-20, 20:-20].std((2, 3)).max() < 0.05


def test_positions_of_dinov2_are_those_of_the_published_code(small_dinov2):
    net = dinov2(small_dinov2, Path("file.pth"))
    pos, own = small_dinov2["pos_embed"], net.pos_embed
    assert own.shape == (1, 1 + 16 * 16, 32) and torch.equal(own[:, 0], pos[:, 0])

    def at(i):
        """The four old positions around new position i, and their weights in a cubic of a = -0.75."""
        centre = (i + 0.5) * 37 / 16.1 - 0.5
        first = int(np.floor(centre)) - 1
        d = np.abs(centre - np.arange(first, first + 4))
        near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * d**3 + 3.75 * d**2 - 6 * d + 3
        return [min(max(k, 0), 36) for k in range(first, first + 4)], np.where(d <= 1, near, far)

    grid = pos[0, 1:].view(37, 37, 32).double().numpy()
    for i, j in ((0, 0), (7, 3), (15, 15), (15, 0)):
        (rows, down), (columns, across) = at(i), at(j)
        expected = np.einsum("a,b,abd->d", down, across, grid[np.ix_(rows, columns)])
        np.testing.assert_allclose(own[0, 1 + 16 * i + j].detach(), expected, atol=1e-5)


def test_dinov2_answers_with_its_class_token(small_dinov2, tmp_path):
    torch.save(small_dinov2, tmp_path / "dino.pth")
    judge = open_judge("dinov2", tmp_path / "dino.pth")
    gray = uint8(3, 1, 20, 20)
    answer = judge(gray)
    assert answer.features_BD.shape == (3, 32) and answer.spatial_BS is None and answer.prob_BK is None
    with torch.no_grad():
        tokens = judge.net.forward_features(dinov2_input(gray.repeat(1, 3, 1, 1)))
    torch.testing.assert_close(answer.features_BD, tokens[:, 0])
    assert judge.conditions is None and judge.fd == "FD_DINOv2" and len(judge.sha256) == 64


def test_inception_is_read_from_the_port_s_file(inception, tmp_path):
    # the oldest files have no counters of batches
    own = {name: t for name, t in inception.net.state_dict().items() if "num_batches" not in name}
    torch.save(own, tmp_path / "pt_inception.pth")
    judge = open_judge("inception", tmp_path / "pt_inception.pth")
    gray = uint8(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(judge(gray)[0], inception(gray.repeat(1, 3, 1, 1))[0])


def test_missing_and_foreign_weights_are_one_line(small_dinov2, inception, tmp_path, monkeypatch):
    def offline(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    wrong = tmp_path / "wrong.pth"
    torch.save({"x": torch.zeros(1)}, wrong)
    short = tmp_path / "short.pth"
    torch.save({name: t for name, t in inception.net.state_dict().items() if name != "fc.weight"}, short)
    for name, weights, message in [
        (
            "dinov2",
            None,
            r"^judge dinov2 needs dinov2_vitl14_pretrain.pth, which cannot be fetched \(no route\): download it \(https://\S*\), "
            "give it by --judge-weights FILE$",
        ),
        (
            "inception",
            None,
            r"needs pt_inception-2015-12-05-6726825d.pth: download it \(https://\S*\), give it by --judge-weights",
        ),
        (
            "dinov2",
            wrong,
            r"wrong.pth does not hold the weights of this judge \(cls_token is missing, x is un.* and \d+ more entries\)",
        ),
        ("inception", short, r"does not hold the weights of this judge \(fc.weight is missing\)"),
        ("inception", tmp_path / "none.pth", "cannot read"),
        ("digits-classifier", wrong, "--judge-weights is for the judges dinov2 and inception"),
    ]:
        with pytest.raises(UserError, match=message):
            open_judge(name, weights)
