"""Correlation with opinion scores: as scipy has it, and within its certified interval under attack."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor

from lipsim import PerceptualMetric
from lipsim.attacks import pgd
from lipsim.cli.main import main
from lipsim.data import PairTable
from lipsim.evaluation.correlation import Correlations, Moves, correlate, correlations, fit_logistic
from lipsim.metric import save
from lipsim.metric.distances import pixel_l2, ssim
from lipsim.students import OrthogonalProjection
from lipsim.teachers import SmallViT

SIZE, COUNT, EPS = 12, 14, 0.3
WAYS: tuple[Moves, ...] = ("distorted", "both")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Noise on two references, and scores that grow with it, some of them tied."""
    rng = np.random.default_rng(0)
    references = rng.integers(60, 190, (2, SIZE, SIZE, 3))
    lines = ["reference,distorted,dmos"]
    for number, reference in enumerate(references):
        Image.fromarray(reference.astype(np.uint8)).save(tmp_path / f"r{number}.png")
    for number in range(COUNT):
        noise = rng.normal(size=(SIZE, SIZE, 3)) * (5 + 3 * number)
        image = (references[number % 2] + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / f"{number}.png")
        lines.append(f"r{number % 2}.png,{number}.png,{(number + int(rng.integers(4))) // 2}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "pairs.csv"


@pytest.fixture
def metric() -> PerceptualMetric:
    return PerceptualMetric(OrthogonalProjection(SIZE, 24), SIZE)


def images_of(table: PairTable, metric: PerceptualMetric) -> tuple[Tensor, Tensor]:
    images = table.load(range(len(table.images)), metric.preprocess)
    return images[table.pairs[:, 0]], images[table.pairs[:, 1]]


def test_coefficients_are_those_of_scipy(study: Path, metric: PerceptualMetric) -> None:
    table = PairTable.read(study)
    references, distorted = images_of(table, metric)
    found = correlate({"ours": metric, "pixel l2": pixel_l2, "SSIM": ssim}, table, batch_size=3)
    for name, distance in (("ours", metric), ("pixel l2", pixel_l2), ("SSIM", ssim)):
        with torch.no_grad():
            d = distance(references, distorted).double().numpy()
        one = found[name]
        assert one.srcc == pytest.approx(stats.spearmanr(d, table.scores).statistic, abs=1e-9)
        assert one.krcc == pytest.approx(stats.kendalltau(d, table.scores).statistic, abs=1e-9)
        assert one.plcc == pytest.approx(stats.pearsonr(d, table.scores).statistic, abs=1e-5)
        assert one.plcc is not None and one.plcc_logistic is not None and one.plcc_logistic >= one.plcc - 1e-3
        assert one.certified == {}
    study.write_text(study.read_text().replace("dmos", "mos"))
    opposite = correlate({"ours": metric}, PairTable.read(study))["ours"]
    assert opposite.srcc == pytest.approx(-(found["ours"].srcc or 0), abs=1e-12)


@pytest.mark.parametrize("moves", ["distorted", "reference", "both"])
def test_no_attack_leaves_the_certified_interval(study: Path, metric: PerceptualMetric, moves: Moves) -> None:
    """Little distorted images are moved away from their references and others towards them, and the reverse."""
    table = PairTable.read(study)
    metrics = {"ours": metric, "pixel l2": pixel_l2}
    found = correlate(metrics, table, eps=[0.0, EPS], moves=moves)
    references, distorted = images_of(table, metric)
    low = torch.tensor(table.scores <= np.median(table.scores))
    for name, distance in metrics.items():
        for against in (1, -1):
            # Less 100: nothing counts as broken then, so that all steps are taken.
            sign = against * torch.where(low, 1.0, -1.0)
            x, y = references, distorted
            if moves != "reference":
                y = pgd(lambda moved, x=x, d=distance, s=sign: s * d(x, moved) - 100, y, eps=EPS, steps=15)
            if moves != "distorted":
                x = pgd(lambda moved, y=y, d=distance, s=sign: s * d(moved, y) - 100, x, eps=EPS, steps=15)
            with torch.no_grad():
                reached = correlations(distance(x, y).double().numpy(), table.difference)
            for kind, (least, most) in found[name].certified[f"{EPS:g}"].items():
                value, natural = getattr(reached, kind), getattr(found[name], kind)
                assert least < value < most, (name, kind)
                if against == 1 and name == "ours":
                    assert value < natural  # the attack does something
    exact = found["ours"].certified["0"]["srcc"]
    assert exact == pytest.approx((found["ours"].srcc,) * 2, abs=1e-9)
    widths = {
        way: float(np.ptp(correlate({"ours": metric}, table, eps=[EPS], moves=way)["ours"].certified["0.3"]["krcc"]))
        for way in WAYS
    }
    assert widths["both"] > widths["distorted"]


def test_what_has_no_bound_has_no_certificate(study: Path) -> None:
    unbounded = PerceptualMetric(torch.nn.Flatten(), SIZE, lipschitz=math.inf)
    found = correlate({"teacher": unbounded, "SSIM": ssim}, PairTable.read(study), eps=[0.1])
    assert found["teacher"].certified == {} == found["SSIM"].certified
    assert found["teacher"].srcc is not None


def test_the_fit_is_monotonic_and_finds_a_logistic_curve() -> None:
    d = np.linspace(0, 1, 50)
    scores = 3 + 4 / (1 + np.exp(-(d - 0.4) / 0.05))
    fitted = fit_logistic(d, scores)
    assert fitted is not None
    expected = (scores - scores.mean()) / scores.std()
    np.testing.assert_allclose(fitted, expected, atol=1e-6)
    assert correlations(d, scores).plcc_logistic == pytest.approx(1)
    rng = np.random.default_rng(5)
    for number in range(40):  # a fit of scores that fall is that of their mirror image
        noisy = rng.normal(size=(2, 30))
        noisy[1] -= 0.4 * number / 40 * noisy[0]
        rising, falling = fit_logistic(*noisy), fit_logistic(noisy[0], -noisy[1])
        assert (rising is None) == (falling is None)
        if rising is not None and falling is not None:
            np.testing.assert_allclose(rising, -falling, atol=1e-3)
    bent = fit_logistic(d, (d - 0.5) ** 2 + 0.1 * d)
    assert bent is None or (np.diff(bent) >= 0).all() or (np.diff(bent) <= 0).all()
    assert fit_logistic(d[:4], scores[:4]) is None
    assert correlations(np.ones(5), d[:5]) == Correlations(None, None, None, None)


def test_a_distance_that_falls_with_the_difference_has_a_negative_fit() -> None:
    difference = np.random.default_rng(0).normal(size=200)
    noise = 0.1 * np.random.default_rng(1).normal(size=200)
    rising, falling = correlations(difference + noise, difference), correlations(-difference + noise, difference)
    assert rising.plcc_logistic is not None and falling.plcc_logistic is not None
    assert 0.99 < rising.plcc_logistic <= 1 and -1 <= falling.plcc_logistic < -0.99


def test_bad_requests_are_refused(study: Path, metric: PerceptualMetric) -> None:
    table = PairTable.read(study)
    for arguments, message in (
        ({"metrics": {"SSIM": ssim}}, "at least one metric"),
        ({"moves": "all"}, "moves to be one of distorted, reference, both"),
        ({"eps": [-0.1]}, "eps ≥ 0"),
        ({"batch_size": 0}, "batch_size"),
    ):
        with pytest.raises(ValueError, match=message):
            correlate(**({"metrics": {"ours": metric}, "table": table} | arguments))  # type: ignore[arg-type]
    study.write_text("\n".join(study.read_text().splitlines()[:2]))
    with pytest.raises(ValueError, match="two pairs of different scores"):
        correlate({"ours": metric}, PairTable.read(study))


def test_the_command(study: Path, metric: PerceptualMetric, capsys: pytest.CaptureFixture[str]) -> None:
    folder = study.parent
    study.write_text(study.read_text().replace("dmos", "jnd"))
    file = str(save(metric, folder / "m.safetensors"))
    common = ["correlate", str(study), "--columns", "dmos=jnd", "--metric", f"ours={file}"]

    def run(*more: str) -> int:
        with pytest.raises(SystemExit) as stop:
            main([*common, *more])
        return int(stop.value.code or 0)

    assert run("--eps", "36/255", "0.5", "--json", "--baselines", "--output", str(folder / "out")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((folder / "out/correlations.json").read_text())
    assert (found["pairs"], found["images"], found["scores"], found["moves"]) == (COUNT, COUNT + 2, "dmos", "distorted")
    assert list(found["metrics"]) == ["ours", "pixel l2", "SSIM", "MS-SSIM"]
    ours = found["metrics"]["ours"]
    for kind in ("srcc", "krcc", "plcc"):
        (a, b), (wide_a, wide_b) = (ours["certified"][eps][kind] for eps in ("36/255", "0.5"))
        assert -1 <= wide_a <= a <= ours[kind] <= b <= wide_b <= 1
    assert {path.name for path in (folder / "out").iterdir()} == {
        *(f"{name}.{kind}" for name in ("correlations", "certified") for kind in ("csv", "md", "tex")),
        "correlations.json",
    }
    vit = SmallViT(SIZE, patch_size=SIZE // 2, width=8, depth=1, heads=2)
    teacher = save(PerceptualMetric(vit, SIZE, lipschitz=math.inf), folder / "teacher.safetensors")
    with pytest.raises(SystemExit) as stop:
        main([*common[:4], "--metric", f"teacher={teacher}", "--output", str(folder / "out")])
    assert stop.value.code == 0 and {path.stem for path in (folder / "out").iterdir()} == {"correlations"}
    capsys.readouterr()
    assert run() == 0
    shown = capsys.readouterr().out
    assert "SRCC" in shown and "36/255" in shown and "108/255" in shown and " to " in shown
    for more, message in (
        (["--columns", "dmos"], "expected OURS=THEIRS"),
        (["--columns", "mos=jnd", "reference=x"], "no column x; it has reference, distorted, jnd"),
        (["--metric", file, f"m={file}"], "metrics of different names"),
    ):
        assert run(*more) == 1
        assert message in capsys.readouterr().err
    save(PerceptualMetric(OrthogonalProjection(SIZE, 8), SIZE, lipschitz=math.inf), file)
    assert run("--eps", "0.1") == 1 and "no Lipschitz bound" in capsys.readouterr().err
