"""The protocol of level sets on networks trained plainly and adversarially: the tables of docs/level_sets.md.

    python benchmarks/level_sets.py --shared ../shared/data --output runs/level_sets

Small residual networks are trained on 6,000 images of CIFAR-10 (kept in the output folder, as the results of every
batch are: killed, the same command goes on).
"""

from __future__ import annotations

import argparse
import io
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

import lipsim
from lipsim.analysis.classifiers import Recipe, accuracy, robust_accuracy, train_classifier
from lipsim.analysis.level_set_certificates import answer_radius_of, certified_rows, certify_level_sets
from lipsim.analysis.level_set_tables import all_pairs, plot_all_pairs, write_tables
from lipsim.analysis.level_sets import LevelSetProtocol, LevelSets, measure_level_sets
from lipsim.analysis.models import Normalized, load_model
from lipsim.attacks import Adversary, ConfidenceObjective, DistanceObjective, TwoAFCObjective
from lipsim.data import BuiltinTriplets
from lipsim.data.builtin.photographs import load_photograph
from lipsim.data.transforms import Preprocess
from lipsim.data.triplet import collate_triplets
from lipsim.results.formats import write_table
from lipsim.utils.files import write_json, write_safetensors
from lipsim.utils.progress import Progress

ADVERSARIES: dict[str, Adversary | None] = {
    "normal": None,
    "adversarial ℓ2 0.5": Adversary(2, 0.5, steps=3),
    "adversarial ℓ∞ 8/255": Adversary("inf", 8 / 255, steps=3),
}
NUM_TRAIN, NUM_TEST = 6_000, 1_000
EPOCHS = 12
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PHOTOGRAPHS = ("astronaut", "coffee", "rocket", "chelsea", "flower")
SAME = 0.1
LARGE = LevelSetProtocol(targets=2, directions=64)
NEWTON = LevelSetProtocol(targets=2, newton=True, width_steps=())
METRIC = LevelSetProtocol(targets=3, directions=64)


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


