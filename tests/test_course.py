"""The course in nbs/course, each notebook in a real kernel as a reader runs it, within two minutes."""

import base64
import io
import json
import re
import tempfile
from pathlib import Path

import matplotlib.image
import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

course = Path(__file__).parent.parent / "nbs" / "course"
names = sorted(path.stem for path in course.glob("[0-9]*.ipynb"))
limit_s = 120

# name: (what its cells must print, what its tables must show, its pictures)
expected = {
    "1_first_embeddings": (
        ["samples_embeddings.parquet", "run.json", "below 0.0001: True", "48 recordings"], ["buttercup", "monopitch"], 1
    ),
    "2_your_own_csv": (
        ["semicolons.csv: the file has no column uid", "stands in more than one row", "uid is empty in row 2", "nearest"],
        ["kappa_quadratic", "difference"],
        0,
    ),
    "3_finetune_and_evaluate": (["people in both: 0", "the same AUC: True"], ["AUC", "strained"], 2),
    "4_what_the_layers_know": (["so the layers are [0, ", "= recordings, layers"], ["AUC", "chosen layer", "weighted"], 1),
    "5_finding_bad_recordings": (["is empty (0 bytes)", "is not a recording"], ["clipped_percent"], 1),
    "6_a_week_of_papermill": (
        ["mean done", "mean_std done", "did you mean learning_rate?", "samples_metrics.csv", "state        killed", "80 epochs",
         "state        finished"],
        ["pooling_mode", "strained"],
        0,
    ),
}  # fmt: skip


def read(name):
    return nbformat.read(course / f"{name}.ipynb", as_version=4)


def shown(notebook, kind):
    "What the cells show of a kind, such as text/html; the texts that are printed as text/plain."
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = [o["text"] for o in outputs if o["output_type"] == "stream" and o["name"] == "stdout" and kind == "text/plain"]
    return printed + [o["data"][kind] for o in outputs if kind in o.get("data", {})]


def pictures(notebook):
    "The PNGs that cells show, by themselves or inside HTML."
    inside = re.findall(r'src="data:image/png;base64,([^"]+)"', "".join(shown(notebook, "text/html")))
    return [matplotlib.image.imread(io.BytesIO(base64.b64decode(data))) for data in shown(notebook, "image/png") + inside]


@pytest.fixture(scope="module", params=names)
def executed(request, tmp_path_factory):
    "Name and notebook, run with a temporary folder of its own, which is tempfile's in the kernel."
    home, notebook = tmp_path_factory.mktemp(request.param), read(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(home))
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.setattr(tempfile, "tempdir", None)
        client = NotebookClient(notebook, timeout=limit_s, kernel_name="python3", resources={"metadata": {"path": str(course)}})
        try:
            client.execute()
        except CellExecutionError as e:
            pytest.fail(f"{request.param}: {e}")
    return request.param, notebook, home


def test_there_is_a_course():
    assert names == sorted(expected) and len(names) == 6


def test_what_must_come_out_comes_out(executed):
    name, notebook, _ = executed
    printed, tables, n_pictures = expected[name]
    text, html = "\n".join(shown(notebook, "text/plain")), "\n".join(shown(notebook, "text/html"))
    assert [line for line in printed if line not in text] == []
    assert [word for word in tables if word not in html] == []
    assert len(shown(notebook, "image/png")) >= n_pictures


def test_pictures_are_not_blank(executed):
    _, notebook, _ = executed
    blank = [i for i, picture in enumerate(pictures(notebook)) if picture.std() < 0.01]
    assert blank == []


def test_results_are_in_the_temporary_folder(executed):
    name, _, home = executed
    runs = {"1_first_embeddings": 1, "3_finetune_and_evaluate": 3, "4_what_the_layers_know": 2, "5_finding_bad_recordings": 1}
    runs |= {"2_your_own_csv": 0, "6_a_week_of_papermill": 3}
    about = [json.loads(path.read_text()) for path in home.glob("*/*/run.json")]
    assert len(about) == runs[name] and {run["state"] for run in about} <= {"finished"}


def test_the_bad_recordings_are_found(executed):
    name, _, home = executed
    if name != "5_finding_bad_recordings":
        pytest.skip("about the fifth notebook only")
    (failures,) = home.glob("*/run/clinic_failures.csv")
    assert len(failures.read_text().splitlines()) == 3  # a header, the empty file and the text


@pytest.mark.parametrize("name", names)
def test_committed_outputs_are_static(name):
    notebook = read(name)
    kinds = {kind for cell in notebook.cells for output in cell.get("outputs", []) for kind in output.get("data", {})}
    assert kinds, "it is committed without its outputs: run tools/outputs.py"
    assert not any("widget" in kind for kind in kinds) and all(picture.std() >= 0.01 for picture in pictures(notebook))


@pytest.mark.parametrize("name", names)
def test_each_ends_with_exercises_and_reading(name):
    last = read(name).cells[-1]["source"]
    assert "## Exercises" in last and "## What to read next" in last
    for path in re.findall(r"`(nbs/[\w/]+\.ipynb)`", last):
        assert (course.parent.parent / path).exists(), f"{name} points to {path}, which isn't there"
    for path in re.findall(r"`(\d_\w+\.ipynb)`", last):
        assert (course / path).exists(), f"{name} points to {path}, which isn't there"
