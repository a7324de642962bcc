"""The bound of a metric is that of its encoder as it is now, however it was changed."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

import lipsim
from lipsim import PerceptualMetric, audit
from lipsim.audit import UnboundedModuleError
from lipsim.layers import OrthogonalPatches, SLLConv2d, freeze
from lipsim.metric import bounds, join, register_encoder, save
from lipsim.students import OrthogonalProjection


def _encoder() -> nn.Sequential:
    encoder = nn.Sequential(
        OrthogonalPatches(3, 6, patch=2),
        SLLConv2d(6, 3),
        nn.LeakyReLU(0.1),
        nn.Conv2d(6, 4, 3, padding=1),
        nn.Flatten(),
        nn.Linear(64, 5),
    )
    return freeze(encoder)  # type: ignore[return-value]


def _metric() -> PerceptualMetric:
    torch.manual_seed(0)
    return PerceptualMetric(_encoder(), 8).eval()


def _assert_fresh(metric: PerceptualMetric, changed: bool = True) -> None:
    """The bound is that of an audit of a copy, which has no memory; ``changed``: and not that of before."""
    before, bound = metric._bounds._audited, metric.lipschitz  # first: a copy would take addresses that are free now
    fresh = audit.lipschitz_bound(deepcopy(metric.encoder), metric.image_size).total
    assert bound == fresh
    assert before is not None
    assert not changed or before.value != fresh


def _linear(metric: PerceptualMetric) -> nn.Linear:
    layer = metric.encoder[5]  # type: ignore[index]
    assert isinstance(layer, nn.Linear)
    return layer


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
def test_after_a_step_of_a_fused_optimizer(optimizer: Callable[..., torch.optim.Optimizer], frozen: bool) -> None:
    metric = _metric()
    for parameter in metric.parameters():
        parameter.grad = -parameter.detach().clone()
    if not frozen:
        metric.train()
    optimizer(metric.parameters(), lr=1.0, fused=True).step()
    metric.eval()
    _assert_fresh(metric)


def test_certifying_between_steps_in_training_mode() -> None:
    metric = _metric().train()
    images = torch.rand(3, 2, 3, 8, 8)
    optimizer = torch.optim.SGD(metric.parameters(), lr=1.0, fused=True)
    for _ in range(2):
        metric.certify(*images)
        assert metric.training
        for parameter in metric.parameters():
            parameter.grad = -parameter.detach().clone()
        optimizer.step()
        _assert_fresh(metric)
    radius = metric.certify(*images).radius
    torch.testing.assert_close(radius, deepcopy(metric).eval().certify(*images).radius, rtol=1e-5, atol=0)


def test_a_module_replaced_behind_the_back() -> None:
    metric = PerceptualMetric(nn.Sequential(nn.Flatten(), _scaled(1)), 4).eval()
    for i in range(20):  # each may lie where the one before lay
        metric.encoder._modules["1"] = None
        metric.encoder._modules["1"] = _scaled(2 + i)
        _assert_fresh(metric)


def _scaled(factor: float) -> nn.Linear:
    linear = nn.Linear(48, 5)
    with torch.no_grad():
        linear.weight.mul_(factor)
    return linear


def test_a_module_popped_and_another_appended() -> None:
    encoder = nn.Sequential(nn.Flatten(), _scaled(1))
    metric = PerceptualMetric(encoder, 4).eval()
    for i in range(20):
        encoder.pop(1)
        encoder.append(_scaled(2 + i))
        _assert_fresh(metric)


def test_a_parameter_replaced_twice() -> None:
    layer = _scaled(1)
    metric = PerceptualMetric(nn.Sequential(nn.Flatten(), layer), 4).eval()
    for i in range(20):
        for factor in (5.0, 2.0 + i):
            layer.weight = nn.Parameter(torch.full((5, 48), factor))
        _assert_fresh(metric)


def test_a_round_trip_through_half_precision() -> None:
    layer = _scaled(1)
    metric = PerceptualMetric(nn.Sequential(nn.Flatten(), layer), 4).eval()
    for _ in range(20):
        layer.weight.data.normal_()
        _assert_fresh(metric)
        metric.bfloat16().float()
        _assert_fresh(metric)


@pytest.mark.parametrize("position", [0, 1, 3, 5])
def test_edits_that_count_no_version(position: int) -> None:
    metric = _metric()
    weight = next(metric.encoder[position].parameters())  # type: ignore[index]
    with torch.inference_mode():
        weight.view(-1)[0] += 2.0
    _assert_fresh(metric)
    weight.detach().numpy().reshape(-1)[1] -= 3.0
    _assert_fresh(metric)
    weight.data.view(-1)[2] = 4.0
    _assert_fresh(metric)


def test_entries_that_change_places_or_signs() -> None:
    metric = _metric()
    weight = _linear(metric).weight.data
    weight.copy_(weight.view(-1)[torch.randperm(weight.numel())].view_as(weight))
    _assert_fresh(metric)
    weight.view(-1)[::3] *= -1
    _assert_fresh(metric)


def test_two_parameters_that_change_places() -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(192, 192), nn.LeakyReLU(2.0), nn.Linear(192, 192))
    metric = PerceptualMetric(encoder, 8)
    first, second = metric.encoder[1], metric.encoder[3]  # type: ignore[index]
    content = bounds.fingerprint(metric.encoder, metric.image_size)
    first.weight, second.weight = second.weight, first.weight
    assert bounds.fingerprint(metric.encoder, metric.image_size) != content


def test_attributes_of_layers() -> None:
    metric = _metric()
    metric.encoder[2].negative_slope = 5.0  # type: ignore[index,union-attr]
    _assert_fresh(metric)
    metric.encoder[3].dilation = (3, 3)  # type: ignore[index,union-attr]
    metric.encoder[3].padding = (3, 3)  # type: ignore[index,union-attr]
    _assert_fresh(metric)


def test_the_order_of_layers() -> None:
    first, second = nn.LeakyReLU(0.5), nn.LeakyReLU(3.0)
    metric = PerceptualMetric(nn.Sequential(nn.Flatten(), first, second), 8)
    content = bounds.fingerprint(metric.encoder, metric.image_size)
    metric.encoder[1], metric.encoder[2] = second, first  # type: ignore[index]
    assert bounds.fingerprint(metric.encoder, metric.image_size) != content


def test_a_hook_is_refused() -> None:
    metric = _metric()
    handle = metric.encoder[2].register_forward_hook(lambda _, __, y: 9 * y)  # type: ignore[index,union-attr]
    with pytest.raises(UnboundedModuleError, match="hooks"):
        _ = metric.lipschitz
    handle.remove()
    _assert_fresh(metric, changed=False)
    handle = nn.modules.module.register_module_forward_pre_hook(lambda _, arguments: (9 * arguments[0],))
    try:
        with pytest.raises(UnboundedModuleError, match="hooks"):
            _ = metric.lipschitz
    finally:
        handle.remove()


def test_a_forward_of_an_instance_is_refused() -> None:
    metric = _metric()
    metric.encoder[2].forward = lambda x: 9 * x  # type: ignore[index,union-attr,method-assign]
    with pytest.raises(UnboundedModuleError, match="forward"):
        _ = metric.lipschitz


def test_the_functions_of_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = _metric()
    content = bounds.fingerprint(metric.encoder, metric.image_size)
    monkeypatch.setattr(nn.LeakyReLU, "forward", lambda self, x: 9 * x)
    assert bounds.fingerprint(metric.encoder, metric.image_size) != content
    monkeypatch.undo()
    assert bounds.fingerprint(metric.encoder, metric.image_size) == content


def test_another_image_size() -> None:
    # Where the stride does not divide the image, circular padding repeats rows of the operator.
    encoder = nn.Sequential(nn.Conv2d(3, 4, 5, stride=2, padding=1, padding_mode="circular"))
    metric = PerceptualMetric(encoder, 8).eval()
    metric.image_size = 7
    _assert_fresh(metric)


def test_an_audit_is_used_again_where_nothing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = _metric()
    images = torch.rand(3, 2, 3, 8, 8)
    audits = []
    bound = audit.lipschitz_bound
    monkeypatch.setattr(audit, "lipschitz_bound", lambda *arguments: audits.append(0) or bound(*arguments))
    for _ in range(3):
        metric.certify(*images)
        metric(images[0], images[1]).sum().backward()
        freeze(metric)
    metric.requires_grad_(False)
    assert metric.lipschitz and not audits
    assert deepcopy(metric).lipschitz == metric.lipschitz and not audits
    metric.train()
    _ = metric.lipschitz, metric.lipschitz
    assert len(audits) == 2  # whatever steps between
    metric.eval()
    copy = pickle.loads(pickle.dumps(metric))  # into another process, where the code may be another
    assert copy.lipschitz == metric.lipschitz and len(audits) == 3
    metric.lipschitz = 7.0
    metric.train()
    assert metric.lipschitz == 7.0 and len(audits) == 3


def test_the_floor_of_a_file_stays() -> None:
    metric = _metric()
    metric.require_lipschitz(100.0)
    assert metric.lipschitz == 100.0
    with torch.no_grad():
        _linear(metric).weight.mul_(1000.0)
    assert metric.lipschitz > 100.0


def test_the_bound_inside_transforms_and_inference() -> None:
    metric, x = _metric(), torch.rand(3, 8, 8)
    bound = metric.lipschitz
    with torch.inference_mode():
        assert metric.lipschitz == bound
    found = []

    def scaled(image: torch.Tensor) -> torch.Tensor:
        found.append(metric.lipschitz)
        return metric.embed(image.unsqueeze(0), check_range=False).sum() / metric.lipschitz

    torch.func.grad(scaled)(x)
    torch.func.vmap(torch.func.grad(scaled))(x.unsqueeze(0))
    assert found == [bound] * 2


def test_the_encoder_is_read_once_for_a_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = _metric()
    metric.require_feature_error(0.0)
    images = torch.rand(3, 2, 3, 8, 8)
    metric.certify(*images)  # audits and searches
    read: list[int] = []
    fingerprint = bounds.fingerprint
    monkeypatch.setattr(bounds, "fingerprint", lambda *content: read.append(0) or fingerprint(*content))
    metric.certify(*images)
    assert len(read) == 1
    assert metric.certificate_options["feature_error"] == 2 * metric.feature_error > 0


def test_nothing_is_read_where_all_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = PerceptualMetric(_encoder(), 8, lipschitz=2.0, feature_error=1e-6).eval()
    monkeypatch.setattr(bounds, "fingerprint", lambda *_: pytest.fail("the encoder was read"))
    assert metric.certificate_options == {"anchor": 1.0, "lipschitz": 2.0, "feature_error": 2e-6}


def test_an_error_that_was_found_is_that_of_the_weights_under_a_declared_bound() -> None:
    metric = _metric()
    metric.require_feature_error(0.0)
    metric.lipschitz = 1e6
    before = metric.feature_error
    with torch.no_grad():
        _linear(metric).weight.mul_(1000.0)
    assert metric.feature_error > 100 * before > 0
    assert metric.feature_error == metric.measure_feature_error(thorough=False)
    metric.double()
    assert metric.feature_error == 0


def test_an_error_is_searched_for_again_in_training_mode() -> None:
    metric = _metric()
    metric.require_feature_error(0.0)
    before = metric.feature_error
    metric.train()
    with torch.no_grad():
        _linear(metric).weight.mul_(2.0)
    assert metric.feature_error > before
    assert metric.certificate_options["feature_error"] == 2 * metric.feature_error


@register_encoder
class Opaque(nn.Module):
    """An encoder that no audit sees through."""

    def __init__(self, image_size: int, out_features: int = 4) -> None:
        super().__init__()
        self.image_size, self.out_features = image_size, out_features
        self.weight = nn.Parameter(torch.eye(out_features, 3 * image_size**2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.weight.T


def test_a_declared_bound_that_no_audit_confirms_is_not_saved(tmp_path: Path) -> None:
    """Nobody could load the file: what it claims is audited then."""
    file = tmp_path / "metric.safetensors"
    opaque = PerceptualMetric(Opaque(8), 8, lipschitz=1.0)
    for metric in (opaque, join(opaque, PerceptualMetric(Opaque(8), 8, lipschitz=1.0))):
        with pytest.raises(ValueError, match=r"no Lipschitz bound is known for Opaque.*math\.inf"):
            save(metric, file)
    less = PerceptualMetric(OrthogonalProjection(8, 4), 8, lipschitz=0.5)
    with pytest.raises(ValueError, match=r"the encoder has 1\.0000.*, more than the declared 0\.5; declare that"):
        save(less, file)
    assert not file.exists()
    opaque.lipschitz = math.inf
    assert lipsim.load(save(opaque, file)).lipschitz == math.inf
    more = PerceptualMetric(OrthogonalProjection(8, 4), 8, lipschitz=2.0)
    assert lipsim.load(save(more, file)).lipschitz == 2.0
