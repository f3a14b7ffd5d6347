"""Write the parameters cell of each run notebook from the configuration class: python tools/parameters.py"""

from pathlib import Path
from typing import get_args

import nbformat

from w2v2nb.config import Config

RUNS = {"finetune": "finetune", "evaluate": "eval-only", "extract": "extraction"}
NOT_HERE = {"mode"}  # the notebook is the mode


def type_name(annotation: object) -> str:
    """str, int, float or bool: what papermill's help shows for a parameter."""
    options = {annotation, *get_args(annotation)}
    return next((kind.__name__ for kind in (bool, int, float) if kind in options), "str")


def parameters_cell(mode: str) -> str:
    """The source of the cell tagged `parameters`."""
    lines = []
    for name, field in Config.model_fields.items():
        extra = field.json_schema_extra
        if mode in extra["modes"] and name not in NOT_HERE:
            required = " (required)" if mode in extra["required"] else ""
            lines.append(f"{name}: {type_name(field.annotation)} = {field.default!r}  # {field.description}{required}")
    return "\n".join(lines)


if __name__ == "__main__":
    for stem, mode in RUNS.items():
        path = Path(__file__).parent.parent / "nbs" / "runs" / f"{stem}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
        if cell.source != parameters_cell(mode):
            cell.source = parameters_cell(mode)
            nbformat.write(notebook, path)
