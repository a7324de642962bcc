"""results.json: what a run measured, one section a callback, readable without this package.

Schema 1. Scores are shares in [0, 1]; ε and radii are ℓ2 lengths in input pixels in [0, 1]; numbers that are not finite
are null; labels of ε are those of :func:`eps_label`. Fields may be added without a new schema number.

``schema``
    1.
``versions``
    Python and packages → version.
``evaluation`` (scripts/evaluate.py, :func:`lipsim.evaluate`)
    ``checkpoint`` as given, ``checkpoint_sha256`` of the file (both null for a metric in memory), ``metric_sha256``
    over weights, encoder, anchor, bound and resizing, ``image_size``, ``resize`` (see
    :class:`lipsim.data.transforms.Preprocess`); ``triplets`` name of a test set → how many were ``evaluated`` and are
    ``in_set``; ``sample_seed`` of the draw where that was a sample.
``certified`` (:class:`lipsim.callbacks.CertifyRadii`)
    ``lipschitz`` the audited bound, ``layers`` name → bound; ``anchor``; ``feature_error`` that was subtracted,
    ``feature_error_kind`` how it was found ("searched" in [0, 1] and enlarged, or "none": exact arithmetic only), with
    ``feature_error_sample`` images of the data among those searched and ``feature_error_factor``; ``resize``;
    ``precision``; ``eps`` the budgets, ascending; ``sets`` name of a test set or part → ``num_triplets``,
    ``num_tied_votes`` among them, ``majority``
    (without these) and ``vote``, the natural scores,
    ``certified`` (exact radius), ``published`` (LipSim's), ``joint`` (all images move): label → score, ``radius``
    (``mean``, ``median``, ``min``, ``max``), ``one_pixel_immune``, ``curve`` (``eps``, and the three scores there).
``attacked`` (:class:`lipsim.callbacks.AttackRobustness`)
    ``attack`` ("auto" or names), ``attacks`` in their order, ``norm``, ``target``, ``steps``, ``restarts``,
    ``queries``, ``seed``, ``eps``; ``sets`` name → ``num_triplets``, ``num_tied_votes`` among them, ``violations`` of
    certificates (must be 0), and for "metric" and each other one ``natural``, ``attacked`` label → score under the
    worst attack, ``after`` attack → what it and those before it left, and ``no_gradient``, the number of untied
    triplets that attacks with gradients could not try, as every gradient was zero or not finite.
``attack_tables`` (`lipsim attack-tables`)
    what :func:`lipsim.evaluation.side_by_side.measure` returns, and ``data``.
``null_space`` (:class:`lipsim.callbacks.NullSpaceRobustness`)
    ``seed``; ``sets`` name → metric → ``kernel``, and either ``reason`` or what was found.
``baselines``, ``seconds`` (the quickstart)
    natural scores of plain distances; duration of each stage.

What belongs to a metric has ``weights_sha256`` (:func:`state_fingerprint` of the encoder), and what was measured on
data has ``data_sha256``: set or part → :func:`lipsim.data.loading.data_fingerprint`, with the choice of triplets where
that was not the whole set.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lipsim.utils.errors import LipsimError

SCHEMA = 1
_PACKAGES = ("torch", "torchvision", "lightning", "timm", "torchmetrics", "numpy")


def update_results(path: Path, section: str, content: Mapping[str, Any]) -> None:
    """Write one section into a results file; the file is replaced atomically.

    Other sections stay, except those that name other weights (``weights_sha256``) or other data (``data_sha256``).
    Numbers that are not finite become null.

    Raises:
        ValueError: the file is there and is no results file of this schema.
    """
    results: dict[str, Any] = {"schema": SCHEMA}
    if path.is_file():
        results = read_results(path)
    for key in ("weights_sha256", "data_sha256"):
        if key in content:
            own = content[key]
            results = {k: v for k, v in results.items() if not isinstance(v, dict) or v.get(key, own) == own}
    results[section] = _finite(content)
    results["versions"] = versions()
    _replace(path, results)


def keep_sections(path: Path, sections: Collection[str]) -> None:
    """Remove all other sections from a results file; the file is replaced atomically."""
    results = read_results(path)
    _replace(path, {name: results[name] for name in results if name in {"schema", "versions", *sections}})


def _replace(path: Path, results: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_results(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be parsed, or has another schema.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no results at {path}; a test run writes them")
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise LipsimError(f"{path} is no JSON ({error}); remove it and run the test again") from error
    if results.get("schema") != SCHEMA:
        raise LipsimError(
            f"{path} has schema {results.get('schema')!r}, expected {SCHEMA}; remove it and run the test again"
        )
    return results


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("lipsim", *_PACKAGES):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def eps_label(eps: float) -> str:
    """How tables write a budget: ``36/255`` where it is a whole number of 255ths below 1, else the number."""
    steps = round(eps * 255)
    return f"{steps}/255" if 0 < steps < 255 and abs(eps * 255 - steps) < 1e-9 else f"{eps:.12g}"


def commit() -> str | None:
    """Commit of the checkout this runs from, with "+changes" where it was edited; None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")
