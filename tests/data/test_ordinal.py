"""Ordinal embeddings: votes of points that are known, and what they imply on triplets that nobody judged."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lipsim.data import MaterialTriplets, Preprocess, TableTriplets
from lipsim.data.ordinal import DECAYS, OrdinalEmbedding, _questions, _standard_error, embed_votes, implied_votes
from lipsim.data.sets.material import MaterialAnswers
from lipsim.utils.errors import LipsimError

NUM_IMAGES = 9


def all_triplets(num_images: int = NUM_IMAGES) -> Tensor:
    numbers = torch.arange(num_images)
    ids = torch.cartesian_prod(numbers, numbers, numbers)
    return ids[(ids[:, 0] != ids[:, 1]) & (ids[:, 0] != ids[:, 2]) & (ids[:, 1] != ids[:, 2])]


def votes_of(points: Tensor, ids: Tensor) -> Tensor:
    """A judge who never errs: 1 where right is nearer."""
    distances = torch.cdist(points, points)
    return (distances[ids[:, 0], ids[:, 2]] < distances[ids[:, 0], ids[:, 1]]).float()


@pytest.fixture(scope="module")
def judged() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A third of all triplets with votes of points in the plane, and the others."""
    generator = torch.Generator().manual_seed(0)
    ids = all_triplets()
    ids = ids[torch.randperm(len(ids), generator=generator)]
    votes = votes_of(torch.randn(NUM_IMAGES, 2, generator=generator), ids)
    cut = len(ids) // 3
    return ids[:cut], votes[:cut], ids[cut:], votes[cut:]


def test_the_share_is_that_of_a_student_kernel() -> None:
    points = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids = torch.tensor([[0, 1, 2], [4, 3, 0], [2, 1, 2]])
    shares = []
    for fit in points:
        kernel = (1 + torch.cdist(fit, fit).square() / 3) ** -2  # of 3 degrees of freedom
        left, right = kernel[ids[:, 0], ids[:, 1]], kernel[ids[:, 0], ids[:, 2]]
        shares.append(right / (left + right))
    found = OrdinalEmbedding(points, 1.0, math.nan).right_share(ids)
    torch.testing.assert_close(found, torch.stack(shares).mean(0).float())


