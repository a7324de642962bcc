"""As much of SLURM as job scripts see: sbatch, srun and scontrol for one machine, without a queue.

``fake_slurm.py sbatch`` reads the options of a script as sbatch does (#SBATCH lines, SBATCH_ variables, command line:
the later win), runs a copy of it with the variables that SLURM sets, each element of an array in turn, and starts it
again when it was requeued. ``srun`` starts its tasks, all of them here: nodes differ by number alone. Once in a job,
when ``FAKE_SLURM_SIGNAL_ON`` is in its output, the signal of ``--signal`` is sent, as SLURM does: to every process of
every step, or with ``B:`` to the shell of the script.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(os.environ.get("FAKE_SLURM", "."))
GRACE = 20.0  # seconds between SIGTERM and SIGKILL


def options_of(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Options of sbatch or srun, and what follows them."""
    found = {}
    while words and words[0].startswith("-"):
        name, equals, value = words.pop(0).partition("=")
        assert name.startswith("--"), f"{name} is not known here"
        found[name[2:]] = value if equals else "yes"
    return found, words


def sbatch(words: list[str]) -> int:
    given, (script, *args) = options_of(words)
    text = Path(script).read_text()
    head = re.split(r"^(?!#|\s*$)", text, maxsplit=1, flags=re.MULTILINE)[
        0
    ]  # lines after the first command do not count
    options, rest = options_of(shlex.split(" ".join(re.findall(r"^#SBATCH (.*)$", head, re.MULTILINE)), comments=True))
    assert not rest, rest
    names = {"SBATCH_ACCOUNT": "account", "SBATCH_PARTITION": "partition", "SBATCH_TIMELIMIT": "time"}
    options |= {option: os.environ[name] for name, option in names.items() if name in os.environ}
    options |= given
    number = 1 + max([1000, *(int(path.stem) for path in HERE.glob("*.job"))])
    copy = HERE / f"{number}.job"
    copy.write_text(text)
    elements: list[int | None] = [None]
    if "array" in options:
        first, _, last = options["array"].partition("-")
        elements = list(range(int(first), int(last or first) + 1))
    status = 0
    for place, element in enumerate(elements):
        status = max(status, job(copy, args, options, number, number + place, element))
        (HERE / f"{number + place}.job").touch()
    return status


def job(script: Path, args: list[str], options: dict[str, str], first: int, number: int, element: int | None) -> int:
    nodes, tasks = int(options.get("nodes", "1")), int(options["ntasks-per-node"])
    environment = {
        **os.environ,
        "SLURM_JOB_ID": str(number),
        "SLURM_JOB_NAME": options["job-name"],
        "SLURM_JOB_NODELIST": f"127.0.0.[1-{nodes}]" if nodes > 1 else "127.0.0.1",
        "SLURM_NODELIST": f"127.0.0.[1-{nodes}]" if nodes > 1 else "127.0.0.1",
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS": str(nodes * tasks),
        "SLURM_NTASKS_PER_NODE": str(tasks),
        "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
        "SLURM_SUBMIT_DIR": os.getcwd(),
    }
    # The batch shell is the first task of the job, as it were.
    environment |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    if options.get("gpus-per-node", "0") != "0":
        environment["SLURM_GPUS_ON_NODE"] = options["gpus-per-node"]
    if element is not None:
        environment |= {"SLURM_ARRAY_JOB_ID": str(first), "SLURM_ARRAY_TASK_ID": str(element)}
        environment["FAKE_SLURM_FIRST"] = str(element - (number - first))
    name = options["output"].replace("%x", options["job-name"]).replace("%j", str(number))
    log = HERE / name.replace("%A", str(first)).replace("%a", str(element))
    requeued, signalled = HERE / f"{number}.requeue", False
    while True:
        mode = "ab" if options.get("open-mode") == "append" else "wb"
        with log.open(mode) as out:
            shell = subprocess.Popen(
                ["bash", str(script), *args], env=environment, stdout=out, stderr=out, start_new_session=True
            )
            while shell.poll() is None and not requeued.exists():
                if not signalled and (trigger := os.environ.get("FAKE_SLURM_SIGNAL_ON")):
                    if trigger in log.read_text():
                        signalled = True
                        send_signal(options["signal"], shell.pid, number)
                time.sleep(0.05)
        if not requeued.exists():
            return shell.returncode
        end(shell, number)
        requeued.unlink()
        environment["SLURM_RESTART_COUNT"] = str(1 + int(environment.get("SLURM_RESTART_COUNT", "0")))


def send_signal(option: str, shell: int, number: int) -> None:
    """What ``--signal=[B:]NAME@SECONDS`` says."""
    name = option.partition("@")[0]
    if name.startswith("B:"):
        os.kill(shell, signal.Signals[name[2:]])
        return
    for group in groups(number):
        os.killpg(group, signal.Signals[name])


def groups(number: int) -> list[int]:
    """Process groups of the tasks of a job that still run."""
    found = []
    for path in HERE.glob(f"{number}.task-*"):
        try:
            os.killpg(int(path.suffix.removeprefix(".task-")), 0)
        except ProcessLookupError:
            path.unlink()
        else:
            found.append(int(path.suffix.removeprefix(".task-")))
    return found


def end(shell: subprocess.Popen[bytes], number: int) -> None:
    """What a requeued job meets: SIGTERM to its tasks and its shell, and SIGKILL to what is left after a while."""
    for group in [*groups(number), *([shell.pid] if shell.poll() is None else [])]:
        os.killpg(group, signal.SIGTERM)
    start = time.monotonic()
    while (shell.poll() is None or groups(number)) and time.monotonic() < start + GRACE:
        time.sleep(0.05)
    for group in groups(number):
        os.killpg(group, signal.SIGKILL)
    if shell.poll() is None:
        os.killpg(shell.pid, signal.SIGKILL)
    shell.wait()


def srun(words: list[str]) -> int:
    options, command = options_of(words)
    count, per_node = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
    assert os.environ["SRUN_CPUS_PER_TASK"] == os.environ["SLURM_CPUS_PER_TASK"]
    tasks = []
    for rank in range(count):
        own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % per_node), "SLURM_NODEID": str(rank // per_node)}
        own |= {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(count)}
        task = subprocess.Popen(command, env={**os.environ, **own}, start_new_session=True)
        (HERE / f"{os.environ['SLURM_JOB_ID']}.task-{task.pid}").touch()
        tasks.append(task)
    while any(task.poll() is None for task in tasks):
        if options.get("kill-on-bad-exit") == "1" and any(task.poll() for task in tasks):
            time.sleep(0.5)
            for task in tasks:
                if task.poll() is None:
                    os.killpg(task.pid, signal.SIGKILL)
        time.sleep(0.05)
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks)


def scontrol(words: list[str]) -> int:
    verb, number = words
    assert verb == "requeue"
    first, _, element = number.partition("_")  # of an array: the job and the element
    if element:
        number = str(int(first) + int(element) - int(os.environ["FAKE_SLURM_FIRST"]))
    elif "SLURM_ARRAY_JOB_ID" in os.environ:
        raise AssertionError(f"{first} stands for a whole array, whose other elements would be put back as well")
    (HERE / f"{number}.requeue").touch()
    return 0


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
