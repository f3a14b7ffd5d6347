"""Make README.md from nbs/index.ipynb: python tools/readme.py"""

import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).parent.parent
notebook = nbformat.read(root / "nbs" / "index.ipynb", as_version=4)
notebook.metadata["language_info"] = {"name": "python"}  # nbdev_clean takes it away, code fences name it
body, resources = MarkdownExporter().from_notebook_node(notebook)
if resources["outputs"]:
    raise SystemExit("nbs/index.ipynb shows pictures; README.md takes text only: link to a file instead")
body = body.replace("](images/", "](nbs/images/")  # the notebook lies beside its pictures
(root / "README.md").write_text(re.sub(r"\n{3,}", "\n\n", body).strip() + "\n", encoding="utf-8")
