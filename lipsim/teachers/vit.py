"""A small vision transformer of one's own, the teacher where no pretrained one is at hand."""

from __future__ import annotations

from typing import Any, Literal

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lipsim.teachers.embedding import centred
from lipsim.utils.arguments import records_arguments


@records_arguments()
class SmallViT(nn.Module):
    """A plain ViT on images in [0, 1] with a centred unit-norm embedding, as DreamSim has it.

    Of the pooled tokens after the last norm. It has no Lipschitz bound: as a metric it answers, and certifies nothing.

    Args:
        image_size: side of the input.
        patch_size: side of a patch; with ``3·patch_size² > width`` the patch embedding has a kernel.
        width: size of the tokens and of the embedding.
        depth: transformer blocks.
        heads: attention heads.
        pool: "avg", the mean of all patches, which learns faster from scratch, or "token", the class token.
    """

    config: dict[str, Any]

    def __init__(
        self,
        image_size: int = 64,
        patch_size: int = 16,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        pool: Literal["avg", "token"] = "avg",
    ) -> None:
        super().__init__()
        self.vit = VisionTransformer(
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            num_classes=0,
            global_pool=pool,
            class_token=pool == "token",
        )
        self.image_size = image_size
        self.out_features = width

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, S, S)`` in [0, 1] to unit-norm embeddings ``(N, width)``."""
        return centred(self.vit((x - 0.5) / 0.25))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep the input of each block alone in training, and compute the rest again in the backward pass."""
        self.vit.set_grad_checkpointing(enable)
