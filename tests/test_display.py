"""What notebooks show of a run's folder, an encoder and a model."""

import pandas as pd
import pytest

from w2v2nb import loading, samples
from w2v2nb.config import configure
from w2v2nb.encoder import Encoder
from w2v2nb.folder import RunFolder
from w2v2nb.model import Classifier
from w2v2nb.run import start

HOSTILE = "<script>alert(1)</script> & Ä"


@pytest.fixture(scope="module")
def encoder():
    return Encoder.from_pretrained(samples.checkpoint(), device="cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A finished fine-tuning on a few recordings, one of which does not exist."
    folder = tmp_path_factory.mktemp("runs & <more>")
    for name, n in (("train", 16), ("test", 12)):
        table = pd.read_csv(f"{samples.split_root()}/{name}.csv", dtype={"uid": str}).head(n)
        table.loc[3, "uid"] = f"none <{name}>"
        table.to_csv(folder / f"{name}.csv", index=False)
    inputs = dict(prefix=samples.prefix(), data_split_root=str(folder), label_txt=samples.label_txt(), dataset="few")
    return start(configure(exp_dir=f"{folder}/out", checkpoint=samples.checkpoint(), batch_size=4, **inputs))


def test_a_run_s_folder_shows_record_counts_metrics_failures_and_files_and_reads_no_sound(run, monkeypatch):
    monkeypatch.setattr(loading, "decode", None)
    shown = RunFolder(run.path)._repr_html_()
    cells = shown.replace("<td", "\n<td").replace("</td>", "\n").splitlines()
    values = [cell.partition(">")[2] for cell in cells if cell.startswith("<td")]
    assert {"finetune, few", "finished", run.about["started"], run.about["finished"], "11"} <= {*values}
    assert "recordings set aside" in shown and "set aside, the first rows" in shown and "none &lt;test&gt;" in shown
    metrics = pd.read_csv(run / "metrics.csv")
    assert "AUC" in shown and metrics["Label"].iloc[0] in shown and f"{metrics['AUC'].iloc[0]:.3g}" in shown
    for path in run.files():
        assert path.name in shown
    assert "few_model/" in shown and "kB" in shown and "learning_rate" in shown
    assert "runs &amp; &lt;more&gt;" in shown or "<more>" not in shown


def test_a_folder_without_a_run_is_a_sentence_and_a_broken_one_an_error_that_says_so(tmp_path):
    assert "no/such holds no run (no run.json); give the exp_dir of a run" in RunFolder("no/such")._repr_html_()
    assert RunFolder(tmp_path)._repr_html_().startswith("<p>")
    (tmp_path / "run.json").write_text('{"name": 3')
    with pytest.raises(ValueError, match="is damaged or not the record of a run; give another folder"):
        RunFolder(tmp_path)


@pytest.mark.parametrize("content", ["", "a,b\n1,2,3,4\n", "Label,AUC\n"])
def test_a_run_that_is_at_work_or_was_cut_short_is_shown_with_what_there_is(tmp_path, content):
    folder = RunFolder(tmp_path / HOSTILE.replace("/", "-"))
    folder.write(name="clinic", mode="finetune", state="failed", error=HOSTILE, parameters={"prefix": HOSTILE}, counts={})
    (folder / "metrics.csv").write_text(content)
    (folder / "model").mkdir()
    shown = folder._repr_html_()
    assert "<script>" not in shown and "&lt;script&gt;alert(1)" in shown and "failed" in shown and "clinic_model/" in shown


def test_an_encoder_and_a_model_say_what_they_are_made_of(encoder):
    n = sum(weight.numel() for weight in encoder.parameters())
    shown = encoder._repr_html_()
    assert f"{encoder.n_layers}, hidden size {encoder.hidden_size}" in shown and f"{n / 1e3:.3g} thousand" in shown
    assert len(repr(encoder).splitlines()) == 1
    model = Classifier(encoder, [["slow rate", HOSTILE], ["breathy"]], "mean+std", "weighted", "head", "BCE")
    shown = model._repr_html_()
    assert "<script>" not in shown and "slow rate, &lt;script&gt;" in shown and "Classifier of 3 labels" in shown
    assert "all, with learned weights" in shown and f"mean+std, {2 * encoder.hidden_size} numbers" in shown and "BCE" in shown
    heads = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert f"{heads / 1e3:.3g} thousand train" in shown
    assert len(repr(model).splitlines()) == 2
