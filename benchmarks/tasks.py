"""Students at equal training time on four tasks: what the default student was chosen by.

    python scripts/train.py                     # writes the teacher, runs/quickstart/teacher/teacher.safetensors
    python benchmarks/tasks.py --shared ../shared/data [--students linear default] [--tasks cifar] [--seconds 100]

Each student trains for the same seconds of processor time of one thread with the same loss, optimizer and data.
Majority scores in %: natural, and certified at 36/255, 72/255, 108/255 and 1.

- material: human votes on 100 images (Lagunas et al. 2019); held-out triplets, and held-out materials.
- builtin: triplets of the quickstart (shifts, rearranged leaves, changed factors); distilled, then fine-tuned, half
  each.
- cifar: reference, another image of its class, one of another class; the first must be nearer. Held-out images.
- teacher: distances of held-out photographs; correlation with the quickstart's teacher after distillation, and
  triplets ordered like the teacher orders them.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

import lipsim
from lipsim import certificates
from lipsim.data import BuiltinTriplets, Triplet
from lipsim.data.augment import augmented
from lipsim.data.sets.material import load_material_answers, load_material_images, split_material
from lipsim.data.transforms import Preprocess
from lipsim.layers import freeze, unfreeze
from lipsim.students import OrthogonalProjection, OrthogonalShiftNetwork, SLLNetwork, TorchlipNetwork
from lipsim.training import RadiusHinge, ScaleFree
from lipsim.training.losses import pairwise_distances
from lipsim.utils.precision import full_precision

EPS = (0.0, 36 / 255, 72 / 255, 108 / 255, 1.0)
Make = Callable[[int, int], nn.Module]
Loss = Callable[[nn.Module, torch.Generator], Tensor]


def published(image_size: int, out_features: int) -> nn.Module:
    """The published small network; small images leave it fewer features."""
    return SLLNetwork.from_preset("small", image_size, min(out_features, 45 * (image_size // 16) ** 2))


STUDENTS: dict[str, Make] = {
    "linear": OrthogonalProjection,
    "published": published,
    "torchlip": TorchlipNetwork,
    "default": OrthogonalShiftNetwork,
}


def fit(encoder: nn.Module, loss: Loss, seconds: float, learning_rate: float) -> int:
    """Train with Adam, warm-up and linear decay, until the processor time is spent; returns the number of steps."""
    optimizer = torch.optim.Adam(encoder.parameters(), betas=(0.5, 0.9))
    generator = torch.Generator().manual_seed(0)
    unfreeze(encoder.train())
    start, steps = time.process_time(), 0
    while (done := (time.process_time() - start) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, done / 0.1) * (1 - done)
        value = loss(encoder, generator)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        steps += 1
    return steps


def embed(encoder: nn.Module, images: Tensor) -> Tensor:
    """Features of uint8 or float images, frozen, in batches."""
    freeze(encoder)
    with torch.no_grad(), full_precision():
        return torch.cat([encoder(_float(batch)) for batch in images.split(256)])


def scores(features: Tensor, right_vote: Tensor) -> list[float]:
    """Natural and certified majority scores from features of ``(N, 3, D)``, reference first."""
    z, z0, z1 = features.double().unbind(1)
    # Every student here is audited at 1 + 1e-5 at most, which no digit of these tables shows.
    radius = certificates.signed_reference_radius(z, z0, z1) * torch.sign(0.5 - right_vote)
    return [round(100 * float((radius > eps).double().mean()), 1) for eps in EPS]


def material(make: Make, seconds: float, options: argparse.Namespace) -> dict[str, list[float]]:
    """Human votes on materials at 64 pixels."""
    root = options.shared / "material-appearance-similarity"
    images, _ = load_material_images(root, Preprocess(64))
    split = split_material(load_material_answers(root), seed=0)
    encoder = _made(make, 64, 256, options)

    def loss(encoder: nn.Module, generator: torch.Generator) -> Tensor:
        answers = split.train.select(torch.randint(len(split.train.ids), (2048,), generator=generator))
        z, z0, z1 = encoder(images)[answers.ids].unbind(1)
        return RadiusHinge(2.0)(z, z0, z1, answers.right_vote, 1.0)

    fit(encoder, loss, seconds, 1e-3)
    z = embed(encoder, images)
    return {
        "known images": scores(z[split.triplets.ids], split.triplets.right_vote),
        "held-out materials": scores(z[split.materials.ids], split.materials.right_vote),
    }


def builtin(make: Make, seconds: float, options: argparse.Namespace) -> dict[str, list[float]]:
    """The quickstart's triplets at 64 pixels: distilled, then fine-tuned."""
    train = BuiltinTriplets("train", 6000, seed=1, num_workers=options.workers)
    test = BuiltinTriplets("test", 1500, seed=1, num_workers=options.workers)
    teacher = lipsim.load(options.teacher)
    encoder = _made(make, 64, 128, options)

    def batch(generator: torch.Generator) -> Triplet:
        rows = torch.randint(len(train), (64,), generator=generator)
        reference, left, right = _float(train.images[rows]).unbind(1)
        keys = torch.randint(2**62, (65,), generator=generator)
        return augmented(Triplet(reference, left, right, train.right_vote[rows], rows), keys[:64], keys[64])

    def distil(encoder: nn.Module, generator: torch.Generator) -> Tensor:
        return _distillation(encoder, teacher, torch.cat(batch(generator).images()))

    def tune(encoder: nn.Module, generator: torch.Generator) -> Tensor:
        triplets = batch(generator)
        return RadiusHinge(2.0)(*triplets.embed(encoder), triplets.right_vote, 1.0)

    fit(encoder, distil, seconds / 2, 2e-3)
    fit(encoder, tune, seconds / 2, 1e-3)
    return {"test": scores(embed(encoder, test.images.flatten(0, 1)).unflatten(0, (-1, 3)), test.right_vote)}


