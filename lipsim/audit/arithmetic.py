"""How far the features that an encoder computes are from those of float64, searched for among images in [0, 1].

Rounding errors add up in step where an image repeats itself, so the worst images are no photographs: constant ones of
saturated or nearly saturated colours reach several times what photographs do. The search starts at these, at coarse
patterns and at noise, and climbs. It proves nothing, so what it finds is enlarged (:data:`ERROR_FACTOR`) before it is
used; and since features are rounded at the end, whatever cancels before, it finds no less than half a unit in the last
place of the longest ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lipsim.layers.base import evaluation_mode, exact_copy
from lipsim.layers.encoder import first_weight
from lipsim.utils.errors import LipsimError
from lipsim.utils.precision import full_precision

# Searches of 40 times as many images found at most 1.5 times as much.
ERROR_FACTOR = 4.0

_BATCH = 16
_KEPT = 4
_ROUNDS = 8
_CHILDREN = 16


def feature_error(encoder: nn.Module, images: Tensor) -> float:
    """Largest ``‖f(x) − f64(x)‖`` over images ``(N, 3, H, W)``: the dtype of the weights against float64.

    Both compute with the same derived weights, so this is the error of the forward pass alone.
    """
    if not len(images):
        return 0.0
    with full_precision(), evaluation_mode(encoder):
        return float(_errors(encoder, exact_copy(encoder), images).max())


def largest_feature_error(
    encoder: nn.Module, image_size: int, images: Tensor | None = None, *, thorough: bool = True
) -> float:
    """Largest ``‖f(x) − f64(x)‖`` that a search finds among images in [0, 1], for the dtype of the weights.

    The same images for the same arguments, whatever random numbers were drawn before.

    Args:
        encoder: maps images ``(N, 3, S, S)`` to features ``(N, D)``.
        image_size: side ``S``.
        images: ``(N, 3, S, S)``, also looked at.
        thorough: 56 constant, periodic, binary and random images, and 128 that climb from the worst. False: 16 of
            them only, constant and random ones.

    Raises:
        ValueError: features that are not finite.
    """
    weight = first_weight(encoder)
    weight = torch.zeros(()) if weight is None else weight
    generator = torch.Generator().manual_seed(0)
    with full_precision(), evaluation_mode(encoder):
        exact = exact_copy(encoder)

        def errors(x: Tensor) -> Tensor:
            return _errors(encoder, exact, x.to(weight)).cpu()

        found = [errors(images)] if images is not None and len(images) else []
        x = _starts(image_size, generator) if thorough else _few(image_size, generator)
        error = errors(x)
        for step in range(_ROUNDS if thorough else 0):
            best = error.topk(_KEPT).indices
            children = _children(x[best], 0.5 / 2**step, generator)
            x, error = torch.cat([x[best], children]), torch.cat([error[best], errors(children)])
        with torch.no_grad():
            length = float(torch.linalg.vector_norm(encoder(x.to(weight).clone()).double(), dim=-1).max())
        last = 0.0 if weight.dtype == torch.float64 else length * torch.finfo(weight.dtype).eps / 2
        largest = max(float(torch.cat([*found, error]).max()), last)
    if not largest < torch.inf:
        raise LipsimError("the encoder's features are not finite on images in [0, 1]; its weights are of no use")
    return largest


@torch.no_grad()
def _errors(encoder: nn.Module, exact: nn.Module, x: Tensor) -> Tensor:
    """``‖f(x) − f64(x)‖``, ``(N,)`` in float64; ``exact`` is the encoder's copy in float64."""
    # Of copies: a first layer may work in place, and double() copies nothing that is double already.
    parts = [encoder(part.clone()).double() - exact(part.double().clone()) for part in x.split(_BATCH)]
    errors: Tensor = torch.linalg.vector_norm(torch.cat(parts), dim=-1)
    return errors


def _constants(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Images of one colour each: the corners of the cube of colours, gray, and ``count`` colours by chance."""
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    colours = torch.cat([corners, torch.full((1, 3), 0.5), torch.rand(count, 3, generator=generator)])
    return colours[:, :, None, None].expand(-1, -1, size, size).contiguous()


def _starts(size: int, generator: torch.Generator) -> Tensor:
    """Constant images, black and white stripes and checks of several periods, and images of 0 and 1 by chance."""
    patterns = []
    for period in (1, 2, 4, 8):
        stripe = (torch.arange(size) // period) % 2
        rows, columns = stripe[:, None].expand(size, size), stripe[None].expand(size, size)
        patterns += [m.float().expand(3, -1, -1) for m in (rows, columns, (rows + columns) % 2)]
    noise = torch.rand(12, 3, size, size, generator=generator)
    noise[:4] = (noise[:4] > 0.5).float()
    return torch.cat([_constants(size, 23, generator), torch.stack(patterns), noise])


def _few(size: int, generator: torch.Generator) -> Tensor:
    """Constant images, and some of noise: what cancels on the one shows on the other."""
    return torch.cat([_constants(size, 3, generator), torch.rand(4, 3, size, size, generator=generator)])


def _children(parents: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """Images near ``parents``: other colours everywhere, or (every fourth) in a block of a coarse grid."""
    children = parents.repeat(_CHILDREN // len(parents), 1, 1, 1)
    shift = scale * torch.randn(len(children), 3, 1, 1, generator=generator)
    blocks = torch.rand(len(children), 1, 4, 4, generator=generator) > 0.5
    blocks[torch.arange(len(children)) // len(parents) % 4 != 3] = True
    side = torch.arange(children.shape[-1]) * 4 // children.shape[-1]
    return (children + shift * blocks[:, :, side][:, :, :, side]).clamp(0, 1)
