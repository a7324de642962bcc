"""The tables of docs/collisions.md: how exact collisions are, what they do to answers, explanations and other models.

    python benchmarks/collisions.py layers
    python benchmarks/collisions.py outputs
    python benchmarks/collisions.py transfer
    python benchmarks/collisions.py explanations
    python benchmarks/collisions.py reach

Photographs of the scikit-image and scikit-learn wheels, each towards the next one; weights are random but for the
bundled metric and EfficientNet-Lite0. Cells are the mean over the photographs and half of what these are apart.
One thread: layers 17 s, outputs two minutes, transfer three, explanations half of one (with ``lipsim[explain]``), reach
one; all of these are longer where others work. EfficientNet-Lite0 needs ``lipsim[photos]``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lipsim.analysis.collisions import (
    CLAIM,
    OUTPUT,
    directions,
    find_collision,
    in_precision,
    layer_table,
    mean_and_spread,
    null_vector_residual,
    output_differences,
    step_of_length,
    transfer_matrix,
    transfer_table,
)
from lipsim.analysis.explanations import explanations_agree
from lipsim.analysis.models import IMAGENET, Model, Normalized, load_model
from lipsim.attacks import features_up_to
from lipsim.attacks.first_operator import require_operator
from lipsim.attacks.null_space import null_space_move
from lipsim.data.builtin.photographs import photograph_path
from lipsim.data.transforms import Preprocess, load_image
from lipsim.results.formats import markdown_table
from lipsim.results.tables import Row
from lipsim.students import OrthogonalProjection
from lipsim.utils.errors import LipsimError
from lipsim.utils.progress import Progress

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket", "flower", "china")
DEIT = "timm/deit_tiny_patch16_224"
# Model, layer (None: the first operator), side of the image (None: as published), photographs.
OUTPUTS: tuple[tuple[str, str | None, int | None, int], ...] = (
    (DEIT, None, None, 3),
    ("timm/vit_base_patch32_224", None, None, 3),
    ("collisions:segformer", None, 224, 3),
    ("collisions:yolos", None, 224, 3),
    ("torchvision/vit_b_16", None, None, 1),
    ("torchvision/fcn_resnet50", None, None, 1),
    ("torchvision/lraspp_mobilenet_v3_large", None, None, 1),
    ("torchvision/fasterrcnn_mobilenet_v3_large_320_fpn", None, None, 1),
    ("quickstart", None, None, 3),
    ("quickstart", OUTPUT, None, 3),
)
SOURCES = (
    DEIT,
    "timm/deit_small_patch16_224",
    "timm/mixer_s16_224",
    "timm/vit_small_patch32_224",
    "timm/vit_base_patch32_224",
    "quickstart",
)
TARGETS = ("torchvision/resnet18", "efficientnet-lite0")


class Detector(nn.Module):
    """YOLOS-Ti, a detector on a patch embedding, with random weights; its classes and boxes."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import YolosConfig, YolosForObjectDetection  # comes with lipsim[tune]

        sizes = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "image_size": [224, 224]}
        self.network = YolosForObjectDetection(YolosConfig(**sizes, num_labels=91))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Classes ``(N, 100, 92)`` and boxes ``(N, 100, 4)``."""
        found = self.network(x)
        return {"classes": found.logits, "boxes": found.pred_boxes}


def segformer() -> nn.Module:
    """SegFormer-B0, a segmenter whose first convolution (7 × 7, stride 4) overlaps, with random weights."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation  # comes with lipsim[tune]

    return Normalized(SegformerForSemanticSegmentation(SegformerConfig(num_labels=150)), *IMAGENET)


def yolos() -> nn.Module:
    """The detector behind the normalisation of its input."""
    return Normalized(Detector(), *IMAGENET)


