"""The audited bound against exact operator norms, and against planted faults."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms import Normalize

from lipsim import audit
from lipsim.audit import UnboundedModuleError
from lipsim.layers import ExplicitLinear, OrthogonalLinear, ParallelMixing, SLLConv2d, SpaceToDepth
from lipsim.students import OrthogonalProjection, OrthogonalShiftNetwork, SLLNetwork
from lipsim.teachers import SmallViT


def _norm(module: nn.Module, shape: tuple[int, ...]) -> float:
    """Exact operator norm of a linear module, from its matrix."""
    basis = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    with torch.no_grad():
        matrix = module(basis).flatten(1) - module(torch.zeros_like(basis[:1])).flatten(1)
    return float(torch.linalg.matrix_norm(matrix, ord=2))


CONVOLUTIONS = [
    # kernel, options, input size
    (3, {"padding": 1}, (7, 6)),
    (3, {}, (6, 6)),
    (1, {}, (4, 4)),
    (4, {"stride": 4}, (8, 8)),
    (7, {"stride": 2, "padding": 3}, (12, 12)),
    (3, {"stride": 2, "padding": 1}, (9, 7)),
    (2, {"stride": 3}, (8, 8)),
    (5, {"padding": 4}, (5, 5)),
    ((1, 4), {"stride": (1, 2), "padding": (0, 2)}, (6, 9)),
    (3, {"dilation": 2, "padding": 2}, (9, 9)),
    (3, {"dilation": 3, "stride": 2}, (9, 9)),
    (5, {"padding": "same"}, (7, 7)),
    (3, {"padding": "same", "dilation": 2, "padding_mode": "circular"}, (7, 8)),
    (3, {"padding": "valid"}, (7, 7)),
    (3, {"padding": 1, "groups": 3}, (8, 8)),
    (3, {"padding": 1, "padding_mode": "circular"}, (6, 7)),
    (5, {"padding": 2, "padding_mode": "circular"}, (3, 4)),
    (3, {"padding": 2, "padding_mode": "circular"}, (5, 5)),
    (3, {"padding": 1, "padding_mode": "circular", "stride": 2}, (6, 8)),
    (3, {"padding": 1, "padding_mode": "circular", "stride": 2}, (7, 7)),
    (3, {"padding": 1, "padding_mode": "reflect"}, (6, 6)),
    (5, {"padding": 2, "padding_mode": "reflect"}, (4, 5)),
    (3, {"padding": 2, "padding_mode": "replicate"}, (6, 6)),
]


@pytest.mark.parametrize(("kernel", "options", "size"), CONVOLUTIONS)
def test_convolution_bound_holds(kernel: int, options: dict[str, Any], size: tuple[int, int]) -> None:
    conv = nn.Conv2d(3, 6, kernel, **options).double()
    assert _norm(conv, (3, *size)) <= audit.conv2d_bound(conv, size) * (1 + 1e-14)
    # The most unfavourable kernels: all weights alike gather what padding copies.
    nn.init.ones_(conv.weight)
    assert _norm(conv, (3, *size)) <= audit.conv2d_bound(conv, size) * (1 + 1e-14)


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_convolution_bound_is_tight_on_larger_images(kernel: int, stride: int) -> None:
    conv = nn.Conv2d(1, 2, kernel, stride=stride, padding=kernel // 2).double()
    exact = _norm(conv, (1, 30, 30))
    assert exact <= audit.conv2d_bound(conv, (30, 30)) <= exact * 1.03
    if kernel <= stride:
        assert audit.conv2d_bound(conv, (30, 30)) == pytest.approx(exact, rel=1e-10)


def test_common_modules() -> None:
    linear = nn.Linear(48, 5).double()
    network = nn.Sequential(Normalize([0.5] * 3, [0.25, 0.5, 0.5]), nn.Flatten(), linear, nn.ReLU(), nn.LeakyReLU(-2.0))
    report = audit.lipschitz_bound(network, 4)
    sigma = float(torch.linalg.matrix_norm(linear.weight.detach(), ord=2))
    assert report.total == pytest.approx(4 * sigma * 2, rel=1e-6)
    assert [layer.kind for layer in report.layers] == ["Normalize", "Flatten", "Linear", "ReLU", "LeakyReLU"]
    assert "total" in str(report) and "Normalize" in str(report)


@pytest.mark.parametrize(
    "encoder",
    [
        OrthogonalProjection(16, 8),
        OrthogonalShiftNetwork(16, 8, grid=4, widths=(8, 16), depths=(1, 1), linear_depth=1, linear_width=8),
        SLLNetwork(16, 6, channels=6, depth=2, linear_depth=2, linear_width=5),
    ],
    ids=lambda e: type(e).__name__,
)
def test_students_are_one_lipschitz_and_the_audit_bounds_their_jacobian(encoder: nn.Module) -> None:
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.02)
    for _ in range(15):  # towards expansion
        x, y = torch.rand(2, 8, 3, 16, 16)
        loss = -(encoder(x) - encoder(y)).norm(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    report = audit.lipschitz_bound(encoder, 16)
    assert report.total <= 1 + 1e-5
    encoder.double()
    for _ in range(3):
        x = torch.rand(3, 16, 16, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda t: encoder(t.unsqueeze(0))[0], x).flatten(1)
        assert torch.linalg.matrix_norm(jacobian, ord=2) <= audit.lipschitz_bound(encoder, 16).total


def test_unknown_modules_are_refused_by_name() -> None:
    network = nn.Sequential(SpaceToDepth(4), nn.Sequential(nn.BatchNorm2d(48)))
    with pytest.raises(UnboundedModuleError, match=r"BatchNorm2d at '1\.0'"):
        audit.lipschitz_bound(network, 16)
    with pytest.raises(UnboundedModuleError, match="SmallViT"):
        audit.lipschitz_bound(SmallViT(16, patch_size=8, width=12, depth=1, heads=2), 16)


def test_subclasses_of_known_modules_are_not_trusted() -> None:
    class Doubling(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    class Branching(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    for module in (Doubling(), Branching(nn.Flatten())):
        with pytest.raises(UnboundedModuleError, match=type(module).__name__):
            audit.lipschitz_bound(module, 4)


def test_a_scaled_layer_moves_the_bound() -> None:
    encoder = OrthogonalProjection(16, 8)
    scaled = nn.Sequential(encoder, nn.Linear(8, 8, bias=False))
    with torch.no_grad():
        scaled[1].weight.copy_(1.05 * torch.eye(8))
    assert audit.lipschitz_bound(scaled, 16).total == pytest.approx(1.05, rel=1e-6)


def test_non_finite_weights_have_no_bound() -> None:
    for layer in (SLLConv2d(3, 3), nn.Conv2d(3, 3, 3), OrthogonalProjection(8, 4)):
        with torch.no_grad():
            next(layer.parameters()).view(-1)[0] = math.nan
        with pytest.raises(UnboundedModuleError, match="non-finite weights"):
            audit.lipschitz_bound(layer, 8)


def test_a_module_used_twice_counts_twice() -> None:
    linear = nn.Linear(48, 48)
    report = audit.lipschitz_bound(nn.Sequential(nn.Flatten(), linear, linear), 4)
    assert report.total == pytest.approx(audit.linear_bound(linear) ** 2, rel=1e-9)
    assert len(report.layers) == 3


def test_what_may_compute_anything_is_refused() -> None:
    hooked = nn.Flatten()
    hooked.register_forward_hook(lambda _m, _a, output: 1000 * output)
    for module, message in ((hooked, "hooks"), (nn.Flatten(0), "no finite"), (nn.Softplus(threshold=-5), "Softplus")):
        with pytest.raises(UnboundedModuleError, match=message):
            audit.lipschitz_bound(module, 4)


def test_the_audit_leaves_the_modes_alone() -> None:
    encoder = OrthogonalProjection(16, 8).train()
    encoder[1].eval()
    audit.lipschitz_bound(encoder, 16)
    assert [module.training for module in encoder.modules()] == [True, True, False, True]


def test_replaced_forwards_and_global_hooks_are_refused() -> None:
    replaced = nn.ReLU()
    replaced.forward = lambda x: 5 * x  # type: ignore[method-assign]
    with pytest.raises(UnboundedModuleError, match="forward of its own"):
        audit.lipschitz_bound(nn.Sequential(replaced), 4)
    hook = nn.modules.module.register_module_forward_hook(lambda _m, _a, output: 3 * output)
    try:
        with pytest.raises(UnboundedModuleError, match="hooks"):
            audit.lipschitz_bound(nn.Flatten(), 4)
    finally:
        hook.remove()


def test_half_precision_is_found_inside_adapters_and_buffers() -> None:
    network = nn.Sequential(nn.Flatten(), ExplicitLinear(nn.Linear(48, 5))).bfloat16()
    with pytest.raises(UnboundedModuleError, match=r"ExplicitLinear at '1' has weights in half precision"):
        audit.lipschitz_bound(network, 4)


def test_branches_combine_and_must_not_disturb_each_other() -> None:
    mixture = ParallelMixing(nn.Sequential(nn.Flatten(), nn.Linear(48, 6)), OrthogonalProjection(4, 5), angle=0.4)
    report = audit.lipschitz_bound(mixture, 4)
    sigma = audit.linear_bound(mixture.first[1])  # type: ignore[index, arg-type]
    assert report.total == pytest.approx(math.hypot(math.cos(0.4) * sigma, math.sin(0.4)), rel=1e-6)
    assert [layer.name for layer in report.layers][-2:] == ["second.2", ""]
    inplace = ParallelMixing(nn.Sequential(nn.LeakyReLU(3.0, inplace=True), nn.Flatten()), nn.Flatten())
    with pytest.raises(UnboundedModuleError, match="LeakyReLU that changes in place"):
        audit.lipschitz_bound(inplace, 4)

    class Louder(ParallelMixing):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * super().forward(x)

        def lipschitz_bound(self) -> float:
            return 3 * super().lipschitz_bound()

    class Grandchild(Louder):
        pass

    quiet = OrthogonalLinear(48, 3)
    louder = nn.Sequential(nn.Flatten(), Grandchild(quiet, quiet))
    assert audit.lipschitz_bound(louder, 4).total == pytest.approx(3, rel=1e-5)
