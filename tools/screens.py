"""Small pictures of the widgets in JupyterLab for the README: python tools/screens.py [NAME ...] writes nbs/images/NAME.png."""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

root = Path(__file__).parent.parent
sys.path.insert(0, str(root / "tests"))

from browser import CELLS, Lab, make_embeddings, make_runs  # noqa: E402 - where tests are is known by now

WIDTH, MAX_BYTES = 640, 60_000


def shrink(png):
    "The picture in fewer pixels and colours."
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)
    for n_colors in (128, 64, 32, 16):
        file = io.BytesIO()
        picture.quantize(n_colors, Image.Quantize.MAXCOVERAGE).save(file, "PNG", optimize=True)
        if file.tell() < MAX_BYTES:
            break
    return file.getvalue()


def draw(lab, name):
    "A widget after a click or two, cut to what its cell shows."
    notebook = lab.open([CELLS[name]])
    notebook.page.set_viewport_size({"width": 900, "height": 1600})
    if name == "table":
        notebook.output().locator(".w2v2nb-rows option").nth(1).click()
    elif name == "errors":
        notebook.output().get_by_label("Recording").select_option(index=0)
        notebook.output().get_by_role("button", name="Which second").click()
    elif name == "transforms":
        notebook.output().get_by_label("noise", exact=True).check()
    elif name == "embeddings":
        notebook.output().get_by_label("Colour by").select_option("task")
        notebook.output().get_by_label("Points").select_option(index=2)
        notebook.output().get_by_role("button", name="Select it and these").click()
    notebook.page.wait_for_timeout(5000)
    png = shrink(notebook.output().locator(".jp-OutputArea-output:visible").last.screenshot())
    lab.end_kernels()
    return png


def main(names):
    with tempfile.TemporaryDirectory(prefix="w2v2nb-") as folder:
        lab = Lab(folder)
        try:
            if {"errors", "compare"} & set(names):
                make_runs(lab.root)
            if "embeddings" in names:
                make_embeddings(lab.root)
            for name in names:
                path = root / "nbs" / "images" / f"{name}.png"
                path.write_bytes(draw(lab, name))
                print(path, path.stat().st_size, "bytes", flush=True)
        finally:
            lab.close()


if __name__ == "__main__":
    main(sys.argv[1:] or [name for name in CELLS if name != "card"])
