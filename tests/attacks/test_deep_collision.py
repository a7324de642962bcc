"""Deep collisions against closed forms and dense Jacobians, each verified by a forward pass in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lipsim.attacks import deep_collision, features_up_to
from lipsim.attacks.deep_collision import Linearization
from lipsim.attacks.projections import sample_norm
from lipsim.students import OrthogonalShiftNetwork
from lipsim.teachers.vit import SmallViT


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    """Two images and the way to two others, float64."""
    x, target = 0.1 + 0.8 * torch.rand(2, 2, 3, 12, 12, dtype=torch.float64)
    return x, target - x


@pytest.fixture
def network() -> nn.Sequential:
    """Convolution, ReLU, pooling, convolution: 432 pixels, 576 units, 144 after pooling."""
    layers = (nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 3), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(32, 5)).double().eval().requires_grad_(False)


def residual(features: object, x: Tensor, x_adv: Tensor) -> Tensor:
    before, after = features(x), features(x_adv)
    return sample_norm(after - before) / sample_norm(before)


def test_a_linear_map_collides_at_the_nearest_image_to_the_target(images: tuple[Tensor, Tensor]) -> None:
    x, direction = images
    linear = nn.Sequential(nn.Flatten(), nn.Linear(432, 50)).double().requires_grad_(False)
    x_adv = deep_collision(linear, x, direction, box=None)
    rows = torch.linalg.svd(linear[1].weight, full_matrices=False)[2]
    flat = direction.flatten(1)
    expected = x + (flat - flat @ rows.T @ rows).view_as(x)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-3)
    assert (residual(linear, x, x_adv) <= 1e-10).all()


@pytest.mark.parametrize("layer", ["3", None])
def test_deep_features_collide_inside_the_box(
    images: tuple[Tensor, Tensor], network: nn.Sequential, layer: str | None
) -> None:
    x, direction = images
    features = features_up_to(network, layer)
    x_adv = deep_collision(features, x, direction, steps=40)
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert (residual(features, x, x_adv) <= 1e-10).all()
    assert (sample_norm(x_adv - x) > 1).all()
    # Any other change of this length is seen.
    noise = torch.randn_like(x)
    noise = noise * (sample_norm(x_adv - x) / sample_norm(noise)).view(-1, 1, 1, 1)
    assert (residual(features, x, (x + noise).clamp(0, 1)) > 1e-2).all()


def test_negative_pre_activations_move_and_positive_ones_do_not(
    images: tuple[Tensor, Tensor], network: nn.Sequential
) -> None:
    x, direction = images
    features, before = features_up_to(network, "1"), network[0](x)
    x_adv = deep_collision(features, x, direction, steps=30)
    after = network[0](x_adv)
    assert (residual(features, x, x_adv) <= 1e-10).all()
    assert (sample_norm(x_adv - x) > 0.5).all()
    on = before > 0
    torch.testing.assert_close(after[on], before[on], rtol=0, atol=1e-8)
    assert (after[~on] <= 1e-8).all() and (after - before)[~on].abs().max() > 0.05


def test_what_pooling_discards_moves(images: tuple[Tensor, Tensor]) -> None:
    x, direction = images
    pool = nn.MaxPool2d(2)
    x_adv = deep_collision(pool, x, direction, steps=40)
    torch.testing.assert_close(pool(x_adv), pool(x), rtol=0, atol=1e-9)
    assert ((x_adv != x).flatten(1).double().mean(1) > 0.5).all()


def test_products_are_those_of_the_dense_jacobian(images: tuple[Tensor, Tensor], network: nn.Sequential) -> None:
    x, direction = images
    line = Linearization(network, x)
    dense = torch.stack([torch.autograd.functional.jacobian(network, image[None])[0, :, 0] for image in x])
    torch.testing.assert_close(line.jvp(direction), torch.einsum("nkchw,nchw->nk", dense, direction))
    y = torch.randn_like(line.value)
    torch.testing.assert_close(line.vjp(y), torch.einsum("nkchw,nk->nchw", dense, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("build", [OrthogonalShiftNetwork, SmallViT])
def test_whole_encoders_collide(build: type[nn.Module], dtype: torch.dtype) -> None:
    options = {"patch_size": 4, "width": 24, "depth": 1, "heads": 2} if build is SmallViT else {"out_features": 8}
    encoder = build(16, **options).to(dtype).eval().requires_grad_(False)
    x, target = torch.rand(2, 1, 3, 16, 16).to(dtype)
    x_adv = deep_collision(encoder, x, target - x, steps=12)
    assert (residual(encoder, x, x_adv) <= (1e-10 if dtype == torch.float64 else 2e-6)).all()
    assert (sample_norm(x_adv - x) > 1).all()


def test_the_budget_is_used_and_kept(images: tuple[Tensor, Tensor], network: nn.Sequential) -> None:
    x, direction = images
    length = sample_norm(deep_collision(network, x, direction, eps=0.5) - x)
    assert (length <= 0.5).all() and (length > 0.49).all()


def test_where_nothing_is_lost_nothing_moves(images: tuple[Tensor, Tensor], network: nn.Sequential) -> None:
    x, direction = images
    assert torch.equal(deep_collision(features_up_to(network, "0"), x, direction), x)


def test_samples_do_not_depend_on_their_batch(images: tuple[Tensor, Tensor], network: nn.Sequential) -> None:
    x, direction = images
    both = deep_collision(network, x, direction, steps=10)
    alone = deep_collision(network, x[1:], direction[1:], steps=10)
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-6)


def test_a_sample_that_needs_an_exact_solution_leaves_others_alone() -> None:
    """The second way lies across the kernel but for little; the first is walked as it is without it."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(64, 40), nn.Tanh()]
    network = nn.Sequential(*layers).double().requires_grad_(False)
    for layer in (layers[0], layers[3]):
        layer.weight.mul_(3)
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 8, 8, generator=draw, dtype=torch.float64) * 0.4 + 0.3
    way = torch.randn(2, 3, 8, 8, generator=draw, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda u: network(u)[0], x[1:]).reshape(40, -1)
    across = nn.functional.normalize(jacobian.T @ torch.randn(40, dtype=torch.float64, generator=draw), dim=0)
    inside = torch.randn(192, dtype=torch.float64, generator=draw)
    inside = nn.functional.normalize(inside - torch.linalg.pinv(jacobian) @ (jacobian @ inside), dim=0)
    way[1] = (3 * across + 0.2 * inside).view(3, 8, 8)
    both, alone = (deep_collision(network, x[:n], way[:n], steps=30) for n in (2, 1))
    torch.testing.assert_close(both[:1], alone, rtol=0, atol=1e-3)  # rounding grows over the steps


