"""Tuning of teachers: all weights, the head, or LoRA factors; checkpointing and bf16; what distillation gets."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from public_layouts import write_variant
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lipsim.attacks import Adversary
from lipsim.cli.stage import train
from lipsim.data import Triplet
from lipsim.data.sets.nights import NightsTriplets
from lipsim.data.transforms import Preprocess
from lipsim.metric import load, save
from lipsim.students import OrthogonalProjection
from lipsim.teachers import BranchConfig, DreamSim, Ensemble, SmallViT
from lipsim.teachers.lora_tuning import Lora
from lipsim.training import Acceleration, Distillation, TeacherTuning

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2, "projection": 12}


class Brightness(L.LightningDataModule):
    """Triplets whose nearer candidate has the brightness of the reference, 32 pixels."""

    test_names = val_names = ("brightness",)

    def __init__(self, num: int = 32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        level, right = torch.rand(2, num, generator=generator)
        right = (right > 0.5).float()

        def images(shift: Tensor) -> Tensor:
            noise = 0.1 * torch.randn(num, 3, 32, 32, generator=generator)
            return (0.2 + 0.3 * (level + shift).view(-1, 1, 1, 1) + noise).clamp(0, 1)

        self.batch = Triplet(images(0 * right), images(right), images(1 - right), right, torch.arange(num))

    def _loader(self, shuffle: bool) -> Any:
        def collate(rows: list[int]) -> Triplet:
            return self.batch.select(torch.tensor(rows))

        return DataLoader(range(len(self.batch)), batch_size=8, shuffle=shuffle, collate_fn=collate)  # type: ignore[arg-type]

    def train_dataloader(self) -> Any:
        return self._loader(True)

    def val_dataloader(self) -> Any:
        return self._loader(False)


def _trainer(root: Path, **options: Any) -> L.Trainer:
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, **options}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return L.Trainer(default_root_dir=root, accelerator="cpu", devices=1, **quiet, **options)


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=3e-3)


def _teacher(head: int = 0) -> DreamSim:
    return DreamSim("ensemble", "random", 32, head=head, options=SMALL)


def _need_peft() -> None:
    pytest.importorskip("peft", reason="comes with the extra lipsim[tune]")


@pytest.mark.parametrize(
    ("tune", "precision"), [("all", "32-true"), ("all", "bf16-mixed"), ("head", "32-true"), ("lora", "bf16-mixed")]
)
def test_tuning_changes_what_it_should_and_distillation_takes_it(tune: Any, precision: Any, tmp_path: Path) -> None:
    if tune == "lora":
        _need_peft()
    teacher, data = _teacher(head=6 if tune == "head" else 0), Brightness()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    module = TeacherTuning(teacher, tune=tune, lora=Lora(rank=4, dropout=0.0), optimizer=_adam, augment=False)
    trainer = _trainer(tmp_path, max_epochs=8, precision=precision)
    trainer.fit(module, data)
    assert trainer.callback_metrics["val/brightness/majority_score"] > 0.9
    file = save(module.metric, tmp_path / "teacher.safetensors")
    loaded = load(file)
    after = loaded.encoder.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    if tune == "all":
        assert {name for name, _ in _teacher().named_parameters()} == changed
    else:
        expected = {"head": "head.", "lora": ".attn.qkv.weight"}[tune]
        assert changed == {
            name for name in before if expected in name and (tune == "lora" or name.startswith(expected))
        }
    z = module.metric.eval().embed(data.batch.left)
    torch.testing.assert_close(loaded.embed(data.batch.left), z, rtol=0, atol=1e-5)
    distillation = Distillation(file, OrthogonalProjection(32, teacher.out_features))
    torch.testing.assert_close(distillation.teacher.embed(data.batch.left), z, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tune", ["all", "lora"])
def test_checkpointing_leaves_gradients_equal(tune: Any) -> None:
    if tune == "lora":
        _need_peft()
    for teacher in (_teacher(), SmallViT(32, patch_size=8, width=24, depth=3, heads=2)):
        module = TeacherTuning(teacher, tune=tune, lora=Lora(rank=4, dropout=0.2))
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "lora_B" in name:  # they start at 0, where the other factors have no gradient
                    parameter.normal_(std=0.1)
        module.train()
        gradients, kept = [], []
        for checkpoint in (False, True):
            run = Acceleration(checkpoint=checkpoint).wrap(teacher)
            torch.manual_seed(0)  # of the dropout
            module.zero_grad()
            sizes: dict[int, int] = {}

            def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                features = run(torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
            (features * torch.arange(features.shape[1])).sum().backward()
            gradients.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
            kept.append(sum(sizes.values()))
        assert (
            gradients[0].keys() == gradients[1].keys() == {n for n, p in module.named_parameters() if p.requires_grad}
        )
        for name, gradient in gradients[0].items():
            assert gradient.abs().sum() > 0, name
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)
        assert kept[1] < 0.7 * kept[0]


def test_lora_resumes(tmp_path: Path) -> None:
    _need_peft()
    data = Brightness()
    first = _trainer(tmp_path)
    module = TeacherTuning(_teacher(), tune="lora", optimizer=_adam)
    first.fit(module, data)
    first.save_checkpoint(tmp_path / "last.ckpt")
    resumed = TeacherTuning(_teacher(), tune="lora", optimizer=_adam)
    trainer = _trainer(tmp_path, max_epochs=3)
    trainer.fit(resumed, data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert trainer.global_step == 12
    frozen = {n: p for n, p in resumed.named_parameters() if not p.requires_grad}
    assert frozen and all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in frozen.items())


def test_the_recipe_is_dreamsims() -> None:
    _need_peft()
    module = TeacherTuning(_teacher(), tune="lora")
    factors = {name: p for name, p in module.named_parameters() if p.requires_grad}
    # A and B of each of three backbones' two qkv layers, of rank 16.
    assert len(factors) == 3 * 2 * 2 and all(".attn.qkv.lora_" in name for name in factors)
    assert {tuple(p.shape) for p in factors.values()} == {(16, 24), (72, 16)}
    layer = module.metric.encoder.branches[0].backbone.blocks[0].attn.qkv
    assert layer.scaling["default"] == 8 / 16 and layer.lora_dropout["default"].p == 0.3
    assert module.metric.preprocess.resize == "pil" and module.loss.margin == 0.05
    (optimizer,) = {type(module.optimizer_factory(factors.values()))}
    assert optimizer is torch.optim.Adam and module.optimizer_factory(factors.values()).defaults["lr"] == 3e-4


@pytest.mark.parametrize("targets", [("attn",), ("c_fc", "c_proj")])
def test_towers_of_open_clip_take_lora_elsewhere(targets: tuple[str, ...], tmp_path: Path) -> None:
    _need_peft()
    options = {"embed_dim": 6, "vision_cfg": {"layers": 2, "width": 64}}
    teacher = Ensemble([BranchConfig("open_clip/ViT-B-16", "random", options=options)], 32)
    names = teacher.state_dict().keys()
    module = TeacherTuning(teacher, tune="lora", lora=Lora(4, targets=targets), optimizer=_adam)
    _trainer(tmp_path).fit(module, Brightness())
    loaded = load(save(module.metric, tmp_path / "teacher.safetensors"))
    assert loaded.encoder.state_dict().keys() == names
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(loaded.embed(x), module.metric.eval().embed(x), rtol=0, atol=1e-5)


def test_layers_that_attention_never_runs_take_no_factors() -> None:
    """Torch's attention reads the weights of its ``out_proj``, and factors beside them would have no gradient."""
    _need_peft()
    options = {"embed_dim": 6, "vision_cfg": {"layers": 2, "width": 64}}
    for targets, message in (
        (("out_proj", "c_fc"), r"out_proj is within torch's attention.*take attn as a target"),
        (("nothing",), r"expected targets out of (?!.*out_proj).*attn.*c_fc"),
    ):
        teacher = Ensemble([BranchConfig("open_clip/ViT-B-16", "random", options=options)], 32)
        with pytest.raises(ValueError, match=message):
            TeacherTuning(teacher, tune="lora", lora=Lora(4, targets=targets))


