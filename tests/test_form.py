"""The form of a run: what can be entered is what can be typed, and what it writes means the same."""

import html
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import ipywidgets
import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

from w2v2nb import samples
from w2v2nb.config import MODES, Config, ConfigError, configure
from w2v2nb.flags import parse
from w2v2nb.form import OFTEN, arrange, form
from w2v2nb.notebooks import read_file

FIELDS = [name for name in Config.model_fields if name != "mode"]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    "A split of a few shipped recordings."
    folder = tmp_path_factory.mktemp("few")
    for name, n in (("train", 16), ("test", 12)):
        pd.read_csv(f"{samples.split_root()}/{name}.csv", dtype={"uid": str}).head(n).to_csv(folder / f"{name}.csv", index=False)
    shutil.copy(samples.label_txt(), folder / "labels.txt")
    return folder


def finetuning(few, exp_dir, **values):
    inputs = dict(prefix=samples.prefix(), data_split_root=str(few), label_txt=f"{few}/labels.txt", exp_dir=str(exp_dir))
    return inputs | dict(checkpoint=samples.checkpoint(), dataset="few") | values


def extraction(few, exp_dir, **values):
    inputs = dict(prefix=samples.prefix(), data_split_root=f"{few}/test.csv", exp_dir=str(exp_dir))
    return inputs | dict(checkpoint=samples.checkpoint()) | values


def command_of(view):
    "The arguments of the command that the form shows, as a shell reads them."
    shown = view.commands.value.partition("<pre")[2].partition(">")[2].partition("\n")[0]
    program, *arguments = shlex.split(html.unescape(shown))
    assert program == "w2v2nb"
    return arguments


@pytest.mark.parametrize("mode", MODES)
def test_every_field_of_a_mode_has_one_control_with_its_name_help_default_and_choices(mode):
    view, panes = form(mode), arrange(mode)
    names = sum(panes.values(), [])
    assert sorted(names) == sorted(n for n in FIELDS if mode in Config.model_fields[n].json_schema_extra["modes"])
    assert view.fields.titles == tuple(panes) and view.fields.selected_index == 0
    shown = [row.children for pane in view.fields.children for row in pane.children]
    assert [control.description for control, _ in shown] == names
    for control, note in shown:
        field = Config.model_fields[control.description]
        options = [a for a in (field.annotation, *get_args(field.annotation)) if get_origin(a) is Literal]
        is_text = isinstance(control, ipywidgets.Text)
        assert control.value == ("" if is_text and field.default is None else str(field.default) if is_text else field.default)
        if options:
            assert {value for _, value in control.options} - {None} == {*get_args(options[0])}
        assert control.tooltip == field.description
        assert html.escape(field.description) in note.value


def test_what_is_required_comes_first():
    for mode in MODES:
        required = [n for n in FIELDS if mode in Config.model_fields[n].json_schema_extra["required"]]
        assert next(iter(arrange(mode))) == OFTEN and arrange(mode)[OFTEN][: len(required)] == required


def test_a_wrong_value_is_said_beside_its_field_and_as_configure_says_it():
    view = form(prefix="a", data_split_root="b", label_txt="c", exp_dir="d")
    assert view.said == "ready to run" and not view.run.disabled
    view.fields.controls["epochs"].value = "three <b>"
    with pytest.raises(ConfigError) as e:
        configure(prefix="a", data_split_root="b", label_txt="c", exp_dir="d", epochs="three <b>")
    assert view.said == str(e.value) and view.run.disabled and view.write.disabled
    assert "three &lt;b&gt;" in view.fields.notes["epochs"].value and "three" not in view.fields.notes["dropout"].value
    assert "<b>'" not in view.notice.value and "three &lt;b&gt;" in view.notice.value
    view.fields.controls["epochs"].value = "3"
    assert view.said == "ready to run" and "three" not in view.fields.notes["epochs"].value
    view.fields.controls["lora_rank"].value = "4"
    assert "give tune lora" in view.said and "give tune lora" in view.fields.notes["lora_rank"].value and view.run.disabled
    view.fields.controls["tune"].value = "lora"
    assert view.said == "ready to run"


def test_what_was_entered_survives_a_change_of_the_mode_and_only_the_mode_s_own_fields_count():
    view = form(epochs=3, prefix="a", data_split_root="b", exp_dir="c")
    view.mode.value = "extraction"
    assert view.config == configure("extraction", prefix="a", data_split_root="b", exp_dir="c")
    view.fields.controls["hop"].value = "2"
    assert "give window as well" in view.said
    view.mode.value = "finetune"
    assert view.said == "finetune needs label_txt" and "--epochs=3" in command_of(view)


def test_a_default_that_was_typed_is_no_difference():
    view = form("extraction", prefix="a", data_split_root="b", exp_dir="c", checkpoint="d")
    for name, value in {"context_s": "5", "checkpoint": Config.model_fields["checkpoint"].default, "layer": " -1"}.items():
        view.fields.controls[name].value = value
    assert command_of(view) == ["extraction", "--prefix=a", "--data_split_root=b", "--exp_dir=c"]


