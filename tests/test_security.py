"""Files of strangers run nothing: what the sources call, and what files that try to run code are told."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lipsim import PerceptualMetric, load
from lipsim.data.embeddings.cache import EmbeddingCache
from lipsim.data.embeddings.cache import index_file as cache_index
from lipsim.data.embeddings.cache import shard_file as cache_shard
from lipsim.data.pack import index_file, read_index
from lipsim.data.sets.bapps import read_judge
from lipsim.datamodules import BuiltinData
from lipsim.metric import save
from lipsim.metric.index_files import read_records
from lipsim.students import OrthogonalProjection
from lipsim.training import FineTuning
from lipsim.training.checkpoints import read_stage
from lipsim.training.run import fit
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import read_array
from lipsim.utils.weights import read_checkpoint

ROOT = Path(__file__).parents[1]
SOURCES = [
    ROOT / "hubconf.py",
    *(p for room in ("lipsim", "scripts", "benchmarks") for p in (ROOT / room).rglob("*.py")),
]

# What unpickles, or runs what it is given, and what makes it harmless.
_HARMLESS: dict[str, dict[str, Any]] = {
    "torch.load": {"weights_only": True},
    "np.load": {"allow_pickle": False},
    "numpy.load": {"allow_pickle": False},
}
_FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "torch.hub.load", "torch.jit.load", "torch.export.load", "torch.ops.load_library", "torch.package.PackageImporter",
    "faiss.read_index", "shutil.unpack_archive", "pandas.read_pickle", "onnxruntime.InferenceSession",
}  # fmt: skip
_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "runpy", "code", "pty"}
_METHODS = ("load_from_checkpoint", "extractall", "import_module", "shell", "trainer")
_WORDS = sorted({name.rpartition(".")[2] for name in (*_HARMLESS, *_FORBIDDEN)} | _MODULES | {*_METHODS})
# Where one of them is called, and why that is no stranger's file.
_KNOWN = {
    # What `lipsim export` has just written, to check it.
    ("lipsim/metric/torch_export.py", "torch.export.load"),
    ("lipsim/metric/onnx.py", "onnxruntime.InferenceSession"),
    # Packages and modules of this one; those that a config names are checked before; MODULE:FUNCTION of a command line.
    ("lipsim/__init__.py", "importlib.import_module"),
    ("lipsim/teachers/__init__.py", "importlib.import_module"),
    ("lipsim/metric/encoders.py", "importlib.import_module"),
    ("lipsim/metric/onnx.py", "importlib.import_module"),
    ("lipsim/cli/main.py", "importlib.import_module"),
    ("lipsim/cli/named_classes.py", "importlib.import_module"),
    ("lipsim/analysis/models.py", "importlib.import_module"),
    # Members are checked one by one before.
    ("lipsim/teachers/download.py", "extractall"),
}


def _dotted(node: ast.expr) -> str:
    """``a.b.c`` of an expression; where a is no name, nothing stands for it."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return ".".join([node.id if isinstance(node, ast.Name) else "", *parts])


def _calls(tree: ast.AST) -> Iterator[str]:
    """The calls and imports of a source that a stranger's file could use."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (name for name in names if name.partition(".")[0] in _MODULES)
        if not isinstance(node, ast.Call):
            continue
        name = _dotted(node.func)
        given = {k.arg: k.value.value for k in node.keywords if k.arg and isinstance(k.value, ast.Constant)}
        last = name.rpartition(".")[2]
        if name in _FORBIDDEN or last == "load_from_checkpoint" or given.get("shell"):
            yield name
        elif any(given.get(key) != value for key, value in _HARMLESS.get(name, {}).items()):
            yield name
        elif name == "importlib.import_module" and not isinstance(node.args[0], ast.Constant):
            yield name
        elif last == "extractall" and given.get("filter") != "data":
            yield last
        elif last in ("fit", "validate", "test", "predict") and "trainer" in name:
            resumes = last == "fit" or any(keyword.arg == "ckpt_path" for keyword in node.keywords)
            if resumes and given.get("weights_only") is not True:
                yield name


def test_sources_call_nothing_that_runs_a_file() -> None:
    # Parsing takes time: most files have none of the words.
    words = re.compile(rf"\b({'|'.join(_WORDS)})\b")
    texts = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in SOURCES}
    found = {(file, call) for file, text in texts.items() if words.search(text) for call in _calls(ast.parse(text))}
    assert found - _KNOWN == set()
    assert _KNOWN - found == set()  # none that has gone


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)", "torch.load(path, weights_only=False)", "np.load(path)", "np.load(p, allow_pickle=flag)",
        "import pickle", "from joblib import load", "eval(text)", "yaml.load(text, Loader=yaml.Loader)",
        "Stage.load_from_checkpoint(path)", "trainer.fit(stage)", "self.trainer.test(stage, ckpt_path=path)",
        "importlib.import_module(name)", "archive.extractall(folder)", "subprocess.run(text, shell=True)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_is_for(source: str) -> None:
    assert list(_calls(ast.parse(source)))


class _Harm:
    """Makes the folder "harm" when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("harm",)


def _object_array(path: Path) -> None:
    np.save(path, np.array([_Harm()], dtype=object), allow_pickle=True)


def _object_column(path: Path) -> None:
    array = np.array([("a", _Harm())], dtype=[("path", "S1"), ("sha256", object)])
    np.save(path, array, allow_pickle=True)


