"""Collisions of models, against forward passes and what their first operators are known to lose."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from lipsim.analysis.collisions import (
    OUTPUT,
    directions,
    find_collision,
    in_precision,
    layer_differences,
    layer_table,
    mean_and_spread,
    null_vector_residual,
    output_differences,
    step_of_length,
    transfer_matrix,
    transfer_table,
)
from lipsim.analysis.explanations import explanations_agree, last_spatial_layer
from lipsim.analysis.models import Model, Normalized
from lipsim.attacks.projections import sample_norm


def model_of(network: nn.Module, name: str, size: int = 16) -> Model:
    module = Normalized(network, (0.4,), (0.2,)).double().eval().requires_grad_(False)
    return Model(name, network, module, size)


def patches(seed: int = 0, channels: int = 12) -> Model:
    """A patch embedding of 4 × 4 pixels, with a kernel, and a classifier behind it."""
    torch.manual_seed(seed)
    layers = (nn.Conv2d(3, channels, 4, stride=4), nn.GELU(), nn.Conv2d(channels, 8, 2), nn.Flatten())
    return model_of(nn.Sequential(*layers, nn.Linear(72, 5)), f"patches {channels}")


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    x, target = 0.2 + 0.6 * torch.rand(2, 2, 3, 16, 16, dtype=torch.float64)
    return x, target


class Dense(nn.Module):
    """Answers as a segmenter does, with a dictionary of maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Mapping[str, Tensor]:
        y = self.stem(x)
        return {"out": self.head(y.relu()), "aux": y.mean(1)}


def test_exact_collisions_agree_at_every_layer(images: tuple[Tensor, Tensor]) -> None:
    x, target = images
    model = patches()
    collision = find_collision(model, x, target - x)
    assert collision.layer == "0" and collision.exact
    assert (collision.residual <= 1e-9).all() and (collision.length > 1).all()
    assert collision.x_adv.min() >= 0 and collision.x_adv.max() <= 1
    assert (collision.left < 1).all()
    found = layer_differences(model.module, x, collision.x_adv)
    assert [layer.name for layer in found] == ["0", "1", "2", "3", "4", OUTPUT]
    assert all(layer.absolute <= 1e-8 for layer in found)
    assert max(layer.absolute for layer in layer_differences(model.module, x, target)) > 0.01


def test_outputs_of_any_container_are_compared(images: tuple[Tensor, Tensor]) -> None:
    x, target = images
    model = model_of(Dense(), "dense")
    collision = find_collision(model, x, target - x)
    found = output_differences(model.module, x, collision.x_adv)
    assert found.keys() == {"output.out", "output.aux"} and max(found.values()) <= 1e-8
    deep = find_collision(model, x, target - x, layer=OUTPUT, steps=10)
    assert not deep.exact and max(output_differences(model.module, x, deep.x_adv).values()) <= 1e-8
    count = [2]

    class Detector(nn.Module):
        def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
            count[0] += 1
            return [{"boxes": x.new_zeros(count[0], 4)} for _ in x]

    assert set(output_differences(Detector(), x, x).values()) == {float("inf")}


def test_the_layer_table_has_both_precisions(images: tuple[Tensor, Tensor]) -> None:
    x, target = images
    rows = layer_table(patches(), x[:1], (target - x)[:1])
    first, last = rows[0], rows[-1]
    assert first["kind"] == "Conv2d" and last["layer"] == OUTPUT
    assert float(first["float64"]) < 1e-8 < float(first["float32"]) + 1e-8 < 1e-4
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 48, 4, stride=4)  # without a kernel, so that it differs where what follows does not
    sees = model_of(nn.Sequential(stem, nn.Tanh(), nn.Conv2d(48, 4, 1), nn.Flatten(), nn.Linear(64, 3)), "sees")
    most = 0.05 / 0.2 * float(stem.weight.detach().flatten(1).norm(dim=1).max())
    short = layer_table(sees, x[:1], (target - x)[:1], layer="2", eps=0.05, steps=12)
    longer = layer_table(sees, x[:1], (target - x)[:1], layer="2", steps=12)
    assert 0 < float(short[0]["float64"]) <= most * 1.05 < float(longer[0]["float64"])  # two digits
    with pytest.raises(ValueError, match="in float32: nothing was found that collides"):
        layer_table(sees, x[:1], 0 * x[:1], layer="2")
    several = layer_table(patches(), x, target - x)[-1]
    assert "±" in several["float64"] and float(several["float64"].split(" ± ")[0]) < 1e-8


