"""Certify and attack a metric on triplets, on one process or many, and continue where a run was cut short."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import lightning as L
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info

from lipsim.callbacks.attack_robustness import AttackRobustness
from lipsim.callbacks.base import TripletCallback, check_budgets
from lipsim.callbacks.certify_radii import CertifyRadii
from lipsim.callbacks.certify_retrieval import CertifyRetrieval
from lipsim.callbacks.certify_smoothed import CertifySmoothed
from lipsim.callbacks.certify_sum import CertifySum
from lipsim.callbacks.faults import clear_faults
from lipsim.callbacks.null_space_robustness import NullSpaceRobustness
from lipsim.callbacks.run_options import (
    EvaluationOptions,
    check_options,
    make_trainer,
    print_certified,
    quiet_warnings,
)
from lipsim.callbacks.run_record import RunRecord
from lipsim.callbacks.triplet_gallery import TripletGallery
from lipsim.certificates.numbers import check_count
from lipsim.evaluation.exported import EvaluatedMetric, ExportedMetric
from lipsim.evaluation.identity import callback_settings, metric_fingerprint
from lipsim.evaluation.journal import KeepBatches, RowCallback
from lipsim.evaluation.resume import RemainingData, is_of
from lipsim.metric import PerceptualMetric
from lipsim.results import SCHEMA, commit, keep_sections, read_results, update_results, versions
from lipsim.results.schema import EvaluationSection, Results
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import remove_files, remove_leftovers, state_fingerprint
from lipsim.utils.paths import user_path

_KINDS = (
    CertifyRadii,
    CertifyRetrieval,
    CertifySmoothed,
    CertifySum,
    AttackRobustness,
    NullSpaceRobustness,
    TripletGallery,
)


def evaluate(
    metric: PerceptualMetric | str | Path,
    data: L.LightningDataModule,
    *,
    eps: Sequence[float] | None = None,
    callbacks: Sequence[TripletCallback] = (),
    directory: str | Path = "runs/evaluate",
    max_triplets: int | None = None,
    sample_seed: int = 0,
    seed: int | None = 0,
    **options: Unpack[EvaluationOptions],
) -> Results:
    """Certify a metric on the test sets of a data module, and attack it where callbacks do.

    Certifying costs a few percent more than embedding each image once; :class:`lipsim.callbacks.AttackRobustness` costs
    hundreds of times as much. What lasts says how far it is (``enable_progress_bar=False``: nothing). Writes
    results.json, the tables and pictures of the callbacks, and a record of the call into the directory. A run that was
    cut short continues where it was when it is called again; results of another metric or other data in the directory
    are removed when the new ones are complete.

    Args:
        metric: the metric, which stays as it is; or the file or bundled name of one.
        data: a data module of triplets with test sets.
        eps: ℓ2 budgets to certify at, in input pixels in [0, 1], ascending. None: those of
            :class:`lipsim.callbacks.CertifyRadii`, unless callbacks are given.
        callbacks: what else to find out; without ``eps``, all that is found out.
        directory: of the results.
        max_triplets: of each set, drawn at random; None: all.
        sample_seed: of that draw; a larger one has a smaller.
        seed: of the generators of Python, numpy and torch, which are set to it; None leaves them alone. Attacks have
            seeds of their own.
        options: of :class:`lightning.Trainer`: ``accelerator``, ``devices``, ``strategy``, …

    Returns:
        The contents of results.json (:mod:`lipsim.results.schema`).

    Raises:
        FileNotFoundError: no such metric or data.
        ValueError: a metric without a bound to certify with, bad budgets, images or votes, or an unfinished evaluation
            of something else in the same directory.
    """
    check_options(options, EvaluationOptions)
    if max_triplets is not None:
        check_count("max_triplets", max_triplets)
    _check_kinds(metric, data, callbacks)
    callbacks = list(callbacks)
    if eps is not None or not callbacks:
        if any(isinstance(callback, CertifyRadii) for callback in callbacks):
            raise LipsimError("expected budgets either as eps or in a CertifyRadii among the callbacks, got both")
        callbacks.insert(0, CertifyRadii() if eps is None else CertifyRadii(check_budgets(eps)))
    if isinstance(metric, PerceptualMetric):
        module = EvaluatedMetric(copy.deepcopy(metric).requires_grad_(False))
    else:
        module = ExportedMetric(str(metric))
    if seed is not None:
        L.seed_everything(seed, workers=True)
    record = {
        "metric": module.checkpoint or module.metric,
        "data": data,
        "callbacks": callbacks,
        "directory": directory,
        "max_triplets": max_triplets,
        "sample_seed": sample_seed,
        "seed": seed,
        **options,
    }
    given = {
        **options,
        "default_root_dir": str(user_path(directory)),
        "enable_checkpointing": False,
        "use_distributed_sampler": False,  # see run_evaluation
        "callbacks": [*callbacks, RunRecord("evaluate", record)],
    }
    with quiet_warnings():
        trainer = make_trainer(given)
        return run_evaluation(trainer, module, data, max_triplets=max_triplets, sample_seed=sample_seed)


def _check_kinds(metric: object, data: object, callbacks: Sequence[object]) -> None:
    """Refuse what is of another kind than :func:`evaluate` takes, before it fails somewhere inside.

    Raises:
        ValueError: it is.
    """
    if not isinstance(metric, PerceptualMetric | str | Path):
        raise LipsimError(
            f"expected a metric, a file or the name of a bundled one, got {type(metric).__name__}; "
            "lipsim.PerceptualMetric(encoder, image_size) makes a metric of an encoder"
        )
    if not isinstance(data, L.LightningDataModule):
        raise LipsimError(
            f"expected a data module, such as lipsim.datamodules.BuiltinData(), got {type(data).__name__}"
        )
    for callback in callbacks:
        if not isinstance(callback, TripletCallback):
            raise LipsimError(f"expected callbacks of lipsim.callbacks on triplets, got {type(callback).__name__}")


def run_evaluation(
    trainer: L.Trainer,
    module: EvaluatedMetric,
    data: L.LightningDataModule,
    *,
    max_triplets: int | None = None,
    sample_seed: int = 0,
) -> Results:
    """:func:`evaluate` with a trainer that has the callbacks, and ``use_distributed_sampler=False``.

    (The loaders have been shared among processes when Lightning sees them; its sampler would repeat triplets.)

    Returns:
        The contents of results.json; of a trial (``fast_dev_run``), no section.
    """
    with clear_faults(trainer, evaluation=True):
        return _run(trainer, module, data, max_triplets, sample_seed)


def _run(
    trainer: L.Trainer,
    module: EvaluatedMetric,
    data: L.LightningDataModule,
    max_triplets: int | None,
    sample_seed: int,
) -> Results:
    if trainer.limit_test_batches == 0:
        raise LipsimError("nothing to evaluate: limit_test_batches is 0; leave it out, or give --max_triplets")
    callbacks = [c for c in trainer.callbacks if isinstance(c, TripletCallback)]  # type: ignore[attr-defined]
    if not callbacks:
        raise LipsimError("nothing to evaluate: name lipsim.callbacks.CertifyRadii, AttackRobustness, … as callbacks")
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise LipsimError(
            "processes that are forked or spawned cannot hand their results back; evaluate on devices=1, or by "
            "strategy 'ddp' in a script"
        )
    directory, trial = Path(trainer.default_root_dir), bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
    path = directory / "results.json"
    # Now rather than when everything is computed: a file that cannot be read is refused.
    earlier = read_results(path) if trainer.is_global_zero and path.is_file() else None
    metric_sha256 = metric_fingerprint(module.metric)
    settings = {
        "metric_sha256": metric_sha256,
        "callbacks": [callback_settings(c) for c in trainer.callbacks if isinstance(c, RowCallback)],  # type: ignore[attr-defined]
        "accelerator": type(trainer.accelerator).__name__,
        "precision": str(trainer.precision),
        "versions": versions(),
        "commit": commit(),
        "limit_test_batches": trainer.limit_test_batches,
        "max_triplets": max_triplets,
        "sample_seed": sample_seed,
        "rows": "by position",  # what an earlier version kept by index is not continued
    }
    keep = KeepBatches(directory / "unfinished", settings)
    trainer.callbacks.append(keep)  # type: ignore[attr-defined]
    remaining = RemainingData(data, keep, max_triplets, sample_seed)
    trainer.test(module, datamodule=remaining, verbose=False)
    results: Results = {"schema": SCHEMA, "versions": versions()}
    if trial:
        return results
    if trainer.is_global_zero:
        remove_leftovers(directory)  # of a process that was killed
        weights_sha256 = state_fingerprint(module.metric.encoder.state_dict())
        hashes: dict[str, str] = {}
        for name, fingerprint in remaining.fingerprints.items():
            parts = (f"{name}_{part}" for part in remaining.test_groups.get(name, {}))
            hashes |= dict.fromkeys([name, *parts], fingerprint)
        if earlier is None or not is_of(earlier, metric_sha256, weights_sha256, hashes):
            if earlier is not None:
                rank_zero_info(f"removing the results of another evaluation from {directory}")
            # Without results.json nothing said what the files were of.
            _remove_others(trainer, directory, callbacks)
        content: EvaluationSection = {
            "weights_sha256": weights_sha256,
            "metric_sha256": metric_sha256,
            "checkpoint": module.checkpoint,
            "checkpoint_sha256": module.checkpoint_sha256,
            "image_size": module.metric.image_size,
            "resize": module.metric.preprocess.label,
            "triplets": remaining.triplets,
            "sample_seed": sample_seed,
        }
        update_results(path, {"evaluation": content})
        print_certified(trainer)
        results = read_results(path)
    # Not from the file, which is on the disk of another node perhaps.
    shared: Results = trainer.strategy.broadcast(results)
    return shared


def _remove_others(trainer: L.Trainer, directory: Path, callbacks: Sequence[TripletCallback]) -> None:
    """Remove sections and files of an earlier evaluation; these callbacks have replaced their own.

    Tables and pictures of another metric or other data would stand beside the new ones as if they belonged to them.
    """
    own = [callback for callback in callbacks if callback.output_directory(trainer).absolute() == directory.absolute()]
    path = directory / "results.json"
    if path.is_file():
        keep_sections(path, {section for callback in own for section in callback.sections})
    others = [kind for kind in _KINDS if not any(isinstance(callback, kind) for callback in own)]
    remove_files(directory, [pattern for kind in others for pattern in kind.files])
