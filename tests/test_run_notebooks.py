"""The run notebooks through papermill, in a real kernel, from another folder than their own."""

import importlib.util
import json
import shutil
from pathlib import Path

import pandas as pd
import papermill
import pytest

from w2v2nb import samples
from w2v2nb.config import Config
from w2v2nb.display import STATIC

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "nbs" / "runs"
spec = importlib.util.spec_from_file_location("parameters", ROOT / "tools" / "parameters.py")
parameters = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parameters)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    for name, n in (("train", 16), ("test", 12)):
        pd.read_csv(f"{samples.split_root()}/{name}.csv", dtype={"uid": str}).head(n).to_csv(folder / f"{name}.csv", index=False)
    shutil.copy(samples.label_txt(), folder / "labels.txt")
    return folder


def run(name, tmp_path, **values):
    "Execute a run notebook in `tmp_path`; return the executed notebook."
    out = tmp_path / f"{name}_out.ipynb"
    papermill.execute_notebook(RUNS / f"{name}.ipynb", out, values, cwd=tmp_path, progress_bar=False, kernel_name="python3")
    return json.loads(out.read_text())


def mimes(notebook):
    return {mime for cell in notebook["cells"] for output in cell.get("outputs", []) for mime in output.get("data", {})}


def pictures(notebook):
    "How many pictures each cell that shows some shows."
    shown = [[json.dumps(output.get("data", {})) for output in cell.get("outputs", [])] for cell in notebook["cells"]]
    counts = [sum('"image/png"' in data or STATIC in data for data in outputs) for outputs in shown]
    return [count for count in counts if count]


def text(notebook):
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return "\n".join("".join(o.get("text", [])) + "".join(o.get("data", {}).get("text/plain", [])) for o in outputs)


