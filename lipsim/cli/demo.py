"""`lipsim demo`: a page to play with, on this machine alone."""

from __future__ import annotations

import argparse
import html
import importlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lipsim.analysis.attacked_answer import AttackedAnswer, attacked_pair, attacked_triplet
from lipsim.cli.parser import add_metric_argument, budget, load_metric, positive_int
from lipsim.data.builtin.photographs import load_photograph
from lipsim.data.transforms import load_image, read_image
from lipsim.metric import PerceptualMetric, original_radii
from lipsim.metric.comparisons import threshold_of
from lipsim.utils.errors import LipsimError
from lipsim.utils.progress import Progress

EXAMPLES = ("lipsim demo", "lipsim demo runs/mine/metric.safetensors --port 8000 --open")
_SHOWN = 320  # pixels, of pictures that are smaller
_LARGEST_EPS = 5.0
THRESHOLD = 0.1  # of metrics without one
OFFLINE = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
_INTRODUCTION = """# lipsim: an answer, its certificate, and an attack

Drop a **reference** and one or two other images. With two others the metric answers which is nearer to the reference;
with one, whether the two are the same by a threshold. No change of the reference that is shorter than the *certified
radius* (ℓ2, values in [0, 1]) turns the answer, which is proven. The slider is the budget of an attack on the reference
that really runs.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lipsim demo` takes."""
    parser.description = (
        "A page in the browser: drop two or three images, see the metric's answer, its certified radius, how many "
        "pixels may take any colour, and what an attack within a budget of your choice finds. It runs on this machine "
        "and asks no other one for anything. Needs pip install 'lipsim[demo]'; an attack takes a few seconds with the "
        "bundled metrics. Ctrl+C ends it."
    )
    add_metric_argument(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to serve on; 0.0.0.0: the whole network (%(default)s)"
    )
    parser.add_argument("--port", type=positive_int, help="(the first that is free from 7860)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser of this machine")
    parser.add_argument("--steps", type=positive_int, default=50, help="gradient steps of an attack (%(default)s)")
    parser.add_argument("--eps", type=budget, default=0.5, help="where the slider is at first (%(default)s)")
    parser.add_argument(
        "--threshold", type=budget, help=f"distance up to which two images are the same (the file's, or {THRESHOLD})"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    os.environ.update(OFFLINE)  # before gradio is imported, which reads them then
    with Progress("starting") as progress:
        progress("loading gradio")
        gradio = import_gradio()
        progress("loading and auditing the metric")
        metric = load_metric(options)
        if not metric.has_bound:
            raise LipsimError("the metric has no Lipschitz bound, nothing about it can be certified")
    with tempfile.TemporaryDirectory(prefix="lipsim-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads go with it
        threshold = first_threshold(metric, options.threshold)
        page = build_page(metric, Path(folder), eps=options.eps, threshold=threshold, steps=options.steps)
        launch(page, gradio, host=options.host, port=options.port, browser=options.open, wait=True)
    return 0


def first_threshold(metric: PerceptualMetric, given: float | None = None) -> float:
    """Where the slider of the threshold is at first: as given, else at that of the metric's file."""
    return THRESHOLD if given is None and metric.threshold is None else threshold_of(metric, given)


def import_gradio() -> Any:
    """gradio, which takes seconds.

    Raises:
        LipsimError: it is not installed.
    """
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise LipsimError("the page needs the package gradio: pip install 'lipsim[demo]'") from error


def launch(page: Any, gradio: Any, *, host: str, port: int | None, browser: bool = False, wait: bool = False) -> str:
    """Serve a page, with nothing that comes from another machine; returns its address.

    Args:
        page: of :func:`build_page`.
        gradio: the package.
        host: address to serve on.
        port: None: the first that is free.
        browser: open it.
        wait: until Ctrl+C; else it is served by a thread, until ``page.close()``.
    """
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    fonts = {name: [gradio.themes.Font(font) for font in fonts_of] for name, fonts_of in fonts.items()}
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        inbrowser=browser,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        footer_links=[],
        theme=gradio.themes.Base(**fonts),
    )
    if wait:
        # Not before it answers: whoever starts the command waits for this line.
        print(f"the page is at {address} (Ctrl+C ends it)", flush=True)
        page.block_thread()
    return str(address)


def _digits(distance: float) -> str:
    """A distance to five places; a smaller one, as between near-duplicates, is not shown as 0."""
    return f"{distance:.2g}" if 0 < distance < 5e-6 else f"{distance:.5f}"


def page_error(error: Exception, *files: str | None) -> str:
    """What an error says, as HTML, with uploads called by their names alone and not by where the page keeps them."""
    text = str(error)
    for file in files:
        if file:
            text = text.replace(file, Path(file).name)
    return html.escape(text, quote=False)  # gradio shows it as it is, and a file may be called anything


def build_page(
    metric: PerceptualMetric, folder: Path, *, eps: float = 0.5, threshold: float = THRESHOLD, steps: int = 50
) -> Any:
    """The page, a ``gradio.Blocks``.

    Args:
        metric: a metric with a bound, frozen.
        folder: where the images that it starts with are written.
        eps: where the slider of the budget is at first.
        threshold: where that of the threshold is.
        steps: gradient steps of an attack.
    """
    gradio = import_gradio()

    def answer(reference: str | None, left: str | None, right: str | None, eps: float, threshold: float) -> Any:
        try:
            text, pictures = attacked_files(metric, reference, left, right, eps=eps, threshold=threshold, steps=steps)
        except (LipsimError, OSError) as error:
            # On the page, and not as a traceback in the terminal: it is for whoever dropped the file.
            raise gradio.Error(page_error(error, reference, left, right), print_exception=False) from error
        return text, *pictures

    files = example_images(folder)
    with gradio.Blocks(title="lipsim", analytics_enabled=False) as page:
        gradio.Markdown(_INTRODUCTION)
        with gradio.Row():
            inputs = [
                gradio.Image(
                    str(files[name]),
                    label=label,
                    type="filepath",
                    image_mode=None,
                    sources=["upload"],
                    height=_SHOWN,
                    elem_id=name,
                    buttons=[],
                )
                for name, label in (
                    ("reference", "reference (attacked)"),
                    ("left", "left, or the other of two"),
                    ("right", "right (may be empty)"),
                )
            ]
        with gradio.Row():
            inputs += [
                gradio.Slider(0, _LARGEST_EPS, eps, step=0.01, label="budget ε of the attack (ℓ2)", elem_id="eps"),
                gradio.Slider(0, 2, threshold, step=0.005, label="same up to the distance (two images)"),
            ]
            button = gradio.Button("Answer, certify and attack", variant="primary", elem_id="go")
        text = gradio.Markdown(elem_id="answer")
        with gradio.Row():
            labels = ("the reference as the metric sees it", "attacked", "change, amplified around gray")
            outputs = [
                # No button that would publish a picture.
                gradio.Image(label=label, format="png", interactive=False, height=_SHOWN, buttons=["download"])
                for label in labels
            ]
        button.click(answer, inputs, [text, *outputs], api_name="answer")
    return page


def attacked_files(
    metric: PerceptualMetric,
    reference: str | None,
    left: str | None,
    right: str | None,
    *,
    eps: float,
    threshold: float,
    steps: int = 50,
) -> tuple[str, tuple[Image.Image, Image.Image, Image.Image]]:
    """What the page says about two or three image files, as Markdown, and its pictures: clean, attacked, change.

    Raises:
        ValueError: no reference, nothing to compare it with, or a file that is no image.
    """
    others = [file for file in (left, right) if file]
    if not reference or not others:
        raise LipsimError("expected a reference and one or two other images; drop them into the fields")
    # Uploads are read as files are elsewhere: in full depth, upright, transparency over white.
    images = [load_image(file, metric.preprocess).to(metric.device, metric.dtype) for file in (reference, *others)]
    if len(images) == 3:
        found = attacked_triplet(metric, *images, eps=eps, steps=steps)
    else:
        found = attacked_pair(metric, *images, threshold=threshold, eps=eps, steps=steps)
    radii = original_radii(metric, {"reference": read_image(reference)}, {"reference": found.radius})
    change, gain = found.change()
    pictures = (_picture(found.clean), _picture(found.attacked), _picture(change))
    return _markdown(found, radii, gain, metric), pictures


def _markdown(found: AttackedAnswer, radii: dict[str, float] | None, gain: float, metric: PerceptualMetric) -> str:
    size = metric.image_size
    inside = "inside" if found.is_certified else "beyond"
    rows = [
        ("answer", f"**{found.before}**", f"**{found.after}**"),
        *((name, _digits(before), _digits(after)) for name, (before, after) in found.distances.items()),
    ]
    facts = [
        f"certified radius **{found.radius:.4g}** in the metric's {size}×{size} pixels"
        + ("" if radii is None else f", {radii['reference']:.4g} in those of the file"),
        f"pixels of the reference that may take any colour: **{found.pixels}** of {size * size}",
        f"ε = {found.eps:.3g} is **{inside}** the radius; the attack made a change of length {found.length:.3g}, shown "
        f"× {gain:.3g}",
    ]
    if found.interval is not None:
        facts.append(f"within ε the distance is certain to stay in [{', '.join(map(_digits, found.interval))}]")
    table = ["| | before | after the attack |", "|---|---|---|", *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join([f"### {found.verdict}", "", *table, "", *(f"- {fact}" for fact in facts)])


def _picture(image: Tensor) -> Image.Image:
    """An image ``(3, S, S)`` in 8 bits, small ones enlarged so that their pixels show."""
    values = (image.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)
    picture = Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())
    factor = max(1, -(-_SHOWN // max(picture.size)))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def example_images(folder: Path) -> dict[str, Path]:
    """Three files to begin with, of photographs that come with scikit-image and scikit-learn."""
    cat, flower = (_central_square(load_photograph(name)) for name in ("chelsea", "flower"))
    pictures = {
        "reference": cat.resize((256, 256), Image.Resampling.LANCZOS),
        # The same cat from a little nearer.
        "left": cat.crop((12, 12, cat.width - 12, cat.height - 12)).resize((256, 256), Image.Resampling.LANCZOS),
        "right": flower.resize((256, 256), Image.Resampling.LANCZOS),
    }
    files = {name: folder / f"{name}.png" for name in pictures}
    for name, picture in pictures.items():
        picture.save(files[name])
    return files


def _central_square(photograph: Any) -> Image.Image:
    height, width = photograph.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    values = (photograph[top : top + side, left : left + side] * 255).round().astype("uint8")
    return Image.fromarray(values)
