"""``lipsim.evaluate``: as the command line, with objects in place of options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from evaluations import COUNT, args, config, cut_short, prepare, spy_on_embedding, write_config

import lipsim
from lipsim.callbacks import AttackRobustness, CertifyRadii, NullSpaceRobustness, TripletCallback, TripletGallery
from lipsim.cli.evaluate import main
from lipsim.datamodules import BuiltinData, NightsData
from lipsim.evaluation.identity import callback_settings
from lipsim.evaluation.resume import is_of
from lipsim.metric import load
from lipsim.results import read_results
from lipsim.utils.files import file_sha256

QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path, monkeypatch)


def _data(**options: int) -> BuiltinData:
    return BuiltinData(**{"num_test": COUNT, "image_size": 16, "batch_size": 2, **options})


def _callbacks() -> list[TripletCallback]:
    """Those of the config."""
    attack = AttackRobustness(steps=5, queries=40)
    return [CertifyRadii(error_sample=4), attack, NullSpaceRobustness(), TripletGallery(num_triplets=1, steps=5)]


def test_python_continues_what_the_command_line_began(monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(config(steps=5))
    given = {"directory": "run", "callbacks": _callbacks(), **QUIET, "devices": 1, "enable_model_summary": False}
    whole = lipsim.evaluate("metric.safetensors", _data(), **{**given, "directory": "whole"})
    assert len(cut_short(monkeypatch, 5, args("run"))) == 5
    seen = spy_on_embedding(monkeypatch)
    assert lipsim.evaluate("metric.safetensors", _data(), **given) == whole == read_results(Path("run/results.json"))
    assert seen == list(range(10, COUNT))
    for name in ("radii.csv", "attacks.csv", "plots/gallery.png"):
        assert Path("run", name).read_bytes() == Path("whole", name).read_bytes()
    assert whole["evaluation"]["checkpoint_sha256"] == file_sha256(Path("metric.safetensors"))
    assert yaml.safe_load(Path("whole/arguments.yaml").read_text())["callbacks"][1]["init_args"]["steps"] == 5
    assert Path("whole/environment.json").is_file() and not Path("whole/checkpoints").exists()


def test_a_metric_in_memory(capsys: pytest.CaptureFixture[str]) -> None:
    metric = load("metric.safetensors")
    before = metric.declared_feature_error, metric.feature_error_kind
    found = lipsim.evaluate(metric, _data(), eps=[0.1, 0.5], directory="memory", **QUIET)
    assert (metric.declared_feature_error, metric.feature_error_kind) == before and not metric.training
    assert found["certified"]["eps"] == [0.1, 0.5] and set(found) == {"schema", "versions", "certified", "evaluation"}
    assert "Majority score in %" in capsys.readouterr().out
    file = lipsim.evaluate("metric.safetensors", _data(), eps=[0.1, 0.5], directory="file", **QUIET)
    assert found["certified"] == file["certified"]
    own, other = found["evaluation"], file["evaluation"]
    assert own["metric_sha256"] == other["metric_sha256"] and own["checkpoint"] is None
    # An encoder that no file can hold is evaluated, too, and known again by its weights.
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 4))
    plain = lipsim.PerceptualMetric(encoder, 16, lipschitz=50.0)
    hashes = set()
    for weight in (0.01, 0.02):
        torch.nn.init.constant_(encoder[1].weight, weight)
        found = lipsim.evaluate(plain, _data(num_test=4), directory="plain", **QUIET)
        hashes.add(found["evaluation"]["metric_sha256"])
        assert encoder[1].weight.requires_grad  # a copy is evaluated
    assert len(hashes) == 2


def _fail(*arguments: object, **options: object) -> None:
    raise ValueError("in the first batch")


def test_nothing_of_another_evaluation_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    metric, results = load("metric.safetensors"), Path("run/results.json")
    attack, gallery = AttackRobustness(steps=1, queries=1), TripletGallery(num_triplets=1, steps=1)

    def evaluate(seed: int = 0, callbacks: list[TripletCallback] | None = None) -> dict[str, Any]:
        return lipsim.evaluate(
            metric, _data(num_test=4, seed=seed), eps=[0.1], callbacks=callbacks or [], directory="run", **QUIET
        )

    evaluate(callbacks=[attack, gallery])
    files = {path: path.read_bytes() for path in Path("run").rglob("*") if path.suffix in (".csv", ".png")}
    assert len(files) > 3
    assert "attacked" in evaluate() and all(path.is_file() for path in files)  # the same metric and data
    # What fails costs nothing that is there.
    before = results.read_bytes()
    with pytest.raises(ValueError, match="got data of 24 × 24"):
        lipsim.evaluate(metric, _data(image_size=24, num_test=4), eps=[0.1], directory="run", **QUIET)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="in the first batch"):
        patch.setattr(lipsim.PerceptualMetric, "embed", _fail)
        evaluate(seed=5)
    assert results.read_bytes() == before and {path: path.read_bytes() for path in files} == files
    assert "attacked" not in evaluate(seed=5)  # other data
    assert sorted(path.name for path in Path("run").glob("*.csv")) == ["radii.csv"]
    assert not list(Path("run/plots").glob("*.png")) and not list(Path("run/adversarial").rglob("*"))
    # The same weights with another anchor are another metric.
    evaluate(seed=5, callbacks=[attack])
    metric.anchor = 2.0
    assert "attacked" not in evaluate(seed=5) and not Path("run/attacks.csv").exists()


def test_results_are_of_the_sets_that_are_evaluated(nights: Path) -> None:
    """Of the same sets and parts, other callbacks' results stay; of fewer sets they go, and their files with them."""
    data, metric = NightsData(nights, image_size=16, batch_size=4, num_workers=0), load("metric.safetensors")
    given: dict[str, Any] = {"eps": [0.1], "directory": "run", **QUIET}
    lipsim.evaluate(metric, data, callbacks=[AttackRobustness(steps=1, queries=1)], **given)
    again = lipsim.evaluate(metric, data, **given)
    assert "attacked" in again and Path("run/attacks.csv").is_file()
    hashes = again["certified"]["data_sha256"]
    own = again["evaluation"]["metric_sha256"], again["evaluation"]["weights_sha256"]
    assert len(hashes) > 1 and is_of(again, *own, hashes)
    assert not is_of(again, *own, dict(list(hashes.items())[:1]))
    assert not is_of(again, *own, {**hashes, "more": "x"})


