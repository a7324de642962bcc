"""The baseline of the benchmarks is the published network, and the script runs."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lipsim.layers import MaxMin, OrthogonalLinear
from lipsim.metric import PerceptualMetric, SmoothedMetric
from lipsim.results.benchmark import benchmark_tables
from lipsim.results.runs import load_runs
from lipsim.students import OrthogonalProjection, SLLNetwork
from lipsim.training import FineTuning

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks can be imported by their names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.slow  # a quarter of a minute
def test_the_benchmark_of_all_rows_ends_in_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import results  # type: ignore[import-not-found]

    sizes = ["--train-triplets", "40", "--test-triplets", "12", "--attacked-triplets", "4", "--timed-batch", "4"]
    sizes += ["--attack-steps", "2", "--queries", "2", "--smoothed-triplets", "2", "--smoothed-attacked", "2"]
    sizes += ["--samples", "30", "--attack-samples", "30", "--alpha", "0.1"]
    rows = ["--data", "builtin", "--image-size", "16", "--rows", "pixel,linear", "teacher-smoothed-1"]
    rows += ["--minutes", "0.003"]
    command = [*rows, *sizes, "--device", "cpu", "--threads", "1", "--workers", "0", "--output", str(tmp_path)]
    assert results.main([*command, "--seeds", "0"]) == 0
    assert results.main([*command, "--seeds", "0", "1", "--no-timing"]) == 0  # the first seed is there
    assert "5 rows, 3 of them there" in capsys.readouterr().err
    runs = load_runs([str(folder) for folder in sorted((tmp_path / "rows").iterdir())])
    (_, scores), (_, costs) = benchmark_tables(runs)
    pixel, linear, smoothed = scores
    assert [row["metric"] for row in scores] == ["pixel ℓ2", "linear map", "teacher, smoothed, σ = 1"]
    assert "±" in linear["natural"] and "±" not in pixel["natural"] and smoothed["abstains"]
    assert float(pixel["36/255"]) <= float(pixel["natural"])
    held = [float(smoothed[name].partition(" ")[0]) for name in ("natural", "attacked 36/255", "attacked 1", "1")]
    assert held == sorted(held, reverse=True)
    assert [row["parameters"] for row in costs] == ["0", "197 k", "495 k"] and float(costs[0]["images/s"]) > 0
    assert [row["passes an answer"] for row in costs] == ["", "3 ± 0", "132 ± 0"]
    assert not sum(run.benchmark["sets"]["test"]["violations"] for run in runs if run.benchmark)
    refused = {
        ("--rows", "ours,others"): "got others",
        ("--seeds", "-1"): "at least 0",
        ("--attack-draws", "3"): "even",
    }
    for option, message in refused.items():
        with pytest.raises(SystemExit):
            results.main([*command, *option])
        assert message in capsys.readouterr().err


@pytest.mark.usefixtures("benchmarks")
def test_data_made_with_other_options_are_not_taken_for_those_of_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings in results.json are those of the command line, and data that are there are not made again."""
    import results_data

    made: list[int] = []
    monkeypatch.setitem(
        results_data._MAKE, "builtin", lambda size, *_: made.append(size) or {"images": torch.zeros(1, 3, size, size)}
    )
    options = argparse.Namespace(output=tmp_path, train_triplets=5, test_triplets=3)
    for _ in range(2):
        results_data.prepare("builtin-8", options, torch.device("cpu"))
    assert made == [8]
    options.train_triplets = 50
    with pytest.raises(ValueError, match=r"made with other options \(--train-triplets was 5\); give another --output"):
        results_data.prepare("builtin-8", options, torch.device("cpu"))


