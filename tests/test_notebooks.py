"""The rules for notebooks that a program can check. Each rule yields what is wrong, where, and what to do.

Which notebooks a rule is for stands in its decorator: `modules` are nbs/NN_name.ipynb, `runs` are nbs/runs/*.ipynb,
`everything` is every notebook below nbs/. The second half of the file shows each rule a notebook that breaks it.
"""

import ast
import base64
import io
import json
import re
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import pytest

root = Path(__file__).parent.parent
nbs = root / "nbs"

max_cells, max_run_cells, max_cell_lines, max_exported_lines = 90, 25, 40, 250
max_waiting_definitions = 2  # exported one after the other before a cell shows them working
min_words_per_line = 1.5
max_pictures, max_course_pictures, max_picture_bytes = 3, 12, 100 * 1024
development_packages = {"fastcore", "nbdev", "execnb", "ghapi"}  # never in exported cells and run notebooks

rules = {"modules": [], "runs": [], "everything": []}


def rule(kind):
    "Register a generator of problems as a rule for one kind of notebook."

    def register(check):
        rules[kind].append(check)
        return check

    return register


# Reading


@dataclass
class Cell:
    number: int
    raw: dict

    @property
    def source(self):
        return "".join(self.raw["source"])

    @property
    def is_code(self):
        return self.raw["cell_type"] == "code"

    @property
    def is_markdown(self):
        return self.raw["cell_type"] == "markdown"

    @property
    def is_exported(self):
        return self.is_code and bool(re.search(r"^#\|\s*(export|exporti|exports)\b", self.source, re.M))

    @property
    def is_definition(self):
        "Whether it exports functions or classes."
        return self.is_exported and any(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in self.tree.body)

    @property
    def n_lines(self):
        "Lines of code: neither blank nor a directive."
        return sum(bool(line.strip()) and not line.startswith("#|") for line in self.source.splitlines())

    @property
    def tree(self):
        "The syntax tree; lines of IPython magic become blank ones."
        return ast.parse(re.sub(r"^\s*[%!].*$", "", self.source, flags=re.M) if self.is_code else "")

    @property
    def outputs(self):
        return self.raw.get("outputs", [])

    def __str__(self):
        first = next((line for line in self.source.splitlines() if line.strip() and not line.startswith("#|")), "")
        return f"cell {self.number} ({first.strip()[:50]})"


@dataclass
class Notebook:
    path: Path
    raw: dict
    cells: list = field(init=False)

    def __post_init__(self):
        self.cells = [Cell(number, raw) for number, raw in enumerate(self.raw["cells"])]

    @property
    def exported(self):
        return [cell for cell in self.cells if cell.is_exported]

    @property
    def number(self):
        return self.path.stem.partition("_")[0]

    @property
    def name(self):
        return self.path.stem.partition("_")[2]

    @property
    def module(self):
        "The module it exports to by its name."
        return "__main__" if self.name == "main" else self.name


def read(path):
    return Notebook(path, json.loads(path.read_text(encoding="utf-8")))


def paths(pattern):
    return sorted(p for p in nbs.glob(pattern) if ".ipynb_checkpoints" not in p.parts)


notebooks = {"modules": paths("[0-9]*.ipynb"), "runs": paths("runs/*.ipynb"), "everything": paths("**/*.ipynb")}


def imported(tree):
    "Every module that a tree imports, as (dotted name, names imported from it)."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), [alias.name for alias in node.names]


def public_functions(cell):
    "Top-level public functions, and constructors and public methods of top-level public classes."
    for node in cell.tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and (inner.name == "__init__" or not inner.name.startswith("_")):
                    yield f"{node.name}.{inner.name}", inner


def parameters(function):
    "The parameters of a function but self and cls, each with its default or None."
    a = function.args
    positional = a.posonlyargs + a.args
    defaults = [None] * (len(positional) - len(a.defaults)) + a.defaults
    pairs = list(zip(positional, defaults, strict=True)) + list(zip(a.kwonlyargs, a.kw_defaults, strict=True))
    pairs += [(arg, None) for arg in (a.vararg, a.kwarg) if arg]
    return [(arg, default) for arg, default in pairs if arg.arg not in ("self", "cls")]


