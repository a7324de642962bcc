"""Packs of images: what comes back, what tells packed from plain, what is refused, and what an update reads."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import struct
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lipsim.cli.main import main
from lipsim.data import FolderImages, ImagePack, NightsTriplets, Preprocess, TableTriplets, collate_triplets
from lipsim.data import pack_images as pack_all
from lipsim.data.embeddings.cache import CacheDescription, EmbeddingCache
from lipsim.data.embeddings.cache import write_shard as write_embeddings
from lipsim.data.embeddings.folder import EmbeddedFolder
from lipsim.data.loading import data_fingerprint
from lipsim.data.pack import find_pack, index_file, read_index, shard_bytes, shard_file
from lipsim.data.packing import Packed
from lipsim.data.sets.bapps import BappsTriplets
from lipsim.data.sets.folder import list_images
from lipsim.data.sets.image_store import load_image_store
from lipsim.data.transforms import CentralCrop, CentredSquare, UnreadableImageError, load_image
from lipsim.datamodules import ImageFolderData, NightsData
from lipsim.utils.claim import CLAIM, claim_folder
from lipsim.utils.errors import LipsimError

SIZE = 10
HALF = 0.5 / 255 + 1e-6


def pack_images(root: Path, output: Path, size: int = SIZE, **options: object) -> Packed:
    """Shards of eight images, in this process."""
    settings: dict = {"num_workers": 0, "max_shard_bytes": shard_bytes(8, size)} | options
    return pack_all(root, output, size, **settings)


def _hold(folder: Path, pipe: Connection) -> None:
    claim = claim_folder(folder)
    pipe.send(os.getpid())
    pipe.recv()
    claim.release()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_a_second_command_in_a_pack_is_refused(photos: Path, tmp_path: Path) -> None:
    """Before it removes what it would take for leftovers of a killed one."""
    pack_images(photos, tmp_path / "pack")
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=_hold, args=(tmp_path / "pack", there), daemon=True)
    process.start()
    holder = here.recv()
    (half := tmp_path / "pack" / ".0123456789abcdef.tmp.bin").touch()
    with pytest.raises(LipsimError, match=rf"is in use by process {holder} on .*choose another folder \(--output\)"):
        pack_images(photos, tmp_path / "pack")
    assert half.exists()
    here.send("done")
    process.join(60)
    pack_images(photos, tmp_path / "pack")
    assert not half.exists() and not (tmp_path / "pack" / CLAIM).exists()


def numbers(pack: Path) -> list[int]:
    return [int(path.name[6:11]) for path in sorted(pack.glob("shard-*.bin"))]


@pytest.mark.parametrize(
    ("options", "transform"),
    [
        ({}, Preprocess(SIZE)),
        ({"resize": "pil"}, Preprocess(SIZE, "pil")),
        ({"frame": "crop", "short_side": 12}, CentralCrop(SIZE, 12)),
        ({"frame": "crop"}, CentralCrop(SIZE)),
        ({"frame": "square"}, CentredSquare(Preprocess(SIZE))),
    ],
)
def test_images_come_back_by_path_to_half_a_grey_level(
    photos: Path, tmp_path: Path, options: dict, transform: Preprocess | CentralCrop
) -> None:
    packed = pack_images(photos, tmp_path / "pack", **options)
    pack = ImagePack(tmp_path / "pack")
    names = list_images(photos).names
    assert (packed.images, packed.read, packed.removed) == (21, 21, 0) and len(pack) == 21
    assert pack.paths.tolist() == names.tolist() and pack.shards == [0, 1, 2]
    differences = []
    for row, name in enumerate(names.tolist()):
        plain = load_image(photos / name.decode(), transform)
        image = pack.load(name.decode())
        assert image.shape == (3, SIZE, SIZE) and image.dtype == torch.float32
        differences.append(float((image - plain).abs().max()))
        assert bool(pack.exact[row]) == torch.equal(image, plain)
    assert max(differences) <= HALF
    # Eight bits stay as they are where nothing is resized in float.
    lossless = options.get("resize") == "pil" or options == {"frame": "crop"}
    assert pack.rounded == (max(differences) > 0) == (packed.rounded > 0) == (not lossless)


def test_a_shard_is_one_array_behind_the_header_of_litdata(photos: Path, tmp_path: Path) -> None:
    """num_items, offsets, and each item as its length and its bytes, all uint32 little-endian."""
    pack_images(photos, tmp_path / "pack")
    pack, content = ImagePack(tmp_path / "pack"), (tmp_path / "pack/shard-00001.bin").read_bytes()
    (count,) = struct.unpack("<I", content[:4])
    offsets = struct.unpack(f"<{count + 1}I", content[4 : 4 * (count + 2)])
    assert count == 8 and offsets[-1] == len(content)
    names = list_images(photos).names.tolist()[8:16]
    for name, start, stop in zip(names, offsets[:-1], offsets[1:], strict=True):
        (length,) = struct.unpack("<I", content[start : start + 4])
        assert length == 3 * SIZE * SIZE == stop - start - 4
        pixels = np.frombuffer(content[start + 4 : stop], np.uint8).reshape(3, SIZE, SIZE)
        assert np.array_equal(pixels, pack.pixels(int(pack.find(np.array([name]))[0])))
    listed = json.loads((tmp_path / "pack/index.json").read_text())
    assert [chunk["chunk_size"] for chunk in listed["chunks"]] == [8, 8, 5]
    sizes = [(tmp_path / "pack" / chunk["filename"]).stat().st_size for chunk in listed["chunks"]]
    assert [chunk["chunk_bytes"] for chunk in listed["chunks"]] == sizes


def test_litdata_streams_the_same_shards(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("litdata")
    monkeypatch.setenv("DATA_OPTIMIZER_CACHE_FOLDER", str(tmp_path / "cache"))
    pack_images(photos, tmp_path / "pack", stream=f"local:{tmp_path / 'store'}")
    (tmp_path / "store").mkdir()
    plain = [ImagePack(tmp_path / "pack").image(row) for row in range(21)]
    for file in [*tmp_path.glob("pack/*.bin"), tmp_path / "pack/index.json"]:
        (tmp_path / "store" / file.name).write_bytes(file.read_bytes())
    for file in tmp_path.glob("pack/*.bin"):
        file.unlink()
    streamed = ImagePack(tmp_path / "pack")
    for row in (20, 0, 9, *range(21)):  # in any order
        assert torch.equal(streamed.image(row), plain[row])


_DEFAULTDICT = {"default_factory_module": "harmful", "default_factory_name": "x"}
HOSTILE_INDICES: dict[str, dict[str, Any]] = {
    "pickled items": {"config": {"data_format": ["pickle"]}},
    "a module to import": {"config": {"data_spec": json.dumps([1, {"type": "x", "context": _DEFAULTDICT}])}},
    "another loader": {"config": {"item_loader": "ParquetLoader"}},
    "something new": {"config": {"post": "process"}},
    "a file elsewhere": {"chunks": [{"filename": "../../shard-00000.bin"}]},
}


@pytest.mark.parametrize("kind", HOSTILE_INDICES)
def test_an_index_of_litdata_that_runs_code_is_refused(
    kind: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Litdata reads how items are decoded from an index beside the shards, which is whoever's the store is."""

    class StreamingDataset:
        """As litdata's: the index is there when it is made, and read when its length is asked for."""

        def __init__(self, place: str) -> None:
            self.input_dir = SimpleNamespace(path=place)

        def __len__(self) -> int:
            pytest.fail("it was read")

    monkeypatch.setitem(sys.modules, "litdata", SimpleNamespace(StreamingDataset=StreamingDataset))
    pack, store = tmp_path / "pack", tmp_path / "store"
    pack_images(photos, pack, stream=str(store))
    for file in pack.glob("*.bin"):
        file.unlink()
    store.mkdir()
    index = json.loads((pack / "index.json").read_text())
    for part, content in HOSTILE_INDICES[kind].items():
        index[part] = {**index[part], **content} if isinstance(content, dict) else content
    (store / "index.json").write_text(json.dumps(index))
    found = ImagePack(pack)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"that is not of a pack|cannot read .*index.json"):
            found.image(0)


