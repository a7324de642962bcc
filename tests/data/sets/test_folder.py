"""The image folder and its data module on made-up files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lipsim.data.sets.bapps import BappsTriplets
from lipsim.data.sets.folder import FolderImages, list_images
from lipsim.data.sets.nights import NightsTriplets
from lipsim.data.transforms import Preprocess
from lipsim.datamodules import ImageFolderData, NightsData, TableData
from lipsim.utils.terminal import one_line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of noise, ten by twelve pixels, besides files that are no images."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("b/2.png", "a/1.PNG", "a/0.png"):
            path = tmp_path / "images" / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(path)
        (tmp_path / "images" / part / "a" / "notes.txt").touch()
    return tmp_path / "images"


def test_images_in_order_cropped_without_resizing(folder: Path) -> None:
    images = FolderImages(folder / "val", 6)
    assert [bytes(name).decode() for name in images.names] == ["a/0.png", "a/1.PNG", "b/2.png"]
    for i, name in enumerate(("a/0.png", "a/1.PNG", "b/2.png")):
        pixels = torch.from_numpy(np.array(Image.open(folder / "val" / name))).permute(2, 0, 1).float() / 255
        assert torch.equal(images[i], pixels[:, 2:8, 3:9])
    larger = FolderImages(folder / "val", 16)[0]
    assert larger.shape == (3, 16, 16) and larger[:, :3].sum() == larger[:, :, :2].sum() == 0 < larger.sum()


def test_training_flips_half_of_them(folder: Path) -> None:
    plain, flipped = FolderImages(folder / "train", 6)[0], FolderImages(folder / "train", 6, views=("plain", "flip"))
    views = [flipped[0] for _ in range(200)]
    share = sum(torch.equal(view, plain.flip(2)) for view in views)
    assert share + sum(torch.equal(view, plain) for view in views) == 200 and 70 < share < 130


def test_missing_folders_and_damaged_files(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: there is no such folder; expected images under train/"):
        FolderImages(folder / "nowhere", 6)
    (folder / "val" / "b" / "2.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read the image .*b/2\.png"):
        FolderImages(folder / "val", 6)[2]


def test_one_reader_of_folders(folder: Path) -> None:
    """At any depth, through links but not around; what is no image, hidden or nowhere is counted and named."""
    part = folder / "val"
    picture = (part / "a" / "0.png").read_bytes()
    for name in (
        "top.TIFF",
        "a/deep/er/3.Jpeg",
        "a/._0.png",
        ".hidden/4.png",
        "__MACOSX/a/._0.png",
        "a/deep/.DS_Store",
    ):
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        (part / name).write_bytes(picture)
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "5.png").write_bytes(picture)
    (part / "linked").symlink_to(folder / "elsewhere")
    (part / "linked.png").symlink_to(folder / "elsewhere" / "5.png")
    (part / "b" / "around").symlink_to(part)
    (part / "b" / "gone.png").symlink_to(folder / "nowhere.png")
    listed = list_images(part)
    assert [bytes(name).decode() for name in listed.names] == [
        "a/0.png", "a/1.PNG", "a/deep/er/3.Jpeg", "b/2.png", "linked.png", "linked/5.png", "top.TIFF",
    ]  # fmt: skip
    for words in (
        "1 broken links (first: b/gone.png)",
        "1 links to a folder that they are in (first: b/around)",
        "4 hidden files or folders",
        "1 files with other endings (first: a/notes.txt)",
    ):
        assert words in listed.skipped
    images = FolderImages(part, 6)
    assert images.names.tolist() == listed.names.tolist() and images[4].shape == (3, 6, 6)
    assert list_images(folder / "elsewhere").skipped == ""


def test_a_folder_without_images_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no images in .* \(\.jpg, .*; it is empty"):
        list_images(tmp_path)
    (tmp_path / "._a.png").touch()
    with pytest.raises(FileNotFoundError, match=r"there are 1 hidden files or folders \(first: \._a\.png\)"):
        list_images(tmp_path)


def test_a_worker_names_the_file(folder: Path) -> None:
    """What a loading process cannot read, or cannot prepare for any reason, ends the run with the name of the file."""
    (folder / "val" / "b" / "2.png").write_bytes(b"no image")
    loader = DataLoader(FolderImages(folder / "val", 6), num_workers=1)
    with pytest.raises(ValueError) as caught:
        list(loader)
    line = one_line(str(caught.value))
    assert line.startswith("cannot read the image") and "b/2.png" in line and "Traceback" not in line

    images = FolderImages(folder / "train", 6)
    images.transform = _Broken()  # type: ignore[assignment]
    with pytest.raises(RuntimeError) as broken:
        list(DataLoader(images, num_workers=1))
    assert "planted" in one_line(str(broken.value)) and "a/0.png" in one_line(str(broken.value))


@pytest.mark.parametrize("kind", ["nights", "bapps"])
def test_workers_of_triplets_name_the_file(kind: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(kind)
    name, data = {
        "nights": ("ref/000/000.png", lambda: NightsTriplets(root, "train", Preprocess(8), min_votes=0)),
        "bapps": ("2afc/val/cnn/p0/000003.png", lambda: BappsTriplets(root, "val", Preprocess(8), ["cnn"])),
    }[kind]
    (root / name).write_bytes((root / name).read_bytes()[:60])
    with pytest.raises(ValueError) as caught:
        list(DataLoader(data(), num_workers=1, collate_fn=list))
    assert name in one_line(str(caught.value))


class _Broken:
    def __call__(self, image: object) -> torch.Tensor:
        raise RuntimeError("planted")


def test_triplets_of_another_module_are_scored_besides(folder: Path, nights: Path) -> None:
    data = ImageFolderData(folder, 8, batch_size=2, num_workers=0, triplets=NightsData(nights, 8, num_workers=0))
    data.setup("fit")
    assert data.val_names == ["images", "nights"] and len(data.train_images) == 3  # type: ignore[arg-type]
    assert set(data.val_groups["nights"]) == {"imagenet", "non_imagenet"} and "images" not in data.val_groups
    images, triplets = (next(iter(loader)) for loader in data.val_dataloader())
    assert images.shape == (2, 3, 8, 8) and len(triplets) == 8
    data.setup("test")
    assert data.test_names == ["nights"] and len(data.test_dataloader()) == 1
    with pytest.raises(ValueError, match="no votes to test on"):
        ImageFolderData(folder, 8).setup("test")
    (folder / "votes.csv").write_text("reference,left,right,right_vote,split\n" + 3 * "val/a/0.png," + "1,val\n")
    triplets = TableData(folder / "votes.csv", 8, num_workers=0, name="images")
    with pytest.raises(
        ValueError, match=r"images is the name of the images of the folder and of a set in data\.triplets"
    ):
        ImageFolderData(folder, 8, num_workers=0, triplets=triplets).setup("fit")