@pytest.mark.usefixtures("benchmarks")
def test_attacks_beyond_the_radius_leave_what_all_attacks_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """On less: an answer is attacked with the budgets that its radius does not cover, a wrong one with none."""
    import results_measures as measures  # type: ignore[import-not-found]
    from results_data import Triplets

    agree = torch.tensor([True, True, False, True, True])
    radius = torch.tensor([0.1, 5.0, 0.1, 1.0, 2.0])
    tried = [(len(eps), rows.tolist()) for eps, rows in measures._tried(agree, radius)]
    assert tried == [(3, [0]), (2, [3]), (1, [4])]  # 1 is no change less than 1
    assert [(len(eps), rows.tolist()) for eps, rows in measures._tried(agree, None)] == [(3, [0, 1, 3, 4])]

    torch.manual_seed(0)
    metric = PerceptualMetric(OrthogonalProjection(8, 16), 8)
    images = torch.randint(256, (60, 3, 8, 8), dtype=torch.uint8)
    triplets = Triplets(images, torch.arange(60).view(20, 3), torch.zeros(20))
    device = torch.device("cpu")
    margin, certificate, _ = measures._certified(metric, triplets, device)
    monkeypatch.setattr(measures, "ATTACKED", (0.1, 0.3, 1.0))  # radii are between 0.03 and 0.65
    assert [len(rows) for _, rows in measures._tried(margin > 0, certificate.radius)] == [1, 5, 3]
    found = []
    for beyond in (False, True):
        options = argparse.Namespace(attacked_triplets=20, attack_beyond_radius=beyond)
        options.attack_batch, options.attack_steps, options.queries = 7, 10, 20
        found.append(measures._attacked(metric, triplets, margin > 0, certificate, 0, device, options))
    assert found[0] == found[1] and found[0][1] == 0
    # Of 20: what is certified is left, and the suite breaks what is not.
    assert 8 / 20 <= found[0][0]["0.1"] <= 9 / 20 and 3 / 20 <= found[0][0]["0.3"] < 8 / 20


@pytest.mark.usefixtures("benchmarks")
def test_smoothed_scores_of_sets_over_the_same_images() -> None:
    """Few images: every set whole, by the certificates of each triplet; many: the first triplets."""
    from results_data import Triplets
    from results_smoothed import measure_smoothed  # type: ignore[import-not-found]

    torch.manual_seed(0)
    metric = PerceptualMetric(OrthogonalProjection(8, 16), 8)
    images = torch.randint(256, (9, 3, 8, 8), dtype=torch.uint8)
    ids = torch.stack([torch.randperm(9)[:3] for _ in range(30)])
    votes = torch.randint(2, (30,)).float()
    sets = {"one": Triplets(images, ids[:18], votes[:18]), "two": Triplets(images, ids[18:], votes[18:])}
    options = argparse.Namespace(
        smoothed_triplets=3, smoothed_attacked=8, samples=200, selection=10, alpha=0.1, attack_samples=200,
        attack_steps=3, queries=4, attack_batch=16, attack_draws=4, attack_beyond_radius=False,
    )  # fmt: skip
    device, sigma = torch.device("cpu"), 0.2
    found = measure_smoothed(metric, sigma, sets, 4, device, options)
    smoothed = SmoothedMetric(metric, sigma, 200, 10, 0.1, seed=4)
    for name, triplets in sets.items():
        parts = [triplets.floats(column, device) for column in triplets.ids.unbind(1)]
        alone = smoothed.certify(*parts, index=triplets.ids[:, 0])
        right = ~alone.abstained & (alone.prefers_left == (triplets.right_vote == 0))
        scores = found[name]
        assert scores["num_triplets"] == len(triplets.ids) and 0 < scores["natural"] < 1
        assert scores["natural"] == right.double().mean() and scores["abstained"] == alone.abstained.double().mean()
        for eps, label in ((36 / 255, "36/255"), (1.0, "1")):
            assert scores["certified"][label] == (right & (alone.radius > eps)).double().mean()
        assert scores["joint"] == {}
        # With noise on all three: what holds for a change of each holds for one of the reference that is √3 as long.
        (jointly,) = smoothed.certify_shared(images.float() / 255, triplets.ids, moving="all")
        right = ~jointly.abstained & (jointly.prefers_left == (triplets.right_vote == 0))
        found_jointly = scores["jointly_smoothed"]
        assert found_jointly["natural"] == right.double().mean()
        for eps, label in ((36 / 255, "36/255"), (1.0, "1")):
            assert found_jointly["joint"][label] == (right & (jointly.radius > eps)).double().mean()
            held = right & (jointly.radius * 3**0.5 > eps)
            assert found_jointly["certified"][label] == held.double().mean()
        assert found_jointly["joint"]["36/255"] < found_jointly["certified"]["36/255"]
        # Answers with noise on the reference, and on all images, each attacked from its own beginning.
        assert scores["num_attacked"] == 8 and scores["violations"] == 0
        for attacked, moving in ((scores, "reference"), (found_jointly, "all")):
            left = list(attacked["attacked"].values())
            few = SmoothedMetric(metric, sigma, 200, 10, 0.1, seed=4, moving=moving)
            clean = few.certify(*(x[:8] for x in parts))
            own = ~clean.abstained & (clean.prefers_left == (triplets.right_vote[:8] == 0))
            assert list(attacked["attacked"]) == ["36/255", "1", "3"] and left == sorted(left, reverse=True)
            assert left[-1] < own.double().mean() and left[0] <= own.double().mean()
            held = own & (clean.radius * (3**0.5 if moving == "all" else 1) > 36 / 255)
            assert left[0] >= held.double().mean()
    options.smoothed_triplets = 2
    assert [s["num_triplets"] for s in measure_smoothed(metric, sigma, sets, 4, device, options).values()] == [2, 2]


