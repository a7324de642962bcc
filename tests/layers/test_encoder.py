"""What encoders say of themselves."""

from __future__ import annotations

import torch
from torch import nn

from lipsim.layers import OrthogonalLinear
from lipsim.layers.encoder import (
    BoundedEncoder,
    CheckpointingEncoder,
    Encoder,
    ResizingEncoder,
    declared_image_size,
    dtype_of,
    first_weight,
    head_of,
)
from lipsim.students import SLLNetwork
from lipsim.teachers import BranchConfig, Ensemble, SmallViT

BRANCH = BranchConfig("dino_vitb16", "random", options={"embed_dim": 24, "depth": 1, "num_heads": 2})


class _Bounded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image_size, self.out_features, self.config = 4, 48, {}

    def lipschitz_bound(self) -> float:
        return 1.0


def test_contracts_are_told_apart() -> None:
    student, vit, ensemble, plain = SLLNetwork(16, 8, 20, 1, 1, 4), SmallViT(), Ensemble([BRANCH], 32), nn.Linear(2, 2)
    contracts = (Encoder, BoundedEncoder, ResizingEncoder, CheckpointingEncoder)
    found = [[isinstance(e, contract) for contract in contracts] for e in (student, vit, ensemble, _Bounded(), plain)]
    assert found == [
        [True, False, False, False],
        [True, False, False, True],
        [True, False, True, True],
        [True, True, False, False],
        [False, False, False, False],
    ]


def test_the_head_is_a_module_and_not_none() -> None:
    assert head_of(Ensemble([BRANCH], 32)) is None
    tuned = Ensemble([BRANCH], 32, head=4)
    assert head_of(tuned) is tuned.head is not None
    assert head_of(nn.Linear(2, 2)) is None


def test_the_image_size_is_a_number_or_nothing() -> None:
    encoder = nn.Identity()
    assert declared_image_size(encoder) is None
    encoder.image_size = (4, 4)  # type: ignore[assignment]  # as other packages have it
    assert declared_image_size(encoder) is None
    assert declared_image_size(SLLNetwork(16, 8, 20, 1, 1, 4)) == 16


def test_the_dtype_is_that_of_weights_that_compute() -> None:
    counter = nn.Module()
    counter.register_parameter("count", nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False))
    assert first_weight(counter) is None and dtype_of(counter) == torch.float32
    layer = OrthogonalLinear(3, 2).double()
    assert first_weight(nn.Sequential(counter, layer)) is layer.weight
    assert dtype_of(nn.Sequential(counter, layer)) == torch.float64
