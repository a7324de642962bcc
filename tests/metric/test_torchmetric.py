"""LipSimilarity accumulates, over batches and processes, and keeps the network out of checkpoints."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lipsim
from lipsim import LipSimilarity, PerceptualMetric
from lipsim.metric import save
from lipsim.students import OrthogonalProjection


@pytest.fixture
def metric() -> PerceptualMetric:
    return PerceptualMetric(OrthogonalProjection(16, 8), 16).eval().requires_grad_(False)


@pytest.fixture
def pairs() -> tuple[Tensor, Tensor]:
    x, y = torch.rand(2, 10, 3, 16, 16)
    return x, y


def filled(similarity: LipSimilarity, pairs: tuple[Tensor, Tensor], size: int = 4) -> LipSimilarity:
    for x, y in zip(*(images.split(size) for images in pairs), strict=True):
        similarity.update(x, y)
    return similarity


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_mean_and_the_sum_are_of_all_pairs(
    metric: PerceptualMetric, pairs: tuple[Tensor, Tensor], per_sample: bool
) -> None:
    distances = metric(*pairs)
    for reduction in ("mean", "sum"):
        similarity = filled(LipSimilarity(metric, reduction, per_sample=per_sample), pairs)
        torch.testing.assert_close(similarity.compute(), getattr(distances, reduction)())
        similarity.reset()
        with pytest.raises(ValueError, match="no pair of images was seen"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchmetrics says it as well
            similarity.compute()


def test_scores_are_those_of_each_pair(metric: PerceptualMetric, pairs: tuple[Tensor, Tensor]) -> None:
    for reduction in ("none", None):
        similarity = filled(LipSimilarity(metric, reduction), pairs)
        torch.testing.assert_close(similarity.compute(), metric(*pairs))
    kept = filled(LipSimilarity(metric, per_sample=True), pairs)
    torch.testing.assert_close(kept.scores.float(), metric(*pairs))
    assert kept.compute().ndim == 0
    with pytest.raises(ValueError, match="per_sample=True"):
        _ = LipSimilarity(metric).scores


def test_a_batch_has_its_own_value_and_counts_once(metric: PerceptualMetric, pairs: tuple[Tensor, Tensor]) -> None:
    similarity, (x, y) = LipSimilarity(metric), pairs
    torch.testing.assert_close(similarity(x[:3], y[:3]), metric(x[:3], y[:3]).mean())
    torch.testing.assert_close(similarity(x[3:], y[3:]), metric(x[3:], y[3:]).mean())
    torch.testing.assert_close(similarity.compute(), metric(x, y).mean())
    moving = x.clone().requires_grad_()
    similarity(moving, y).backward()
    assert moving.grad is not None and moving.grad.any() and not similarity.total.requires_grad


def test_images_of_any_size_and_range(metric: PerceptualMetric) -> None:
    x, y = torch.rand(2, 3, 20, 30), torch.rand(2, 3, 9, 9)
    expected = metric(metric.read(x), metric.read(y)).mean()
    torch.testing.assert_close(LipSimilarity(metric)(x, y), expected)
    torch.testing.assert_close(LipSimilarity(metric, normalize=True)(2 * x - 1, 2 * y - 1), expected)
    torch.testing.assert_close(LipSimilarity(metric)(x.double(), y.double()), expected)
    with pytest.raises(ValueError, match="normalize=True"):
        LipSimilarity(metric).update(2 * x - 1, y)
    with pytest.raises(ValueError, match="as many images on both sides, got 2 and 1"):
        LipSimilarity(metric).update(x, y[:1])
    with pytest.raises(ValueError, match="reduction 'none', 'mean' or 'sum'"):
        LipSimilarity(metric, "median")  # type: ignore[arg-type]


def test_precision_is_full_whatever_the_surroundings_say(
    metric: PerceptualMetric, pairs: tuple[Tensor, Tensor]
) -> None:
    model = nn.ModuleDict({"score": LipSimilarity(metric)}).to(torch.bfloat16)
    similarity = model["score"]
    with torch.autocast("cpu", torch.bfloat16):
        similarity.update(*pairs)
    assert similarity.total.dtype == torch.float64 and similarity.metric.dtype == torch.float32
    torch.testing.assert_close(similarity.compute(), metric(*pairs).mean())


def test_repeated_pairs_count_once_where_their_index_is_known(
    metric: PerceptualMetric, pairs: tuple[Tensor, Tensor]
) -> None:
    x, y = pairs
    similarity = LipSimilarity(metric, "none")
    order = torch.tensor([7, 2, 9, 2, 0])
    similarity.update(x[order], y[order], order)
    torch.testing.assert_close(similarity.compute(), metric(x[[0, 2, 7, 9]], y[[0, 2, 7, 9]]))
    assert len(similarity.scores) == 5
    similarity.update(x, y)
    with pytest.raises(ValueError, match="an index in every update or in none, got 5 for 15 pairs"):
        similarity.compute()
    for keeps, index in ((False, [0]), (True, [0, 1])):
        with pytest.raises(ValueError, match=f"got {len(index)} with per_sample={keeps}"):
            LipSimilarity(metric, per_sample=keeps).update(x[:1], y[:1], index)


def test_bounds_hold_the_distance(metric: PerceptualMetric, pairs: tuple[Tensor, Tensor]) -> None:
    lower, upper = metric.distance_bounds(*pairs, 0.5)
    result = filled(LipSimilarity(metric, eps=0.5), pairs).compute()
    assert isinstance(result, dict) and list(result) == ["distance", "lower", "upper"]
    expected = {"distance": metric(*pairs).mean(), "lower": lower.mean().float(), "upper": upper.mean().float()}
    torch.testing.assert_close(result, expected)
    each = filled(LipSimilarity(metric, "none", eps=0.5), pairs).compute()
    assert isinstance(each, dict) and (each["lower"] < each["distance"]).all()
    torch.testing.assert_close(each["upper"], upper.float())
    with pytest.raises(ValueError, match="eps ≥ 0"):
        LipSimilarity(metric, eps=-1)


@pytest.mark.parametrize("options", [{}, {"per_sample": True}, {"reduction": "none", "eps": 0.1}], ids=str)
def test_processes_are_reduced(
    metric: PerceptualMetric, pairs: tuple[Tensor, Tensor], options: dict[str, object]
) -> None:
    """Two instances stand for two processes; the gathering is that of torchmetrics, over what each would send."""
    x, y = pairs
    parts = [LipSimilarity(metric, **options) for _ in range(2)]  # type: ignore[arg-type]
    sent: list[list[Tensor]] = []
    for part, (start, stop) in zip(parts, ((0, 7), (7, 10)), strict=True):
        part.update(x[start:stop], y[start:stop])
        part.distributed_available_fn = lambda: True
        states = (getattr(part, name) for name in part._reductions)
        sent.append([torch.cat(state) if isinstance(state, list) and state else state for state in states])
    empty = torch.zeros(0)
    gathered = [[empty, empty] if isinstance(states[0], list) else list(states) for states in zip(*sent, strict=True)]
    for part in parts:
        order = iter(gathered)
        part.dist_sync_fn = lambda tensor, group=None, order=order: next(order)
    whole = LipSimilarity(metric, **options)  # type: ignore[arg-type]
    whole.update(x, y)
    for part in parts:
        torch.testing.assert_close(part.compute(), whole.compute())


@pytest.mark.parametrize("indexed", [False, True])
def test_a_process_without_pairs_sends_none_in_the_same_shape(
    metric: PerceptualMetric, pairs: tuple[Tensor, Tensor], indexed: bool
) -> None:
    """Processes gather tensor by tensor: number, dimensions and dtypes have to agree."""
    full, none = (LipSimilarity(metric, eps=0.1, per_sample=True) for _ in range(2))
    full.update(*pairs, index=list(range(10)) if indexed else None)
    sent: list[list[Tensor]] = []
    for part in (full, none):
        own: list[Tensor] = []

        def send(tensor: Tensor, group: object = None, own: list[Tensor] = own) -> list[Tensor]:
            own.append(tensor)
            return [tensor]

        part.sync(dist_sync_fn=send, distributed_available=lambda: True)
        sent.append(own)
    assert len(sent[0]) == len(sent[1]) == 2
    for mine, other in zip(*sent, strict=True):
        assert (mine.dtype, mine.shape[1:]) == (other.dtype, other.shape[1:]) and len(other) == 0
    none.unsync()
    assert len(none.scores) == 0
    part = LipSimilarity(metric, per_sample=True)
    gathered = iter([[sent[1][0][:, :1], sent[0][0][:, :1]], [sent[1][1], sent[0][1]]])
    part.distributed_available_fn = lambda: True
    part.dist_sync_fn = lambda tensor, group=None: next(gathered)
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        torch.testing.assert_close(part.compute(), metric(*pairs).mean())


def test_the_network_is_no_part_of_a_checkpoint(metric: PerceptualMetric, pairs: tuple[Tensor, Tensor]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), LipSimilarity(metric))
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    assert len(list(model.parameters())) == 2
    model.load_state_dict(model.state_dict(), strict=True)
    model.train()
    assert not model[1].metric.training
    similarity = filled(LipSimilarity(metric), pairs)
    for other in (copy.deepcopy(similarity), pickle.loads(pickle.dumps(similarity)), similarity.clone()):
        assert torch.equal(other.compute(), similarity.compute())
    similarity.to("meta")
    assert similarity.metric.device == similarity.total.device == torch.device("meta")


def test_a_training_metric_is_copied(metric: PerceptualMetric, pairs: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    similarity = LipSimilarity(metric.train())
    assert metric.training and not similarity.metric.training
    file = save(metric.eval(), tmp_path / "metric.safetensors")
    torch.testing.assert_close(LipSimilarity(file)(*pairs), similarity(*pairs))
    assert LipSimilarity().metric.image_size == lipsim.load().image_size


class Logging(LightningModule):
    def __init__(self, metric: PerceptualMetric) -> None:
        super().__init__()
        self.similarity = LipSimilarity(metric)

    def validation_step(self, batch: list[Tensor]) -> None:
        self.similarity.update(*batch)
        self.log("similarity", self.similarity, on_epoch=True)


@pytest.mark.filterwarnings("ignore:.*not have many workers")
def test_lightning_logs_it(metric: PerceptualMetric, pairs: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    loader = DataLoader(TensorDataset(*pairs), batch_size=4)
    (logged,) = trainer.validate(Logging(metric), loader, verbose=False)
    assert logged["similarity"] == pytest.approx(float(metric(*pairs).mean()), rel=1e-6)


def test_plots(metric: PerceptualMetric, pairs: tuple[Tensor, Tensor]) -> None:
    from matplotlib import pyplot

    similarity = LipSimilarity(metric)
    values = [similarity(*(images[i : i + 2] for images in pairs)) for i in (0, 2, 4)]
    _, axes = similarity.plot()
    assert axes.get_title() == "" or axes.get_title() == "LipSimilarity"
    _, axes = similarity.plot(values)
    (line,) = axes.get_lines()[:1]
    assert line.get_ydata() == pytest.approx([float(value) for value in values])
    pyplot.close("all")


def test_ends_are_rounded_outward() -> None:
    """To float32: to the nearest, half of them would be inside the certified interval."""
    metric = lipsim.load("quickstart")
    each = LipSimilarity(metric, eps=0.05, reduction="none")
    x, y = torch.rand(2, 16, 3, 64, 64)
    each.update(x, y)
    found, (lower, upper) = each.compute(), metric.distance_bounds(x, y, 0.05)
    assert found["lower"].dtype == torch.float32
    assert bool((found["lower"].double() <= lower).all()) and bool((found["upper"].double() >= upper).all())
    torch.testing.assert_close(found["lower"].double(), lower, rtol=1e-6, atol=0)
