"""Certified recall and votes of labelled neighbours, against queries moved in every direction of the plane."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lipsim.certificates import retrieval_radius
from lipsim.certificates.gallery import Gallery
from lipsim.certificates.geometry import project
from lipsim.certificates.neighbours import knn_radius, recall_radius

KS = (1, 3, 7)
CLASSES = 3


def votes(z: Tensor, gallery: Tensor, labels: Tensor, k: int, anchor: float) -> Tensor:
    """``(N, CLASSES)``: how many of the ``k`` nearest have each label."""
    p, s = project(gallery, anchor)
    nearest = labels[(z @ p.mT + anchor * s).argsort(dim=-1, descending=True)[:, :k]]
    return torch.stack([(nearest == label).sum(1) for label in range(CLASSES)], 1)


def around(z: Tensor, radius: float) -> Tensor:
    turn = torch.linspace(0, 2 * math.pi, 721, dtype=torch.float64)
    return z + radius * torch.stack([turn.cos(), turn.sin()], 1)


@pytest.fixture(params=[0.0, 1.0], ids=["no anchor", "anchor"])
def case(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    labels = torch.randint(CLASSES, (40,))
    centres = 2 * torch.randn(CLASSES, 2, dtype=torch.float64)
    gallery = centres[labels] + torch.randn(40, 2, dtype=torch.float64)
    return 2 * torch.randn(25, 2, dtype=torch.float64), gallery, labels, torch.randint(CLASSES, (25,)), request.param


@pytest.mark.parametrize("compared", [2**14, 24])
def test_no_move_shorter_than_the_radius_changes_what_neighbours_say(
    case: tuple[Tensor, Tensor, Tensor, Tensor, float], compared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lipsim.certificates.neighbours._NEAREST", compared)
    z, gallery, labels, own, anchor = case
    prepared = Gallery(gallery, anchor)
    winners, vote_radius = knn_radius(z, prepared, labels, KS)
    found = recall_radius(z, prepared, labels, own, KS)
    broken_beyond, positive = 0, 0
    for column, k in enumerate(KS):
        natural = votes(z, gallery, labels, k, anchor)
        assert (natural.gather(1, winners[:, column : column + 1])[:, 0] == natural.amax(1)).all()
        assert ((natural.gather(1, own[:, None])[:, 0] > 0) >= (found[:, column] > 0)).all()
        for row in range(len(z)):
            for radius, broken in (
                (vote_radius[row, column], lambda v, w=winners[row, column]: v.argsort(1, descending=True)[:, 0] != w),
                (found[row, column], lambda v, w=own[row]: v[:, w] == 0),
            ):
                if 0 < radius < math.inf:
                    positive += 1
                    inside = votes(around(z[row], float(radius) * (1 - 1e-9)), gallery, labels, k, anchor)
                    assert not broken(inside).any()
                    beyond = votes(around(z[row], 1.01 * float(radius)), gallery, labels, k, anchor)
                    broken_beyond += bool(broken(beyond).any())
    assert positive > 60 and broken_beyond > positive / 5  # no vacuous bound


def test_one_nearest_neighbour_is_certified_by_the_half_spaces_of_other_labels() -> None:
    gallery = torch.tensor([[1.0, 0.0], [1.0, 0.02], [0.0, 1.0]], dtype=torch.float64)
    labels, z = torch.tensor([0, 0, 1]), torch.tensor([[3.0, 0.03]], dtype=torch.float64)
    prepared = Gallery(gallery, 0.0)
    winners, radius = knn_radius(z, prepared, labels, [1])
    assert winners.item() == 0 and radius.item() > 2 > 10 * retrieval_radius(z, gallery, anchor=0.0).item()
    halved = knn_radius(z, prepared, labels, [1], lipschitz=2.0)[1]
    torch.testing.assert_close(halved, radius / 2)
    assert knn_radius(z, prepared, labels, [1], feature_error=0.01)[1].item() < radius.item()


def test_a_vote_is_certified_further_than_the_set_that_gives_it(
    case: tuple[Tensor, Tensor, Tensor, Tensor, float],
) -> None:
    z, gallery, labels, _, anchor = case
    _, radius = knn_radius(z, Gallery(gallery, anchor), labels, KS)
    for column, k in enumerate(KS):
        of_set = retrieval_radius(z, gallery, k=k, anchor=anchor)
        untied = radius[:, column] > 0
        assert (radius[untied, column] >= of_set[untied] * (1 - 1e-6)).all()
        assert (radius[untied, column] > 1.1 * of_set[untied]).any()


def test_ties_and_missing_labels() -> None:
    gallery = torch.tensor([[1.0, 0.1], [1.0, -0.1], [0.0, 1.0]], dtype=torch.float64)
    z, prepared = torch.tensor([[1.0, 0.01]], dtype=torch.float64), Gallery(gallery)
    winners, radius = knn_radius(z, prepared, torch.tensor([1, 0, 0]), [2])
    assert winners.item() == 1 and radius.item() == 0  # one vote each: the nearest's label, not certified
    _, alone = knn_radius(z, prepared, torch.tensor([4, 4, 4]), [1, 2])
    assert alone.tolist() == [[math.inf] * 2]
    found = recall_radius(z, prepared, torch.tensor([1, 0, 0]), torch.tensor([7]), [1, 2])
    assert found.tolist() == [[0.0, 0.0]]
    assert not knn_radius(z, prepared, torch.tensor([1, 0, 0]), [1], lipschitz=math.inf)[1].any()


def test_refuses_labels_and_ks_of_another_gallery() -> None:
    z, prepared = torch.randn(1, 3), Gallery(torch.randn(5, 3))
    with pytest.raises(ValueError, match="a label for each of 5"):
        knn_radius(z, prepared, torch.zeros(4, dtype=torch.int64), [1])
    with pytest.raises(ValueError, match="every k below 5"):
        recall_radius(z, prepared, torch.zeros(5, dtype=torch.int64), torch.zeros(1), [1, 5])
    labels = torch.zeros(5, dtype=torch.int64)
    for count in (0, 2):
        with pytest.raises(ValueError, match=rf"a label for each of 1 queries, got \({count},\)"):
            recall_radius(z, prepared, labels, torch.zeros(count), [1])
    with pytest.raises(ValueError, match="at least one k"):
        recall_radius(z, prepared, labels, torch.zeros(1), [])
    with pytest.raises(ValueError, match="at least one k"):
        knn_radius(z, prepared, labels, [])
