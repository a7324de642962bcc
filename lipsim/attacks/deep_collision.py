"""Collisions of deep features: images far apart that a network, or its part up to a layer, answers alike.

A feature map with fewer outputs than pixels has a kernel of its Jacobian at every image. Gauss-Newton walks along it:
a step within the kernel, then corrections that bring the features back to those of the image. What Li et al. 2019 find
by negative pre-activations, and what pooling discards, lies in that kernel too, since neither reaches the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lipsim.attacks.partial_pass import run_up_to
from lipsim.attacks.projections import Ball, Box, expand, sample_norm
from lipsim.utils.checks import taking_images
from lipsim.utils.errors import LipsimError

_MARGIN = 0.25  # of the box: pixels nearer to its border move in proportion to their room
_FROZEN = 0.02  # of the box: pixels nearer than that stay, as in attacks.null_space
_BORDER = 0.9  # of the way to the border of the box in one step
_TRIVIAL = 1e-3  # of the direction lies in the kernel: nothing worth a step
_DOUBTFUL = 0.1  # of it does, by conjugate gradients that were stopped early: worth to know better
_SHORTEST = 2.0**-8  # step, relative to what is left of the direction
_FULL = 0.999  # of the budget: corrections follow
_CORRECTIONS = 30  # of a step; where pooling changes its mind they get on slowly
_PROGRESS = 0.95  # of the residual may be left by a correction
# Residuals relative to the features. Conjugate gradients of a step in the kernel need not be exact: corrections follow.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}
_LOOSE, _TIGHT = 1e-2, 1e-8

Features = Callable[[Tensor], Tensor]


def features_up_to(model: nn.Module, layer: str | None = None) -> Features:
    """The output of a named layer as a function of the images; what follows the layer is not computed.

    Args:
        model: takes images.
        layer: path of a module in it, at its first call; None: the output of the whole model.

    Raises:
        ValueError: there is no such layer; and, when called, a layer that the model does not use or whose output is no
            tensor.
    """
    if layer is None:
        return lambda x: _tensor(model(x), type(model).__name__)
    modules = dict(model.named_modules())
    if layer not in modules:
        near = [name for name in modules if name.split(".")[0] == layer.split(".")[0]] or list(modules)
        raise LipsimError(f"there is no layer {layer}; among the layers are {', '.join(filter(None, near[:12]))}")
    return lambda x: _tensor(run_up_to(model, modules[layer], x), layer)


def _tensor(output: object, where: str) -> Tensor:
    if not isinstance(output, Tensor):
        raise LipsimError(
            f"expected a tensor from {where}, got {type(output).__name__}; name a layer inside whose output is one"
        )
    return output


class Linearization:
    """Features at ``x`` and their Jacobian ``J`` there, as products with vectors, for each sample of a batch.

    Products with ``J`` are derivatives of ``Jᵀy`` by ``y``, which needs second derivatives of the network and no
    forward-mode ones, and reuse one graph. Samples must not depend on each other, as in evaluation mode.

    Args:
        features: images ``(N, 3, H, W)`` to ``(N, …)``.
        x: where.

    Attributes:
        value: ``features(x)``, without a graph.
    """

    def __init__(self, features: Features, x: Tensor) -> None:
        with torch.enable_grad(), plain_attention():
            self._x = x.detach().clone().requires_grad_(True)
            self._output = features(self._x)
            if not self._output.requires_grad:
                raise LipsimError("the features do not depend on the images by anything that has a derivative")
            self._weight = torch.zeros_like(self._output, requires_grad=True)
            (self._pulled,) = torch.autograd.grad(self._output, self._x, self._weight, create_graph=True)
        self.value = self._output.detach()

    def vjp(self, y: Tensor) -> Tensor:
        """``Jᵀy``, of the shape of the images."""
        with plain_attention():
            return torch.autograd.grad(self._output, self._x, y, retain_graph=True)[0]

    def jvp(self, u: Tensor) -> Tensor:
        """``Ju``, of the shape of the features."""
        with plain_attention():
            try:
                return torch.autograd.grad(self._pulled, self._weight, u, retain_graph=True)[0]
            except RuntimeError as error:
                if "is not implemented" not in str(error):
                    raise
                reason = str(error).splitlines()[0]
                raise LipsimError(
                    f"expected features with second derivatives, got an operation without ({reason}); name a layer "
                    "before it"
                ) from error


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention by matrix products: the fused kernels have no second derivatives."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def deep_collision(
    features: Features,
    x: Tensor,
    direction: Tensor,
    *,
    steps: int = 60,
    eps: float | None = None,
    box: Box = (0.0, 1.0),
    tolerance: float | None = None,
    iterations: int = 200,
    say: Callable[[str], None] = lambda _: None,
) -> Tensor:
    """Walk from ``x`` towards ``x + direction`` among the images with the features of ``x``.

    At each image the step is the direction left, ``v − J⁺Jv``, and corrections ``−J⁺(f(x') − f(x))`` follow until the
    features are back; ``J⁺`` is the Jacobian's pseudoinverse by conjugate gradients on ``J Jᵀ``. Pixels near the border
    of the box move in proportion to their room, so that nothing is clipped. A step whose corrections fail is taken back
    and halved: so at a kink, where a unit that was on is off and has no derivative that could turn it on again. A unit
    that was off may move as it likes while it stays off; one that turns on is corrected back to the kink.

    A correction that is due counts as one of ``steps``, and each costs a forward pass, two backward ones and up to
    ``iterations`` products with ``J`` and ``Jᵀ``.

    Args:
        features: images to features ``(N, …)``, twice differentiable almost everywhere, such as
            :func:`features_up_to`; samples independent of each other.
        x: images ``(N, 3, H, W)`` inside the box; float64 for collisions exact to ``1e-10``.
        direction: like ``x``; ``target − x`` for a semantic collision, long noise for one that goes far.
        steps: Gauss-Newton steps.
        eps: ℓ2 budget; None: only the box limits.
        box: the range of valid images; None switches it off.
        tolerance: of ``‖f(x') − f(x)‖/‖f(x)‖``; None: 1e-10 in float64, 1e-6 in float32.
        iterations: of conjugate gradients, at most.
        say: hears how far the walk is.

    Returns:
        ``x_adv`` like ``x``, where the features agree within the tolerance; ``x`` itself where there is no way to go.

    Raises:
        ValueError: images outside the box or of another shape than the model takes, a direction unlike them, or
            features that depend on nothing or are none.
    """
    Ball(2, 0.0 if eps is None else eps, box).check(x)
    tolerance = tolerance or _TOLERANCE.get(x.dtype, 1e-6)
    budget = math.inf if eps is None else eps
    if direction.shape != x.shape:
        raise LipsimError(f"expected a direction like the images {tuple(x.shape)}, got {tuple(direction.shape)}")
    with torch.no_grad(), plain_attention(), taking_images("the model", x):
        wanted = features(x)
    if not isinstance(wanted, Tensor) or wanted.ndim < 2 or len(wanted) != len(x):
        got = f"shape {tuple(wanted.shape)}" if isinstance(wanted, Tensor) else f"a {type(wanted).__name__}"
        raise LipsimError(f"expected features ({len(x)}, …) of {len(x)} images, got {got}; choose another layer")
    size = sample_norm(wanted)
    size = torch.where(size > 0, size, torch.ones_like(size))
    goal = x + direction
    here, good = x.clone(), x.clone()
    rate, last = torch.ones_like(size), torch.full_like(size, math.inf)
    corrections, walking = torch.zeros_like(size), torch.ones_like(size, dtype=torch.bool)
    retreated = torch.zeros_like(walking)
    for number in range(steps + 1):
        rows = walking.nonzero().flatten()
        if not len(rows):
            break
        at = here[rows]
        line = Linearization(features, at)
        off = line.value - wanted[rows]
        residual = sample_norm(off) / size[rows]
        back = (residual <= tolerance) & (sample_norm(at - x[rows]) <= budget)
        good[rows[back]] = at[back]
        better = residual <= _PROGRESS * last[rows]  # False for NaN
        lost = ~back & (~better | (corrections[rows] >= _CORRECTIONS) | (residual <= tolerance))
        quick = back & ~retreated[rows] & (corrections[rows] <= 2)
        rate[rows] = torch.where(lost, rate[rows] / 2, torch.where(quick, (2 * rate[rows]).clamp(max=1), rate[rows]))
        retreated[rows] = lost
        # Of a step that is taken back nothing moves now; the next one starts where the features were right.
        here[rows] = at = torch.where(expand(lost, at), good[rows], at)
        if number == steps:
            break
        room = _room(at, box)
        forward = rate[rows] * back
        u = room * (goal[rows] - at) * expand(forward, at)
        due = line.jvp(room * u) + torch.where(expand(lost, off), 0.0, off)
        # The first correction may be as inexact as the step; later ones as they get on.
        accuracy = (residual / last[rows]).square().clamp(max=_LOOSE)
        accuracy = torch.where(torch.isfinite(last[rows]), accuracy, _LOOSE)
        accuracy = torch.maximum(accuracy, 0.3 * tolerance / residual).clamp(_TIGHT, _LOOSE)
        accuracy = torch.where(back, _LOOSE, accuracy)
        move = u - _least_norm(line, room, due, accuracy, iterations)
        tangent = sample_norm(move) / sample_norm(u).clamp(min=1e-38)
        doubtful = back & (tangent < _DOUBTFUL) if number else torch.ones_like(back)
        if doubtful.any():
            # Whether there is a kernel at all, or anything left of the way in it, tells an exact solution alone.
            exact = u - _least_norm(line, room, due, torch.where(doubtful, _TIGHT, 1.0), 5 * iterations)
            move = torch.where(expand(doubtful, move), exact, move)
            tangent = sample_norm(move) / sample_norm(u).clamp(min=1e-38)
        end = back & (tangent <= _TRIVIAL)
        delta = torch.where(expand(end, at), 0.0, room * move)
        share = torch.minimum(_within(at, delta, box), _affordable(at - x[rows], delta, _FULL * budget))
        here[rows] = at + expand(share, delta) * delta
        last[rows] = torch.where(back | lost, math.inf, residual)
        corrections[rows] = torch.where(back | lost, 0, corrections[rows] + 1)
        slow = (rate[rows] == 1) & (share * sample_norm(delta) <= _TRIVIAL * sample_norm(goal[rows] - at))
        spent = back & ((sample_norm(at - x[rows]) >= _FULL**2 * budget) | slow)
        walking[rows] = ~end & ~spent & (rate[rows] >= _SHORTEST)
        moved = float(sample_norm(good - x).mean())
        say(f"step {number + 1} of {steps}, {int(walking.sum())} of {len(x)} images on their way, ℓ2 {moved:.3g}")
    return good


def _room(x: Tensor, box: Box) -> Tensor:
    """How fast each pixel may move, from 0 at the border of the box to 1 well inside."""
    if box is None:
        return torch.ones_like(x)
    room = torch.minimum(x - box[0], box[1] - x) / (box[1] - box[0])
    return torch.where(room < _FROZEN, 0.0, (room / _MARGIN).clamp(max=1))


def _within(x: Tensor, delta: Tensor, box: Box) -> Tensor:
    """The share, at most 1, of a step after which every pixel keeps a part of its room."""
    if box is None:
        return x.new_ones(len(x))
    room = torch.where(delta > 0, box[1] - x, x - box[0])
    share = _BORDER * room / delta.abs().clamp(min=1e-38)
    share = torch.where(delta == 0, torch.inf, share)
    return share.flatten(1).amin(1).clamp(max=1)


def _affordable(gone: Tensor, delta: Tensor, budget: float) -> Tensor:
    """The share, at most 1, of a step that ends within an ℓ2 budget; what is beyond it already is left to it."""
    if budget == math.inf:
        return gone.new_ones(len(gone))
    a, b = _energy(delta), (gone * delta).flatten(1).sum(1)
    c = _energy(gone) - budget**2
    share = (-b + (b * b - a * c).clamp(min=0).sqrt()) / a.clamp(min=torch.finfo(a.dtype).tiny)
    return torch.where((c < 0) & (a > 0), share.clamp(0, 1), torch.ones_like(share))


def _least_norm(line: Linearization, room: Tensor, b: Tensor, accuracy: Tensor, iterations: int) -> Tensor:
    """The shortest ``u`` that solves ``J D u = b``, to a relative residual of each sample; ``D`` is ``room``.

    Conjugate gradients for least squares (CGLS), which also end where nothing solves it: at a unit that is off and
    should not be.
    """
    residual, u = b.clone(), torch.zeros_like(room)
    pulled = room * line.vjp(residual)
    direction, energy = pulled.clone(), _energy(pulled)
    stop, flat = _energy(b) * accuracy**2, energy * (accuracy * _TIGHT) ** 2
    for _ in range(iterations):
        running = (_energy(residual) > stop) & (energy > flat)
        if not running.any():
            break
        pushed = line.jvp(room * direction)
        curvature = _energy(pushed)
        going = running & (curvature > 0)
        step = torch.where(going, energy / torch.where(going, curvature, 1.0), 0.0)
        u = u + expand(step, u) * direction
        residual = residual - expand(step, b) * pushed
        pulled = room * line.vjp(residual)
        energy, previous = _energy(pulled), energy
        share = torch.where(going, energy / previous.clamp(min=torch.finfo(b.dtype).tiny), 0.0)
        direction = pulled + expand(share, u) * direction
    return u


def _energy(a: Tensor) -> Tensor:
    return a.square().flatten(1).sum(1)
