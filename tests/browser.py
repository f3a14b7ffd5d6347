"""A real JupyterLab on loopback and a real, headless Chromium that works in it, for the tests of the widgets.

`lab.open(cells)` writes a notebook, opens it and runs all of its cells, as a person does. Set `W2V2NB_CHROMIUM` to the browser
to use, and `W2V2NB_SCREENS` to a folder that screenshots should be kept in.
"""

import importlib.util
import io
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

FLAGS = """--headless --no-sandbox --disable-quic --no-first-run --disable-background-networking --disable-component-update
--disable-sync --disable-gpu --use-gl=angle --use-angle=swiftshader --enable-unsafe-swiftshader
--autoplay-policy=no-user-gesture-required""".split()
# names are not even looked up, so that what asks for another machine fails here as it fails on a ward without internet
FLAGS.append("--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1")
SERVER = """--ServerApp.ip=127.0.0.1 --ServerApp.open_browser=False --ServerApp.allow_root=True --ServerApp.port_retries=0
--LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate --LabApp.expose_app_in_browser=True
--JupyterNotebookApp.expose_app_in_browser=True
--LabApp.extension_manager=readonly --LanguageServerManager.autodetect=False --ServerApp.terminals_enabled=False""".split()
PAGE_CONFIG = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
SIZE = {"width": 1280, "height": 1600}  # high enough for a whole widget
TIMEOUT_S = 60

SAMPLES = """from pathlib import Path
from w2v2nb import samples
table, prefix = f"{samples.split_root()}/test.csv", samples.prefix()
"""
# what opens each widget; `short` and `long` are run folders, from `make_runs`
CELLS = {
    "card": """from w2v2nb.table import as_table
from w2v2nb.views import Card, Shelf
table = as_table(table)
card = Card(Shelf(table, prefix))
card.show(table["uid"][0], table.head(1))
card""",
    "table": "from w2v2nb.browse import table as show\nshow(table, prefix)",
    "transforms": "from w2v2nb.tryout import transforms\ntransforms(sorted(Path(prefix).rglob('*.wav'))[0])",
    "errors": "from w2v2nb.mistakes import errors\nerrors('long', device='cpu')",
    "compare": "from w2v2nb.comparison import compare\ncompare(['short', 'long'])",
    "embeddings": "from w2v2nb.embedding_map import embeddings\nembeddings('embeddings', prefix, annotations=table)",
    "annotate": "from w2v2nb.rating import annotate\nannotate(table, ['breathy', 'strained'], prefix, rater='a')",
    "form": """from w2v2nb.form import form
places = dict(prefix=prefix, data_split_root=samples.split_root(), label_txt=samples.label_txt())
form(**places, checkpoint=samples.checkpoint(), epochs=2, exp_dir="formed")""",
}
CELLS = {name: SAMPLES + cell for name, cell in CELLS.items()}

# names of controls without one; what assistive technology reads is what counts, not how it is made
UNNAMED = """box => [...box.querySelectorAll('input, select, textarea, button, audio, [role=slider], [role=tab]')].filter(node =>
  node.offsetParent && !node.closest('.noUi-target') && ![
    node.getAttribute('aria-label'), node.title, node.closest('[title]')?.title, node.textContent.trim(),
    ...(node.getAttribute('aria-labelledby') || '').split(/\\s+/).map(id => id && document.getElementById(id)?.textContent),
    node.tagName === 'AUDIO' ? node.previousElementSibling?.textContent : '', // ipywidgets can name it only by a line before it
    ...[...(node.labels || [])].map(label => label.textContent)].some(name => name?.trim())
).map(node => node.outerHTML.slice(0, 200))"""
# what can be reached: radio buttons of one group share one stop, and what is hidden or disabled has none
STOPS = """box => [...box.querySelectorAll(
  'input, select, textarea, button, audio[controls], a[href], [tabindex="0"]')].filter(node =>
  node.offsetParent && !node.disabled && node.tabIndex >= 0 && !(node.type === 'radio' && !node.checked))"""
WIDE = """box => { const most = box.getBoundingClientRect().right + 1;
  const found = [...box.querySelectorAll('*')].filter(node => node.offsetParent && node.getBoundingClientRect().right > most
    && !scrolls(node)).map(node => node.outerHTML.slice(0, 160));
  function scrolls(node) { // a wide table may scroll by itself
    for (let up = node.parentElement; up && up !== box; up = up.parentElement)
      if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(up).overflowX) && up.clientWidth < up.scrollWidth) return true;
    return false; }
  return found; }"""


