"""Radii of a linear head against the nearest boundary, found by an independent search."""

from __future__ import annotations

import operator
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lipsim.certificates import class_radius
from lipsim.utils.errors import LipsimError


def _problem(seed: int, classes: int, features: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((20, features), (classes, features), (classes,))
    z, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return z, weight, bias


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 8), st.sampled_from([1.0, 0.5, 3.0]))
def test_the_radius_is_the_way_to_the_nearest_boundary(
    seed: int, classes: int, features: int, lipschitz: float
) -> None:
    z, weight, bias = _problem(seed, classes, features)
    answer, radius = class_radius(z, weight, bias, lipschitz=lipschitz)
    assert torch.equal(answer, (z @ weight.T + bias).argmax(1))
    for point, own, r in zip(z, answer.tolist(), radius.tolist(), strict=True):
        # Feature space moves by L·r at most: just inside no class overtakes, just outside one does.
        rows = [k for k in range(classes) if k != own]
        slopes = torch.stack([weight[k] - weight[own] for k in rows])
        reach = torch.stack([point + lipschitz * r * s / s.norm() for s in slopes])
        values = reach @ weight.T + bias
        lead = values[:, own] - values[torch.arange(len(rows)), torch.tensor(rows)]
        assert (lead > -1e-9).all()
        beyond = torch.stack([point + (lipschitz * r * (1 + 1e-6) + 1e-9) * s / s.norm() for s in slopes])
        assert ((beyond @ weight.T + bias).argmax(1) != own).any()


def test_the_error_of_the_features_is_covered() -> None:
    z, weight, bias = _problem(3, 5, 7)
    _, radius = class_radius(z, weight, bias, lipschitz=2.0)
    _, covered = class_radius(z, weight, bias, lipschitz=2.0, feature_error=0.1)
    torch.testing.assert_close(covered, (radius - 0.05).clamp(min=0))


def test_ties_and_unknown_features_have_no_radius() -> None:
    weight = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    z = torch.tensor([[2.0, 1.0], [1.0, 2.0], [float("nan"), 1.0], [float("inf"), 1.0]])
    _, radius = class_radius(z, weight)
    assert radius.tolist()[0] == 0 and radius.tolist()[2:] == [0, 0]  # two classes lead alike
    assert radius[1].item() == pytest.approx(2**-0.5) and radius.dtype == torch.float32
    # Equal rows whose biases differ: no move of the features changes the answer between them.
    answer, radius = class_radius(z[:1], weight[:2], torch.tensor([0.0, 1.0]))
    assert answer.tolist() == [1] and 3.4e38 < radius.item() < float("inf")
    assert class_radius(z[:2], weight, lipschitz=float("inf"))[1].tolist() == [0, 0]


def test_rows_too_near_for_their_squares_have_no_radius() -> None:
    """1e-170 apart, on a boundary at a distance of 1: their squares vanish in float64, and equal rows have no end."""
    weight = torch.tensor([[1e-170, 0.0], [-1e-170, 0.0]], dtype=torch.float64)
    z = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert class_radius(z, weight)[1].item() <= 1
    assert class_radius(z, weight * 1e50)[1].item() == pytest.approx(1)


@pytest.mark.parametrize("size", [1e-170, 1.2345678e-178, 1.2345678e-190, 1e-200])
def test_products_without_all_their_digits_certify_no_more(size: float) -> None:
    weight = torch.tensor([[1e-130], [0.0]], dtype=torch.float64)
    answer, radius = class_radius(torch.tensor([[size]], dtype=torch.float64), weight)
    assert answer.item() == 0 and radius.item() <= size  # the boundary is at 0
    assert radius.item() == pytest.approx(size, rel=1e-5) or size < 1e-175


def test_rounding_where_logits_cancel_certifies_no_more() -> None:
    """Against fractions: leads of 1e-13 to 1e-8 of what is summed are known to a few digits, up or down."""
    generator = torch.Generator().manual_seed(4)
    larger = certified = 0
    for draw in range(60):
        z, *weight = (torch.randn(60, generator=generator, dtype=torch.float64) * 1e3 for _ in range(3))
        near = [float(z @ row) for row in weight]
        bias = torch.tensor([-near[0] + 10.0 ** (draw % 6 - 6), -near[1]], dtype=torch.float64)
        answer, radius = class_radius(z[None], torch.stack(weight), bias)
        exact = [
            sum(map(operator.mul, map(Fraction, row.tolist()), map(Fraction, z.tolist())), Fraction(b))
            for row, b in zip(weight, bias.tolist(), strict=True)
        ]
        lead = exact[answer] - exact[1 - answer]
        square = sum(((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(*(w.tolist() for w in weight), strict=True)))
        assert radius.item() == 0 or (lead > 0 and Fraction(radius.item()) ** 2 * square <= lead**2)
        certified += radius.item() > 0
        apart = weight[int(answer)] - weight[1 - int(answer)]
        plain = (apart @ z + bias[answer] - bias[1 - answer]) / apart.norm()  # without a word of rounding
        larger += Fraction(plain.item()) ** 2 * square > lead**2
    assert larger > 10 and certified > 10  # so that this test can fail


@pytest.mark.parametrize(
    ("shapes", "bias", "message"),
    [
        (((2, 3), (4, 2)), None, "features .N, D. and a head"),
        (((2, 3), (1, 3)), None, "at least two classes"),
        (((2, 3), (4, 3)), (3,), "a bias of 4 classes"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    shapes: tuple[tuple[int, int], tuple[int, int]], bias: tuple[int] | None, message: str
) -> None:
    z, weight = map(torch.zeros, shapes)
    with pytest.raises(LipsimError, match=message):
        class_radius(z, weight, None if bias is None else torch.zeros(bias))
