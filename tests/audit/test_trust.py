"""What must not pass for the layer it looks like: each case computes more than the bound of its class."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torchvision.transforms import Normalize

from lipsim import audit
from lipsim.audit import UnboundedModuleError, trust
from lipsim.layers import (
    Branches,
    Centering,
    ExplicitLinear,
    LipschitzLayer,
    MaxMin,
    OrthogonalLinear,
    ParallelMixing,
    ResidualMixing,
    SLLLinear,
)
from lipsim.layers.base import FoldedLayer

Patch = pytest.MonkeyPatch


class Louder(OrthogonalLinear):
    """Overrides what runs and inherits the bound."""

    def forward(self, x: Tensor) -> Tensor:
        return 5 * super().forward(x)


class LouderWeights(OrthogonalLinear):
    def derive(self) -> tuple[Tensor]:
        return (5 * super().derive()[0],) if torch.is_grad_enabled() else super().derive()


class Adding(ResidualMixing):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class Mixin:
    def forward(self, x: Tensor) -> Tensor:
        return 5 * x


class Mixed(Mixin, MaxMin):
    pass


class Iterated(nn.Sequential):
    def __iter__(self) -> Iterator[nn.Module]:
        yield from [*self._modules.values(), *self._modules.values()]  # type: ignore[misc]


class Called(nn.Sequential):
    def __call__(self, x: Tensor) -> Tensor:
        return 5 * super().__call__(x)


class Implemented(nn.Sequential):
    def _call_impl(self, x: Tensor) -> Tensor:
        return 5 * super()._call_impl(x)


class CalledLayer(MaxMin):
    def __call__(self, x: Tensor) -> Tensor:
        return 5 * super().__call__(x)


class Reading(MaxMin):
    def __getattribute__(self, name: str) -> Any:
        return (lambda x: 5 * x) if name == "forward" else super().__getattribute__(name)


class Own(ParallelMixing):
    """Declares a bound of its own, so that nobody looks into its branches."""

    def lipschitz_bound(self) -> float:
        return 1.0


class Wrapping(LipschitzLayer):
    """Declares what its child declares."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x)

    def lipschitz_bound(self) -> float:
        return self.child.lipschitz_bound()  # type: ignore[operator]


class OneLipschitz(nn.Module):
    """A declaration to inherit, for whoever implements forward."""

    def lipschitz_bound(self) -> float:
        return 1.0


