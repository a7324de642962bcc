"""The data sets by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from lipsim.data.builtin.triplets import BuiltinTriplets
from lipsim.data.loading import fetch
from lipsim.data.sets.bapps import BappsTriplets
from lipsim.data.sets.material import MaterialTriplets, load_material_answers, load_material_images, split_material
from lipsim.data.sets.nights import NightsTriplets
from lipsim.data.transforms import Preprocess
from lipsim.data.triplet import Triplet, collate_triplets
from lipsim.utils.errors import LipsimError

DATA = ("builtin", "material", "nights", "bapps")


def sample_triplets(
    data: str, count: int, image_size: int, root: Path | None = None, seed: int = 0, resize: str = "float"
) -> Triplet:
    """Some triplets to verify on, drawn from what no stage trains on.

    Args:
        data: one of :data:`DATA`: the first built-in test triplets, or some of the held-out triplets of Material, of
            the test split of NIGHTS, or of the validation part of BAPPS.
        count: how many.
        image_size: side of the images.
        root: folder of the data, built-in ones have none.
        seed: of the draw.
        resize: of files, as in :class:`lipsim.data.transforms.Preprocess`.

    Raises:
        ValueError: an unknown data set, one without its root, or no samples.
        FileNotFoundError: no data at ``root``.
    """
    if count < 1:
        raise LipsimError(f"expected at least 1 sample, got {count}")
    if data not in DATA:
        raise LipsimError(f"expected data to be one of {', '.join(DATA)}, got {data!r}")
    if data == "builtin":
        builtin = BuiltinTriplets("test", count, image_size=image_size, seed=seed)
        return collate_triplets([builtin[i] for i in range(count)])
    if root is None:
        raise LipsimError(f"the data of {data} lie in a folder: pass it as --root")
    dataset: Dataset[Any]
    if data == "material":
        answers = split_material(load_material_answers(root)).triplets
        dataset = MaterialTriplets(load_material_images(root, image_size)[0], answers)
    elif data == "nights":
        dataset = NightsTriplets(root, "test", Preprocess(image_size, resize))
    else:
        dataset = BappsTriplets(root, "val", Preprocess(image_size, resize))
    length = len(dataset)
    rows = torch.randperm(length, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    found = fetch(dataset, rows)
    return found if isinstance(found, Triplet) else collate_triplets(found)
