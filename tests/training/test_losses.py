"""The losses of distillation against their formulas; what every loss does with NaN and where features are equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lipsim.certificates import signed_reference_radius
from lipsim.training import (
    RMSE,
    CertifiedShare,
    Cosine,
    JointRadiusHinge,
    MarginHinge,
    RadiusHinge,
    Relational,
    ScaleFree,
)
from lipsim.training.distillation import distance_correlation
from lipsim.training.losses import DistillationLoss, TripletLoss, info_nce


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Features of a student of any norm, and of a teacher on the unit sphere, ``(9, 5)``."""
    return 3 * torch.randn(9, 5, dtype=torch.float64), F.normalize(torch.randn(9, 5, dtype=torch.float64), dim=1)


def test_rmse_to_a_scaled_target(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    z, t = (features.numpy() for features in pair)
    for scale in (1.0, 8.0):
        expected = np.sqrt(((z - scale * t) ** 2).mean())
        assert float(RMSE(scale)(*pair, 1.0)) == pytest.approx(expected, rel=1e-12)
    assert RMSE(8.0)(8 * pair[1], pair[1], 1.0) == 0
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="expected a scale > 0"):
            RMSE(scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("loss", [MarginHinge(), RadiusHinge(), JointRadiusHinge(), CertifiedShare((0.0, 0.1), 0.2)])
def test_a_batch_of_ties_has_no_loss(loss: TripletLoss, dtype: torch.dtype) -> None:
    z, z0, z1 = torch.randn(3, 4, 5).to(dtype).unbind()
    assert loss(z, z0, z1, torch.full((4,), 0.5), 1.0) == 0


def test_relations_are_those_of_both_metrics() -> None:
    """A teacher with an anchor, such as an exported student, is at its own distances."""
    z = torch.randn(6, 5, dtype=torch.float64)
    for loss in (Relational(), ScaleFree()):
        assert loss(z, z, 4.0, 4.0) < 1e-9 < 0.01 < loss(z, z, 4.0)
    assert distance_correlation(z, z, 4.0, 4.0) > 1 - 1e-9 > 0.999 > distance_correlation(z, z, 4.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_near_duplicates_keep_their_distances_under_autocast(dtype: torch.dtype) -> None:
    """In a product in bfloat16 all of them have one distance, 0 or 0.004."""
    z, t = (F.normalize(torch.randn(1, 64) + 0.01 * torch.randn(8, 64), dim=1) for _ in range(2))
    expected = [float(loss(z, t)) for loss in (_relational, _contrastive)]
    with torch.autocast("cpu", dtype=dtype):
        found = [float(loss(z, t)) for loss in (_relational, _contrastive)]
        assert (z @ z.mT).dtype == dtype  # so that this test can fail
    assert found == pytest.approx(expected, rel=1e-6) and 0.01 < expected[0] < 1
    assert float(Relational()(z.to(dtype), z, 0.0)) < 0.3


def _relational(z: Tensor, t: Tensor) -> Tensor:
    return Relational()(z, t, 0.0)


def _contrastive(z: Tensor, t: Tensor) -> Tensor:
    return info_nce(z, z + 0.2 * (t - t.mean(0)), 0.01)


def test_a_margin_below_zero_is_refused() -> None:
    for value in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="expected a margin ≥ 0"):
            MarginHinge(value)


def test_cosine_is_the_direction_alone(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    z, t = (features.numpy() for features in pair)
    cosines = (z * t).sum(1) / np.linalg.norm(z, axis=1)
    assert float(Cosine()(*pair, 1.0)) == pytest.approx(1 - cosines.mean(), rel=1e-12)
    assert float(Cosine()(7 * pair[1], pair[1], 1.0)) == pytest.approx(0, abs=1e-12)


def test_relational_compares_distances_of_all_pairs_after_one_factor(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    z, t = (features.numpy() for features in pair)
    e = np.concatenate([z, np.ones((9, 1))], axis=1)
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    upper = np.triu_indices(9, 1)
    ours, theirs = (1 - e @ e.T)[upper], (1 - t @ t.T)[upper]
    factor = np.linalg.lstsq(ours[:, None], theirs, rcond=None)[0][0]
    expected = np.sqrt(((factor * ours - theirs) ** 2).sum() / (theirs**2).sum())
    assert float(Relational()(*pair, 1.0)) == pytest.approx(expected, rel=1e-9)
    assert float(Relational()(7 * pair[1], pair[1], 0.0)) == pytest.approx(0, abs=1e-7)
    # Relations know no basis and no dimension.
    basis = torch.linalg.qr(torch.randn(8, 5, dtype=torch.float64))[0]
    assert float(Relational()(pair[0] @ basis.T, pair[1], 1.0)) == pytest.approx(expected, rel=1e-9)
    small = pair[0][:2].clone().requires_grad_()
    loss = Relational()(small, pair[1][:2], 1.0)  # the last images of a folder, or one on each of many processes
    loss.backward()
    assert loss == 0 and small.grad is not None and not small.grad.any()


def test_scale_free_is_their_weighted_sum(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    cosine, relational = Cosine()(*pair, 1.0), Relational()(*pair, 1.0)
    torch.testing.assert_close(ScaleFree(2.0, 0.5)(*pair, 1.0), 2 * cosine + relational / 2)
    torch.testing.assert_close(ScaleFree(0.0, 1.0)(*pair, 1.0), relational)
    for weights in ((0.0, 0.0), (-1.0, 2.0), (float("nan"), 1.0), (1.0, float("nan"))):
        with pytest.raises(ValueError, match="expected weights ≥ 0"):
            ScaleFree(*weights)


@pytest.mark.parametrize("loss", [RMSE(), RMSE(8.0), Cosine(), Relational(), ScaleFree()])
def test_gradients_are_those_of_the_formula(loss: DistillationLoss, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    z = pair[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda features: loss(features, pair[1], 1.0), z)


@pytest.mark.parametrize("loss", [RMSE(), Cosine(), ScaleFree()])
def test_another_dimension_is_refused(loss: DistillationLoss) -> None:
    with pytest.raises(
        ValueError, match=r"6 features and the teacher 8; set .* or distil relations only \(Relational\)"
    ):
        loss(torch.randn(4, 6), torch.randn(4, 8), 1.0)


TRIPLET_LOSSES = [RadiusHinge(2.0), RadiusHinge(2.0, weight_by_agreement=True), JointRadiusHinge(2.0), MarginHinge(0.2)]
DISTILLATION_LOSSES = [RMSE(), Cosine(), Relational(), ScaleFree()]
VOTES = torch.tensor([0.0, 1.0, 0.2, 0.9, 0.5])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("loss", [*TRIPLET_LOSSES, *DISTILLATION_LOSSES])
def test_features_that_are_not_finite_give_a_loss_that_is_nan(loss: object, value: float) -> None:
    for which in range(3 if isinstance(loss, TripletLoss) else 2):
        features = [torch.randn(5, 6) for _ in range(3)]
        features[which][2, 1] = value
        found = loss(*features, VOTES, 1.0) if isinstance(loss, TripletLoss) else loss(*features[:2], 1.0)
        assert not found.isfinite()
        if isinstance(loss, TripletLoss):  # of a triplet that does not count, too
            assert not loss(*features, torch.full((5,), 0.5), 1.0).isfinite()


@pytest.mark.parametrize("anchor", [0.0, 1.0])
@pytest.mark.parametrize("loss", TRIPLET_LOSSES)
def test_gradients_of_triplets_are_finite_at_equality(loss: TripletLoss, anchor: float) -> None:
    z, z0, z1, zero = *(torch.randn(5, 6) for _ in range(3)), torch.zeros(5, 6)
    for features in ((z, z, z), (z, z0, z0), (z, z, z1), (z, z0, z), (z, -z, z1), (zero,) * 3, (zero, z0, z1)):
        leaves = [part.clone().requires_grad_() for part in features]
        value = loss(*leaves, VOTES, anchor)
        value.backward()
        assert value.isfinite() and all(leaf.grad.isfinite().all() for leaf in leaves)  # type: ignore[union-attr]


@pytest.mark.parametrize("anchor", [0.0, 1.0])
@pytest.mark.parametrize("loss", DISTILLATION_LOSSES)
def test_gradients_of_distillation_are_finite_at_equality(loss: DistillationLoss, anchor: float) -> None:
    z, t, zero = torch.randn(5, 6), F.normalize(torch.randn(5, 6)), torch.zeros(5, 6)
    alike = t[:1].expand(5, 6)  # a teacher that tells no two images apart
    for student, teacher in ((t, t), (7 * t, t), (zero, t), (z, zero), (zero, zero), (alike, t), (z, alike)):
        leaf = student.clone().requires_grad_()
        value = loss(leaf, teacher, anchor)
        value.backward()
        assert value.isfinite() and leaf.grad is not None and leaf.grad.isfinite().all()


def test_certified_share_is_what_a_table_counts_where_it_is_sharp() -> None:
    z, z0, z1 = (torch.randn(200, 6, dtype=torch.float64) for _ in range(3))
    vote = torch.randint(2, (200,)).double()
    vote[:20] = 0.5
    radius = (1 - 2 * vote) * signed_reference_radius(z, z0, z1, anchor=1.0)
    certified = torch.stack([(radius[20:] > budget).double().mean() for budget in (0.1, 0.5)]).mean()
    loss = CertifiedShare([0.1, 0.5], temperature=1e-6)(z, z0, z1, vote, 1.0)
    assert loss == pytest.approx(1 - certified.item(), abs=1e-9)
    with pytest.raises(ValueError, match="budgets"):
        CertifiedShare([], 0.1)


def test_certified_share_has_gradients_and_knows_nan() -> None:
    z, z0, z1 = (torch.randn(8, 6, requires_grad=True) for _ in range(3))
    loss = CertifiedShare()(z, z0, z1, torch.zeros(8), 1.0)
    loss.backward()
    assert all(t.grad is not None and torch.isfinite(t.grad).all() and t.grad.abs().sum() > 0 for t in (z, z0, z1))
    assert CertifiedShare()(z.detach() * torch.nan, z0, z1, torch.zeros(8), 1.0).isnan()


def test_softness_rounds_the_corner_of_the_hinge() -> None:
    z, z0, z1 = (torch.randn(50, 6, dtype=torch.float64) for _ in range(3))
    vote = torch.zeros(50)
    lack = 1.0 - signed_reference_radius(z, z0, z1, anchor=1.0)
    soft = RadiusHinge(1.0, softness=0.3)(z, z0, z1, vote, 1.0)
    assert soft == pytest.approx((0.3 * torch.nn.functional.softplus(lack / 0.3)).mean().item(), abs=1e-12)
    sharp = RadiusHinge(1.0, softness=1e-9)(z, z0, z1, vote, 1.0)
    assert sharp == pytest.approx(RadiusHinge(1.0)(z, z0, z1, vote, 1.0).item(), abs=1e-8)
    with pytest.raises(ValueError, match="softness"):
        RadiusHinge(softness=-1.0)


@pytest.mark.parametrize("anchor", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("loss", TRIPLET_LOSSES)
def test_a_loss_of_shared_images_is_that_of_the_triplets(loss: TripletLoss, anchor: float) -> None:
    """In value and gradient: of few images and many triplets, and where there are too many images for their pairs."""
    generator = torch.Generator().manual_seed(0)
    for images, triplets in ((12, 200), (60, 100)):
        features = 3 * torch.randn(images, 6, generator=generator, dtype=torch.float64)
        features[1] = features[0]  # candidates that are equal
        features[2] = 0.0
        features.requires_grad_(True)
        ids = torch.randint(images, (triplets, 3), generator=generator)
        ids[:3] = torch.tensor([[4, 0, 1], [0, 0, 1], [2, 3, 4]])
        votes = torch.randint(3, (triplets,), generator=generator) / 2
        z, z0, z1 = features[ids].unbind(1)
        expected = loss(z, z0, z1, votes, anchor, 0.3)
        found = loss.of_shared(features, ids, votes, anchor, 0.3)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        gradients = [torch.autograd.grad(value, features)[0] for value in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("loss", [RadiusHinge(2.0), CertifiedShare()])
def test_pairs_of_images_that_are_nearly_equal(loss: TripletLoss) -> None:
    """The distance of two candidates comes from a difference of squares: in float32 it would be lost here."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 8, generator=generator) + 1e-3 * torch.randn(10, 8, generator=generator)
    ids = torch.randint(10, (300, 3), generator=generator)
    votes = torch.randint(2, (300,), generator=generator).float()
    leaves = [values.requires_grad_(True) for values in (features.clone(), features.double())]
    z, z0, z1 = leaves[1][ids].unbind(1)
    exact = loss(z, z0, z1, votes, 1.0)
    found = loss.of_shared(leaves[0], ids, votes, 1.0)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=1e-6)
    (gradient,), (truth,) = torch.autograd.grad(found, leaves[0]), torch.autograd.grad(exact, leaves[1])
    assert float((gradient - truth).norm() / truth.norm()) < 1e-4


@pytest.mark.parametrize("size", [1e-9, 1e-5, 1e6])
def test_pairs_of_small_and_large_features(size: float) -> None:
    """Small ones are all near the anchor's direction, so that only what is equal to rounding counts as equal."""
    features = (size * torch.randn(6, 5, dtype=torch.float64)).requires_grad_(True)
    ids = torch.tensor([[0, 1, 2], [3, 4, 5], [1, 4, 0]] * 5)
    z, z0, z1 = features[ids].unbind(1)
    radii = RadiusHinge().shared_radius(features, ids, 1.0), RadiusHinge().radius(z, z0, z1, 1.0)
    assert (radii[0] - radii[1]).norm() < 1e-2 * radii[1].norm()
    found, expected = (torch.autograd.grad(radius.sum(), features, retain_graph=True)[0] for radius in radii)
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_candidates_that_differ_by_rounding_are_equal() -> None:
    """Their distance is not known from squares; the triplet has radius 0, and no part in the gradient."""
    features = torch.randn(3, 5, dtype=torch.float64)
    features[2] = features[1] * (1 + 1e-13)
    features.requires_grad_(True)
    loss = CertifiedShare([0.0], temperature=1.0).of_shared(features, torch.tensor([[0, 1, 2]]), torch.zeros(1), 1.0)
    assert loss.item() == 0.5
    assert (torch.autograd.grad(loss, features)[0] == 0).all()


class _HalvedRadius(RadiusHinge):
    def radius(self, z: Tensor, z0: Tensor, z1: Tensor, anchor: float) -> Tensor:
        return super().radius(z, z0, z1, anchor) / 2


class _Shifted(CertifiedShare):
    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        return 100 + super().__call__(*arguments, **options)


@pytest.mark.parametrize("loss", [_HalvedRadius(2.0), _Shifted()])
def test_a_loss_of_a_users_own_is_the_same_on_shared_images(loss: TripletLoss) -> None:
    features, ids, votes = torch.randn(4, 3), torch.randint(4, (50, 3)), torch.zeros(50)
    z, z0, z1 = features[ids].unbind(1)
    assert loss.of_shared(features, ids, votes, 1.0) == loss(z, z0, z1, votes, 1.0)


@pytest.mark.parametrize("loss", TRIPLET_LOSSES)
def test_an_image_that_is_not_finite_is_seen_in_shared_batches(loss: TripletLoss) -> None:
    features = torch.randn(5, 4)
    features[3, 1] = torch.inf
    features.requires_grad_(True)
    ids = torch.randint(3, (100, 3))
    of_others = loss.of_shared(features, ids, torch.zeros(100), 1.0)  # the image is in no triplet
    (gradient,) = torch.autograd.grad(of_others, features)
    assert of_others.isfinite() and gradient.isfinite().all()
    ids[7, 2] = 3
    assert loss.of_shared(features, ids, torch.zeros(100), 1.0).isnan()