def test_votes_that_were_left_out_are_found_again(judged: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ids, votes, others, truth = judged
    embedding = embed_votes(ids, votes, fits=3)
    assert embedding.points.shape == (3, NUM_IMAGES, 10) and embedding.decay in DECAYS
    assert embedding.held_out_loss < 0.35  # of a coin: 0.69
    share = embedding.right_share(others)
    assert ((share > 0.5) == (truth > 0.5)).double().mean() > 0.9
    assert torch.equal(embed_votes(ids, votes, fits=3).points, embedding.points)


def test_points_are_the_likeliest(judged: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ids, votes, _, _ = judged
    points = embed_votes(ids, votes, num_images=NUM_IMAGES + 1, decay=4.0, fits=1).points[0].requires_grad_()
    share = torch.sigmoid(  # in float64, from the formula
        5 * torch.log1p((points[ids[:, 0]] - points[ids[:, 1]]).square().sum(1) / 9)
        - 5 * torch.log1p((points[ids[:, 0]] - points[ids[:, 2]]).square().sum(1) / 9)
    )
    surprise = torch.nn.functional.binary_cross_entropy(share, votes.double(), reduction="sum")
    (gradient,) = torch.autograd.grad(surprise + 2 * points.square().sum(), points)
    # Scale: at a random start the entries of the gradient are around 10.
    assert gradient.abs().max() < 0.05
    assert points[-1].norm() < 1e-3  # no vote is about it


def test_implied_triplets_are_of_three_judged_images_each(judged: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ids, votes, _, _ = judged
    drawn, share = implied_votes(2 * ids + 5, votes, 8000, seed=3)  # not every number is an image's
    assert drawn.shape == (8000, 3) and share.shape == (8000,) and share.dtype == torch.float32
    different, counts = torch.unique(drawn, dim=0, return_counts=True)
    assert torch.equal(different, 2 * all_triplets() + 5)  # each of the 504 occurs, and no other
    assert 1 <= counts.min() and counts.max() < 40  # 16 on average
    again, same = implied_votes(2 * ids + 5, votes, 8000, seed=3)
    assert torch.equal(drawn, again) and torch.equal(share, same)


def test_votes_that_say_nothing_of_others_imply_none() -> None:
    ids = torch.arange(300).view(-1, 3)  # each image in one triplet
    votes = (torch.arange(100) % 2).float()
    with pytest.raises(LipsimError, match=r"the 100 votes on 300 images imply none on other triplets"):
        implied_votes(ids, votes, 10)
    again = torch.cat([ids, ids[:, [0, 2, 1]], ids])  # as three judges say, one of whom has seen the sides exchanged
    with pytest.raises(LipsimError, match=r"the 300 votes on 300 images imply none on other triplets"):
        implied_votes(again, torch.cat([votes, 1 - votes, votes]), 10)


def test_judges_of_one_triplet_are_one_question() -> None:
    ids = torch.tensor([[3, 1, 2], [0, 1, 2], [3, 2, 1], [0, 1, 3], [3, 1, 2]])
    question, count = _questions(ids)
    assert question.tolist() == [0, 1, 0, 2, 0] and count == 3
    losses = torch.tensor([0.1, 0.5, 0.2, 0.9, 0.3], dtype=torch.float64)
    sums = [0.1 + 0.2 + 0.3 - 3 * 0.4, 0.5 - 0.4, 0.9 - 0.4]
    expected = math.sqrt(sum(value**2 for value in sums) * 3 / 2) / 5
    assert _standard_error(losses, question, count).item() == pytest.approx(expected)
    alone = _standard_error(losses, torch.arange(5), 5)
    torch.testing.assert_close(alone, losses.std() / math.sqrt(5))


@pytest.mark.parametrize(
    ("ids", "votes", "message"),
    [
        (torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0), r"expected triplets \(N, 3\)"),
        (torch.zeros(6, 3), torch.zeros(6), r"of int64.*float32"),
        (torch.zeros(6, 3, dtype=torch.int64), torch.zeros(5), "a vote for each of 6"),
        (torch.zeros(6, 3, dtype=torch.int64), torch.full((6,), torch.nan), r"votes in \[0, 1\]"),
        (torch.full((6, 3), -1), torch.zeros(6), "expected positions"),
        (torch.tensor([[0, 1, 2]]), torch.zeros(1), "on at least 5 triplets to choose a decay by, got 1"),
    ],
)
def test_what_are_no_votes_is_refused(ids: Tensor, votes: Tensor, message: str) -> None:
    with pytest.raises(LipsimError, match=message):
        embed_votes(ids, votes)
    with pytest.raises(LipsimError, match="at least 3 images, got 2"):
        implied_votes(torch.tensor([[0, 1, 1]] * 6), torch.ones(6), 4)


def test_sets_keep_their_votes_and_get_more(judged: tuple[Tensor, Tensor, Tensor, Tensor], tmp_path: Path) -> None:
    ids, votes, _, _ = judged
    drawn, share = implied_votes(ids, votes, 50, seed=7)
    images = torch.rand(NUM_IMAGES, 3, 8, 8)
    material = MaterialTriplets(images, MaterialAnswers(ids, votes), Preprocess(8)).with_implied(50, seed=7)
    assert torch.equal(material.answers.ids, torch.cat([ids, drawn]))
    assert torch.equal(material.answers.right_vote, torch.cat([votes, share]))

    rng = np.random.default_rng(0)
    names = [f"{number:02d}.png" for number in range(NUM_IMAGES)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / name)
    lines = [f"{names[r]},{names[x]},{names[y]},{vote:g}" for (r, x, y), vote in zip(ids.tolist(), votes, strict=True)]
    file = tmp_path / "t.csv"
    file.write_text("\n".join(["reference,left,right,right_vote", *lines]))
    before = TableTriplets(file, Preprocess(8))
    table = before.with_implied(50, seed=7)
    assert len(before) == len(ids) and table.rows[: len(ids)] == before.rows
    assert [row.paths for row in table.rows[len(ids) :]] == [tuple(names[i] for i in row) for row in drawn.tolist()]
    assert table[len(ids) + 3].right_vote == share[3]
    assert torch.equal(table[len(ids) + 3].left, before.images.load(names[int(drawn[3, 1])]))