@pytest.mark.parametrize("values", [dict(epoch=3), dict(epochs="three"), dict(loss="MAE")])
def test_values_that_cannot_be_read_are_refused(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        form(**values)


SEARCH = dict(search="dropout=0,0.5; epochs=1,2", val_share=12)
SETTINGS = [
    ("finetune", dict(learning_rate="1e-5", lib="yes", trim=True, scale="clinical", **SEARCH)),
    ("finetune", dict(tune="top:2", backbone_learning_rate=1e-6, pos_weight="2,3.5", loss="BCE", freeze=False)),
    ("extraction", dict(layer="0,-1", pooling_mode="mean,max", window="2.5", study="a 'b' $c", cache=False)),
    ("eval-only", dict(mdl_path="Ä & ö: model", lib=False, batch_size=3, resume=True)),
]


@pytest.mark.parametrize(("mode", "values"), SETTINGS)
def test_the_command_and_the_yaml_mean_the_form_s_configuration(mode, values, tmp_path):
    inputs = dict(prefix="re cordings", data_split_root="b", label_txt="c", exp_dir=f"{tmp_path}/new folder/run")
    inputs = {name: value for name, value in inputs.items() if mode == "finetune" or name != "label_txt"}
    view, expected = form(mode, **inputs, **values), configure(mode, **inputs, **values)
    assert view.config == expected
    arguments = command_of(view)
    given = parse(arguments)
    assert configure(given.pop("words")[0], **given) == expected
    view.write.click()
    assert "written" in view.said
    assert configure(mode, **read_file(f"{inputs['exp_dir']}.yaml")) == expected
    view.write.click()  # the form's own files may be replaced
    assert "written" in view.said


def test_somebody_s_file_stays(tmp_path):
    (tmp_path / "run.yaml").write_text("mine: 1\n")
    view = form("extraction", prefix="a", data_split_root="b", exp_dir=f"{tmp_path}/run")
    view.write.click()
    assert "not written by this form" in view.notice.value
    assert (tmp_path / "run.yaml").read_text() == "mine: 1\n" and not (tmp_path / "run.sh").exists()


def test_the_command_runs(few, tmp_path):
    view = form("extraction", **extraction(few, tmp_path / "out", pooling_mode="mean,max", dataset="few"))
    done = subprocess.run([sys.executable, "-m", "w2v2nb", *command_of(view)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(pd.read_parquet(tmp_path / "out" / "few_embeddings.parquet")) == 12


def test_the_papermill_command_runs_with_the_files(few, tmp_path):
    view = form("extraction", **extraction(few, tmp_path / "out", dataset="few"))
    view.write.click()
    program, *arguments = shlex.split((tmp_path / "out.sh").read_text().splitlines()[-1])
    assert program == "w2v2nb"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-m", "w2v2nb", *arguments], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "few_embeddings.parquet").exists() and (tmp_path / "out.ipynb").exists()


def test_a_run_is_started_once(few, tmp_path, monkeypatch):
    from w2v2nb import run

    view, starts, start = form("extraction", **extraction(few, tmp_path / "out", overwrite=True)), [], run.start
    monkeypatch.setattr(run, "start", lambda config: starts.append(config) or view.run.click() or start(config))
    view.run.click()
    assert view.folder.about["state"] == "finished" and str(tmp_path / "out") in view.said
    view.run.click()  # as a click that waited while the run was at work
    assert len(starts) == 1
    view.fields.controls["trim"].value = True
    view.run.click()
    assert len(starts) == 2 and view.folder.about["parameters"]["trim"]


def test_a_run_that_is_refused_or_fails_says_why_in_a_sentence(few, tmp_path, capsys, monkeypatch):
    from w2v2nb import run

    view = form("extraction", **extraction(few, tmp_path / "out") | dict(data_split_root="no/such.csv"))
    view.run.click()
    assert "no/such.csv does not exist" in view.notice.value and not view.run.disabled and view.folder is None

    def fail(config):
        raise errors[sentence]

    monkeypatch.setattr(run, "start", fail)
    errors = {"interrupted": KeyboardInterrupt(), "memory ran out": MemoryError(), "no space": OSError("no space")}
    for sentence in errors:
        view.check()
        view.run.click()
        assert sentence in view.notice.value and "resume" in view.notice.value and view.run.disabled
    assert "Traceback" not in "".join(capsys.readouterr())


def test_in_a_kernel_the_output_shows_prints_curves_and_the_folder(few, tmp_path):
    values = finetuning(few, tmp_path / "out", epochs=2, batch_size=4, val_share=4, allow_overlap=True, group="uid")
    begin = f"from w2v2nb.form import form\nview = form(**{values!r})\nview"
    cells = [begin, "view.run.click()", "print(view.said, view.output.outputs)"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(nb, timeout=120, kernel_name="python3").execute()
    static, shown = (output.data for output in nb.cells[0].outputs)
    assert "ready to run" in static["text/html"] and "<td>epochs</td><td>2</td>" in static["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in shown
    said = nb.cells[2].outputs[0].text
    assert said.startswith("finished; the run's folder is")
    assert "epoch   2" in said and "image/png" in said and "text/html" in said
    assert not [o for o in nb.cells[1].outputs if o.output_type == "error"]