def test_the_record_of_a_training_stays(capsys: pytest.CaptureFixture[str]) -> None:
    """An evaluation in its folder has a record of its own beside it."""
    Path("run/checkpoints").mkdir(parents=True)
    records = [Path("run", name) for name in ("config.yaml", "arguments.yaml", "environment.json")]
    for path in records:
        path.write_text("of the training")
    data, given = _data(num_test=4), {"eps": [0.1], "directory": "run", **QUIET}
    lipsim.evaluate("metric.safetensors", data, **given)
    quick = ["--trainer.callbacks=lipsim.callbacks.CertifyRadii", "--data.num_test=4"]
    main(args("run", *quick))
    assert "results.json, tables and plots are in run" in capsys.readouterr().out
    assert [path.read_text() for path in records] == ["of the training"] * 3
    for name in ("config-evaluate.yaml", "arguments-evaluate.yaml", "environment-evaluate.json"):
        assert Path("run", name).is_file()
    # A trial writes nothing, and does not say that it has.
    main(args("trial", *quick, "--trainer.fast_dev_run=true"))
    assert "results.json" not in capsys.readouterr().out and not Path("trial/results.json").exists()


def test_the_null_space_is_searched_on_a_draw_of_triplets() -> None:
    """In batches of any size, the same triplets; all of them where there are no more."""
    found = []
    for number, (most, batch_size) in enumerate([(3, 2), (3, 5), (COUNT, 5)]):
        callbacks = [NullSpaceRobustness(max_triplets=most)]
        results = lipsim.evaluate(
            "metric.safetensors", _data(batch_size=batch_size), callbacks=callbacks, directory=str(number), **QUIET
        )
        assert results["null_space"]["max_triplets"] == most
        found.append(next(iter(results["null_space"]["sets"].values())))
        assert found[-1]["num_triplets"] == most and list(Path(str(number), "plots").glob("null-space-*.png"))
    lengths = [section["metrics"]["metric"]["same"]["random"]["mean_length"] for section in found]
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-6) and lengths[0] != pytest.approx(lengths[2], rel=1e-3)


@pytest.mark.slow  # AlexNet in float64
def test_moves_are_measured_by_lpips_where_there_are_weights(tmp_path: Path) -> None:
    from torchvision.models import alexnet

    file = tmp_path / "alexnet-owt-7be5be79.pth"
    torch.save(alexnet(weights=None).state_dict(), file)
    data = BuiltinData(num_test=3, image_size=64, batch_size=2)
    callbacks = [NullSpaceRobustness(lpips=file)]
    results = lipsim.evaluate("quickstart", data, callbacks=callbacks, directory="run", **QUIET)
    found = results["null_space"]["sets"]["builtin"]["metrics"]["metric"]
    for kind in ("same", "answer"):
        for direction in ("random", "semantic"):
            moves = found[kind][direction]
            assert moves["mean_length"] > 0 and 0 < moves["lpips"] < 1, (kind, direction)


