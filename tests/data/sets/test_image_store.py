"""Images held in memory: the centred square of each, and a teacher's embeddings of the same files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lipsim.data import Preprocess
from lipsim.data.embeddings.cache import CacheDescription, EmbeddingCache, write_shard
from lipsim.data.packing import pack_images
from lipsim.data.sets import image_store
from lipsim.data.sets.image_store import ImageStore, load_image_store
from lipsim.data.sets.labelled_folder import LabelledFolder
from lipsim.data.sets.photos import PhotoTriplets


def write_cache(folder: Path, stores: dict[str, ImageStore], features: np.ndarray, **options: object) -> EmbeddingCache:
    """A cache of the files of some stores, by prefix; one row of features each."""
    given = {"image_size": 32, "short_side": 32, "views": ("plain",), "dtype": "float32"} | options
    description = CacheDescription("f" * 64, "Vit", features.shape[1], precision="float32", **given)  # type: ignore[arg-type]
    description.write(folder)
    names = [os.fsencode(prefix) + name for prefix, store in stores.items() for name in store.names.tolist()]
    sha256 = torch.cat([store.sha256 for store in stores.values()]).numpy()
    write_shard(folder, 0, names, sha256, features[:, None].repeat(len(description.views), 1).astype(description.dtype))
    return EmbeddingCache(folder)


@pytest.mark.parametrize("resize", ["float", "pil"])
def test_rows_are_centred_squares_in_eight_bits(photos: Path, resize: str) -> None:
    preprocess = Preprocess(16, resize)
    store = load_image_store(photos / "train", preprocess)
    assert store.images.shape == (12, 3, 16, 16) and store.images.dtype == torch.uint8
    assert store.names.tolist() == sorted(f"class{c}/{i}.png".encode() for c in range(3) for i in range(4))
    assert store.classes().tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for row in (0, 7):
        square = Image.open(photos / "train" / store.names[row].decode()).crop((2, 0, 24, 22))
        assert (store.floats(torch.tensor([row]))[0] - preprocess(square)).abs().max() <= 0.5 / 255 + 1e-6
    spread = load_image_store(photos / "train", preprocess, num_workers=2)
    assert torch.equal(spread.images, store.images) and torch.equal(spread.sha256, store.sha256)


def test_images_in_no_class_make_no_class(photos: Path) -> None:
    """Two of them are not alike because nobody has sorted them; what asks for no classes takes them."""
    for name in ("stray1.png", "stray2.png"):
        shutil.copy(photos / "train/class0/0.png", photos / "train" / name)
    store = load_image_store(photos / "train", Preprocess(16))
    with pytest.raises(ValueError, match=r"2 of 14 images in .* are in no folder of a class \(first: stray1\.png\)"):
        PhotoTriplets(store, 10)
    assert len(PhotoTriplets(store, 10, kinds={"distortion": 1})) == 10
    shutil.rmtree(photos / "train/class0")
    shutil.rmtree(photos / "train/class1")
    shutil.rmtree(photos / "train/class2")
    assert load_image_store(photos / "train", Preprocess(16)).classes().tolist() == [0, 0]


def test_a_draw_is_a_part_of_the_folder(photos: Path) -> None:
    whole = load_image_store(photos / "train", Preprocess(16))
    some, again, other = (
        load_image_store(photos / "train", Preprocess(16), num_images=5, seed=seed) for seed in (0, 0, 1)
    )
    assert len(some) == 5 and some.names.tolist() == again.names.tolist() != other.names.tolist()
    rows = [whole.names.tolist().index(name) for name in some.names.tolist()]
    assert rows == sorted(rows) and torch.equal(some.images, whole.images[rows])
    assert len(load_image_store(photos / "train", Preprocess(16), num_images=99)) == 12


def test_what_does_not_fit_is_refused(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_store, "MAX_BYTES", 10 * 3 * 16 * 16)
    with pytest.raises(ValueError, match=r"12 images of .* set num_images to at most 10, or a smaller image_size"):
        load_image_store(photos / "train", Preprocess(16))
    assert len(load_image_store(photos / "train", Preprocess(16), num_images=10)) == 10
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load_image_store(photos / "test", Preprocess(16))


def test_embeddings_are_those_of_the_same_files(photos: Path, tmp_path: Path) -> None:
    train, val = (load_image_store(photos / part, Preprocess(16)) for part in ("train", "val"))
    features = np.random.default_rng(0).normal(size=(21, 5))
    cache = write_cache(tmp_path / "cache", {"val/": val, "train/": train}, features)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    assert np.allclose(val.embeddings(cache, "val/"), unit[:9]) and np.allclose(
        train.embeddings(cache, "train/"), unit[9:]
    )
    with pytest.raises(ValueError, match=r"9 of 9 images in .* are not in the cache .*first: test/class0/0.png"):
        val.embeddings(cache, "test/")
    other = write_cache(tmp_path / "other", {"val/": val}, features[:9], short_side=40)
    with pytest.raises(ValueError, match=r"short_side=40.*, the data has .*image_size=16, short_side=16"):
        val.embeddings(other, "val/")
    flipped = write_cache(tmp_path / "flipped", {"val/": val}, features[:9], views=("flip",))
    with pytest.raises(ValueError, match="lacks plain"):
        val.embeddings(flipped, "val/")
    file = photos / "val" / "class1" / "2.png"
    Image.new("RGB", (22, 22)).save(file)
    changed = load_image_store(photos / "val", Preprocess(16))
    with pytest.raises(ValueError, match=r"class1/2.png is not the image whose embedding is in the cache"):
        changed.embeddings(cache, "val/")


@pytest.fixture
def annotated(photos: Path, tmp_path: Path) -> Path:
    """The same pictures as tiny-imagenet has its validation part: in one folder, with their classes in a file."""
    folder, lines = tmp_path / "val", []
    (folder / "images").mkdir(parents=True)
    for number, file in enumerate(sorted((photos / "train").glob("*/*.png"), key=lambda file: file.name)):
        shutil.copy(file, folder / "images" / f"val_{number}.png")
        lines.append(f"val_{number}.png\t{file.parent.name}\t0\t32\t44\t62\n")
    (folder / "val_annotations.txt").write_text("".join(lines))
    return folder


def test_classes_come_from_annotations_where_there_are_some(photos: Path, annotated: Path) -> None:
    store, plain = (load_image_store(folder, Preprocess(16)) for folder in (annotated, photos / "train"))
    of_content = {
        digest.numpy().tobytes(): number for digest, number in zip(plain.sha256, plain.classes(), strict=True)
    }
    expected = [int(of_content[digest.numpy().tobytes()]) for digest in store.sha256]
    assert store.classes().tolist() == expected and expected != sorted(expected)
    folder = LabelledFolder(annotated, Preprocess(16))
    assert folder.classes == ["class0", "class1", "class2"] and folder.labels.tolist() == expected
    before, file = folder.fingerprint(), annotated / "val_annotations.txt"
    first, second = file.read_text().splitlines(keepends=True)[:2]
    exchanged = file.read_text().replace(first, first.replace("class0", "class1"), 1)
    file.write_text(exchanged.replace(second, second.replace("class1", "class0"), 1))
    assert (again := LabelledFolder(annotated, Preprocess(16))).fingerprint() != before
    assert again.labels.bincount().tolist() == [4, 4, 4] and again.labels.tolist() != expected


def test_a_pack_keeps_the_classes_of_annotations(annotated: Path, tmp_path: Path) -> None:
    pack = pack_images(annotated.parent, tmp_path / "pack", 16, frame="square", num_workers=0).folder
    store = load_image_store(pack / annotated.name, Preprocess(16))
    assert store.classes().tolist() == load_image_store(annotated, Preprocess(16)).classes().tolist()
    assert len(store.classes().unique()) == 3
    (annotated / "val_annotations.txt").unlink()
    pack_images(annotated.parent, pack, 16, frame="square", num_workers=0)
    assert not load_image_store(pack / annotated.name, Preprocess(16)).classes().any()  # all in images/


def test_parts_of_a_data_set_are_no_classes(photos: Path) -> None:
    with pytest.raises(
        ValueError, match=r"has the parts train, val of a data set .* name one of them, such as .*train"
    ):
        LabelledFolder(photos, Preprocess(16))
    shutil.move(photos / "train" / "class0", photos / "class0")
    assert LabelledFolder(photos, Preprocess(16)).classes == ["class0", "train", "val"]


def test_annotations_are_of_images_alone(photos: Path, annotated: Path) -> None:
    shutil.copytree(photos / "train" / "class1", annotated / "class1")
    file = annotated / "val_annotations.txt"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")  # as editors leave them
    folder = LabelledFolder(annotated, Preprocess(16))
    assert folder.classes == ["class0", "class1", "class2"] and folder.labels.bincount().tolist() == [4, 8, 4]
    assert {name for name in folder.names if name.startswith("class1/")} == {f"class1/{i}.png" for i in range(4)}


def test_annotations_name_every_image_once(annotated: Path) -> None:
    file, store = annotated / "val_annotations.txt", load_image_store(annotated, Preprocess(16))
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[2:]))
    with pytest.raises(
        ValueError, match=r"val_annotations.txt names no class of images/val_0.png, nor of 1 other images of 12"
    ):
        store.classes()
    wrongs = [lines[0], "a.png\n", "a.png class0\n", "\tclass0\n"]
    for wrong in [*wrongs, "a.png\t../class0\n", "a.png\t/class0\n", "a.png\t.class0\n"]:  # sets are written there
        file.write_text("".join([*lines, wrong]))
        with pytest.raises(ValueError, match="expected lines of an image and its class"):
            store.classes()
