"""Loaders of the user's own: samplers, subsets, several sets, names and parts, on one process or two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import evaluations
import lightning as L
import pytest
import torch
from evaluations import (
    CERTIFY,
    args,
    as_one_of_ours,
    command_line_of,
    config,
    cut_short,
    prepare,
    rows,
    run_command,
    write_config,
)
from torch.utils.data import ConcatDataset, DataLoader, Subset

from lipsim.cli.evaluate import evaluate, main
from lipsim.data import BuiltinTriplets, collate_triplets
from lipsim.datamodules import BuiltinData
from lipsim.results import read_results


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path, monkeypatch)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return evaluations.spy_on_embedding(monkeypatch)


class Cases(L.LightningDataModule):
    """Loaders of the user's own over built-in triplets."""

    def __init__(self, case: str, size: int = 7) -> None:
        super().__init__()
        self.case, self.size = case, size
        self.test_groups: dict[str, dict[str, torch.Tensor]] = {}

    @property
    def test_names(self) -> list[str]:
        names = {
            "names": ["a", "a"],
            "dict": [],
            "parts": ["a", "a_b"],
            "several": ["a", "b", "c"],
            "empty": ["a", "b"],
        }
        return names.get(self.case, ["a"])

    def test_dataloader(self) -> Any:
        first, other = (BuiltinTriplets("test", n, image_size=16, seed=s) for n, s in ((self.size, 0), (6, 5)))
        few = Subset(first, [4, 6, 1, 0, 2])
        if self.case in ("subset", "mask", "masks", "typo"):
            self.test_groups = {
                "subset": {},
                "mask": {"a": {"low": torch.tensor([False, False, True, True, True])}},
                "masks": {"a": {"low": torch.arange(self.size) < 3}},
                "typo": {"b": {"low": torch.ones(5, dtype=torch.bool)}},
            }[self.case]
            return self._loader(few)
        if self.case == "parts":
            self.test_groups = {"a": {"b": torch.ones(self.size, dtype=torch.bool)}}
        loaders = {
            "first": lambda: self._loader(first),
            "other": lambda: self._loader(other),
            "concat": lambda: self._loader(ConcatDataset([first, other])),
            "names": lambda: [self._loader(first), self._loader(other)],
            "parts": lambda: [self._loader(first), self._loader(other)],
            "dict": lambda: {"x": self._loader(first), "y": self._loader(other)},
            "drop": lambda: self._loader(first, drop_last=True),
            "sampler": lambda: self._loader(first, sampler=[5, 1, 2]),
            "batch_sampler": lambda: DataLoader(first, batch_sampler=[[5, 1, 2], [6, 0]], collate_fn=collate_triplets),
            "empty": lambda: [self._loader(Subset(first, [])), self._loader(other)],
            "several": lambda: [self._loader(first), self._loader(Subset(other, [3])), loaders["batch_sampler"]()],
        }
        return loaders[self.case]()

    def _loader(self, dataset: Any, **options: Any) -> DataLoader[Any]:
        return DataLoader(dataset, batch_size=2, collate_fn=collate_triplets, **options)


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> None:
    as_one_of_ours(Cases, monkeypatch)
    content = config(steps=1) | {"data": {"class_path": "lipsim.datamodules.Cases"}}
    content["trainer"]["callbacks"] = content["trainer"]["callbacks"][:1]
    write_config(content)


def evaluate_case(case: str, folder: str, *more: str) -> None:
    evaluate(_given(case, folder, *more))


def _given(case: str, folder: str, *more: str) -> list[str]:
    return args(folder, f"--data.case={case}", *more)


@pytest.mark.parametrize(
    ("case", "indices"),
    [
        ("subset", [4, 6, 1, 0, 2]),
        ("concat", [*range(7), *range(6)]),
        ("sampler", [1, 2, 5]),
        ("batch_sampler", [0, 1, 2, 5, 6]),
        ("drop", [*range(6)]),
    ],
)
def test_every_triplet_is_reported_once(
    case: str, indices: list[int], cases: None, monkeypatch: pytest.MonkeyPatch, computed: list[int]
) -> None:
    evaluate_case(case, "whole")
    assert sorted(computed) == sorted(indices)
    found = rows("whole/radii.csv")
    assert [row["index"] for row in found] == indices
    assert ("position" in found[0]) == (case in ("subset", "concat"))
    if "position" in found[0]:
        assert [row["position"] for row in found] == list(range(len(indices)))
    section = read_results(Path("whole/results.json"))
    assert section["certified"]["sets"]["a"]["num_triplets"] == len(indices)
    size = {"subset": 5, "concat": 13}.get(case, 7)
    assert section["evaluation"]["triplets"] == {"a": {"evaluated": len(indices), "in_set": size}}
    cut_short(monkeypatch, 1, _given(case, "cut"))
    computed.clear()
    evaluate_case(case, "cut")
    assert sorted(computed) == sorted(_without_first_batch(case, indices))
    for name in ("results.json", "radii.csv"):
        assert Path("cut", name).read_bytes() == Path("whole", name).read_bytes()


