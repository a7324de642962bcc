"""The auditor's check: attacks on every kind of certificate of a metric, and faults that it has to catch."""

from lipsim.evaluation.verify.check import Verification, verify

__all__ = ["Verification", "verify"]
