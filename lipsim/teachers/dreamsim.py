"""DreamSim (Fu et al. 2023) and teachers of its kind: features of several backbones, centred and of unit norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipsim.data.transforms import Preprocess
from lipsim.teachers.branch import RANDOM, Branch, BranchConfig
from lipsim.teachers.build import build_branch
from lipsim.teachers.catalogue import VARIANTS, where_to_get
from lipsim.teachers.embedding import centred
from lipsim.teachers.lora import merge_adapter
from lipsim.utils.arguments import records_arguments
from lipsim.utils.errors import LipsimError


def _branch_configs(branches: Sequence[BranchConfig | Mapping[str, Any]]) -> list[BranchConfig]:
    """As they are given to a constructor; an exported file holds plain mappings."""
    return [branch if isinstance(branch, BranchConfig) else BranchConfig(**branch) for branch in branches]


def _without_files(branches: Sequence[BranchConfig | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """As a file keeps them: an exported teacher has its weights, and fills a random one with them."""
    return [asdict(replace(config, weights=RANDOM)) for config in _branch_configs(branches)]


@records_arguments(branches=_without_files)
class Ensemble(nn.Module):
    """Backbones side by side, with DreamSim's embedding.

    Features are concatenated, centred and of unit norm (package version 0.2). With the feature "cls_patch" every token
    is treated so; the embedding is then the class token and the mean of the patches, concatenated and of unit norm,
    whose cosine distance is that of DreamSim's patch models.

    It has no Lipschitz bound: as a metric it answers, and certifies nothing.

    Args:
        branches: the backbones, see :class:`lipsim.teachers.BranchConfig`.
        image_size: side of the input. 224 is what the public weights were trained on.
        head: width of a residual network on the features, 0 for none: what tuning of the head alone trains. It starts
            as the identity.
        resize: how image files are brought to ``image_size``, see :class:`lipsim.data.Preprocess`: "pil" in 8 bits as
            DreamSim does, or "float" as students have it, where both see the same images.

    Raises:
        FileNotFoundError: weights are not there.
        ValueError: weights that do not fit, unknown models, another resize, or "cls_patch" for some of the branches.
    """

    config: dict[str, Any]

    def __init__(
        self, branches: Sequence[BranchConfig], image_size: int = 224, head: int = 0, resize: str = "pil"
    ) -> None:
        super().__init__()
        self.resize = Preprocess(image_size, resize).resize  # checks both
        configs = _branch_configs(branches)
        if not configs:
            raise LipsimError("expected at least one branch")
        self.branches = nn.ModuleList(build_branch(config, image_size) for config in configs)
        dense = {config.feature == "cls_patch" for config in configs}
        if len(dense) > 1:
            raise LipsimError("expected the feature 'cls_patch' of all branches or of none")
        width = sum(branch.out_features for branch in self._branches())
        self.head = ResidualHead(width, head) if head else None
        self.image_size = image_size
        self.out_features = 2 * width if dense == {True} else width

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, S, S)`` in [0, 1] to unit-norm embeddings ``(N, D)``.

        Raises:
            ValueError: images of another size.
        """
        size = self.image_size
        if x.ndim != 4 or x.shape[1:] != (3, size, size):
            raise LipsimError(
                f"expected images of shape (N, 3, {size}, {size}), got {tuple(x.shape)}; "
                f"lipsim.data.transforms.Preprocess({size}, {self.resize!r}) resizes as this teacher expects"
            )
        tokens = torch.cat([branch(x) for branch in self.branches], dim=-1)
        if tokens.dtype in (torch.float16, torch.bfloat16):
            tokens = tokens.float()  # under autocast: the backbones in half precision, the geometry not
        if self.head is not None:
            tokens = self.head(tokens)
        tokens = centred(tokens)
        if tokens.shape[1] == 1:
            return tokens[:, 0]
        return F.normalize(torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=-1), dim=-1)

    def embed(self, x: Tensor) -> Tensor:
        """The same as ``forward``."""
        embedding: Tensor = self(x)
        return embedding

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep the input of each block alone in training, and compute the rest again in the backward pass."""
        for branch in self._branches():
            branch.backbone.set_grad_checkpointing(enable)  # type: ignore[operator]

    def _branches(self) -> list[Branch]:
        return list(self.branches)  # type: ignore[arg-type]


@records_arguments(weights=lambda _: RANDOM, options=lambda options: options or {})
class DreamSim(Ensemble):
    """A published DreamSim model: "ensemble", the single types, and those with patch features.

    Embeddings are those of the package ``dreamsim`` 0.2.1 with the same files, to the rounding of float32
    (compared for all variants but DINOv2's). Those of patch models are pooled already, see :class:`Ensemble`.

    Args:
        variant: one of :data:`lipsim.teachers.catalogue.VARIANTS`.
        weights: folder in the layout of DreamSim's zip files, which ``lipsim fetch-teacher`` fills; the DINO backbone
            may lie in torch.hub's ``checkpoints/`` there, as the original leaves it. "random": random weights, for
            tests and benchmarks.
        image_size: side of the input.
        adapter: whether to merge DreamSim's own LoRA adapter. Without, these are the backbones before its tuning.
        head: see :class:`Ensemble`.
        options: arguments of every backbone, such as ``{"embed_dim": 24, "depth": 2, "num_heads": 2}`` in tests.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        ValueError: an unknown variant, or a file that is damaged or does not fit.
    """

    def __init__(
        self,
        variant: str = "ensemble",
        weights: str | Path = "checkpoints/dreamsim",
        image_size: int = 224,
        adapter: bool = True,
        head: int = 0,
        options: dict[str, Any] | None = None,
    ) -> None:
        if variant not in VARIANTS:
            raise LipsimError(f"expected a variant out of {', '.join(VARIANTS)}, got {variant!r}")
        published, options, remedy = VARIANTS[variant], options or {}, where_to_get(variant)
        folder = None if weights == RANDOM else Path(weights).expanduser()
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"no folder with the weights of DreamSim at {folder.absolute()}; {remedy}")
        super().__init__(
            [BranchConfig(name, RANDOM, published.feature, options) for name in published.branches], image_size, head
        )
        if folder is not None:
            for branch in self._branches():
                branch.load(folder, alone=False)
            if adapter:
                merge_adapter(self._adapted_modules(), folder / published.adapter, remedy)

    def _adapted_modules(self) -> dict[str, nn.Module]:
        """The modules of the backbones by the names that DreamSim's adapters have for them."""
        return {
            f"extractor_list.{number}.model.{name}": module
            for number, branch in enumerate(self._branches())
            for name, module in branch.backbone.named_modules()
        }


class ResidualHead(nn.Module):
    """``x + W₂ relu(W₁ x)``, with W₂ = 0 in the beginning: DreamSim's head for tuning without LoRA.

    Args:
        features: dimension of the features.
        width: of the hidden layer; DreamSim's configurations have 512.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(features, width), nn.Linear(width, features)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(…, D)`` to the same."""
        # Weights may be in half precision where features are not.
        output: Tensor = x + self.fc2(F.relu(self.fc1(x.to(self.fc1.weight.dtype))))
        return output