def test_bad_input_is_named(images: tuple[Tensor, Tensor], network: nn.Sequential) -> None:
    x, direction = images
    with pytest.raises(ValueError, match=r"there is no layer conv1; among the layers are 0, 1"):
        features_up_to(network, "conv1")
    with pytest.raises(ValueError, match=r"expected images in \[0, 1\]"):
        deep_collision(network, 2 * x, direction)
    with pytest.raises(ValueError, match="expected a tensor from Answers, got dict; name a layer inside"):
        deep_collision(features_up_to(Answers(network)), x, direction)
    unused = copy.deepcopy(network)
    unused.extra = nn.Identity()
    unused.forward = network.forward
    with pytest.raises(ValueError, match="does not use its layer extra"):
        features_up_to(unused, "extra")(x)
    with pytest.raises(ValueError, match=r"the model does not take images of shape \(2, 1, 12, 12\) \(.*channels"):
        deep_collision(network, x[:, :1], direction[:, :1])
    with pytest.raises(ValueError, match=r"a direction like the images \(2, 3, 12, 12\), got \(2, 3, 12, 6\)"):
        deep_collision(network, x, direction[..., :6])
    with pytest.raises(ValueError, match=r"expected features \(2, …\) of 2 images, got a dict"):
        deep_collision(Answers(network), x, direction)
    with pytest.raises(ValueError, match=r"expected features \(2, …\) of 2 images, got shape \(2,\)"):
        deep_collision(lambda z: z.flatten(1).sum(1), x, direction)
    with pytest.raises(ValueError, match="do not depend on the images"):
        deep_collision(lambda z: torch.ones(len(z), 3).to(z), x, direction)


class Answers(nn.Module):
    """Answers with a dictionary, as segmenters do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.network(x)}


def test_operations_without_second_derivatives_are_refused() -> None:
    x = torch.rand(1, 3, 4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"second derivatives, got an operation without .*hardsigmoid"):
        deep_collision(nn.Sequential(nn.Conv2d(3, 2, 2), nn.Hardsigmoid()).double(), x, torch.ones_like(x))
