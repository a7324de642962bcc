"""Downloads of weight files, on explicit request: with progress, resumed after a break, and checked."""

from __future__ import annotations

import re
import shutil
import stat
import tempfile
import time
import zipfile
import zlib
from contextlib import ExitStack
from http.client import HTTPException
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from lipsim.teachers.catalogue import BACKBONES, VARIANTS, where_to_get
from lipsim.teachers.locate import REPOSITORY_FILES
from lipsim.teachers.lora import CONFIG
from lipsim.utils.claim import alone
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import file_sha256, put_in_place, write_text
from lipsim.utils.progress import Progress, duration

_CHUNK = 1 << 20
_TIMEOUT = 60  # seconds without a byte
# Weights shrink by a tenth. An archive that says it grows by more than this is made to fill a disk.
_MOST_UNPACKED = 20
_ALWAYS_UNPACKED = 10_000_000  # bytes that harm nobody


def fetch_teacher(name: str, folder: str | Path, archive: str | Path | None = None, sha256: str = "") -> list[Path]:
    """Download the weight files of a teacher into a folder. What is there whole already is kept.

    Args:
        name: a DreamSim variant, a backbone, or a Hugging Face repository such as ``timm/vit_base_patch16_224.dino``.
        folder: where to; repositories are stored there as Hugging Face's own cache stores them.
        archive: a local copy of the variant's zip file, to unpack in place of any download.
        sha256: checksum of the first file, or of the archive, or the beginning of it.

    Returns:
        The files and folders that the teacher is read from.

    Raises:
        FileNotFoundError: no such archive, or no such file on the server.
        ValueError: an unknown name, or a file that is damaged or has another checksum.
        OSError: the connection broke; the same command continues where it was.
    """
    folder = Path(folder).expanduser()
    sources = VARIANTS[name].sources if name in VARIANTS else BACKBONES[name].sources if name in BACKBONES else ()
    if archive is not None:
        if name not in VARIANTS:
            raise LipsimError(f"expected a DreamSim variant ({', '.join(VARIANTS)}) with an archive, got {name}")
        return _unpack_once(Path(archive), folder, sources[0].file, sha256)
    if not sources:
        if name in BACKBONES:
            raise LipsimError(f"{name} has no file of its own to download; {where_to_get(name)}")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            known = sorted({*VARIANTS, *(backbone for backbone in BACKBONES if BACKBONES[backbone].sources)})
            raise LipsimError(f"expected {', '.join(known)}, or a Hugging Face repository, got {name}")
        return [fetch_repository(name, folder, sha256)]
    files: list[Path] = []
    for number, source in enumerate(sources):
        checksum = sha256 if sha256 and number == 0 else source.sha256
        target = folder / source.file
        if target.suffix != ".zip":
            files.append(download(source.url, target, checksum))
        elif there := _unpacked(name, folder, checksum):
            files += there
        else:
            own = target.is_file()
            files += _unpack_once(download(source.url, target, checksum), folder, source.file)
            if not own:
                target.unlink(missing_ok=True)
    return list(dict.fromkeys(files))


def _unpacked(name: str, folder: Path, sha256: str) -> list[Path]:
    """What a variant is read from, where its archive was unpacked whole and nothing of it is gone; else nothing.

    Raises:
        ValueError: that archive had another checksum.
    """
    variant = VARIANTS[name]
    groups = [(f"{variant.adapter}/{CONFIG}",), *(BACKBONES[branch].files for branch in variant.branches)]
    there = [next((folder / file for file in group if (folder / file).is_file()), None) for group in groups]
    found = [path for path in there if path is not None]
    receipt = _receipt(folder, variant.archive.file)
    if len(found) < len(groups) or not receipt.is_file():
        return []
    checksum = receipt.read_text(encoding="utf-8").split()[0]
    if not checksum.startswith(sha256.lower()):
        raise LipsimError(f"{folder} has the files of an archive with the SHA-256 {checksum}, expected {sha256}")
    return [found[0].parent, *found[1:]]


def _receipt(folder: Path, name: str) -> Path:
    """The file that says that an archive was unpacked whole, and its checksum in the format of sha256sum."""
    return folder / f"{name}.sha256"


