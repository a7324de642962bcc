"""Published checkpoints: what the published code computes, against what the converted file does.

``fixtures/lipsim.safetensors`` holds numbers alone: the random weights of a small published network, two triplets
of 8-bit images, and the float64 features and distances that its own code gave for them.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

import lipsim
from lipsim.cli import main as command
from lipsim.layers import unfreeze
from lipsim.metric.published import Conversion, _preset, convert
from lipsim.students import SLLNetwork

ROOT = Path(__file__).parents[2]
CHANNELS, DEPTH, CONV_WIDTH, LINEAR_DEPTH, LINEAR_WIDTH, SIDE, KEPT = 6, 3, 5, 2, 7, 2, 20
FEATURES = CHANNELS * SIDE**2
State = dict[str, Tensor]


def _weights() -> State:
    """Random weights under their published names, far from the initialisation, one row of them dead."""
    state: State = {}
    for i in range(DEPTH):
        state[f"convs.{i}.kernel"] = torch.randn(CONV_WIDTH, CHANNELS, 3, 3)
        state[f"convs.{i}.bias"] = torch.randn(1, CONV_WIDTH, 1, 1)
        state[f"convs.{i}.q"] = torch.randn(CONV_WIDTH)
    for i in range(1, 1 + LINEAR_DEPTH):
        state[f"linear.{i}.weight"] = torch.randn(LINEAR_WIDTH, FEATURES)
        state[f"linear.{i}.bias"] = torch.randn(1, LINEAR_WIDTH)
        state[f"linear.{i}.q"] = torch.randn(LINEAR_WIDTH)
    state["convs.1.kernel"][2] = 0
    return state


def _published(state: State, prefix: str = "module.model.") -> State:
    """The layout of the files: every tensor twice."""
    again = {name.replace("convs", "base.1").replace("linear", "base.2"): tensor for name, tensor in state.items()}
    return {prefix + name: tensor for name, tensor in (state | again).items()}


def _reference(state: State, x: Tensor) -> Tensor:
    """Features ``(N, KEPT)`` by the formulas of the paper, but for ``q``, which the convolutions do not use."""

    def inverse(rows: Tensor) -> Tensor:
        return torch.where(rows == 0, 0, 1 / rows)

    x = torch.cat([x, x.new_zeros(len(x), CHANNELS - 3, *x.shape[2:])], 1)
    for i in range(DEPTH):
        kernel, bias = (state[f"convs.{i}.{name}"] for name in ("kernel", "bias"))
        overlap = torch.zeros(CONV_WIDTH, CONV_WIDTH, dtype=x.dtype)
        for down in range(-2, 3):
            for right in range(-2, 3):
                # Rows of the padded kernel shifted by (down, right) against those of the kernel itself.
                shifted = F.pad(kernel, (2, 2, 2, 2))[:, :, 2 + down : 5 + down, 2 + right : 5 + right]
                overlap += torch.einsum("ichw,jchw->ij", kernel, shifted).abs()
        t = inverse(overlap.sum(1))
        inner = torch.relu(F.conv2d(x, kernel, padding=1) + bias)
        x = x - 2 * F.conv_transpose2d(t.view(1, -1, 1, 1) * inner, kernel, padding=1)
    for _ in range(2):
        x = F.avg_pool2d(x, 4, divisor_override=4)
    x = x.flatten(1)
    for i in range(1, 1 + LINEAR_DEPTH):
        weight, bias, q = (state[f"linear.{i}.{name}"] for name in ("weight", "bias", "q"))
        t = inverse(((weight @ weight.T).abs() * q.exp()[None, :] / q.exp()[:, None]).sum(1))
        x = x - 2 * (t * torch.relu(x @ weight.T + bias)) @ weight
    return x[:, :KEPT]


def _write(path: Path, state: Any, **beside: Any) -> Path:
    torch.save({"epoch": 39, "global_step": 7, "model_state_dict": state, **beside}, path)
    return path


def _convert(path: Path, **options: Any) -> Conversion:
    return convert(path, **{"out_features": KEPT} | options)


@pytest.mark.parametrize("image_size", [32, 38])
def test_embeddings_are_those_of_the_published_formulas(tmp_path: Path, image_size: int) -> None:
    state = _weights()
    source = _write(tmp_path / "a.pth", _published(state))
    main([str(source), str(tmp_path / "a.safetensors"), f"--image-size={image_size}", f"--out-features={KEPT}"])
    metric = lipsim.load(tmp_path / "a.safetensors")
    x = torch.rand(4, 3, image_size, image_size)
    expected = _reference({name: tensor.double() for name, tensor in state.items()}, x.double())
    assert expected.shape == (4, KEPT)
    # What the formulas do is not close to doing nothing.
    assert (expected - _reference({n: torch.zeros_like(t).double() for n, t in state.items()}, x.double())).norm() > 1
    error = (metric.embed(x) - expected.float()).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 1e-5
    unfreeze(metric)
    torch.testing.assert_close(metric.double().embed(x.double()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prefix", ["module.model.", "module.backbone.model."])
@pytest.mark.parametrize("anchor", [0, 1])
def test_features_and_distances_are_those_of_the_published_code(tmp_path: Path, anchor: int, prefix: str) -> None:
    numbers = load_file(ROOT / "tests" / "fixtures" / "lipsim.safetensors")
    weights = {name.removeprefix("weights."): t for name, t in numbers.items() if name.startswith("weights.")}
    assert all(weights[f"convs.{i}.q"].abs().max() > 1 for i in range(DEPTH))  # random, as in every published file
    alpha = {f"{prefix}convs.{i}.alpha": torch.ones(1) for i in range(DEPTH)}
    metric = _convert(_write(tmp_path / "a.pth", _published(weights, prefix) | alpha), anchor=float(anchor)).metric
    x, expected = numbers["images"].double() / 255, numbers["features"]
    error = (metric.embed(x.float()) - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 2e-6
    unfreeze(metric)
    metric.double()
    torch.testing.assert_close(metric.embed(x), expected, rtol=1e-12, atol=1e-12)
    reference, left, right = x.chunk(3)
    distances = torch.stack([metric(reference, left), metric(reference, right)])
    torch.testing.assert_close(distances, numbers[f"distances_anchor_{anchor}"], rtol=1e-9, atol=1e-14)


def test_the_converted_file_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = _published(_weights()) | {"module.model.convs.0.alpha": torch.ones(1), "module.alpha": torch.ones(())}
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}}
    source = _write(tmp_path / "published.pth", state, optimizer_state_dict=optimizer, scheduler={"last_epoch": 3})
    output = tmp_path / "sub" / "ours.safetensors"
    main([str(source), str(output), f"--out-features={KEPT}", "--anchor=0.5", "--resize=float"])
    metric = lipsim.load(output)
    assert (metric.image_size, metric.anchor, metric.preprocess.resize) == (16 * SIDE, 0.5, "float")
    assert metric.encoder.config == {
        "image_size": 32,
        "out_features": KEPT,
        "channels": CHANNELS,
        "depth": DEPTH,
        "linear_depth": LINEAR_DEPTH,
        "linear_width": LINEAR_WIDTH,
        "conv_width": CONV_WIDTH,
    }
    assert 1 <= metric.lipschitz < 1.001
    with safe_open(output, framework="pt") as archive:
        notes = json.loads(archive.metadata()["metric"])["notes"]
    assert notes == {
        "source": "published.pth",
        "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "epoch": 39,
        "preset": None,
        "ignored": ["module.alpha", "module.model.convs.0.alpha"],
        "left_out": ["global_step", "optimizer_state_dict", "scheduler"],
        "upcast_from": [],
        "zeroed": ["convs.0.q", "convs.1.q", "convs.2.q"],
    }
    printed = capsys.readouterr().out
    said = ["3 of 6 channels", "2 of inner width 7", "32 to 47", "39", "module.alpha", "q of the 3 convolutions"]
    for part in (*said, str(output)):
        assert part in printed, part
    assert f"{metric.lipschitz:.9g}" in printed


@pytest.mark.parametrize(
    "prefix", ["module.model.", "module.backbone.", "module.backbone.model.", "module._orig_mod.model.", ""]
)
def test_every_layout_gives_the_same_weights(tmp_path: Path, prefix: str) -> None:
    state = _weights()
    _write(tmp_path / "wrapped.pth", _published(state, prefix))
    torch.save(_published(state, prefix), tmp_path / "bare.pth")
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "once.pth")
    names = [name.replace("convs", "base.1").replace("linear", "base.2") for name in state]
    torch.save({prefix + name: t for name, t in zip(names, state.values(), strict=True)}, tmp_path / "base.pth")
    # The published convolutions do not use theirs.
    expected = [torch.zeros_like(t) if re.fullmatch(r"convs\.\d\.q", name) else t for name, t in state.items()]
    for name in ("wrapped", "bare", "once", "base"):
        conversion = _convert(tmp_path / f"{name}.pth")
        found = list(conversion.metric.encoder.state_dict().values())
        assert len(found) == len(expected)
        # Both in the order of layers; within a layer ours is that of the published parameters.
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), name
        assert conversion.epoch == (39 if name == "wrapped" else None)


def test_neutral_normalisation_is_accepted_and_another_refused(tmp_path: Path) -> None:
    state = _published(_weights()) | {
        "module.mean": torch.zeros(1, 3, 1, 1),
        "module.normalize.std": torch.ones(3),
    }
    assert _convert(_write(tmp_path / "a.pth", state)).metric.lipschitz < 1.001
    for key, value in (("module.mean", 0.5), ("module.normalize.std", 0.225)):
        changed = state | {key: state[key].clone()}
        changed[key].view(-1)[1] = value
        with pytest.raises(ValueError, match=f"normalises its input .{key}.*Lipschitz"):
            _convert(_write(tmp_path / "b.pth", changed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in _weights().items()}
    conversion = _convert(_write(tmp_path / "a.pth", _published(state)))
    found = conversion.metric.encoder.state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert torch.equal(found["1.2.kernel"], state["convs.2.kernel"].float())
    assert conversion.upcast_from == (str(dtype).removeprefix("torch."),)
    assert f"{conversion.upcast_from[0]} to float32" in str(conversion)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"module.model.convs.3.gamma": torch.ones(1)}), "unknown keys: module.model.convs.3.gamma"),
        (lambda s: s.update({"module.model.conv1.kernel": torch.ones(1)}), "unknown keys: module.model.conv1.kernel"),
        (lambda s: s.update({"module.model.convs.01.q": torch.ones(5)}), "unknown keys: module.model.convs.01.q"),
        (lambda s: s.update({"module.model.linear.0.q": torch.ones(5)}), "unknown keys: module.model.linear.0.q"),
        (lambda s: s.update({"module.model.finetuning_layer.q": torch.ones(5)}), "unknown keys: .*finetuning_layer"),
        (lambda s: s.update(steps=3), "unknown keys: steps"),
        (lambda s: s.update({5: torch.ones(1)}), "unknown keys: 5"),
        (lambda s: _drop(s, "convs.1.q", "base.1.1.q"), "missing: convs.1.q$"),
        (lambda s: _drop(s, "linear.1.bias", "base.2.1.bias"), "missing: linear.1.bias$"),
        (lambda s: s.update({"module.model.convs.5.q": torch.ones(5)}), r"missing: convs.3.kernel, .*convs.5.bias$"),
        (lambda s: s.update({"x": torch.ones(1)}) or _drop(s, "convs.0.q", "1.0.q"), "unknown keys: x; missing: convs"),
        (lambda s: s.clear(), "missing: convs.0.kernel, .*linear.1.q$"),
        (lambda s: s["module.model.base.2.2.q"].add_(1), "same weights twice.*model.linear.2.q and .*base.2.2.q"),
        (lambda s: s.update({"module.model.base.2.2.q": torch.ones(3)}), "same weights twice"),
        (lambda s: s.update({"module.backbone.convs.0.q": torch.ones(5)}), "same weights twice"),
        (lambda s: _replace(s, "convs.1.kernel", lambda t: t[:, :5]), r"convs.1.kernel \(5, 5, 3, 3\) instead of"),
        (lambda s: _replace(s, "convs.2.bias", torch.flatten), r"convs.2.bias \(5,\) instead of \(1, 5, 1, 1\)"),
        (lambda s: _replace(s, "linear.2.weight", lambda t: t[:, 1:]), r"linear.2.weight \(7, 23\) instead of"),
        (lambda s: _replace(s, "linear.1.q", lambda t: t[1:]), r"linear.1.q \(6,\) instead of \(7,\)"),
        (lambda s: _replace(s, "convs.0.kernel", lambda t: t[..., 1:, 1:]), "expected convs.0.kernel of shape"),
        (lambda s: _replace(s, "convs.0.kernel", torch.flatten), "expected convs.0.kernel of shape"),
        (lambda s: _replace(s, "linear.1.weight", torch.flatten), "expected linear.1.weight of shape"),
        (lambda s: _replace(s, "linear.1.weight", lambda t: t[:, 1:]), "take 23 features, which are no square image"),
        (lambda s: s["module.model.convs.0.q"].fill_(torch.nan), "not finite"),
        (lambda s: s["module.model.base.1.0.bias"].fill_(torch.inf), "base.1.0.bias .* not finite"),
        (lambda s: _replace(s, "convs.0.q", torch.Tensor.double), "got torch.float64 for module.model.convs.0.q"),
        (lambda s: _replace(s, "convs.0.q", torch.Tensor.int), "got torch.int32"),
        (lambda s: _replace(s, "linear.1.weight", torch.Tensor.to_sparse), "another kind for .*linear.1.weight"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_other_states_are_refused(tmp_path: Path, change: Callable[[State], object], message: str) -> None:
    state = {name: tensor.clone() for name, tensor in _published(_weights()).items()}
    _convert(_write(tmp_path / "good.pth", state))
    change(state)
    with pytest.raises(ValueError, match=message):
        _convert(_write(tmp_path / "bad.pth", state))


def _drop(state: State, *endings: str) -> None:
    for name in [name for name in state if name.endswith(endings)]:
        del state[name]
    # A layer is gone only where both of its names are.
    assert not any(name.endswith(endings) for name in state)


def _replace(state: State, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Change a tensor under both of its names."""
    changed = change(state[f"module.model.{name}"])
    state[f"module.model.{name}"] = changed
    state["module.model." + name.replace("convs", "base.1").replace("linear", "base.2")] = changed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_features": FEATURES + 1}, f"at least 25 features, the linear blocks in .* have {FEATURES}"),
        ({"out_features": 0}, "at least one output feature"),
        ({"image_size": 31}, "leave 6 features, .* take 24; choose --image-size from 32 to 47"),
        ({"image_size": 48}, "choose --image-size from 32 to 47"),
        ({"image_size": 0}, "image size of at least 16"),
        ({"anchor": -1.0}, "finite anchor"),
        ({"anchor": float("inf")}, "finite anchor"),
        ({"resize": "nearest"}, "expected resize to be one of"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    source = _write(tmp_path / "a.pth", _published(_weights()))
    assert _convert(source, out_features=FEATURES, image_size=47).metric.image_size == 47
    with pytest.raises(ValueError, match=message):
        _convert(source, **options)


def test_the_default_is_the_dimension_of_the_ensemble(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1792 features"):
        convert(_write(tmp_path / "a.pth", _published(_weights())))


class _Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.folder,)


def test_files_that_need_more_than_tensors_are_refused(tmp_path: Path) -> None:
    state, harm = _published(_weights()), tmp_path / "harm"
    for value, name in (
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (torch.nn.Linear(1, 1), "Linear"),
        (_Harm(harm), "mkdir"),
    ):
        with pytest.raises(ValueError, match=f"needs more than tensors.*{name}.*save the weights alone"):
            _convert(_write(tmp_path / "a.pth", state, config=value))
    assert not harm.exists()


def test_tensors_beside_the_state_are_refused(tmp_path: Path) -> None:
    state = _published(_weights())
    with pytest.raises(ValueError, match=r"tensors beside model_state_dict .*: bias$"):
        _convert(_write(tmp_path / "a.pth", state, bias=[{"offset": torch.ones(1)}]))
    assert _convert(_write(tmp_path / "b.pth", state, bias=None)).left_out == ("bias", "global_step")


@pytest.mark.parametrize("content", ["tensor", "list", "state"])
def test_other_containers_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.pth"
    torch.save({"tensor": torch.ones(2), "list": [1], "state": {"model_state_dict": [1]}}[content], path)
    with pytest.raises(ValueError, match=r"expected a (dict of weights|mapping of names)"):
        _convert(path)


@pytest.mark.parametrize("damage", [lambda b: b[:-300], lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"hello"])
def test_damaged_files_are_refused_in_one_line(
    tmp_path: Path, damage: Callable[[bytes], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    source = _write(tmp_path / "a.pth", _published(_weights()))
    source.write_bytes(damage(source.read_bytes()))
    _refused([str(source), str(tmp_path / "a.safetensors")], "cannot read", capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth"]


def test_wrong_arguments_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(_write(tmp_path / "a.pth", _published(_weights())))
    output = str(tmp_path / "a.safetensors")
    _refused([str(tmp_path / "none.pth"), output], "no checkpoint file", capsys)
    _refused([str(tmp_path), output], "no checkpoint file", capsys)
    _refused([source, output, "--resize=nearest"], "invalid choice", capsys)
    _refused([source, output, "--image-size=small"], "expected an integer of at least 1", capsys)
    _refused([source], "required", capsys)
    _refused([source, str(tmp_path / "a.pth")], "ending in .safetensors", capsys)
    _refused([source, output], "at least 1792 features", capsys)
    _refused([source, str(Path(source) / "b.safetensors"), f"--out-features={KEPT}"], "a.pth", capsys)
    monkeypatch.setattr(os, "replace", _full)
    _refused([source, output, f"--out-features={KEPT}"], "cannot write", capsys)


def main(args: list[str]) -> None:
    """The command; an exit status of 0 is none."""
    try:
        command.main(["convert", *args])
    except SystemExit as stop:
        if stop.code:
            raise


def _full(*paths: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _refused(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(args)
    printed = capsys.readouterr()
    assert stop.value.code == 1 and message in printed.err
    errors = [line for line in printed.err.splitlines() if not line.startswith("converting")]  # on a busy machine
    assert len(errors) == 1 and printed.out == ""


def test_the_script_exits_non_zero_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = _published(_weights()) | {"module.model.convs.0.extra": torch.ones(1)}
    source = _write(tmp_path / "a.pth", state)
    script = str(ROOT / "scripts" / "convert_checkpoint.py")
    monkeypatch.setattr(sys, "argv", [script, str(source), str(tmp_path / "a.safetensors")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script, run_name="__main__")
    printed = capsys.readouterr()
    assert stop.value.code == 1 and printed.out == ""
    assert printed.err.splitlines()[-1].startswith("error: ")
    assert "unknown keys: module.model.convs.0.extra" in printed.err
    assert not (tmp_path / "a.safetensors").exists()


def test_presets_are_recognised() -> None:
    with torch.device("meta"):
        for name in ("small", "large"):
            assert _preset(SLLNetwork.from_preset(name)) == name
        assert _preset(SLLNetwork(224, 1792, 45, 20, 7, 1024, conv_width=6)) is None
        assert _preset(SLLNetwork(224, 1792, 45, 19, 7, 1024)) is None
