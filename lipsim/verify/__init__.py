"""The auditor's check: attacks on every kind of certificate of a metric, and faults that it has to catch."""

from lipsim.verify.check import Verification, sample_triplets, verify

__all__ = ["Verification", "sample_triplets", "verify"]
