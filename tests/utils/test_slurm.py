"""What SLURM's variables say of a process."""

from __future__ import annotations

import pytest

from lipsim.utils.slurm import slurm_job, was_requeued


@pytest.mark.parametrize(
    ("variables", "job", "requeued"),
    [
        ({}, None, False),
        ({"RESTART_COUNT": "1"}, None, False),
        ({"JOB_ID": "7"}, "7", False),
        ({"JOB_ID": "7", "RESTART_COUNT": "0"}, "7", False),
        ({"JOB_ID": "7", "RESTART_COUNT": "2"}, "7", True),
        ({"JOB_ID": "7", "ARRAY_JOB_ID": "5", "ARRAY_TASK_ID": "2"}, "5_2", False),
        ({"JOB_ID": "7", "JOB_NAME": "interactive", "RESTART_COUNT": "1"}, None, False),
    ],
)
def test_jobs(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], job: str | None, requeued: bool) -> None:
    for name in ("JOB_ID", "JOB_NAME", "RESTART_COUNT", "ARRAY_JOB_ID", "ARRAY_TASK_ID"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert slurm_job() == job and was_requeued() == requeued