def cifar(make: Make, seconds: float, options: argparse.Namespace) -> dict[str, list[float]]:
    """Semantic triplets of CIFAR-10 at 32 pixels; 5,000 of the training images are held out."""
    images, labels = read_cifar(options.shared / "cifar10-train.tar.gz")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    known, held_out = order[:-5000], order[-5000:]
    encoder = _made(make, 32, 256, options)

    def loss(encoder: nn.Module, generator: torch.Generator) -> Tensor:
        rows = known[torch.randint(len(known), (256,), generator=generator)]
        x, classes = _float(images[rows]), labels[rows]
        flipped = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
        z = encoder(torch.where(flipped, x.flip(3), x))
        anchor, same, other = _semantic(classes, generator)
        return RadiusHinge(1.0)(z[anchor], z[same], z[other], torch.zeros(len(anchor)), 1.0)

    fit(encoder, loss, seconds, 1e-3)
    anchor, same, other = _semantic(labels[held_out], torch.Generator().manual_seed(5))
    z = embed(encoder, images[held_out])
    return {"held-out images": scores(torch.stack([z[anchor], z[same], z[other]], 1), torch.zeros(len(anchor)))}


def teacher(make: Make, seconds: float, options: argparse.Namespace) -> dict[str, list[float]]:
    """Distillation of the quickstart's teacher on 560 photographs at 64 pixels, agreement on 140 others."""
    train, val = (_read_folder(options.shared / "imagenet-sample" / part) for part in ("train", "val"))
    guide = lipsim.load(options.teacher)
    encoder = _made(make, 64, 128, options)

    def loss(encoder: nn.Module, generator: torch.Generator) -> Tensor:
        x = train[torch.randint(len(train), (64,), generator=generator)]
        x = x.flip(3) if torch.rand(1, generator=generator) < 0.5 else x
        shift = torch.randint(-6, 7, (2,), generator=generator).tolist()
        return _distillation(encoder, guide, torch.roll(x, shift, (2, 3)))

    fit(encoder, loss, seconds, 2e-3)
    z, target = embed(encoder, val).double(), embed(guide.encoder, val).double()
    pairs = torch.stack([pairwise_distances(z, 1.0), pairwise_distances(target, 0.0)])
    triplets = torch.randint(len(val), (20000, 3), generator=torch.Generator().manual_seed(3))
    triplets = triplets[(triplets[:, :1] != triplets[:, 1:]).all(1) & (triplets[:, 1] != triplets[:, 2])]
    unit = F.normalize(target[triplets], dim=-1)
    margin = (unit[:, 0] * (unit[:, 1] - unit[:, 2])).sum(-1)
    return {
        "correlation of distances": [round(float(torch.corrcoef(pairs)[0, 1]), 3)],
        "order of triplets": scores(z[triplets], (margin < 0).double()),
    }


TASKS = {task.__name__: task for task in (material, builtin, cifar, teacher)}


def main() -> None:
    """Print one markdown row for each task, set and student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"), help="folder of the real data")
    parser.add_argument("--teacher", type=Path, default=Path("runs/quickstart/teacher/teacher.safetensors"))
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seconds", type=float, default=100.0, help="processor time of each training")
    parser.add_argument("--workers", type=int, default=0, help="processes that render triplets")
    parser.add_argument("--seed", type=int, default=0, help="of the student's initialisation")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| task | set | student | natural | 36/255 | 72/255 | 108/255 | 1 |\n| --- | --- | --- |" + " ---: |" * 5)
    for task in options.tasks:
        for student in options.students:
            for name, row in TASKS[task](STUDENTS[student], options.seconds, options).items():
                print(f"| {task} | {name} | {student} | {' | '.join(map(str, row))} |", flush=True)


def _made(make: Make, image_size: int, out_features: int, options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(options.seed)
    return make(image_size, out_features)


def _distillation(encoder: nn.Module, guide: lipsim.PerceptualMetric, images: Tensor) -> Tensor:
    with torch.no_grad():
        target = guide.embed(images)
    features = encoder(images)
    return ScaleFree(1.0 if features.shape == target.shape else 0.0, 1.0)(features, target, 1.0)


def _semantic(classes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of references, of others of their class, and of other classes, one triplet a row where there is one."""
    same = (classes[:, None] == classes).fill_diagonal_(False)
    chance = torch.rand(2, len(classes), len(classes), generator=generator)
    rows = torch.arange(len(classes))[same.any(1)]
    return rows, (chance[0] * same).argmax(1)[rows], (chance[1] * (classes[:, None] != classes)).argmax(1)[rows]


def read_cifar(archive: Path) -> tuple[Tensor, Tensor]:
    """Images ``(N, 3, 32, 32)`` uint8 and numbers of their classes, from an archive of ``CLASS/IMAGE``."""
    images, names = [], []
    with tarfile.open(archive) as files:
        for member in files:
            if member.isfile() and (file := files.extractfile(member)) is not None:
                images.append(pil_to_tensor(Image.open(io.BytesIO(file.read()))))
                names.append(Path(member.name).parent.name)
    classes = {name: number for number, name in enumerate(sorted(set(names)))}
    return torch.stack(images), torch.tensor([classes[name] for name in names])


def _read_folder(folder: Path) -> Tensor:
    files: Sequence[tuple[str, int]] = ImageFolder(folder).samples
    return torch.stack([Preprocess(64)(Image.open(file)) for file, _ in files])


def _float(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images


if __name__ == "__main__":
    main()
