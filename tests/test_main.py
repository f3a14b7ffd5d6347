"""The command line: forms of a mode, whole-token flags, help, exit statuses."""

import subprocess
import sys
import time
from typing import Literal, get_args, get_origin

import pytest

from w2v2nb.__main__ import main, mode_help, read_arguments, top_help
from w2v2nb.config import MODES, Config, ConfigError, read_parameters

GIVEN = ["-i", "recordings", "-d", "table.csv", "-o", "out"]


def run(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "w2v2nb", *arguments], capture_output=True, text=True, **options)


def test_three_ways_to_name_a_mode_are_the_same():
    forms = (["extraction"], ["--mode", "extraction"], ["-m", "extraction"], ["--mode=extraction"])
    assert len({read_arguments([*form, *GIVEN]).model_dump_json() for form in forms}) == 1
    assert read_arguments([*GIVEN, "extraction"]).mode == "extraction"


def test_the_default_mode_is_finetune():
    assert read_arguments([*GIVEN, "-l", "labels.txt"]).mode == "finetune"


def test_every_short_flag_is_a_token_of_its_own():
    flags = "-i a -s b -d c -l d -b e -p f -o g -mp h -c i -pm max -bs 3 -nw 0 -e 5 -lr 0.5 -m eval-only".split()
    config = read_arguments(flags)
    assert (config.mode, config.mdl_path, config.project_name, config.pooling_mode) == ("eval-only", "h", "f", "max")
    assert (config.bucket_name, config.batch_size, config.epochs, config.learning_rate) == ("e", 3, 5, 0.5)


