"""Images that a model cannot tell apart: found exactly, followed layer by layer, and tried on other models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipsim.analysis.models import Model, named_outputs
from lipsim.analysis.operator_kernels import operator_kernel
from lipsim.attacks import deep_collision, features_up_to, first_operator
from lipsim.attacks.null_space import null_space_move
from lipsim.attacks.projections import sample_norm
from lipsim.results.tables import Row
from lipsim.utils.errors import LipsimError
from lipsim.utils.precision import full_precision
from lipsim.utils.sampling import sample_normal

OUTPUT = "output"  # a "layer" that stands for everything the model answers
CLAIM = {torch.float32: 1e-7, torch.float64: 1e-15}  # largest residual of φW (Ozbulak et al., §6)


@dataclass(frozen=True)
class Collision:
    """Images and others that a model, or its part up to a layer, answers alike.

    Attributes:
        x: images ``(N, 3, S, S)``.
        x_adv: what collides with them; ``x`` where nothing does.
        goal: where the walk went to, which may lie outside the box.
        layer: its output agrees; :data:`OUTPUT` for the output of the model.
        exact: by projection onto the kernel of the first linear operator, and not by Gauss-Newton.
        residual: ``(N,)``, change of that output relative to it, ℓ2.
    """

    x: Tensor
    x_adv: Tensor
    goal: Tensor
    layer: str
    exact: bool
    residual: Tensor

    @property
    def length(self) -> Tensor:
        """``(N,)``, ℓ2 norm of the change."""
        return sample_norm(self.x_adv - self.x)

    @property
    def rmse(self) -> Tensor:
        """``(N,)``, root mean square of the change, in [0, 1] pixels."""
        rmse: Tensor = self.length / self.x[0].numel() ** 0.5
        return rmse

    @property
    def left(self) -> Tensor:
        """``(N,)``, distance to the goal that is left, of the distance from the image."""
        share: Tensor = sample_norm(self.goal - self.x_adv) / sample_norm(self.goal - self.x).clamp(min=1e-38)
        return share


def output_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """All that a model answers as one tensor ``(N, D)``, also of several heads or of a segmenter.

    Raises:
        ValueError: when called, answers that are not one for each image, as those of detectors.
    """

    def features(x: Tensor) -> Tensor:
        parts = [part for part in named_outputs(module(x)).values() if part.is_floating_point()]
        if not parts or any(part.ndim == 0 or len(part) != len(x) for part in parts):
            raise LipsimError("expected outputs with a row for each image; name a layer whose output is one")
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    return features


def find_collision(
    model: Model,
    x: Tensor,
    direction: Tensor,
    *,
    layer: str | None = None,
    steps: int = 60,
    eps: float | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Collision:
    """Collide images with others in a direction: exactly in the first operator, or by Gauss-Newton at a layer.

    Args:
        model: of the dtype of the images.
        x: images ``(N, 3, S, S)`` in [0, 1].
        direction: like ``x``; ``target − x``, or noise.
        layer: path of a module of the model, or :data:`OUTPUT`; None: the kernel of the first linear operator.
        steps: of Gauss-Newton.
        eps: ℓ2 budget; None: only the box limits.
        say: hears how far it is.

    Raises:
        ValueError: no linear operator, a trivial kernel, or no such layer.
    """
    with full_precision():
        if layer is None:
            say("looking for the first linear operator")
            operator = first_operator(model.module, model.image_size)
            if operator is None:
                raise LipsimError(f"{model.name} has no linear first operator; give --layer to look deeper")
            trivial = LipsimError(
                f"{_plain(operator.name)} of {model.name} has a trivial kernel; give --layer to look deeper "
                f"(--layer {OUTPUT}: the whole model)"
            )
            if _sees_everything(model, operator.name):
                raise trivial
            move = null_space_move(operator, x, direction, eps=eps)
            if move.trivial.all():
                raise trivial
            x_adv = move.x_adv
            if not move.length.any():
                raise LipsimError(
                    f"{_plain(operator.name)} of {model.name} has a kernel, in which nothing was found to move: the "
                    "box leaves no room, or conjugate gradients got nowhere; give --layer to look deeper"
                )
            name, features = _plain(operator.name), operator.forward
        else:
            features, name = _layer(model, layer), layer
            x_adv = deep_collision(features, x, direction, steps=steps, eps=eps, say=say)
            if torch.equal(x_adv, x):
                raise LipsimError(
                    f"nothing was found that collides at {layer} of {model.name}; give a deeper --layer or more --steps"
                )
        with torch.no_grad():
            before, after = features(x), features(x_adv)
    residual = sample_norm(after - before) / sample_norm(before).clamp(min=1e-38)
    return Collision(x, x_adv, x + direction, name, layer is None, residual)


def _sees_everything(model: Model, name: str) -> bool:
    """Whether the first operator is a convolution of the whole image that is known to have no kernel."""
    layer = dict(model.module.named_modules())[name]
    if not isinstance(layer, nn.Conv2d):
        return False
    sizes: list[torch.Size] = []
    hook = layer.register_forward_pre_hook(lambda _layer, inputs: sizes.append(inputs[0].shape[1:]))
    side = model.image_size
    try:
        with torch.no_grad():
            model.module(torch.zeros(1, 3, side, side).to(layer.weight))
    finally:
        hook.remove()
    try:
        return sizes[0] == (3, side, side) and operator_kernel(layer, (side, side)).high == 0
    except LipsimError:  # more than a convolution, so not known
        return False


def _layer(model: Model, layer: str) -> Callable[[Tensor], Tensor]:
    """The features at a layer by its path in the network, or in what normalises its input as well."""
    if layer == OUTPUT:
        return output_of(model.module)
    wrapped = f"network.{layer}"
    return features_up_to(model.module, wrapped if wrapped in dict(model.module.named_modules()) else layer)


def _plain(name: str) -> str:
    return name.removeprefix("network.")


def directions(x: Tensor, target: Tensor | None = None, seed: int = 0) -> Tensor:
    """Where to: to a target image, or noise that does not end before the box does."""
    return sample_normal(x, seed=seed) if target is None else target - x


def step_of_length(x: Tensor, direction: Tensor, length: Tensor) -> Tensor:
    """Images a straight step of a given ℓ2 length away, what a collision is to be compared with.

    The step is clipped to the box, and longer before by what that takes away; where the box ends before, it is as long
    as it can be.

    Args:
        x: images ``(N, 3, H, W)`` in [0, 1].
        direction: like ``x``: ``target − x``, or noise.
        length: ``(N,)``.
    """
    unit = direction / sample_norm(direction).clamp(min=1e-38).view(-1, 1, 1, 1)
    low, high = torch.zeros_like(length), torch.full_like(length, 100.0 * x[0].numel() ** 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        short = sample_norm((x + middle.view(-1, 1, 1, 1) * unit).clamp(0, 1) - x) < length
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return (x + high.view(-1, 1, 1, 1) * unit).clamp(0, 1)


def output_differences(module: nn.Module, x: Tensor, x_adv: Tensor) -> dict[str, float]:
    """Largest absolute difference of everything a model answers, by the name of each output.

    Classes, masks, boxes and scores alike; ∞ where the shapes differ, as of detectors that find another number of
    boxes.
    """
    with torch.no_grad(), full_precision():
        before, after = named_outputs(module(x)), named_outputs(module(x_adv))
    return {
        name: _largest(before[name], after[name]) if name in before and name in after else float("inf")
        for name in sorted(before.keys() | after.keys())
    }


def _largest(before: Tensor, after: Tensor) -> float:
    if before.shape != after.shape:
        return float("inf")
    return float((after.double() - before.double()).abs().max()) if before.numel() else 0.0


@dataclass(frozen=True)
class LayerDifference:
    """How far a layer's outputs for two batches of images are apart.

    Attributes:
        name: path of the layer.
        kind: its class.
        absolute: largest absolute difference.
        relative: that, relative to the largest absolute value.
    """

    name: str
    kind: str
    absolute: float
    relative: float


def layer_differences(module: nn.Module, x: Tensor, x_adv: Tensor) -> list[LayerDifference]:
    """Compare the outputs of all layers without children, in the order of their calls, and of the whole model at last.

    Keeps the outputs for ``x``, about as much memory as a training pass takes.
    """
    kept: list[tuple[str, str, list[Tensor]]] = []
    found: list[LayerDifference] = []

    def keep(name: str, layer: nn.Module, output: object) -> None:
        kept.append((name, type(layer).__name__, [tensor.clone() for tensor in _tensors(output)]))

    def compare(name: str, layer: nn.Module, output: object) -> None:
        if len(found) == len(kept) or kept[len(found)][0] != name:
            raise LipsimError(f"the model called its layer {name} for one image and not for the other")
        tensors = _tensors(output)
        pairs = list(zip(kept[len(found)][2], tensors, strict=False))
        absolute = max((_largest(before, after) for before, after in pairs), default=0.0)
        size = max((float(before.abs().max()) for before, _ in pairs if before.numel()), default=0.0)
        found.append(LayerDifference(_plain(name), type(layer).__name__, absolute, absolute / size if size else 0.0))

    with torch.no_grad(), full_precision():
        for images, look in ((x, keep), (x_adv, compare)):
            hooks = [
                layer.register_forward_hook(partial(_look, look, name))
                for name, layer in module.named_modules()
                if not any(True for _ in layer.children()) or layer is module
            ]
            try:
                module(images)
            finally:
                for hook in hooks:
                    hook.remove()
    return [*found[:-1], LayerDifference(OUTPUT, found[-1].kind, found[-1].absolute, found[-1].relative)]


def _look(
    look: Callable[[str, nn.Module, object], None], name: str, layer: nn.Module, _in: object, out: object
) -> None:
    look(name, layer, out)


def _tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        return [tensor for value in output.values() for tensor in _tensors(value)]
    if isinstance(output, list | tuple):
        return [tensor for value in output for tensor in _tensors(value)]
    return []


def in_precision(model: Model, dtype: torch.dtype) -> Model:
    """A copy of a model in another precision."""
    network, module = copy.deepcopy((model.network, model.module))
    return Model(model.name, network.to(dtype), module.to(dtype), model.image_size, model.resize, model.framing)


def layer_table(
    model: Model,
    x: Tensor,
    direction: Tensor,
    *,
    layer: str | None = None,
    eps: float | None = None,
    steps: int = 60,
    say: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Differences of every layer under a collision found in float32, and one found in float64, side by side.

    The paper claims that φW lies in [0, 1e-7] in single and [0, 1e-15] in double precision; whether it grows on the way
    to the output is what this table is for. Of several images a cell has the mean and half of what they are apart.

    Args:
        model: any.
        x: images ``(N, 3, S, S)`` in [0, 1].
        direction: where they move, see :func:`directions`.
        layer: as in :func:`find_collision`, and so are the budget ``eps`` and the number of ``steps``.
        eps: ℓ2 budget; None: as far as the box allows.
        steps: of Gauss-Newton.
        say: hears how far it is.

    Raises:
        ValueError: nothing was found that collides in one of the precisions, which the message names.
    """
    found: dict[torch.dtype, list[list[LayerDifference]]] = {}
    for dtype in CLAIM:
        own = in_precision(model, dtype)
        precision = str(dtype).removeprefix("torch.")
        try:
            collision = find_collision(
                own, x.to(dtype), direction.to(dtype), layer=layer, eps=eps, steps=steps, say=say
            )
        except LipsimError as error:
            raise LipsimError(f"in {precision}: {error}") from error
        say(f"layers in {precision}")
        pairs = zip(collision.x.split(1), collision.x_adv.split(1), strict=True)
        found[dtype] = [layer_differences(own.module, *pair) for pair in pairs]
    rows: list[Row] = []
    for single, double in zip(
        zip(*found[torch.float32], strict=True), zip(*found[torch.float64], strict=True), strict=True
    ):
        rows.append(
            {
                "layer": single[0].name,
                "kind": single[0].kind,
                "float32": _cell([image.absolute for image in single]),
                "relative": _cell([image.relative for image in single]),
                "float64": _cell([image.absolute for image in double]),
                "relative ": _cell([image.relative for image in double]),
            }
        )
    return rows


