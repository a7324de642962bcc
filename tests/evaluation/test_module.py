"""What an evaluation hands to its callbacks: features, and one certificate of each batch, where one is asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lipsim import PerceptualMetric, certificates
from lipsim.callbacks import AttackRobustness, CertifyRadii, TripletCallback, TripletGallery
from lipsim.certificates import Anchored
from lipsim.data import BuiltinTriplets, Triplet, collate_triplets
from lipsim.data.contracts import DataFacts
from lipsim.evaluation.batches import EvaluatedBatch
from lipsim.evaluation.module import EvaluationModule, evaluation_names
from lipsim.students import OrthogonalProjection

BATCHES = 2


class Keep(TripletCallback):
    """Keeps what each batch came with."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[EvaluatedBatch] = []

    def see(self, trainer: Any, module: Any, evaluated: EvaluatedBatch, batch: Triplet, name: str) -> dict[str, Tensor]:
        self.kept.append(evaluated)
        return {}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often features were projected and triplets certified."""
    torch.set_num_threads(1)
    counted: Counter[str] = Counter()

    def count(holder: Any, name: str) -> None:
        function = getattr(holder, name)

        def counting(*args: Any, **options: Any) -> Any:
            counted[name] += 1
            return function(*args, **options)

        monkeypatch.setattr(holder, name, counting)

    count(Anchored, "__init__")
    for name in ("certify_triplets", "reference_radius", "candidate_radii", "joint_radius", "published_radius"):
        count(certificates, name)
    return counted


def _test(root: Path, *callbacks: L.Callback) -> EvaluationModule:
    torch.manual_seed(0)
    module = EvaluationModule(PerceptualMetric(OrthogonalProjection(16, 8), 16))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = L.Trainer(default_root_dir=root, accelerator="cpu", devices=1, callbacks=list(callbacks), **quiet)
    loader = DataLoader(BuiltinTriplets("test", 4 * BATCHES, image_size=16), 4, collate_fn=collate_triplets)
    trainer.test(module, loader, verbose=False)
    return module


def _attack(**options: Any) -> AttackRobustness:
    return AttackRobustness(eps=[0.1], attacks=["pgd"], steps=1, num_examples=0, **options)


def test_a_batch_is_projected_and_certified_once_for_all_callbacks(calls: Counter[str], tmp_path: Path) -> None:
    radii, attack, gallery, keep = (
        CertifyRadii(error_sample=0),
        _attack(target="all"),
        TripletGallery(1, steps=0),
        Keep(),
    )
    _test(tmp_path, radii, attack, gallery, keep)
    assert calls == {"__init__": 3 * BATCHES, "certify_triplets": BATCHES, "published_radius": BATCHES}
    module = _test(tmp_path, radii, attack, gallery, keep)
    for evaluated in keep.kept[BATCHES:]:
        assert not any(t.is_inference() for t in (*evaluated.features, evaluated.margin, evaluated.certificate.radius))
        expected = module.metric.certify_features(evaluated.triplets.reference, *evaluated.features)
        for field in fields(expected):
            assert torch.equal(getattr(evaluated.certificate, field.name), getattr(expected, field.name))
    columns = [table.tables["set0"].gather() for table in (radii, attack, gallery)]
    assert torch.equal(columns[0]["joint_radius"], columns[1]["radius"])
    assert torch.equal(columns[0]["radius"], columns[2]["radius"])


@pytest.mark.parametrize(
    ("target", "computed"),
    [
        ("reference", "reference_radius"),
        ("left", "candidate_radii"),
        ("right", "candidate_radii"),
        ("all", "joint_radius"),
    ],
)
def test_an_attack_alone_computes_the_one_radius_it_needs(
    calls: Counter[str], tmp_path: Path, target: Any, computed: str
) -> None:
    attack, keep = _attack(target=target), Keep()
    _test(tmp_path, attack, keep)
    assert calls == {"__init__": 3 * BATCHES, computed: BATCHES}
    name = {"reference": "radius", "all": "joint_radius"}.get(target, f"{target}_radius")
    expected = torch.cat([getattr(evaluated.certificate, name) for evaluated in keep.kept])
    assert torch.equal(attack.tables["set0"].gather()["radius"], expected)


def test_nothing_is_certified_where_nobody_asks(calls: Counter[str], tmp_path: Path) -> None:
    _test(tmp_path)
    assert calls == {"__init__": 3 * BATCHES}  # for the margin, which the scores need


def test_half_precision_is_not_certified() -> None:
    metric = PerceptualMetric(OrthogonalProjection(16, 8), 16)
    batch = collate_triplets([BuiltinTriplets("test", 2, image_size=16)[0]])
    half = EvaluatedBatch.of(metric, batch, tuple(f.half() for f in batch.embed(metric.embed)))  # type: ignore[arg-type]
    for ask in (lambda: half.certificate, lambda: half.radius("reference"), lambda: half.published_radius):
        with pytest.raises(ValueError, match="half precision"):
            ask()


@pytest.mark.parametrize("name", ["../elsewhere", "/elsewhere", "a/../../b", "a\\..\\..\\b", "a\0b", "a/b"])
def test_names_of_sets_stay_in_the_folder_of_the_results(name: str) -> None:
    with pytest.raises(ValueError, match="is no name of an evaluation set"):
        evaluation_names(DataFacts([name], {}, None, False), "test", [[0]])


def test_names_of_parts_stay_in_the_folder_of_the_results() -> None:
    """The groups of a table are somebody's text, and in the names of files."""
    mask = torch.ones(1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"'table_/\.\./\.\./x' is no name of an evaluation set"):
        evaluation_names(DataFacts(["table"], {"table": {"/../../x": mask}}, None, False), "test", [[0]])
    assert evaluation_names(DataFacts(["a..b"], {"a..b": {"c/d": mask}}, None, False), "test", [[0]]) == ["a..b"]


@pytest.mark.parametrize("name", ["my.study", "train", "sigma=0.5"])
def test_sets_and_their_parts_may_have_any_name(name: str) -> None:
    module, logged = EvaluationModule(PerceptualMetric(OrthogonalProjection(16, 8), 16)), {}
    module.log = lambda key, value, **_: logged.__setitem__(key, float(value))  # type: ignore[assignment]
    module.groups = lambda _: {}  # type: ignore[method-assign]
    module._score(name, torch.tensor([1.0, -1.0, 1.0]), torch.tensor([0.0, 0.0, 0.25]), torch.arange(3))
    module._log_scores("val")
    assert logged[f"val/{name}/majority_score"] == pytest.approx(2 / 3) and not module.scores
    assert logged[f"val/{name}/vote_score"] == pytest.approx(1.75 / 3)