@pytest.mark.usefixtures("benchmarks")
def test_triplets_over_shared_photographs() -> None:
    from results_data import PER_CLASS, Task, Triplets, shared_triplets  # type: ignore[import-not-found]

    torch.manual_seed(0)
    classes = 5
    embeddings = torch.nn.functional.normalize(torch.randn(classes * PER_CLASS, 3, dtype=torch.float64), dim=1)
    ids, votes = shared_triplets(classes, embeddings)
    near = torch.where(votes > 0.5, ids[:, 2], ids[:, 1])
    far = torch.where(votes > 0.5, ids[:, 1], ids[:, 2])
    semantic = (ids[:, 0] // PER_CLASS == near // PER_CLASS) & (ids[:, 0] // PER_CLASS != far // PER_CLASS)
    cosines = [(embeddings[ids[:, 0]] * embeddings[rows]).sum(1) for rows in (near, far)]
    assert bool((semantic | (cosines[0] >= cosines[1])).all()) and not bool((ids[:, :1] == ids[:, 1:]).any())
    assert 0.75 < semantic.double().mean() < 0.9 and 0.45 < votes.mean() < 0.55
    # Batches of a task: every image in the place that the triplets mean, here a constant of its number.
    labels = torch.arange(60) % 5
    images = torch.arange(60, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()
    own = Triplets(images, torch.tensor([[0, 5, 1]]), torch.zeros(1))
    teacher = torch.nn.functional.normalize(torch.randn(60, 3), dim=1)
    task = Task("t", 2, own, {}, 3, 1.0, 4, "none", None, images, teacher, teacher, labels)
    batch = task.shared(torch.device("cpu"))()
    numbers = [(part[:, 0, 0, 0] * 255).round().long() for part in (batch.reference, batch.left, batch.right)]
    near = torch.where(batch.right_vote > 0.5, numbers[2], numbers[1])
    assert 0.7 < (numbers[0] % 5 == near % 5).double().mean() < 0.95
    assert [int(part[-1]) for part in numbers] == [0, 5, 1]


@pytest.mark.usefixtures("benchmarks")
def test_certified_classification_stays_below_the_attack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import cifar10  # type: ignore[import-not-found]
    from PIL import Image

    with tarfile.open(tmp_path / "images.tar.gz", "w:gz") as archive:
        for number in range(60):
            shade = (40 + 70 * (number % 3), 100, 200 - number)
            content = io.BytesIO()
            Image.new("RGB", (32, 32), shade).save(content, "PNG")
            member = tarfile.TarInfo(f"train/class{number % 3}/{number}.png")
            member.size = len(content.getvalue())
            archive.addfile(member, io.BytesIO(content.getvalue()))
    options = ["--minutes", "0.01", "--held-out", "20", "--attacked", "12", "--steps", "3", "--batch", "16"]
    command = ["--images", str(tmp_path / "images.tar.gz"), *options, "--device", "cpu", "--output", str(tmp_path)]
    assert cifar10.main([*command, "--widths", "16", "32", "--features", "16"]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ours")]
    certified, there, attacked = ([float(cell) for cell in row[-3:]] for row in rows)
    assert all(low <= high for low, high in zip(there, attacked, strict=True))
    assert float(rows[0][2]) >= certified[0] >= certified[2] >= 0
    assert (tmp_path / "classifier.safetensors").is_file() and (tmp_path / "cifar10.md").is_file()


@pytest.mark.usefixtures("benchmarks")
def test_the_loss_of_the_classifier_is_a_smooth_hinge_on_the_radius() -> None:
    import cifar10

    from lipsim.certificates import class_radius

    network = cifar10.Classifier(torch.nn.Flatten(), 12, 4).double()
    x, labels = torch.randn(50, 12, dtype=torch.float64), torch.arange(50) % 4
    answer, radius = class_radius(x, network.weight, network.bias)
    signed = torch.where(answer == labels, radius, -torch.inf)
    loss = cifar10.radius_loss(network(x), labels, network.weight, target=0.7, temperature=1e-3)
    # At a low temperature the hinge of the worst class; of the right answers, that is the hinge on their radius.
    logits = network(x)
    apart = torch.cdist(network.weight, network.weight)[labels] + torch.eye(4, dtype=torch.float64)[labels]
    worst = (
        ((logits.gather(1, labels[:, None]) - logits) / apart)[torch.arange(4) != labels[:, None]].view(50, 3).amin(1)
    )
    torch.testing.assert_close(worst[signed >= 0], signed[signed >= 0])
    torch.testing.assert_close(loss, (0.7 - worst).clamp(min=0).mean(), atol=2e-3, rtol=0)


@pytest.mark.usefixtures("benchmarks")
def test_images_move_by_whole_pixels() -> None:
    import cifar10

    torch.manual_seed(0)
    x = torch.rand(40, 3, 6, 6)
    for image, out in zip(x, cifar10.moved(x, shift=2), strict=True):
        candidates = [
            source[:, rows][:, :, columns]
            for source in (image, image.flip(2))
            for rows in (torch.arange(d, d + 6).clamp(0, 5) for d in range(-2, 3))
            for columns in (torch.arange(d, d + 6).clamp(0, 5) for d in range(-2, 3))
        ]
        assert any(torch.equal(out, candidate) for candidate in candidates)


def test_the_baseline_computes_what_the_student_computes() -> None:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from published import PublishedNetwork  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(BENCHMARKS))
    theirs = PublishedNetwork(64, 16, channels=5, depth=3)
    ours = SLLNetwork(64, 16, channels=5, depth=3)
    state = {name.replace("convs.", "1.").replace("linear.", "5."): w for name, w in theirs.state_dict().items()}
    ours.load_state_dict(state)
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    gradients = dict(ours.named_parameters())
    for (name, parameter), mine in zip(theirs.named_parameters(), state, strict=True):
        torch.testing.assert_close(gradients[mine].grad, parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_the_speed_table_prints_ratios() -> None:
    command = [sys.executable, str(BENCHMARKS / "students.py"), "--image-size", "32", "--batch", "1"]
    options = ["--rounds", "1", "--only", "default student", "--skip", "compile"]
    output = subprocess.run([*command, *options], capture_output=True, text=True, check=True, timeout=500).stdout
    rows = [line.split("|") for line in output.splitlines() if line.startswith("| default student")]
    assert len(rows) == 4
    assert all(float(row[3]) > 0 for row in rows) and all("GiB" in row[4] for row in rows[:3])


@pytest.mark.slow  # starts processes: a minute of two cores
def test_the_tables_of_teachers(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "teachers.py"), "--variant", "clip_vitb32", "--depth", "1"]
    options = ["--batch", "2", "--rounds", "1", "--device", "cpu"]
    output = subprocess.run([*command, *options], capture_output=True, text=True, check=True, timeout=500).stdout
    rows = [line.split("|")[1:-1] for line in output.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 5 and rows[0][0].strip() == "plain float32 loop"
    assert all(float(row[1]) > 0 and float(row[2]) > 0 and float(row[3]) < 1e-2 for row in rows)


@pytest.mark.slow  # starts processes: a minute of two cores
def test_the_table_of_cached_steps_is_printed() -> None:
    command = [sys.executable, str(BENCHMARKS / "distillation.py"), "--image-size", "64", "--batch", "4"]
    options = ["--rounds", "1", "--teachers", "ViT-S/16"]
    output = subprocess.run([*command, *options], capture_output=True, text=True, check=True, timeout=500).stdout
    (row,) = (line.split("|") for line in output.splitlines() if line.startswith("| ViT-S/16"))
    assert float(row[2]) > 0 and float(row[4]) > 0


@pytest.mark.slow  # a quarter of a minute
def test_the_attack_tables_print_ratios_and_scores() -> None:
    options = ["--triplets", "2", "--steps", "2", "--rounds", "1", "--reach-triplets", "4", "--reach-steps", "1"]
    command = [sys.executable, str(BENCHMARKS / "attacks.py"), *options]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500).stdout
    rows = [line.split("|")[1:-1] for line in output.splitlines() if line.startswith("| quickstart")]
    costs, scores = [row for row in rows if len(row) == 4], [row for row in rows if len(row) == 11]
    assert len(costs) == 6 and all(float(row[3]) > 0 for row in costs)
    assert [row[2].strip() for row in scores] == ["pgd", "mi_fgsm", "apgd"]
    assert all(0 <= float(cell) <= 100 for row in scores for cell in row[3:9])
    # A step, and a look at the clean images and at the last point.
    assert all((float(row[9]), float(row[10])) == (3, 1) for row in scores)


@pytest.mark.usefixtures("benchmarks")
def test_certified_search_is_compared_with_a_product() -> None:
    from use_search import search_ratio  # type: ignore[import-not-found]

    found = search_ratio(items=400, features=8, rounds=3)
    for count in (1, 32):
        assert found[f"ratio_{count}"] == found[f"search_{count}"] / found[f"product_{count}"] > 0


@pytest.mark.usefixtures("benchmarks")
def test_the_ceiling_of_votes_is_what_simulated_judges_leave() -> None:
    from vote_ceiling import VoteModel  # type: ignore[import-not-found]

    rng = np.random.default_rng(0)
    preference, judges = rng.beta(0.7, 0.7, 200_000), rng.integers(1, 6, 200_000)
    right = rng.binomial(judges, preference)
    most, untied = np.maximum(right, judges - right), 2 * right != judges
    model = VoteModel.fit(most, judges)
    assert model.shape == pytest.approx(0.7, rel=0.02)
    agrees = (2 * right > judges) == (preference > 0.5)
    for chosen in (untied, untied & (judges == 1), untied & (judges == 4)):
        # 3e-3 is three standard errors of the smallest of the samples.
        assert model.majority_is_right(most, judges)[chosen].mean() == pytest.approx(agrees[chosen].mean(), abs=3e-3)
    shares = [model.expected(votes, 5) for votes in (3, 4, 5)]
    seen = [(most[judges == 5] == votes).mean() for votes in (3, 4, 5)]
    assert sum(shares) == pytest.approx(1) and shares == pytest.approx(seen, abs=5e-3)
    # Judges who all toss coins leave nothing to know.
    assert VoteModel(1e6).majority_is_right(np.array([3]), np.array([4]))[0] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.usefixtures("benchmarks")
def test_reading_images_is_measured(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import data as reading  # type: ignore[import-not-found]

    sizes = ["--size", "8", "--count", "6", "--rounds", "1", "--cores", "4"]
    reading.main(["--images", str(photos), *sizes, "--output", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["count"] == 6 and min(figures["per_core"].values()) > 0
    assert min(figures["loader"].values()) > 0
    assert figures["bytes"]["pack"] == 4 + 4 + 3 * 8 * 8 + 8 / 6  # length, offset, pixels, and a share of the header
    assert f"| pack | {figures['per_core']['pack']:,.0f} |" in capsys.readouterr().out


@pytest.mark.usefixtures("benchmarks")
def test_certificates_that_heed_autocast_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    import device_checks as checks  # type: ignore[import-not-found]
    from device_figures import SCALES  # type: ignore[import-not-found]

    def metrics() -> Iterator[tuple[str, PerceptualMetric]]:
        torch.manual_seed(0)
        yield "linear", PerceptualMetric(OrthogonalProjection(16, 8).eval().requires_grad_(False), 16)

    monkeypatch.setattr(checks, "metrics", metrics)
    monkeypatch.setattr(checks, "AUTOCASTS", {"": None, "autocast bfloat16": torch.bfloat16})
    backends = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul]
    before, lowered = [backend.fp32_precision for backend in backends], set()
    for name in checks.settings(torch.device("cpu")):
        lowered.add((tuple(backend.fp32_precision for backend in backends), torch.is_autocast_enabled("cpu"), name))
    assert len(lowered) == 10 and len({found[:2] for found in lowered}) >= 8
    after = [backend.fp32_precision for backend in backends]  # torch puts ieee for the default, which is the same
    assert [name.replace("none", "ieee") for name in after] == [name.replace("none", "ieee") for name in before]
    monkeypatch.setattr(checks, "SETTINGS", {name: checks.SETTINGS[name] for name in ("", "matmul precision medium")})
    (figure,) = checks.certificate_figures(torch.device("cpu"), SCALES["quick"])
    assert figure.passed and figure.number == 0 and "from float64" in figure.note
    certify = checks.certify

    def heeds_autocast(*arguments: Any) -> dict[str, torch.Tensor]:
        found = certify(*arguments)
        return found | {"radius": found["radius"] + 1e-3 * torch.is_autocast_enabled("cpu")}

    monkeypatch.setattr(checks, "certify", heeds_autocast)
    (figure,) = checks.certificate_figures(torch.device("cpu"), SCALES["quick"])
    assert not figure.passed and figure.number > 1e-4 and "radius under" in figure.note and "bfloat16" in figure.note


@pytest.mark.usefixtures("benchmarks")
def test_the_table_of_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    import device
    from device_figures import Figure

    files = ["--markdown", str(tmp_path / "table.md"), "--json", str(tmp_path / "figures.json")]
    assert device.main(["--quick", "--device", "cpu", "--only", "search", *files]) == 0
    out = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() in out
    content = json.loads((tmp_path / "figures.json").read_text())
    assert content["machine"]["versions"]["torch"] and set(content["seconds"]) == {"search"}
    assert [figure["case"] for figure in content["figures"]] == 2 * ["matrix product", "with certificates"]
    for figure in content["figures"]:
        assert figure["number"] > 0 and f"| {figure['value']} {figure['unit']} |" in out
    monkeypatch.setitem(device.PARTS, "search", (lambda *_: iter([Figure("search", "a check", "no", passed=False)]),))
    assert device.main(["--quick", "--device", "cpu", "--only", "search"]) == 1
    captured = capsys.readouterr()
    assert "| search | a check | no |  | **failed** |  |" in captured.out and "failed: search: a check" in captured.err


@pytest.mark.usefixtures("benchmarks")
def test_a_part_that_breaks_off_costs_the_others_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    import device
    from device_figures import Figure

    def breaks(*_: Any) -> Any:
        yield Figure("teacher", "what came before", "1")
        raise RuntimeError("out of memory")

    monkeypatch.setitem(device.PARTS, "teacher", (breaks,))
    with pytest.raises(RuntimeError, match="out of memory"):
        device.main(["--quick", "--device", "cpu", "--only", "teacher", "--json", str(tmp_path / "figures.json")])
    content = json.loads((tmp_path / "figures.json").read_text())
    assert [figure["case"] for figure in content["figures"]] == ["what came before"] and not content["seconds"]


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.filterwarnings("default")  # torch's compiler warns of what it does itself
@pytest.mark.slow  # minutes: compiles, and starts processes
def test_every_part_of_the_benchmark_of_a_device_runs(capsys: pytest.CaptureFixture[str]) -> None:
    import device

    assert (
        device.main(["--quick", "--device", "cpu", "--only", *(part for part in device.PARTS if part != "tests")]) == 0
    )
    out = capsys.readouterr().out
    assert all(f"| {kind}" in out for kind in ("certificates", "two processes", "teacher", "attack", "torch.compile"))


@pytest.mark.usefixtures("benchmarks")
def test_maps_that_training_has_bent_are_told() -> None:
    import device_training as training  # type: ignore[import-not-found]

    stage = FineTuning(OrthogonalProjection(16, 8))
    assert training.apart_from_orthonormal(stage) < 1e-6
    layer = next(module for module in stage.modules() if isinstance(module, OrthogonalLinear))
    bent = 1.01 * layer.weights()[0].detach()
    layer.weights = lambda: (bent,)  # type: ignore[method-assign]
    assert training.apart_from_orthonormal(stage) == pytest.approx(1.01**2 - 1, rel=1e-4)


@pytest.mark.usefixtures("benchmarks")
def test_steps_on_shared_batches_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    import shared_batches  # type: ignore[import-not-found]

    sizes = ["--rounds", "2", "--image-size", "16", "--features", "8", "--images", "6", "--triplets", "40"]
    shared_batches.main(sizes)
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[0][2:] for row in rows] == list(shared_batches.VARIANTS)
    assert rows[0].endswith("| 1 |") and all(float(row.split(" | ")[1]) > 0 for row in rows)
    options = argparse.Namespace(image_size=16, features=8, device="cpu")
    plain, own = (
        shared_batches.make_student(variant, options) for variant in list(shared_batches.VARIANTS.values())[1:3]
    )
    sorting = [sum(isinstance(layer, MaxMin) for layer in student) for student in (plain, own)]
    x = torch.rand(4, 3, 16, 16)
    assert sorting[0] == 0 < sorting[1] and torch.equal(plain(x), own(x))
    with pytest.raises(SystemExit):  # it would compare the same loss with itself
        shared_batches.main([*sizes, "--images", "60"])
    assert "without the pairs" in capsys.readouterr().err


@pytest.mark.usefixtures("benchmarks")
def test_images_of_feature_sets_are_as_many_as_asked_for(tmp_path: Path) -> None:
    from feature_sets import unpack  # type: ignore[import-not-found]

    for label in "ab":
        (tmp_path / "all" / label).mkdir(parents=True)
        for number in range(6):
            (tmp_path / "all" / label / f"{number}.png").write_bytes(b"x")
    folder = tmp_path / "images"
    unpack(tmp_path / "all", folder, 8, 3)  # by whole classes
    names = [sorted(path.name for path in (folder / part / "b").iterdir()) for part in ("train", "held-out")]
    assert names == [["0.png", "1.png", "2.png", "3.png"], ["5.png"]]
    unpack(tmp_path / "all", folder, 8, 2)  # they are there
    with pytest.raises(ValueError, match="train has 8 images of another run, expected 4"):
        unpack(tmp_path / "all", folder, 4, 2)
    for train, held_out in ((8, 6), (8, 1), (1, 4)):  # the same image in both, and none
        with pytest.raises(ValueError, match="at least one image of each of 2 classes"):
            unpack(tmp_path / "all", tmp_path / "others", train, held_out)
