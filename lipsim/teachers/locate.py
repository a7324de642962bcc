"""Weight files of a backbone in the folders that DreamSim, torch.hub, timm, open_clip and Hugging Face leave."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lipsim.utils.errors import LipsimError

# Files of a Hugging Face repository, in the order of preference.
REPOSITORY_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)


def find_weights(
    path: str | Path, model: str, files: Sequence[str], repositories: Sequence[str], remedy: str, *, alone: bool
) -> Path:
    """The weight file of a backbone.

    Args:
        path: the file itself, or a folder that has it.
        model: name of the backbone, for messages.
        files: names that the file may have, in the folder or in its ``checkpoints/`` (as torch.hub has them).
        repositories: Hugging Face repositories, looked for as ``models--ORGANISATION--NAME`` in a cache.
        remedy: where to get it, for messages.
        alone: whether the folder may be a Hugging Face repository itself, whose file names tell nothing of the model.

    Raises:
        FileNotFoundError: nothing is there; the message says what is expected.
        ValueError: a cache has several of the repositories.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"no weights of {model} at {path.absolute()}; {remedy}")
    candidates = [path / folder / name for name in files for folder in ("", "checkpoints")]
    found = next((file for file in candidates if file.is_file()), None)
    cached = [file for repository in repositories for file in _cached(path, repository)]
    if found is None and len(cached) > 1:
        places = ", ".join(map(str, cached))
        raise LipsimError(f"{path} has weights of {model} in {len(cached)} places; give one of the files: {places}")
    own = [path / name for name in REPOSITORY_FILES if alone and (path / name).is_file()]
    found = found or next(iter([*cached, *own]), None)
    if found is None:
        names = [*files, *(f"models--{repository.replace('/', '--')}/" for repository in repositories)]
        expected = ", ".join([*names, *(REPOSITORY_FILES if alone else ())])
        raise FileNotFoundError(f"no weights of {model} in {path}: expected one of {expected}; {remedy}")
    return found


def _cached(cache: Path, repository: str) -> list[Path]:
    """The file of a repository in a Hugging Face cache: of the revision that ``main`` was last, else of any."""
    for hub in (cache, cache / "hub"):
        folder = hub / f"models--{repository.replace('/', '--')}"
        main = folder / "refs" / "main"
        revisions = [folder / "snapshots" / main.read_text(encoding="utf-8").strip()] if main.is_file() else []
        revisions += sorted((folder / "snapshots").glob("*"))
        for revision in revisions:
            for name in REPOSITORY_FILES:
                if (revision / name).is_file():
                    return [revision / name]
    return []
