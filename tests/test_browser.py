"""The widgets in a real JupyterLab in a real browser: a slider of a notebook, and the explorer of a run.

Needs the extra `browser` (playwright) and a Chromium on the path; skipped, visibly, without them.
"""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import nbformat
import pytest
from test_run import config, scored, train

from dpoviz.learn.run import load_run

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
def folder(tmp_path_factory):
    """Folder of a JupyterLab, whose notebooks lie in notebooks/."""
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def lab(folder):
    """Address of a JupyterLab of its own, on a copy of the notebooks."""
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


@contextmanager
def opened(lab, name):
    """The page of a notebook after all its cells have run; nothing was asked of any other machine."""
    from playwright.sync_api import sync_playwright

    outside = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(60_000)
        page.on("request", lambda r: outside.append(r.url) if r.url.startswith("http") and lab not in r.url else None)
        page.goto(f"{lab}/lab/tree/{name}.ipynb?token=t")
        page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.sessionContext?.isReady", timeout=90_000)
        page.wait_for_timeout(2000)
        run_all(page)
        yield page
        assert not page.evaluate(STATE)["errors"]
        browser.close()
    assert not outside


def run_all(page):
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_timeout(3000)
    deadline = time.time() + 180
    while (state := page.evaluate(STATE))["busy"] or state["status"] != "idle" or state["pending"]:
        assert time.time() < deadline, state
        page.wait_for_timeout(500)
    assert not state["errors"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["01_from_constraint_to_loss", "02_two_readings_of_beta", "03_beta_network"])
def test_slider_changes_the_picture(lab, name):
    with opened(lab, name) as page:
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


EXPLORERS = """from dpoviz import explore_run, load_run
run = load_run("../run")
explore_run(run)"""
POINTS = "node => [...node.querySelectorAll('canvas')].map(canvas => canvas.toDataURL())"
AXES = "node => [...node.querySelectorAll('.panel text')].map(text => text.textContent)"


@pytest.fixture(scope="module")
def explored(folder, lab):
    """A run in the folder, and a notebook with two explorers of it."""
    run = load_run(train(scored(folder / "model"), config(), folder / "run"))
    cells = [nbformat.v4.new_code_cell(source) for source in (EXPLORERS, "explore_run(run)")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=kernel)  # without a kernel, JupyterLab asks for one
    nbformat.write(notebook, folder / "notebooks" / "explored.ipynb")
    return run


@pytest.mark.slow
def test_explorer_of_a_run(lab, explored):
    """The slider moves the points and nothing else, a click shows a prompt, a typed prompt becomes a point."""
    with opened(lab, "explored") as page:
        first, second = (page.locator(".dpoviz").nth(i) for i in range(2))
        second.wait_for()

        # the step slider, by the keyboard
        last, axes, other = first.evaluate(POINTS), first.evaluate(AXES), second.evaluate(POINTS)
        first.locator("input[type=range]").focus()
        page.keyboard.press("ArrowLeft")
        step = first.locator("[data-role=step]")
        assert step.inner_text() == f"step {explored.steps[-2]} of {explored.steps[-1]}"
        before = first.evaluate(POINTS)
        assert len(before) == 4 and all(a != b for a, b in zip(before, last, strict=True))
        assert first.evaluate(AXES) == axes and second.evaluate(POINTS) == other
        page.keyboard.press("ArrowRight")
        assert first.evaluate(POINTS) == last

        # the highest of the list, then the same one by a click on its point
        table = explored.table[explored.table["form"] == explored.table["form"].iloc[0]]
        highest = table.sort_values("beta").iloc[-1]
        first.locator("ol button").first.click()
        prompt = first.locator("[data-role=prompt]")
        assert prompt.inner_text().strip() == highest["prompt"].strip()
        panel = first.locator(".panel svg[data-kind=cloud]").first
        x, y = (float(panel.locator(".ring").last.get_attribute(name)) for name in ("cx", "cy"))
        panel.focus()
        page.keyboard.press("Escape")
        assert prompt.count() == 0
        panel.click(position={"x": x + 2, "y": y - 2})
        assert prompt.inner_text().strip() == highest["prompt"].strip()
        said = first.locator("aside").inner_text()
        of_prompt = explored.pairs[explored.pairs["prompt"] == highest["prompt"]].iloc[0]
        assert f"{highest['beta']:.3g}" in said and of_prompt["chosen"] in said and of_prompt["rejected"] in said
        page.keyboard.press("Home")  # the arrow keys go through the points
        lowest = table.sort_values("beta").iloc[0]
        assert prompt.inner_text().strip() == lowest["prompt"].strip()

        # a prompt that is typed
        assert first.locator("circle.asked").count() == 0
        box, state = first.locator("textarea"), first.locator(".state")
        box.fill("Compute 3 + 4.")
        box.press("Enter")
        first.locator("circle.asked").nth(3).wait_for()  # in each of the four panels
        expected = explored.beta("Compute 3 + 4.\n", form="inverse")  # as all prompts of this run, with a line break
        assert f"β {expected:.3g} (inverse)" in state.inner_text()
        box.fill("word " * 3000)  # longer than the model's context
        box.press("Enter")
        first.locator(".state.bad").wait_for()
        assert "ValueError" in state.inner_text() and first.locator("circle.asked").count() == 4

        run_all(page)  # the cells again: still one explorer per cell, and both alive
        assert page.locator(".dpoviz").count() == 2
        first.locator("input[type=range]").focus()
        page.keyboard.press("ArrowLeft")
        assert step.inner_text().startswith(f"step {explored.steps[-2]} ")
