"""Make README.md from nbs/index.ipynb: `python tools/readme.py`."""

from pathlib import Path

from nbconvert import MarkdownExporter

root = Path(__file__).parent.parent
body, resources = MarkdownExporter().from_filename(str(root / "nbs" / "index.ipynb"))
if resources["outputs"]:
    raise SystemExit(f"nbs/index.ipynb shows {len(resources['outputs'])} pictures; README.md takes text only: link to a file")
(root / "README.md").write_text(body.strip() + "\n", encoding="utf-8")
