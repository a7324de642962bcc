"""Losses of several processes: value and gradient of one process with all of the samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from evaluations import forked
from torch import Tensor, distributed

from lipsim.training import (
    RMSE,
    CertifiedShare,
    Cosine,
    JointRadiusHinge,
    MarginHinge,
    RadiusHinge,
    Relational,
    ScaleFree,
)
from lipsim.training.global_batch import gathered, shared, weighted_mean
from lipsim.training.losses import DistillationLoss, TripletLoss, info_nce

pytestmark = pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork:DeprecationWarning")
SIZES = {1: (11,), 2: (7, 4), 3: (4, 0, 7)}  # rows of each process
LOSSES: dict[str, TripletLoss | DistillationLoss | Callable[..., Tensor]] = {
    "radius": RadiusHinge(2.0, softness=0.3),
    "agreement": RadiusHinge(2.0, weight_by_agreement=True, ramp=0.5),
    "joint": JointRadiusHinge(1.0),
    "margin": MarginHinge(0.5, weight_by_agreement=True),
    "share": CertifiedShare(),
    "rmse": RMSE(2.0),
    "cosine": Cosine(),
    "relational": Relational(),
    "scale-free": ScaleFree(0.7, 1.3),
    "contrast": lambda z, positive: info_nce(z, positive, 0.1),
}


def _rows() -> tuple[Tensor, Tensor]:
    """Inputs of reference, left and right, ``(11, 3, 5)``, and votes, of which two are tied."""
    draw = torch.Generator().manual_seed(0)
    votes = torch.tensor([0.0, 1.0, 0.2, 0.8, 0.5, 0.4, 0.6, 1.0, 0.5, 0.9, 0.1], dtype=torch.float64)
    return torch.randn(11, 3, 5, dtype=torch.float64, generator=draw), votes


def _values_and_gradients(folder: Path, count: int) -> None:
    """Each loss of a linear encoder, with the mean of its gradients over processes, as distributed training has it."""
    torch.set_num_threads(1)
    if count > 1:
        distributed.init_process_group("gloo")
    rank = distributed.get_rank() if count > 1 else 0
    inputs, votes = (tensor.split(SIZES[count])[rank] for tensor in _rows())
    weight = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    target = (inputs[:, 0] @ torch.ones(5, 4, dtype=torch.float64)).cos()
    found: dict[str, Tensor] = {}
    for name, loss in LOSSES.items():
        z, z0, z1 = (inputs @ weight).unbind(1)
        if isinstance(loss, TripletLoss):
            own = loss(z, z0, z1, votes, 1.0, progress=0.4)
            value = weighted_mean(own, loss.weights(votes).sum())
        elif isinstance(loss, DistillationLoss):
            features, aim = gathered(z, target)
            value = shared(loss(features, aim, 1.0))
        else:
            value = shared(loss(*gathered(z, z0)))
        (gradient,) = torch.autograd.grad(value, weight)
        if count > 1:
            distributed.all_reduce(gradient)
        found |= {f"{name} value": value.detach(), f"{name} gradient": gradient / count}
    half = inputs[:, 0].bfloat16()
    assert torch.equal(gathered(half)[0], _rows()[0][:, 0].bfloat16())
    torch.save(found, folder / f"{count}-{rank}.pt")
    if count > 1:
        distributed.destroy_process_group()


def test_values_and_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    """In float64; rows are dealt out unevenly, to one of three processes none."""
    for count in (1, 2, 3):
        forked(count, _values_and_gradients, tmp_path, count)
    expected = torch.load(tmp_path / "1-0.pt", weights_only=True)
    assert all(tensor.abs().max() > 0 for tensor in expected.values())
    for count, rank in ((2, 0), (2, 1), (3, 0), (3, 1), (3, 2)):
        found = torch.load(tmp_path / f"{count}-{rank}.pt", weights_only=True)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12, msg=f"{name} {count} {rank}")


def test_one_process_has_its_loss_as_it_is() -> None:
    loss = torch.tensor(0.3, requires_grad=True)
    assert weighted_mean(loss, torch.tensor(2.0)) is loss and shared(loss) is loss
    assert gathered(loss)[0] is loss


def test_what_a_loss_counts_of_a_triplet() -> None:
    votes = torch.tensor([0.0, 0.5, 0.75])
    assert RadiusHinge().weights(votes).tolist() == CertifiedShare().weights(votes).tolist() == [1, 0, 1]
    assert MarginHinge(weight_by_agreement=True).weights(votes).tolist() == [1, 0, 0.5]
