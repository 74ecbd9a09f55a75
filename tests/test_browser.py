"""A slider of a notebook, moved in a real JupyterLab in a real browser: the picture beside it changes.

Needs the extra `browser` (playwright) and a Chromium on the path; skipped, visibly, without them.
"""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NOTEBOOKS = Path(__file__).parents[1] / "notebooks"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason='needs pip install "dpoviz[browser]" and a Chromium on the path',
)

STATE = """() => { const panel = window.jupyterapp.shell.currentWidget;
  const cells = panel.content.widgets.filter(w => w.model.type === 'code');
  return {status: panel.sessionContext.session?.kernel?.status,
          pending: cells.filter(c => c.model.sharedModel.source.trim() && !c.model.executionCount).length,
          busy: cells.some(c => (c.node.querySelector('.jp-InputPrompt')?.textContent ?? '').includes('*')),
          errors: cells.flatMap(c => c.model.outputs.toJSON()).filter(o => o.output_type === 'error')} }"""
PICTURE = """handle => [...handle.closest('.jp-Cell').querySelectorAll('.jp-OutputArea img')].at(-1).src"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Address of a JupyterLab of its own, on a copy of the notebooks."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(NOTEBOOKS, folder / "notebooks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "RUNTIME")}
    places |= {f"JUPYTERLAB_{name}_DIR": str(folder / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}"]
    command += ["--ServerApp.port_retries=0", "--IdentityProvider.token=t", "--LabApp.expose_app_in_browser=True"]
    command += [f"--ServerApp.root_dir={folder / 'notebooks'}", "--ServerApp.ip=127.0.0.1"]
    environment = {**os.environ, **places, "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.time() + 90
        while True:
            try:
                with urlopen(f"http://127.0.0.1:{port}/api/status?token=t", timeout=2):
                    break
            except OSError:
                assert time.time() < deadline and server.poll() is None, (folder / "log").read_text()[-2000:]
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.parametrize("name", ["01_from_constraint_to_loss", "02_two_readings_of_beta", "03_beta_network"])
def test_slider_changes_the_picture(lab, name):
    from playwright.sync_api import sync_playwright

    outside = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.on("request", lambda r: outside.append(r.url) if r.url.startswith("http") and lab not in r.url else None)
        page.goto(f"{lab}/lab/tree/{name}.ipynb?token=t")
        page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.sessionContext?.isReady", timeout=90_000)
        page.wait_for_timeout(2000)
        page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        page.wait_for_timeout(3000)
        deadline = time.time() + 180
        while (state := page.evaluate(STATE))["busy"] or state["status"] != "idle" or state["pending"]:
            assert time.time() < deadline, state
            page.wait_for_timeout(500)
        assert not state["errors"]
        slider = page.locator(".jp-OutputArea .noUi-handle").first
        slider.scroll_into_view_if_needed(timeout=60_000)
        handle = slider.element_handle()
        before = handle.evaluate(PICTURE)
        page.wait_for_timeout(1500)
        assert handle.evaluate(PICTURE) == before  # it does not change by itself
        slider.focus()
        for _ in range(4):
            page.keyboard.press("ArrowRight")
        page.wait_for_timeout(4000)
        assert handle.evaluate(PICTURE) != before
        assert not page.evaluate(STATE)["errors"]
        browser.close()
    assert not outside
