"""The model behind scaling.py: what a step waits for, and what a run costs; docs/scaling.md has the formulas."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Figures:
    """Of one GPU, one core and one image.

    Attributes:
        image_size: side of the images that the student sees.
        features: of the teacher, which the cache has.
        student_features: of the student, which may follow fewer (principal axes).
        parameters: of the student.
        teacher_parameters: of the teacher.
        step_seconds: of a training step, whatever its batch: the orthonormal maps, the optimizer.
        image_seconds: what each image of the batch adds, forward and backward, both views.
        teacher_seconds: an image takes in the teacher.
        step_bytes: a step keeps until its backward pass, whatever its batch.
        activation_bytes: what it keeps besides for each image, both views.
        reading_core_seconds: of one core, to read an image from its file.
        pack_core_seconds: the same from a pack.
        image_bytes: of a file.
        pack_bytes: of an image in a pack.
    """

    image_size: int
    features: int
    student_features: int
    parameters: int
    teacher_parameters: int
    step_seconds: float
    image_seconds: float
    teacher_seconds: float
    step_bytes: float
    activation_bytes: float
    reading_core_seconds: float
    pack_core_seconds: float
    image_bytes: float
    pack_bytes: float


@dataclass(frozen=True)
class Cluster:
    """What the nodes are like; rates in bytes a second.

    Attributes:
        gpus_per_node: GPUs of a node.
        cores_per_node: cores of a node that read images.
        disk: what a node reads.
        node_link: between the GPUs of a node, for each of them.
        network: between nodes, for each GPU.
    """

    gpus_per_node: int = 8
    cores_per_node: int = 128
    disk: float = 2e9
    node_link: float = 300e9
    network: float = 25e9


@dataclass(frozen=True)
class Run:
    """A training.

    Attributes:
        gpus: on how many.
        cached: whether the teacher's embeddings come from a cache.
        packed: whether images come from a pack.
        batch: images of one GPU in a step.
        images: of an epoch.
        epochs: number of them.
        views: embeddings of an image in the cache.
        dtype_bytes: of a number in it.
    """

    gpus: int
    cached: bool
    packed: bool
    batch: int = 32
    images: int = 1_281_167
    epochs: int = 40
    views: int = 2
    dtype_bytes: int = 2


@dataclass(frozen=True)
class Cost:
    """What the model says of a run; seconds and bytes.

    Attributes:
        step: seconds of a step.
        bound: what it waits for: "student", "teacher", "network", "reading" or "disk".
        parts: seconds of each of these in a step, were it alone.
        images_per_second: of all GPUs.
        epoch: seconds of an epoch.
        caching: seconds in which the same GPUs make the cache; 0 without one.
        run: seconds of all epochs, and of the cache.
        memory: bytes of one GPU: weights, gradients, Adam, activations, batch.
        read_epoch: bytes that are read in an epoch.
        read_node: bytes a second that a node reads.
        cache: bytes of the cache.
        sent: bytes that a GPU sends in a step: gradients, and features, since losses are those of the global batch.
    """

    step: float
    bound: str
    parts: dict[str, float]
    images_per_second: float
    epoch: float
    caching: float
    run: float
    memory: float
    read_epoch: float
    read_node: float
    cache: float
    sent: float


def cost(figures: Figures, cluster: Cluster, run: Run) -> Cost:
    """The model."""
    on_node, batch = min(run.gpus, cluster.gpus_per_node), run.batch
    read = figures.pack_core_seconds if run.packed else figures.reading_core_seconds
    size = figures.pack_bytes if run.packed else figures.image_bytes
    embedding = figures.features * run.dtype_bytes if run.cached else 0
    # A ring: each gradient goes around twice, but for one's own part; features of both views and targets once.
    gradients = 4 * figures.parameters
    sent = 2 * (run.gpus - 1) / run.gpus * gradients + (run.gpus - 1) * batch * 3 * 4 * figures.student_features
    parts = {
        "student": figures.step_seconds + batch * figures.image_seconds,
        "teacher": 0.0 if run.cached else batch * figures.teacher_seconds,
        "network": sent / (cluster.node_link if run.gpus <= cluster.gpus_per_node else cluster.network),
        "reading": batch * on_node * read / cluster.cores_per_node,
        "disk": batch * on_node * (size + embedding) / cluster.disk,
    }
    computed = {name: parts[name] for name in ("student", "teacher", "network")}
    step = max(sum(computed.values()), parts["reading"], parts["disk"])
    waits = computed if step == sum(computed.values()) else {name: parts[name] for name in ("reading", "disk")}
    epoch = run.images / (run.gpus * batch) * step
    caching = 0.0
    if run.cached:
        # An image is read once for all of its views.
        nodes = max(1, run.gpus / cluster.gpus_per_node)
        caching = run.images * max(
            run.views * figures.teacher_seconds / run.gpus,
            read / cluster.cores_per_node / nodes,
            size / cluster.disk / nodes,
        )
    weights = 16 * figures.parameters + (gradients if run.gpus > 1 else 0)  # DDP has a copy of the gradients to send
    activations = figures.step_bytes + batch * figures.activation_bytes
    teacher = 0 if run.cached else 4 * figures.teacher_parameters
    return Cost(
        step=step,
        bound=max(waits, key=lambda name: waits[name]),
        parts=parts,
        images_per_second=run.gpus * batch / step,
        epoch=epoch,
        caching=caching,
        run=run.epochs * epoch + caching,
        memory=weights + teacher + activations + batch * 3 * 4 * figures.image_size**2,
        read_epoch=run.images * (size + embedding),
        read_node=batch * on_node * (size + embedding) / step,
        cache=run.images * run.views * embedding,
        sent=sent,
    )


# --- figures


def load_figures(file: Path, case: str | None = None) -> tuple[str, Figures, dict[str, tuple[str, str]]]:
    """Title, figures, and of each how it came about and the source.

    A figure may also be its value alone, of which is said that it was given.

    Raises:
        OSError: there is no such file.
        ValueError: no such case, or figures that are missing, unknown or no numbers of at least 0.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    if not (isinstance(content, dict) and content):
        raise ValueError(f'expected {file} to be {{"title": …, "figures": {{…}}}}; --measure FILE writes one')
    if "figures" in content and case is not None:
        raise ValueError(f"expected no case, as {file} has one set of figures, got {case}")
    if "figures" not in content:
        names = list(content)
        if (case or names[0]) not in content:
            raise ValueError(f"expected a case out of {', '.join(names)} of {file}, got {case}")
        content = content[case or names[0]]
    if not isinstance(content, dict):
        raise ValueError(f'expected {file} to be {{"title": …, "figures": {{…}}}}; --measure FILE writes one')
    found, known = content.get("figures"), [field.name for field in fields(Figures)]
    if not isinstance(found, dict):
        raise ValueError(f"expected figures by name in {file}, got {found!r}; --measure FILE writes all figures")
    if missing := [name for name in known if name not in found]:
        raise ValueError(f"{file} has no {', '.join(missing)}; --measure FILE writes all figures")
    if unknown := [name for name in found if name not in known]:
        raise ValueError(f"{file} has figures that are unknown: {', '.join(unknown)}; they are {', '.join(known)}")
    # Value, how it came about, source; the last two may be left out.
    rows = {name: [*value, *("given", "")[len(value) - 1 :]] if isinstance(value := found[name], list) and value
            else [value, "given", ""] for name in known}  # fmt: skip
    values = {name: row[0] for name, row in rows.items()}
    if bad := [
        name for name, value in values.items() if not (isinstance(value, int | float) and 0 <= value < math.inf)
    ]:
        raise ValueError(f"expected figures of at least 0, got {bad[0]} = {values[bad[0]]} in {file}")
    if not (values["image_seconds"] and values["image_size"]):
        raise ValueError(f"expected an image_size and image_seconds above 0 in {file}: a step takes some time")
    return str(content.get("title", file.stem)), Figures(**values), {n: (row[1], row[2]) for n, row in rows.items()}
