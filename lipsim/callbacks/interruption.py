"""What ends a run: a signal, at which it finishes its step, saves and leaves; or none, so that it saves often."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Collection
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lipsim.evaluation.resume import RemainingData
from lipsim.utils.slurm import slurm_job

_SAVE, _STOP, _REQUEUE = 1, 2, 3  # what the processes agree on by the larger number; 0: go on
TERMINATED = 128 + signal.SIGTERM  # as a shell has it; of an evaluation, whose results are not there yet
AGAIN = 75  # EX_TEMPFAIL of sysexits.h; not 0, so that a script does not go on with a training that has not ended


class Interruption(Callback):
    """Training that is told to end by a signal stops between two steps, on every process at the same one.

    SIGTERM, which schedulers send before they kill, and under SLURM SIGUSR1 as well, which a job asks for by
    ``--signal=SIGUSR1@120``. The step is finished, with all batches that it accumulates; ``last.ckpt`` is written; a
    validation that is due or under way is finished, too; then the process exits with status 0, or 75 where the job is
    put back into the queue. An evaluation finishes its batch, whose results it keeps, and exits with status 143, or 75
    where the signal asks for the queue: a test of ``train.py`` keeps nothing, so the job's script has to decide.

    Lightning's own handlers are replaced meanwhile: they talk to the other processes from within the signal, and save
    in the middle of a step.

    What kills a process sends no signal first. So ``last.ckpt`` is written every now and then as well: an epoch of a
    large data set takes hours.

    Args:
        requeue: names of the signals after which a job of SLURM is put back into its queue (``scontrol requeue``).
            SIGTERM is not among them: it is also what ``scancel`` sends, and jobs that are preempted are requeued by
            SLURM itself.
        save_every: minutes of the first process's clock after which ``last.ckpt`` is written, between two steps.
    """

    def __init__(self, requeue: Collection[str] = ("SIGUSR1",), save_every: float = 30.0) -> None:
        super().__init__()
        self.save_every = save_every
        self._saved = 0.0
        self.requeue = {signal.Signals[name] for name in requeue if hasattr(signal, name)}  # Windows lacks most
        self.received: signal.Signals | None = None
        self._earlier: dict[signal.Signals, Any] = {}
        self._agreed = 0
        self._step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.received, self._agreed = None, 0
        # Those that Lightning finds and puts back in the end.
        self._earlier = {number: signal.getsignal(number) for number in self._signals()}

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen()
        self._step, self._saved = trainer.global_step, time.monotonic()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step or self._agreed:  # accumulating, or saved already
            return
        self._step = trainer.global_step
        agreed = self._agree(trainer)
        if agreed == _SAVE:
            self._save(trainer)
            self._saved = time.monotonic()
        elif agreed:
            self._agreed = agreed
            saved = self._save(trainer)
            name = "a signal" if self.received is None else self.received.name
            rank_zero_info(f"stopping on {name} after step {trainer.global_step}; {saved}")

    # Training stops here rather than where it saved: the log has the step by now, and a validation has been finished.
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._leave(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._leave(trainer)

    # Before the next batch, when the results of the last one have been kept. Each process has its own share.
    def on_test_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        if self.received is not None:
            kept = isinstance(getattr(trainer, "datamodule", None), RemainingData)
            then = "the evaluation continues where it was" if kept else "the test begins anew"
            rank_zero_info(f"stopping on {self.received.name}; called again, {then}")
            raise SIGTERMException(AGAIN if self.received in self.requeue else TERMINATED)

    def _signals(self) -> set[signal.Signals]:
        return {signal.SIGTERM, *(self.requeue if slurm_job() is not None else ())}

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            for number in self._signals():
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Only note it: this is in the middle of anything."""
        name = signal.Signals(number)
        if self.received not in self.requeue:
            self.received = name
        if callable(earlier := self._earlier.get(name)):
            earlier(number, frame)

    def _agree(self, trainer: L.Trainer) -> int:
        """What to do, the same on every process, of which one alone may have got the signal."""
        mine = 0 if self.received is None else _REQUEUE if self.received in self.requeue else _STOP
        if trainer.is_global_zero and time.monotonic() - self._saved >= 60 * self.save_every:
            mine = max(mine, _SAVE)
        if trainer.world_size == 1:
            return mine
        told = torch.tensor(mine, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(told, reduce_op="max"))

    def _save(self, trainer: L.Trainer) -> str:
        """Write ``last.ckpt`` where the run has its checkpoints."""
        found = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        if not found or found[0].dirpath is None:
            return "nothing is saved, since checkpoints are switched off"
        keeper = found[0]
        assert keeper.dirpath is not None
        path = Path(keeper.dirpath) / f"{keeper.CHECKPOINT_NAME_LAST}{keeper.FILE_EXTENSION}"
        keeper.last_model_path = str(path)  # which is part of what is saved
        trainer.save_checkpoint(path, weights_only=False)
        return f"saved {path}, from which --ckpt_path last continues"

    def _leave(self, trainer: L.Trainer) -> None:
        if not self._agreed:
            return
        job = slurm_job()
        if self._agreed == _REQUEUE and job is not None:
            if trainer.is_global_zero:
                _requeue(job)
            # Not before: srun may end the other tasks when one fails.
            trainer.strategy.barrier()
            raise SIGTERMException(AGAIN)
        raise SIGTERMException(0)


def _requeue(job: str) -> None:
    """Put a job back into SLURM's queue."""
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        rank_zero_warn(f"job {job} is not put back into the queue: {said}; submit it again with --ckpt_path last")
    else:
        rank_zero_info(f"job {job} is back in the queue of SLURM")
