"""Null-space perturbations: changes of the image that a model's first linear operator cannot see.

Ozbulak et al., "Exact Feature Collisions in Neural Networks". The published construction tiles one null vector of the
unfolded kernel, which is exact only where the stride equals the kernel. Here the change is projected onto the kernel of
the operator itself, for every stride and padding, and within the box of valid images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lipsim.attacks.first_operator import FirstOperator
from lipsim.attacks.kernel_projection import Rows, Traced, nearest_in_kernel, project_to_kernel, walk_in_kernel
from lipsim.attacks.kernel_splitting import split_in_kernel
from lipsim.attacks.objectives import Objective
from lipsim.attacks.projections import Ball, Box, Norm, check_norm, expand, sample_norm
from lipsim.utils.errors import LipsimError

_SATURATED = 0.02  # of the box
_TRIVIAL = 1e-3  # share of a direction below which a kernel holds nothing but what rounding left of it
# What the operator may see of a change, relative to what it sees of the direction: Newton's aim, and what is accepted.
_EXACT = {torch.float64: (1e-9, 1e-6), torch.float32: (1e-6, 1e-5)}
_PATIENCE = 20  # times the iterations of conjugate gradients where the usual number is not enough
_NEWTON = 12  # steps
_FEW = 64  # dimensions of a kernel up to which walking in it is cheaper than solving for the nearest point


@dataclass(frozen=True)
class Region:
    """A part of an image to be changed.

    Attributes:
        top: first row.
        left: first column.
        height: of the region, in pixels.
        width: the same.
        strength: in (0, 1]: how much of the direction, and of the room in the box, the change may take.
        direction: ``(3, H, W)`` or ``(N, 3, H, W)``, of the size of the whole image; None: that of all regions.
    """

    top: int
    left: int
    height: int
    width: int
    strength: float = 1.0
    direction: Tensor | None = None


@dataclass(frozen=True)
class NullSpaceMove:
    """Images that moved where an operator cannot see it.

    Attributes:
        x_adv: ``(N, 3, H, W)``, the images.
        length: ``(N,)`` ℓ2 lengths of the changes.
        residual: ``(N,)`` largest absolute value of ``A δ``, of the change as it was rounded into the image.
        relative: ``(N,)`` what the operator sees of the change, relative to what it sees of an equally long piece of
            the direction; 0 where nothing moved.
        trivial: ``(N,)`` bool: where the kernel holds nothing of the direction, so that nothing moved. (Where nothing
            moved without this, the direction is 0, the box leaves no room, or convergence did not get there.)
        before: ``(N,)`` an attack's objective without the change; None where there is no attack.
        after: the same with it: still positive where it was.
    """

    x_adv: Tensor
    length: Tensor
    residual: Tensor
    relative: Tensor
    trivial: Tensor
    before: Tensor | None = None
    after: Tensor | None = None

    def __str__(self) -> str:
        if bool(self.trivial.all()):
            return "the first operator sees everything: its kernel is trivial, and nothing moved"
        if not bool(self.length.any()):
            return (
                "nothing moved: the direction is 0, the box leaves no room in the kernel, or conjugate gradients did "
                "not find it"
            )
        lengths = ", ".join(f"{length:.4g}" for length in self.length.tolist())
        text = (
            f"moved by ‖δ‖₂ = {lengths}; the first operator sees at most {float(self.residual.max()):.1e} of it "
            f"({float(self.relative.max()):.1e} of what it would see of such a change elsewhere)"
        )
        if self.before is not None and self.after is not None:
            flipped, kept = self.before > 0, (self.before > 0) & (self.after > 0)
            text += f"; {int(kept.sum())} of {int(flipped.sum())} broken answers stay broken"
        return text


def null_space(
    operator: FirstOperator | Callable[[Tensor], Tensor],
    x: Tensor,
    direction: Tensor,
    *,
    eps: float | None = None,
    box: Box = (0.0, 1.0),
    regions: Sequence[Region] | None = None,
    iterations: int = 200,
) -> Tensor:
    """Images nearest to ``x + direction`` that ``operator`` cannot tell from ``x``: see :func:`null_space_move`.

    Example:
        >>> from torch import nn
        >>> from lipsim.attacks import first_operator
        >>> patches = nn.Conv2d(3, 4, 2, stride=2).double().requires_grad_(False)
        >>> x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
        >>> moved = null_space(first_operator(patches, 8), x, torch.randn_like(x))
        >>> bool((moved - x).norm() > 0.5), bool((patches(moved) - patches(x)).norm() < 1e-7)
        (True, True)
    """
    return null_space_move(operator, x, direction, eps=eps, box=box, regions=regions, iterations=iterations).x_adv


@torch.no_grad()
def null_space_move(
    operator: FirstOperator | Callable[[Tensor], Tensor],
    x: Tensor,
    direction: Tensor,
    *,
    eps: float | None = None,
    box: Box = (0.0, 1.0),
    regions: Sequence[Region] | None = None,
    iterations: int = 200,
) -> NullSpaceMove:
    """Move to the point nearest to ``x + direction`` that ``operator`` cannot tell from ``x``.

    Clipping would destroy exactness. The box is a constraint of the projection instead
    (:func:`lipsim.attacks.kernel_projection.nearest_in_kernel`), and saturated pixels move inwards only. Where too many
    are for that to converge, :func:`lipsim.attacks.kernel_splitting.split_in_kernel` finds a point nearly as near, and
    what it may leave of an image is moved in proportion to each pixel's room; both are exact too. Patch embeddings are
    solved patch by patch, in float64.

    Args:
        operator: linear map ``A`` of changes of images, such as :func:`lipsim.attacks.first_operator` finds.
        x: images ``(N, 3, H, W)`` inside the box.
        direction: ``(N, 3, H, W)``: normal noise for a texture (:func:`lipsim.utils.sampling.sample_normal`),
            ``target − x`` for a collision that looks like the target.
        eps: ℓ2 budget, to which a longer change is shortened; without a box the change has this length.
        box: the range of valid images; None needs ``eps``.
        regions: what of the image may change, the later of two on top; None: all of it.
        iterations: of conjugate gradients.

    Raises:
        ValueError: neither ``eps`` nor ``box`` limits the perturbation, images that the operator does not take or
            outside the box, or a region outside the image.
    """
    if eps is None and box is None:
        raise LipsimError("expected a budget eps where there is no box")
    _check(operator, x, direction)
    ball = Ball(2, 0.0 if eps is None else eps, box)
    ball.check(x)
    direction, strength = _local(x, direction, regions)
    low, high = _bounds(x, box, strength)
    delta, trivial = _project(operator, direction, low, high, strength, box is not None, iterations)
    if eps is not None:
        length = sample_norm(delta)
        scale = eps / length.clamp(min=torch.finfo(x.dtype).tiny)
        delta = delta * expand(scale if box is None else scale.clamp(max=1), delta)
        delta = torch.where(expand(trivial, delta), 0.0, delta)
    moved = x + delta if box is None else (x + delta).clamp(*box)
    if eps is not None:
        moved = ball.round_inward(moved, x, delta)
    return _outcome(operator, x, moved, direction, trivial)


@torch.no_grad()
def null_space_after(
    operator: FirstOperator | Callable[[Tensor], Tensor],
    objective: Objective,
    x: Tensor,
    x_adv: Tensor,
    direction: Tensor,
    *,
    eps: float,
    norm: Norm = 2,
    box: Box = (0.0, 1.0),
    iterations: int = 200,
) -> NullSpaceMove:
    """Move an adversarial image within what its attack has left of budget and box (Ozbulak et al., Eq. 7).

    What the attack spent inside the kernel is taken back first, since it turned nothing around. The answer that the
    attack has flipped stays flipped, for the operator cannot see the move; where rounding undoes it (a margin of a few
    digits), the image stays as the attack has left it.

    Args:
        operator: as in :func:`null_space_move`.
        objective: of the attack, positive where it broke the answer.
        x: clean images ``(N, 3, H, W)``.
        x_adv: what the attack made of them, within ``eps`` and the box.
        direction: ``(N, 3, H, W)``, from the clean images: noise, or ``target − x``.
        eps: budget of attack and move together.
        norm: 2 or "inf".
        box: the range of valid images; None: all of ℝⁿ.
        iterations: of conjugate gradients.

    Raises:
        ValueError: ℓ0, images that the operator does not take, or an attack outside its budget or the box.
    """
    check_norm(norm)
    if norm == 0:
        raise LipsimError("expected norm 2 or 'inf', got 0: a change that an operator cannot see takes many pixels")
    _check(operator, x, direction)
    _check(operator, x_adv, direction)
    ball = Ball(norm, eps, box)
    ball.check(x_adv)
    spent = float(sample_norm(x_adv - x, norm).max())
    if spent > eps * (1 + 1e-5) + 1e-7:
        raise LipsimError(f"expected attacked images within the budget eps {eps:g}, got a change of {spent:.6g}")
    strength = torch.ones_like(x[:, :1])
    low, high = _bounds(x_adv, box, strength)
    bounded = box is not None or norm == "inf"
    if norm == "inf":
        attack = x_adv - x
        low = torch.maximum(low, -eps - attack).clamp(max=0)
        high = torch.minimum(high, eps - attack).clamp(min=0)
    aimed = x + direction - x_adv
    delta, trivial = _project(operator, aimed, low, high, strength, bounded, iterations)
    if norm == 2:
        back, _ = _project(operator, x - x_adv, low, high, strength, bounded, iterations)
        # Where many values are at the ends of the box, what was found inside it may be longer than what it takes back.
        shorter = sample_norm(x_adv + back - x) <= sample_norm(x_adv - x)
        back = torch.where(expand(shorter, x), back, 0.0)
        delta = back + expand(_longest(x_adv + back - x, delta - back, eps), x) * (delta - back)
    moved = x_adv + delta if box is None else (x_adv + delta).clamp(*box)
    moved = ball.round_inward(moved, x, x_adv - x + delta)
    before, after = objective(x_adv), objective(moved)
    undone = (before > 0) & ~(after > 0)
    moved = torch.where(expand(undone, moved), x_adv, moved)
    found = _outcome(operator, x_adv, moved, aimed, trivial)
    return NullSpaceMove(
        moved, found.length, found.residual, found.relative, trivial, before, torch.where(undone, before, after)
    )


def _check(operator: FirstOperator | Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> None:
    if isinstance(operator, FirstOperator):
        operator.check(x)
    if direction.shape != x.shape:
        raise LipsimError(f"expected a direction for each image, {tuple(x.shape)}, got {tuple(direction.shape)}")


def _local(x: Tensor, direction: Tensor, regions: Sequence[Region] | None) -> tuple[Tensor, Tensor]:
    """The direction with its strength, and the strength ``(N, 1, H, W)`` of each pixel, 0 outside all regions."""
    if regions is None:
        return direction, torch.ones_like(x[:, :1])
    strength, found = torch.zeros_like(x[:, :1]), torch.zeros_like(x)
    for r in regions:
        inside = 0 <= r.top < r.top + r.height <= x.shape[-2] and 0 <= r.left < r.left + r.width <= x.shape[-1]
        if not inside or not 0 < r.strength <= 1:
            raise LipsimError(
                f"expected regions inside {x.shape[-2]} x {x.shape[-1]} pixels with a strength in (0, 1], got top "
                f"{r.top}, left {r.left}, height {r.height}, width {r.width}, strength {r.strength:g}"
            )
        rows, columns = slice(r.top, r.top + r.height), slice(r.left, r.left + r.width)
        own = direction if r.direction is None else r.direction.to(x).expand_as(x)
        strength[..., rows, columns] = r.strength
        found[..., rows, columns] = r.strength * own[..., rows, columns]
    return found, strength


def _bounds(x: Tensor, box: Box, strength: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest change of each value; 0 where nothing may change."""
    if box is None:
        high = torch.where(strength > 0, torch.inf, 0.0).to(x).expand_as(x)
        return -high, high
    return (strength * (box[0] - x)).clamp(max=0), (strength * (box[1] - x)).clamp(min=0)


