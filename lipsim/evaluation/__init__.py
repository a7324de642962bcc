"""Scoring a metric on triplets: the module behind a test, its scores, and resuming it."""
