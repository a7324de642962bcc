"""Triplet sets, image folders and transforms."""

from lipsim.data.builtin.triplets import BuiltinTriplets
from lipsim.data.triplet import SharedTriplet, Triplet, collate_triplets

__all__ = ["BuiltinTriplets", "SharedTriplet", "Triplet", "collate_triplets"]