def main() -> None:
    """Print the tables of some parts."""
    parts: dict[str, Callable[[argparse.Namespace, Progress], None]] = {
        "layers": _layers,
        "outputs": _outputs,
        "transfer": _transfer,
        "explanations": _explanations,
        "reach": _reach,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=list(parts))
    parser.add_argument("--images", type=int, default=5, help="photographs, at most (%(default)s)")
    parser.add_argument("--only", default="", help="outputs of models with this in their name alone")
    parser.add_argument("--steps", type=int, default=60, help="of Gauss-Newton (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for part in options.parts:
        start = time.perf_counter()
        with Progress(part) as say:
            parts[part](options, say)
        print(f"\n{part}: {time.perf_counter() - start:.0f} s\n", flush=True)


def _photographs(model: Model, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images and their targets ``(count, 3, S, S)``."""
    preprocess = Preprocess(model.image_size, model.resize)
    images = [load_image(photograph_path(name), preprocess).to(dtype) for name in PHOTOGRAPHS[: count + 1]]
    return torch.stack(images[:-1]), torch.stack(images[1:])


def _layers(options: argparse.Namespace, say: Progress) -> None:
    model = load_model(DEIT)
    for dtype, claim in CLAIM.items():
        residual = null_vector_residual(model.network.patch_embed.proj.weight.to(dtype))
        print(f"largest entry of φW of unit null vectors in {dtype}: {residual:.1e} (claim {claim:g})")
    x, target = _photographs(model, options.images, torch.float32)
    free = require_operator(in_precision(model, torch.float64).module, model.image_size)
    moved = null_space_move(free, x.double(), (target - x).double(), eps=1.0, box=None)
    print(f"without a box, float64, ℓ2 1: largest entry of Aδ {float(moved.residual.max()):.1e}")
    collision = find_collision(model, x, directions(x, target))
    print(f"ℓ2 {_spread(collision.length)}, RMSE {_spread(collision.rmse)}, left {_spread(collision.left)}")
    print(markdown_table(layer_table(model, x, directions(x, target), say=say)))


def _outputs(options: argparse.Namespace, say: Progress) -> None:
    for name, layer, side, count in OUTPUTS:
        if options.only and options.only not in name:
            continue
        rows: list[Row] = []
        say(f"{name} at {layer or 'the first operator'}")
        start = time.perf_counter()
        model = in_precision(load_model(name, image_size=side), torch.float64)
        x, target = _photographs(model, min(count, options.images), torch.float64)
        row = {"model": name, "at": layer or "first operator"}
        try:
            collision = find_collision(model, x, target - x, layer=layer, steps=options.steps, say=say)
        except LipsimError as error:
            print(f"{name}: {error} ({time.perf_counter() - start:.0f} s)", flush=True)
            continue
        step = step_of_length(x, target - x, collision.length)
        row |= {"images": str(len(x)), "ℓ2": _spread(collision.length), "left": _spread(collision.left)}
        alone = zip(x.split(1), collision.x_adv.split(1), step.split(1), strict=True)
        found = [(output_differences(model.module, a, b), output_differences(model.module, a, c)) for a, b, c in alone]
        for output in found[0][0]:
            collided, straight = ([image[which][output] for image in found] for which in (0, 1))
            values = {"largest difference": mean_and_spread(collided), "straight": mean_and_spread(straight)}
            rows.append(row | {"output": output} | values)
        print(f"{markdown_table(rows)}\n\n{time.perf_counter() - start:.0f} s\n", flush=True)


def _transfer(options: argparse.Namespace, say: Progress) -> None:
    # One seed would make the filters of smaller networks the first of larger ones, and their kernels nested.
    models = [load_model(name, seed=seed) for seed, name in enumerate(SOURCES)]
    torch.manual_seed(0)
    linear = OrthogonalProjection().eval().requires_grad_(False)
    models.append(Model("OrthogonalProjection", linear, linear, linear.image_size))
    pairs = [_photographs(model, options.images, torch.float32) for model in models]
    images, targets = zip(*pairs, strict=True)
    others = [load_model(name) for name in TARGETS]
    found = transfer_matrix(models, images, targets, others=others, say=say)
    # The head of the mixer starts at zero, so that it answers everything alike.
    found = [cell for cell in found if cell.straight.any()]
    print(markdown_table(transfer_table(found)))
    nested = [load_model(name) for name in SOURCES[:2]]
    found_nested = transfer_matrix(nested[1:], images[1:2], targets[1:2], others=nested[:1], say=say)
    print(f"of one seed:\n{markdown_table(transfer_table(found_nested))}")
    seen = [cell for cell in found if cell.source != cell.model]
    less = sum(float((cell.change < cell.straight).float().sum()) for cell in seen)
    total = sum(len(cell.change) for cell in seen)
    print(f"of {total} collisions tried on another model {less:.0f} change its output less than the straight step does")


def _explanations(options: argparse.Namespace, say: Progress) -> None:
    model = load_model(DEIT)
    x, target = _photographs(model, min(options.images, 3), torch.float32)
    collision = find_collision(model, x, target - x, say=say)
    say("explaining")
    found = explanations_agree(model.module, x, collision.x_adv, steps=16)
    rows: list[Row] = [
        {"explanation": row.explanation, "collision": _spread(row.change), "noise": _spread(row.noise)} for row in found
    ]
    print(f"{len(x)} images")
    print(markdown_table(rows))


def _reach(options: argparse.Namespace, say: Progress) -> None:
    """What one deep collision of an ImageNet network costs: five steps behind the first block of DeiT-Tiny."""
    model = load_model(DEIT)
    x, target = _photographs(model, 1, torch.float32)
    features = features_up_to(model.module, "network.blocks.0")
    image = x.clone().requires_grad_(True)
    features(image).sum().backward()
    start = time.process_time()
    for _ in range(5):
        features(image).sum().backward()
    once = (time.process_time() - start) / 5
    start = time.process_time()

    def tell(message: str) -> None:
        say(message)
        print(f"{time.process_time() - start:.0f} s: {message}", flush=True)

    collision = find_collision(model, x, target - x, layer="blocks.0", steps=5, say=tell)
    whole = time.process_time() - start
    print(f"{whole:.0f} s, {whole / once:.0f} forward and backward passes; ℓ2 {float(collision.length[0]):.3g}")


def _spread(values: Tensor) -> str:
    return mean_and_spread(values.tolist(), 3)


if __name__ == "__main__":
    main()
