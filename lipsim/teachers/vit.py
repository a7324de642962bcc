"""A small vision transformer of one's own, the teacher where no pretrained one is at hand."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F


class SmallViT(nn.Module):
    """A plain ViT on images in [0, 1] with a centred unit-norm embedding, as DreamSim has it.

    The embedding is the class token after the last norm, minus its mean over features, divided by its norm (Fu et al.
    2023, package version 0.2). It has no Lipschitz bound: as a metric it answers, and certifies nothing.

    Args:
        image_size: side of the input.
        patch_size: side of a patch; with ``3·patch_size² > width`` the patch embedding has a kernel.
        width: size of the tokens and of the embedding.
        depth: transformer blocks.
        heads: attention heads.
    """

    def __init__(
        self, image_size: int = 64, patch_size: int = 16, width: int = 192, depth: int = 4, heads: int = 3
    ) -> None:
        super().__init__()
        self.vit = VisionTransformer(
            img_size=image_size, patch_size=patch_size, embed_dim=width, depth=depth, num_heads=heads, num_classes=0
        )
        self.image_size = image_size
        self.out_features = width
        self.config = {
            "image_size": image_size,
            "patch_size": patch_size,
            "width": width,
            "depth": depth,
            "heads": heads,
        }

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, S, S)`` in [0, 1] to unit-norm embeddings ``(N, width)``."""
        embedding = self.vit(2 * x - 1)
        return F.normalize(embedding - embedding.mean(-1, keepdim=True), dim=-1)
