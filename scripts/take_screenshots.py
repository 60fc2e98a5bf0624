"""Take the pictures of docs/web.md: serve the embedded model's page, and drive it in a headless Chromium.

    python scripts/take_screenshots.py docs/screenshots

Needs playwright and a Chromium on the PATH.
"""

from __future__ import annotations

import io
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
SIZE = {"width": 960, "height": 680}
TEXT = "The value is the value of the object. Return the number of bytes that a zebra has read from the file."


def main(folder: Path) -> None:
    """Write one picture for each tab."""
    command = [
        sys.executable,
        "-m",
        "slowllm",
        "web",
        "--port",
        "0",
        "--stream-all",
        "--dtype",
        "fp32",
        "--ram",
        "3GiB",
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            take(server.stdout.readline().strip(), folder)
        finally:
            server.send_signal(signal.SIGINT)


def take(url: str, folder: Path) -> None:
    """Write the pictures of a page that is served."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page, other = (browser.new_page(viewport=SIZE) for _ in range(2))
        for one in (page, other):
            one.goto(url)
            one.wait_for_selector("#complete-run")

        page.fill("#complete-text textarea", "The value is")
        page.fill("#complete-max-new-tokens input", "400")
        page.get_by_label("min_new_tokens").fill("400")
        page.click("#complete-run")
        page.locator("#complete-body").filter(has_text="the value of the value").wait_for()
        page.wait_for_timeout(3000)
        shot(page, folder, "complete")

        other.fill("#complete-text textarea", "Return the number of")
        other.fill("#complete-max-new-tokens input", "300")
        other.get_by_label("min_new_tokens").fill("300")
        other.click("#complete-run")
        show(page, "Machine")
        page.locator("#machine-live").filter(has_text="visitor 2").wait_for()
        page.wait_for_timeout(2500)
        shot(page, folder, "machine")
        for one in (page, other):
            show(one, "Complete")
            one.click("#complete-stop")
            one.locator("#complete-status").filter(has_text="stopped").wait_for()

        show(page, "Score")
        page.fill("#score-text textarea", TEXT)
        page.click("#score-run")
        page.locator("#score-status").filter(has_text="perplexity").wait_for()
        shot(page, folder, "score")

        show(page, "Choose")
        page.fill("#choose-context textarea", "The value is")
        page.fill("#choose-choices textarea", "the\nnot set\nreturned\na zebra")
        page.get_by_label("normalize").click()
        page.get_by_role("option", name="tokens").click()
        page.click("#choose-run")
        page.locator("#choose-status").filter(has_text="Likeliest").wait_for()
        shot(page, folder, "choose")

        show(page, "Yes or no")
        page.locator("#yes-or-no-question textarea, #yes-or-no-question input").fill("Is the value a number?")
        page.click("#yes-or-no-run")
        page.locator("#yes-or-no-status").filter(has_text="Likeliest").wait_for()
        shot(page, folder, "yes-or-no")

        show(page, "File")
        with tempfile.TemporaryDirectory() as uploads:
            lines = (ROOT / "sentences.txt").read_text() * 20
            (upload := Path(uploads) / "sentences.txt").write_text(lines)
            page.set_input_files("#file-upload input[type=file]", upload)
            page.locator("#file-upload").filter(has_text="sentences.txt").wait_for()
        page.click("#file-run")
        page.locator("#file-status").filter(has_text="left").wait_for()
        page.wait_for_timeout(1500)
        shot(page, folder, "file")
        browser.close()


def show(page: Any, tab: str) -> None:
    """Show a tab of the page."""
    page.get_by_role("tab", name=tab, exact=True).click()


def shot(page: Any, folder: Path, name: str) -> None:
    """Write a picture of what is seen, without the pointer's marks."""
    page.mouse.move(5, 5)
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    picture = Image.open(io.BytesIO(page.screenshot()))
    # A page has few colours, and a picture with a palette has few bytes.
    picture.convert("RGB").quantize(96).save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