def _cell(values: Sequence[float]) -> str:
    return f"{values[0]:.1e}" if len(values) == 1 else mean_and_spread(values)


def null_vector_residual(weight: Tensor) -> float | None:
    """Largest entry of ``φW`` for unit null vectors φ of an unfolded weight, in its precision; None without a kernel.

    What the paper's §6 says to be below 1e-7 in single and 1e-15 in double precision.
    """
    matrix = weight.detach().flatten(1)
    values, rows = torch.linalg.svd(matrix, full_matrices=True)[1:]
    cut = max(matrix.shape) * torch.finfo(torch.float32).eps * float(values[0])
    null = rows[int((values > cut).sum()) :]
    return float((matrix @ null.T).abs().max()) if len(null) else None


@dataclass(frozen=True)
class Transfer:
    """What collisions made on one model do to another.

    Attributes:
        source: the model they were made on.
        at: the layer that they agree in.
        model: the one they were tried on.
        change: ``(N,)``, of its output, relative.
        straight: ``(N,)``, the same after a straight step of the same length towards the target, or along the noise.
    """

    source: str
    at: str
    model: str
    change: Tensor
    straight: Tensor


def transfer_matrix(
    models: Sequence[Model],
    images: Sequence[Tensor],
    targets: Sequence[Tensor] | None = None,
    *,
    others: Sequence[Model] = (),
    steps: int = 60,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> list[Transfer]:
    """Make collisions on each model and try them on all.

    Exact ones in the kernel of the first operator where it has one, and of the output otherwise. A model of another
    input size gets both images resized (bicubic, antialiased), as it would get files.

    Args:
        models: of the dtype of the images.
        images: for each model, ``(N, 3, S, S)`` in [0, 1] of its size.
        targets: the same; None: noise.
        others: models to try them on alone.
        steps: of Gauss-Newton.
        seed: of noise.
        say: hears how far it is.
    """
    found = []
    for number, source in enumerate(models):
        say(f"collisions of {source.name}")
        x = images[number]
        direction = directions(x, None if targets is None else targets[number], seed)
        collision = _collision_of(source, x, direction, steps, say)
        step = step_of_length(x, direction, collision.length)
        for model in [*models, *others]:
            clean, collided, stepped = (_resized(part, model.image_size) for part in (x, collision.x_adv, step))
            features = output_of(model.module)
            with torch.no_grad(), full_precision():
                before = features(clean)
                size = sample_norm(before).clamp(min=1e-38)
                change, straight = (sample_norm(features(part) - before) / size for part in (collided, stepped))
            found.append(Transfer(source.name, collision.layer, model.name, change, straight))
    return found


def _collision_of(model: Model, x: Tensor, direction: Tensor, steps: int, say: Callable[[str], None]) -> Collision:
    try:
        return find_collision(model, x, direction, say=say)
    except LipsimError:
        return find_collision(model, x, direction, layer=OUTPUT, steps=steps, say=say)


def _resized(x: Tensor, size: int) -> Tensor:
    if x.shape[-1] == size:
        return x
    return F.interpolate(x, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)


def transfer_table(found: Sequence[Transfer]) -> list[Row]:
    """A row for each model that collisions were made on, a column for each they were tried on.

    Cells are the relative change of the output, its mean over the images and half of what these are apart, and in
    brackets the mean after a straight step of the same length.
    """
    rows: dict[str, dict[str, str]] = {}
    for cell in found:
        row = rows.setdefault(cell.source, {"made on": cell.source, "at": cell.at})
        row[cell.model] = f"{mean_and_spread(cell.change.tolist())} ({float(cell.straight.mean()):.2g})"
    return list(rows.values())


def mean_and_spread(values: Sequence[float], digits: int = 2) -> str:
    """The mean to some significant digits, and half of what the values are apart to one less."""
    mean, spread = sum(values) / len(values), (max(values) - min(values)) / 2
    return f"{mean:.{digits}g} ± {spread:.{digits - 1}g}"