@pytest.mark.parametrize("votes", [(0.0, 0.5, 1.0, 0.5), (0.5, 0.5, 0.5, 0.5)])
def test_a_tie_prefers_no_candidate(votes: tuple[float, ...]) -> None:
    """Sides exchanged, the contrastive term is the same; of ties alone there is none."""
    stage = TeacherTuning(SmallViT(16, patch_size=8, width=12, depth=1, heads=2), contrast=1.0, augment=False)
    stage._trainer = SimpleNamespace(
        world_size=1,
        global_step=0,
        global_rank=0,
        estimated_stepping_batches=10,
        train_dataloader=None,
        fit_loop=SimpleNamespace(total_batch_idx=0),
    )  # type: ignore[assignment]
    stage.log = lambda *_, **__: None  # type: ignore[assignment]
    z, z0, z1 = torch.rand(3, 4, 3, 16, 16)
    vote = torch.tensor(votes)
    one, other = (
        stage.training_step(Triplet(z, left, right, v, torch.arange(4)), 0)
        for left, right, v in ((z0, z1, vote), (z1, z0, 1 - vote))
    )
    torch.testing.assert_close(one, other)
    assert (one == 0) == (0.0 not in votes)


def test_what_cannot_be_tuned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="this DreamSim has no head to tune; give it one"):
        TeacherTuning(_teacher(), tune="head")
    with pytest.raises(ValueError, match="expected to tune all, lora or head, got 'lorra'"):
        TeacherTuning(_teacher(), tune="lorra")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch statistics would move twice in a step"):
        TeacherTuning(_teacher(), batch_statistics=True, acceleration=Acceleration(checkpoint=True))
    for options in ({"contrast": -1.0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=f"expected a finite {next(iter(options))}"):
            TeacherTuning(_teacher(), **options)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"needs peft; install it with pip install 'lipsim\[tune\]'"):
        TeacherTuning(_teacher(), tune="lora")