def output_texts(cell):
    "Every text among a cell's outputs."
    for output in cell.outputs:
        yield "".join(output.get("text", ""))
        yield "\n".join(output.get("traceback", []))
        for kind, content in output.get("data", {}).items():
            if kind.startswith("text/"):
                yield "".join(content)


# Rules for modules


@rule("modules")
def numbered(nb):
    if not re.fullmatch(r"\d\d[a-z]?_[a-z][a-z0-9_]*", nb.path.stem):
        yield f"the name should be NN_name or NNa_name; rename {nb.path.name}"
    for other in notebooks["modules"]:
        if other != nb.path and other.stem.partition("_")[0] == nb.number:
            yield f"{other.name} has the number {nb.number} too; give one of them a letter, such as {nb.number}a"
        if other != nb.path and other.stem.partition("_")[2] == nb.name:
            yield f"{other.name} exports the module {nb.name} too; rename one of them"


@rule("modules")
def opens_with_its_name(nb):
    first, title, prose = nb.cells[:3]
    if not (first.is_code and first.source.strip() == f"#| default_exp {nb.module}"):
        yield f"{first} should be a code cell with only `#| default_exp {nb.module}`"
    names = "|".join(map(re.escape, (nb.name, nb.module, nb.module.replace("_", r"\_"))))
    if not (title.is_markdown and re.fullmatch(rf"# ({names})\n+> [^\n]+\n*", title.source)):
        yield f"{title} should be a markdown cell with `# {nb.name}` and `> one sentence` and nothing else"
    if not prose.is_markdown:
        yield f"{prose} should be markdown: say what the module is for before any code"


@rule("modules")
def imports_point_down(nb):
    numbers = {path.stem.partition("_")[2]: path for path in notebooks["modules"]}
    for cell in nb.cells:
        for name, members in imported(cell.tree):
            if name.startswith("."):
                yield f"{cell} imports {name} relatively; write `from w2v2nb.NAME import ...`"
            below = [name.split(".")[1]] if name.startswith("w2v2nb.") else members if name == "w2v2nb" else []
            for module in below:
                if module.startswith("_"):
                    continue
                if module not in numbers:
                    yield f"{cell} imports w2v2nb.{module}, which no notebook exports; correct the name"
                elif module == nb.module and not cell.is_exported:
                    continue  # what the notebook exported, as a worker process or an isinstance sees it
                elif numbers[module].stem >= nb.path.stem:
                    yield f"{cell} imports w2v2nb.{module} from {numbers[module].name}; imports point to lower numbers"


@rule("modules")
def exported_imports_are_explicit(nb):
    for cell in nb.exported:
        for name, members in imported(cell.tree):
            if "*" in members:
                yield f"{cell} imports * from {name}; name what it uses"
            if name.split(".")[0] in development_packages:
                yield f"{cell} exports an import of {name}, which users don't install; do without it"


@rule("modules")
def exported_cells_hold_one_kind(nb):
    for cell in nb.exported:
        kinds = {type(node) for node in cell.tree.body}
        if kinds & {ast.Import, ast.ImportFrom} and kinds & {ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef}:
            yield f"{cell} mixes imports and definitions; give the imports a cell of their own"
        if any(isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant) for node in cell.tree.body):
            yield f"{cell} exports a bare expression; demonstrations belong into a cell without `#| export`"


@rule("modules")
def exported_code_keeps_to_plain_python(nb):
    for cell in nb.exported:
        for node in ast.walk(cell.tree):
            if isinstance(node, ast.Assert):
                yield f"{cell} exports an assert; raise ValueError, TypeError or FileNotFoundError with a sentence"
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            if name in ("patch", "patch_to", "store_attr", "delegates"):
                yield f"{cell} exports {name}; write the method or the assignment out"