def _project(
    operator: FirstOperator | Callable[[Tensor], Tensor],
    direction: Tensor,
    low: Tensor,
    high: Tensor,
    strength: Tensor,
    bounded: bool,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """Changes in the kernel within the bounds nearest to the direction, and where the kernel holds none ``(N,)``."""
    if isinstance(operator, FirstOperator) and operator.dtype is None and direction.dtype != torch.float64:
        # Exact to float64's rounding at the price of the first layer in float64.
        v, least, most, share = (tensor.double() for tensor in (direction, low, high, strength))
        delta, trivial = _project(operator, v, least, most, share, bounded, iterations)
        return delta.to(direction), trivial
    if isinstance(operator, FirstOperator) and operator.patches is not None:
        delta = _by_patches(operator, direction, low, high)
        trivial = torch.full_like(delta[:, 0, 0, 0], len(operator.patches.unseen) == 0, dtype=torch.bool)
        return delta, trivial & (sample_norm(delta) == 0)
    return _by_images(operator, direction, low, high, (strength > 0).to(direction), bounded, iterations)


def _by_patches(operator: FirstOperator, direction: Tensor, low: Tensor, high: Tensor) -> Tensor:
    patches = operator.patches
    assert patches is not None
    border = direction.clamp(low, high)
    v, least, most = patches.split(direction), patches.split(low), patches.split(high)
    seen, unseen = patches.seen.to(v), patches.unseen.to(v)
    if not len(unseen):
        return patches.join(torch.zeros_like(v), border)
    plain = v @ unseen.T @ unseen
    fits = ((plain >= least) & (plain <= most)).all(1)
    hard = (~fits).nonzero().flatten()
    if len(hard) and len(unseen) > _FEW:
        aim, accepted = _EXACT[torch.float64]
        solved, residual, _ = nearest_in_kernel(Rows(seen), v[hard], least[hard], most[hard], tolerance=aim)
        done = residual <= accepted
        plain[hard[done]] = solved[done]
        hard = hard[~done]
    if len(hard):
        plain[hard] = walk_in_kernel(unseen, v[hard], least[hard], most[hard])
    return patches.join(plain, border).clamp(low, high)  # of rounding


def _by_images(
    operator: Callable[[Tensor], Tensor],
    direction: Tensor,
    low: Tensor,
    high: Tensor,
    where: Tensor,
    bounded: bool,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """Matrix-free; the change is 0 where the kernel holds nothing, or nothing that convergence reaches."""
    aim, accepted = _EXACT[torch.float64 if direction.dtype == torch.float64 else torch.float32]
    tiny = torch.finfo(direction.dtype).tiny
    # What nothing reads moves on its own, as the last row and column of a stride that leaves them out; the adjoint of
    # random outputs is 0 there, and elsewhere not. The rest of the kernel follows.
    linear = Traced(operator, direction[:1])
    probe = torch.rand(linear.output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reads = (linear.adjoint(probe.to(direction) + 1) != 0).to(direction)
    unread = (1 - reads) * where * direction.clamp(low, high)
    if isinstance(operator, FirstOperator) and operator.sees_windows:
        return unread, ((1 - reads) * where * direction == 0).flatten(1).all(1)
    where = where * reads
    inside = where * direction
    size = sample_norm(inside).clamp(min=tiny)
    whole = sample_norm(operator(inside)).clamp(min=tiny)

    def exact(rows: Tensor, found: Tensor) -> Tensor:
        return sample_norm(operator(found)) <= accepted * whole[rows] * sample_norm(found) / size[rows]

    def free(rows: Tensor, most: int) -> Tensor:
        mask = where[rows]
        return mask * project_to_kernel(operator, direction[rows], weight=mask, iterations=most, tolerance=aim)

    # Without bounds first: a trivial kernel shows here, once conjugate gradients have converged.
    rows = torch.arange(len(direction), device=direction.device)
    found = free(rows, iterations)
    slow = (sample_norm(operator(found)) > accepted * whole).nonzero().flatten()
    if len(slow):
        found[slow] = free(slow, 5 * iterations)
    # Of a direction that is 0 where images may change, it shows nothing.
    trivial = (sample_norm(found) <= _TRIVIAL * size) & (sample_norm(inside) > 0)
    outside = ((found < low) | (found > high)).flatten(1).any(1)
    hard = (~trivial & (outside | ~exact(rows, found))).nonzero().flatten()
    if bounded and len(hard):
        v, least, most = where[hard] * direction[hard], low[hard] * where[hard], high[hard] * where[hard]
        linear = Traced(operator, v)
        solved, residual, _ = nearest_in_kernel(linear, v, least, most, tolerance=aim, steps=_NEWTON)
        found[hard] = torch.where(expand(residual <= accepted, solved), solved, 0.0)
        for i in (residual > accepted).nonzero().flatten().tolist():
            one = slice(i, i + 1)
            found[hard[one]] = split_in_kernel(Traced(operator, v[one]), v[one], least[one], most[one], aim)
        hard = hard[~exact(hard, found[hard]) | (sample_norm(found[hard]) == 0)]
        if len(hard):
            found[hard] = _in_proportion(operator, inside[hard], low[hard], high[hard], iterations)
    done = exact(rows, found) & ~trivial
    return torch.where(expand(done, found), found, 0.0) + unread, trivial & (unread == 0).flatten(1).all(1)


def _in_proportion(
    operator: Callable[[Tensor], Tensor], direction: Tensor, low: Tensor, high: Tensor, iterations: int
) -> Tensor:
    """``δ = D u`` with ``u ∈ ker(A D)`` and ``|u| ≤ 1``, where the diagonal ``D`` is each value's room to both sides.

    (Nearly) saturated values stay: they could hardly move and would make ``A D`` ill-conditioned.
    """
    room = torch.minimum(-low, high)
    room = torch.where(room < _SATURATED * room.flatten(1).amax(1).view(-1, 1, 1, 1), 0.0, room)
    unit = project_to_kernel(operator, direction, weight=room, iterations=_PATIENCE * iterations)
    return room * unit * expand(1 / sample_norm(unit, "inf").clamp(min=torch.finfo(unit.dtype).tiny), unit)


def _longest(start: Tensor, move: Tensor, eps: float) -> Tensor:
    """The largest ``β ≤ 1`` ``(N,)`` with ``‖start + β·move‖₂ ≤ eps``, where ``‖start‖₂ ≤ eps``."""
    square, across = (move * move).flatten(1).sum(1), (start * move).flatten(1).sum(1)
    left = (eps**2 - (start * start).flatten(1).sum(1)).clamp(min=0)
    root = (across.square() + square * left).sqrt() - across
    reach = root / square.clamp(min=torch.finfo(square.dtype).tiny)
    return torch.where(square > 0, reach.clamp(0, 1), 0.0)


def _outcome(
    operator: Callable[[Tensor], Tensor], x: Tensor, x_adv: Tensor, direction: Tensor, trivial: Tensor
) -> NullSpaceMove:
    """What the operator sees of the change as it was rounded."""
    change = x_adv - x
    if isinstance(operator, FirstOperator) and operator.dtype is None:
        change, direction = (x_adv.double() - x.double()), direction.double()
    image, elsewhere = operator(change), operator(direction)
    tiny = torch.finfo(change.dtype).tiny
    length = sample_norm(change)
    usual = sample_norm(elsewhere) / sample_norm(direction).clamp(min=tiny)
    relative = sample_norm(image) / (length * usual).clamp(min=tiny)
    return NullSpaceMove(
        x_adv,
        length.to(x.dtype),
        sample_norm(image, "inf").to(x.dtype),
        torch.where(length > 0, relative, 0.0).to(x.dtype),
        trivial,
    )
