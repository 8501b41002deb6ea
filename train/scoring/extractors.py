"""Judges: networks that turn images into the features in which samples are compared with real images.

B images of a batch; D features; S spatial features; K classes; C H W image.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mclr.errors import UserError
from mclr.models.convert import misfits
from mclr.models.features import ImageClassifier
from mclr.models.inception import Inception
from mclr.train.data.encoders import from_uint8
from mclr.train.system.files import checksum
from mclr.train.system.hub import fetch
from mclr.train.weights.folder import find_weights, load_net, sha256
from mclr.train.weights.state_dict import read_state_dict

PUBLISHED = ("dinov2", "inception")
BATCH = 256  # images per forward of a classifier
DINOV2 = "hf://timm/vit_large_patch14_dinov2.lvd142m/model.safetensors"
DINOV2_FILE = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
INCEPTION_FILE = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's images in [0, 1]


class Answer(NamedTuple):
    """The output of a judge for a batch: features, and spatial features and class probabilities if it has them."""

    features_BD: Tensor
    spatial_BS: Tensor | None = None
    prob_BK: Tensor | None = None


@dataclass(frozen=True)
class Judge:
    """A network, and how it reads uint8 images.

    features: the features and their preprocessing, in words. fd: the usual name of their Fréchet distance. batch: images per forward.
    conditions: number of conditions that it tells apart; None if its classes are not those of the data.
    """

    name: str
    features: str
    fd: str
    sha256: str
    net: nn.Module
    answer: Callable[[nn.Module, Tensor], Answer]
    batch: int
    conditions: int | None = None

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @torch.no_grad()
    def __call__(self, image_BCHW: Tensor) -> Answer:
        """The answer for uint8 images [B, C, H, W], on the device of the network."""
        # published scores were measured without TF32, cuDNN's default
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.answer(self.net, image_BCHW.to(self.device))


def open_judge(name: str, weights: Path | None) -> Judge:
    """Open dinov2, inception, or a classifier (a weights folder or a bundled name). weights: the file of dinov2 or inception.

    Raises UserError if weights are missing or do not fit the network.
    """
    if name == "dinov2":
        try:
            path = weights or fetch(DINOV2)
        except UserError as error:
            reason = str(error.__cause__ or error).strip().partition("\n")[0]
            file = DINOV2_FILE.rpartition("/")[2]
            raise UserError(
                f"judge dinov2 needs {file}, which cannot be fetched ({reason}): download it ({DINOV2_FILE}), "
                "give it by --judge-weights FILE"
            ) from error
        net = dinov2(read_state_dict(path), path)
        features = "class token after the last norm; 224 pixels, bicubic with antialiasing, ImageNet's mean and deviation"
        return Judge(name, features, "FD_DINOv2", checksum(path), net, lambda net, x: Answer(net(dinov2_input(x))), batch=32)
    if name == "inception":
        if weights is None:
            file = INCEPTION_FILE.rpartition("/")[2]
            raise UserError(f"judge inception needs {file}: download it ({INCEPTION_FILE}), give it by --judge-weights FILE")
        net = Inception()
        _fill(net.net, read_state_dict(weights), weights)
        features = "pool 3 of the 2015 Inception; 299 pixels, bilinear as TensorFlow 1, (u - 128) / 128"
        return Judge(name, features, "FID", checksum(weights), net.eval(), lambda net, x: Answer(*net(_rgb(x))), batch=64)
    if weights is not None:
        raise UserError(
            f"--judge-weights is for the judges dinov2 and inception: give the folder of a classifier by --judge {weights}"
        )
    classifier = load_net(name, "image_classifier")
    assert isinstance(classifier, ImageClassifier)
    return classifier_judge(classifier, name, sha256(find_weights(name)))


def classifier_judge(net: ImageClassifier, name: str = "classifier", digest: str = "") -> Judge:
    num_classes = net.config.num_classes
    return Judge(name, "penultimate layer", "FD", digest, net, _classifier_answer, BATCH, conditions=num_classes)


def dinov2(state_dict: Mapping[str, Tensor], path: Path) -> nn.Module:
    """timm's ViT-L/14 of DINOv2 (arXiv 2304.07193) for images of 224 pixels, in evaluation mode: image -> class token [B, D].

    state_dict: the published one, or timm's. Both hold positions of 37 x 37 patches. We resize them to 16 x 16 as the published code does:
    by the scale (16 + 0.1) / 37, without antialiasing. timm's own resizing gives other features. Raises UserError if an entry does not fit.
    """
    # this import takes seconds, and most evaluations do not need it
    import timm

    # the weights are replaced below: do not allocate them twice
    with torch.device("meta"):
        net = timm.create_model("vit_large_patch14_dinov2", num_classes=0, img_size=224)
    tensors = {name: t for name, t in state_dict.items() if name != "mask_token"}
    if (pos := tensors.get("pos_embed")) is not None and pos.ndim == 3 and pos.shape[1] == 1 + 37 * 37:
        grid_1DHW = pos[:, 1:].float().unflatten(1, (37, 37)).permute(0, 3, 1, 2)
        grid_1DHW = F.interpolate(grid_1DHW, scale_factor=(16 + 0.1) / 37, mode="bicubic")
        tensors["pos_embed"] = torch.cat([pos[:, :1], grid_1DHW.flatten(2).mT], dim=1)
    _fill(net, tensors, path)
    return net.eval()


def dinov2_input(image_BCHW: Tensor) -> Tensor:
    """uint8 of any size -> [B, 3, 224, 224]. EDM2 (arXiv 2312.02696) does not clamp or round after resizing, so we do not either."""
    x_BCHW = F.interpolate(_rgb(image_BCHW).float(), size=(224, 224), mode="bicubic", antialias=True) / 255
    mean_C11, std_C11 = (torch.tensor(values, device=x_BCHW.device)[:, None, None] for values in (MEAN, STD))
    return (x_BCHW - mean_C11) / std_C11


def _classifier_answer(net: nn.Module, image_BCHW: Tensor) -> Answer:
    assert isinstance(net, ImageClassifier)
    features_BD = net.features(from_uint8(image_BCHW))
    return Answer(features_BD, prob_BK=net.head(features_BD).softmax(1))


def _rgb(image_BCHW: Tensor) -> Tensor:
    """Repeat a grey channel three times."""
    return image_BCHW.expand(-1, 3, -1, -1)


def _fill(net: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load a state dict. Raises UserError if an entry is missing, unexpected or of another shape."""
    # older files lack the counters of the batch norms
    own, theirs = (
        {name: t.float() for name, t in entries.items() if not name.endswith("num_batches_tracked")}
        for entries in (net.state_dict(), tensors)
    )
    if wrong := misfits(own, theirs):
        raise UserError(f"{path} does not hold the weights of this judge ({wrong}): give another file by --judge-weights")
    net.load_state_dict(theirs, strict=False, assign=True)