@rule("modules")
def parameters_are_documented(nb):
    for cell in nb.exported:
        comments = {
            token.start[0]
            for token in tokenize.generate_tokens(io.StringIO(cell.source).readline)
            if token.type == tokenize.COMMENT
        }
        for name, function in public_functions(cell):
            pairs = parameters(function)
            lines = [arg.lineno for arg, _ in pairs]
            is_method = "." in name and function.name != "__init__"  # the class's own text explains its methods
            needs_comments = len(pairs) > 1 and not is_method
            for arg, default in pairs:
                if arg.annotation is None and arg not in (function.args.vararg, function.args.kwarg):
                    yield f"{cell}: {name} has no type for {arg.arg}; write `{arg.arg}: type,  # what it is, its unit`"
                last = max(arg.end_lineno, default.end_lineno if default is not None else 0)
                if needs_comments and (last not in comments or lines.count(arg.lineno) > 1):
                    yield f"{cell}: {name} doesn't say what {arg.arg} is; give it its own line with a comment"


@rule("modules")
def public_names_have_docstrings(nb):
    for cell in nb.exported:
        for node in cell.tree.body:
            is_definition = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            if is_definition and not node.name.startswith("_") and not ast.get_docstring(node):
                yield f"{cell}: {node.name} has no docstring; say what it does, with shapes, units and errors"


@rule("modules")
def definitions_are_introduced(nb):
    for before, cell in zip(nb.cells, nb.cells[1:], strict=False):
        if cell.is_definition and not before.is_markdown:
            yield f"{cell} follows code; put a sentence before it that says what it does and why"


@rule("modules")
def definitions_are_shown(nb):
    if nb.module == "__main__":
        return  # importing it runs nothing that could be shown
    waiting = []
    for cell in nb.cells:
        if cell.is_definition:
            waiting.append(cell)
            if len(waiting) == max_waiting_definitions + 1:
                yield f"{cell} and the {len(waiting) - 1} definitions before it aren't used yet; show what they return"
        elif cell.is_code and not cell.is_exported:
            waiting = []
    if waiting:
        yield f"{waiting[-1]} is never used in the notebook; show what it returns, 1 to 5 lines"


@rule("modules")
def stays_small(nb):
    n_exported = sum(cell.n_lines for cell in nb.exported)
    if len(nb.cells) > max_cells:
        yield f"it has {len(nb.cells)} cells, at most {max_cells} should do; split the module"
    if n_exported > max_exported_lines:
        yield f"it exports {n_exported} lines, at most {max_exported_lines} should do; split the module"


@rule("modules")
def prose_carries_the_code(nb):
    n_words = sum(len(cell.source.split()) for cell in nb.cells if cell.is_markdown)
    n_lines = sum(cell.n_lines for cell in nb.cells if cell.is_code)
    if n_words < min_words_per_line * n_lines:
        missing = min_words_per_line * n_lines - n_words
        yield f"{n_words} words for {n_lines} lines of code; say more ({missing:.0f} words) or write less code"


# Rules for run notebooks


@rule("runs")
def one_cell_holds_the_parameters(nb):
    tagged = [cell for cell in nb.cells if "parameters" in cell.raw["metadata"].get("tags", [])]
    if len(tagged) != 1 or not tagged[0].is_code:
        yield f"{len(tagged)} cells are tagged `parameters`; one code cell should be, else the defaults run"
    for node in (n for cell in tagged for n in cell.tree.body):
        if not isinstance(node, (ast.AnnAssign, ast.Assign)):
            yield f"line {node.lineno} of the parameters cell is no assignment; move it to another cell"


@rule("runs")
def calls_and_does_not_define(nb):
    for cell in nb.cells:
        if any(isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) for n in ast.walk(cell.tree)):
            yield f"{cell} defines a function or class; move it into a module and import it"
        for name, _ in imported(cell.tree):
            if name.split(".")[0] in development_packages:
                yield f"{cell} imports {name}, which a production image doesn't have; do without it"
    if len(nb.cells) > max_run_cells:
        yield f"it has {len(nb.cells)} cells, at most {max_run_cells} should do; move code out"


