"""Ranks and sets of nearest items with their radii, against all pairs in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lipsim.certificates import reference_radius, retrieval_radius
from lipsim.certificates.gallery import Gallery
from lipsim.certificates.geometry import project
from lipsim.certificates.ranking import Ranking, _Setting, farther_radius, nearest, rank, signed_lower_radius


def all_pairs(z: Tensor, gallery: Tensor, k: int, anchor: float, **options: float) -> Ranking:
    """What :func:`rank` finds, from every pair of the gallery."""
    z, gallery = z.double(), gallery.double()
    p, s = project(gallery, anchor)
    items = (z @ p.mT + anchor * s).argsort(dim=-1, descending=True, stable=True)[:, :k]
    pairs = reference_radius(z[:, None, None], gallery[None, :, None], gallery[None, None], anchor=anchor, **options)
    pairs = pairs.expand(len(z), len(gallery), len(gallery)).clone()
    pairs.diagonal(dim1=1, dim2=2).fill_(math.inf)
    rows = pairs[torch.arange(len(z))[:, None], items]
    outside = torch.ones(len(z), len(gallery), dtype=torch.bool).scatter(1, items, False)
    return Ranking(items, rows.amin(-1), torch.where(outside[:, None], rows, math.inf).amin((1, 2)))


def galleries() -> dict[str, Tensor]:
    draw = torch.randn(120, 24, generator=torch.Generator().manual_seed(1))
    twins = torch.cat([draw[:60], draw[:60] + 1e-6 * draw[60:]])
    return {
        "random": draw,
        "one narrow cone": 1 + 1e-3 * draw,
        "near-duplicates": twins,
        "duplicates": torch.cat([draw[:60], draw[:60]]),
        "in float64": draw.double() + 1e-9,
        "tiny": 1e-3 * draw,
    }


@pytest.mark.parametrize("kind", galleries())
@pytest.mark.parametrize("anchor", [0.0, 1.0])
@pytest.mark.parametrize("spare", [0, 32])
def test_ranks_and_radii_are_those_of_all_pairs(
    kind: str, anchor: float, spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lipsim.certificates.ranking._SPARE", spare)  # none: more queries look at the whole gallery
    stored = galleries()[kind]
    z = torch.cat([stored[:2] * 1.5, torch.randn(4, 24).to(stored) * stored.abs().mean()])
    gallery = Gallery(stored, anchor)
    for k in (1, 3, 120):
        for error in (0.0, 1e-4):
            options = {"lipschitz": 1.3, "feature_error": error}
            expected, found = all_pairs(z, stored, k, anchor, **options), rank(z, gallery, k=k, **options)
            if "duplicates" not in kind:
                assert torch.equal(found.items, expected.items)
            torch.testing.assert_close(found.rank_radius, expected.rank_radius, rtol=1e-9, atol=0)
            torch.testing.assert_close(found.set_radius, expected.set_radius, rtol=1e-9, atol=0)
    some = rank(z, gallery, k=3, lipschitz=1.3).set_radius > 0
    assert some.any() or kind == "duplicates"


@pytest.mark.parametrize("error", [0.0, 1e-4, 1e-3])
def test_bounds_that_leave_pairs_out_are_theirs_where_three_lie_in_a_line(error: float) -> None:
    """Elsewhere they are far below, and nothing would show that one of them were above."""
    draw = torch.Generator().manual_seed(2)
    nearer, farther = (0.1 * torch.rand(400, generator=draw, dtype=torch.float64) for _ in range(2))
    norm = 1 + torch.rand(400, generator=draw, dtype=torch.float64)
    z = torch.stack([norm, torch.zeros_like(norm)], 1)
    own, other = (torch.stack([torch.cos(t), torch.sin(t)], 1) for t in (-nearer, farther))
    gallery, options = Gallery(torch.cat([own, other]), anchor=0.0), {"lipschitz": 1.3, "feature_error": error}
    exact = reference_radius(z, own, other, anchor=0.0, **options)
    exact = torch.where(farther > nearer, exact, 0.0)
    assert (exact > 0.01).sum() > 30
    chord, apart = (torch.linalg.vector_norm(z / norm[:, None] - y, dim=1) for y in (own, other))
    by_chords = farther_radius(chord, apart, norm, gallery=gallery, **options)
    unit, rows = torch.cat([z / norm[:, None], torch.zeros(400, 1)], 1), torch.arange(400)
    by_products = torch.stack(
        [
            signed_lower_radius(
                unit[i], norm[i], gallery.unit(rows[i : i + 1]), gallery.unit(400 + rows[i : i + 1]),
                least_norm=gallery.least_norm, **options,
            ).squeeze()
            for i in rows
        ]
    )  # fmt: skip
    for bound in (by_chords, by_products):
        assert (bound <= exact).all() and (bound <= 0)[farther <= nearer].all()
        torch.testing.assert_close(bound[exact > 0.01], exact[exact > 0.01], rtol=5e-3, atol=0)
    some = exact > 0.01
    least = _Setting(gallery, 1, **options).nearest_possible(norm, chord, exact)[some]
    cosine = torch.cos(farther[some])
    assert (least <= cosine).all() and (cosine - least < 5e-3 * (1 - cosine)).all()


def test_items_at_one_distance_are_ordered_without_a_certificate_too() -> None:
    """More of them than there are candidates: float32 tells them apart by chance alone."""
    twins = torch.tensor([1.0, 2, 3], dtype=torch.float64) + 1e-9 * torch.randn(300, 3, dtype=torch.float64)
    stored = torch.cat([-twins.sum(0, keepdim=True).expand(300, -1) / 300, twins])  # so that they are not all one cone
    z = 2 * twins[:2] + 0.1 * torch.randn(2, 3, dtype=torch.float64)
    p, s = project(stored)
    expected = (z @ p.mT + s).argsort(dim=-1, descending=True)[:, :4]
    assert torch.equal(nearest(z, Gallery(stored), 4), expected)


def test_most_of_a_gallery_is_never_looked_at_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = torch.randn(20_000, 64)
    gallery, looked_at = Gallery(stored), []
    unit = gallery.unit
    monkeypatch.setattr(gallery, "unit", lambda rows: looked_at.append(rows.numel()) or unit(rows))
    rank(torch.randn(8, 64), gallery, k=5, feature_error=1e-5)
    assert 0 < sum(looked_at) < 8 * 200


def test_the_slack_covers_the_rounding_of_similarities() -> None:
    for stored in galleries().values():
        gallery, z = Gallery(stored), torch.randn(5, 24)
        unit = torch.cat([torch.stack(project(z.double())[:1])[0], project(z.double())[1][:, None]], 1)
        exact = unit @ gallery.unit(torch.arange(len(stored))).mT
        found = gallery.base(unit)[:, None] + gallery.similarities(unit).double()
        assert (found - exact).abs().max() < gallery.slack < 1e-4


def test_products_in_lower_precision_do_not_enter() -> None:
    stored, z = torch.randn(300, 32), torch.randn(4, 32)
    gallery, unit = Gallery(stored), torch.nn.functional.normalize(torch.randn(4, 33, dtype=torch.float64), dim=1)
    before = gallery.similarities(unit)
    expected = all_pairs(z, stored, 2, 1.0).set_radius
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (gallery.similarities(unit) - before).abs().max() < 1e-6
            torch.testing.assert_close(rank(z, gallery, k=2).set_radius, expected)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"


def test_what_nothing_is_known_of_has_radius_zero() -> None:
    stored = torch.randn(20, 4)
    gallery = Gallery(stored)
    z = torch.tensor([[math.nan] * 4, [math.inf, 0, 0, 0], [1.0, 2, 3, 4]])
    found = rank(z, gallery, k=3)
    assert (found.set_radius > 0).tolist() == [False, False, True]
    assert not found.rank_radius[:2].any()
    for lipschitz in (0.0, math.inf):
        assert not rank(z, gallery, k=3, lipschitz=lipschitz).rank_radius.any()
    stored[7] = math.nan
    assert not rank(z, Gallery(stored), k=3).set_radius.any()
    assert not rank(z, Gallery(torch.zeros(3, 4), anchor=0.0), k=1).set_radius.any()


@pytest.mark.parametrize("anchor", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_query_that_is_not_finite_spoils_no_other_one(value: float, anchor: float) -> None:
    """In a gallery of more items than are candidates."""
    gallery, finite = Gallery(torch.randn(100, 4), anchor), torch.tensor([1.0, 2, 3, 4])
    alone = rank(finite[None], gallery, k=3)
    for row in (torch.tensor([value, 1, 2, 3]), torch.full((4,), value)):
        found = rank(torch.stack([row, finite]), gallery, k=3)
        assert found.items[0].unique().numel() == 3 and found.items[1].equal(alone.items[0])
        torch.testing.assert_close(found.rank_radius[1], alone.rank_radius[0], rtol=1e-12, atol=0)
        assert not found.rank_radius[0].any() and found.set_radius[0] == 0 < found.set_radius[1]


def test_the_whole_gallery_cannot_change() -> None:
    found = rank(torch.randn(2, 3), Gallery(torch.randn(4, 3)), k=4)
    assert found.set_radius.tolist() == [math.inf] * 2 and (found.rank_radius < math.inf).all()
    alone = rank(torch.randn(2, 3), Gallery(torch.randn(1, 3)), k=1)
    assert alone.rank_radius.tolist() == [[math.inf]] * 2


def test_refuses_what_is_no_search() -> None:
    gallery = Gallery(torch.randn(5, 3))
    with pytest.raises(ValueError, match="1 ≤ k ≤ 5"):
        rank(torch.randn(1, 3), gallery, k=6)
    with pytest.raises(ValueError, match="queries \\(N, 3\\)"):
        rank(torch.randn(1, 4), gallery, k=1)
    with pytest.raises(ValueError, match="float32 or float64"):
        Gallery(torch.randn(5, 3).half())
    with pytest.raises(ValueError, match="1 ≤ k < 5"):
        retrieval_radius(torch.randn(1, 3), torch.randn(5, 3), k=5)
