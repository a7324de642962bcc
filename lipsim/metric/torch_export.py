"""A metric as programs of ``torch.export``, which need torch and nothing of this package."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lipsim.metric.graphs import GraphName, metric_graphs
from lipsim.metric.perceptual_metric import PerceptualMetric
from lipsim.utils.files import write_file
from lipsim.utils.paths import user_path


def export_torch(
    metric: PerceptualMetric,
    folder: str | Path,
    graphs: tuple[GraphName, ...] | None = None,
    *,
    double: bool = False,
) -> dict[GraphName, Path]:
    """Write graphs of a metric as ``FOLDER/NAME.pt2``, for any number of images.

    ``torch.export.load(file).module()`` is a function of images ``(N, 3, S, S)`` as they come out of
    ``metric.preprocess``; it does not look at their values. The constants are in the file's extra files too, each under
    ``lipsim/NAME``.

    Args:
        metric: the metric.
        folder: made where it is missing.
        graphs: among "distance", "embedding" and "radius"; None: all that the metric has.
        double: compute in float64 inside, see :func:`lipsim.metric.graphs.metric_graphs`.

    Returns:
        The name of each graph → its file.

    Raises:
        ValueError: a radius of a metric without a bound, or weights in half precision.
        OSError: a file cannot be written.
    """
    content = metric_graphs(metric, graphs, double=double)
    extra = {f"lipsim/{key}": value for key, value in content.metadata.items()}
    files = {}
    for name, module in content.modules.items():
        path = user_path(folder) / f"{name}.pt2"
        program = exported_program(module, content.example(name))
        write_file(path, partial(_save, program, extra))
        files[name] = path
    return files


def exported_program(module: nn.Module, example: tuple[Tensor, ...]) -> Any:
    """A module as a program for any number of samples.

    Args:
        module: of several batches ``(N, …)`` of one size.
        example: such batches of at least two samples: one would be taken for a constant.
    """
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        return torch.export.export(module, example, dynamic_shapes=tuple({0: batch} for _ in example))


class TorchGraph:
    """A file of :func:`export_torch`: tensors in, tensors out.

    Args:
        path: the file.
    """

    def __init__(self, path: str | Path) -> None:
        self._module = torch.export.load(user_path(path)).module()

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the program, in their order."""
        found = self._module(*inputs)
        return tuple(found) if isinstance(found, tuple | list) else (found,)


def _save(program: Any, extra: dict[str, str], path: Path) -> None:
    torch.export.save(program, path, extra_files=extra)
