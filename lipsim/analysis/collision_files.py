"""What a collision of one image looks like in files, and what the model says before and after."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lipsim.analysis.collisions import Collision, output_differences
from lipsim.analysis.models import Model, named_outputs
from lipsim.metric import PerceptualMetric
from lipsim.utils.files import remove_files, write_file, write_safetensors
from lipsim.utils.precision import full_precision
from lipsim.utils.weights import tensor_names

_SHOWN = 3  # classes


def collision_facts(
    model: Model, collision: Collision, target: Tensor | None = None, metric: PerceptualMetric | None = None
) -> dict[str, Any]:
    """What JSON output holds of the first image of a collision.

    Args:
        model: that the images collide in.
        collision: found by :func:`lipsim.analysis.collisions.find_collision`.
        target: image ``(1, 3, S, S)`` that the walk went to.
        metric: whose encoder the model is, for distances instead of classes.
    """
    x, x_adv = collision.x[:1], collision.x_adv[:1]
    rounded = (x_adv * 255).round() / 255
    facts: dict[str, Any] = {
        "model": model.name,
        "layer": collision.layer,
        "exact": collision.exact,
        "dtype": str(x.dtype).removeprefix("torch."),
        "residual": float(collision.residual[0]),
        "length": float(collision.length[0]),
        "rmse": float(collision.rmse[0]),
        "left": None if target is None else float(collision.left[0]),
        "largest_difference": _differences(model.module, x, x_adv),
        "largest_difference_of_8_bits": _differences(model.module, x, rounded),
    }
    if metric is not None:
        others = {"the image": x} | ({} if target is None else {"the target": target})
        with torch.no_grad(), full_precision():
            facts["distance"] = {
                name: {"before": float(metric(x, other)), "after": float(metric(x_adv, other))}
                for name, other in others.items()
            }
    else:
        facts["top"] = {"before": top_classes(model.module, x), "after": top_classes(model.module, x_adv)}
    return facts


def _differences(module: nn.Module, x: Tensor, x_adv: Tensor) -> dict[str, float | None]:
    """Of each output; None where no number says it (JSON has none for ∞): other shapes, or NaN."""
    found = output_differences(module, x, x_adv)
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def top_classes(module: nn.Module, x: Tensor, count: int = _SHOWN) -> list[tuple[int, float]]:
    """The most probable classes of an image, each with its softmax; empty where the output is no vector of scores."""
    with torch.no_grad(), full_precision():
        outputs = list(named_outputs(module(x)).values())
    if len(outputs) != 1 or outputs[0].ndim != 2 or outputs[0].shape[1] < 2:
        return []
    values, classes = outputs[0].softmax(1)[0].topk(min(count, outputs[0].shape[1]))
    return [(int(label), float(value)) for label, value in zip(classes, values, strict=True)]


def describe(facts: dict[str, Any]) -> str:
    """The same in a few lines."""
    where = f"{facts['model']} answers alike at {facts['layer']}"
    how = "in the kernel of the first operator" if facts["exact"] else "by Gauss-Newton"
    reach = "" if facts["left"] is None else f", {1 - facts['left']:.1%} of the way to the target"
    lines = [
        f"{where}, {how}: relative residual {facts['residual']:.1e} in {facts['dtype']}",
        f"the image moved by ℓ2 {facts['length']:.4g}, RMSE {facts['rmse']:.4g}{reach}",
    ]
    for name, value in facts["largest_difference"].items():
        exact, eight = (_difference(part) for part in (value, facts["largest_difference_of_8_bits"].get(name)))
        lines.append(f"largest difference of {name}: {exact}; with the image rounded to 8 bits {eight}")
    for name, distance in facts.get("distance", {}).items():
        lines.append(f"distance to {name}: {distance['before']:.6g} → {distance['after']:.6g}")
    for when, classes in facts.get("top", {}).items():
        if classes:
            lines.append(f"top classes {when}: " + ", ".join(f"{label} ({value:.2%})" for label, value in classes))
    return "\n".join(lines)


def _difference(value: float | None) -> str:
    return "no number (other shapes, or NaN)" if value is None else f"{value:.2e}"


def save_collision(folder: Path, collision: Collision, facts: dict[str, Any], target: Tensor | None = None) -> None:
    """Write the first image of a collision as pictures, and all as exact tensors, which 8 bits are not.

    ``image.png``, ``target.png`` where there is one, ``collision.png``, ``pattern.png`` (the change around gray),
    ``difference.png`` (the same, amplified to the full range), ``picture.png`` with all of these, and
    ``images.safetensors``.
    """
    from torchvision.utils import save_image  # seconds to import

    from lipsim.results.plots import plot_grid  # matplotlib, which the command line loads only where it draws

    x, x_adv = collision.x[0], collision.x_adv[0]
    change = x_adv - x
    gain = float(0.5 / change.abs().max().clamp(min=1e-6))
    pictures = {
        "image": x,
        **({} if target is None else {"target": target[0]}),
        "pattern": 0.5 + 0.5 * change,
        "collision": x_adv,
        "difference": 0.5 + gain * change,
    }
    captions = {
        "pattern": f"pattern, ℓ2 {facts['length']:.3g}",
        "collision": f"collides at {facts['layer']}",
        "difference": f"difference × {gain:.3g}",
    }
    for name, picture in pictures.items():
        write_file(folder / f"{name}.png", partial(save_image, picture))
    tensors = {"x": collision.x, "x_adv": collision.x_adv, **({} if target is None else {"target": target})}
    if target is None and "target" in tensor_names(folder / "images.safetensors"):  # of an earlier collision
        remove_files(folder, ["target.png"])
    write_safetensors(folder / "images.safetensors", {name: tensor.contiguous() for name, tensor in tensors.items()})
    columns = [picture[None] for picture in pictures.values()]
    title = f"{facts['model']}: relative residual {facts['residual']:.1e}"
    plot_grid(folder / "picture.png", columns, [[captions.get(name, name)] for name in pictures], title)
