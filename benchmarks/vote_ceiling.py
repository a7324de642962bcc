"""How often the best possible metric agrees with a majority of few judges: the ceiling of natural scores on Material.

    python benchmarks/vote_ceiling.py [--material ../shared/data/material-appearance-similarity]

The probability that a judge chooses one side of a triplet is taken from a symmetric beta distribution, whose one
parameter is fitted to all votes by likelihood; then the probability that the side of a majority is the side that judges
prefer follows for each triplet (beta-binomial model).

And what the votes of a training say of others: ordinal embeddings, a free point for each image (lipsim.data.ordinal),
of the votes that a metric trains on, scored on the 2,000 held-out triplets of the same images. Half a minute of a core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special
from torch.nn import functional

from lipsim.cli.parser import OneLineParser, one_line_errors
from lipsim.data.ordinal import DECAYS, embed_votes
from lipsim.data.sets.material import NUM_IMAGES, load_material_answers, split_material
from lipsim.results.formats import markdown_table
from lipsim.utils.errors import LipsimError
from lipsim.utils.progress import Progress

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class VoteModel:
    """Votes of judges whose probability to choose a side is Beta(shape, shape) over triplets.

    Attributes:
        shape: small where judges agree, large where all of them toss coins.
    """

    shape: float

    @classmethod
    def fit(cls, most: Counts, judges: Counts) -> VoteModel:
        """The shape under which the votes are likeliest, between 0.01 and 100.

        Args:
            most: ``(N,)``, votes for the side that has more, or half of them.
            judges: ``(N,)``, all votes of the triplet.
        """

        def surprise(log_shape: float) -> float:
            shape = np.exp(log_shape)
            return -float((special.betaln(most + shape, judges - most + shape) - special.betaln(shape, shape)).sum())

        found = optimize.minimize_scalar(surprise, bounds=np.log([0.01, 100]), method="bounded")
        return cls(float(np.exp(found.x)))

    def majority_is_right(self, most: Counts, judges: Counts) -> NDArray[np.float64]:
        """Probability ``(N,)`` that judges as a whole prefer the side which has the majority of these few."""
        # The posterior of the side's probability is Beta(most + shape, others + shape).
        found: NDArray[np.float64] = special.betainc(judges - most + self.shape, most + self.shape, 0.5)
        return found

    def expected(self, most: int, judges: int) -> float:
        """Share of the triplets of so many judges that give a side, either one, so many votes."""
        log = special.betaln(most + self.shape, judges - most + self.shape) - special.betaln(self.shape, self.shape)
        sides = 1 if 2 * most == judges else 2
        return float(sides * special.comb(judges, most) * np.exp(log))


def material_votes(root: Path) -> tuple[Counts, Counts]:
    """Votes for the side that has more, and all votes, of each triplet of the official training part."""
    file = root / "data" / "answers_processed_train.json"
    if not file.is_file():
        raise LipsimError(f"no {file}: name a clone of mlagunas/material-appearance-similarity by --material")
    votes = np.array(json.loads(file.read_text(encoding="utf-8"))["agreement"], dtype=np.int64)
    return votes.max(axis=1), votes.sum(axis=1)


def free_points(root: Path, progress: Progress) -> list[dict[str, str]]:
    """Scores of ordinal embeddings on held-out triplets, by decay; the chosen one comes last."""
    split = split_material(load_material_answers(root))
    held_out, rows = split.triplets, []
    for decay in (*DECAYS, None):
        progress(f"ordinal embedding of decay {decay or 'to be chosen'}")
        found = embed_votes(split.train.ids, split.train.right_vote, num_images=NUM_IMAGES, decay=decay)
        share = found.right_share(held_out.ids)
        right = (share > 0.5) == (held_out.right_vote > 0.5)
        loss = functional.binary_cross_entropy(share, held_out.right_vote)
        rows.append(
            {
                "decay": f"{found.decay:g}" + (" (chosen)" if decay is None else ""),
                "log-loss": f"{float(loss):.3f}",
                "held-out majorities, %": f"{100 * float(right.double().mean()):.1f}",
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, and print how well that describes the votes, and the ceiling."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--material", type=Path, default=Path("../shared/data/material-appearance-similarity"))
    with one_line_errors():
        root = parser.parse_args(arguments).material
        most, judges = material_votes(root)
        with Progress("votes") as progress:
            points = free_points(root, progress)
    model, untied = VoteModel.fit(most, judges), 2 * most > judges
    right = model.majority_is_right(most, judges)
    rows = []
    for count in range(1, 6):
        found = judges == count
        votes = range((count + 1) // 2, count + 1)
        seen = [f"{most_votes}: {(most[found] == most_votes).mean():.1%}" for most_votes in votes]
        fitted = [f"{most_votes}: {model.expected(most_votes, count):.1%}" for most_votes in votes]
        best = right[found & untied].mean()
        rows.append(
            {
                "judges": str(count),
                "triplets": str(found.sum()),
                "votes for the side with more": ", ".join(seen),
                "of the model": ", ".join(fitted),
                "best metric, %": f"{100 * best:.1f}",
            }
        )
    print(markdown_table(rows))
    print(f"\nshape {model.shape:.3f}; best metric on all {untied.sum()} untied triplets: {right[untied].mean():.1%}\n")
    print(markdown_table(points))


if __name__ == "__main__":
    main()