def find_chromium():
    "Path of a browser, None to leave it to playwright."
    names = [os.environ.get("W2V2NB_CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def why_not():
    "Why the widgets cannot be tested in a browser here; empty if they can."
    missing = [name for name in ("jupyterlab", "playwright") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed: make setup"
    if not find_chromium():
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            if not os.path.exists(playwright.chromium.executable_path):
                return "no Chromium: apt-get install chromium, or playwright install chromium, or set W2V2NB_CHROMIUM"
    return ""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def png_pixels(png):
    "The grey values of a picture, 0 to 255."
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("L"), dtype=float)


def is_blank(png):
    "Whether a picture shows nothing."
    return png_pixels(png).std() < 5


def make_embeddings(folder):
    "An extraction, `embeddings`, in a folder."
    from w2v2nb import samples
    from w2v2nb.config import configure
    from w2v2nb.run import start

    table = f"{samples.split_root()}/test.csv"
    inputs = dict(prefix=samples.prefix(), data_split_root=table, checkpoint=samples.checkpoint(), layer="0,1")
    start(configure("extraction", **inputs, dataset="samples", exp_dir=f"{folder}/embeddings"))


def make_runs(folder):
    "Two small runs, `short` and `long`, in a folder."
    from w2v2nb import samples
    from w2v2nb.config import configure
    from w2v2nb.run import start

    inputs = dict(prefix=samples.prefix(), data_split_root=samples.split_root(), checkpoint=samples.checkpoint(), cache=False)
    for name, epochs in {"short": 1, "long": 3}.items():
        start(configure(**inputs, label_txt=samples.label_txt(), dataset="samples", exp_dir=f"{folder}/{name}", epochs=epochs))


class Notebook:
    "A notebook in the browser: `page` is playwright's, `errors` what its console said, `abroad` what it asked of other machines."

    def __init__(self, lab, page):
        self.lab, self.page, self.errors, self.abroad = lab, page, [], []
        page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.record(request.url))
        page.on("websocket", lambda channel: self.record(channel.url))

    def record(self, url):
        "Keep the address of what is asked of another machine."
        if re.match(r"(https?|wss?)://(?!127\.0\.0\.1[:/])", url):
            self.abroad.append(url)

    def command(self, name):
        "Carry out a command of JupyterLab, and wait until it is done."
        run = "name => { window.state = ''; window.jupyterapp.commands.execute(name).then(() => window.state = 'done', String) }"
        self.page.evaluate(run, name)
        self.wait(lambda: self.page.evaluate("window.state"), name)

    def output(self, i=-1):
        "What the last cell shows, or the i-th of those that show something."
        return self.page.locator(".jp-Notebook .jp-OutputArea:has(.jp-OutputArea-child)").nth(i)

    def text(self, cell=-1):
        return self.output(cell).inner_text()

    def wait(self, condition, what, timeout_s=TIMEOUT_S):
        "Wait until a function returns something true, and return it."
        end = time.monotonic() + timeout_s
        while not (found := condition()):
            assert time.monotonic() < end, f"{what}: not within {timeout_s} s; the page is: {self.page.inner_text('body')[:3000]}"
            self.page.wait_for_timeout(50)
        return found

    def shot(self, name, locator=None):
        "A screenshot, kept in a folder for people to look at; its bytes."
        return (locator or self.output()).screenshot(path=self.lab.screens / f"{name}.png", timeout=1000 * TIMEOUT_S)

    def is_playing(self, audio):
        "Whether a player has a sound and its time goes on; it is started here if nobody has."
        self.wait(lambda: audio.evaluate("node => node.readyState >= 2 && node.duration > 0"), "the sound is loaded", 10)
        begin = audio.evaluate("async node => { if (node.paused) await node.play(); return node.currentTime }")
        return self.wait(lambda: audio.evaluate("node => node.currentTime") > begin, "the sound plays", 10)

    def unnamed(self):
        "The controls that a screen reader has no name for."
        return self.output().evaluate(UNNAMED)

    def unreached(self):
        "The controls that Tab doesn't come to, and whether their order is that of the page."
        stops = self.output().evaluate_handle(STOPS)
        n_stops = stops.evaluate("stops => stops.length")
        stops.evaluate("stops => stops[0]?.focus()")
        seen = []
        for _ in range(3 * n_stops + 10):  # an audio element has several stops of its own
            at = stops.evaluate("stops => stops.indexOf(document.activeElement)")
            if at >= 0 and (not seen or seen[-1] != at):
                seen.append(at)
            if at == n_stops - 1:
                break
            self.page.keyboard.press("Tab")
        missed = sorted(set(range(n_stops)) - set(seen))
        html = stops.evaluate("(stops, missed) => missed.map(i => stops[i].outerHTML.slice(0, 200))", missed)
        return html + ([] if seen == sorted(seen) else [f"Tab goes another way than the page: {seen}"])

    @contextmanager
    def zoomed(self, factor=2):
        "Everything larger, as after Ctrl and plus: there is room for less."
        self.page.set_viewport_size({name: n // factor for name, n in SIZE.items()})
        self.page.wait_for_timeout(500)
        yield
        self.page.set_viewport_size(SIZE)

    def too_wide(self):
        "What reaches beyond the right edge of the output."
        return self.output().evaluate(WIDE)


class Lab:
    "JupyterLab as a process of its own and a browser; both end with `close`."

    def __init__(self, folder, screens=None):
        from playwright.sync_api import sync_playwright

        self.folder, self.root = Path(folder), Path(folder) / "root"
        self.screens = Path(screens or os.environ.get("W2V2NB_SCREENS") or self.folder / "screens")
        self.root.mkdir()
        self.screens.mkdir(parents=True, exist_ok=True)
        self.start()
        self.playwright = sync_playwright().start()
        self.browser = self.playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)

    def start(self):
        "Start the server with folders of its own; kernels and extensions of this environment are seen all the same."
        self.token, self.address = secrets.token_hex(16), f"http://127.0.0.1:{free_port()}"
        names = dict(JUPYTER_CONFIG_DIR="config", JUPYTER_DATA_DIR="data", JUPYTER_RUNTIME_DIR="runtime", IPYTHONDIR="ipython")
        folders = {name: str(self.folder / below) for name, below in names.items()}
        config = self.folder / "config" / "labconfig" / "page_config.json"
        config.parent.mkdir(parents=True)
        config.write_text(json.dumps(PAGE_CONFIG))
        options = [f"--ServerApp.root_dir={self.root}", f"--ServerApp.port={self.address.rpartition(':')[2]}"]
        options.append(f"--IdentityProvider.token={self.token}")
        environment = {**os.environ, **folders, "OMP_NUM_THREADS": "1", "JUPYTER_PREFER_ENV_PATH": "1"}
        log = open(self.folder / "server.log", "wb")  # noqa: SIM115 - the process has it
        command = [sys.executable, "-m", "jupyterlab", *SERVER, *options]
        self.server = subprocess.Popen(command, env=environment, cwd=self.root, stdout=log, stderr=log, start_new_session=True)
        log.close()
        end = time.monotonic() + TIMEOUT_S
        while not self.ask("api/status"):
            is_alive = self.server.poll() is None and time.monotonic() < end
            assert is_alive, f"JupyterLab doesn't start: {(self.folder / 'server.log').read_text()[-2000:]}"
            time.sleep(0.1)

    def ask(self, path, method="GET"):
        "The server's answer; None while there is none."
        headers = {"Authorization": f"token {self.token}"}
        request = urllib.request.Request(f"{self.address}/{path}", headers=headers, method=method)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=TIMEOUT_S) as answer:
                return json.loads(answer.read() or "null")
        except urllib.error.URLError:
            return None

    def write(self, cells):
        "A notebook of these code cells in the server's folder; its name."
        import nbformat

        name = f"{secrets.token_hex(4)}.ipynb"
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
        notebook.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
        nbformat.write(notebook, self.root / name)
        return name

    def page(self):
        "A page of a browser that has been nowhere."
        page = self.browser.new_context(viewport=SIZE).new_page()
        page.set_default_timeout(1000 * TIMEOUT_S)
        return Notebook(self, page)

    def view(self, name, place="lab/tree"):
        "Open a notebook as it is, and run nothing; in Notebook 7 at the place `notebooks`."
        notebook = self.page()
        notebook.page.goto(f"{self.address}/{place}/{name}?reset&token={self.token}")
        notebook.page.wait_for_selector(".jp-Notebook .jp-Cell")
        notebook.page.wait_for_function("window.jupyterapp && window.jupyterapp.restored.then(() => true)")
        if notebook.page.locator("#jp-left-stack").is_visible():
            notebook.command("application:toggle-left-area")
        return notebook

    def open(self, cells, place="lab/tree"):
        "Write a notebook, open it and run it; what a cell raises is an error here."
        name = self.write(cells)
        notebook = self.view(name, place)
        notebook.name = name
        kernel = "window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'"
        notebook.page.wait_for_function(kernel)
        notebook.errors.clear()  # those of opening are not a cell's
        notebook.command("notebook:run-all-cells")
        failed = notebook.page.locator(".jp-RenderedText:is([data-mime-type*=stderr], [data-mime-type*=error])")
        assert not failed.count(), failed.first.inner_text()
        return notebook

    def end_kernels(self):
        for kernel in self.ask("api/kernels") or []:
            self.ask(f"api/kernels/{kernel['id']}", "DELETE")
        for context in self.browser.contexts:
            context.close()

    def close(self):
        "End the browser, the kernels and the server."
        self.end_kernels()
        self.browser.close()
        self.playwright.stop()
        os.killpg(self.server.pid, signal.SIGTERM)
        try:
            self.server.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.server.pid, signal.SIGKILL)


@pytest.fixture(scope="module")  # playwright's event loop counts as running until it is closed, also for the tests after these
def running_lab(tmp_path_factory):
    if reason := why_not():
        pytest.skip(reason)
    found = Lab(tmp_path_factory.mktemp("lab"))
    yield found
    found.close()


@pytest.fixture
def lab(running_lab):
    "A JupyterLab without kernels and pages; it counts as an error if a page asks another machine for anything."
    yield running_lab
    running_lab.end_kernels()
