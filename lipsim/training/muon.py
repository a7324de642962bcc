"""Muon: momentum whose matrices are made orthogonal before each step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adam import adam

from lipsim.utils.errors import LipsimError
from lipsim.utils.precision import full_precision

# Of a quintic that takes singular values near 0 away from it fastest (Jordan et al. 2024).
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_LEAST_NORM = 1e-7  # of a gradient, below which steps become smaller with it, as in torch.optim.Muon


class MuonWithAuxAdam(Optimizer):
    """Muon for the matrices and kernels of a network, Adam for its biases and other vectors.

    The momentum of a matrix is replaced by the nearest orthogonal one, so that a step turns every direction alike
    (Jordan et al. 2024, "Muon"). ``torch.optim.Muon`` takes neither kernels nor vectors. A kernel ``(out, in, k, k)``
    counts as the matrix ``(out, in·k·k)``; what has a single row or column is a vector.

    An orthonormal layer turns by about ``lr/‖P‖`` in a step, where ``P`` is its unconstrained parameter, which grows
    with the steps. ``docs/training.md`` says where this is worth having, and at which rates.

    Args:
        params: trainable parameters.
        lr: of matrices, the spectral norm of a step, whatever their shape.
        momentum: of matrices, with Nesterov's step ahead.
        adam_lr: of vectors.
        adam_betas: of vectors.

    Raises:
        ValueError: a rate that is not positive, a momentum or β outside [0, 1), or named or grouped parameters.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.03,
        momentum: float = 0.95,
        adam_lr: float = 0.002,
        adam_betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        if not lr > 0 or not adam_lr > 0 or not all(0 <= factor < 1 for factor in (momentum, *adam_betas)):
            raise LipsimError(
                "expected rates > 0, and momentum and betas in [0, 1), got "
                f"lr {lr}, adam_lr {adam_lr}, momentum {momentum} and adam_betas {adam_betas}"
            )
        params = list(params)
        if not all(isinstance(parameter, Tensor) for parameter in params):
            raise LipsimError("expected a list of parameters, without names or groups")
        groups: list[dict[str, Any]] = [
            {"params": [p for p in params if _is_matrix(p)], "lr": lr, "momentum": momentum},
            {"params": [p for p in params if not _is_matrix(p)], "lr": adam_lr, "betas": tuple(adam_betas)},
        ]
        super().__init__([group for group in groups if group["params"]], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` computes the loss with its gradients, and its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with full_precision():  # see nearly_orthogonal
            for group in self.param_groups:
                trained = [parameter for parameter in group["params"] if parameter.grad is not None]
                if "momentum" in group:
                    for parameter in trained:
                        self._turn(parameter, group["lr"], group["momentum"])
                elif trained:
                    self._adam(trained, group["lr"], group["betas"])
        return loss

    def _turn(self, parameter: Tensor, rate: float, momentum: float) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        ahead = gradient.lerp(average, momentum).flatten(1)
        parameter.sub_(nearly_orthogonal(ahead).view_as(parameter), alpha=rate)

    def _adam(self, parameters: list[Tensor], rate: float, betas: tuple[float, float]) -> None:
        for parameter in parameters:
            if "exp_avg" not in self.state[parameter]:
                self.state[parameter].update(
                    step=torch.zeros(()), exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter)
                )
        states = [self.state[parameter] for parameter in parameters]
        adam(
            parameters,
            [parameter.grad for parameter in parameters],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=rate,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )


def nearly_orthogonal(matrix: Tensor) -> Tensor:
    """A matrix with the singular vectors of ``(rows, columns)`` and singular values near 1; zeros stay.

    Newton-Schulz with a quintic, of which five iterations take singular values from 0.005 of the Frobenius norm on into
    [0.68, 1.21]. The iterations are of the smaller Gram matrix alone, which a matrix with few rows and many columns, as
    heads are, makes cheap. Rounding makes small eigenvalues of it negative, and iterations enlarge these: harmless in
    float32, and not in TF32 or bfloat16, so call it within :func:`lipsim.utils.precision.full_precision`.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    rows = wide.float() if matrix.dtype in (torch.float16, torch.bfloat16) else wide
    rows = rows / rows.norm().clamp(min=_LEAST_NORM)
    gram = rows @ rows.mT
    factor = turn = _quintic(gram)
    for _ in range(_ITERATIONS - 1):
        gram = turn @ gram @ turn
        turn = _quintic(gram)
        factor = turn @ factor
    result: Tensor = (factor @ rows).to(matrix.dtype)
    return result if wide is matrix else result.mT


def _quintic(gram: Tensor) -> Tensor:
    """What an iteration multiplies the rows with."""
    first, second, third = _QUINTIC
    turn = second * gram + third * gram @ gram
    turn.diagonal().add_(first)
    return turn


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.ndim > 1 and min(parameter.flatten(1).shape) > 1
