"""The tutorial "On Vertex Workbench", from an empty bucket to a job's request, in a real kernel, as papermill runs it."""

import json
from pathlib import Path

import pandas as pd
import papermill
import pytest

from w2v2nb import samples, storage

TUTORIAL = Path(__file__).parent.parent / "nbs" / "runs" / "vertex_workbench.ipynb"


def run(tmp_path, **values):
    out = tmp_path / "executed.ipynb"
    papermill.execute_notebook(TUTORIAL, out, values, cwd=tmp_path, progress_bar=False, kernel_name="python3")
    return json.loads(out.read_text())


def text(notebook):
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return "\n".join("".join(o.get("text", [])) + "".join(o.get("data", {}).get("text/plain", [])) for o in outputs)


def test_from_an_empty_bucket_to_a_job(bucket, tmp_path):
    folder = f"{bucket.uri}/study"
    printed = text(run(tmp_path, bucket=folder, epochs=2))
    assert f"ok  list:     {folder} can be listed; nothing is there yet" in printed and "ok  remove:" in printed
    names = bucket.names()
    home = Path(samples.prefix()).parent
    copied = {f"study/samples/{path.relative_to(home).as_posix()}" for path in home.rglob("*") if path.is_file()}
    assert copied <= {*names} and all(name.startswith("study/") for name in names)
    assert {f"study/{name}" for name in ("embeddings/run.json", "model/run.json", "model/samples_metrics.csv")} <= {*names}
    assert not any(".w2v2nb-doctor" in name for name in names)
    with storage.stage(f"{folder}/embeddings/test_embeddings.parquet").open("rb") as file:
        n_rows = len(pd.read_csv(Path(samples.split_root()) / "test.csv"))
        assert len(pd.read_parquet(file)) == n_rows
    assert f"{folder}/model holds a finished run of {n_rows} rows" in printed
    assert '"strategy": "SPOT"' in printed and f'"outputUriPrefix": "{folder}/job"' in printed
    assert {path.name for path in tmp_path.iterdir()} == {"executed.ipynb", "machine-cache"}


def test_papermill_s_help_knows_its_parameters():
    known = papermill.inspect_notebook(str(TUTORIAL))
    assert {name: about["inferred_type_name"] for name, about in known.items()} == {"bucket": "str", "epochs": "int"}
    assert all(about["help"] for about in known.values())


def test_without_a_bucket_of_one_s_own_it_stops_with_a_sentence(bucket, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError) as e:
        run(tmp_path, bucket=f"{bucket.uri}-of-old/study")
    assert e.value.ename == "ObjectNotFound" and f"there is no bucket {bucket.name}-of-old" in str(e.value)
