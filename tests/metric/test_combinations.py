"""Metrics made of two others: geometry, certificates, files, and what is refused."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import lipsim
from lipsim.attacks import TwoAFCObjective, auto
from lipsim.cli.main import main
from lipsim.metric import PerceptualMetric, TiledMetric, average_weights, encoders, join, register_encoder, save
from lipsim.metric.combinations import JoinedEncoder
from lipsim.metric.folded import folded_copy
from lipsim.students import OrthogonalProjection, OrthogonalShiftNetwork, ScatteringTransform, SLLNetwork
from lipsim.teachers import SmallViT
from lipsim.teachers.lora_tuning import Lora, add_adapter, merged
from lipsim.training import FineTuning

SIZE = 16
X = torch.rand(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "_registered", {})


def _student(seed: int = 0) -> PerceptualMetric:
    torch.manual_seed(seed)
    encoder = OrthogonalShiftNetwork(image_size=SIZE, out_features=8, widths=(16, 16), depths=(1, 1))
    for name, parameter in encoder.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return PerceptualMetric(encoder, SIZE)


def _moduli(**options: Any) -> PerceptualMetric:
    return PerceptualMetric(ScatteringTransform(image_size=SIZE, orientations=4, **options), SIZE)


def _squared(metric: PerceptualMetric, x: Tensor) -> Tensor:
    features = metric.encoder(x)
    return (features[:-1] - features[1:]).square().sum(1)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_squared_distances_of_features_are_mixed(share: float) -> None:
    first, second = _student().double(), _moduli().double()
    first.anchor = 0.5
    joined = join(first, second, share)
    mixed = (1 - share) * _squared(first, X.double()) + share * _squared(second, X.double())
    torch.testing.assert_close(_squared(joined, X.double()), mixed, rtol=1e-6, atol=0)  # the angle was set in float32
    assert joined.anchor == 0.5 and joined.dtype == torch.float64


def test_no_direction_is_longer_than_the_bound() -> None:
    joined = join(_student().double(), _moduli().double(), 0.3)
    jacobian = torch.autograd.functional.jacobian(joined.encoder, X[:1].double()).reshape(-1, 3 * SIZE**2)
    norm = torch.linalg.matrix_norm(jacobian, 2).item()
    assert 0.3 < norm <= joined.lipschitz <= 1 + 1e-5


def test_attacks_flip_no_answer_inside_its_radius() -> None:
    joined = join(_student(), _moduli())
    generator = torch.Generator().manual_seed(1)
    x, y, z = torch.rand(3, 8, 3, SIZE, SIZE, generator=generator) / 2 + 0.25
    certificate = joined.certify(x, y, z)
    assert (certificate.radius > 0.001).all()
    objective = TwoAFCObjective(joined, x, y, z)
    found = auto(objective, x, eps=[0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0], steps=10, queries=20)
    assert (found.broken_at > certificate.radius).all()
    assert found.broken_at.isfinite().any()  # the attacks do find some


def test_a_joined_metric_is_a_file(tmp_path: Path) -> None:
    joined = join(_student(), _moduli(), 0.3)
    nested = join(joined, _student(1), 0.25)
    for metric in (joined, nested):
        again = lipsim.load(save(metric, tmp_path / "joined.safetensors"))
        assert torch.equal(again.embed(X), metric.embed(X)) and again.lipschitz == metric.lipschitz
        assert again.feature_error == metric.feature_error > 0 and again.feature_error_kind == "searched"
    config = again.encoder.config
    assert config["first"]["config"]["second"]["encoder"] == "ScatteringTransform" and config["share"] == 0.25


def test_it_covers_the_errors_of_both() -> None:
    first, second = _student(), _moduli()
    first.feature_error, second.feature_error = 0.01, 0.02  # declared, and more than any search finds
    expected = math.hypot(math.sqrt(0.7) * 0.01, math.sqrt(0.3) * 0.02)
    assert join(first, second, 0.3).feature_error == pytest.approx(expected, rel=1e-5)
    assert average_weights(first, _student(1)).feature_error == 0.01


def test_bounds_that_no_audit_knows_are_taken_as_declared() -> None:
    class Unknown(nn.Module):
        def __init__(self, image_size: int) -> None:
            super().__init__()
            self.image_size = image_size

        def forward(self, x: Tensor) -> Tensor:
            return 3 * x.flatten(1)

    register_encoder(name="tests.Unknown")(Unknown)
    unknown = PerceptualMetric(Unknown(SIZE), SIZE, lipschitz=3.0)
    joined = join(unknown, _student(), 0.25)
    for angle in (math.asin(math.sqrt(0.25)), 0.0, 2.0):  # the last two as training may leave it
        with torch.no_grad():
            joined.encoder.angle.fill_(angle)
        jacobian = torch.autograd.functional.jacobian(joined.encoder, X[:1]).reshape(-1, 3 * SIZE**2)
        assert torch.linalg.matrix_norm(jacobian, 2).item() <= joined.lipschitz == pytest.approx(3, rel=1e-5)


def test_an_encoder_that_changes_images_in_place_is_refused() -> None:
    changing = PerceptualMetric(
        nn.Sequential(nn.Threshold(0.5, 0.0, inplace=True), nn.Flatten()), SIZE, lipschitz=math.inf
    )
    with pytest.raises(ValueError, match="this Sequential changes its input in place; give it a copy"):
        join(changing, _student())


@pytest.mark.parametrize("share", [Fraction(1, 4), np.float32(0.25), torch.tensor(0.25)])
def test_any_number_is_a_share(share: Any, tmp_path: Path) -> None:
    path = save(join(_student(), _moduli(), share), tmp_path / "joined.safetensors")
    assert lipsim.load(path).encoder.config["share"] == 0.25


def test_a_folded_one_computes_the_same(tmp_path: Path) -> None:
    """With an angle that training has moved from the share of its arguments."""
    joined = join(_student(), _moduli(), 0.3)
    with torch.no_grad():
        joined.encoder.angle.fill_(1.0)
    folded = lipsim.load(save(folded_copy(joined), tmp_path / "folded.safetensors"))
    parts = [folded.encoder.config[part]["encoder"] for part in ("first", "second")]
    assert parts == ["FoldedNetwork", "ScatteringTransform"]  # which derives no weights
    torch.testing.assert_close(folded.embed(X), joined.embed(X), rtol=0, atol=1e-6)
    assert folded.encoder.out_features == joined.embed(X).shape[1]


def test_its_weights_are_its_own_and_train(tmp_path: Path) -> None:
    first = _student()
    joined = join(first, _moduli())
    assert not any(parameter.requires_grad for parameter in joined.parameters())
    stage = FineTuning(init_from=save(joined, tmp_path / "joined.safetensors"))
    encoder = stage.metric.encoder
    assert isinstance(encoder, JoinedEncoder) and encoder.angle.requires_grad
    encoder.train()(X).square().sum().backward()
    assert encoder.angle.grad is not None and encoder.angle.grad != 0
    with torch.no_grad():
        for parameter in joined.parameters():
            parameter.zero_()
    assert all(parameter.any() for parameter in first.parameters() if parameter.ndim > 1)


def test_beside_a_teacher_nothing_is_proven() -> None:
    torch.manual_seed(0)
    teacher = PerceptualMetric(SmallViT(SIZE), SIZE, lipschitz=math.inf)
    for joined in (join(teacher, _student()), join(_student(), teacher)):
        assert not joined.has_bound and (joined.certify(X[:1], X[1:2], X[2:3]).radius == 0).all()


def test_a_header_names_known_encoders_only(tmp_path: Path) -> None:
    path = save(join(_student(), _moduli()), tmp_path / "joined.safetensors")
    with safe_open(path, framework="pt") as archive:
        metadata = archive.metadata()
        state = {name: archive.get_tensor(name) for name in archive.keys()}
    for first, message in [
        ({"encoder": "os.system", "config": {}}, "it joins the encoder os.system, which this version does not have"),
        ({"encoder": "SmallViT", "config": {"weights": "/etc/passwd"}}, "its configuration names a weight file"),
        (
            {"encoder": "SLLNetwork", "config": {"image_size": SIZE, "out_features": 8, "depth": 10**6}},
            "more than the file has",
        ),
        (3, "cannot rebuild the metric"),
        ({"encoder": "JoinedEncoder", "config": _nested(9)}, "joined at most 8 times over"),
    ]:
        header = json.loads(metadata["metric"])
        header["config"]["first"] = first
        save_file(state, tmp_path / "other.safetensors", metadata=metadata | {"metric": json.dumps(header)})
        with pytest.raises(ValueError, match=message):
            lipsim.load(tmp_path / "other.safetensors")


def _nested(times: int) -> dict[str, Any]:
    tiny = {"encoder": "OrthogonalProjection", "config": {"image_size": SIZE, "out_features": 1}}
    inner = tiny if times == 1 else {"encoder": "JoinedEncoder", "config": _nested(times - 1)}
    return {"first": inner, "second": tiny, "share": 0.5}


def test_encoders_of_others_may_make_what_their_files_do_not_hold(tmp_path: Path) -> None:
    """As alone, where memory for a while is no attack: whoever registers a class trusts it."""

    @register_encoder(name="tests.Spacious")
    class Spacious(nn.Sequential):
        def __init__(self, image_size: int) -> None:
            torch.zeros(2**25)
            super().__init__(nn.Flatten())
            self.image_size = image_size

    joined = join(_student(), PerceptualMetric(Spacious(SIZE), SIZE))
    assert torch.equal(lipsim.load(save(joined, tmp_path / "joined.safetensors")).embed(X), joined.embed(X))


def test_what_cannot_be_joined() -> None:
    student, other = _student(), PerceptualMetric(OrthogonalProjection(8, 4), 8)
    for second, message in [
        (other, "with the same size, resize, framing, dtype and device, got 16, float, stretch"),
        (_student().double(), "torch.float64"),
        (PerceptualMetric(_student().encoder, SIZE, framing="pad"), "pad"),
        (TiledMetric(student, 2), "expected metrics of whole images"),
        (_student().half(), "float16"),
    ]:
        with pytest.raises(ValueError, match=message):
            join(student, second)
    for share in (0.0, 1.0, -0.1, math.nan, True):
        with pytest.raises(ValueError, match="share"):
            join(student, _moduli(), share)
    own = PerceptualMetric(nn.Sequential(nn.Flatten()), SIZE, lipschitz=1.0)
    with pytest.raises(ValueError, match="cannot join an encoder of class Sequential, which no file can name"):
        join(own, student)
    with pytest.raises(ValueError, match="expected encoders for images of one size, got 16 and 8 pixels"):
        JoinedEncoder(student.encoder, other.encoder)


def test_the_mean_of_two_rotations_is_the_rotation_between() -> None:
    """Where the mean of the parameters, or of the matrices, would be a shorter map."""
    metrics = [PerceptualMetric(OrthogonalProjection(1, 3), 1).double() for _ in range(2)]
    for metric, angle, factor in zip(metrics, (0.0, 1.2), (1.0, 7.0), strict=True):
        turn = torch.eye(3, dtype=torch.float64)
        turn[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        _matrix(metric).copy_(factor * turn)  # the layer stands for the turn, whatever the factor
    for share, angle in ((0.5, 0.6), (0.25, math.atan2(0.25 * math.sin(1.2), 0.75 + 0.25 * math.cos(1.2)))):
        mean = _matrix(average_weights(*metrics, share))
        torch.testing.assert_close(mean @ mean.T, torch.eye(3, dtype=torch.float64))
        assert math.atan2(mean[1, 0], mean[0, 0]) == pytest.approx(angle)


def _matrix(metric: PerceptualMetric) -> Tensor:
    return next(parameter for parameter in metric.encoder.parameters() if parameter.ndim == 2).detach()


def test_means_of_weights() -> None:
    first, second = _student(), _student(1)
    mean = average_weights(first, second, 0.25)
    assert mean.lipschitz <= 1 + 1e-5 and mean.anchor == first.anchor
    for name, parameter in mean.encoder.named_parameters():
        one, other = (metric.encoder.get_parameter(name) for metric in (first, second))
        if name.endswith("bias") or name.endswith("q"):
            torch.testing.assert_close(parameter, 0.75 * one + 0.25 * other)
    itself = average_weights(first, first, 0.3)
    torch.testing.assert_close(itself.embed(X), first.embed(X), rtol=0, atol=1e-5)
    sll = [PerceptualMetric(SLLNetwork(SIZE, 4, channels=6, depth=1, linear_depth=1), SIZE) for _ in range(2)]
    half = average_weights(*sll).encoder.state_dict()
    for name, tensor in half.items():
        torch.testing.assert_close(tensor, sum(metric.encoder.state_dict()[name] for metric in sll) / 2)


def test_networks_that_have_no_mean() -> None:
    with pytest.raises(ValueError, match="of one class and with the same arguments, got OrthogonalShiftNetwork of"):
        average_weights(_student(), _moduli())
    with pytest.raises(ValueError, match=r"'low': 0\.05\} and ScatteringTransform of .*'low': 0\.1\}"):
        average_weights(_moduli(), _moduli(low=0.1))
    changed = _moduli()
    next(changed.encoder.buffers()).mul_(0.5)
    with pytest.raises(ValueError, match=r"differ in their parameters alone, and 1\.window_low is none"):
        average_weights(_moduli(), changed)
    with pytest.raises(ValueError, match="got a FoldedNetwork: a mean of folded weights is no orthogonal layer's"):
        average_weights(folded_copy(_student()), folded_copy(_student(1)))
    ours = [PerceptualMetric(nn.Sequential(nn.Flatten(), layer), SIZE) for layer in (nn.ReLU(), nn.Tanh())]
    with pytest.raises(ValueError, match="expected two networks of one class"):
        average_weights(*ours)
    with pytest.raises(ValueError, match="expected metrics in float32 or float64; combine them so"):
        average_weights(_student().half(), _student(1).half())


def test_the_mean_of_adapted_weights_is_theirs() -> None:
    """Not of the factors of LoRA, whose product is no mean."""
    pytest.importorskip("peft")
    torch.manual_seed(0)
    teacher, tuned = SmallViT(SIZE), []
    for _ in range(2):
        encoder = deepcopy(teacher)
        add_adapter(encoder, Lora(rank=2))
        for name, parameter in encoder.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)
        tuned.append(PerceptualMetric(encoder, SIZE, lipschitz=math.inf))
    mean = average_weights(*tuned).encoder.state_dict()
    states = [merged(metric.encoder).state_dict() for metric in tuned]
    assert not any("lora_" in name for name in mean)
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (save(_student(seed), tmp_path / f"{seed}.safetensors") for seed in (0, 1))
    for options, combine in (([], join), (["--weights"], average_weights)):
        out = tmp_path / "combined.safetensors"
        with pytest.raises(SystemExit) as end:
            main(["combine", str(one), str(other), str(out), "--share", "1/4", *options])
        assert end.value.code == 0
        assert "(audited)" in (printed := capsys.readouterr().out) and str(out) in printed
        metric = lipsim.load(out)
        assert torch.equal(metric.embed(X), combine(lipsim.load(one), lipsim.load(other), 0.25).embed(X))
        assert metric.notes["share"] == 0.25 and metric.notes["of"][1]["source"] == "1.safetensors"
        assert metric.notes["combined"] == ("weights" if options else "features")