class _Forgetful(TripletCallback):
    def __init__(self, strength: int) -> None:
        super().__init__()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"eps": [0.1], "callbacks": [CertifyRadii()]}, "either as eps or in a CertifyRadii"),
        ({"eps": [0.5, 0.1]}, "eps in ascending order"),
        ({"eps": 0.5}, "budgets eps as a list of numbers, such as [36 / 255, 1.0], got 0.5"),
        ({"eps": "36/255"}, "such as [36 / 255, 1.0], got '36/255'"),
        ({"max_triplets": 0}, "max_triplets"),
        ({"max_epochs": 3}, "there is no option max_epochs; those of the trainer are accelerator, "),
        ({"precison": 3}, "there is no option precison; did you mean precision?"),
        ({"callbacks": [_Forgetful(3)]}, "_Forgetful does not keep its argument strength"),
        ({"devices": 2, "strategy": "ddp_spawn"}, "processes that are forked or spawned"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(lipsim.LipsimError) as error:
        lipsim.evaluate("metric.safetensors", _data(), **{**QUIET, **given})
    assert message in str(error.value)
    assert not Path("runs").exists()


def test_the_settings_of_the_config_are_those_of_the_objects() -> None:
    assert [c["class_path"].rpartition(".")[2] for c in config()["trainer"]["callbacks"]] == [
        callback_settings(c)["class_path"].rpartition(".")[2] for c in _callbacks()
    ]
    settings = callback_settings(
        AttackRobustness(steps=80, others={"x": Path("metric.safetensors")}, directory=Path("a"))
    )
    assert settings["init_args"]["queries"] == 400 and "directory" not in settings["init_args"]
    assert len(settings["init_args"]["others"]["x"]) == 64


def test_a_subclass_that_hands_its_arguments_on() -> None:
    class Mine(CertifyRadii):
        def __init__(self, colour: str, **options: Any) -> None:
            super().__init__(**options)
            self.colour = colour

    options = callback_settings(Mine("red", eps=[0.2], directory=Path("a")))["init_args"]
    assert options["colour"] == "red" and options["eps"] == [0.2] and "directory" not in options


def test_what_a_metric_declares_is_covered() -> None:
    """A bound and an error of somebody's own are not replaced by smaller ones that are found."""
    encoder = load("metric.safetensors").encoder
    plain, declared = lipsim.PerceptualMetric(encoder, 16), lipsim.PerceptualMetric(encoder, 16, 1.0, 50.0, 0.05)
    found = {
        name: lipsim.evaluate(metric, _data(), eps=[0.1], directory=name, **QUIET)["certified"]
        for name, metric in {"plain": plain, "declared": declared}.items()
    }
    assert found["plain"]["feature_error_kind"] == "searched" and 0 < found["plain"]["feature_error"] < 1e-3
    assert found["plain"]["lipschitz"] == plain.lipschitz and len(found["plain"]["layers"]) > 1
    assert (found["declared"]["lipschitz"], found["declared"]["layers"]) == (50.0, {"declared": 50.0})
    assert (found["declared"]["feature_error"], found["declared"]["feature_error_kind"]) == (0.05, "declared")
    x, y, z = (torch.rand(4, 3, 16, 16) for _ in range(3))
    assert (declared.certify(x, y, z).radius <= plain.certify(x, y, z).radius / 50).all()


def test_an_encoder_that_only_declares_a_bound_is_evaluated() -> None:
    class Unknown(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(x.flatten(1)[:, :8])

    metric = lipsim.PerceptualMetric(Unknown(), 16, lipschitz=1.0)
    found = lipsim.evaluate(metric, _data(), eps=[0.1], directory="unknown", **QUIET)
    assert found["certified"]["lipschitz"] == 1.0


def test_one_data_module_serves_metrics_of_both_kinds(nights: Path) -> None:
    """Images are resized as each metric expects, one after the other, and a training finds them as they were."""
    data = NightsData(nights, image_size=16, batch_size=4, num_workers=0)
    encoder = load("metric.safetensors").encoder
    for number, resize in enumerate(("float", "pil", "float")):
        metric = lipsim.PerceptualMetric(encoder, 16, resize=resize)
        found = lipsim.evaluate(metric, data, eps=[0.1], directory=f"run{number}", **QUIET)
        assert found["certified"]["resize"] == resize
        assert data.preprocess is not None and data.preprocess.resize == "float"
    radii = [Path(f"run{number}/radii.csv").read_bytes() for number in range(3)]
    assert radii[0] == radii[2] != radii[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metric": torch.nn.Flatten()}, "expected a metric, a file or the name of a bundled one, got Flatten"),
        ({"data": "builtin"}, "expected a data module, .* got str"),
        ({"callbacks": [1]}, "expected callbacks of lipsim.callbacks on triplets, got int"),
    ],
)
def test_other_kinds_of_arguments_are_named(given: dict[str, Any], message: str) -> None:
    options = {"metric": "metric.safetensors", "data": _data(), **given}
    with pytest.raises(lipsim.LipsimError, match=message):
        lipsim.evaluate(options.pop("metric"), options.pop("data"), directory="run", **options, **QUIET)
