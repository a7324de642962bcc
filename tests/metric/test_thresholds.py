"""Thresholds: chosen, and kept in the files of metrics."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from lipsim import PerceptualMetric
from lipsim.metric import Threshold, TiledMetric, load, save
from lipsim.metric.files import read_facts, write_threshold
from lipsim.metric.thresholds import choose_threshold
from lipsim.students import OrthogonalProjection

CHOSEN = Threshold(0.125, 0.01, 7, 300, "abc")


@pytest.mark.parametrize("far", [0.0, 0.01, 0.1, 0.29, 0.5, 0.999])
def test_it_is_the_largest_of_those_that_keep_the_rate(far: float) -> None:
    different = torch.rand(100, dtype=torch.float64)
    value = choose_threshold(different, far)
    rate = lambda t: float((different <= t).double().mean())  # noqa: E731
    assert rate(value) <= far
    assert rate(value * (1 + 2e-5)) > far  # no larger one, up to what distances are accurate to


def test_equal_distances_are_accepted_together_or_not_at_all() -> None:
    different = torch.tensor([0.1, 0.2, 0.2, 0.2, 0.3])
    for far, accepted in ((0.2, 1), (0.4, 1), (0.6, 1), (0.8, 4), (1.0, 5)):
        assert int((different <= choose_threshold(different, far)).sum()) == accepted
    assert choose_threshold(different, 1.0) == 2.0


def test_pairs_that_no_threshold_tells_apart() -> None:
    with pytest.raises(ValueError, match="2 of 3 different pairs have the distance 0"):
        choose_threshold(torch.tensor([0.0, 0.5, 0.0]), 0.3)
    for distances in (torch.tensor([]), torch.tensor([0.1, torch.nan])):
        with pytest.raises(ValueError, match="expected distances"):
            choose_threshold(distances, 0.1)
    with pytest.raises(ValueError, match="false-accept rate"):
        choose_threshold(torch.tensor([0.1]), 1.5)


def header_and_tensors(file: Path) -> tuple[dict[str, object], dict[str, object], bytes]:
    """The header of the metric, what is said of each tensor, and the bytes of all, as they are in the file."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    outer = json.loads(content[8 : 8 + length])
    metadata = outer.pop("__metadata__")
    return json.loads(metadata.pop("metric")), {**outer, **metadata}, content[8 + length :]


def test_a_file_keeps_all_else_bit_by_bit(tmp_path: Path) -> None:
    metric = PerceptualMetric(OrthogonalProjection(8, 4), 8)
    file = save(metric, tmp_path / "m.safetensors", {"by": "us"})
    before = header_and_tensors(file)
    assert load(file).threshold is None
    write_threshold(file, tmp_path / "c.safetensors", CHOSEN, load(file))
    header, *others = header_and_tensors(tmp_path / "c.safetensors")
    assert header.pop("threshold") == {
        "value": 0.125, "far": 0.01, "pairs": {"same": 7, "different": 300}, "data_sha256": "abc",
    }  # fmt: skip
    assert (header, *others) == before
    again = load(tmp_path / "c.safetensors")
    assert again.threshold == CHOSEN
    # In its own place, and through another save, it stays.
    write_threshold(file, file, CHOSEN, load(file))
    assert load(save(again, tmp_path / "again.safetensors")).threshold == load(file).threshold == CHOSEN
    assert read_facts(file).header["threshold"]["value"] == 0.125 and read_facts(file).values == 4 * (3 * 8 * 8 + 1)


@pytest.mark.parametrize("framing", [{"framing": "pad"}, {"framing": "tiles", "grid": 3}, {"framing": "stretch"}])
def test_a_threshold_is_of_a_framing(framing: dict[str, Any], tmp_path: Path) -> None:
    """The file takes it over from the metric, and has the notes and the weights that it had."""
    tiles = TiledMetric(PerceptualMetric(OrthogonalProjection(8, 4), 8))
    file = save(tiles, tmp_path / "m.safetensors", {"by": "us"})
    before = header_and_tensors(file)
    write_threshold(file, tmp_path / "c.safetensors", CHOSEN, load(file, **framing))
    header, *others = header_and_tensors(tmp_path / "c.safetensors")
    assert header.pop("threshold") == CHOSEN.header() and others == [*before[1:]]
    assert header == {**{name: value for name, value in before[0].items() if name != "grid"}, **framing}
    again = load(tmp_path / "c.safetensors")
    assert again.threshold == CHOSEN and again.preprocess.framing == framing["framing"]
    assert isinstance(again, TiledMetric) == ("grid" in framing)


def test_notes_stay_with_a_metric(tmp_path: Path) -> None:
    metric = PerceptualMetric(OrthogonalProjection(8, 4), 8)
    file = save(metric, tmp_path / "m.safetensors", {"by": "us"})
    for framing in ("pad", "tiles"):
        again = save(load(file, framing=framing), tmp_path / "again.safetensors")
        assert load(again).notes == {"by": "us"} and load(again).preprocess.framing == framing
    assert load(save(load(file), tmp_path / "other.safetensors", {"epochs": 3})).notes == {"epochs": 3}
    assert load(save(metric, file)).notes == {}


@pytest.mark.parametrize(
    "claim", ["0.1", {"value": 0.1}, {**CHOSEN.header(), "value": 3.0}, {**CHOSEN.header(), "far": None}]
)
def test_a_file_with_another_thing_for_a_threshold(
    claim: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = PerceptualMetric(OrthogonalProjection(8, 4), 8)
    metric.threshold = CHOSEN
    monkeypatch.setattr(Threshold, "header", lambda self: claim)
    file = save(metric, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"cannot rebuild the metric in .*: expected"):
        load(file)
