"""One file reads weights, whoever wrote them."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lipsim.utils.weights import check_fit, plain_names, read_checkpoint, read_safetensors

PACKAGE = Path(__file__).parents[2] / "lipsim"
READERS = {"load_file", "safe_open", "torch.load"}


def test_no_other_file_reads_weights() -> None:
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in READERS
    }
    assert users == {"utils/weights.py"}


def test_tensors_and_texts_of_a_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.arange(3)}, path, metadata={"format": "x"})
    state, texts = read_safetensors(path)
    assert texts == {"format": "x"} and state.keys() == read_checkpoint(path).keys() == {"w"}
    assert torch.equal(state["w"], torch.arange(3))
    with pytest.raises(FileNotFoundError, match="no weight file"):
        read_safetensors(tmp_path / "b.safetensors")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="it is truncated or no safetensors file"):
        read_safetensors(path)


def test_namespaces_are_taken_where_they_are_expected(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"w": torch.ones(1), "args": argparse.Namespace(lr=1)}, path)
    assert read_checkpoint(path)["args"].lr == 1
    with pytest.raises(ValueError, match=r"more than tensors .*argparse\.Namespace.*save the weights alone"):
        read_checkpoint(path, namespaces=False)


def test_a_state_of_other_names_or_shapes_does_not_fit() -> None:
    layer = nn.Linear(2, 3, device="meta")
    check_fit(layer, {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}, "a file")
    with pytest.raises(ValueError, match=r"in a file do not fit Linear: 1 missing .*bias.* \(first: weight \(2, 3\)"):
        check_fit(layer, {"weight": torch.zeros(2, 3)}, "a file")


def test_wrappers_leave_the_names_of_a_network_whose_child_is_called_as_theirs(tmp_path: Path) -> None:
    state = {"model.0.weight": torch.ones(1), "model.0.bias": torch.ones(1)}
    assert plain_names(state, tmp_path).keys() == {"0.weight", "0.bias"}
    assert plain_names(state, tmp_path, state.keys()).keys() == state.keys()
    wrapped = {f"module._orig_mod.{name}": value for name, value in state.items()}
    assert plain_names(wrapped, tmp_path, state.keys()).keys() == state.keys()
    # A name that is a number, which torch.save keeps as one.
    assert plain_names({0: torch.ones(1)}, tmp_path).keys() == {"0"}  # type: ignore[dict-item]