def test_negative_layers_and_bare_booleans():
    assert read_arguments(["extraction", *GIVEN, "--layer", "-1,0"]).layer == "-1,0"
    config = read_arguments(["extraction", *GIVEN, "--layer", "-1", "--resume", "--trim", "yes"])
    assert (config.layer, config.resume, config.trim) == (-1, True, True)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["-bs8"], "-bs8 is not a flag; did you mean -bs?"),
        (["-lrr", "3"], "-lrr is not a flag; did you mean -lr?"),
        (["--epoch", "3"], "--epoch is not a flag; did you mean --epochs?"),
        (["--epochs", "three"], "epochs is 'three' but should be a whole number"),
        (["--epochs"], "expected one argument"),
        (["--trim", "perhaps"], "trim is 'perhaps' but should be True or False"),
        (["evaluate"], "'evaluate' is not a mode (did you mean eval-only?); it should be finetune, eval-only, extraction, st"),
        (["finetune", *"-i a -d b -l c -o d -mp e".split()], "finetune starts from a checkpoint"),
        (["extraction", "-m", "finetune"], "is not a mode"),
        (["extraction"], "extraction needs prefix, data_split_root, exp_dir"),
        ([], "finetune needs prefix, data_split_root, label_txt, exp_dir"),
        (["demo", "--resume"], "demo takes at most one word"),
        (["demo", "a", "b"], "demo takes at most one word"),
        (["extraction", "-i", "gs://bucket/a", "-d", "t.csv", "-o", "out"], "t.csv does not exist"),
        (["extraction", "-i", "a", "-d", "t.csv", "-o", "s3://bucket/out"], "a path is local or begins with gs://"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(arguments, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and part in err and err.count("\n") == 1 and err.startswith("w2v2nb: ")
    assert not any(tmp_path.iterdir())


def test_a_mistake_ends_the_process_with_2_and_no_traceback():
    done = run("extraction", "--epochs", "three")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_flags_that_never_did_anything_are_ignored_with_a_warning(capsys):
    config = read_arguments(["extraction", *GIVEN, "-n", "3", "-si", "0", "-ei", "-1"])
    assert config == read_arguments(["extraction", *GIVEN])
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["-n", "-si", "-ei"]


@pytest.mark.parametrize("mode", MODES)
def test_help_is_a_screen_with_every_flag_of_the_mode_and_its_default(mode):
    screen = mode_help(mode)
    lines = screen.splitlines()
    assert len(lines) <= (100 if mode == "finetune" else 60) and max(map(len, lines)) <= 120
    for name, field in Config.model_fields.items():
        if name == "mode" or mode not in field.json_schema_extra["modes"]:
            assert f"--{name} " not in screen
            continue
        (line,) = [line for line in lines if f" --{name} " in line]
        assert field.description in line
        required = mode in field.json_schema_extra["required"]
        assert line.endswith("(required)" if required else "" if field.default is None else f"[{field.default}]")


def test_help_has_its_flags_under_headings():
    blocks = mode_help("finetune").split("\n\n")
    headings = [block.splitlines()[0] for block in blocks[2:-1]]
    assert headings == ["Data:", "Sound:", "Model:", "What trains:", "Objective:", "Optimisation:", "Study:", "Run:"]
    assert "Embeddings:" in mode_help("extraction") and "Objective:" not in mode_help("extraction")


VALUES = {bool: "True", int: "3", float: "0.5", str: "some"}
SPECIAL = {"lora_targets": "q_proj", "tune": "top:2", "pos_weight": "auto", "augment": "noise", "layer": "weighted"}
SPECIAL |= {"pooling_mode": "mean+std", "search": "learning_rate=1e-4,1e-3", "device": "cpu"}
BESIDE = {"lora_": {"tune": "lora"}, "pos_weight": {"loss": "BCE"}, "focal_gamma": {"loss": "focal"}, "repeats": {"folds": "3"}}
BESIDE |= {"label_smoothing": {"loss": "BCE"}, "backbone_": {"tune": "all"}, "layer_decay": {"tune": "all"}}
BESIDE |= {"trials": {"search": "learning_rate=1e-4,1e-3"}}


@pytest.mark.parametrize("name", [name for name, f in Config.model_fields.items() if "finetune" in f.json_schema_extra["modes"]])
def test_every_flag_is_read_from_the_command_line_and_from_a_notebook_s_cell(name):
    annotation = Config.model_fields[name].annotation
    kinds = (annotation, *get_args(annotation))
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    value = SPECIAL.get(name) or [*choices, *(text for kind, text in VALUES.items() if kind in kinds)][0]
    values = dict(prefix="a", data_split_root="b", exp_dir="c", label_txt="d")
    for start, beside in BESIDE.items():
        values |= beside if name.startswith(start) else {}
    values[name] = value
    config = read_arguments([word for key, text in values.items() for word in (f"--{key}", text)])
    assert str(getattr(config, name)) in (value, f"{value}.0")
    cell = "\n".join(f"{key} = {text!r}" for key, text in values.items())
    assert read_parameters("finetune", {"In": [cell], **values}).model_dump() == config.model_dump()


def test_help_of_a_mode_however_it_is_named(capsys):
    for form in (["extraction"], ["--mode", "extraction"], ["--mode=extraction"], ["-m", "extraction"]):
        assert main([*form, "--help"]) == 0 and capsys.readouterr().out == mode_help("extraction") + "\n"


def test_help_of_all_names_every_mode():
    assert all(f"w2v2nb {mode}" in top_help() for mode in (*MODES, "status", "demo"))
    assert len(top_help().splitlines()) <= 24


def test_help_answers_within_a_second():
    seconds = []
    for _ in range(3):  # the best of three: the machine may have other work
        started = time.monotonic()
        run("finetune", "--help")
        seconds.append(time.monotonic() - started)
    assert min(seconds) < 1


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from w2v2nb.__main__ import main; main(['finetune', '--help']);"
        "sys.exit(bool({'torch', 'pandas', 'numpy', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_wrong_configuration_is_not_hidden_by_the_error_class():
    with pytest.raises(ConfigError):
        read_arguments(["extraction"])


def test_version_is_the_settings_one(capsys):
    import w2v2nb

    assert main(["--version"]) == 0 and capsys.readouterr().out.strip() == w2v2nb.__version__