def _unpack_once(archive: Path, folder: Path, name: str, sha256: str = "") -> list[Path]:
    with Progress(f"unpacking {archive.name}"):
        checksum = check_sha256(archive, sha256)
        members = unpack(archive, folder)
    write_text(_receipt(folder, name), f"{checksum}  {name}\n")
    return members


def download(url: str, target: Path, sha256: str = "") -> Path:
    """Download one file; a broken download is continued where it stopped. A file that is there is checked and kept.

    Of several processes that want the same file one downloads it, and the others wait.

    Raises:
        FileNotFoundError: the server does not have it.
        ValueError: its checksum is another.
        OSError: there is no connection, or it broke.
    """
    if target.is_file():
        check_sha256(target, sha256)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.part")
    with ExitStack() as stack:
        with Progress(f"waiting for another process that downloads {target.name}"):
            stack.enter_context(alone(partial))
        try:
            if target.is_file():  # by now
                check_sha256(target, sha256)
            else:
                _download(url, target, partial, sha256)
        finally:
            if partial.is_file() and not partial.stat().st_size:  # made to be locked
                partial.unlink()
    return target


def _download(url: str, target: Path, partial: Path, sha256: str) -> None:
    tag = target.with_name(f"{target.name}.etag")
    try:
        _continue(url, partial, tag)
    except HTTPError as error:
        if error.code in (404, 410):
            raise FileNotFoundError(f"{url} is not there (any more): HTTP {error.code}") from error
        raise OSError(f"cannot download {url}: HTTP {error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        raise OSError(f"cannot download {url}: {error}; the same command continues where it was") from error
    try:
        check_sha256(partial, sha256, remedy="it was removed, and the same command gets it again")
    except ValueError:
        partial.unlink()
        tag.unlink(missing_ok=True)
        raise
    put_in_place(partial, target)
    tag.unlink(missing_ok=True)


def _continue(url: str, partial: Path, tag: Path) -> None:
    """Write what is missing of a file to ``partial``; ``tag`` keeps the server's name for its version."""
    have, version = (
        (partial.stat().st_size, tag.read_text(encoding="utf-8")) if partial.is_file() and tag.is_file() else (0, "")
    )
    response, have = _open(url, have, version) if have and version else (urlopen(url, timeout=_TIMEOUT), 0)
    if response is None:
        return
    with response:
        length = response.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        tag.write_text(_version(response), encoding="utf-8")
        with open(partial, "ab" if have else "wb") as file, Progress(f"downloading {partial.stem}") as progress:
            start = time.monotonic()
            while block := response.read(_CHUNK):
                file.write(block)
                progress(_amount(file.tell(), have, total, time.monotonic() - start))
            if total is not None and file.tell() != total:
                raise OSError(f"it broke off after {file.tell()} of {total} bytes")


def _open(url: str, have: int, version: str) -> tuple[Any, int]:
    """The rest of a file after ``have`` bytes, or all of it and 0 where it has changed or ranges are not served.

    None and ``have`` where there is no rest: all of it came, and was not looked at any more.
    """
    try:
        # If-Range: should the file have changed since, all of it comes.
        response = urlopen(Request(url, headers={"Range": f"bytes={have}-", "If-Range": version}), timeout=_TIMEOUT)
    except HTTPError as error:
        if error.code != 416:  # there is nothing after what we have
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}" and _version(error) in ("", version):
            return None, have
        return urlopen(url, timeout=_TIMEOUT), 0
    if response.status != 206:
        return response, 0
    begin = re.match(r"bytes (\d+)-", response.headers.get("Content-Range") or "")
    if begin is not None and int(begin[1]) == have and _version(response) == version:
        return response, have
    response.close()  # the server does not know If-Range
    return urlopen(url, timeout=_TIMEOUT), 0


def _version(response: Any) -> str:
    return str(response.headers.get("ETag") or response.headers.get("Last-Modified") or "")


def _amount(done: int, before: int, total: int | None, seconds: float) -> str:
    """How many megabytes of all are there, and how long the rest will take, from those that came in some seconds."""
    if total is None:
        return f"{done / 1e6:.0f} MB"
    left = seconds / max(done - before, 1) * (total - done)
    return f"{done / 1e6:.0f} of {total / 1e6:.0f} MB, {duration(left)} left"