@rule("runs")
def runs_from_any_folder(nb):
    for cell in nb.cells:
        if not cell.is_code:
            continue
        if found := re.search(r"getcwd\(|\.cwd\(|chdir\(|^\s*%cd\b|__file__", cell.source, re.M):
            yield f"{cell} uses {found[0].strip()}; papermill runs it anywhere: take paths from the parameters"
        for node in ast.walk(cell.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.match(r"\.\.?(/|$)", node.value):
                yield f"{cell} has the relative path {node.value}; take it from the parameters or from w2v2nb.samples"
            if not (isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)):
                continue
            called, opened = getattr(node.func, "attr", getattr(node.func, "id", "")), str(node.args[0].value)
            is_reader = called in ("open", "Path", "stage", "exists", "read_csv", "read_parquet", "read_text", "read_bytes")
            if is_reader and not re.match(r"/|[a-z]+://|~", opened):
                yield f"{cell} opens the relative path {opened}; join it to a folder from the parameters"


# Rules for every notebook


@rule("everything")
def code_is_python(nb):
    for cell in nb.cells:
        try:
            cell.tree  # noqa: B018
        except SyntaxError as e:
            yield f"{cell} isn't Python: {e}"


@rule("everything")
def cells_stay_short(nb):
    for cell in nb.cells:
        if "parameters" in cell.raw["metadata"].get("tags", []):
            continue  # tools/parameters.py makes it, a line for each parameter of the configuration
        if cell.is_code and cell.n_lines > max_cell_lines:
            yield f"{cell} has {cell.n_lines} lines, at most {max_cell_lines} should do; make it two functions"


@rule("everything")
def reads_on_github(nb):
    for cell in nb.cells:
        if cell.is_markdown and (found := re.search(r"^:::+|\{\{<|^\s*\{#|\]\{\.", cell.source, re.M)):
            yield f"{cell} has quarto syntax ({found[0]}); GitHub shows it as it stands: write plain markdown"
        if cell.is_code and (found := re.search(r"\bshow_doc\b|^#\|\s*eval:\s*false", cell.source, re.M | re.I)):
            yield f"{cell} has {found[0]}; flag what can't run everywhere with `#| gpu`, `#| net` or `#| slow`"
        if cell.is_code and (found := re.search(r"^\s*#\s*([-=#*~])\1{4,}", cell.source, re.M)):
            yield f"{cell} has a banner ({found[0].strip()[:20]}); use a markdown heading"


@rule("everything")
def pictures_are_few_and_small(nb):
    pictures = [
        (cell, kind, content)
        for cell in nb.cells
        for output in cell.outputs
        for kind, content in output.get("data", {}).items()
        if kind.startswith("image/")
    ]
    most = max_course_pictures if nb.path.parent.name == "course" else max_pictures
    if len(pictures) > most:
        yield f"it has {len(pictures)} pictures, at most {most} should do; show the ones that are results"
    for cell, kind, content in pictures:
        if kind != "image/png":
            yield f"{cell} shows {kind}; make it a PNG at screen resolution"
        elif (n_bytes := len(base64.b64decode("".join(content)))) >= max_picture_bytes:
            yield f"{cell} shows {n_bytes // 1024} KB, {max_picture_bytes // 1024} KB should do; draw it smaller"


@rule("everything")
def outputs_are_true_everywhere(nb):
    patterns = {
        "an absolute path": r"(?<![\w.:/])/(?:work|home|tmp|root|Users|mnt|opt|usr|private|var|content)/[\w.]+",
        "a progress bar": r"\d+%\s?\|.*\||\d(?:it|s|B)/(?:s|it)\b",
        "an execution time": r"CPU times|Wall time|per loop \(|\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d",
        "a memory address": r"\bat 0x[0-9a-f]{6,}",
        "an audio player": r"<audio\b|data:audio/",
        "a widget": r"<script\b",
    }
    for cell in nb.cells:
        for what, pattern in patterns.items():
            for text in output_texts(cell):
                if found := re.search(pattern, text):
                    yield f"{cell} shows {what} ({found[0][:60]}), true of one machine or moment; print something else"
        for output in cell.outputs:
            if output.get("name") == "stderr" or output["output_type"] == "error":
                yield f"{cell} has {output.get('name', 'an error')} among its outputs; run `make outputs NB=...` again"
            for kind in output.get("data", {}):
                if kind.startswith(("audio/", "video/")) or "widget" in kind or "javascript" in kind:
                    yield f"{cell} shows {kind}; show text or a picture, or hide the player from the committed outputs"