def small_resnet() -> nn.Module:
    """Ten classes of images of 32 pixels, 0.3 million weights."""
    stem = nn.Sequential(nn.Conv2d(3, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    blocks = [Block(32, 32, 1), Block(32, 64, 2), Block(64, 128, 2)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    return Normalized(nn.Sequential(stem, *blocks, head), (0.49, 0.48, 0.45), (0.25, 0.24, 0.26))


def trained(name: str, images: Tensor, labels: Tensor, folder: Path, say: Callable[[str], None]) -> nn.Module:
    """A network out of the folder, or trained into it; what it cost and reaches is beside it as JSON."""
    torch.manual_seed(0)
    network = small_resnet()
    file = folder / f"{list(ADVERSARIES).index(name)}.safetensors"
    if file.is_file():
        network.load_state_dict(load_file(file), strict=True)
        return network.eval().requires_grad_(False)
    start = time.process_time()
    recipe = Recipe(epochs=EPOCHS, lr=0.1, adversary=ADVERSARIES[name])
    train_classifier(network, images[:NUM_TRAIN], labels[:NUM_TRAIN], recipe, say=lambda text: say(f"{name}: {text}"))
    seconds = time.process_time() - start
    test, right = images[NUM_TRAIN:], labels[NUM_TRAIN:]
    scores = {
        "network": name,
        "training": f"{seconds:.0f} s",
        "clean": accuracy(network, test, right),
        "ℓ2 0.5": robust_accuracy(network, test[:500], right[:500], eps=0.5, steps=20),
        "ℓ∞ 8/255": robust_accuracy(network, test[:500], right[:500], norm="inf", eps=8 / 255, steps=20),
    }
    write_safetensors(file, network.state_dict())
    write_json(file.with_suffix(".json"), scores)
    return network


def cifar(archive: Path, count: int) -> tuple[Tensor, Tensor]:
    """``count`` random images ``(N, 3, 32, 32)`` uint8 of the archive and their classes."""
    with tarfile.open(archive) as files:
        members = sorted((m for m in files.getmembers() if m.isfile()), key=lambda member: member.name)
        order = torch.randperm(len(members), generator=torch.Generator().manual_seed(0))[:count].tolist()
        chosen = {members[i].name: k for k, i in enumerate(order)}
        images, names = torch.empty(count, 3, 32, 32, dtype=torch.uint8), [""] * count
        for member in files.getmembers():
            if (k := chosen.get(member.name)) is not None and (file := files.extractfile(member)) is not None:
                images[k] = pil_to_tensor(Image.open(io.BytesIO(file.read())))
                names[k] = Path(member.name).parent.name
    classes = sorted(set(names))
    return images, torch.tensor([classes.index(name) for name in names])


def protocol_of_small_networks(
    networks: dict[str, nn.Module],
    images: Tensor,
    labels: Tensor,
    protocol: LevelSetProtocol,
    count: int,
    folder: Path,
    say: Progress,
) -> dict[str, LevelSets]:
    """Level sets of confidence on the same images, the first that all networks name right; targets of other classes."""
    x = images[NUM_TRAIN:].float() / 255
    y = labels[NUM_TRAIN:]
    with torch.no_grad():
        right = torch.stack([network(x).argmax(1) == y for network in networks.values()]).all(0)
    chosen = right.nonzero().flatten()[:count]
    x, y = x[chosen], y[chosen]
    found = {}
    for number, (name, network) in enumerate(networks.items()):
        start = time.process_time()
        found[name] = measure_level_sets(
            lambda rows, network=network: ConfidenceObjective(network, y[rows], x[rows]),  # type: ignore[misc]
            x,
            protocol,
            labels=y,
            folder=folder / str(number),
            say=lambda text, name=name: say(f"{name}: {text}"),  # type: ignore[misc]
        )
        with torch.no_grad():
            sure = float(network(x).softmax(1).gather(1, y.unsqueeze(1)).mean())
        print(f"{name}: confidence {sure:.3f} in {count} images, {time.process_time() - start:.0f} s", flush=True)
    five = torch.cat([(y == k).nonzero().flatten()[:1] for k in y.unique()[:5]])
    for number, (name, network) in enumerate(networks.items()):
        grid = all_pairs(
            lambda rows, n=network: ConfidenceObjective(n, y[five[rows]], x[five[rows]]),  # type: ignore[misc]
            x[five],
            protocol,
        )
        plot_all_pairs(folder / f"grid-{number}.png", *grid, [CLASSES[int(y[i])] for i in five], name)
    return found


def list_photographs(folder: Path) -> list[Path]:
    """JPEG files below a folder."""
    return sorted(folder.rglob("*.jpg")) + sorted(folder.rglob("*.JPEG"))


def protocol_of_a_large_network(photographs: Path, count: int, folder: Path, say: Progress) -> dict[str, LevelSets]:
    """EfficientNet-Lite0 with its weights on photographs, in the class that it answers itself."""
    model = load_model("efficientnet-lite0")
    files = list_photographs(photographs)
    files = files[:: len(files) // count][:count]
    preprocess = Preprocess(model.image_size)
    x = torch.stack([preprocess(Image.open(file)) for file in files])
    with torch.no_grad():
        y = model.module(x).argmax(1)
    start = time.process_time()
    found = measure_level_sets(
        lambda rows: ConfidenceObjective(model.module, y[rows], x[rows]),
        x,
        LARGE,
        labels=y,
        batch_size=8,
        folder=folder,
        say=say,
    )
    print(f"efficientnet-lite0: {len(x)} photographs, {time.process_time() - start:.0f} s", flush=True)
    return {"EfficientNet-Lite0": found}


def protocol_of_a_metric(count: int, folder: Path, say: Progress) -> None:
    """Level sets of the bundled metric's answers to triplets, from their references; and what is proved of them."""
    metric = lipsim.load("quickstart")
    batch = collate_triplets([BuiltinTriplets("test", count, seed=1)[i] for i in range(count)])
    answer = TwoAFCObjective(metric, batch.reference, batch.left, batch.right)
    start = time.process_time()
    found = measure_level_sets(
        answer.select, batch.reference, METRIC, folder=folder / "results", keep_outcomes=True, say=say
    )
    measured = time.process_time() - start
    radius = answer_radius_of(metric, batch.reference, batch.left, batch.right)
    certified = certify_level_sets(radius, batch.reference, found, say=say)
    print(f"quickstart: {count} triplets, {measured:.0f} s, proofs {time.process_time() - start - measured:.0f} s")
    write_tables(folder, {"quickstart": found}, METRIC)
    write_table(folder, "certified", "What is proved", certified_rows({"quickstart": certified}))


def grid_of_photographs(folder: Path, say: Progress) -> None:
    """All pairs of five packaged photographs: what the bundled metric calls the same, as near as it gets to another."""
    metric = lipsim.load("quickstart")
    pictures = [Image.fromarray((255 * load_photograph(name)).round().astype("uint8")) for name in PHOTOGRAPHS]
    x = torch.stack([metric.preprocess(picture) for picture in pictures])
    outcomes, loss = all_pairs(lambda rows: DistanceObjective(metric, x[rows], SAME), x, say=say)
    title = f"At most {SAME:g} from each photograph to the bundled metric"
    plot_all_pairs(folder / "level-set-grid.png", outcomes, loss, PHOTOGRAPHS, title)
    moved = (outcomes - x.unsqueeze(1)).flatten(2).norm(dim=2)  # from the targets, one a row
    away = (x.unsqueeze(1) - x).flatten(2).norm(dim=2)
    left = (moved / away.clamp(min=1e-9))[~torch.eye(len(x), dtype=torch.bool)]
    print(f"photographs: of the way to the target {float(left.mean()):.2f} is left, {float(left.min()):.2f} at least")


def main() -> None:
    """Train what is not there, run the protocol, write and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with cifar10-train.tar.gz, imagenet-sample/")
    parser.add_argument("--output", type=Path, required=True, help="folder for networks, results and tables")
    parser.add_argument("--images", type=int, default=24, help="of CIFAR-10; 0: without (%(default)s)")
    parser.add_argument("--photographs", type=int, default=3, help="for EfficientNet-Lite0; 0: without (%(default)s)")
    parser.add_argument("--triplets", type=int, default=8, help="for the bundled metric; 0: without (%(default)s)")
    options = parser.parse_args()
    output: Path = options.output
    photographs = options.shared / "imagenet-sample" / "val"
    if (found := len(list_photographs(photographs))) < options.photographs:
        parser.error(f"expected {options.photographs} JPEG files in {photographs}, found {found}")
    with Progress("level sets") as say:
        if options.images:
            images, labels = cifar(options.shared / "cifar10-train.tar.gz", NUM_TRAIN + NUM_TEST)
            networks = {name: trained(name, images, labels, output / "networks", say) for name in ADVERSARIES}
            for name, protocol in {"small": LevelSetProtocol(), "newton": NEWTON}.items():
                folder = output / name
                found = protocol_of_small_networks(networks, images, labels, protocol, options.images, folder, say)
                write_tables(folder, found, protocol)
        if options.triplets:
            protocol_of_a_metric(options.triplets, output / "metric", say)
            grid_of_photographs(output, say)
        if options.photographs:
            large = protocol_of_a_large_network(photographs, options.photographs, output / "large", say)
            write_tables(output / "large", large, LARGE)
    for file in sorted(output.glob("*/*.md")):
        print(f"\n{file.parent.name}\n{file.read_text(encoding='utf-8')}")


if __name__ == "__main__":
    main()
