"""One of several processes that dies or fails stops the others, with a message that names it."""

from __future__ import annotations

import os
import sys
import threading
from datetime import timedelta

import lightning as L
import torch.distributed
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lipsim.callbacks.interruption import TERMINATED
from lipsim.utils.errors import LipsimError
from lipsim.utils.peers import Peers
from lipsim.utils.terminal import one_line

TIMEOUT = "LIPSIM_PROCESS_TIMEOUT"  # an environment variable: seconds
# In training processes wait for each other at every step. The shares of an evaluation may differ by days.
_TRAINING, _EVALUATION = timedelta(minutes=30), timedelta(days=7)
_GRACE = 3.0  # seconds that a process has to stop by itself, when what it waits for fails


class ProcessWatch(Callback):
    """Has every process of a run stop, within seconds, when one of them is gone.

    Without it the others wait: with gloo until a connection fails, whose error names nobody; with NCCL until the time
    limit of the process group. A process that is alive and does not answer is noticed by that limit: 30 minutes of
    training, 7 days of an evaluation, or the seconds that the environment variable ``LIPSIM_PROCESS_TIMEOUT`` says.

    Attributes:
        gone: the sentence about the process that is gone; empty while all are there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gone = ""
        self._peers: Peers | None = None
        self._remedy = ""
        self._said, self._stopping = threading.Event(), threading.Event()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.gone = ""
        self._remedy = "resume with --ckpt_path last" if stage == "fit" else "the same command continues an evaluation"
        self._said.clear()
        self._stopping.clear()
        if trainer.world_size == 1 or not isinstance(trainer.strategy, DDPStrategy):
            return
        peers = Peers(trainer.global_rank, trainer.world_size, self._stop)
        first = trainer.strategy.broadcast(peers.listen() if trainer.is_global_zero else {})
        environment = trainer.strategy.cluster_environment
        try:
            if not trainer.is_global_zero and environment is not None:
                peers.join(first, environment.main_address)
        except OSError as error:
            print(
                f"process {trainer.global_rank} cannot reach process 0 at {first['host']}:{first['port']} ({error}): "
                "if one of the two is killed, the other notices by the time limit of the process group alone",
                file=sys.stderr,
            )
        self._peers = peers

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._peers is not None:
            self._peers.leave()
            self._peers = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        peers, self._peers = self._peers, None
        if peers is None:
            return
        if is_of_a_connection(exception):
            self._said.wait(_GRACE)  # who is gone: the error alone does not tell
        self._stopping.set()
        if isinstance(exception, SIGTERMException) and exception.code != TERMINATED:  # all have agreed to stop
            peers.leave()
        else:
            peers.fail(_reason(exception))

    def _stop(self, sentence: str) -> None:
        """In a thread of its own: say it, and see that this process ends, which may be waiting for that other one."""
        if self._stopping.is_set():  # it ends for a reason of its own
            return
        self.gone = sentence
        print(f"error: {sentence}; all stop, {self._remedy}", file=sys.stderr, flush=True)
        self._said.set()
        if not self._stopping.wait(_GRACE):
            os._exit(1)


def _reason(exception: BaseException) -> str:
    """What the others are told; a process that ends by itself has a status for a message."""
    if isinstance(exception, SIGTERMException):
        return "it was told to by a signal"
    return one_line(str(exception)) or type(exception).__name__


def limit_waiting(trainer: L.Trainer, evaluation: bool) -> None:
    """Set how long the processes of a trainer wait for each other, before it starts.

    Raises:
        ValueError: the environment variable is no number of seconds.
    """
    strategy, given = trainer.strategy, os.environ.get(TIMEOUT)
    if not isinstance(strategy, DDPStrategy):
        return
    timeout = _EVALUATION if evaluation else _TRAINING
    if given is not None:
        try:
            seconds = float(given)
        except ValueError:
            seconds = 0.0
        if not seconds > 0:
            raise LipsimError(f"expected {TIMEOUT} to be a positive number of seconds, got {given!r}")
        timeout = timedelta(seconds=seconds)
    elif strategy._timeout != torch.distributed.constants.default_pg_timeout:
        return  # of a strategy that was given with one
    strategy._timeout = timeout  # no public name, though an argument of the class


def is_of_a_connection(error: BaseException) -> bool:
    """Whether an error is what torch makes of another process that does not answer."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "ProcessGroup")
    )