def test_an_update_reads_what_has_changed_and_no_more(photos: Path, tmp_path: Path) -> None:
    pack, names = tmp_path / "pack", list_images(photos).names.tolist()
    pack_images(photos, pack)
    same = pack_images(photos, pack)
    assert (same.read, same.removed, numbers(pack)) == (0, 0, [0, 1, 2])
    changed, gone, new = names[1].decode(), names[9].decode(), "train/new/7.png"
    Image.new("RGB", (20, 30), "red").save(photos / changed)
    (photos / gone).unlink()
    (photos / "train/new").mkdir()
    Image.new("RGB", (20, 30), "blue").save(photos / new)
    # Files that are not read could not be: they are no images any more, of the same size and time.
    kept = photos / names[2].decode()
    state = kept.stat()
    before = ImagePack(pack).load(names[2].decode())
    kept.write_bytes(b"0" * state.st_size)
    os.utime(kept, ns=(state.st_atime_ns, state.st_mtime_ns))
    packed = pack_images(photos, pack)
    assert (packed.images, packed.read, packed.removed) == (21, 2, 2)
    # Those of the two images are replaced under numbers that were never given; the third stays.
    assert numbers(pack) == [2, 3, 4] and {int(f.name[6:11]) for f in pack.glob("*.npy")} == {2, 3, 4}
    found = ImagePack(pack)
    assert found.load(changed)[:, 5, 5].tolist() == [1, 0, 0] and found.load(new)[:, 5, 5].tolist() == [0, 0, 1]
    assert found.missing([gone, changed, new]) == [gone] and torch.equal(found.load(names[2].decode()), before)
    with pytest.raises(FileNotFoundError, match="is not in the pack"):
        found.load(gone)


