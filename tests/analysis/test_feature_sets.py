"""Feature sets against closed forms, and the folders that they are written to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import ImageFolder

from lipsim.analysis.feature_maps import FeatureMap
from lipsim.analysis.feature_matching import FeatureObjective, LikelihoodObjective, ascend_by_equal_steps
from lipsim.analysis.feature_sets import MANIFEST, FeatureSetRecipe, make_feature_set, read_note
from lipsim.analysis.models import Model, load_model
from lipsim.data.sets.labelled_folder import LabelledFolder
from lipsim.data.transforms import Preprocess
from lipsim.evaluation.processes import ProcessFailed

SIDE, CLASSES = 8, ("bird", "cat", "dog")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """21 images of noise, seven a class, one of them gray."""
    rng = np.random.default_rng(0)
    for i in range(21):
        file = tmp_path / "images" / CLASSES[i % 3] / f"{i // 3}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        shape = (SIDE, SIDE) if i == 4 else (SIDE, SIDE, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(file)
    return tmp_path / "images"


def identity() -> Model:
    return Model("identity", nn.Flatten(), nn.Flatten(), SIDE)


def classifier(num_classes: int = 3) -> Model:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(72, 12), nn.Tanh(), nn.Linear(12, num_classes)
    )
    return Model("classifier", network, network, SIDE)


def read(folder: Path) -> Tensor:
    """The images of a set in the order of what they were made from."""
    files = sorted(folder.glob("*/*.png"), key=lambda file: file.name)
    return torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files]).permute(0, 3, 1, 2)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make(images: Path, output: Path, model: Model, recipe: FeatureSetRecipe, **options: Any) -> dict[str, float]:
    return make_feature_set(images, output, model, recipe, **options).means


@pytest.mark.parametrize("start", ["image", "noise"])
def test_an_identity_feature_map_gives_the_image_back(images: Path, tmp_path: Path, start: str) -> None:
    originals = LabelledFolder(images, Preprocess(SIDE)).all_8bit()
    recipe = {"kind": "robust", "start": start, "steps": 120, "batch_size": 8}
    means = make(images, tmp_path / "exact", identity(), FeatureSetRecipe(**recipe, shorten=True), layer="output")  # type: ignore[arg-type]
    assert means["before"] > 0.4 and means["after"] < 1e-6
    assert torch.equal(read(tmp_path / "exact/robust"), originals)
    # The published steps of one length end within half a step, 8 bits aside.
    means = make(images, tmp_path / "published", identity(), FeatureSetRecipe(**recipe), layer="output")  # type: ignore[arg-type]
    shortest = originals.double().div(255).flatten(1).norm(dim=1).min()
    assert means["after"] <= 0.05 / shortest
    assert (read(tmp_path / "published/robust").int() - originals.int()).abs().max() <= 2


def test_what_a_linear_feature_map_cannot_see_stays_as_it_was_at_the_start() -> None:
    torch.manual_seed(0)
    rows = torch.linalg.qr(torch.randn(192, 30, dtype=torch.float64)).Q.mT
    x, start = (0.5 + 0.02 * torch.randn(4, 3, SIDE, SIDE, dtype=torch.float64) for _ in range(2))

    def features(images: Tensor) -> Tensor:
        return images.flatten(1) @ rows.mT

    objective = FeatureObjective(features, features(x))
    found = ascend_by_equal_steps(objective, start, steps=20, step_size=0.1, shorten=True)
    projected = start + ((x - start).flatten(1) @ rows.mT @ rows).view_as(x)
    torch.testing.assert_close(found, projected, rtol=0, atol=1e-9)


def test_steps_are_those_of_the_published_package() -> None:
    model, eps, size = classifier().module.double(), 0.5, 0.1
    x = torch.rand(6, 3, SIDE, SIDE, dtype=torch.float64)
    labels = torch.arange(6) % 3
    current, best, least = x.clone(), x.clone(), torch.full((6,), torch.inf, dtype=torch.float64)
    for step in range(31):
        leaf = current.clone().requires_grad_(True)
        losses = F.cross_entropy(model(leaf), labels, reduction="none")
        better = losses < least
        best[better], least[better] = current[better], losses.detach()[better]
        if step < 30:
            (gradient,) = torch.autograd.grad(losses.mean(), leaf)
            norm = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            change = (current - size * gradient / (norm + 1e-10) - x).renorm(p=2, dim=0, maxnorm=eps)
            current = (x + change).clamp(0, 1)
    found = ascend_by_equal_steps(LikelihoodObjective(model, labels), x, steps=30, step_size=size, eps=eps)
    torch.testing.assert_close(found, best, rtol=0, atol=1e-6)
    assert (found - x).flatten(1).norm(dim=1).max() <= eps + 1e-6


def test_adversarial_sets_have_the_labels_of_their_targets(images: Path, tmp_path: Path) -> None:
    for kind in ("deterministic", "random"):
        recipe = FeatureSetRecipe(kind, steps=20, batch_size=8, eps=2.0)  # type: ignore[arg-type]
        means = make(images, tmp_path / "sets", classifier(), recipe)
        read_back = ImageFolder(tmp_path / "sets" / kind)
        assert read_back.classes == list(CLASSES) and len(read_back) == 21
        notes = [read_note(Path(file)) for file, _ in read_back.samples]
        assert all(note["label"] == CLASSES[label] for note, label in zip(notes, read_back.targets, strict=True))
        assert all(note["source"].startswith(note["class"]) for note in notes)
        own = [CLASSES.index(note["class"]) for note in notes]
        if kind == "deterministic":
            assert all(label == (y + 1) % 3 for label, y in zip(read_back.targets, own, strict=True))
        else:  # the image's own class as well
            assert any(label == y for label, y in zip(read_back.targets, own, strict=True))
        with torch.no_grad():
            stored = torch.stack([torch.from_numpy(np.array(image)) for image, _ in read_back]).permute(0, 3, 1, 2)
            answers = classifier().module(stored.float() / 255).argmax(1)
        assert means["stored"] == float(answers.eq(torch.tensor(read_back.targets)).double().mean()) > 0.8
        assert 0 < means["norm"] < 2.05


class Rank:
    """One of two processes, as a launched Fabric would tell it."""

    def __init__(self, global_rank: int) -> None:
        self.global_rank, self.world_size, self.device = global_rank, 2, torch.device("cpu")

    def barrier(self) -> None: ...

    def all_reduce(self, counts: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "sum"
        return counts


def test_interrupted_and_shared_work_ends_with_the_same_bytes(images: Path, tmp_path: Path) -> None:
    recipe = FeatureSetRecipe("nonrobust", steps=6, batch_size=4)
    make(images, tmp_path / "whole", classifier(), recipe)
    expected = contents(tmp_path / "whole/nonrobust")
    assert len(expected) == 22

    def interrupt(message: str) -> None:
        if message.startswith("batch 3 of 6, step 4"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(images, tmp_path / "broken", classifier(), recipe, say=interrupt)
    begun = contents(tmp_path / "broken/nonrobust")
    assert len(begun) == 9 and begun.items() <= expected.items()
    (tmp_path / "broken/nonrobust/bird/.0123456789abcdef.tmp.png").touch()  # of a process that was killed
    next((tmp_path / "broken/nonrobust").glob("cat/*.png")).unlink()
    resumed = make_feature_set(images, tmp_path / "broken", classifier(), recipe)
    assert resumed.written == 14 and contents(resumed.folder) == expected

    # The first process comes last here, since it reads what all have done; the manifest it would write before.
    (tmp_path / "shared/nonrobust").mkdir(parents=True)
    (tmp_path / "shared/nonrobust" / MANIFEST).write_bytes(expected[MANIFEST])
    for rank, count in ((1, 9), (0, 12)):
        shared = make_feature_set(images, tmp_path / "shared", classifier(), recipe, fabric=Rank(rank))  # type: ignore[arg-type]
        assert shared.written == count and shared.rank == rank
    assert contents(shared.folder) == expected and shared.means == resumed.means


def test_one_process_that_fails_is_told_to_all(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "dog/6.png").write_bytes(b"no image")
    recipe = FeatureSetRecipe("nonrobust", start="noise", steps=1, batch_size=4)
    with pytest.raises(ProcessFailed, match="1 of 2 processes"):
        make(images, tmp_path / "sets", classifier(), recipe, fabric=Rank(1))
    assert "cannot read the image" in capsys.readouterr().err


def test_a_folder_of_other_options_is_refused(images: Path, tmp_path: Path) -> None:
    recipe = FeatureSetRecipe("robust", steps=1)
    make(images, tmp_path / "sets", classifier(), recipe)
    with pytest.raises(ValueError, match=r"steps was 1 and is 2\); give those, or another output"):
        make(images, tmp_path / "sets", classifier(), FeatureSetRecipe("robust", steps=2))
    other = classifier()
    nn.init.zeros_(other.network[0].bias)  # type: ignore[index,arg-type]
    with pytest.raises(ValueError, match="weights was"):
        make(images, tmp_path / "sets", other, recipe)
    other = classifier()
    other.network[1] = nn.ReLU()  # type: ignore[index,operator]
    with pytest.raises(ValueError, match="structure was"):
        make(images, tmp_path / "sets", other, recipe)
    manifest = tmp_path / "sets/robust" / MANIFEST
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({name: value for name, value in content.items() if name != "structure"}))
    make(images, tmp_path / "sets", classifier(), recipe)  # of an earlier version
    with pytest.raises(ValueError, match="layer was input of 5 and is 0"):
        make(images, tmp_path / "sets", classifier(), recipe, layer="0")
    (images / "dog/6.png").rename(images / "dog/7.png")
    with pytest.raises(ValueError, match="files was"):
        make(images, tmp_path / "sets", classifier(), recipe)
    (tmp_path / "sets/robust" / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"has files and no manifest\.json"):
        make(images, tmp_path / "sets", classifier(), recipe)


def test_features_are_those_of_the_layer() -> None:
    model, x = classifier(), torch.rand(2, 3, SIDE, SIDE)
    network = model.network
    assert isinstance(network, nn.Sequential)
    torch.testing.assert_close(FeatureMap(model)(x), network[:5](x))
    torch.testing.assert_close(FeatureMap(model, "0")(x), network[0](x).flatten(1))
    again = FeatureMap(model, FeatureMap(model).layer)  # as a manifest has it
    assert again.layer == FeatureMap(model).layer
    torch.testing.assert_close(again(x), network[:5](x))
    torch.testing.assert_close(FeatureMap(model, "input of 1")(x), network[0](x).flatten(1))
    with pytest.raises(ValueError, match="has no layer 'nowhere'; it has 0"):
        FeatureMap(model, "input of nowhere")
    in_place = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(3 * SIDE**2, 2))
    first = FeatureMap(Model("in place", in_place, in_place, SIDE), "0")
    torch.testing.assert_close(first(x), in_place[0](x).flatten(1))  # and not what the next layer makes of it
    assert not in_place[0]._forward_hooks
    metric = load_model("quickstart")
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(FeatureMap(metric)(x), metric.module(x))
    assert FeatureMap(metric).layer == "output"


class Dictionary(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": x}


def test_bad_input_is_named(images: Path, tmp_path: Path) -> None:
    robust, random = FeatureSetRecipe("robust", steps=1), FeatureSetRecipe("random", steps=1)
    dictionary = Model("segmenter", Dictionary(), Dictionary(), SIDE)
    convolution = nn.Conv2d(3, 3, 1)
    reads_gray = nn.Sequential(nn.Conv2d(1, 3, SIDE), nn.Flatten(), nn.Linear(3, 3))
    gray = Model("gray", reads_gray, reads_gray, SIDE)
    for model, recipe, layer, message in (
        (classifier(4), random, None, "expected a classifier of the 3 classes in .*; classifier has 4 logits"),
        (dictionary, random, None, "expected a classifier that returns logits .*, got a dict"),
        (dictionary, robust, None, "segmenter does not end with a linear layer; choose the features by the name"),
        (dictionary, robust, "output", "expected features .* of output, got a dict; choose another layer"),
        (Model("conv", convolution, convolution, SIDE), robust, None, "conv does not end with a linear layer"),
        (classifier(), robust, "7", r"classifier has no layer '7'; it has 0, 1, 2, 3, 4, 5$"),
        (classifier(), random, "0", "layer '0' has no part in a set of the kind random"),
        (gray, robust, None, r"gray does not take images of shape \(1, 3, \d+, \d+\) \(.*channels.*\); give the size"),
        (gray, robust, "0", "gray does not take images"),
        (gray, random, None, "gray does not take images"),
    ):
        with pytest.raises(ValueError, match=message):
            make(images, tmp_path / "sets", model, recipe, layer=layer)
    for bad, message in (
        ({"kind": "wrong"}, "expected a kind of robust, nonrobust"),
        ({"kind": "robust", "step_size": 0.0}, "positive step_size"),
        ({"kind": "robust", "steps": 0}, "steps"),
    ):
        with pytest.raises(ValueError, match=message):
            FeatureSetRecipe(**bad)  # type: ignore[arg-type]
    Image.new("RGB", (4, 4)).save(images / "stray.png")
    with pytest.raises(ValueError, match=r"in folders of their classes, CLASS/IMAGE, got stray\.png"):
        LabelledFolder(images, Preprocess(SIDE))
    (images / "stray.png").unlink()
    with pytest.raises(ValueError, match="expected the classes bird, cat, got dog"):
        LabelledFolder(images, Preprocess(SIDE), ("bird", "cat"))
    for file in images.glob("*/[1-6].png"):
        file.unlink()
    with pytest.raises(ValueError, match=r"no image is moved to the class .*, so that its folder would be missing"):
        make(images, tmp_path / "few", classifier(), FeatureSetRecipe("random", steps=1, seed=2))
    with pytest.raises(ValueError, match="is no image of a feature set"):
        read_note(images / "cat/0.png")
    assert not (tmp_path / "few").exists() and not (tmp_path / "sets").exists()


def test_the_manifest_says_how_it_was_made(images: Path, tmp_path: Path) -> None:
    make(images, tmp_path / "sets", classifier(), FeatureSetRecipe("robust", steps=1, seed=5))
    manifest = json.loads((tmp_path / "sets/robust" / MANIFEST).read_text())
    assert manifest["classes"] == list(CLASSES) and manifest["layer"] == "input of 5" and manifest["images"] == 21
    assert manifest["seed"] == 5 and manifest["step_size"] == 0.1
    assert FeatureSetRecipe("robust").steps == 1000 and FeatureSetRecipe("random").steps == 100
