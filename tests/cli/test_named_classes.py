"""What a config may name: classes of a few packages and of the user's; everything else is refused, not imported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lipsim.cli import stage
from lipsim.cli.evaluate import main as evaluate_main
from lipsim.cli.named_classes import MOST_NODES, check_named, only_named, take_allowed, why_refused
from lipsim.cli.stage import StageParser
from lipsim.cli.train import main
from lipsim.utils.errors import LipsimError

ROOT = Path(__file__).parents[2]
LINEAR = str(ROOT / "configs" / "quickstart" / "linear.yaml")
HARM = "open('harm', 'w').close()\nimport torch\nclass Module(torch.nn.Identity):\n    pass\n"


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module ``harmful`` can be imported, and leaves a file when it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "harmful", raising=False)
    Path("harmful.py").write_text(HARM)


def _parse(*options: str, allow: tuple[str, ...] = ()) -> Any:
    """Options of every type by which a class can be named, as a stage parses and checks them."""
    parser = StageParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--optimizer", type=Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer])
    parser.add_argument("--call", type=Callable | None)
    parser.add_argument("--callbacks", type=list[Callback] | Callback | None)
    parser.add_argument("--module", type=torch.nn.Module | None)
    parser.add_argument("--kind", type=type[torch.nn.Module])
    parser.add_argument("--anything", type=Any)
    parser.add_argument("--table", type=dict[str, Any])
    with only_named(allow):
        parsed = parser.parse_args(list(options))
        check_named(parsed, allow)
        return parser.instantiate_classes(parsed)


@pytest.mark.parametrize(
    "options",
    [
        ["--optimizer=os.system"],
        ["--optimizer=torch.os.system"],  # through a module that imports it
        ["--optimizer=torch.serialization.os.system"],
        ["--optimizer=torch.hub.load"],
        ["--optimizer=lightning.pytorch.cli.LightningCLI"],
        ["--call=builtins.eval"],
        ["--call=torch.hub.load"],
        ["--call=torch.manual_seed"],  # allowed by its module, and a function
        ["--call=torch.nn.Module.load_state_dict"],
        ["--call=lipsim.training.FineTuning.load_from_checkpoint"],  # Lightning's, which may unpickle
        ["--call=lipsim.load"],
        ["--call=torch.package.PackageImporter"],
        ["--call=torch.utils.benchmark.Timer"],
        ["--call=torch.nn.modules._functions.SyncBatchNorm"],
        ["--call=harmful.Module"],
        ["--callbacks=subprocess.Popen"],
        ["--callbacks=[{class_path: subprocess.Popen, init_args: {args: [touch, harm]}}]"],
        [
            "--callbacks=[{class_path: lightning.pytorch.callbacks.LambdaCallback, "
            "init_args: {on_fit_start: harmful.Module}}]"
        ],
        ["--callbacks+={class_path: harmful.Module, dict_kwargs: {a: 1}}"],
        ["--module={class_path: harmful.Module}"],
        ["--module={class_path: torch.nn.Sequential, dict_kwargs: {x: {class_path: harmful.Module}}}"],
        ["--module=lightning.pytorch.demos.Transformer"],  # beside a data set that downloads
        ["--kind=harmful.Module"],
        ["--kind=torch.fx.GraphModule"],
        ["--anything={class_path: harmful.Module}"],
        ["--anything={a: [{class_path: harmful.Module}]}"],
        ["--table={a: {class_path: harmful.Module}}"],
        ["--table={a: {class_path: torch.os.system, init_args: {command: touch harm}}}"],
    ],
    ids=lambda options: options[0],
)
def test_what_is_refused_is_neither_imported_nor_called(options: list[str]) -> None:
    with pytest.raises((SystemExit, LipsimError)):
        _parse(*options)
    assert not Path("harm").exists() and "harmful" not in sys.modules


def test_a_relative_name_leads_to_a_subclass_that_is_imported_already() -> None:
    assert isinstance(_parse("--module=AlphaDropout").module, torch.nn.AlphaDropout)
    assert _parse("--optimizer=SGD", "--optimizer.lr=0.1").optimizer([torch.nn.Parameter(torch.ones(1))])


def test_what_the_user_allows_is_allowed_for_that_call() -> None:
    assert type(_parse("--module=harmful.Module", allow=("harmful",)).module).__name__ == "Module"
    assert _parse("--call=torch.manual_seed", allow=("torch",)).call is torch.manual_seed
    Path("harm").unlink()
    with pytest.raises(SystemExit):
        _parse("--module=harmful.Module")
    with pytest.raises(LipsimError, match=r"torch.random.manual_seed \(option call\) is not run: it is no class"):
        _parse("--call=torch.manual_seed")


def test_the_longest_entry_decides() -> None:
    assert why_refused("torch.optim.Adam") is None
    assert why_refused("torchvision.models.resnet50") is not None and why_refused("torchmetricsx.A") is not None
    assert why_refused("torch.utils.data.Sampler") is None
    assert "runs code" in str(why_refused("torch.utils.cpp_extension.load"))
    assert why_refused("torch.hub.load", ("torch.hub",)) is None
    assert (
        "private" in str(why_refused("torch._dynamo.A")) and why_refused("torch._dynamo.A", ("torch._dynamo",)) is None
    )


def test_allow_stands_anywhere() -> None:
    assert take_allowed(["--allow", "a", "fit", "--x=1", "--allow=b.c"]) == (["fit", "--x=1"], ("a", "b.c"))
    for wrong in (["--allow"], ["--allow", "a/b"], ["--allow="], ["--allow", "*"]):
        with pytest.raises(LipsimError, match="expected --allow MODULE"):
            take_allowed(wrong)
    with pytest.raises(LipsimError, match="jsonargparse would let"):
        take_allowed(["--allow=jsonargparse"])


def _error(capsys: pytest.CaptureFixture[str], call: Callable[[], object]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert not Path("harm").exists() and not Path("runs").exists()
    return line


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("model: {class_path: harmful.Module}", "harmful.Module (option model of bad.yaml) is not run: it is of none"),
        ("model: harmful.Module\nallow: harmful", "harmful.Module (option model of bad.yaml) is not run"),
        ("trainer: {callbacks: nested.yaml}", "harmful.Module (option trainer.callbacks of bad.yaml) is not run"),
        ("config: other.yaml", "harmful.Module (option data of other.yaml) is not run"),
        ("model: !!python/object/apply:os.mkdir [harm]", "could not determine a constructor for the tag"),
        ("model: !include other.yaml", "could not determine a constructor for the tag"),
        ("a: &a [*a]", "cannot read the config bad.yaml: expected YAML nested in at most"),
    ],
)
def test_a_config_of_somebody_else(config: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("nested.yaml").write_text("- class_path: harmful.Module")
    Path("other.yaml").write_text("data: harmful.Module")
    Path("bad.yaml").write_text(config)
    assert said in _error(capsys, lambda: main(["--config", "bad.yaml"]))


def test_an_evaluation_of_somebody_else(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text("checkpoint: photos\ndata: {class_path: harmful.Module}")
    assert "harmful.Module (option data of bad.yaml)" in _error(capsys, lambda: evaluate_main(["--config=bad.yaml"]))


def test_references_that_explode() -> None:
    levels = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    merged = ["a0: &a0 {b: 1, c: 2}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 9))]
    for lines in (levels, merged):
        Path("bomb.yaml").write_text("\n".join(lines))
        with pytest.raises(LipsimError, match=f"cannot read the config bomb.yaml: .* at most {MOST_NODES:,} values"):
            _parse("--config=bomb.yaml")


def test_a_module_of_ones_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It is allowed on the command line; the environment gives no options."""
    for prefix in ("TRAIN", "PL", "LIGHTNING_CLI"):
        monkeypatch.setenv(f"{prefix}_FIT__MODEL__STUDENT", "nothing.Here")
    monkeypatch.setattr(stage, "fit", lambda *_: None)
    Path("mine.py").write_text("import lightning\nclass Quiet(lightning.Callback):\n    pass\n")
    own = ["--config", LINEAR, "--trainer.callbacks+=mine.Quiet", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    assert "mine.Quiet (option trainer.callbacks) is not run" in _error(capsys, lambda: main(own))
    for args in (["--allow", "mine", *own], ["fit", *own, "--allow=mine"], ["--allow=mine", "fit", *own]):
        assert any(type(callback).__name__ == "Quiet" for callback in stage.train(args).trainer.callbacks)
