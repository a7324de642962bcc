"""The distance up to which two images count as the same: how it is chosen, and how files keep it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from torch import Tensor

from lipsim.certificates.numbers import check_count, check_number
from lipsim.utils.errors import LipsimError

# How far distances of the same images may differ from batch to batch, relative.
_ACCURACY = 1e-5


@dataclass(frozen=True)
class Threshold:
    """Two images count as the same where ``d(x, y) ≤ value``.

    Attributes:
        value: ``τ`` in [0, 2].
        far: the share of different pairs that it was allowed to take for the same.
        same_pairs: how many pairs of the same it was checked on.
        different_pairs: how many different pairs it was chosen on.
        data_sha256: of the pairs and their images.
    """

    value: float
    far: float
    same_pairs: int
    different_pairs: int
    data_sha256: str

    def header(self) -> dict[str, Any]:
        """What the header of a metric's file has under "threshold" (JSON)."""
        pairs = {"same": self.same_pairs, "different": self.different_pairs}
        return {"value": self.value, "far": self.far, "pairs": pairs, "data_sha256": self.data_sha256}

    @classmethod
    def from_header(cls, content: Any) -> Self:
        """A threshold from the header of a file, which may say anything.

        Raises:
            ValueError: it is no threshold.
        """
        pairs = content.get("pairs") if isinstance(content, Mapping) else None
        if not isinstance(pairs, Mapping):
            raise LipsimError(f"expected a threshold with value, far, pairs and data_sha256, got {content!r:.80}")
        return cls(
            value=check_number("threshold in [0, 2], the range of the distance,", content.get("value"), 0, 2),
            far=check_number("false-accept rate", content.get("far"), 0, 1),
            same_pairs=check_count("of same pairs", pairs.get("same"), 0),
            different_pairs=check_count("of different pairs", pairs.get("different"), 1),
            data_sha256=str(content.get("data_sha256")),
        )

    def facts(self) -> dict[str, Any]:
        """Every field, for JSON."""
        return asdict(self)


def choose_threshold(different: Tensor, far: float) -> float:
    """The largest threshold that takes at most a share ``far`` of different pairs for the same.

    With ``k`` the most pairs that may be, it lies below the ``k + 1``-th smallest distance by the accuracy of a
    distance in float32 (a relative 1e-5), so that the pair that has to be told apart is, in every batch.

    Args:
        different: ``(N,)`` distances of pairs that are not the same.
        far: share in [0, 1].

    Raises:
        ValueError: no pairs, a distance that is no number, a share outside [0, 1], or too many pairs of distance 0.

    Example:
        >>> import torch
        >>> print(f"{choose_threshold(torch.tensor([0.4, 0.1, 0.3, 0.2]), far=0.25):.4f}")  # below 0.2, above 0.1
        0.2000
    """
    far = check_number("false-accept rate", far, 0, 1)
    ordered = different.double().sort().values.tolist()
    count = len(ordered)
    if not count or different.isnan().any():
        raise LipsimError(f"expected distances of different pairs to choose a threshold on, got {ordered[-3:]}")
    accepted = int(far * count)
    accepted += (accepted + 1) / count <= far  # 0.29 · 100 is below 29
    if accepted >= count:
        return 2.0
    value: float = ordered[accepted] * (1 - _ACCURACY)
    if value <= 0:
        zeros = sum(distance == 0 for distance in ordered)
        raise LipsimError(
            f"no threshold has a false-accept rate of at most {far:g}: {zeros} of {count} different pairs have the "
            "distance 0, as copies of one image do; take them out of the different pairs"
        )
    return value
