"""The 2015 Inception of FID, IS and sFID, in the names of its widely used PyTorch port, and TensorFlow's way to resize its input.

B images; C = 3 channels; H W pixels of an image; K = 1008 outputs.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 299  # pixels of an input
OUTPUTS = 1008
SPATIAL = 7  # channels of sFID's features


class InceptionOutput(NamedTuple):
    """features: mean of the last map over its pixels. spatial: 17 x 17 pixels of 7 channels, as TensorFlow lays them out."""

    features_B2048: Tensor
    spatial_B2023: Tensor
    prob_BK: Tensor


class Inception(nn.Module):
    """The network of FID: torchvision's Inception v3 with the pooling and the outputs of the 2015 TensorFlow graph.

    It differs from torchvision's in three ways: average pooling inside a block does not count its padding, the last block pools by
    maximum, and there are 1,008 outputs. sFID reads the first seven channels of mixed_6 (Mixed_6d here), which are its 1x1 branch.
    The Inception score uses a softmax without the bias. Sources: arXiv 1706.08500 (FID), 1606.03498 (IS), 2103.03841 (sFID), and the
    evaluator of 2105.05233. Checked: names and shapes of the port's state dict (pt_inception-2015-12-05-6726825d.pth), pooling,
    resizing and the layout of the spatial features, by hand. Not checked, since the weights were not at hand: any published FID.
    """

    def __init__(self) -> None:
        super().__init__()
        # it imports more than the core has
        from torchvision.models import inception as tv

        class A(_Repooled, tv.InceptionA): ...

        class C(_Repooled, tv.InceptionC): ...

        class E(_Repooled, tv.InceptionE): ...

        blocks: list[Any] = [tv.BasicConv2d, A, tv.InceptionB, C, tv.InceptionD, E, tv.InceptionAux]
        self.net = tv.Inception3(OUTPUTS, aux_logits=False, init_weights=False, inception_blocks=blocks)
        self.net.Mixed_7c.pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)

    def forward(self, image_BCHW: Tensor) -> InceptionOutput:
        """image: 0 .. 255, of any size."""
        x = (resize_as_tensorflow(image_BCHW.float(), SIDE) - 128) / 128
        for name, layer in self.net.named_children():
            if name == "avgpool":
                break
            x = layer(x)
            if name == "Mixed_6d":
                spatial_B = x[:, :SPATIAL].permute(0, 2, 3, 1).flatten(1)
        features_B = x.mean((2, 3))
        return InceptionOutput(features_B, spatial_B, F.linear(features_B, self.net.fc.weight).softmax(1))


class _Repooled:
    """For torchvision's blocks: the last branch sees `pool` of the input instead of torchvision's average."""

    pool = staticmethod(partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False))

    def _forward(self, x: Tensor) -> list[Tensor]:
        # torchvision's last branch is computed and dropped: a cheap one, and its block need not be repeated here
        return [*super()._forward(x)[:-1], self.branch_pool(self.pool(x))]  # type: ignore[misc, attr-defined]


def resize_as_tensorflow(image_BCHW: Tensor, side: int) -> Tensor:
    """Bilinear [B, C, side, side] as TensorFlow 1 resizes: output pixel i is at i * size / side, no antialiasing."""

    def weights(size: int) -> Tensor:
        at = torch.arange(side, device=image_BCHW.device) * (size / side)
        low, rows = at.long(), torch.arange(side, device=image_BCHW.device)
        matrix = torch.zeros(side, size, device=image_BCHW.device)
        matrix[rows, low] = 1 - (at - low)
        matrix[rows, (low + 1).clamp(max=size - 1)] += at - low
        return matrix

    H, W = image_BCHW.shape[2:]
    return weights(H) @ image_BCHW @ weights(W).T
