"""The network whose features measure perceptual distance in the evaluation, where LPIPS' files are not given.

Shapes: `B` images, `C` channels, `H W` rows and columns of an image, `A` attributes.
"""
from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from common import files


class AttributeNet(nn.Module):
    """A small network that reads the attributes of a toy from one masked image; its layers measure, no loss uses them.

    LPIPS uses a network that learned to classify photographs; this one learned the attributes of toys. Batch norm,
    because a normalization of each image for itself would hide its brightness. Measure in evaluation mode.
    """

    def __init__(self, attributes: int, widths: tuple[int, ...] = (16, 32, 64, 96, 128)):
        super().__init__()
        channels = 3
        self.stages = nn.ModuleList()
        for width in widths:
            self.stages.append(self._stage(channels, width))
            channels = width
        self.head = nn.Linear(channels, attributes)

    @staticmethod
    def _stage(channels_in: int, channels: int) -> nn.Sequential:
        """(B, C_in, H, W) -> (B, C, H/2, W/2)."""
        # The first convolution halves the resolution.
        first = nn.Conv2d(channels_in, channels, 3, stride=2, padding=1)
        second = nn.Conv2d(channels, channels, 3, padding=1)
        norms = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        return nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU())

    def layers(self, images: Tensor) -> list[Tensor]:
        """The output of every stage for images (B, 3, H, W) in [0, 1]: (B, C, H/2, W/2), (B, C, H/4, W/4), ..."""
        x = images
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs

    def forward(self, images: Tensor) -> Tensor:
        """Attributes (B, A) of images (B, 3, H, W) in [0, 1]."""
        last = self.layers(images)[-1]
        return self.head(last.mean((2, 3)))


def load_attribute_net(path: str | Path) -> AttributeNet:
    """The trained `AttributeNet` in a file, frozen, on the CPU.

    Raises `FileNotFoundError` or `ValueError` with one line.
    """
    weights = files.read_tensors(path)["weights"]
    try:
        # The file holds nothing but weights: how many attributes the network reads is the length of its last bias.
        net = AttributeNet(len(weights["head.bias"]))
        files.check_weights(weights, net)
        net.load_state_dict(weights)
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:160]
        raise ValueError(f"{path}: not the weights of a perceptual network, as `train.py perceptual` writes them "
                         f"({reason})") from e
    return net.eval().requires_grad_(False)