class Times(OneLipschitz):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class Function(OneLipschitz):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Growing(OneLipschitz):
    """Scales more and more, and says nothing of it at first."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.calls * x


class Awake(OneLipschitz):
    """Stays in training mode, whatever it is told."""

    def train(self, mode: bool = True) -> Awake:
        return super().train(True)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


def _set(module: nn.Module, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def _five(x: Tensor) -> Tensor:
    return 5 * x


def _hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda _m, _a, output: 5 * output)
    return module


def _traced() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(MaxMin(), torch.zeros(1, 4, 2))  # type: ignore[no-any-return, no-untyped-call]


def _declaring(bound: object) -> nn.Module:
    return type("Declaring", (nn.Identity,), {"lipschitz_bound": lambda self: bound})()


def _one_direction(x: Tensor) -> Tensor:
    """Keeps lengths but along one of 48 directions, which it triples."""
    first = torch.ones_like(x[:1]).cos_().cumsum(1).cos_()
    first = first / first.norm()
    return x + 2 * (x * first).sum(1, keepdim=True) * first


INSTANCES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "forward of a subclass": (lambda: Louder(48, 48), "redefines Louder.forward"),
    "grandchild of it": (lambda: type("Grandchild", (Louder,), {})(48, 48), "redefines Louder.forward"),
    "weights of a subclass": (lambda: LouderWeights(48, 4), "redefines LouderWeights.derive"),
    "mixture that adds": (lambda: Adding(MaxMin()), "redefines Adding.forward"),
    "mixin": (Mixed, "redefines Mixin.forward"),
    "__call__ of a layer": (CalledLayer, "redefines CalledLayer.__call__"),
    "__getattribute__ of a layer": (Reading, "redefines Reading.__getattribute__"),
    "__iter__ of a sequence": (lambda: Iterated(OrthogonalLinear(48, 48)), "no Lipschitz bound is known for Iterated"),
    "__call__ of a sequence": (lambda: Called(MaxMin()), "no Lipschitz bound is known for Called"),
    "_call_impl of a sequence": (lambda: Implemented(MaxMin()), "no Lipschitz bound is known for Implemented"),
    "forward of an instance": (lambda: _set(MaxMin(), forward=_five), "has a forward of its own"),
    "partial forward": (lambda: _set(MaxMin(), forward=functools.partial(_five)), "has a forward of its own"),
    "copy of it": (lambda: copy.deepcopy(_set(MaxMin(), forward=_five)), "has a forward of its own"),
    "_call_impl of an instance": (lambda: _set(MaxMin(), _call_impl=_five), "has a _call_impl of its own"),
    "compiled call of an instance": (lambda: _set(MaxMin(), _compiled_call_impl=_five), "compiled forward"),
    "weights of an instance": (
        lambda: _set(OrthogonalLinear(48, 4), weights=lambda: (torch.eye(48),)),
        "has a weights of its own",
    ),
    "bound of an instance": (lambda: _set(Times(5.0), lipschitz_bound=lambda: 1.0), "lipschitz_bound of its own"),
    "bound that only an instance has": (
        lambda: nn.Sequential(_set(nn.Softplus(5.0), lipschitz_bound=lambda: 1.0)),
        "no Lipschitz bound is known for Softplus",
    ),
    "class reassigned": (
        lambda: _set(nn.ReLU(), __class__=type("Doubling", (nn.ReLU,), {"forward": lambda self, x: 2 * x})),
        "no Lipschitz bound is known for Doubling",
    ),
    "hook": (lambda: _hooked(nn.Flatten()), "forward hooks"),
    "hook in a branch under a bound of its own": (lambda: Own(_hooked(MaxMin()), MaxMin()), "at 'first' of Own"),
    "hook deep in a declared layer": (lambda: Wrapping(Wrapping(_hooked(MaxMin()))), "MaxMin at 'child.child'"),
    "child with another forward": (lambda: Wrapping(_set(MaxMin(), forward=_five)), "MaxMin at 'child' of Wrapping"),
    "child of a subclass": (
        lambda: Wrapping(Louder(48, 4)),
        "Louder at 'child' of Wrapping.* redefines Louder.forward",
    ),
    "child in half precision": (
        lambda: Wrapping(OrthogonalLinear(48, 4).half()),
        "OrthogonalLinear at 'child' of Wrapping at '1' has weights in half precision",
    ),
    "child with NaN": (
        lambda: Wrapping(_set(OrthogonalLinear(48, 4), bias=nn.Parameter(torch.full((4,), math.nan)))),
        "OrthogonalLinear at 'child' of Wrapping at '1' has non-finite weights",
    ),
    "spectral_norm as a hook": (lambda: nn.utils.spectral_norm(nn.Linear(48, 4)), "forward hooks"),
    "pruning": (lambda: prune.l1_unstructured(nn.Linear(48, 4), "weight", 2), "forward hooks"),
    "weight_norm as a parametrization": (
        lambda: parametrizations.weight_norm(nn.Linear(48, 4)),
        "no Lipschitz bound is known for ParametrizedLinear",
    ),
    "compiled module": (lambda: torch.compile(MaxMin()), "OptimizedModule at .* has a forward of its own"),
    "traced module": (_traced, "no Lipschitz bound is known for TopLevelTracedModule"),
    "children in another dict": (
        lambda: _set(nn.Sequential(MaxMin()), _modules=type("Odd", (dict,), {})()),
        "keeps its children in a Odd",
    ),
    "branches of a subclass": (
        lambda: type(
            "Twice", (ParallelMixing,), {"branches": lambda self: {"first": self.first, "second": self.first}}
        )(MaxMin(), nn.Sequential(nn.LeakyReLU(5.0))),
        "redefines Twice.branches",
    ),
    "property for a method": (
        lambda: type("Reader", (MaxMin,), {"forward": property(lambda self: _five)})(),
        "redefines Reader.forward",
    ),
    "absent module": (
        lambda: _set(nn.Sequential(MaxMin()), _modules={"0": None}),
        "expected a module at '1.0', got None",
    ),
    "tensor subclass": (
        lambda: _set(nn.Linear(48, 4), weight=nn.Parameter(type("Odd", (Tensor,), {})(torch.eye(48)))),
        "weights of type Odd",
    ),
    "weights without values": (lambda: nn.Linear(48, 4, device="meta"), "on the meta device"),
    # What the numbers tell.
    "declared too little": (lambda: Times(5.0), "is bounded by 1 but reaches (5.0|4.9)"),
    "declared a little too little": (lambda: Times(1.001), "is bounded by 1 but reaches 1.001"),
    "declared near zero only": (lambda: Function(lambda x: torch.tanh(3 * x)), "is bounded by 1 but reaches"),
    "one direction of many": (lambda: Function(_one_direction), "is bounded by 1 but reaches"),
    "without a derivative": (lambda: Function(lambda x: torch.tensor(3 * x.detach().numpy())), "but reaches (3.0|2.9)"),
    "with a jump": (lambda: Function(lambda x: torch.where(x > 0, x + 1, x)), "is bounded by 1 but reaches"),
    "normalised": (lambda: Function(lambda x: F.layer_norm(x, (48,))), "is bounded by 1 but reaches"),
    "an offset that repeats the images": (
        lambda: _set(Centering(), offset=torch.zeros(7, 1, 48)),
        "expected one row for each",
    ),
    "random": (lambda: Function(lambda x: F.dropout(x, 0.1)), "is random"),
    "always training": (Awake, "is random"),
    "state that changes": (Growing, "changes from call to call"),
    "mixes samples": (lambda: Function(lambda x: x - x.mean(0)), "mixes the samples"),
    "merges samples": (lambda: Function(lambda x: x.flatten(0, 1)), "expected one row for each"),
    "other with gradients": (lambda: Function(lambda x: 5 * x if x.requires_grad else x), "changes from call to call"),
    "integers": (lambda: Function(lambda x: x.round().long()), r"returns torch\.int64"),
    "half inside": (lambda: Function(lambda x: x.bfloat16()), r"returns torch\.bfloat16"),
    "pairs": (lambda: Function(lambda x: (x, x)), "returns a tuple"),
    "NaN outputs": (lambda: nn.Sequential(_set(Centering(), offset=math.nan)), "not finite"),
    # NaN and infinities as bounds.
    "LeakyReLU(nan)": (lambda: nn.LeakyReLU(math.nan), "no finite Lipschitz bound, it says nan"),
    "LeakyReLU(inf)": (lambda: nn.LeakyReLU(-math.inf), "no finite Lipschitz bound, it says inf"),
    "text declared": (lambda: _declaring("1.0"), "declares a str"),
    "negative declared": (lambda: _declaring(-1.0), "no finite Lipschitz bound, it says -1.0"),
    "NaN declared": (lambda: _declaring(math.nan), "no finite Lipschitz bound, it says nan"),
    "nothing declared": (lambda: _declaring(None), "declares a NoneType"),
    "bound that is no method": (
        lambda: type("Number", (nn.Identity,), {"lipschitz_bound": 1.0})(),
        "no Lipschitz bound is known for Number",
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "name",
    # To import torch's compiler takes seconds; others with a forward of their own are among the rest.
    [pytest.param(name, marks=pytest.mark.slow) if name == "compiled module" else name for name in INSTANCES],
)
def test_what_computes_more_than_its_class_is_refused(name: str) -> None:
    build, message = INSTANCES[name]
    with pytest.raises(UnboundedModuleError, match=message):
        audit.lipschitz_bound(nn.Sequential(nn.Flatten(), build()), 4)


DEVIATIONS = {
    "NaN": [0.5, math.nan, 0.5],
    "NaN first": [math.nan, 0.5, 0.5],
    "zero": [0.5, 0.0, 0.5],
    "zero in float32": [0.5, 1e-50, 0.5],
}


@pytest.mark.parametrize("name", DEVIATIONS)
def test_normalisation_without_a_finite_bound_is_refused(name: str) -> None:
    with pytest.raises(UnboundedModuleError, match="no finite Lipschitz bound"):
        audit.lipschitz_bound(Normalize([0.5] * 3, DEVIATIONS[name]), 4)


def test_normalisation_divides_by_what_its_dtype_holds() -> None:
    # Numbers this small have few digits in float32.
    for std in (0.3, 1e-30, 5e-39, 5.1e-39):
        assert audit.lipschitz_bound(Normalize([0.0], [std]), 4).total >= 1 / min(std, float(torch.tensor(std)))
    assert audit.lipschitz_bound(Normalize(0.5, -0.25), 4).total == pytest.approx(4, rel=1e-6)
    with pytest.raises(UnboundedModuleError, match="not finite for images"):
        audit.lipschitz_bound(Normalize([math.nan] * 3, [0.5] * 3), 4)


PATCHES: dict[str, tuple[Callable[[Patch], None], str]] = {
    "class of torch": (lambda p: p.setattr(nn.ReLU, "forward", lambda self, x: 5 * x), "ReLU.forward"),
    "class of this package": (lambda p: p.setattr(MaxMin, "forward", lambda self, x: 5 * x), "MaxMin.forward"),
    "code of a method": (
        lambda p: p.setattr(MaxMin.forward, "__code__", (lambda self, x: 5 * x).__code__),
        "MaxMin.forward",
    ),
    "a method that it inherits": (
        lambda p: p.setattr(OrthogonalLinear, "weights", lambda self: (torch.eye(48),), raising=False),
        "OrthogonalLinear.weights",
    ),
    "its base": (lambda p: p.setattr(FoldedLayer, "weights", lambda self: self.derive()), "FoldedLayer.weights"),
    "nn.Module": (lambda p: p.setattr(nn.Module, "__call__", lambda self, x: 5 * self.forward(x)), "Module.__call__"),
    "nn.Sequential": (lambda p: p.setattr(nn.Sequential, "forward", lambda self, x: 5 * x), "Sequential.forward"),
    "what a layer calls": (lambda p: p.setattr(F, "relu", lambda x, inplace=False: 5 * x.clamp(min=0)), "reaches"),
    "another one": (lambda p: p.setattr(torch, "maximum", lambda x, y: 5 * x), "MaxMin at '2' is bounded by 1 but"),
}


@pytest.mark.parametrize("name", PATCHES)
def test_patched_classes_and_functions_are_refused(name: str, monkeypatch: Patch) -> None:
    network = nn.Sequential(nn.Flatten(), OrthogonalLinear(48, 48), MaxMin(), nn.ReLU())
    patch, message = PATCHES[name]
    assert audit.lipschitz_bound(network, 4).total < 1.001
    with monkeypatch.context() as context:
        patch(context)
        with pytest.raises(UnboundedModuleError, match=message):
            audit.lipschitz_bound(network, 4)
    assert audit.lipschitz_bound(network, 4).total < 1.001


def test_a_patch_from_before_the_import_is_found() -> None:
    patched = type("Patched", (nn.Identity,), {"forward": lambda self, x: 5 * x, "__module__": "elsewhere"})
    trust.remember([patched])
    assert "Patched.forward" in str(trust.fault(patched()))


def test_edited_padding_is_bounded_as_it_runs() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=2, padding_mode="replicate").double()
    nn.init.ones_(conv.weight)
    before = audit.conv2d_bound(conv, (4, 4))
    conv.padding = (0, 0)  # for show: forward pads with what it computed at the start
    basis = torch.eye(48, dtype=torch.float64).view(-1, 3, 4, 4)
    with torch.no_grad():
        matrix = conv(basis).flatten(1) - conv(torch.zeros_like(basis[:1])).flatten(1)
    norm = float(torch.linalg.matrix_norm(matrix, ord=2))
    assert norm <= audit.conv2d_bound(conv, (4, 4)) == before
    assert norm > audit.conv2d_bound(nn.Conv2d(3, 3, 3).double(), (4, 4))
    conv.stride, conv.dilation = 2, 1  # type: ignore[assignment]  # which F.conv2d takes as well
    assert audit.conv2d_bound(conv, (4, 4)) > 0


def test_declarations_of_the_class_that_computes_are_taken() -> None:
    class Half(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * super().forward(x)

        def lipschitz_bound(self) -> float:
            return 0.5

    class Named(Half):
        """Adds what does not run."""

        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def extra_repr(self) -> str:
            return self.name

        def describe(self) -> str:
            return self.name

    class Recursive(OrthogonalLinear):
        def derive(self) -> tuple[Tensor]:
            return (2 * super().derive()[0],)

        def lipschitz_bound(self) -> float:
            return super().lipschitz_bound()

    class Subtraction(Branches):
        def __init__(self, *parts: nn.Module) -> None:
            super().__init__()
            self.parts = nn.ModuleList(parts)

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.parts
            return first(x) - second(x)

        def branches(self) -> dict[str, nn.Module]:
            return dict(self.named_children())["parts"]._modules  # type: ignore[return-value]

        def combine(self, bounds: Any) -> float:
            return float(sum(bounds))

    class Student(nn.Sequential):
        """As in lipsim.students: a constructor, and nothing that runs."""

        def __init__(self, *layers: nn.Module) -> None:
            super().__init__(nn.Flatten(), *layers)
            self.config: dict[str, Any] = {}

        @classmethod
        def small(cls) -> Student:
            return cls(OrthogonalLinear(48, 6))

        def train(self, mode: bool = True) -> Student:
            return super().train(mode)

    def constant(x: Tensor) -> Tensor:
        return torch.zeros(len(x), 3).to(x)

    for build, expected in (
        (lambda: Student(Half()), 0.5),
        (lambda: Student(Named("a")), 0.5),
        (lambda: Student(Recursive(48, 6)), 2),
        (lambda: Student(Subtraction(MaxMin(), nn.Sequential(nn.Tanh()))), 2),
        (lambda: Student(Times(1.0)), 1),
        (lambda: Student(Wrapping(OrthogonalLinear(48, 6))), 1),
        (lambda: Student(Function(constant)), 1),
        (lambda: Student(Function(lambda x: x.detach().abs())), 1),
        (lambda: Student(Function(lambda x: torch.fft.fft(x, norm="ortho")), Function(lambda x: x.abs())), 1),
        (Student.small, 1),
        (lambda: Student(_parametrized(OrthogonalLinear(48, 6))), 1),
        (lambda: Student(_parametrized(SLLLinear(48, 6))), 1),
        (lambda: Student(ExplicitLinear(parametrizations.orthogonal(nn.Linear(48, 6)))), 1),
    ):
        for dtype in (torch.float32, torch.float64):
            assert audit.lipschitz_bound(build().to(dtype), 4).total == pytest.approx(expected, rel=1e-5)


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.flip(1)


def _parametrized(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Symmetric())


@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_audit_runs_under_any_mode_and_leaves_no_trace(grad: Any) -> None:
    network = nn.Sequential(nn.Flatten(), OrthogonalLinear(48, 8), nn.ReLU(inplace=True), SLLLinear(8, 5), Times(1.0))
    images = torch.rand(2, 3, 4, 4)
    state, generator = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    with grad():
        total = audit.lipschitz_bound(network, 4).total
        verdict = audit.check(network, images, steps=5)
    assert not verdict.failures and 0 < verdict.lower_bound <= total
    assert total == audit.lipschitz_bound(network, 4).total
    assert torch.equal(torch.get_rng_state(), generator) and network.training
    assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())
    network.eval()(torch.rand(2, 3, 4, 4)).sum().backward()  # to the parameters: nothing stays folded
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_weights_made_in_inference_mode_are_checked_without_derivatives() -> None:
    with torch.inference_mode():
        network = nn.Sequential(nn.Flatten(), Wrapping(OrthogonalLinear(48, 8)), Times(5.0))
    with pytest.raises(UnboundedModuleError, match="Times at '2' is bounded by 1 but reaches 5"):
        audit.lipschitz_bound(network, 4)


def test_a_child_that_writes_into_its_input_is_not_for_branches() -> None:
    mixture = ParallelMixing(nn.Sequential(Function(lambda x: x.abs_()), nn.Flatten()), nn.Flatten())
    with pytest.raises(UnboundedModuleError, match="changes in place what the other branches read"):
        audit.lipschitz_bound(mixture, 4)


def test_products_neither_vanish_nor_overflow() -> None:
    def network(factor: float) -> nn.Module:
        layers = [nn.Linear(48, 48, bias=False).double() for _ in range(2)]
        for layer in layers:
            nn.init.eye_(layer.weight).mul_(factor)
        return nn.Sequential(nn.Flatten(), *layers)

    with torch.no_grad():
        assert audit.lipschitz_bound(network(1e-200), 4).total > 0
        assert audit.lipschitz_bound(network(0.0), 4).total == 0
        with pytest.raises(UnboundedModuleError, match="finite"):
            audit.lipschitz_bound(network(1e200), 4)
