"""The configuration: names and defaults of contract 2, and one sentence for everything that is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

from w2v2nb.config import (
    MODES,
    Config,
    ConfigError,
    change,
    configure,
    needs_validation,
    read_parameters,
    read_tune,
)

GIVEN = dict(prefix="recordings", data_split_root="table.csv", exp_dir="out")

# what the design's second contract promises: flag, short flag, default
CONTRACT = """
prefix -i None; study -s None; data_split_root -d None; label_txt -l None; bucket_name -b None; project_name -p None;
lib - None; exp_dir -o None; dataset - None; resample_rate - 16000; reduce - True; clip_length - 160000; trim - False;
mdl_path -mp None; checkpoint -c facebook/wav2vec2-base-960h; pooling_mode -pm mean; batch_size -bs 8; num_workers -nw 0;
epochs -e 1; learning_rate -lr 0.0003; optim - adam; loss - MSE; layer - -1; padding - batch; precision - fp32;
freeze - True; seed - 0; resume - False; overwrite - False; mode -m finetune;
window - None; hop - None; frames - False; embedding - layer; chunk_s - 0.0; context_s - 5.0;
head_size - None; activation - relu; layer_norm - False; dropout - 0.25; shared_dense - False; tune - None; lora_rank - 8;
lora_alpha - 16.0; lora_targets - q_proj,v_proj; pos_weight - None; focal_gamma - 2.0; label_smoothing - 0.0; mixup - 0.0;
augment - None; backbone_learning_rate - None; layer_decay - 1.0; weight_decay - 0.0; schedule - constant; warmup - 0.0;
clip_norm - 0.0; accumulate - 1; monitor - auc; patience - 0; val_share - 0.0; folds - 0; repeats - 1; search - None;
trials - 0; cache - True; cache_dir - None; cache_gb - 10.0; log - None
"""


@pytest.mark.parametrize("line", [entry.strip() for entry in CONTRACT.split(";")])
def test_names_short_flags_and_defaults_are_the_contract_s(line):
    name, short, default = line.split()
    field = Config.model_fields[name]
    assert (field.json_schema_extra["short"] or "-", str(field.default)) == (short, default)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("trim", t, True) for t in ("True", "true", "1", "yes", True, 1)]
    + [("trim", t, False) for t in ("False", "false", "0", "no", False, 0)]
    + [("lib", "None", None), ("lib", "", None), ("study", "None", None), ("study", " ", None), ("study", 7, "7")]
    + [("learning_rate", "1e-5", 1e-5), ("learning_rate", 1, 1.0), ("epochs", "3", 3), ("epochs", 3.0, 3)]
    + [("layer", "-1", -1), ("layer", 6, 6), ("layer", "0, 6,12", "0,6,12"), ("layer", " all", "all")]
    + [("pooling_mode", "mean, max", "mean,max"), ("window", "2", 2.0), ("window", "0", 0.0), ("chunk_s", 5, 5.0)],
)
def test_text_is_read_as_the_command_line_reads_it(name, text, value):
    assert getattr(configure("extraction", **GIVEN, **{name: text}), name) == value


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (dict(epochs="three"), "epochs is 'three' but should be a whole number"),
        (dict(epochs="1.5"), "epochs is '1.5' but should be a whole number"),
        (dict(epochs=0), "epochs is 0 but should be greater than 0"),
        (dict(epochs="None"), "epochs is None but should be a whole number"),
        (dict(learning_rate="fast"), "learning_rate is 'fast' but should be a number"),
        (dict(learning_rate="nan"), "learning_rate is 'nan' but should be a finite number"),
        (dict(trim="perhaps"), "trim is 'perhaps' but should be True or False"),
        (dict(padding="none"), "padding is 'none' but should be 'batch' or 'clip'"),
        (dict(pooling_mode="median"), "pooling_mode is 'median' but should be one of mean, sum, max, mean+std, attention, or"),
        (dict(pooling_mode="mean,mean"), "pooling_mode is 'mean,mean' but should be"),
        (dict(pooling_mode="mean,"), "pooling_mode is 'mean,' but should be"),
        (dict(optim="sgd"), "optim is 'sgd' but should be 'adam' or 'adamw'"),
        (dict(scale="ordinal"), "scale is 'ordinal' but should be 'clinical'"),
        (dict(layer="last"), "layer is 'last' but should be a layer number"),
        (dict(layer=1.5), "layer is 1.5 but should be"),
        (dict(layer="weighted"), "layer is weighted but the weights are a fine-tuned model's: give mdl_path"),
        (dict(pooling_mode="mean,attention"), "pooling_mode attention is a fine-tuned model's: give mdl_path"),
        (dict(layer="all,1"), "layer is 'all,1' but should be"),
        (dict(window=-1), "window is -1 but should be greater than or equal to 0"),
        (dict(hop=0, window=1), "hop is 0 but should be greater than 0"),
        (dict(hop=1), "hop is 1.0 but there are no windows: give window as well"),
        (dict(hop=1, window=0), "there are no windows"),
        (dict(frames=True, window=1), "frames and window are both set: choose one"),
        (dict(frames=True, pooling_mode="max"), "frames are not pooled: leave out pooling_mode"),
        (dict(frames=True, embedding="dense", mdl_path="m"), "frames are of a layer, not of embedding dense"),
        (dict(embedding="last"), "embedding is 'last' but should be 'layer', 'pooled' or 'dense'"),
        (dict(embedding="pooled"), "embedding is pooled but that is a fine-tuned model's: give mdl_path"),
        (dict(embedding="dense", mdl_path="m", layer=3), "has the model's own layer and pooling: leave out layer"),
        (dict(embedding="pooled", mdl_path="m", layer=3, pooling_mode="max"), "leave out layer and pooling_mode"),
        (dict(chunk_s=0.5), "chunk_s is 0.5 but should be 0, or at least 1 second"),
        (dict(chunk_s=30), "chunk_s is 30.0 but clip_length cuts every recording at 10 s: give clip_length 0"),
        (dict(context_s=-1), "context_s is -1 but should be"),
        (dict(test_share=1), "test_share is 1 but should be less than 1"),
        (dict(clip_length=0, padding="clip"), "clip_length is 0 but padding clip pads to it"),
        (dict(resume=True, overwrite=True), "resume and overwrite are both set"),
        (dict(dataset="a/b"), "should be a name without slashes"),
        (dict(device="gpu"), "device is 'gpu' but should be cuda"),
        (dict(bach_size=4), "bach_size is not a parameter, did you mean batch_size?"),
        (dict(zzz=4), "zzz is not a parameter"),
        (dict(mode="extract"), "mode is 'extract' but should be 'finetune', 'eval-only' or 'extraction'"),
    ],
)
def test_a_wrong_value_is_one_sentence(wrong, sentence):
    values = {"mode": "extraction", **GIVEN, **wrong}
    with pytest.raises(ConfigError) as e:
        configure(**values)
    assert sentence in str(e.value) and "\n" not in str(e.value)


def test_all_that_is_wrong_or_missing_is_reported_at_once():
    with pytest.raises(ConfigError) as e:
        configure("finetune", prefix="recordings", epochs="three", lr=1, trim="perhaps")
    for part in ("finetune needs data_split_root, label_txt, exp_dir", "epochs", "lr is not a parameter", "trim"):
        assert part in str(e.value)


@pytest.mark.parametrize(
    ("mode", "missing"),
    [
        ("finetune", "prefix, data_split_root, label_txt, exp_dir"),
        ("eval-only", "prefix, data_split_root, exp_dir, mdl_path"),
        ("extraction", "prefix, data_split_root, exp_dir"),
    ],
)
def test_each_mode_names_what_it_needs(mode, missing):
    with pytest.raises(ConfigError, match=f"{mode} needs {missing}$"):
        configure(mode)


@pytest.mark.parametrize("blank", ["", " ", "None", None])
def test_a_blank_required_value_is_missing(blank):
    with pytest.raises(ConfigError, match="^extraction needs exp_dir$"):
        configure("extraction", **GIVEN | {"exp_dir": blank})


def test_paths_may_be_path_objects():
    assert configure("extraction", **GIVEN | {"exp_dir": Path("a") / "b"}).exp_dir == "a/b"


LIMITS = """
tune top:0; tune top; tune blocks; lora_rank 0; lora_alpha 0; lora_targets q_proj,; head_size 0; activation elu; dropout 1;
dropout -0.1; loss L1; pos_weight often; pos_weight 1,0; pos_weight -1; pos_weight inf; focal_gamma -1; label_smoothing 1;
mixup -0.1; weight_decay -1; backbone_learning_rate 0; layer_decay 0; layer_decay 1.1; schedule step; warmup 1; clip_norm -1;
accumulate 0; monitor loss,auc; patience -1; val_share 1.5; val_share -0.1; folds 1; folds -2; repeats 0; trials -1; log csv;
cache perhaps; cache_gb -1; layer heavy; pooling_mode std
"""


@pytest.mark.parametrize("line", [entry.strip() for entry in LIMITS.split(";")])
def test_a_value_outside_its_limits_is_refused(line):
    name, value = line.split()
    with pytest.raises(ConfigError, match=f"^{name} is '{value}' but .*should be ") as e:
        configure("finetune", **GIVEN, label_txt="l", **{name: value})
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("together", "sentence"),
    [
        (dict(mdl_path="m"), "finetune starts from a checkpoint"),
        (dict(pooling_mode="mean,max"), "pooling_mode is mean,max but finetune takes one pooling"),
        (dict(tune="all", freeze=True), "freeze is True but tune is all: leave out freeze"),
        (dict(tune="head", freeze=False), "freeze is False but tune is head: leave out freeze"),
        (dict(lora_rank=4), "lora_rank given but tune is head: give tune lora"),
        (dict(lora_rank=8, lora_targets="k_proj", freeze=False), "lora_rank and lora_targets given but tune is all"),
        (dict(backbone_learning_rate=1e-5), "backbone_learning_rate given but the encoder does not train"),
        (dict(layer_decay=0.9, tune="head"), "layer_decay given but the encoder does not train"),
        (dict(loss="CORN"), "loss is CORN but that is for ratings from 1 to 5: give scale clinical"),
        (dict(loss="CE", separate_heads=True), "separate_heads leaves no labels to exclude each other"),
        (dict(pos_weight="auto"), "pos_weight is auto but loss is MSE: give loss BCE or focal"),
        (dict(pos_weight="2", loss="CE"), "pos_weight is 2 but loss is CE"),
        (dict(focal_gamma=1, loss="BCE"), "focal_gamma given but loss is BCE: give loss focal"),
        (dict(label_smoothing=0.1), "label_smoothing is 0.1 but loss is MSE: give loss BCE, focal or CE"),
        (dict(label_smoothing=0.1, loss="CORN", scale="clinical"), "label_smoothing is 0.1 but loss is CORN"),
        (dict(mixup=0.2, batch_size=1), "mixup is 0.2 but a step has one recording: give batch_size 2 or more"),
        (dict(accumulate=9), "accumulate is 9 but a step has 8 recordings: give at most batch_size"),
        (dict(augment="noise,echo"), "echo"),
        (dict(layer="0,1", tune="all"), "layer is 0,1, a sweep over fixed features, but not with tune all: give one layer"),
        (dict(layer="all", freeze=False), "a sweep over fixed features, but not with tune all"),
        (dict(layer="all", pooling_mode="attention", augment="noise"), "not with pooling_mode attention and augment noise"),
        (dict(layer="0,1", search="learning_rate=1e-4,1e-3"), "there is a search: choose one, or give the layers in search"),
        (dict(repeats=2), "repeats is 2 but there is no cross-validation: give folds as well"),
        (dict(trials=5), "trials is 5 but there is nothing to try: give search as well"),
        (dict(search="dropout"), "search: the search space has 'dropout'; it should be NAME=VALUES"),
        (dict(search="dropout=0:0.5"), "search: dropout is a range"),
        (dict(search="droput=0,0.5"), "search cannot vary droput, did you mean dropout?"),
        (dict(search="seed=0,1"), "search cannot vary seed"),
        (dict(search="focal_gamma=0,2", loss="focal", monitor="loss"), "search varies focal_gamma, which change what"),
        (dict(search="layer=all,0"), "list the layers, as in layer=0,6,12"),
        (dict(search="layer=-1:2", trials=2), "list the layers"),
        (dict(search="monitor=auc,loss"), "search cannot vary monitor"),
        (dict(search="layer=0,1; dropout=0,1"), "search tries layer 0, dropout 1, but dropout is 1 but should be less than 1"),
        (dict(search="dropout=0:1", trials=5), "search tries dropout 1, but dropout is 1"),
        (dict(search="tune=head,lora; lora_rank=4,8"), "search tries tune head, lora_rank 4, but lora_rank given"),
        (dict(folds=5, test_share=0.3), "folds is 5, which tests on every person: leave out test_share"),
    ],
)
def test_what_does_not_go_together_in_training_is_refused_and_elsewhere_ignored(together, sentence):
    with pytest.raises(ConfigError) as e:
        configure("finetune", **GIVEN, label_txt="l", **together)
    assert sentence in str(e.value) and "\n" not in str(e.value)
    ignored = {name: value for name, value in together.items() if name not in ("mdl_path", "pooling_mode", "layer")}
    assert configure("extraction", **GIVEN, **ignored)


@pytest.mark.parametrize(
    "together",
    [
        dict(tune="lora", lora_rank=4, lora_alpha=8, lora_targets="q_proj, k_proj", backbone_learning_rate=1e-4),
        dict(tune="top:2", layer_decay=0.9),
        dict(freeze=True, tune="head"),
        dict(freeze=False, tune="transformer"),
        dict(loss="CORN", scale="clinical", mixup=0.2),
        dict(loss="CE", label_smoothing=0.1),
        dict(loss="BCE", pos_weight=3, label_smoothing=0.1),
        dict(layer="weighted", tune="all", pooling_mode="attention", augment="noise,specaugment"),
        dict(layer="0,1", pooling_mode="mean+std", patience=3, folds=5, repeats=2),
        dict(search="layer=0,1,weighted; learning_rate=1e-4:1e-2; head_size=8,16", trials=5),
        dict(search="layer_norm=True,False; activation=relu,gelu; tune=head,top:1; batch_size=4,8"),
        dict(batch_size=16, accumulate=16),
    ],
)
def test_what_goes_together_is_taken(together):
    config = configure("finetune", **GIVEN, label_txt="l", **together)
    assert configure(**config.model_dump(exclude_unset=True)) == config, "what run.json keeps means the same again"


@pytest.mark.parametrize("mode", MODES)
def test_several_processes_are_for_finetune(mode, monkeypatch):
    given = dict(**GIVEN, label_txt="l") | (dict(mdl_path="m") if mode == "eval-only" else {})
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert configure(mode, **given)
    monkeypatch.setenv("WORLD_SIZE", "2")
    if mode == "finetune":
        assert configure(mode, **given)
    else:
        with pytest.raises(ConfigError, match=f"2 processes were started but {mode} runs in one process: start it without"):
            configure(mode, **given)


@pytest.mark.parametrize(
    ("values", "tune"),
    [({}, "head"), (dict(freeze=False), "all"), (dict(tune="top:3"), "top:3"), (dict(tune="lora", freeze=False), "lora")],
)
def test_what_trains_is_said_by_tune_and_else_by_freeze(values, tune):
    assert read_tune(configure("finetune", **GIVEN, label_txt="l", **values)) == tune


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({}, []),
        (dict(patience=2), ["patience"]),
        (dict(search="layer=0,1"), ["search"]),
        (dict(layer="0,1"), ["layer"]),
        (dict(layer="all", monitor="loss"), ["layer", "monitor"]),
        (dict(layer="weighted"), []),
    ],
)
def test_what_needs_people_to_validate_on(values, names):
    assert needs_validation(configure("finetune", **GIVEN, label_txt="l", **values)) == names


def test_a_changed_configuration_is_as_if_it_had_been_given():
    config = configure("finetune", **GIVEN, label_txt="l", search="learning_rate=1e-4", trials=3)
    changed = change(config, search=None, trials=0, learning_rate="1e-4")
    assert changed.learning_rate == 1e-4 and changed.search is None and "batch_size" not in changed.model_fields_set
    with pytest.raises(ConfigError, match="trials is 3 but there is nothing to try"):
        change(config, search=None)


def test_what_only_extraction_knows_is_no_conflict_elsewhere():
    assert configure("finetune", **GIVEN, label_txt="l", frames=True, window=1)


def test_a_notebook_s_unknown_names_are_found_in_its_parameter_cells_only():
    cells = ["import json", "epochs: int = 1", "# Parameters\nbach_size = 4", "other = 3", "%matplotlib inline\nx = 1"]
    namespace = {"In": cells, **GIVEN, "epochs": 1, "bach_size": 4, "other": 3}
    with pytest.raises(ConfigError, match="bach_size is not a parameter") as e:
        read_parameters("extraction", namespace)
    assert "other" not in str(e.value)


def test_a_corrected_cell_is_read_as_it_was_run_last():
    given = {**GIVEN, "epochs": 1, "bach_size": 4}
    own = ("epochs = 1\nbach_size = 4", "epochs = 1\nbatch_size = 4")
    for wrong, right in (own, ("# Parameters\nbach_size = 4", "# Parameters")):
        cells = ["prefix = data_split_root = exp_dir = 'a'", wrong]
        with pytest.raises(ConfigError, match="bach_size is not a parameter"):
            read_parameters("extraction", {"In": cells, **given})
        assert read_parameters("extraction", {"In": [*cells, right], **given}).prefix == "recordings"


def test_a_notebook_is_of_one_mode():
    cell = "# Parameters\nmode = 'extraction'"
    with pytest.raises(ConfigError, match="this notebook runs finetune"):
        read_parameters("finetune", {"In": [cell], "mode": "extraction"})


def test_defaults_in_a_notebook_count_as_not_given():
    cell = "prefix = data_split_root = exp_dir = 'a'\nbatch_size: int = 8\nepochs: int = 5"
    namespace = {"In": [cell], "prefix": "a", "data_split_root": "a", "exp_dir": "a", "batch_size": 8, "epochs": 5}
    config = read_parameters("extraction", namespace)
    assert "batch_size" not in config.model_fields_set and config.epochs == 5


def test_the_error_shows_in_a_notebook_without_a_traceback():
    assert ConfigError("wrong")._render_traceback_() == ["ConfigError: wrong"]


def test_every_field_has_help_and_a_place():
    for name, field in Config.model_fields.items():
        assert field.description, name
        assert set(field.json_schema_extra["modes"]) <= set(MODES)
        assert set(field.json_schema_extra["required"]) <= set(field.json_schema_extra["modes"])


def test_configuring_takes_neither_torch_nor_pandas():
    code = "import sys, w2v2nb.config; print({'torch', 'pandas', 'numpy', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