def test_null_vectors_have_the_published_residuals() -> None:
    weight = torch.randn(12, 3, 4, 4, dtype=torch.float64) / 7
    single, double = null_vector_residual(weight.float()), null_vector_residual(weight)
    assert single is not None and double is not None
    assert double < 1e-14 and 1e-9 < single < 1e-5
    assert null_vector_residual(torch.randn(64, 3, 4, 4)) is None


def test_a_trivial_kernel_is_said(images: tuple[Tensor, Tensor]) -> None:
    x, target = (image[:1, :, :8, :8] for image in images)
    model = model_of(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Flatten()), "stem", 8)
    with pytest.raises(ValueError, match="0 of stem has a trivial kernel; give --layer to look deeper"):
        find_collision(model, x, target - x)
    with pytest.raises(ValueError, match="nothing was found that collides at 0 of stem; give a deeper --layer"):
        find_collision(model, x, target - x, layer="0")


def test_collisions_of_one_model_are_seen_by_another(images: tuple[Tensor, Tensor]) -> None:
    models = [patches(0), patches(1, channels=20)]
    found = transfer_matrix(models, [images[0]] * 2, steps=2)
    change = {(cell.source, cell.model): float(cell.change.max()) for cell in found}
    assert len(change) == 4
    for source, model in change:
        assert (change[source, model] < 1e-8) == (source == model)
    wide = patches(2, channels=28)
    tried = transfer_matrix(models[:1], images[:1], images[1:], others=[wide])
    assert [cell.model for cell in tried] == [models[0].name, wide.name]
    assert tried[0].change.max() < 1e-8 < 1e-3 < tried[0].straight.min()
    rows = transfer_table(found)
    assert [row["made on"] for row in rows] == [model.name for model in models] and len(rows[0]) == 4


def test_straight_steps_have_the_length_of_a_collision(images: tuple[Tensor, Tensor]) -> None:
    x, target = images
    length = torch.tensor([0.5, 4.0], dtype=torch.float64)
    noisy = step_of_length(x, directions(x, seed=1), length)
    torch.testing.assert_close(sample_norm(noisy - x), length)
    assert noisy.min() >= 0 and noisy.max() <= 1
    share = (length / sample_norm(target - x)).view(-1, 1, 1, 1)
    torch.testing.assert_close(step_of_length(x, target - x, length), x + share * (target - x))


def test_directions_are_a_target_or_seeded_noise(images: tuple[Tensor, Tensor]) -> None:
    x, target = images
    assert torch.equal(directions(x, target), target - x)
    assert torch.equal(directions(x, seed=1), directions(x, seed=1))
    assert not torch.equal(directions(x, seed=1), directions(x, seed=2))


def test_another_precision_is_a_copy() -> None:
    model = patches()
    single = in_precision(model, torch.float32)
    assert single.network is single.module.network
    assert single.network[0].weight.dtype == torch.float32 and model.network[0].weight.dtype == torch.float64


def test_explanations_of_exact_collisions_agree(images: tuple[Tensor, Tensor]) -> None:
    pytest.importorskip("captum")
    x, target = images
    model = patches()
    assert last_spatial_layer(model.module, x) == "network.2"
    x_adv = find_collision(model, x, target - x).x_adv
    found = {row.explanation: row for row in explanations_agree(model.module, x, x_adv, steps=4, patch=4)}
    averaged, integrated, summed, cam = found.values()
    assert list(found)[3] == "Grad-CAM"
    assert max(float(row.change.max()) for row in (averaged, summed)) < 1e-6
    assert float(cam.change.max()) < 1e-6
    # Gradients are the same, images are not.
    assert (integrated.change > 1e-3).all() and (averaged.noise > 1e-3).all()


def test_grad_cam_needs_a_map() -> None:
    with pytest.raises(ValueError, match="Grad-CAM needs a convolution"):
        last_spatial_layer(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), torch.rand(1, 3, 4, 4))


def test_mean_and_spread_are_half_of_what_values_are_apart() -> None:
    assert mean_and_spread([1.0, 2.0, 6.0]) == "3 ± 2"


def test_a_box_without_room_is_no_trivial_kernel() -> None:
    x = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="has a kernel, in which nothing was found to move"):
        find_collision(patches(), x, -torch.ones_like(x))
