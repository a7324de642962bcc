"""A metric as ONNX graphs, for onnxruntime and whatever else reads them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lipsim.metric.graphs import GRAPHS, GraphName, metric_graphs
from lipsim.metric.perceptual_metric import PerceptualMetric
from lipsim.metric.torch_export import exported_program
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import write_file
from lipsim.utils.paths import user_path

# Bytes of weights; protobuf allows two gigabytes. Beyond, they are in NAME.onnx.data beside the graph.
_ONE_FILE = 2**31 - 2**24


def export_onnx(
    metric: PerceptualMetric, folder: str | Path, graphs: tuple[GraphName, ...] | None = None
) -> dict[GraphName, Path]:
    """Write graphs of a metric as ``FOLDER/NAME.onnx``, for any number of images; constants are also in their metadata.

    Each takes images ``(N, 3, S, S)`` as they come out of ``metric.preprocess``, does not look at their values, and
    returns what :data:`lipsim.metric.graphs.GRAPHS` names. The radius covers ``metric.feature_error``, which was
    searched for with torch; :func:`lipsim.metric.export_check.check_onnx` looks for more in onnxruntime.

    Args:
        metric: the metric.
        folder: made where it is missing.
        graphs: among "distance", "embedding" and "radius"; None: all that the metric has.

    Returns:
        The name of each graph → its file.

    Raises:
        ValueError: onnxscript is not installed, a radius of a metric without a bound, weights in half precision, or
            weights in float64, for which onnxruntime has no convolutions.
        OSError: a file cannot be written.

    Example:
        >>> import lipsim
        >>> export_onnx(lipsim.load(), "photos-onnx")  # doctest: +SKIP
        {'distance': PosixPath('photos-onnx/distance.onnx'), …}
    """
    _require("onnxscript")
    if metric.dtype == torch.float64:
        raise LipsimError(
            "expected weights in float32, got float64, for which onnxruntime has no convolutions; export "
            "metric.float(), or with export_torch"
        )
    content = metric_graphs(metric, graphs)
    files = {}
    for name, module in content.modules.items():
        signature, path = GRAPHS[name], user_path(folder) / f"{name}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's exporter calls what torch deprecates
            # Its optimizer takes a factor of 1.000003 for 1 and a term of 1e-9 for 0; runtimes optimize themselves.
            program: Any = torch.onnx.export(
                exported_program(module, content.example(name)),
                dynamo=True,
                optimize=False,
                verbose=False,
                input_names=signature.inputs,
                output_names=signature.outputs,
            )
        program.model.metadata_props.update(content.metadata)
        if sum(tensor.nbytes for tensor in module.state_dict().values()) <= _ONE_FILE:
            write_file(path, program.save)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            program.save(path, external_data=True)  # which names the file of weights: it cannot be renamed
        files[name] = path
    return files


class OnnxGraph:
    """An ONNX file in onnxruntime, on the CPU: tensors in, tensors out.

    Args:
        path: the file.

    Raises:
        ValueError: onnxruntime is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        onnxruntime = _require("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        self._session = onnxruntime.InferenceSession(user_path(path), options, providers=["CPUExecutionProvider"])
        self._inputs = [each.name for each in self._session.get_inputs()]
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the graph, in their order."""
        arrays = {name: x.detach().cpu().numpy() for name, x in zip(self._inputs, inputs, strict=True)}
        return tuple(map(torch.from_numpy, self._session.run(None, arrays)))


def _require(package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise LipsimError(f"ONNX needs the package {package}: pip install 'lipsim[onnx]'") from error
