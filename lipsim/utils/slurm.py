"""What SLURM says of a process: which of several it is, and of which job."""

from __future__ import annotations

import os

from lipsim.utils.errors import LipsimError


def check_slurm() -> None:
    """Refuse a SLURM environment in which Lightning could not tell which process this is.

    Raises:
        ValueError: tasks, but not how many a node has, or not which of them this is.
    """
    tasks, name = os.environ.get("SLURM_NTASKS"), os.environ.get("SLURM_JOB_NAME")
    if tasks is None or name in ("bash", "interactive"):  # what Lightning takes for a shell on a node
        return
    alone = "or set SLURM_JOB_NAME=interactive to run one process here"
    if missing := [v for v in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID") if v not in os.environ]:
        raise LipsimError(f"SLURM_NTASKS is {tasks} and {missing[0]} is not set; start with srun, {alone}")
    if tasks != "1" and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise LipsimError(
            f"SLURM_NTASKS is {tasks} and SLURM_NTASKS_PER_NODE is not set; give srun or sbatch --ntasks-per-node in "
            f"place of --ntasks, and --trainer.devices the same number, {alone}"
        )


def slurm_job() -> str | None:
    """The job of SLURM that this process is of, as ``scontrol`` takes it, one of an array too; None without one.

    A shell on a node, where commands are started by hand, counts as none.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return job if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