@pytest.mark.parametrize("old", [False, True])
def test_no_number_is_given_twice(old: bool, tmp_path: Path) -> None:
    """Not even that of the last shard, whose images are gone; packs of earlier versions go on from what is there."""

    def add(name: str, grey: int) -> Path:
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (grey, grey, grey)).save(tmp_path / "images" / name)
        return tmp_path / "images" / name

    def pack() -> list[int]:
        pack_all(tmp_path / "images", tmp_path / "pack", 16, num_workers=0, max_shard_bytes=shard_bytes(1, 16))
        return numbers(tmp_path / "pack")

    add("a.png", 1)
    last = add("b.png", 2)
    assert pack() == [0, 1]
    last.unlink()
    assert pack() == [0]
    if old:
        file = tmp_path / "pack" / "pack.json"
        content = json.loads(file.read_text())
        assert content.pop("next_shard") == 2
        file.write_text(json.dumps(content))
    add("c.png", 3)
    assert pack() == ([0, 1] if old else [0, 2])
    assert ImagePack(tmp_path / "pack").load("c.png").mul(255).unique().tolist() == [3]


def test_a_killed_pack_is_not_finished_and_continues(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lipsim.data import packing

    pack, read = tmp_path / "pack", packing._Files.__getitem__

    def stop(self: packing._Files, index: int) -> object:
        if index == 17:
            raise KeyboardInterrupt
        return read(self, index)

    monkeypatch.setattr(packing, "_BATCH", 1)
    monkeypatch.setattr(packing._Files, "__getitem__", stop)
    with pytest.raises(KeyboardInterrupt):
        pack_images(photos, pack)
    with pytest.raises(LipsimError, match="is not finished; run lipsim data pack again"):
        ImagePack(pack)
    monkeypatch.setattr(packing._Files, "__getitem__", read)
    assert pack_images(photos, pack).read == 21 - 16
    assert len(ImagePack(pack)) == 21


def test_images_that_cannot_be_read_are_all_named_and_the_others_stay(photos: Path, tmp_path: Path) -> None:
    (photos / "train/class0/1.png").write_bytes(b"no image")
    (photos / "val/class2/2.png").write_bytes(b"")
    with pytest.raises(LipsimError, match=r"2 of 21 images cannot be packed: .*class0/1.png.*class2/2.png.*continues"):
        pack_images(photos, tmp_path / "pack")
    for name in ("train/class0/1.png", "val/class2/2.png"):
        (photos / name).unlink()
    assert pack_images(photos, tmp_path / "pack").read == 0
    assert len(ImagePack(tmp_path / "pack")) == 19


def _cut(pack: Path) -> None:
    file = shard_file(pack, 1)
    file.write_bytes(file.read_bytes()[:-1])


def _flip(pack: Path) -> None:
    content = bytearray(shard_file(pack, 1).read_bytes())
    content[-1] ^= 1
    shard_file(pack, 1).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, r"shard 1 of the pack .* is damaged \(it has 2471 bytes, expected 2472\); copy it again"),
        (lambda pack: shard_file(pack, 2).unlink(), "shard 2 .*its file is missing"),
        (lambda pack: index_file(pack, 0).unlink(), "shard 0 .* is damaged"),
        (lambda pack: index_file(pack, 0).write_bytes(b"\x93NUMPY"), "shard 0 .* is damaged"),
        (lambda pack: (pack / "index.json").write_text("{}"), "cannot read .*index.json"),
        (lambda pack: (pack / "pack.json").write_text('{"format": "others", "version": 1}'), "another format"),
        (lambda pack: (pack / "pack.json").unlink(), "no pack at"),
        (_flip, "the image .* is not what was written"),
    ],
)
def test_damaged_and_foreign_packs_are_refused_in_one_line(
    photos: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    pack_images(photos, tmp_path / "pack")
    damage(tmp_path / "pack")
    with pytest.raises((LipsimError, FileNotFoundError), match=message) as error:
        pack = ImagePack(tmp_path / "pack")
        for row in range(len(pack)):
            pack.image(row)
    assert "\n" not in str(error.value)
    # Of one image, as of a file: a set that skips what cannot be read skips it.
    assert isinstance(error.value, UnreadableImageError) == ("not what was written" in str(error.value))


def test_a_damaged_shard_is_packed_again(photos: Path, tmp_path: Path) -> None:
    pack_images(photos, tmp_path / "pack")
    _cut(tmp_path / "pack")
    # A copy that a file manager has left is nobody's shard.
    index_file(tmp_path / "pack", 0).rename(tmp_path / "pack" / "shard-00000 (copy).index.npy")
    copy = (tmp_path / "pack" / "shard-00000 (copy).index.npy").read_bytes()
    index_file(tmp_path / "pack", 0).write_bytes(copy)
    assert pack_images(photos, tmp_path / "pack").read == 8
    assert numbers(tmp_path / "pack") == [0, 2, 3] and len(ImagePack(tmp_path / "pack")) == 21


def test_what_cannot_be_packed_there_is_refused(photos: Path, tmp_path: Path) -> None:
    pack_images(photos, tmp_path / "pack")
    with pytest.raises(LipsimError, match=r"has images under .*size=10, .*not Preprocess\(image_size=8"):
        pack_images(photos, tmp_path / "pack", 8)
    with pytest.raises(LipsimError, match="expected a pack, or no folder, or an empty one"):
        pack_images(photos, photos / "train")
    with pytest.raises(LipsimError, match="short_side is of the frame crop"):
        pack_images(photos, tmp_path / "other", short_side=12)
    with pytest.raises(LipsimError, match="at least 316 bytes"):
        pack_images(photos, tmp_path / "other", max_shard_bytes=100)
    assert not (tmp_path / "other").exists()


def test_triplets_of_nights_are_read_from_a_pack(nights: Path, tmp_path: Path) -> None:
    pack_images(nights, tmp_path / "pack")
    preprocess = Preprocess(SIZE)
    plain = NightsTriplets(nights, "test", preprocess)
    packed = NightsTriplets(nights, "test", preprocess, pack=tmp_path / "pack")
    loaders = [DataLoader(found, 8, collate_fn=collate_triplets) for found in (plain, packed)]
    one, other = (next(iter(loader)) for loader in loaders)
    for expected, image in zip(one.images(), other.images(), strict=True):
        assert 0 < (image - expected).abs().max() <= HALF
    assert torch.equal(one.right_vote, other.right_vote) and plain.manifest() == packed.manifest()
    fingerprints = {data_fingerprint(loader) for loader in loaders}
    assert len(fingerprints) == 2  # results of one are not continued with the other
    for folder in ("ref", "distort"):  # the table is all that is needed beside a pack
        (nights / folder).rename(tmp_path / folder)
    data = NightsData(nights, image_size=SIZE, batch_size=8, num_workers=0, pack=tmp_path / "pack")
    data.setup("test")
    (batch,) = data.test_dataloader()[0]
    assert torch.equal(batch.reference, other.reference)
    with pytest.raises(LipsimError, match="set the size and the resize alike"):
        NightsTriplets(nights, "test", Preprocess(SIZE, "pil"), pack=tmp_path / "pack")


def test_images_that_a_pack_lacks_are_named_when_a_set_is_opened(nights: Path, table: Path, tmp_path: Path) -> None:
    (nights / "ref/003/005.png").unlink()  # of the last row, a test triplet
    pack_images(nights, tmp_path / "pack")
    Image.new("RGB", (20, 20)).save(nights / "ref/003/005.png")
    lines = (nights / "data.csv").read_text().splitlines()
    (nights / "data.csv").write_text("\n".join([*lines[:-1], lines[-1].replace(",10,", ",6,")]) + "\n")
    with pytest.raises(FileNotFoundError, match=r"1 images \(ref/003/005.png, …\) are not in the pack"):
        NightsTriplets(nights, "test", Preprocess(SIZE), min_votes=0, pack=tmp_path / "pack")
    (table.parent / "images/5-far.png").rename(tmp_path / "far.png")
    pack_images(table.parent, tmp_path / "table")
    (tmp_path / "far.png").rename(table.parent / "images/5-far.png")
    with pytest.raises(FileNotFoundError, match=r"1 problem: line 7: no image images/5-far\.png"):
        TableTriplets(table, Preprocess(SIZE), pack=tmp_path / "table")
    with pytest.raises(FileNotFoundError, match=r"the pack .*table lacks what is named; run lipsim data pack again"):
        TableTriplets(table, Preprocess(SIZE), pack=tmp_path / "table")
    with pytest.raises(LipsimError, match="whole images are stretched in a pack: leave the pack out"):
        TableTriplets(table, Preprocess(SIZE, framing="pad"), pack=tmp_path / "table")


def test_tables_and_bapps_are_read_from_a_pack(table: Path, bapps: Path, tmp_path: Path) -> None:
    pack_images(table.parent, tmp_path / "pack/table")
    pack_images(bapps, tmp_path / "pack/bapps")
    for plain, packed in (
        (TableTriplets(table, Preprocess(SIZE)), TableTriplets(table, Preprocess(SIZE), pack=tmp_path / "pack/table")),
        (
            BappsTriplets(bapps, "val", Preprocess(SIZE), ["cnn"]),
            BappsTriplets(bapps, "val", Preprocess(SIZE), ["cnn"], tmp_path / "pack/bapps"),
        ),
    ):
        assert len(plain) == len(packed)
        for index in range(3):
            for expected, image in zip(plain[index].images(), packed[index].images(), strict=True):
                assert 0 < (image - expected).abs().max() <= HALF
            assert plain[index].right_vote == packed[index].right_vote


def test_a_folder_for_distillation_is_a_pack(photos: Path, tmp_path: Path) -> None:
    pack = tmp_path / "pack"
    pack_images(photos, pack, frame="crop", short_side=12)
    assert find_pack(pack / "train") == (pack, "train/") and find_pack(pack) == (pack, "")
    assert find_pack(photos / "train") is None and find_pack(tmp_path / "nowhere" / "train") is None
    plain = FolderImages(photos / "train", SIZE, short_side=12)
    packed = FolderImages(pack / "train", SIZE, short_side=12)
    assert packed.names.tolist() == plain.names.tolist() and packed.rounded and not plain.rounded
    for index in range(len(plain)):
        assert 0 < (packed[index] - plain[index]).abs().max() <= HALF
    copies = pickle.loads(pickle.dumps(packed))
    assert torch.equal(copies[3], packed[3])
    data = ImageFolderData(pack, image_size=SIZE, short_side=12, batch_size=9, num_workers=2)
    data.setup("validate")
    (images,) = data.val_dataloader()[0]
    assert torch.equal(images, torch.stack([FolderImages(pack / "val", SIZE, short_side=12)[i] for i in range(9)]))
    with pytest.raises(FileNotFoundError, match="whose paths begin with test/"):
        FolderImages(pack / "test", SIZE, short_side=12)
    with pytest.raises(LipsimError, match="has images under CentralCrop"):
        FolderImages(pack / "train", SIZE, short_side=14)


@pytest.mark.parametrize("resize", ["float", "pil"])
def test_photographs_in_memory_are_the_same_of_a_pack(photos: Path, tmp_path: Path, resize: str) -> None:
    pack_images(photos, tmp_path / "pack", frame="square", resize=resize)
    for options in ({}, {"num_images": 5, "seed": 3, "num_workers": 2}):
        plain, packed = (
            load_image_store(root / "train", Preprocess(SIZE, resize), **options)  # type: ignore[arg-type]
            for root in (photos, tmp_path / "pack")
        )
        assert packed.names.tolist() == plain.names.tolist() and len(plain) == options.get("num_images", 12)
        assert torch.equal(packed.images, plain.images) and torch.equal(packed.sha256, plain.sha256)
    with pytest.raises(LipsimError, match=r"has images under CentredSquare\(Preprocess"):
        load_image_store(tmp_path / "pack/train", Preprocess(SIZE + 1, resize))
    # A square is the same whether images are stretched to one, padded or cropped.
    for framing in ("pad", "center-crop"):
        framed = load_image_store(tmp_path / "pack/train", Preprocess(SIZE, resize, framing))
        plain = load_image_store(photos / "train", Preprocess(SIZE, resize, framing))
        assert torch.equal(framed.images, plain.images)


def _cache(folder: Path, pack: ImagePack, rounded: bool) -> EmbeddingCache:
    CacheDescription("f" * 64, "Vit", 5, SIZE, 12, ("plain",), "float32", "float32", rounded).write(folder)
    embeddings = np.random.default_rng(0).normal(size=(len(pack), 1, 5)).astype(np.float32)
    write_embeddings(folder, 0, pack.paths.tolist(), pack.sha256, embeddings)
    return EmbeddingCache(folder)


def test_embedding_caches_tell_packed_from_plain_images(photos: Path, tmp_path: Path) -> None:
    pack_images(photos, tmp_path / "pack", frame="crop", short_side=12)
    pack = ImagePack(tmp_path / "pack")
    plain = FolderImages(photos / "train", SIZE, short_side=12)
    packed = FolderImages(tmp_path / "pack/train", SIZE, short_side=12)
    of_pack, of_files = (_cache(tmp_path / str(rounded), pack, rounded) for rounded in (True, False))
    image, embedding = EmbeddedFolder(packed, of_pack, "train/")[3]
    expected = of_pack.embedding(int(of_pack.find(np.array([b"train/class0/3.png"]))[0]), "plain")
    assert torch.equal(image, packed[3]) and torch.equal(embedding, expected)
    assert torch.equal(EmbeddedFolder(plain, of_files, "train/")[3].embedding, expected)
    for images, cache in ((packed, of_files), (plain, of_pack)):
        with pytest.raises(LipsimError, match="differ by up to half a grey level"):
            EmbeddedFolder(images, cache, "train/")
    cache = _cache(tmp_path / "True", pack, True)
    cache.sha256[3] = 0
    with pytest.raises(LipsimError, match="its content differs"):
        EmbeddedFolder(packed, cache, "train/")
    # One part alone may have images that were rounded: a cache is of all of them.
    for number in range(2):
        for size, part in ((24, "train"), (12, "val")):
            file = tmp_path / f"mixed/{part}/{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file)
    pack_images(tmp_path / "mixed", tmp_path / "mixed_pack", frame="crop", short_side=12)
    mixed = ImagePack(tmp_path / "mixed_pack")
    assert mixed.exact.tolist() == [False, False, True, True]
    cache = _cache(tmp_path / "of_mixed", mixed, mixed.rounded)
    for part in ("train", "val"):
        images = FolderImages(tmp_path / "mixed_pack" / part, SIZE, short_side=12)
        assert images.rounded and len(EmbeddedFolder(images, cache, f"{part}/")) == 2
    # Crops that are not resized are whole numbers, packed or not: then there is nothing to tell.
    pack_images(photos, tmp_path / "exact", frame="crop")
    assert not FolderImages(tmp_path / "exact/train", SIZE).rounded


def test_the_command_packs_and_packs_again(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "pack", str(photos), str(tmp_path / "pack"), "--size", "8", "--num-workers", "0"]
    for read, option in ((21, []), (0, ["--json"])):
        with pytest.raises(SystemExit) as stop:
            main([*command, *option])
        assert stop.value.code == 0
        out = capsys.readouterr().out
        assert json.loads(out)["read"] == 0 if option else f"{read} decoded now" in out
    assert read_index(tmp_path / "pack", 0)["size"].tolist() == [
        (photos / name.decode()).stat().st_size for name in list_images(photos).names.tolist()
    ]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--short-side", "9"])
    assert stop.value.code != 0 and "of the frame crop, got it for whole" in capsys.readouterr().err
