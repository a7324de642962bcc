"""`lipsim info`: what a metric is."""

from __future__ import annotations

import argparse
import json
from typing import Any

from lipsim.cli.parser import DEFAULT_METRIC, add_metric_argument, add_output
from lipsim.metric.files import AUDITED, read_facts
from lipsim.utils.errors import LipsimError
from lipsim.utils.framings import DEFAULT_GRID
from lipsim.utils.terminal import text_table

EXAMPLES = ("lipsim info", "lipsim info quickstart", "lipsim info runs/m.safetensors --json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim info` takes."""
    parser.description = (
        "What the file of a metric says: the encoder, how images come to it, the Lipschitz bound that radii divide by, "
        "the threshold of `lipsim same`, and the notes of whoever made it. Nothing is computed: `lipsim audit` bounds "
        "the weights, as every certificate does, whatever the file claims."
    )
    kinds = "a .safetensors file, a .ckpt of training, or the name of a bundled metric"
    add_metric_argument(parser, framing=False, default=None, kinds=kinds, otherwise=DEFAULT_METRIC)
    parser.add_argument("--metric", dest="named", metavar="FILE", help="the same, as `lipsim distance` takes it")
    add_output(parser, rows=False)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if None not in (options.metric, options.named):
        raise LipsimError(f"expected one metric, got {options.metric} and --metric {options.named}")
    found = read_facts(options.metric or options.named or DEFAULT_METRIC)
    facts: dict[str, Any] = {"file": str(found.file), "sha256": found.sha256, "values": found.values}
    # What a header says under these names is no fact.
    facts |= {name: value for name, value in found.header.items() if name not in facts}
    if options.json:
        print(json.dumps(facts, indent=1))
        return 0
    print(text_table(("", ""), _lines(facts)).lstrip("\n"))
    return 0


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What a person reads, name by name."""
    header = dict(facts)
    size = header.pop("image_size", "?")
    bound, error = header.pop("lipschitz", None), header.pop("feature_error", None)
    kind, framing = header.pop("feature_error_kind", "declared"), header.pop("framing", "stretch")
    grid, depth = header.pop("grid", DEFAULT_GRID), "8 bits" if header.pop("resize", "") == "pil" else "float"
    threshold, notes, config = (header.pop(name, None) for name in ("threshold", "notes", "config"))
    lines = [
        ("file", str(header.pop("file"))),
        ("SHA-256", str(header.pop("sha256"))),
        ("encoder", str(header.pop("encoder", "?"))),
        *_named("  {}", "configuration", config),
        ("numbers in it", f"{header.pop('values'):,}"),
        ("images", f"{_images(size, framing, grid)}, resized in {depth}"),
        ("anchor", _text(header.pop("anchor", "?"))),
        ("Lipschitz bound", _bound(bound)),
        ("feature error", f"{error:.3g} ({kind})" if isinstance(error, float) and error else "none declared"),
        ("threshold", _threshold(threshold)),
        *((name, _text(value)) for name, value in header.items()),
        *_named("note: {}", "notes", notes),
    ]
    return lines


def _named(form: str, name: str, values: Any) -> list[tuple[str, str]]:
    """A line for each of some values, or one for what a foreign header has in their place."""
    if values is None or isinstance(values, dict):
        return [(form.format(key), _text(value)) for key, value in (values or {}).items()]
    return [(name, _text(values))]


def _bound(bound: Any) -> str:
    if bound is None:
        return "none, nothing is certified"
    if bound == AUDITED:
        return "audited when it is loaded"
    return f"{bound:.9g}, audited again by every certificate" if isinstance(bound, int | float) else _text(bound)


def _images(size: Any, framing: str, grid: Any) -> str:
    """What the metric sees of an image."""
    if framing == "tiles":
        return f"tiles, {grid} × {grid} of {size} × {size}"
    return f"{size} × {size}, {framing}"


def _threshold(threshold: Any) -> str:
    if not isinstance(threshold, dict):
        return "none; lipsim calibrate chooses one"
    value, rate, pairs = (threshold.get(name) for name in ("value", "far", "pairs"))
    if not (isinstance(value, int | float) and isinstance(rate, int | float) and isinstance(pairs, dict)):
        return _text(threshold)
    return (
        f"{value:.6g}, false-accept rate ≤ {rate:g} on {pairs.get('different')} "
        f"different pairs, {pairs.get('same')} same ones"
    )


def _text(value: Any) -> str:
    """A value in one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