def test_targets_that_are_not_there_are_refused() -> None:
    _need_peft()
    with pytest.raises(ValueError, match="no layer of this Sequential is called qkv; expected targets out of 0, first"):
        layers = nn.Sequential()
        layers.image_size = 2  # type: ignore[assignment]
        layers.append(nn.Linear(2, 2)).add_module("first", nn.Conv2d(2, 2, 1))
        TeacherTuning(layers, tune="lora")
    for layer, message in (
        (
            nn.Conv2d(2, 2, 3, groups=2),
            "first is a convolution of 2 groups and dilation 1, which no product of factors",
        ),
        (nn.Conv2d(2, 2, 3, dilation=2), "first is a convolution of 1 groups and dilation 2"),
        (nn.Sequential(nn.Linear(2, 2)), "first is a Sequential, which no product of factors fits; leave it out"),
    ):
        layers = nn.Sequential()
        layers.image_size = 2  # type: ignore[assignment]
        layers.add_module("first", layer)
        with pytest.raises(ValueError, match=message):
            TeacherTuning(layers, tune="lora", lora=Lora(targets=("first",)))


def _network(head: int = 0) -> Ensemble:
    """A network with batch normalisation and statistics of its own, enlarging its images; and a transformer."""
    options = {"layers": (1, 1, 1, 1), "channels": (8, 12, 16, 20), "zero_init_last": False}
    branches = [
        BranchConfig("timm/resnet18", "random", "last_layer", options, layers=(2,), input_size=48),
        BranchConfig("timm/vit_tiny_patch16_224", "random", options={"depth": 1, "embed_dim": 12}),
    ]
    teacher = Ensemble(branches, 32, head=head)
    with torch.no_grad():
        for name, buffer in teacher.named_buffers():
            if "running" in name:
                buffer.copy_(0.1 * torch.rand_like(buffer) + (0.05 if name.endswith("var") else -0.05))
    return teacher


