"""`w2v2nb papermill`: parameters judged before a kernel starts, one upload, the executed notebook also of a failure."""

import base64

import nbformat
import pytest
from cloud import Fault

from w2v2nb import samples
from w2v2nb.__main__ import main
from w2v2nb.config import ConfigError
from w2v2nb.notebooks import NotebookError, prepare, read_value, run_notebook

SOURCE = "n: int = 1\nrate: float = 0.5\nis_on: bool = False\nname: str = 'x'\nanything = None"


def notebook(*cells, kernel="conda-base-py"):
    "The text of a notebook as Workbench saves it: with a kernel that is nowhere else."
    tagged = nbformat.v4.new_code_cell(SOURCE, metadata={"tags": ["parameters"]})
    made = [nbformat.v4.new_markdown_cell("# Adding up"), tagged, *map(nbformat.v4.new_code_cell, cells)]
    about = {"kernelspec": {"name": kernel, "display_name": kernel, "language": "python"}}
    return nbformat.writes(nbformat.v4.new_notebook(cells=made, metadata=about))


@pytest.fixture
def path(tmp_path):
    (tmp_path / "add.ipynb").write_text(notebook("print(n + 1, rate, is_on, name)"))
    return tmp_path / "add.ipynb"


def printed(text):
    cells = nbformat.reads(text, as_version=4).cells
    return [out["text"].strip() for cell in cells if cell.cell_type == "code" for out in cell.outputs if "text" in out]


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("false", "", False),
        ("True", "bool", True),
        ("1e-5", "float", 1e-5),
        ("1E5", "", 1e5),
        ("-2", "int", -2),
        ("None", "", None),
        ("null", "str", None),
        ("000123", "str", "000123"),
        ("false", "str", "false"),
        ("[1, 2]", "", [1, 2]),
        ("a: b", "str", "a: b"),
    ],
)
def test_values_of_a_command_line(text, kind, value):
    found = read_value(text, kind)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"nmae": "x"}, "nmae is not a parameter of add.ipynb; did you mean name?"),
        ({"n": "three"}, "n is 'three' but should be of type int"),
        ({"n": True}, "n is True but should be of type int"),
        ({"is_on": "false"}, "is_on is 'false' but should be of type bool"),
        ({"is_on": 1}, "is_on is 1 but should be of type bool"),
        ({"name": 3, "rate": "x"}, "name is 3 but should be of type str; rate is 'x' but should be of type float"),
    ],
)
def test_wrong_parameters_are_told_before_a_kernel_starts(path, tmp_path, given, sentence):
    with pytest.raises(ConfigError) as caught:
        run_notebook(path, tmp_path / "out.ipynb", given)
    assert str(caught.value) == sentence and not (tmp_path / "out.ipynb").exists()


def test_a_run_notebook_is_judged_by_the_configuration(tmp_path):
    notebook = "nbs/runs/extract.ipynb"
    for given, words in [({"prefix": "a"}, "extraction needs data_split_root"), ({"pooling_mode": "median"}, "pooling_mode")]:
        with pytest.raises(ConfigError, match=words):
            run_notebook(notebook, tmp_path / "out.ipynb", given)
    for layer in (0, "all", "0,6,12"):  # the cell declares an int, its default
        with pytest.raises(ConfigError, match="extraction needs data_split_root"):
            run_notebook(notebook, tmp_path / "out.ipynb", {"prefix": "a", "layer": layer})


def test_what_is_no_notebook_and_an_unknown_kernel_are_told(path, tmp_path, capsys):
    (tmp_path / "text.ipynb").write_text("n = 1")
    for name, words in [("text.ipynb", "is not a notebook"), ("none.ipynb", "does not exist")]:
        assert main(["papermill", str(tmp_path / name), str(tmp_path / "out.ipynb")]) == 2
        assert words in capsys.readouterr().err
    assert main(["papermill", "s3://b/x.ipynb", "o.ipynb"]) == 2 and "begins with gs://" in capsys.readouterr().err
    assert main(["papermill", str(path), str(tmp_path)]) == 2 and "is a folder; OUT" in capsys.readouterr().err
    assert main(["papermill", str(path), str(tmp_path / "out.ipynb"), "-k", "conda-base-py"]) == 2
    assert "there is no kernel conda-base-py on this machine; it has: " in capsys.readouterr().err
    assert main(["papermill", str(path)]) == 2 and "out" in capsys.readouterr().err
    for pair, words in [(["n"], "takes a name and a value"), (["anything", "[1"], "'[1' is not a value as in YAML")]:
        assert main(["papermill", str(path), str(tmp_path / "out.ipynb"), "-p", *pair]) == 2
        assert words in capsys.readouterr().err


def test_negative_values_are_values(path, tmp_path):
    assert main(["papermill", str(path), str(tmp_path / "out.ipynb"), "-p", "rate", "-1e-5", "-p", "n", "-3"]) == 0
    assert printed((tmp_path / "out.ipynb").read_text()) == ["-2 -1e-05 False x"]