@rule("everything")
def is_clean(nb):
    try:
        nbformat.validate(nbformat.from_dict(nb.raw))
    except nbformat.ValidationError as e:
        yield f"it isn't a valid notebook: {str(e).splitlines()[0]}"
    ids = [cell.raw.get("id") for cell in nb.cells]
    if None in ids or len(set(ids)) < len(ids):
        yield "cells have no ids, or repeated ones; run `make export`"
    if nb.raw["metadata"].get("kernelspec", {}).get("name") != "python3":
        yield "its kernel isn't python3, the one that is there everywhere; choose it and save"
    if others := set(nb.raw["metadata"]) - {"kernelspec"}:
        yield f"its metadata holds {', '.join(sorted(others))}; run `make export`"
    counted = [c for c in nb.cells if any(part.get("execution_count") is not None for part in (c.raw, *c.outputs))]
    if counted:
        yield f"{counted[0]} and {len(counted) - 1} more have an execution count; run `make export`"
    if others := {key for cell in nb.cells for key in cell.raw["metadata"]} - {"tags"}:
        yield f"its cells have metadata {', '.join(sorted(others))}; run `make export`"


# The tests

cases = [(check, path) for kind, checks in rules.items() for check in checks for path in notebooks[kind]]


@pytest.mark.parametrize(
    "check, path", cases, ids=[f"{check.__name__}-{path.relative_to(nbs).with_suffix('')}" for check, path in cases]
)
def test_rule(check, path):
    problems = list(check(read(path)))
    assert not problems, "\n".join(f"{path.relative_to(root)}: {problem}" for problem in problems)


def test_there_are_notebooks():
    assert notebooks["modules"], "nbs/ has no numbered notebooks; this test looks in the wrong folder"


@pytest.mark.parametrize("name", ["finetune", "evaluate", "extract", "quickstart"])
def test_run_notebooks_are_there(name):
    assert (nbs / "runs" / f"{name}.ipynb").is_file()


@pytest.mark.parametrize("folder", ["runs", "bench", "course"])
def test_run_notebooks_are_left_out_of_nbdev_test(folder):
    assert (nbs / folder / ".notest").exists(), f"nbs/{folder}/.notest is gone: without it nbdev_test runs these notebooks"


def test_every_module_has_its_notebook():
    modules = {path.stem for path in (root / "w2v2nb").glob("*.py")} - {"__init__", "_modidx"}
    exported = {read(path).module for path in notebooks["modules"]}
    assert modules == exported, f"only a module or only a notebook: {sorted(modules ^ exported)}; run `make export`"


# Each rule against a notebook that breaks it


def code(source, *outputs, **metadata):
    return nbformat.v4.new_code_cell(source, outputs=list(outputs), metadata=metadata)


def text(source):
    return nbformat.v4.new_markdown_cell(source)


def shown(**data):
    return nbformat.v4.new_output("display_data", data={key.replace("_", "/", 1): value for key, value in data.items()})