def _plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(_Harm()))


def _archive_of_arrays(path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, a=np.array([_Harm()], dtype=object))


def _huge_array(path: Path) -> None:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


def _torch_pickle(path: Path) -> None:
    torch.save({"state_dict": {}, "harm": _Harm()}, path)


def _old_torch_pickle(path: Path) -> None:
    torch.save({"state_dict": {}, "harm": _Harm()}, path, _use_new_zipfile_serialization=False)


def _compressed(path: Path) -> None:
    """A checkpoint of four million bytes of zeros in a few thousand."""
    saved = io.BytesIO()
    torch.save({"state_dict": {"a": torch.zeros(1_000_000)}}, saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert path.stat().st_size < 20_000


def _safetensors(header: dict[str, Any] | bytes, length: int | None = None) -> Callable[[Path], None]:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(content) if length is None else length
    return lambda path: path.write_bytes(struct.pack("<Q", size) + content) and None


ARRAYS = [_object_array, _object_column, _plain_pickle, _archive_of_arrays, _huge_array]
WEIGHTS = [_torch_pickle, _old_torch_pickle, _plain_pickle, _compressed]
HEADERS = {
    "longer than the file": _safetensors(b"{}", 2**62),
    "of no length": _safetensors(b"", 0),
    "nested": _safetensors(b"[" * 50_000),
    "a tensor larger than the file": _safetensors(
        {"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}
    ),
    "an overflowing shape": _safetensors({"a": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 0]}}),
    "a pickle": _plain_pickle,
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("harm").exists()


@pytest.mark.parametrize("write", ARRAYS)
def test_arrays(write: Callable[[Path], None], photo_cache: Path) -> None:
    write(Path("a.npy"))
    with pytest.raises((ValueError, OSError)):
        read_array(Path("a.npy"))
    with pytest.raises(ValueError, match=r"cannot read the judgement a\.npy"):
        read_judge("a.npy")
    write(index_file(Path(), 0))
    with pytest.raises(ValueError, match=r"shard 0 of the pack . is damaged"):
        read_index(Path(), 0)
    shard = cache_shard(photo_cache, 0)
    good = shard.read_bytes()
    write(shard)
    with pytest.raises(ValueError, match=r"shard 0 of the cache .* is damaged"):
        EmbeddingCache(photo_cache).embeddings(0)
    shard.write_bytes(good)
    write(cache_index(photo_cache, 0))
    with pytest.raises(ValueError, match=r"shard 0 of the cache .* is damaged"):
        EmbeddingCache(photo_cache)


@pytest.mark.parametrize("write", WEIGHTS)
@pytest.mark.parametrize("read", [read_checkpoint, read_stage, load])
def test_weights(read: Callable[[Path], object], write: Callable[[Path], None]) -> None:
    write(Path("a.ckpt"))
    with pytest.raises(ValueError, match=r"cannot read a\.ckpt: it .*(needs more than tensors|is compressed)"):
        read(Path("a.ckpt"))


@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.parametrize("read", [read_checkpoint, load, read_records])
def test_headers_of_safetensors(read: Callable[[Path], object], kind: str) -> None:
    HEADERS[kind](Path("a.safetensors"))
    with pytest.raises(ValueError, match=r"cannot read a\.safetensors"):
        read(Path("a.safetensors"))


def test_the_header_of_a_metric_names_no_module() -> None:
    save(PerceptualMetric(OrthogonalProjection(16, 4), 16), "good.safetensors")
    state, header = read_checkpoint(Path("good.safetensors")), {}
    raw = Path("good.safetensors").read_bytes()
    metadata = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])["__metadata__"]
    for name in ("os.system", "torch.os.system", "lipsim.cli.named_classes.os.mkdir", "../OrthogonalProjection"):
        header = {**json.loads(metadata["metric"]), "encoder": name, "config": {"path": "harm"}}
        save_file(state, "bad.safetensors", {**metadata, "metric": json.dumps(header)})
        with pytest.raises(ValueError, match=f"it names the encoder {name}, which this version does not have"):
            load("bad.safetensors")


@pytest.mark.parametrize("name", ["last", "hpc"])
def test_lightning_finds_a_checkpoint_by_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--ckpt_path last``, and what Lightning takes from the folder of a job that SLURM requeued."""
    save(PerceptualMetric(OrthogonalProjection(16, 4), 16), "start.safetensors")
    stage, data = (
        FineTuning(init_from="start.safetensors"),
        BuiltinData(num_train=4, num_val=2, image_size=16, batch_size=2),
    )
    last = L.pytorch.callbacks.ModelCheckpoint(dirpath="saved", save_last=True)
    Path("saved").mkdir()
    if name == "hpc":
        monkeypatch.setenv("SLURM_NTASKS", "1")
        monkeypatch.setenv("SLURM_JOB_NAME", "job")
        _torch_pickle(Path("hpc_ckpt_1.ckpt"))
    else:
        _torch_pickle(Path("saved/last.ckpt"))
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, max_steps=1, callbacks=[last], default_root_dir=".",
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    with pytest.raises((pickle.UnpicklingError, LipsimError), match="mkdir"):  # Lightning's, ours
        fit(trainer, stage, data, None if name == "hpc" else name)
