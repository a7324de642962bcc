"""The auditor's check: attacks on every kind of certificate of a metric, and faults that it has to catch."""

from lipsim.verify.check import DATA, Verification, sample_triplets, verify

__all__ = ["DATA", "Verification", "sample_triplets", "verify"]
