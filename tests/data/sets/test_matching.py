"""Which files belong together: one and many, folders, patterns, tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from lipsim.data.sets.matching import pair_files, read_pairs


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("a/1.png", "a/deep/2.png", "a/3.png", "a/both.png", "b/1.png", "b/deep/2.jpg", "b/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b/both.png").touch()
    (tmp_path / "b/both.jpg").touch()
    (tmp_path / "b/notes.txt").touch()
    return tmp_path / "a", tmp_path / "b"


def test_folders_are_matched_by_name_and_then_without_endings(folders: tuple[Path, Path]) -> None:
    a, b = folders
    found = pair_files(a, [b])
    assert found.names == ("1.png", "both.png", "deep/2.png")
    assert found.pairs == (
        (a / "1.png", b / "1.png"),
        (a / "both.png", b / "both.png"),
        (a / "deep/2.png", b / "deep/2.jpg"),
    )
    assert set(found.alone) == {a / "3.png", b / "4.png", b / "both.jpg"}
    assert "notes.txt" in found.skipped


def test_a_name_that_two_files_share_is_not_guessed(tmp_path: Path) -> None:
    for name in ("a/x.png", "b/x.jpg", "b/x.webp", "a/y.png", "b/y.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = pair_files(tmp_path / "a", [tmp_path / "b"])
    assert found.names == ("y.png",) and len(found.alone) == 3


def test_one_image_and_many(folders: tuple[Path, Path]) -> None:
    a, b = folders
    one = a / "1.png"
    assert pair_files(one, [b / "4.png"]).pairs == ((one, b / "4.png"),)
    found = pair_files(one, [str(b / "*.png"), a / "3.png"])
    assert [other for _, other in found.pairs] == [b / "1.png", b / "4.png", b / "both.png", a / "3.png"]
    assert len(pair_files(one, [b])) == 5
    with pytest.raises(ValueError, match="give the one first"):
        pair_files(a, [one])
    with pytest.raises(ValueError, match=r"many images.*got 2 arguments"):
        pair_files(a, [b, b])


def test_patterns(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = folders
    monkeypatch.chdir(a.parent)
    found = pair_files("a/**/*.png", ["b/**/*"])
    assert found.names == ("1.png", "both.png", "deep/2.png")
    assert pair_files("a/1*", ["b/4*"]).pairs == ((Path("a/1.png"), Path("b/4.png")),)  # one match is one image
    (a / "[x].png").touch()
    assert pair_files("a/[x].png", ["b/4.png"]).pairs[0][0] == Path("a/[x].png")  # a file is a file
    for pattern, message in (("a/*.gif", "no image file matches"), ("a/none.png", "no image file a/none.png")):
        with pytest.raises(FileNotFoundError, match=message):
            pair_files(pattern, [b])
    (a.parent / "c").mkdir()
    (a.parent / "c/other.png").touch()
    with pytest.raises(ValueError, match=r"no image on the left .* 1\.png and other\.png: .* a CSV file"):
        pair_files("a", ["c"])


def test_a_pattern_of_one_file_is_matched_as_a_pattern(folders: tuple[Path, Path]) -> None:
    """A folder that has one file on some day, and more on another, is not one image on that day."""
    a, b = folders
    found = pair_files(str(a / "[1]*.png"), [b])
    assert found.names == ("1.png",) and len(found.alone) == 4
    with pytest.raises(ValueError, match="no image on the left has the name"):
        pair_files(str(a / "[3]*.png"), [str(b / "*.png")])
    # Beside images it is one.
    assert pair_files(str(a / "[1]*.png"), [b / "4.png"]).pairs == ((a / "1.png", b / "4.png"),)
    assert len(pair_files(str(a / "[1]*.png"), [b / "4.png", b / "1.png"])) == 2
    assert pair_files(a / "1.png", [str(b / "[4]*.png")]).pairs == ((a / "1.png", b / "4.png"),)


def test_tables(folders: tuple[Path, Path]) -> None:
    table = folders[0].parent / "pairs.csv"
    table.write_text("left,right\na/1.png,b/4.png\na\\3.png,b/1.png\n")
    found = read_pairs(table)
    assert found.names == ("a/1.png, b/4.png", "a/3.png, b/1.png")
    assert found.pairs[1] == (table.parent / "a/3.png", table.parent / "b/1.png")
    table.write_text("left,right\na/1.png,b/none.png\n")
    with pytest.raises(FileNotFoundError, match=r"line 2: no image b/none\.png"):
        read_pairs(table)