def make(*cells, name="03_transforms", title=True):
    "A notebook that keeps all rules, and the given cells after its beginning."
    module = name.partition("_")[2]
    head = [code(f"#| default_exp {module}"), text(f"# {module}\n\n> A sentence"), text("Prose. " * 200)]
    cells = [*(head if title else []), *cells]
    cells = [nbformat.from_dict(cell | {"id": str(number)}) for number, cell in enumerate(cells)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nb = nbformat.v4.new_notebook(metadata=kernel, cells=cells)
    return Notebook(nbs / f"{name}.ipynb", json.loads(nbformat.writes(nb)))


good = """#| export
def halve(
    x: float,  # a number
    n: int = 1,  # how often
) -> float:
    "Half of `x`, `n` times over."
    return x / 2**n"""
png = base64.b64encode(b"\x89PNG").decode()
tagged = code("prefix: str = ''  # folder", tags=["parameters"])

first = code("#| default_exp transforms")

broken = [
    (numbered, make(name="3_transforms"), "NN_name"),
    (numbered, make(name="03_Transforms"), "NN_name"),
    (opens_with_its_name, [code("#| default_exp other"), text("# transforms\n\n> S"), text("p")], "only `#|"),
    (opens_with_its_name, [text("# transforms"), code("1"), code("2")], "should be a code cell"),
    (opens_with_its_name, [first, text("# transforms\n\n> S\n\nmore"), text("p")], "nothing else"),
    (opens_with_its_name, [first, text("# transforms\n\n> S"), code("1")], "should be markdown"),
    (imports_point_down, [code("from w2v2nb.report import plot_roc")], "lower numbers"),
    (imports_point_down, [code("#| export\nfrom w2v2nb.transforms import Mono")], "lower numbers"),
    (imports_point_down, [code("#| export\ndef f():\n    from w2v2nb import report")], "lower numbers|no notebook"),
    (imports_point_down, [code("import w2v2nb.nowhere")], "no notebook exports"),
    (imports_point_down, [code("from .audio import decode")], "relatively"),
    (exported_imports_are_explicit, [code("#| export\nfrom numpy import *")], r"imports \* from numpy"),
    (exported_imports_are_explicit, [code("#| export\nfrom fastcore.basics import L")], "users don't install"),
    (exported_imports_are_explicit, [code("#| exporti\ndef f():\n    import nbdev.export")], "users don't install"),
    (exported_cells_hold_one_kind, [code("#| export\nimport os\ndef f(): pass")], "mixes imports"),
    (exported_cells_hold_one_kind, [code("#| export\ndef f(): pass\nf()")], "bare expression"),
    (exported_code_keeps_to_plain_python, [code("#| export\ndef f(x):\n    assert x")], "assert"),
    (exported_code_keeps_to_plain_python, [code("#| export\n@patch\ndef f(self: int): pass")], "exports patch"),
    (exported_code_keeps_to_plain_python, [code("#| export\ndef f(self):\n    store_attr()")], "store_attr"),
    (parameters_are_documented, [code("#| export\ndef f(x): pass")], "no type for x"),
    (parameters_are_documented, [code("#| export\ndef f(x: int, y: int): pass  # both")], "what x is"),
    (parameters_are_documented, [code("#| export\ndef f(\n    x: int,  # it\n    y: int,\n): pass")], "what y is"),
    (parameters_are_documented, [code("#| export\nclass A:\n    def __init__(self, x): pass")], "__init__ has no type"),
    (parameters_are_documented, [code("#| export\ndef f(*, x: int, **more): pass")], "what more is"),
    (public_names_have_docstrings, [code("#| export\nclass A: pass")], "A has no docstring"),
    (public_names_have_docstrings, [code("#| export\ndef f():\n    return 1")], "f has no docstring"),
    (definitions_are_introduced, [code("1"), code(good)], "put a sentence"),
    (definitions_are_shown, [code(good), code(good), code(good), code("halve(1.0)")], "2 definitions before it"),
    (definitions_are_shown, [code(good)], "never used"),
    (stays_small, [code("1")] * 88, "91 cells"),
    (stays_small, [code("#| export\n" + "x = 1\n" * 251)], "exports 251 lines"),
    (prose_carries_the_code, [code("x = 1\n" * 200)], "say more"),
    (one_cell_holds_the_parameters, [], "0 cells"),
    (one_cell_holds_the_parameters, [tagged, tagged], "2 cells"),
    (one_cell_holds_the_parameters, [code("x = 1\nprint(x)", tags=["parameters"])], "line 2"),
    (calls_and_does_not_define, [code("if True:\n    def f(): pass")], "defines"),
    (calls_and_does_not_define, [code("class A: pass")], "defines"),
    (calls_and_does_not_define, [code("from fastcore.test import test_eq")], "production image"),
    (calls_and_does_not_define, [code("1")] * 23, "26 cells"),
    (runs_from_any_folder, [code("x = '../data'")], "relative path ../data"),
    (runs_from_any_folder, [code("import pandas as pd\npd.read_csv('data/train.csv')")], "opens the relative path"),
    (runs_from_any_folder, [code("from pathlib import Path\nPath.cwd()")], "cwd"),
    (runs_from_any_folder, [code("%cd somewhere")], "%cd"),
    (code_is_python, [code("def f(:")], "isn't Python"),
    (cells_stay_short, [code("x = 1\n" * 41)], "41 lines"),
    (cells_stay_short, [code("x = 1\n" * 41, tags=["other"])], "41 lines"),
    (reads_on_github, [text("::: {.callout}\nx\n:::")], "quarto"),
    (reads_on_github, [code("from nbdev.showdoc import show_doc")], "show_doc"),
    (reads_on_github, [code("#| eval: false\n1")], "eval: false"),
    (reads_on_github, [code("# ---------\nx = 1")], "banner"),
    (pictures_are_few_and_small, [code("1", *[shown(image_png=png)] * 4)], "4 pictures"),
    (pictures_are_few_and_small, [code("1", shown(image_png=base64.b64encode(bytes(102400)).decode()))], "100 KB"),
    (pictures_are_few_and_small, [code("1", shown(**{"image_svg+xml": "<svg/>"}))], "svg"),
    (is_clean, [code("1", lines_to_next_cell=1)], "have metadata lines_to_next_cell"),
]
broken += [
    (outputs_are_true_everywhere, [code("1", nbformat.v4.new_output("stream", text=line))], what)
    for line, what in [
        ("saved to /tmp/x.csv", "absolute path"),
        ("PosixPath('/home/ann/x')", "absolute path"),
        ("100%|##########| 3/3", "progress bar"),
        ("3/3 [00:01<00:00, 2.50it/s]", "progress bar"),
        ("Wall time: 3 s", "execution time"),
        ("started 2026-11-22T14:00:01", "execution time"),
        ("<function f at 0x7f00deadbeef>", "memory address"),
    ]
]
broken += [
    (outputs_are_true_everywhere, [code("1", output)], what)
    for output, what in [
        (nbformat.v4.new_output("stream", name="stderr", text="warning"), "stderr"),
        (nbformat.v4.new_output("error", ename="ValueError", evalue="x", traceback=[]), "an error"),
        (shown(text_html="<audio controls>"), "audio player"),
        (shown(**{"application_vnd.jupyter.widget-view+json": {}}), "widget"),
    ]
]


def as_notebook(cells, check):
    "The case's notebook: made of cells, which stand alone for the rule about the beginning."
    return cells if isinstance(cells, Notebook) else make(*cells, title=check is not opens_with_its_name)


@pytest.mark.parametrize("check, cells, sentence", broken, ids=[check.__name__ for check, _, _ in broken])
def test_rule_catches(check, cells, sentence):
    problems = list(check(as_notebook(cells, check)))
    assert any(re.search(sentence, problem) for problem in problems), problems


def test_every_rule_is_shown_a_notebook_that_breaks_it():
    assert {check for check, _, _ in broken} == {check for checks in rules.values() for check in checks}


@pytest.mark.parametrize("check", rules["modules"] + rules["everything"], ids=lambda check: check.__name__)
def test_rule_lets_a_good_notebook_pass(check):
    nb = make(
        code("#| export\nimport os\n\nfrom w2v2nb.storage import join"),
        text("A sentence."),
        code(good),
        code("halve(1.0)", nbformat.v4.new_output("execute_result", data={"text/plain": "0.5"})),
        code("#| export\nlimit_s = 30.0  # seconds"),
    )
    assert not list(check(nb))


@pytest.mark.parametrize("check", rules["runs"] + rules["everything"], ids=lambda check: check.__name__)
def test_rule_lets_a_good_run_notebook_pass(check):
    many = code("\n".join(f"x{i}: int = {i}  # a number" for i in range(max_cell_lines + 1)), tags=["parameters"])
    nb = make(many, code("import pandas as pd\npd.read_csv(f'{prefix}/x.csv')"), name="runs/some", title=False)
    assert not list(check(nb))