@pytest.mark.parametrize(("stem", "mode"), parameters.RUNS.items())
def test_the_parameters_cell_is_the_configuration_s(stem, mode):
    notebook = json.loads((RUNS / f"{stem}.ipynb").read_text())
    (cell,) = [c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert "".join(cell["source"]) == parameters.parameters_cell(mode)


@pytest.mark.parametrize("stem", [*parameters.RUNS, "quickstart"])
def test_papermill_s_help_knows_every_parameter_with_its_type_and_help(stem):
    known = papermill.inspect_notebook(str(RUNS / f"{stem}.ipynb"))
    if stem in parameters.RUNS:
        mode = parameters.RUNS[stem]
        fields = {name for name, field in Config.model_fields.items() if mode in field.json_schema_extra["modes"]}
        assert {*known} == fields - parameters.NOT_HERE
    for name, about in known.items():
        assert about["inferred_type_name"] in ("str", "int", "float", "bool"), name
        assert about["help"], name


def test_finetune_then_evaluate_then_extract(split, tmp_path):
    given = dict(prefix=samples.prefix(), data_split_root=str(split), device="cpu")
    tuned = run("finetune", tmp_path, **given, label_txt=str(split / "labels.txt"), checkpoint=samples.checkpoint(),
                exp_dir="tuned", dataset="few", epochs="2", learning_rate="3e-3", freeze="true")  # fmt: skip
    assert {"image/png", "text/html"} <= mimes(tuned) and "audio" in json.dumps(tuned)
    assert pictures(tuned) == [1, 1, 1]  # a recording, the live curves, the test
    assert "lora_rank" in text(tuned)  # pandas would leave out the middle of so long a table
    about = json.loads((tmp_path / "tuned" / "run.json").read_text())
    assert about["state"] == "finished" and about["parameters"]["learning_rate"] == 0.003 and about["counts"]["rows"] == 12

    run("evaluate", tmp_path, **given, mdl_path="tuned/few_model", exp_dir="measured")
    first, again = (pd.read_csv(tmp_path / f) for f in ("tuned/few_predictions.csv", f"measured/{split.name}_predictions.csv"))
    pd.testing.assert_frame_equal(first, again, rtol=0, atol=1e-6)

    given["data_split_root"] = str(split / "test.csv")
    extracted = run("extract", tmp_path, **given, mdl_path="tuned/few_model", exp_dir="embeddings", layer="0,-1")
    table = pd.read_parquet(tmp_path / "embeddings" / "test_embeddings.parquet")
    assert len(table) == 12 and list(table) == ["uid", "embedding_0", "embedding_3"] and "(12, 80)" in text(extracted)


@pytest.mark.parametrize(
    ("values", "files", "shown"),
    [
        (dict(layer="all"), {"search", "history", "model"}, [1, 2, 1]),  # a recording; layers and the best one's curves; the test
        (dict(search="dropout=0,0.5", val_share=4), {"search", "history", "model"}, [1, 2, 1]),
        (dict(layer="weighted", augment="noise,specaugment"), {"history", "model"}, [1, 1, 1, 1, 1]),  # effects, live, weights
        (dict(folds=2, repeats=2), {"folds", "history"}, [1, 1]),
    ],
    ids=["sweep", "search", "weighted and augmented", "folds"],
)
def test_finetune_tells_the_story_of_a_study(split, tmp_path, values, files, shown):
    given = dict(prefix=samples.prefix(), data_split_root=str(split), label_txt=str(split / "labels.txt"), device="cpu")
    given |= dict(checkpoint=samples.checkpoint(), exp_dir="study", dataset="few", epochs=1, val_share=0.25, loss="BCE")
    notebook = run("finetune", tmp_path, **given | values)
    assert pictures(notebook) == shown
    written = {path.stem.removeprefix("few_") for path in (tmp_path / "study").iterdir()}
    assert files <= written and not ({"search", "history", "model", "folds"} - files) & written
    if "folds" in values:
        assert "fold 2" in text(notebook) and "AUC_sd" in text(notebook)


def test_finetune_shows_grades_too(split, tmp_path):
    for part in ("train", "test"):
        table = pd.read_csv(split / f"{part}.csv", dtype={"uid": str})
        table["strained"] = table["strained"].map({0: 1, 1: 4})
        table[["uid", "subject", "strained"]].to_csv(tmp_path / f"{part}.csv", index=False)
    (tmp_path / "labels.txt").write_text("strained\n")
    given = dict(prefix=samples.prefix(), data_split_root=str(tmp_path), label_txt=str(tmp_path / "labels.txt"), device="cpu")
    notebook = run("finetune", tmp_path, **given, checkpoint=samples.checkpoint(), exp_dir="o", loss="CORN", scale="clinical")
    assert pictures(notebook) == [1, 1, 1] and "kappa" in text(notebook)


def test_quickstart_needs_no_parameters(tmp_path):
    notebook = run("quickstart", tmp_path, epochs=2)
    assert "image/png" in mimes(notebook) and "monopitch" in text(notebook)
    assert {path.name for path in tmp_path.iterdir()} == {"quickstart_out.ipynb"}


@pytest.mark.parametrize(
    ("stem", "values", "sentences"),
    [
        ("finetune", {}, ["ConfigError: finetune needs prefix, data_split_root, label_txt, exp_dir"]),
        ("evaluate", {}, ["ConfigError: eval-only needs prefix, data_split_root, exp_dir, mdl_path"]),
        (
            "extract",
            dict(prefix="a", data_split_root="b.csv", exp_dir="out", bach_size=4, epochs=2, clip_length="three", trim="perhaps"),
            ["bach_size is not a parameter, did you mean batch_size?", "clip_length is 'three' but should be a", "trim"],
        ),
    ],
)
def test_wrong_parameters_stop_before_any_work_with_one_sentence(tmp_path, stem, values, sentences):
    with pytest.raises(papermill.PapermillExecutionError) as e:
        run(stem, tmp_path, **values)
    assert e.value.ename == "ConfigError"
    assert all(sentence in str(e.value) for sentence in sentences)
    executed = json.loads((tmp_path / f"{stem}_out.ipynb").read_text())
    (error,) = [o for c in executed["cells"] for o in c.get("outputs", []) if o.get("output_type") == "error"]
    assert len(error["traceback"]) == 1 and "\n" not in error["traceback"][0]
    assert not (tmp_path / "out").exists()
