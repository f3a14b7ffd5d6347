"""Run notebooks from top to bottom and keep their outputs, cleaned: python tools/outputs.py nbs/02_audio.ipynb ..."""

import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from w2v2nb.display import keep_static


def run(path: Path) -> None:
    nb = nbformat.read(path, as_version=4)
    NotebookClient(nb, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    nb.metadata.pop("widgets", None)  # what widgets showed is not committed
    for cell in nb.cells:
        if cell.cell_type == "code":
            # stderr holds progress bars and warnings: true of this machine, not of the notebook
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    nbformat.write(nb, path)
    keep_static(path)
    # a folder's .notest keeps nbdev_clean out as well, unless the file is named
    subprocess.run([str(Path(sys.executable).with_name("nbdev_clean")), "--fname", str(path)], check=True)


if __name__ == "__main__":
    paths = [Path(p) for p in sys.argv[1:]] or sorted(Path("nbs").rglob("*.ipynb"))
    for path in paths:
        if ".ipynb_checkpoints" not in path.parts:
            print(path, flush=True)
            run(path)
