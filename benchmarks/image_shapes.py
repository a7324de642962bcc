"""A wide photograph through the four framings: ``python benchmarks/image_shapes.py``, five minutes of one core.

Writes the figure of docs/image_shapes.md and prints its table: by how much a change of the file's pixels grows, the
certified radius of one answer in the pixels that the metric sees and in those of the file, and the smallest change of
the file that an attack through the framing finds to turn the answer around.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

import lipsim
from lipsim.attacks import minimal_norm
from lipsim.data.builtin.photographs import load_photograph
from lipsim.metric.perceptual_metric import PerceptualMetric
from lipsim.utils.framings import FRAMINGS

_HEIGHT, _WIDTH = 250, 600


def wide(name: str, top: int) -> Tensor:
    """A wide strip of a built-in photograph, ``(3, 250, 600)`` or as wide as it is, in [0, 1]."""
    image = torch.from_numpy(load_photograph(name)).permute(2, 0, 1)
    return image[:, top : top + _HEIGHT, :_WIDTH].double().clamp(0, 1)


class FileObjective:
    """Positive where the images of files ``(N, 3, H, W)`` are answered "right", through a metric's framing."""

    def __init__(self, metric: PerceptualMetric, left: Tensor, right: Tensor) -> None:
        self.metric, self.left, self.right = metric, left, right

    def __call__(self, x: Tensor) -> Tensor:
        images = torch.stack([self.metric.preprocess(image) for image in x]).to(self.metric.dtype)
        margin: Tensor = self.metric(images, self.left) - self.metric(images, self.right)
        return margin

    def select(self, rows: Tensor) -> FileObjective:
        """Of some of the files, which all have the same candidates."""
        return self


def draw(metrics: dict[str, PerceptualMetric], image: Tensor, path: Path) -> None:
    """The photograph, and what each metric sees of it."""
    from matplotlib import pyplot as plt

    ratios = [_WIDTH / _HEIGHT, *[1.0] * len(metrics)]
    figure, axes = plt.subplots(1, len(ratios), figsize=(11, 2.3), gridspec_kw={"width_ratios": ratios})
    for axis, (title, shown) in zip(
        axes, {"the file": image, **{n: m.preprocess(image) for n, m in metrics.items()}}.items(), strict=True
    ):
        axis.imshow(shown.permute(1, 2, 0).numpy())
        axis.set(title=f"{title}, {shown.shape[2]} × {shown.shape[1]}", xticks=[], yticks=[])
        if title == "tiles":
            axis.axhline(shown.shape[1] / 2 - 0.5, color="white")
            axis.axvline(shown.shape[2] / 2 - 0.5, color="white")
    figure.tight_layout(pad=0.4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight", pil_kwargs={"quality": 85})


def main() -> None:
    """Write the figure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="photos", help="a metric (%(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="of the attack (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/images/framings.jpg"), help="figure (%(default)s)")
    options = parser.parse_args()
    reference, other = wide("coffee", 80), wide("astronaut", 20)
    noise = torch.randn(reference.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    darker = (0.8 * reference + 0.05 * noise).clamp(0, 1)
    metrics = {framing: lipsim.load(options.checkpoint, framing=framing) for framing in FRAMINGS}
    draw(metrics, reference, options.output)
    print("| framing | norm | distance to a darker copy | R | R in the file | smallest change found |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for framing, metric in metrics.items():
        x, left, right = (metric.preprocess(image)[None] for image in (reference, darker, other))
        certificate = metric.certify(x, left, right)
        assert bool(certificate.prefers_left)
        radius = float(certificate.radius)
        own = metric.preprocess.original_radius(radius, _HEIGHT, _WIDTH)
        objective = FileObjective(metric, left, right)
        found = minimal_norm(objective, reference[None], steps=options.steps, polish=options.steps)
        change = float((found - reference).norm()) if objective(found) > 0 else math.inf
        norm = metric.preprocess.norm(_HEIGHT, _WIDTH)
        print(
            f"| {framing} | {norm:.4f} | {float(metric(x, left)):.4f} | {radius:.3f} | {own:.2f} | "
            f"{change:.2f} ({change / own:.2f} R) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
