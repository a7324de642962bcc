"""Random views of whole batches of images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.transforms import v2


class ColorJitter(nn.Module):
    """The paper's second view: ColorJitter(.4, .4, .2, .1) with probability .8, grayscale with probability .2.

    Parameters are drawn for ``groups`` parts of a batch rather than for each image: the conversion to HSV of a whole
    part costs little more than that of one image.
    """

    def __init__(self, groups: int = 16) -> None:
        super().__init__()
        self.groups = groups
        self.transform = v2.Compose(
            [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), v2.RandomGrayscale(p=0.2)]
        )

    def forward(self, images: Tensor) -> Tensor:
        """``(N, 3, H, W)`` in [0, 1] to the same."""
        return torch.cat([self.transform(part) for part in images.chunk(self.groups)]).clamp(0, 1)


def random_symmetries(num: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Draw ``num`` symmetries for :func:`apply_symmetries`: three reflections ``(num, 3)`` bool, channel orders."""
    reflections = torch.rand(num, 3, device=like.device) < 0.5
    return reflections, torch.rand(num, 3, device=like.device).argsort(dim=1)


def apply_symmetries(images: Tensor, symmetries: tuple[Tensor, Tensor]) -> Tensor:
    """Flip, transpose and exchange the colour channels of ``(N, 3, S, S)``, each image by its own draw.

    The 8 reflections and turns of the square and the 6 orders of the channels keep the answer to "which is more alike?"
    where all images of a triplet undergo the same.
    """
    reflections, channels = symmetries
    for column, change in enumerate((lambda t: t.flip(3), lambda t: t.flip(2), lambda t: t.transpose(2, 3))):
        images = torch.where(reflections[:, column].view(-1, 1, 1, 1), change(images), images)
    return images.gather(1, channels.view(-1, 3, 1, 1).expand_as(images))