@pytest.mark.parametrize(
    ("tune", "adversary"),
    [("all", None), ("head", None), ("lora", None), ("all", Adversary(2, 0.1, 1)), ("lora", Adversary("inf", 0.01, 1))],
)
def test_convolutional_networks_keep_their_statistics(tune: Any, adversary: Any, tmp_path: Path) -> None:
    if tune == "lora":
        _need_peft()
    teacher, data = _network(head=4 if tune == "head" else 0), Brightness(16)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    lora = Lora(rank=2, dropout=0.1, targets=("conv1", "qkv"))  # convolutions with kernels and strides
    module = TeacherTuning(teacher, tune=tune, lora=lora, optimizer=_adam, adversary=adversary)
    _trainer(tmp_path, max_epochs=2).fit(module, data)
    metric = module.metric.eval().requires_grad_(False)
    loaded = load(save(metric, tmp_path / "teacher.safetensors"))
    after = loaded.encoder.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert after.keys() == before.keys() and changed
    assert not any("running" in name or "num_batches" in name for name in changed)
    weights = {name for name, _ in _network(head=4 if tune == "head" else 0).named_parameters()}
    if tune == "all":
        assert changed == weights  # scale and shift of the normalisation among them
    elif tune == "head":
        assert changed == {name for name in weights if name.startswith("head.")}
    else:
        kinds = ("conv1.weight", "attn.qkv.weight")
        assert changed == {name for name in weights if name.endswith(kinds)}
    again = load(save(loaded, tmp_path / "again.safetensors"))
    assert torch.equal(again.embed(data.batch.left), loaded.embed(data.batch.left))
    if tune == "lora":  # factors beside the weights, and merged
        torch.testing.assert_close(loaded.embed(data.batch.left), metric.embed(data.batch.left), rtol=0, atol=1e-5)
    else:
        assert torch.equal(loaded.embed(data.batch.left), metric.embed(data.batch.left))


def test_statistics_of_the_batches_are_taken_where_asked(tmp_path: Path) -> None:
    teacher = _network()
    before = {name: buffer.clone() for name, buffer in teacher.named_buffers() if "running" in name}
    module = TeacherTuning(teacher, optimizer=_adam, batch_statistics=True)
    _trainer(tmp_path, max_epochs=1).fit(module, Brightness(16))
    assert not any(torch.equal(dict(teacher.named_buffers())[name], tensor) for name, tensor in before.items())
    with pytest.raises(ValueError, match="batch statistics change with all weights only, not where head is tuned"):
        TeacherTuning(_network(head=4), tune="head", batch_statistics=True)


def test_an_ensemble_is_named_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = Path(__file__).parents[2] / "configs" / "quickstart" / "teacher.yaml"
    branches = [
        {"model": "dino_vitb16", "weights": "random", "feature": "cls", "options": {"depth": 1, "embed_dim": 24}},
        {"model": "timm/vit_tiny_patch16_224", "weights": "random", "options": {"depth": 1}},
    ]
    options = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    data = ["--data.num_train=8", "--data.num_val=4", "--data.num_test=4", "--data.batch_size=4"]
    teacher = ["--model.teacher=lipsim.teachers.Ensemble", f"--model.teacher.branches={json.dumps(branches)}"]
    cli = train(["--config", str(config), *options, *data, *teacher])
    assert cli.model.metric.encoder.out_features == 24 + 192
    missing = json.dumps([{"model": "dino_vitb16", "weights": "nowhere.pth"}])
    with pytest.raises((ValueError, FileNotFoundError), match=r"no weights of dino_vitb16 at .*nowhere.pth"):
        train(["--config", str(config), *options, *data, teacher[0], f"--model.teacher.branches={missing}"])


@torch.no_grad()
def test_a_published_model_is_scored_without_training(nights: Path, tmp_path: Path) -> None:
    folder = write_variant(tmp_path / "weights", "ensemble")
    config = Path(__file__).parents[2] / "configs" / "nights" / "dreamsim.yaml"
    teacher = [f"--model.teacher.weights={folder}", f"--model.teacher.options={json.dumps(SMALL)}"]
    data = [f"--data.root={nights}", "--data.batch_size=4", "--data.num_workers=0"]
    trainer = [
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    published = ["--model.teacher.adapter=true", "--model.tune=all"]
    cli = train(["test", "--config", str(config), *teacher, *data, *trainer, *published])
    encoder = DreamSim("ensemble", folder, options=SMALL).eval()
    right = []
    for index in range(len(triplets := NightsTriplets(nights, "test", Preprocess(224, "pil")))):
        one = triplets[index]
        z, z0, z1 = encoder(torch.stack([one.reference, one.left, one.right])).double()
        right.append(((z @ z1 > z @ z0) == bool(one.right_vote > 0.5)).double())
    score = cli.trainer.callback_metrics["test/nights/majority_score"]
    torch.testing.assert_close(score.double(), torch.stack(right).mean(), rtol=1e-6, atol=0)
