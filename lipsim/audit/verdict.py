"""A bound beside what a network really reaches: whether anything exceeds what is claimed for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from lipsim.audit import lower_bounds
from lipsim.audit.arithmetic import largest_feature_error
from lipsim.audit.bounds import LayerBound, LipschitzReport, lipschitz_bound
from lipsim.utils.errors import LipsimError
from lipsim.utils.terminal import text_table

# Of lower bounds in float64 beside upper ones that are rounded up.
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class AuditVerdict:
    """What :func:`check` found.

    Attributes:
        report: the proven bounds, of each layer and of the whole.
        reached: name of each layer of the report → the largest Jacobian norm at the images, a lower bound.
        lower_bound: the largest growth of the whole network that an attack found.
        feature_error: the largest error of a forward pass in the dtype of the weights that was seen, in feature units.
        samples: how many images were looked at.
        failures: one line for each bound that was exceeded, and where the total is above what was required.
    """

    report: LipschitzReport
    reached: dict[str, float]
    lower_bound: float
    feature_error: float
    samples: int
    failures: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing exceeds its bound."""
        return not self.failures

    def facts(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "lipschitz": self.report.total,
            "lower_bound": self.lower_bound,
            "feature_error": self.feature_error,
            "samples": self.samples,
            "layers": [{**asdict(layer), "reached": self.reached[layer.name]} for layer in self.report.layers],
            "failures": list(self.failures),
        }

    def __str__(self) -> str:
        whole = LayerBound("", "the whole network", self.report.total)
        rows = [(layer, self.reached[layer.name]) for layer in self.report.layers]
        table = text_table(
            ("bound", "reached", "used", "layer", "name"),
            [_cells(layer, reached) for layer, reached in (*rows, (whole, self.lower_bound))],
        )
        return (
            f"{table}\nevery radius divides by the bound of the whole network\n"
            f"forward error up to {self.feature_error:.3g} in feature units, found on constant images and on these "
            f"{self.samples}, against float64"
        )


def _cells(layer: LayerBound, reached: float) -> tuple[str, ...]:
    used = f"{100 * reached / layer.bound:.1f} %" if layer.bound else ""
    return f"{layer.bound:.9g}", f"{reached:.9g}", used, layer.kind, layer.name


def check(
    encoder: nn.Module,
    images: Tensor,
    *,
    steps: int = 30,
    require: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> AuditVerdict:
    """Bound an encoder layer by layer, and look for what exceeds a bound.

    The bounds are proven (:func:`lipsim.audit.lipschitz_bound`); what exceeds one shows a fault in a layer or in the
    audit. That nothing does proves nothing more.

    Args:
        encoder: maps images ``(N, 3, S, S)`` to features ``(N, D)``.
        images: where to look, ``(N, 3, S, S)`` in [0, 1], in the dtype and on the device of the weights.
        steps: of the attack on the whole network.
        require: a total above this is a failure too; None: any total is accepted.
        progress: told what runs next.

    Raises:
        lipsim.audit.UnboundedModuleError: a part of the encoder has no known bound.
        ValueError: no images.
    """
    if not len(images):
        raise LipsimError("expected at least one image to look at, got none")
    say = progress or (lambda _: None)
    say("bounding each layer")
    report = lipschitz_bound(encoder, images.shape[-1])
    say("what each layer reaches")
    reached = lower_bounds.layer_norms(encoder, images, [layer.name for layer in report.layers])
    say("attacking the bound")
    attack = lower_bounds.attack_lipschitz(encoder, images, steps)
    say("error of the forward pass")
    error = largest_feature_error(encoder, images.shape[-1], images, thorough=False)
    # Negated, so that NaN fails.
    failures = [
        f"{layer.kind} at '{layer.name}' reaches {reached[layer.name]:.9g}, above its bound {layer.bound:.9g}"
        for layer in report.layers
        if not reached[layer.name] <= layer.bound * (1 + _TOLERANCE)
    ]
    if not attack <= report.total * (1 + _TOLERANCE):
        failures.append(f"an attack reaches {attack:.9g}, above the bound {report.total:.9g} of the whole")
    if require is not None and not report.total <= require:
        failures.append(f"the bound {report.total:.9g} is above {require:.9g}")
    return AuditVerdict(report, reached, attack, error, len(images), tuple(failures))