def fetch_repository(repository: str, folder: Path, sha256: str = "", endpoint: str | None = None) -> Path:
    """Download the weights of a Hugging Face repository, into the layout of its cache.

    Large files are named by their SHA-256 there, which is compared with what arrived.

    Raises:
        FileNotFoundError: there is no such repository, or no weights in it.
        ValueError: the checksum is another.
        OSError: there is no connection, or it broke.
    """
    for file in ("open_clip_config.json", "config.json", *REPOSITORY_FILES):
        try:
            path = Path(hf_hub_download(repository, file, cache_dir=folder, endpoint=endpoint))
        except RepositoryNotFoundError as error:
            raise FileNotFoundError(f"Hugging Face has no repository {repository}, or not for everyone") from error
        except LocalEntryNotFoundError as error:
            raise OSError(f"cannot reach Hugging Face for {repository}; the same command continues") from error
        except EntryNotFoundError:
            continue
        except HfHubHTTPError as error:
            raise OSError(f"cannot download {file} of {repository}: {error}") from error
        if file in REPOSITORY_FILES:
            blob = path.resolve().name
            check_sha256(path.resolve(), sha256 or (blob if re.fullmatch("[0-9a-f]{64}", blob) else ""))
            return path
    raise FileNotFoundError(f"{repository} on Hugging Face has none of {', '.join(REPOSITORY_FILES)}")


def unpack(archive: Path, folder: Path) -> list[Path]:
    """Unpack a zip file; the checksum of each member is compared. Returns what lies at its top.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is truncated, damaged, no zip file, far larger unpacked, or has a member that would lie outside
            the folder or is a link.
        OSError: the disk is full or read-only.
    """
    if not archive.is_file():
        raise FileNotFoundError(f"no zip file {archive}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as content, tempfile.TemporaryDirectory(dir=folder) as temporary:
            members = [member for member in content.infolist() if not member.filename.startswith("__MACOSX")]
            for member in members:
                _check_member(member, archive)
            packed, unpacked = archive.stat().st_size, sum(member.file_size for member in members)
            if unpacked > _MOST_UNPACKED * packed + _ALWAYS_UNPACKED:
                raise LipsimError(
                    f"{archive} would be {unpacked / 1e9:.1f} GB unpacked, more than {_MOST_UNPACKED} times its "
                    f"{packed / 1e6:.1f} MB: weights hardly shrink, so it is none of weights; unpack it by hand where "
                    "you trust it"
                )
            content.extractall(temporary, members)
            placed = []
            for path in sorted(Path(temporary).iterdir()):
                target = folder / path.name
                if path.is_dir():
                    shutil.copytree(path, target, dirs_exist_ok=True)
                else:
                    put_in_place(path, target)
                placed.append(target)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise LipsimError(f"{archive} is truncated or damaged ({error}); delete it and get it again") from error
    except RuntimeError as error:  # packed in a way that zipfile does not know, or encrypted
        raise LipsimError(f"{archive} cannot be unpacked here ({error}); unpack it by hand into {folder}") from error
    return placed


def _check_member(member: zipfile.ZipInfo, archive: Path) -> None:
    """Refuse a member of an archive that would be written elsewhere, or be no file.

    Raises:
        ValueError: it would.
    """
    name = PurePosixPath(member.filename.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or PureWindowsPath(member.filename).drive:
        raise LipsimError(f"{archive} has a member outside its folder: {member.filename}")
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):  # 0: made where there are no such kinds
        raise LipsimError(f"{archive} has a member that is no file, such as a link: {member.filename}")


def check_sha256(path: Path, expected: str = "", remedy: str = "delete it and get it again") -> str:
    """The SHA-256 of a file, compared with what is known of its beginning.

    Args:
        path: the file.
        expected: the checksum, or its beginning; nothing is compared where it is empty.
        remedy: for the message where it is another.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is another.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    found = file_sha256(path)
    if not found.startswith(expected.lower()):
        raise LipsimError(f"expected the SHA-256 of {path} to be {expected.lower()}, got {found}; {remedy}")
    return found
