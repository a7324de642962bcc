"""`lipsim cache-teacher` as its users run it: killed and continued, on several processes, verified, on bad input."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lipsim import PerceptualMetric
from lipsim.cli import main as command
from lipsim.data import ImagePack, pack_images
from lipsim.data.embeddings.cache import EmbeddingCache, shard_numbers
from lipsim.data.sets.folder import list_images
from lipsim.metric import load, save
from lipsim.teachers import SmallViT
from lipsim.training.teacher_cache import cache_teacher, check_cache

SCRIPT = str(Path(__file__).parents[2] / "scripts/cache_teacher.py")
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(Path(__file__).parents[2]),
}
COUNT = 150


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher, and noise images in two folders."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    _export("teacher.safetensors")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        file = Path("images") / ("val" if i % 5 == 4 else "train") / f"class{i % 3}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(file)
    Path("images/train/notes.txt").touch()


def _export(name: str) -> None:
    vit = SmallViT(16, patch_size=8, width=12, depth=1, heads=2)
    save(PerceptualMetric(vit, 16, anchor=0.0, lipschitz=float("inf")), name)


def _args(output: str, *more: str) -> list[str]:
    given = ["--teacher", "teacher.safetensors", "--images", "images", "--output", output, "--accelerator", "cpu"]
    return [*given, "--num-workers", "0", "--batch-size", "2", "--shard-size", "3", *more]


def main(args: list[str]) -> None:
    """The command; an exit status of 0 is none."""
    try:
        command.main(["cache-teacher", *args])
    except SystemExit as stop:
        if stop.code:
            raise


def _assert_same_files(one: str, other: str) -> None:
    names = sorted(file.name for file in Path(one).iterdir())
    assert names == sorted(file.name for file in Path(other).iterdir()) and len(names) == 2 * COUNT // 3 + 1
    for name in names:
        assert Path(one, name).read_bytes() == Path(other, name).read_bytes(), name


def test_every_view_of_every_image_has_the_embedding_that_the_teacher_gives(capsys: pytest.CaptureFixture[str]) -> None:
    main(_args("cache", "--dtype", "float32", "--short-side", "16"))
    assert "150 images × 2 views × 12 features in float32" in capsys.readouterr().out
    cache, metric = EmbeddingCache("cache"), load("teacher.safetensors")
    assert cache.paths.tolist() == list_images(Path("images")).names.tolist() and len(cache) == COUNT
    for row in (0, 77, 149):
        file = Path("images", bytes(cache.paths[row]).decode())
        image = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None].float() / 255
        image = torch.nn.functional.interpolate(image, (16, 19), mode="bicubic", antialias=True).clamp(0, 1)
        image = image[..., 2:18]  # torchvision's center_crop rounds (19 − 16)/2 to the even number
        for view, shown in (("plain", image), ("flip", image.flip(3))):
            expected = metric.embed(shown)[0]
            torch.testing.assert_close(cache.embedding(row, view), expected, rtol=1e-5, atol=1e-6)
    main(_args("plain", "--views", "plain", "--short-side", "16"))
    half = EmbeddingCache("plain")
    assert half.embeddings(5).shape == (1, 12) and half.embeddings(5).dtype == np.float16
    rounded = cache.embedding(5, "plain").half().float()
    torch.testing.assert_close(half.embedding(5, "plain"), rounded, rtol=1e-3, atol=1e-7)


def test_a_pack_is_embedded_as_its_files_are_but_for_the_rounding(capsys: pytest.CaptureFixture[str]) -> None:
    pack_images("images", "pack", 16, frame="crop", short_side=16, num_workers=0)
    main(_args("plain", "--dtype", "float32", "--short-side", "16"))
    packed = _args("cache", "--dtype", "float32", "--short-side", "16")
    packed[packed.index("images")] = "pack"
    Path("images").rename("elsewhere")  # a pack needs no files
    main(packed)
    main([*packed, "--verify"])
    assert "sound" in capsys.readouterr().out
    plain, cache = EmbeddingCache("plain"), EmbeddingCache("cache")
    assert cache.description.rounded and not plain.description.rounded
    assert cache.paths.tolist() == plain.paths.tolist() and np.array_equal(cache.sha256, plain.sha256)
    metric, pack = load("teacher.safetensors"), ImagePack("pack")
    for row in (0, 77, 149):
        expected = metric.embed(pack.image(row)[None])[0]
        torch.testing.assert_close(cache.embedding(row, "plain"), expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(cache.embedding(row, "plain"), plain.embedding(row, "plain"))
    Path("elsewhere").rename("images")
    with pytest.raises(SystemExit):
        main(_args("cache", "--dtype", "float32", "--short-side", "16"))
    assert "has rounded True instead of False" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(_args("cache", "--dtype", "float32", "--short-side", "16", "--verify"))
    assert "differ by up to half a grey level" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*packed[:-1], "17"])
    assert "has images under CentralCrop(image_size=16, short_side=16)" in capsys.readouterr().err


def test_bfloat16_is_remembered_and_verified_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    main(_args("exact", "--dtype", "float32"))
    main(_args("cache", "--precision", "bfloat16"))
    exact, cache = EmbeddingCache("exact"), EmbeddingCache("cache")
    assert cache.description.precision == "bfloat16"
    stored, expected = (np.stack([c.embeddings(row) for row in range(COUNT)]) for c in (cache, exact))
    error = np.linalg.norm(stored - expected, axis=2) / np.linalg.norm(expected, axis=2)
    assert 1e-3 < error.max() < 5e-2
    main(_args("cache", "--verify"))
    assert "sound" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(_args("cache"))
    assert "has precision bfloat16 instead of float32" in capsys.readouterr().err


def test_what_is_there_is_kept_and_the_rest_is_added() -> None:
    main(_args("whole"))
    main(_args("part"))
    for number in range(10, COUNT // 3):  # as a kill leaves them: no index, or no shard either
        Path(f"part/shard-{number:05d}.index.npy").unlink()
        if number > 10:
            Path(f"part/shard-{number:05d}.npy").unlink()
    Path("part/shard-00010.npy").write_bytes(b"killed before the index was written")
    Path("part/.0123456789abcdef.tmp.npy").write_bytes(b"killed while writing")
    kept = {number: Path(f"part/shard-{number:05d}.npy").stat().st_mtime_ns for number in range(10)}
    main(_args("part"))
    assert all(Path(f"part/shard-{n:05d}.npy").stat().st_mtime_ns == when for n, when in kept.items())
    _assert_same_files("whole", "part")


@pytest.mark.slow  # starts three interpreters
def test_a_killed_run_of_two_processes_continues_on_one() -> None:
    main(_args("whole"))
    command = [sys.executable, SCRIPT, *_args("killed"), "--devices", "2"]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 300
        while len(shard_numbers(Path("killed"))) < 4 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    done = {n: Path("killed", f"shard-{n:05d}.npy").stat().st_mtime_ns for n in shard_numbers(Path("killed"))}
    assert 4 <= len(done) < COUNT // 3
    left = next(number for number in range(COUNT // 3) if number not in done)
    Path("killed", f"shard-{left:05d}.npy").write_bytes(b"killed before the index was written")
    Path("killed", ".0123456789abcdef.tmp.npy").write_bytes(b"killed while writing")
    main(_args("killed"))
    assert all(Path("killed", f"shard-{n:05d}.npy").stat().st_mtime_ns == when for n, when in done.items())
    _assert_same_files("whole", "killed")


@pytest.mark.slow  # starts three interpreters
def test_torchrun_adds_what_is_missing(capfd: pytest.CaptureFixture[str]) -> None:
    main(_args("cache"))
    before = EmbeddingCache("cache")
    stored = [before.embeddings(row) for row in range(COUNT)]
    Image.new("RGB", (20, 20)).save("images/train/class0/new.png")
    Path("images/train/class1/1.png").unlink()
    for number in (4, 17, 33):  # as a kill leaves them
        Path(f"cache/shard-{number:05d}.index.npy").unlink()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run([*torchrun, SCRIPT, *_args("cache"), "--devices", "2"], env=ENVIRONMENT, timeout=300)
    assert run.returncode == 0
    assert "; 10 images embedded now" in capfd.readouterr().out
    after = EmbeddingCache("cache")
    assert len(after) == COUNT + 1 and set(after.paths) - set(before.paths) == {b"train/class0/new.png"}
    for old, row in enumerate(after.find(before.paths)):  # of the removed image too
        np.testing.assert_allclose(after.embeddings(row), stored[old], rtol=2e-3, atol=1e-6)


def test_a_launcher_of_another_number_of_processes_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main(_args("cache"))  # each would do everything, thinking that it is alone
    assert "does not match the world size (2)" in capsys.readouterr().err and not Path("cache").exists()


def _swap(folder: Path) -> None:
    """Give two images the embeddings of each other, checksums included."""
    for name in ("shard-00002.npy", "shard-00002.index.npy"):
        array = np.load(folder / name)
        if array.dtype.names:
            array["crc32"] = array["crc32"][[1, 0, 2]]
        else:
            array = array[[1, 0, 2]]
        np.save(folder / name, array)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda: None, ""),
        (lambda: Path("cache/shard-00003.index.npy").unlink(), "3 images are not in the cache (first: train/class0/"),
        (lambda: Path("cache/shard-00003.npy").unlink(), "rows are damaged: shard 3 of the cache"),
        (lambda: _swap(Path("cache")), "embeddings are not the teacher's, to 0.001 of their norm (first: "),
        (
            lambda: Image.new("RGB", (20, 20)).save("images/train/class1/1.png"),
            "1 image files have other content than what was embedded (first: train/class1/1.png)",
        ),
        (
            lambda: Image.new("RGB", (9, 9)).save("images/val/new.jpg"),
            "1 images are not in the cache (first: val/new.jpg)",
        ),
    ],
)
def test_verify(damage: Callable[[], None], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(_args("cache"))
    damage()
    capsys.readouterr()
    if not message:
        main(_args("cache", "--verify"))
        out = capsys.readouterr().out
        assert "of 150 image files, the checksums of 150 rows in 50 shards; computed 64 of them again" in out
        assert "sound: the cache is complete" in out
        return
    with pytest.raises(SystemExit) as stop:
        main(_args("cache", "--verify", "--sample", "200"))
    failures = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED: ")]
    assert stop.value.code == 1 and len(failures) == 1 and message in failures[0]


def test_in_python_as_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Typed functions that print nothing on stdout and return what the command says."""
    main(_args("command"))
    capsys.readouterr()
    options = {"num_workers": 0, "batch_size": 2, "accelerator": "cpu"}
    cache = cache_teacher("teacher.safetensors", "images", "cache", shard_size=3, **options)
    _assert_same_files("command", "cache")
    assert (cache.images, cache.embedded, cache.processes, cache.rank) == (COUNT, COUNT, 1, 0)
    assert cache.description.views == ("plain", "flip") and cache.description.features == 12
    assert cache.size == sum(file.stat().st_size for file in Path("cache").glob("*.npy"))
    assert cache_teacher("teacher.safetensors", "images", "cache", shard_size=3, **options).embedded == 0
    verdict = check_cache("teacher.safetensors", "images", "cache", sample=7, seed=3, **options)
    assert verdict.sound and (verdict.files, verdict.shards, verdict.recomputed) == (COUNT, COUNT // 3, 7)
    assert 0 < verdict.largest_error < 1e-3  # rounded to float16
    Image.new("RGB", (9, 9)).save("images/new.png")
    verdict = check_cache("teacher.safetensors", "images", "cache", **options)
    with pytest.raises(ValueError, match="sample"):
        check_cache("teacher.safetensors", "images", "cache", sample=-5, **options)
    assert not verdict.sound and verdict.failures == ("1 images are not in the cache (first: new.png)",)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="batch_size ≥ 1, got 0"):
        cache_teacher("teacher.safetensors", "images", "new", batch_size=0)


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(_args("cache"))
    _export("other.safetensors")
    Path("empty").mkdir()
    before = sorted(Path("cache").iterdir())
    for args, message in (
        (_args("cache", "--teacher", "other.safetensors"), "the cache cache has teacher "),
        (
            _args("cache", "--views", "plain"),
            "has views ('plain', 'flip') instead of ('plain',); give its options",
        ),
        (
            _args("cache", "--dtype", "float32", "--short-side", "9"),
            "short_side None instead of 9; dtype float16 instead",
        ),
        (_args("cache", "--verify", "--teacher", "other.safetensors"), "is of another teacher (SmallViT "),
        (_args("new", "--teacher", "nothing.safetensors"), "no metric file nothing.safetensors"),
        (_args("new", "--images", "empty"), "no images in "),
        (
            _args("new", "--views", "plain", "mirror"),
            "expected some of the views plain, flip, each once, got plain, mirror",
        ),
        (_args("new", "--batch-size", "0"), "--batch-size: expected an integer of at least 1, got '0'"),
        (_args("new", "--short-side", "0"), "--short-side: expected an integer of at least 1"),
        (_args("new", "--dtype", "float64"), "invalid choice: 'float64'"),
        (_args("new", "--verify"), "no embedding cache at new"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(args)
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert stop.value.code == 1 and len(errors) == 1 and message in errors[0], errors
    assert sorted(Path("cache").iterdir()) == before


def test_what_an_unreadable_image_stops_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    names = [bytes(name).decode() for name in list_images(Path("images")).names]
    Path("images", names[100]).write_bytes(b"no image")
    with pytest.raises(SystemExit):
        main(_args("cache"))
    assert f"cannot read the image images/{names[100]}" in capsys.readouterr().err
    assert shard_numbers(Path("cache")) == list(range(33))
    Image.new("RGB", (20, 20)).save(Path("images", names[100]))
    main(_args("cache"))
    assert "51 images embedded now" in capsys.readouterr().out


def test_embeddings_that_do_not_fit_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = SmallViT.forward
    monkeypatch.setattr(SmallViT, "forward", lambda self, x: 1e6 * forward(self, x))
    with pytest.raises(SystemExit):
        main(_args("cache"))
    assert "class0/0.png is not finite in float16 (the teacher's values reach" in capsys.readouterr().err
    main(_args("wide", "--dtype", "float32", "--views", "flip"))
    assert len(EmbeddingCache("wide")) == COUNT
