"""`lipsim demo`: what the page says, and the page itself in headless Chromium."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lipsim import PerceptualMetric
from lipsim.cli import demo
from lipsim.cli.main import main
from lipsim.layers import freeze
from lipsim.metric import load, save
from lipsim.students import OrthogonalProjection
from lipsim.teachers import SmallViT


def test_two_and_three_files(tmp_path: Path) -> None:
    metric: Any = freeze(PerceptualMetric(OrthogonalProjection(16, 12), 16).requires_grad_(False))
    files = {name: str(path) for name, path in demo.example_images(tmp_path).items()}
    assert list(files) == ["reference", "left", "right"]
    text, pictures = demo.attacked_files(metric, **files, eps=0.1, threshold=0.1, steps=3)
    assert text.startswith("### ε = 0.1 is inside the certified radius")
    assert "| answer | **left** | **left** |" in text and "| d(reference, right) | " in text
    assert "in the metric's 16×16 pixels, " in text and "in those of the file" in text
    assert "pixels of the reference that may take any colour: **" in text and "of 256" in text
    assert all(picture.size == (320, 320) for picture in pictures)
    pair = {**files, "right": None}
    text, _ = demo.attacked_files(metric, **pair, eps=0.1, threshold=0.1, steps=3)  # type: ignore[arg-type]
    assert "| answer | **same** | " in text and "the distance is certain to stay in [" in text
    with pytest.raises(ValueError, match="expected a reference and one or two other images"):
        demo.attacked_files(metric, files["left"], None, None, eps=0.1, threshold=0.1)
    with pytest.raises(ValueError, match="cannot read the image"):
        (tmp_path / "no.png").write_text("no image")
        demo.attacked_files(metric, str(tmp_path / "no.png"), files["left"], None, eps=0.1, threshold=0.1)


def test_a_small_distance_is_not_shown_as_none() -> None:
    assert [demo._digits(d) for d in (0.0, 5.69e-8, 6e-6, 0.00247, 0.52837)] == [
        "0.00000", "5.7e-08", "0.00001", "0.00247", "0.52837"
    ]  # fmt: skip


def test_an_error_calls_a_file_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "uploads" / "no <i>image.png"
    file.parent.mkdir()
    file.write_text("no image")
    metric: Any = PerceptualMetric(OrthogonalProjection(16, 12), 16)
    with pytest.raises(ValueError, match="uploads") as refused:
        demo.attacked_files(metric, str(file), str(file), None, eps=0.1, threshold=0.1)
    said = demo.page_error(refused.value, str(file), str(file), None)
    assert said.startswith("cannot read the image no &lt;i&gt;image.png (") and str(tmp_path) not in said


def test_what_keeps_the_hub_away_is_what_it_reads() -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    names = [name for name in demo.OFFLINE if name.startswith("HF_")]
    assert len(names) == 2 and all(hasattr(constants, name) for name in names)
    assert demo.OFFLINE["HF_HUB_OFFLINE"] == "1"


def test_a_metric_without_a_bound_has_no_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    vit = SmallViT(image_size=16, patch_size=8, width=8, depth=1, heads=1)
    file = save(PerceptualMetric(vit, 16, lipschitz=torch.inf), tmp_path / "vit.safetensors")
    monkeypatch.setattr(demo, "import_gradio", lambda: None)
    for name in demo.OFFLINE:
        monkeypatch.setenv(name, "")
    with pytest.raises(SystemExit) as stop:
        main(["demo", str(file)])
    assert stop.value.code == 1 and "no Lipschitz bound" in capsys.readouterr().err


def test_without_gradio(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in demo.OFFLINE:
        monkeypatch.setenv(name, "")
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(SystemExit) as stop:
        main(["demo"])
    assert stop.value.code == 1 and "pip install 'lipsim[demo]'" in capsys.readouterr().err


@contextmanager
def _browser(folder: Path) -> Iterator[Any]:
    """Headless Chromium that says which addresses it asks."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "hide-scrollbars", "window-size=1180,1440",
        f"user-data-dir={folder}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


def _wait(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.2)
    pytest.fail("the page does not get there in two minutes")


@pytest.mark.slow  # starts a server and a browser, and attacks
@pytest.mark.filterwarnings("ignore")  # of gradio and of what it brings
def test_the_page_in_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**demo.OFFLINE, "GRADIO_TEMP_DIR": str(tmp_path / "uploads")}.items():
        monkeypatch.setenv(name, value)
    gradio = pytest.importorskip("gradio")
    asked: set[str] = set()
    connect = socket.socket.connect

    def recorded(this: socket.socket, address: Any) -> Any:
        asked.add(str(address[0]) if isinstance(address, tuple) else "a local socket")
        return connect(this, address)

    monkeypatch.setattr(socket.socket, "connect", recorded)
    screenshots = Path(os.environ.get("LIPSIM_SCREENSHOTS", tmp_path))
    page = demo.build_page(load(), tmp_path)
    with _browser(tmp_path / "profile") as browser:
        try:
            browser.get(demo.launch(page, gradio, host="127.0.0.1", port=None))

            def element(selector: str) -> Any:
                return browser.find_element("css selector", selector)

            def ask(eps: float, expected: str) -> str:
                field = element("#eps input[type=number]")
                field.clear()
                field.send_keys(str(eps), "\ue007")  # enter
                element("#go").click()
                _wait(lambda: expected in element("#answer").text)
                time.sleep(2)  # the pictures
                return str(element("#answer").text)

            _wait(lambda: bool(browser.find_elements("css selector", "#eps input[type=number]")))
            text = ask(1.0, "ε = 1 is inside the certified radius")
            assert "answer left left" in text and "certified radius 2.9" in text and "pixels of the reference" in text
            _screenshot(browser, screenshots / "demo-inside.png")
            text = ask(4.5, "ε = 4.5 is beyond the certified radius")
            assert "answer left right" in text and "turned the answer to “right”" in text
            _screenshot(browser, screenshots / "demo-beyond.png")
            # An image of one's own, in the place of the reference: the flower itself.
            element("#reference button[aria-label='Clear'], #reference button[aria-label='Remove Image']").click()
            _wait(lambda: not browser.find_elements("css selector", "#reference img"))
            element("#reference input[type=file]").send_keys(str(tmp_path / "right.png"))
            _wait(lambda: bool(browser.find_elements("css selector", "#reference img")))
            assert "answer right right" in ask(0.25, "ε = 0.25 is inside the certified radius")
            messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
            errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        finally:
            page.close()
    requests = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    web = {url.split("/")[2].split(":")[0] for url in requests if url.startswith(("http", "ws"))}
    assert web == {"127.0.0.1"} and errors == []
    assert asked <= {"127.0.0.1", "localhost", "::1", "a local socket"}


def _screenshot(browser: Any, path: Path) -> None:
    """A screenshot of few colours, which makes a small file."""
    browser.save_screenshot(str(path))
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(128)
    small.save(path, optimize=True)
