"""What a network really reaches: lower bounds on Lipschitz constants.

They certify nothing. Next to the upper bounds of :mod:`lipsim.audit` they show how much of the budget each layer uses,
and that nothing exceeds its bound.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lipsim.layers import exact_copy
from lipsim.utils.precision import full_precision
from lipsim.utils.sampling import sample_normal

Function = Callable[[Tensor], Tensor]


def jacobian_norm(
    function: Function, x: Tensor, iterations: int = 30, seed: int = 0, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Power iteration on ``JᵀJ`` at each of N points: a lower bound of ``‖J(x)‖₂`` and the direction that reaches it.

    Args:
        function: maps ``(N, …)`` to ``(N, …)``, each sample alone.
        x: points, ``(N, …)``, best in float64.
        iterations: products with ``JᵀJ``.
        seed: of the first direction.
        index: ``(N,)`` sample indices that it depends on as well; None counts the rows.

    Returns:
        ``(N,)`` norms and ``(N, …)`` directions of length 1.
    """
    function, start = _on_copies(function), _unit(sample_normal(x, seed=seed, index=index))
    try:
        return _power_iteration(*_transformed(function, x), start, iterations)
    except RuntimeError:  # an autograd.Function that transforms of torch.func refuse, of old or without its jvp
        return _power_iteration(*_recorded(function, x), start, iterations)


def layer_norms(encoder: nn.Module, images: Tensor, names: list[str], iterations: int = 30) -> dict[str, float]:
    """Largest Jacobian norm of single layers at the points where images ``(N, 3, H, W)`` reach them.

    Args:
        encoder: the network; it is copied to float64 with the weights it derives.
        images: where to look.
        names: paths of modules, as in a :class:`lipsim.audit.LipschitzReport`.
        iterations: of the power iteration.
    """
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, arguments: inputs.__setitem__(name, arguments[0].detach().clone())

    with _differentiating():
        exact = exact_copy(encoder)
        hooks = [exact.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
        with torch.no_grad():
            exact(images.double().clone())
        for hook in hooks:
            hook.remove()
        return {
            name: float(jacobian_norm(exact.get_submodule(name), x, iterations)[0].max()) for name, x in inputs.items()
        }


def attack_lipschitz(encoder: nn.Module, images: Tensor, steps: int = 50, step_size: float = 0.05) -> float:
    """Largest growth ``‖f(x) − f(y)‖/‖x − y‖`` found by ascent on pairs: a lower bound on the Lipschitz constant.

    Pairs start at the images and the directions of their largest Jacobian norms, and may leave [0, 1].

    Args:
        encoder: the network; it is copied to float64 with the weights it derives.
        images: where to start, ``(N, 3, H, W)``.
        steps: of the ascent.
        step_size: length of a step of each point, relative to the distance of the pair at the start, 1.
    """
    with _differentiating():
        exact = _on_copies(exact_copy(encoder))
        x = images.double().clone()
        norms, direction = jacobian_norm(exact, x)
        best = norms.max()
        y = x + direction
        for _ in range(steps):
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            distance = (x - y).flatten(1).norm(dim=1).clamp(min=1e-9)  # 0 where the Jacobian is
            growth = (exact(x) - exact(y)).flatten(1).norm(dim=1) / distance
            best = torch.maximum(best, growth.detach().max())
            gradients = torch.autograd.grad(growth.sum(), (x, y))
            x, y = (point + step_size * _unit(gradient) for point, gradient in zip((x, y), gradients, strict=True))
        return float(best)


@contextmanager
def _differentiating() -> Iterator[None]:
    """Full precision, and gradients whatever the caller does without."""
    with torch.inference_mode(False), torch.enable_grad(), full_precision():
        yield


def _on_copies(function: Function) -> Function:
    """A function that leaves its argument as it was: layers may work in place."""
    return lambda x: function(x.clone())


def _power_iteration(push: Function, pull: Function, direction: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    for _ in range(iterations):
        direction = _unit(pull(push(direction)))
    return push(direction).flatten(1).norm(dim=1).detach(), direction.detach()


def _transformed(function: Function, x: Tensor) -> tuple[Function, Function]:
    """Products with ``J`` and with ``Jᵀ`` at ``x``, by the transforms of :mod:`torch.func`."""
    _, pull_back = torch.func.vjp(function, x)  # type: ignore[misc]

    def push(direction: Tensor) -> Tensor:
        with warnings.catch_warnings():
            # The first call loads derivatives that torch compiles with what it deprecates itself.
            warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
            derivative: Tensor = torch.func.jvp(function, (x,), (direction,))[1]
        return derivative

    return push, lambda cotangent: pull_back(cotangent)[0]


def _recorded(function: Function, x: Tensor) -> tuple[Function, Function]:
    """The same by autograd's tape: ``Jᵀu`` is linear in ``u``, and its derivative there is ``J``."""
    x = x.detach().requires_grad_()
    outputs = function(x)
    cotangent = torch.zeros_like(outputs, requires_grad=True)
    (pulled,) = torch.autograd.grad(outputs, x, cotangent, create_graph=True)

    def push(direction: Tensor) -> Tensor:
        return torch.autograd.grad(pulled, cotangent, direction, retain_graph=True)[0]

    def pull(u: Tensor) -> Tensor:
        return torch.autograd.grad(outputs, x, u, retain_graph=True)[0]

    return push, pull


def _unit(x: Tensor) -> Tensor:
    norm: Tensor = x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))
    return x / norm.clamp(min=torch.finfo(x.dtype).tiny)
