"""What is wrong with data: with a batch before it reaches an encoder, and with the files of a set on disk."""

from lipsim.data.check.batches import check_images, check_votes, images_of
from lipsim.data.check.expected import KINDS, Count, Problem, guess_kind
from lipsim.data.check.files import DataCheck, check_data

__all__ = [
    "KINDS",
    "Count",
    "DataCheck",
    "Problem",
    "check_data",
    "check_images",
    "check_votes",
    "guess_kind",
    "images_of",
]
