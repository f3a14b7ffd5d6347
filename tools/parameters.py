"""Write the parameters cell of each run notebook from the configuration class: python tools/parameters.py"""

from pathlib import Path
from typing import get_args

import nbformat

from w2v2nb.config import Config
from w2v2nb.settings import group_fields

RUNS = {"finetune": "finetune", "evaluate": "eval-only", "extract": "extraction"}
NOT_HERE = {"mode"}  # the notebook is the mode


def type_name(annotation: object) -> str:
    """str, int, float or bool: what papermill's help shows for a parameter."""
    options = {annotation, *get_args(annotation)}
    return next((kind.__name__ for kind in (bool, int, float) if kind in options), "str")


def parameter_line(name: str, mode: str) -> str:
    """A parameter with its type, its default and its help."""
    field = Config.model_fields[name]
    required = " (required)" if mode in field.json_schema_extra["required"] else ""
    # papermill's help leaves out a line with a second "=", so examples that have one stay in the command line's help
    about = field.description if "=" not in field.description else field.description.partition(":")[0]
    return f"{name}: {type_name(field.annotation)} = {field.default!r}  # {about}{required}"


def parameters_cell(mode: str) -> str:
    """The source of the cell tagged `parameters`, under the headings of `w2v2nb MODE --help`."""
    groups = []
    for heading, names in group_fields().items():
        used = [name for name in names if mode in Config.model_fields[name].json_schema_extra["modes"] and name not in NOT_HERE]
        if used:
            groups.append("\n".join([f"# {heading}", *(parameter_line(name, mode) for name in used)]))
    return "\n\n".join(groups)


if __name__ == "__main__":
    for stem, mode in RUNS.items():
        path = Path(__file__).parent.parent / "nbs" / "runs" / f"{stem}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
        if cell.source != parameters_cell(mode):
            cell.source = parameters_cell(mode)
            nbformat.write(notebook, path)
