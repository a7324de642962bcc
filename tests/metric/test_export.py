"""Exported metrics: folded files, ONNX and torch.export graphs, and files that claim too much."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import lipsim
from lipsim import PerceptualMetric, certificates
from lipsim.audit import lipschitz_bound
from lipsim.cli.main import main
from lipsim.layers import (
    AOLConv2d,
    AOLLinear,
    Centering,
    ChannelPadding,
    ChannelShift,
    CPLConv2d,
    CPLLinear,
    ExplicitConv2d,
    FoldedResidualLinear,
    GroupSort,
    Householder,
    L2NormPool2d,
    MaxMin,
    OrthogonalLinear,
    SLLConv2d,
    SLLLinear,
    exact_copy,
    explicit_copy,
    freeze,
)
from lipsim.layers.base import FoldedLayer
from lipsim.metric import files, load, save
from lipsim.metric.export_check import check_graphs, check_images, check_metric, check_onnx, check_torch
from lipsim.metric.folded import folded_copy
from lipsim.metric.graphs import GRAPHS, MetricGraphs, RadiusGraph, metric_graphs
from lipsim.metric.torch_export import TorchGraph, export_torch
from lipsim.students import (
    FoldedNetwork,
    OrthogonalProjection,
    OrthogonalShiftNetwork,
    ScatteringNetwork,
    ScatteringTransform,
    SLLNetwork,
    TorchlipNetwork,
    folded_network,
)
from lipsim.teachers import SmallViT

# onnxscript and torch's exporter call what others deprecate.
OTHERS_DEPRECATE = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Sequence(nn.Sequential):
    """Layers of every kind that has weights of its own."""

    def __init__(self) -> None:
        super().__init__(
            ChannelPadding(3, 8),
            nn.Sequential(CPLConv2d(8, 4), Householder(8)),
            SLLConv2d(8, 4, kernel_size=2, stride=2),
            SLLConv2d(8, 4, padding_mode="circular"),
            AOLConv2d(8, 8, stride=2, padding_mode="circular"),
            ExplicitConv2d(nn.Conv2d(8, 8, 2, padding="same", bias=False)),
            GroupSort(),
            L2NormPool2d(2),
            nn.Flatten(),
            AOLLinear(128, 16),
            CPLLinear(16, 8),
            OrthogonalLinear(16, 8),
            MaxMin(),
        )
        self.image_size, self.out_features = 16, 8
        self.config: dict[str, Any] = {}


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "projection": lambda: OrthogonalProjection(16, 8),
    # 18 pixels: padded with grey to whole patches
    "shift": lambda: OrthogonalShiftNetwork(18, 8, 4, widths=(8, 16), depths=(1, 1), linear_depth=1, linear_width=8),
    "sll": lambda: SLLNetwork(16, 8, channels=8, depth=2, linear_depth=2, linear_width=8),
    "scattering": lambda: ScatteringNetwork(18, 8, 4, orientations=3, widths=(14, 16), depths=(1, 1), linear_width=8),
    "moduli": lambda: ScatteringTransform(16, 4, orientations=3),
    "torchlip": lambda: TorchlipNetwork(16, 8, blocks=(4, 2), depths=(1, 1), widths=(48, 64)),
    "layers": Sequence,
}


def _encoder(name: str) -> nn.Module:
    encoder = ENCODERS[name]()
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim < 2 or parameter.shape[0] == 1:  # biases and logarithms, which start at 0
                parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def _metric(name: str = "shift", **options: Any) -> PerceptualMetric:
    encoder = _encoder(name)
    metric = PerceptualMetric(encoder, encoder.image_size, **options)  # type: ignore[arg-type]
    metric.require_feature_error(0.0)
    return freeze(metric)  # type: ignore[return-value]


@pytest.mark.parametrize("name", ENCODERS)
def test_explicit_weights_compute_the_same_under_the_same_bound(name: str) -> None:
    encoder = freeze(_encoder(name))
    network = FoldedNetwork.from_encoder(encoder)
    size = network.image_size
    x = torch.rand(3, 3, size, size)
    assert not any(isinstance(module, FoldedLayer) for module in network.modules())
    torch.testing.assert_close(network(x), encoder(x), rtol=1e-6, atol=1e-6)
    bound, original = lipschitz_bound(network, size).total, lipschitz_bound(encoder, size).total
    assert bound == pytest.approx(original, rel=1e-6)
    jacobian = torch.func.jacrev(network.double())(x[:1].double()).flatten(2).flatten(0, 1)
    assert float(torch.linalg.matrix_norm(jacobian.view(-1, 3 * size**2), 2)) <= bound
    again = FoldedNetwork(**json.loads(json.dumps(network.config)))
    again.double().load_state_dict(network.state_dict())
    assert torch.equal(again.eval()(x.double()), network(x.double()))


def test_weights_of_several_dtypes_are_not_rounded_to_one() -> None:
    encoder = _encoder("shift").eval()
    head = next(module for module in reversed(list(encoder.modules())) if isinstance(module, OrthogonalLinear))
    head.double()
    with pytest.raises(ValueError, match=r"torch.float32 and torch.float64 without rounding"):
        FoldedNetwork.from_encoder(encoder)


@pytest.mark.parametrize("channels", [4, 5, 8, 10])
def test_shifts_of_every_channel_are_shares_in_a_file(channels: int) -> None:
    kind = folded_network._shift(ChannelShift(channels, 1.0))
    assert kind["share"] <= 1 and ChannelShift(**kind).groups == ChannelShift(channels, 1.0).groups
    assert ChannelShift(4, 1.25).groups == [0, 1, 1, 1, 1]  # as files of version 0.1 had it


def test_a_folded_block_is_bounded_by_its_weights_whatever_q_says() -> None:
    block = explicit_copy(SLLLinear(12, 6))
    assert isinstance(block, FoldedResidualLinear)
    exact = block.lipschitz_bound()
    with torch.no_grad():
        block.q.copy_(torch.linspace(-3, 3, 6))
        assert exact == pytest.approx(block.lipschitz_bound(), rel=1e-6) == pytest.approx(1, abs=1e-5)
        block.q.fill_(torch.nan)
        assert block.lipschitz_bound() == torch.inf
        block.q.zero_()
        block.output.mul_(1.5)  # 2c − 1 with c = 1.5
        assert block.lipschitz_bound() == pytest.approx(2, abs=1e-5)
        block.output.neg_()  # no longer a descent
        assert block.lipschitz_bound() == torch.inf


def test_a_layer_of_another_class_keeps_its_forward_pass() -> None:
    class Doubled(OrthogonalLinear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer, x = Doubled(6, 4), torch.rand(2, 6)
    copy = explicit_copy(nn.Sequential(layer))
    expected = freeze(layer)(x)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.zero_()
    assert torch.equal(copy(x), expected)
    with pytest.raises(ValueError, match="no sequence of layers"):
        FoldedNetwork.from_encoder(copy)


def test_layers_of_a_header_are_of_known_kinds() -> None:
    for layers in ([{"kind": "Bilinear"}], ["Linear"], [{"in_features": 3}]):
        with pytest.raises(ValueError, match="expected layers of the kinds Linear, Conv2d"):
            FoldedNetwork(layers, 8, 8)
    flat, conv = {"kind": "Flatten"}, {"kind": "Conv2d", "in_channels": 3, "out_channels": 1, "kernel_size": 2}
    with pytest.raises(ValueError, match=r"layers that give \(1, 8\) features of one image, they give \(1, 48\)"):
        FoldedNetwork([flat], 4, 8)
    # What a header asks for in a few bytes is refused before it takes memory.
    for layer in (
        {"kind": "ZeroPad2d", "padding": 10**6},
        {"kind": "ChannelPadding", "in_channels": 0, "channels": 10**9},
    ):
        with pytest.raises(ValueError, match="numbers of one image, too many"):
            FoldedNetwork([layer, flat], 4, 48)
    with pytest.raises(ValueError, match="numbers of one image, too many"):
        FoldedNetwork([[{"kind": "Identity"}], flat], 10**5, 3 * 10**10)
    for option in ("stride", "dilation"):
        with pytest.raises(ValueError, match="is spread over"):
            FoldedNetwork([{**conv, option: 10**5, "padding": 10**5}, flat], 4, 1)


@pytest.mark.parametrize("name", ["shift", "sll"])
def test_a_folded_file_gives_the_same_metric(name: str, tmp_path: Path) -> None:
    metric = _metric(name, anchor=0.5)
    again = load(save(folded_copy(metric), tmp_path / "folded.safetensors"))
    assert type(again.encoder) is FoldedNetwork and again.anchor == 0.5
    x, y = torch.rand(2, 5, 3, metric.image_size, metric.image_size)
    torch.testing.assert_close(again(x, y), metric(x, y), rtol=1e-5, atol=0)
    assert again.lipschitz == pytest.approx(metric.lipschitz, rel=1e-6)
    assert all(check.passed for check in check_metric(metric, again))


def _rewrite(file: Path, claim: float | None = None, factor: float = 1.0) -> Path:
    with safe_open(file, "pt") as content:
        metadata, state = content.metadata(), {name: content.get_tensor(name) for name in content.keys()}
    header = json.loads(metadata["metric"])
    header["lipschitz"] = header["lipschitz"] if claim is None else claim
    matrix = next(name for name, tensor in state.items() if tensor.ndim == 2 and min(tensor.shape) > 1)
    state[matrix] = state[matrix] * factor
    other = file.with_name("tampered.safetensors")
    save_file(state, other, {**metadata, "metric": json.dumps(header)})
    return other


def test_a_file_that_claims_less_than_its_weights_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metric = _metric("projection")
    file = save(folded_copy(metric), tmp_path / "m.safetensors")
    message = r"tampered.safetensors claims the Lipschitz bound 0.9, but its weights have 1.00000\d+: it is damaged"
    with pytest.raises(ValueError, match=message):
        load(_rewrite(file, claim=0.9))
    with pytest.raises(ValueError, match=r"weights have 1.50000\d+"):
        load(_rewrite(file, factor=1.5))
    with pytest.raises(SystemExit) as stop:
        main(["export", str(_rewrite(file, claim=0.9)), "--output", str(tmp_path / "n.safetensors")])
    assert stop.value.code == 1 and capsys.readouterr().err.startswith("error: the metric in ")
    # Rounding is no lie, and neither is more than the weights have.
    assert load(_rewrite(file, claim=metric.lipschitz * (1 - 1e-6))).lipschitz == pytest.approx(metric.lipschitz)
    assert load(_rewrite(file, claim=2.0)).lipschitz == 2.0


def test_a_large_file_is_refused_at_the_first_use_of_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_AUDITED_NOW", 0)
    file = save(folded_copy(_metric("projection")), tmp_path / "m.safetensors")
    assert load(file).lipschitz == pytest.approx(1)
    liar = load(_rewrite(file, claim=0.9))
    x = torch.rand(3, 1, 3, 16, 16)
    assert liar(x[0], x[1]) > 0  # which no bound is about
    for _ in range(2):
        with pytest.raises(ValueError, match=r"claims the Lipschitz bound 0.9"):
            liar.certify(*x)
    with pytest.raises(ValueError, match=r"claims the Lipschitz bound 0.9"):
        liar.audit()
    # Weights that were trained since are not what the file is about.
    with torch.no_grad():
        next(p for p in liar.encoder.parameters() if p.ndim == 2).mul_(3)
    assert liar.lipschitz == pytest.approx(3)


def _modules(metric: PerceptualMetric, **options: Any) -> dict[Any, Any]:
    def run(module: nn.Module) -> Callable[..., tuple[Tensor, ...]]:
        def call(*images: Tensor) -> tuple[Tensor, ...]:
            found = module(*images)
            return found if isinstance(found, tuple) else (found,)

        return call

    return {name: run(module) for name, module in metric_graphs(metric, **options).modules.items()}


@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_graphs_compute_what_the_metric_does(anchor: float) -> None:
    metric = _metric(anchor=anchor)
    assert all(check.passed for check in check_graphs(metric, _modules(metric)))
    metric = metric.double()  # where nothing is lost to rounding
    graphs = _modules(metric)
    x, left, right = check_images(18, 15).double().chunk(3)
    near = x + 1e-6 * torch.randn_like(x)
    for other in (left, near):
        distance = metric(x, other, check_range=False)
        torch.testing.assert_close(graphs["distance"](x, other)[0], distance, rtol=1e-9, atol=1e-20)
    radius, prefers_left = graphs["radius"](x, left, right)
    certificate = metric.certify(x, left, right)
    torch.testing.assert_close(radius, certificate.radius, rtol=1e-12, atol=0)
    assert torch.equal(prefers_left, certificate.prefers_left)


def test_graphs_in_float64_of_a_metric_in_float32() -> None:
    metric = _metric()
    graphs = _modules(metric, double=True)
    for check in check_graphs(metric, graphs):
        assert check.difference < 1e-9, check
    x, y = check_images(18, 10).chunk(2)
    near = (x + 1e-5 * torch.randn_like(x)).clamp(0, 1)
    exact = PerceptualMetric(exact_copy(metric.encoder), 18, lipschitz=1.0)
    for other in (y, near):
        distance = graphs["distance"](x, other)[0]
        assert distance.dtype == torch.float64
        torch.testing.assert_close(distance, exact(x.double(), other.double()), rtol=1e-9, atol=1e-25)


def test_the_radius_of_a_graph_is_that_of_the_certificate() -> None:
    class Given(nn.Module):
        """Features that are given as images."""

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)

    z, z0, z1 = torch.randn(3, 200, 12, 1, 1)
    z1[:50] = z0[:50] + 1e-5 * torch.randn(50, 12, 1, 1)  # near-duplicates
    z1[50:60] = z0[50:60]
    z[60:70] *= 1e-4  # shorter than the error
    for anchor, lipschitz, error in ((1.0, 1.7, 1e-3), (0.0, 1.0, 1e-3), (0.5, 1 + 1e-7, 0.0)):
        options = {"anchor": anchor, "lipschitz": lipschitz, "feature_error": error}
        radius, left = RadiusGraph(Given(), options, 12)(z, z0, z1)
        features = [t.flatten(1).double() for t in (z, z0, z1)]
        expected = certificates.reference_radius(*features, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(radius, expected, rtol=1e-9, atol=1e-12)
        assert torch.equal(left, certificates.margin(*features, anchor=anchor) > 0)  # type: ignore[arg-type]
        assert (radius[50:60] == 0).all() and (radius[70:] > 0).any()
        assert (radius[:50] > 0).all() == (error == 0)
    nan = torch.full((1, 12, 1, 1), torch.nan)
    assert RadiusGraph(Given(), options, 12)(nan, z0[:1], z1[:1])[0] == 0


def test_a_check_finds_what_is_off() -> None:
    metric = _metric()
    graphs = _modules(metric)

    def scaled(name: str, factor: float) -> dict[Any, Any]:
        return {name: lambda *images: (graphs[name](*images)[0] * factor, *graphs[name](*images)[1:])}

    for name, factor in (("distance", 1.01), ("embedding", 1.001), ("radius", 1.01)):
        (check,) = check_graphs(metric, scaled(name, factor))
        assert not check.passed and str(check).startswith("FAILED")
    (check,) = check_graphs(metric, {"radius": lambda *x: (graphs["radius"](*x)[0], ~graphs["radius"](*x)[1])})
    assert check.answers and not check.passed


def test_what_has_no_graph() -> None:
    vit = SmallViT(image_size=16, patch_size=8, width=8, depth=1, heads=1)
    teacher = PerceptualMetric(vit, 16, lipschitz=torch.inf)
    assert set(metric_graphs(teacher).modules) == {"distance", "embedding"}
    with pytest.raises(ValueError, match="no Lipschitz bound, so there is no radius"):
        metric_graphs(teacher, ("radius",))
    with pytest.raises(ValueError, match="expected graphs among distance, embedding, radius, got angle"):
        metric_graphs(teacher, ("angle",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="half precision"):
        metric_graphs(_metric().half())

    class Other(PerceptualMetric):
        pass

    with pytest.raises(ValueError, match="a Other has no graphs"):
        metric_graphs(Other(vit, 16, lipschitz=1.0))


def _constants(content: MetricGraphs) -> dict[str, float]:
    return {name: float(value) for name, value in content.modules["radius"].named_buffers() if value.ndim == 0}


@OTHERS_DEPRECATE
def test_onnx_in_onnxruntime(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from lipsim.metric.onnx import OnnxGraph, export_onnx

    metric = _metric("projection")
    with pytest.raises(ValueError, match="expected weights in float32, got float64"):
        export_onnx(metric.frozen_copy(torch.float64), tmp_path)
    written = export_onnx(metric, tmp_path, ("radius",))
    (check,) = check_onnx(metric, written)
    assert check.passed and check.used < 0.5, check
    graph = OnnxGraph(written["radius"])
    assert float(graph.metadata["lipschitz"]) == metric.lipschitz
    assert float(graph.metadata["feature_error"]) == metric.feature_error and "[0, 1]" in graph.metadata["images"]
    # Numbers that certificates stand on are there to the last digit, in float64.
    model = onnx.load(written["radius"])
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for name, value in _constants(metric_graphs(metric)).items():
        assert stored[name].dtype == "float64" and float(stored[name]) == value


@pytest.mark.slow  # torch's exporter
@OTHERS_DEPRECATE
def test_onnx_with_weights_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from lipsim.metric import onnx

    monkeypatch.setattr(onnx, "_ONE_FILE", 0)
    metric = _metric("projection")
    written = onnx.export_onnx(metric, tmp_path / "folder", ("embedding",))
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["embedding.onnx", "embedding.onnx.data"]
    (check,) = check_onnx(metric, written)
    assert check.passed


@pytest.mark.slow  # a minute: three graphs of each class, and torch's exporter is slow
@OTHERS_DEPRECATE
@pytest.mark.parametrize("name", ["photos", "quickstart", "scattering", *ENCODERS])
def test_every_metric_as_onnx_and_torch_export(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from lipsim.metric.onnx import OnnxGraph, export_onnx

    metric = load(name) if name not in ENCODERS else _metric(name)
    for write, check, run in ((export_onnx, check_onnx, OnnxGraph), (export_torch, check_torch, TorchGraph)):
        written = write(metric, tmp_path)
        assert set(written) == set(GRAPHS)
        for found in check(metric, written):
            # ONNX Runtime's Fourier transform rounds in its own way, and a few moduli have next to no error to spend.
            assert found.passed and found.used < (0.8 if name == "moduli" else 0.5), found
        for count in (1, 7):
            x, left, right = check_images(metric.image_size, 3 * count, seed=5).chunk(3)
            distance, far = run(written["distance"])(x, left)[0], metric(x, left)
            torch.testing.assert_close(distance, far, rtol=1e-5, atol=1e-8)
            z = metric.embed(x)
            off = torch.linalg.vector_norm(run(written["embedding"])(x)[0] - z, dim=1)
            assert (off <= 1e-5 * torch.linalg.vector_norm(z, dim=1)).all()
            certificate = metric.certify(x, left, right)
            radius, prefers_left = run(written["radius"])(x, left, right)
            torch.testing.assert_close(radius, certificate.radius, rtol=1e-5, atol=1e-5)
            assert torch.equal(prefers_left, certificate.prefers_left)


@OTHERS_DEPRECATE
def test_torch_export_of_any_batch(tmp_path: Path) -> None:
    metric = _metric("projection")
    (file,) = export_torch(metric, tmp_path, ("distance",)).values()
    graph = TorchGraph(file)
    for count in (1, 7):
        x, y = check_images(16, 2 * count).chunk(2)
        torch.testing.assert_close(graph(x, y)[0], metric(x, y), rtol=1e-5, atol=1e-7)


ALONE = """
import sys, torch
sys.modules["lipsim"] = None  # whoever imports it fails
program = torch.export.load(sys.argv[1]).module()
x, y = torch.load(sys.argv[2])
torch.save(program(x, y), sys.argv[3])
"""


@pytest.mark.slow  # starts a process
@OTHERS_DEPRECATE
def test_torch_export_runs_without_this_package(tmp_path: Path) -> None:
    metric = lipsim.load("quickstart")
    (file,) = export_torch(metric, tmp_path, ("distance",)).values()
    x, y = torch.rand(2, 7, 3, 64, 64)
    torch.save((x, y), tmp_path / "in.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", ALONE, str(file), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, timeout=300)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), metric(x, y), rtol=1e-5, atol=0)


def test_the_command_writes_a_folded_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save(_metric(), tmp_path / "m.safetensors")
    with pytest.raises(SystemExit) as stop:
        main(["export", str(file), "--output", str(tmp_path / "folded.safetensors"), "--check", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0 and len(facts["checks"]) == 3 and all(check["passed"] for check in facts["checks"])
    assert type(load(facts["files"]["metric"]).encoder) is FoldedNetwork
    for arguments in (["--output", "m.onnx"], ["--graphs", "radius"], ["--double", "--format", "onnx"]):
        with pytest.raises(SystemExit) as stop:
            main(["export", str(file), *arguments])
        assert stop.value.code == 1
    assert "expected an output file ending in .safetensors" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", "nothing.safetensors", "--format", "torch", "--output", str(file / "graphs")])
    assert f"and {file} is a file" in capsys.readouterr().err  # before anything is loaded


def test_onnx_without_its_packages_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as where it is not installed
    with pytest.raises(SystemExit):
        main(["export", "quickstart", "--format", "onnx", "--output", str(tmp_path)])
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "error: ONNX needs the package onnxscript: pip install 'lipsim[onnx]'"


def test_centering_is_kept() -> None:
    network = FoldedNetwork([{"kind": "Centering", "offset": 0.25}, {"kind": "Flatten"}], 4, 48)
    assert isinstance(network[0], Centering) and float(network(torch.zeros(1, 3, 4, 4)).max()) == -0.25


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_in_half_precision_holds_what_the_metric_computes_with(dtype: torch.dtype, tmp_path: Path) -> None:
    """Weights that were derived before they were rounded; rounded parameters would derive others."""
    metric = lipsim.load("quickstart")
    x = torch.rand(4, 3, 64, 64)
    y = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    exact = metric(x, y)
    metric.to(dtype)
    with pytest.raises(ValueError, match=r"half precision .*store them in float32"):
        save(metric, tmp_path / "m.safetensors")
    metric.lipschitz = math.inf  # for distances alone
    file = save(metric, tmp_path / "m.safetensors")
    again = load(file)
    assert again.dtype == dtype and files.holds(file, metric)
    distance = again(x.to(dtype), y.to(dtype))
    assert torch.equal(distance, metric(x.to(dtype), y.to(dtype)))
    rtol = {torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(distance.float(), exact, rtol=rtol, atol=0)


def test_what_no_file_can_hold_is_refused(tmp_path: Path) -> None:
    class Own(nn.Module):
        """Not a sequence of layers."""

        def __init__(self) -> None:
            super().__init__()
            self.image_size, self.out_features, self.config = 16, 6, {}
            self.layer = OrthogonalProjection(16, 6)

        def forward(self, x: Tensor) -> Tensor:
            features: Tensor = self.layer(x)
            return features

    metric = PerceptualMetric(Own(), 16, lipschitz=math.inf).half()
    with pytest.raises(ValueError, match="save it in float32, and call"):
        save(metric, tmp_path / "m.safetensors")