def _without_first_batch(case: str, indices: list[int]) -> list[int]:
    """Indices of what is left after one batch."""
    return {"sampler": [2], "batch_sampler": [6, 0]}.get(case, indices[2:])


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader` across ranks is zero")  # as meant
def test_an_empty_set_beside_a_full_one(cases: None) -> None:
    evaluate_case("empty", "run")
    section = read_results(Path("run/results.json"))
    assert list(section["certified"]["sets"]) == ["b"]
    assert section["certified"]["sets"]["b"]["num_triplets"] == 6 == len(rows("run/radii.csv"))
    assert section["evaluation"]["triplets"]["a"] == {"evaluated": 0, "in_set": 0}


def test_sets_that_are_concatenated_score_as_each_alone(cases: None) -> None:
    for case in ("concat", "first", "other"):
        evaluate_case(case, case)
    together, *apart = (rows(f"{case}/radii.csv") for case in ("concat", "first", "other"))
    assert len(together) == 13
    for row, alone in zip(together, [*apart[0], *apart[1]], strict=True):
        row.pop("position")
        assert row == pytest.approx(alone, rel=1e-4, abs=1e-5)


def test_names_of_sets(cases: None, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_case("dict", "dict")  # the keys
    assert list(read_results(Path("dict/results.json"))["certified"]["sets"]) == ["x", "y"]
    for case, name in (("names", "a"), ("parts", "a_b")):
        with pytest.raises(SystemExit):
            main(args("run", f"--data.case={case}"))
        assert f"several evaluation sets are called {name}, and results are kept by name" in capsys.readouterr().err


def test_masks_are_over_positions(cases: None, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_case("mask", "mask")
    found = rows("mask/radii.csv")
    assert [row["index"] for row in found if row["a_low"]] == [1, 0, 2]
    assert read_results(Path("mask/results.json"))["certified"]["sets"]["a_low"]["num_triplets"] == 3
    for case, message in (
        ("masks", "expected a bool mask of a_low over the 5 positions of the data set that a is served from, got (7,)"),
        ("typo", "test_groups names parts of b; the sets are a"),
    ):
        with pytest.raises(SystemExit):
            main(args("run", f"--data.case={case}"))
        assert message in capsys.readouterr().err


def test_what_was_begun_in_another_way_is_not_continued(
    cases: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_short(monkeypatch, 1, _given("first", "run"))
    for more, message in (
        ("--trainer.precision=bf16-mixed", "differs in precision;"),
        ("--trainer.precision=64-true", "leave it at 32-true"),
        ("--max_triplets=4", "differs in max_triplets, data;"),
        ("--trainer.limit_test_batches=2", "differs in limit_test_batches, data;"),
        ("--data.case=subset", "differs in data;"),
    ):
        with pytest.raises(SystemExit):
            main(args("run", "--data.case=first", more))
        error = capsys.readouterr().err
        assert message in error and error.count("error:") == 1
    evaluate_case("first", "run")
    assert len(rows("run/radii.csv")) == 7


def test_a_size_for_a_quick_run(cases: None) -> None:
    evaluate_case("first", "run", "--data.size=20", "--max_triplets=9", "--trainer.limit_test_batches=4")
    indices = [row["index"] for row in rows("run/radii.csv")]
    assert len(indices) == 8 and indices == sorted(indices) and indices != list(range(8))
    results = read_results(Path("run/results.json"))
    assert results["evaluation"]["triplets"] == {"a": {"evaluated": 8, "in_set": 20}}
    assert results["evaluation"]["sample_seed"] == 0
    with pytest.raises(ValueError, match="nothing to evaluate: limit_test_batches is 0"):
        evaluate_case("first", "run", "--trainer.limit_test_batches=0")


class Before(BuiltinData):
    """Mirrors its images before they go to the device."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return super().on_before_batch_transfer(batch.map_images(lambda x: x.flip(-1)), dataloader_idx)


class Meanwhile(BuiltinData):
    """Mirrors its images on the way."""

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return batch.map_images(lambda x: x.flip(-1))


class After(BuiltinData):
    """Mirrors its images when they are there."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return super().on_after_batch_transfer(batch, dataloader_idx).map_images(lambda x: x.flip(-1))


def test_every_hook_of_a_data_module_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for cls in (BuiltinData, Before, Meanwhile, After):
        if cls is not BuiltinData:
            as_one_of_ours(cls, monkeypatch)
        write_config(
            {**config(steps=1), "data": {**config(steps=1)["data"], "class_path": f"lipsim.datamodules.{cls.__name__}"}}
        )
        if cls is After:
            assert len(cut_short(monkeypatch, 3, args("After", CERTIFY))) == 3  # finished batches meet no hook
        evaluate(args(cls.__name__, CERTIFY))
        found.append(read_results(Path(cls.__name__) / "results.json")["certified"]["sets"]["builtin"]["radius"])
    assert found[1] == found[2] == found[3] != found[0]


def test_old_pictures_go(cases: None) -> None:
    content = config(steps=1) | {"data": {"class_path": "lipsim.datamodules.Cases"}}
    content["trainer"]["callbacks"][1]["init_args"]["queries"] = 1
    write_config(content)
    evaluate_case("dict", "run")
    written = {f"{kind}-{name}.png" for kind in ("attacked", "gallery", "null-space") for name in "xy"}
    assert {path.name for path in Path("run/plots").iterdir()} == written
    content["trainer"]["callbacks"][1]["init_args"]["num_examples"] = 1
    content["data"] = {"class_path": "lipsim.datamodules.Cases", "init_args": {"case": "first"}}
    write_config(content)
    Path("run/adversarial").joinpath("notes.txt").write_text("of the user")
    Path("run/results.json").unlink()  # as after an evaluation that was never finished
    evaluate(args("run", CERTIFY))
    assert not Path("run/plots").exists()
    assert [path.name for path in Path("run/adversarial").iterdir()] == ["notes.txt"]
    assert [path.name for path in Path("run").glob("*.csv")] == ["radii.csv"]
    del content["trainer"]["callbacks"][2:]
    for count, left in ((2, {"000000", "000001"}), (1, {"000000"}), (0, set())):
        content["trainer"]["callbacks"][1]["init_args"]["num_examples"] = count
        write_config(content)
        evaluate(args("run"))
        assert {path.name[:6] for path in Path("run/adversarial/a").glob("*.png")} == left
        assert Path("run/plots/attacked-a.png").exists() == (count > 0)
    twice = {"class_path": "lipsim.callbacks.CertifyRadii"}
    content["trainer"]["callbacks"].append(twice)
    write_config(content)
    with pytest.raises(ValueError, match="several CertifyRadii write to run, and each would replace"):
        evaluate(args("run"))
    twice["init_args"] = {"directory": "second"}  # type: ignore[assignment]
    write_config(content)
    evaluate(args("run"))
    assert len(rows("run/second/radii.csv")) == 7


@pytest.mark.slow  # starts processes: a minute of two cores
def test_own_loaders_on_two_processes(cases: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Own samplers, a limit, and a set of one triplet, of which the second process has none."""
    command_line_of(Cases, tmp_path, monkeypatch)
    given = ["--data.case=several", "--trainer.limit_test_batches=3"]
    evaluate(args("one", *given))
    two = args("two", *given, "--trainer.devices=2", "--trainer.strategy=ddp")
    run_command(two)
    one, both = (read_results(Path(folder, "results.json")) for folder in ("one", "two"))
    assert one["evaluation"] == both["evaluation"]
    assert {name: count["evaluated"] for name, count in one["evaluation"]["triplets"].items()} == {
        "a": 6,
        "b": 1,
        "c": 5,
    }
    for name in "abc":
        for x, y in zip(rows(f"one/radii-{name}.csv"), rows(f"two/radii-{name}.csv"), strict=True):
            assert x == pytest.approx(y, rel=1e-5, abs=1e-6)