def test_a_saved_run_notebook_has_its_own_values(tmp_path):
    import re

    source = open("nbs/runs/extract.ipynb").read()
    filled = re.sub(r"(prefix: str) = None", r"\1 = '/no/recordings'", source)
    (tmp_path / "mine.ipynb").write_text(filled)
    with pytest.raises(ConfigError) as caught:
        run_notebook(tmp_path / "mine.ipynb", tmp_path / "out.ipynb", {"exp_dir": str(tmp_path / "x")})
    assert "data_split_root" in str(caught.value) and "prefix" not in str(caught.value)


def test_a_kernel_that_dies_and_a_bucket_that_refuses_are_told(bucket, tmp_path, capsys):
    (tmp_path / "dies.ipynb").write_text(notebook("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    assert main(["papermill", str(tmp_path / "dies.ipynb"), str(tmp_path / "out.ipynb")]) == 1
    assert "the kernel of dies.ipynb died" in capsys.readouterr().err
    (tmp_path / "add.ipynb").write_text(notebook("print(n + 1)"))
    bucket.proxy.add(Fault(403, method="POST"))
    assert main(["papermill", str(tmp_path / "add.ipynb"), f"{bucket.uri}/out.ipynb"]) == 1
    kept = capsys.readouterr().err.strip().rpartition(" ")[2]
    assert printed(open(kept).read()) == ["2"]


def test_the_command_runs_with_a_file_and_single_parameters(path, tmp_path, capsys):
    (tmp_path / "p.yaml").write_text("n: 5\nrate: 1e-5\nname: '007'\n")
    out = tmp_path / "results" / "out.ipynb"
    assert main(["papermill", str(path), str(out), "-f", str(tmp_path / "p.yaml"), "-p", "n", "41", "-p", "is_on", "true"]) == 0
    assert printed(out.read_text()) == ["42 1e-05 True 007"]
    told = capsys.readouterr().out
    assert "cell 2 of 4: Adding up (after " in told and "42 1e-05 True 007" in told and f"written: {out}" in told
    assert "Ending Cell" not in told


def test_a_failing_notebook_is_kept_and_told_in_a_sentence(tmp_path, capsys):
    (tmp_path / "bad.ipynb").write_text(notebook("print('so far')", "1 / 0", "print('never')"))
    assert main(["papermill", str(tmp_path / "bad.ipynb"), str(tmp_path / "out.ipynb")]) == 1
    assert "cell 4 of bad.ipynb failed: ZeroDivisionError: division by zero" in (told := capsys.readouterr().err)
    assert "Traceback" not in told and printed((tmp_path / "out.ipynb").read_text())[:1] == ["so far"]


def test_everything_in_a_bucket_and_one_upload(bucket, capsys):
    bucket.put("nb/add.ipynb", notebook("print(n + 1)"))
    bucket.put("nb/bad.ipynb", notebook("1 / 0"))
    bucket.put("nb/p.yaml", "n: 41\n")
    done, uri = "/gcs/" + bucket.name + "/done", f"{bucket.uri}/nb"
    assert main(["papermill", f"{uri}/add.ipynb", f"{done}/add.ipynb", "-f", f"{uri}/p.yaml"]) == 0
    assert printed(bucket.get("done/add.ipynb")) == ["42"] and f"written: {bucket.uri}/done/add.ipynb" in capsys.readouterr().out
    assert len(bucket.proxy.seen("POST", "/upload")) == 1
    with pytest.raises(NotebookError, match="ZeroDivisionError"):
        run_notebook(f"{uri}/bad.ipynb", f"{bucket.uri}/done/bad.ipynb")
    assert b"ZeroDivisionError" in bucket.get("done/bad.ipynb")


def test_a_run_notebook_runs_with_everything_in_a_bucket(bucket, tmp_path):
    bucket.put("extract.ipynb", open("nbs/runs/extract.ipynb", "rb").read())
    given = dict(prefix=samples.prefix(), data_split_root=f"{samples.split_root()}/test.csv", checkpoint=samples.checkpoint())
    given |= dict(exp_dir=f"{bucket.uri}/run", clip_length=8000, device="cpu", dataset="s")
    run_notebook(f"{bucket.uri}/extract.ipynb", f"{bucket.uri}/done.ipynb", given)
    assert {"done.ipynb", "run/run.json", "run/s_embeddings.parquet"} <= {*bucket.names()}


def test_the_notebook_itself_is_not_changed(path, tmp_path):
    before = path.read_bytes()
    (tmp_path / "copy").mkdir()
    assert "conda-base-py" not in prepare(path, tmp_path / "copy").read_text()
    assert path.read_bytes() == before


def test_a_view_is_kept_as_its_static_form(tmp_path):
    show = "from w2v2nb.table import as_table\nfrom w2v2nb.views import Card, Shelf\nfrom w2v2nb import samples\n"
    show += "table = as_table(samples.split_root() + '/test.csv')\ncard = Card(Shelf(table, samples.prefix()))\n"
    show += "card.show(table['uid'][0])\ncard"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(show)]), tmp_path / "look.ipynb")
    run_notebook(tmp_path / "look.ipynb", tmp_path / "out.ipynb")
    executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    text, picture = executed.cells[-1].outputs
    assert "<p>waveform and mel spectrogram" in text.data["text/html"] and "<style" not in text.data["text/html"]
    assert base64.b64decode(picture.data["image/png"]).startswith(b"\x89PNG") and "mel spectrogram" in picture.data["text/plain"]
    assert "widgets" not in executed.metadata
