"""What looking for blind spots costs: a collision, nullity, a walk on a level set, beside the passes of the network.

    python benchmarks/blind_spots.py [--rounds 5] [--steps 40] [--only collision nullity traversal]

- Collision: one photograph of 224 × 224 pixels is moved towards another as far as the first operator of
  timm/vit_base_patch16_224 and the box allow (`attacks.null_space`). The baseline, 1.00, is one forward and backward
  pass of the whole network for one image. To find the operator (`attacks.first_operator`) is needed once a network. A
  patch embedding of ViT-B, 768 × 768, has no kernel with random weights; it gets one of 13 dimensions, as the published
  weights have.
- Nullity: all weights of torchvision/resnet50, and all its operators on images of 224 pixels. Seconds; the baseline is
  one forward and backward pass for one image.
- Traversal: `attacks.level_set` on the confidence of ResNet-18 for 8 images of 64 pixels, and on a distance of the
  bundled metrics for 8 photographs of that size, networks whose passes are short; both rules, beside the very forward
  and backward passes that the walk makes, counted by its objective and made again alone.

One thread, processor time; each round runs baseline and case in turn, ratios are medians of the rounds. Two minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lipsim
from lipsim.analysis.models import load_model
from lipsim.analysis.nullity import nullity
from lipsim.analysis.operator_kernels import operator_kernels
from lipsim.attacks import ConfidenceObjective, DistanceObjective, first_operator, level_set, null_space
from lipsim.attacks.objectives import Objective
from lipsim.data.builtin.photographs import load_photograph

_KERNEL = 13  # dimensions, of the published weights of ViT-B/16


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="of a walk (%(default)s)")
    cases = {"collision": _collisions, "nullity": _nullity, "traversal": _walks}
    parser.add_argument("--only", nargs="+", choices=list(cases), default=list(cases))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| case | seconds | times the baseline |\n| --- | ---: | ---: |")
    for name in options.only:
        cases[name](options)


def _collisions(options: argparse.Namespace) -> None:
    model = load_model("timm/vit_base_patch16_224")
    with torch.no_grad():
        weight = model.network.patch_embed.proj.weight
        weight[-_KERNEL:] = weight[:_KERNEL]
    x, target = _photograph("astronaut", 224), _photograph("coffee", 224)
    operator = first_operator(model.module, 224)
    assert operator is not None
    collision = null_space(operator, x, target - x)
    seen = operator.forward(collision - x).norm() / operator.forward(target - x).norm()
    cases: dict[str, Callable[[], object]] = {
        "finding the first operator of ViT-B/16": lambda: first_operator(model.module, 224),
        "a semantic collision of one image": lambda: null_space(operator, x, target - x),
    }
    _table("one forward and backward pass of ViT-B/16", lambda: _pass(model.module, x), cases, options.rounds)
    print(f"\nthe collision is {(collision - x).norm():.2f} away in ℓ2, and the operator sees {seen:.0e} of it\n")


def _nullity(options: argparse.Namespace) -> None:
    model = load_model("torchvision/resnet50")
    x = _photograph("astronaut", 224)
    cases: dict[str, Callable[[], object]] = {
        "nullity of ResNet-50, its weights": lambda: nullity(model.network),
        "its operators": lambda: operator_kernels(model.module, 224),
        "both": lambda: (nullity(model.network), operator_kernels(model.module, 224)),
    }
    _table("one forward and backward pass of ResNet-50", lambda: _pass(model.module, x), cases, options.rounds)


def _walks(options: argparse.Namespace) -> None:
    network = load_model("torchvision/resnet18", image_size=64, num_classes=10).module
    x = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = network(x).argmax(1)
    photographs = torch.cat([_photograph(name, 64) for name in ("astronaut", "coffee", "chelsea", "rocket")] * 2)
    cases: dict[str, tuple[Tensor, Callable[[], Objective]]] = {
        "ResNet-18": (x, lambda: ConfidenceObjective(network, labels, x, drop=0.05)),
        **{
            f"the bundled metric {metric}": (
                photographs,
                lambda metric=metric: DistanceObjective(lipsim.load(metric), photographs, threshold=0.03),
            )
            for metric in ("quickstart", "photos")
        },
    }
    for name, (images, objective) in cases.items():
        for newton, rule in ((False, "published"), (True, "Newton-corrected")):
            _walk(name, rule, objective(), images, newton, options)


def _walk(name: str, rule: str, objective: Objective, x: Tensor, newton: bool, options: argparse.Namespace) -> None:
    def walk(objective: Objective) -> Tensor:
        return level_set(objective, x, x.flip(0), steps=options.steps, newton=newton)

    counted = _Counted(objective)
    walk(counted)
    calls = counted.calls
    cases: dict[str, Callable[[], object]] = {f"traversal on {name}, {rule} rule": lambda: walk(objective)}
    label = f"{len(calls)} forward and {sum(backward for _, _, backward in calls)} backward passes alone"
    _table(label, lambda: _again(objective, x, calls), cases, options.rounds)


class _Counted:
    """An objective that notes of each call how many images it had, and whether it was differentiated.

    A call is ``[images, graph kept, backward pass made]``.
    """

    def __init__(self, objective: Objective, calls: list[list[int]] | None = None) -> None:
        self.objective, self.calls = objective, [] if calls is None else calls

    def __call__(self, x: Tensor) -> Tensor:
        call = [len(x), int(torch.is_grad_enabled() and x.requires_grad), 0]
        self.calls.append(call)
        value = self.objective(x)
        if value.requires_grad:
            value.register_hook(lambda _: call.__setitem__(2, 1))
        return value

    def select(self, rows: Tensor) -> _Counted:
        """The same of some of the images, noted in the same list."""
        return _Counted(self.objective.select(rows), self.calls)


def _again(objective: Objective, x: Tensor, calls: list[list[int]]) -> None:
    """The passes of a walk, without the walk."""
    for count, graph, backward in calls:
        images = x[:count].clone().requires_grad_(bool(graph))
        part = objective if count == len(x) else objective.select(torch.arange(count))
        with torch.set_grad_enabled(bool(graph)):
            value = part(images).sum()
        if backward:
            torch.autograd.grad(value, images)


def _pass(network: nn.Module, x: Tensor) -> None:
    x = x.clone().requires_grad_(True)
    torch.autograd.grad(network(x).sum(), x)


def _photograph(name: str, size: int) -> Tensor:
    image = torch.from_numpy(load_photograph(name).copy()).permute(2, 0, 1)[None]
    side = min(image.shape[-2:])
    return F.interpolate(image[..., :side, :side], (size, size), mode="bilinear", antialias=True).clamp(0, 1)


def _table(name: str, baseline: Callable[[], object], cases: dict[str, Callable[[], object]], rounds: int) -> None:
    """A row for the baseline and for each case: median seconds, and the median ratio to the baseline of the round."""
    parts = {name: baseline, **cases}
    for part in parts.values():
        part()  # warm
    seconds: dict[str, list[float]] = {label: [] for label in parts}
    for _ in range(rounds):
        for label, part in parts.items():
            start = time.process_time()
            part()
            seconds[label].append(time.process_time() - start)
    for label, values in seconds.items():
        ratio = statistics.median(value / own for value, own in zip(values, seconds[name], strict=True))
        print(f"| {label} | {statistics.median(values):.3f} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
