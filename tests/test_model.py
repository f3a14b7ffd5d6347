import json
import subprocess
import sys

import pytest
import torch
from conftest import VARIANTS

from w2v2nb.adapt import add_lora
from w2v2nb.chance import Chance
from w2v2nb.encoder import POOLINGS, Encoder, pool
from w2v2nb.model import Classifier, check_labels, flatten_labels, score_recordings
from w2v2nb.objectives import LOSSES

GROUPS = [["slow rate", "rapid rate"], ["breathy"]]
# every option of a model away from its default, in as few models as that takes
OPTIONS = [
    dict(pooling="mean+std", layer="weighted", loss="CE", head=dict(size=5, activation="gelu", dropout=0.5)),
    dict(pooling="attention", layer="weighted", loss="CORN", head=dict(shared=True, layer_norm=True)),
    dict(pooling="attention", layer=1, loss="focal", head=dict(activation="tanh", size=40)),
    dict(pooling="sum", layer=0, tune="transformer", head=dict(activation="silu", dropout=0.0)),
    dict(pooling="max", layer=2, tune="top:2", loss="BCE", head=dict(shared=True, size=3)),
    dict(pooling="mean+std", tune="all"),
]


@pytest.fixture
def encoder(checkpoints):
    return Encoder.from_pretrained(checkpoints["wav2vec2"], device="cpu")


@pytest.fixture
def batch(recordings):
    chosen = recordings[1:4]
    return torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True), torch.tensor([len(x) for x in chosen])


# --- pooling


def test_pool_by_hand():
    hidden = torch.tensor([[[1.0, -4.0], [3.0, -2.0], [9.0, 9.0]], [[5.0, 0.0], [6.0, 0.0], [7.0, 3.0]]])
    n_frames = torch.tensor([2, 3])
    assert pool(hidden, n_frames, "mean").tolist() == [[2.0, -3.0], [6.0, 1.0]]
    assert pool(hidden, n_frames, "sum").tolist() == [[4.0, -6.0], [18.0, 3.0]]
    assert pool(hidden, n_frames, "max").tolist() == [[3.0, -2.0], [7.0, 3.0]]
    expected = [[2.0, -3.0, 1.0, 1.0], [6.0, 1.0, (2 / 3) ** 0.5, 2**0.5]]
    assert torch.allclose(pool(hidden, n_frames, "mean+std"), torch.tensor(expected))


@pytest.mark.parametrize("mode", POOLINGS)
def test_pool_ignores_padding_and_works_in_float32(mode):
    hidden = torch.randn(2, 5, 3).bfloat16()
    hidden[0, 2:] = torch.nan
    pooled = pool(hidden, torch.tensor([2, 5]), mode)
    assert pooled.dtype == torch.float32
    assert torch.allclose(pooled[0], pool(hidden[:1, :2].float(), torch.tensor([2]), mode)[0])


def test_deviation_keeps_its_digits_far_from_zero():
    hidden = 1000 + torch.randn(1, 500, 4)  # where the mean of squares less the square of the mean has no digit left
    expected = hidden[0].double().std(0, unbiased=False).float()
    assert torch.allclose(pool(hidden, torch.tensor([500]), "mean+std")[0, 4:], expected, rtol=1e-4)


@pytest.mark.parametrize("mode", POOLINGS)
def test_pooling_has_a_gradient_where_nothing_changes(mode):
    hidden = torch.ones(2, 4, 3, requires_grad=True)
    pooled = pool(hidden, torch.tensor([1, 4]), mode)  # one frame, and four that are the same
    pooled.sum().backward()
    assert hidden.grad.isfinite().all() and hidden.grad[:, 0].all() and not hidden.grad[0, 1:].any()
    assert mode != "mean+std" or pooled[:, 3:].abs().max() < 2e-6


# --- the parts together


def test_outputs_are_in_the_order_of_the_labels(encoder, batch):
    model = Classifier(encoder, GROUPS).eval()
    assert model.labels == ["slow rate", "rapid rate", "breathy"]
    outputs, embedding = model(*batch), model.embed(*batch)
    assert outputs.shape == (3, 3)
    assert torch.equal(outputs[:, :2], model.heads[0](embedding)) and torch.equal(outputs[:, 2:], model.heads[1](embedding))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_features_are_the_encoders_embeddings(pooling, encoder, batch, recordings):
    for layer in (0, 2, -1):
        model = Classifier(encoder, GROUPS, pooling=pooling, layer=layer).eval()
        expected = encoder.embed(recordings[1:4], layer, pooling)
        assert (model.embed(*batch) - expected).abs().max() < 1e-5 * expected.abs().max()
        assert torch.equal(model.mix(expected[:, None]), expected) and expected.shape == (3, model.width)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_kept_features_of_all_layers_are_mixed_as_the_model_does(pooling, encoder, batch, recordings):
    model = Classifier(encoder, GROUPS, pooling=pooling, layer="weighted").eval()
    torch.nn.init.normal_(model.layer_mix.logits)
    kept = encoder.embed(recordings[1:4], "all", pooling)
    outputs, again = model(*batch), model.classify(model.mix(kept))
    assert model.layers == [0, 1, 2, 3] and (outputs - again).abs().max() < 1e-5 * outputs.abs().max()


def test_attention_looks_at_mixed_frames(encoder, recordings):
    model = Classifier(encoder, GROUPS, pooling="attention", layer="weighted").eval()
    for weight in (model.layer_mix.logits, model.attention.score.weight):
        torch.nn.init.normal_(weight)
    x = recordings[2]
    states, n_frames = encoder(x[None], torch.tensor([len(x)]), model.layers)
    frames = sum(weight * state for weight, state in zip(model.layer_mix.weights, states, strict=True))
    expected = model.attention(frames, n_frames)
    assert torch.allclose(model.embed(x[None], torch.tensor([len(x)])), expected, atol=1e-5)


def test_which_features_stay_the_same(encoder):
    def is_fixed(**options):
        return Classifier(encoder, GROUPS, **options).has_fixed_features

    assert is_fixed() and is_fixed(layer="weighted", pooling="mean+std")
    assert not is_fixed(pooling="attention") and not is_fixed(tune="top:1") and not is_fixed(tune="all")


@pytest.mark.parametrize("options", OPTIONS)
def test_in_training_a_recording_does_not_notice_its_batch(options, encoder, batch):
    torch.manual_seed(0)
    model = Classifier(encoder, GROUPS, **options).train()
    waveform, lengths = batch
    together = model(waveform, lengths, Chance([4, 5, 6]))
    alone = [model(waveform[i : i + 1, : lengths[i]], lengths[i : i + 1], Chance([4 + i])) for i in range(3)]
    assert (together - torch.cat(alone)).abs().max() < 1e-5 * together.abs().max()
    has_dropout = model.head["dropout"] > 0 or model.tune != "head"
    assert torch.equal(together, model(waveform, lengths, Chance([1, 2, 3]))) != has_dropout


@pytest.mark.parametrize("loss", LOSSES)
def test_scores(loss, encoder, batch):
    model = Classifier(encoder, GROUPS, loss=loss).eval()
    outputs = model(*batch)
    expected = {
        "MSE": outputs,
        "BCE": outputs.sigmoid(),
        "focal": outputs.sigmoid(),
        "CE": torch.cat([outputs[:, :2].softmax(1), torch.ones(3, 1)], 1),  # a class by itself is certain
    }
    if loss == "CORN":
        asked = outputs.view(3, 3, 4).sigmoid()  # is it above grade 1, 2, 3, 4, given that it is above the one before
        expected["CORN"] = 1 + asked.cumprod(2).sum(2)
    assert torch.allclose(model.scores(outputs), expected[loss], atol=1e-6)


# --- what trains


@pytest.mark.parametrize("options", [{}, *OPTIONS])
def test_recordings_are_scored_as_in_a_batch(options, encoder, batch, recordings):
    torch.manual_seed(0)
    model = Classifier(encoder, GROUPS, **options).train()
    scores = score_recordings(model, recordings[1:4])
    assert scores.shape == (3, 3) and model.heads.training and not scores.requires_grad and scores.dtype == torch.float32
    model.eval()
    assert torch.allclose(scores, model.scores(model(*batch)), atol=1e-5)


def test_frozen(encoder, batch):
    model = Classifier(encoder, GROUPS).train()
    assert model.heads.training and not any(module.training for module in model.encoder.modules())
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], 0.1)
    model(*batch).sum().backward()
    optimizer.step()
    changed = {name.partition(".")[0] for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {"heads"}
    assert not any(weight.requires_grad for weight in model.encoder.parameters())
    Classifier(encoder, GROUPS, tune="all")  # whatever another model makes of the same encoder
    assert not model.embed(*batch).requires_grad


@pytest.mark.parametrize("tune", ["top:1", "transformer", "all"])
def test_what_trains_has_a_gradient_in_training_only(tune, encoder, batch):
    model = Classifier(encoder, GROUPS, tune=tune).train()
    assert model.encoder.training and model.embed(*batch).requires_grad
    assert not any(module.training for module in model.eval().modules())
    with torch.no_grad():
        assert not model(*batch).requires_grad


# --- labels


@pytest.mark.parametrize(
    ("classifiers", "message"),
    [
        ([], "at least one label"),
        ([["a"], []], "at least one label"),
        ([["a", "b"], ["a"]], "these are repeated: a;"),
        (["a", "b"], "a list of lists of labels"),
        ("ab", "a list of lists of labels"),
    ],
)
def test_refused_labels(classifiers, message):
    with pytest.raises(ValueError, match=message):
        flatten_labels(classifiers)


def test_check_labels():
    check_labels(["a", "b"], ["a", "b"])
    check_labels(["a", "b"], ["b", "a"])  # the model's order counts
    with pytest.raises(ValueError, match="does not know c; it also has b; leave the labels file out"):
        check_labels(["a", "b"], ["a", "c"])


def test_refused_arguments(encoder):
    with pytest.raises(ValueError, match="MSE, BCE"):
        Classifier(encoder, GROUPS, loss="L1")
    with pytest.raises(ValueError, match="mean, sum or max"):
        Classifier(encoder, GROUPS, pooling="median")
    for layer in (12, "last"):
        with pytest.raises(ValueError, match="layers 0 to 3"):
            Classifier(encoder, GROUPS, layer=layer)
    with pytest.raises(ValueError, match="no option width"):
        Classifier(encoder, GROUPS, head=dict(width=3))
    with pytest.raises(ValueError, match="it should be head, top:K"):
        Classifier(encoder, GROUPS, tune="bottom:2")


# --- save and load


def check_round_trip(model, batch, folder):
    model.eval().save(folder)
    loaded = Classifier.load(folder, device="cpu")
    for name in ("classifiers", "labels", "sizes", "pooling", "layer", "layers", "loss", "head"):
        assert getattr(loaded, name) == getattr(model, name)
    assert (loaded.encoder.sample_rate, loaded.encoder.do_normalize) == (16000, True)
    assert {weight.device.type for weight in loaded.parameters()} == {"cpu"}
    # whatever trained, what is loaded is frozen
    assert not loaded.training and loaded.tune == "head" and not any(w.requires_grad for w in loaded.encoder.parameters())
    assert json.loads((folder / "config.json").read_text())["tune"] == model.tune
    with torch.no_grad():
        assert (loaded(*batch) - model(*batch)).abs().max() < 1e-5
    return loaded


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant, checkpoints, batch, tmp_path):
    encoder = Encoder.from_pretrained(checkpoints[variant], device="cpu")
    model = Classifier(encoder, GROUPS, pooling="max", layer=2, loss="BCE")
    loaded = check_round_trip(model, batch, tmp_path / "model")
    assert repr(loaded) == repr(model)
    weights, expected = loaded.state_dict(), model.state_dict()
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)


@pytest.mark.parametrize("options", [*OPTIONS, dict(tune="lora", layer=2)])
def test_round_trip_of_every_option(options, encoder, batch, tmp_path):
    encoder = add_lora(encoder, rank=2) if options.get("tune") == "lora" else encoder
    model = Classifier(encoder, GROUPS, **options)
    for weight in model.parameters():  # none where it began
        with torch.no_grad():
            weight.add_(torch.randn_like(weight) * 0.05)
    check_round_trip(model, batch, tmp_path / "model")


def test_a_model_of_the_first_version(encoder, batch, tmp_path):
    "Saved before there were options: `freeze` in place of `tune`, and no `head`."
    model = Classifier(encoder, GROUPS, pooling="max", layer=2, loss="BCE").eval()
    model.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["head"], config["tune"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "format_version": 1, "freeze": False}))
    loaded = Classifier.load(tmp_path, device="cpu")
    assert repr(loaded) == repr(model) and loaded.head == model.head
    with torch.no_grad():
        assert torch.allclose(loaded(*batch), model(*batch), atol=1e-6)


def test_names_of_weights_are_those_of_the_first_version(encoder):
    names = {name.removeprefix("encoder.") for name in Classifier(encoder, GROUPS).state_dict()}
    heads = {f"heads.{k}.{layer}.{part}" for k in (0, 1) for layer in ("dense", "output") for part in ("weight", "bias")}
    assert names == heads | set(encoder.state_dict())


def test_scores_in_a_new_process(encoder, batch, tmp_path):
    model = Classifier(encoder, GROUPS, loss="BCE").eval()
    model.save(tmp_path / "model")
    with torch.no_grad():
        expected = model.scores(model(*batch))
    torch.save({"waveform": batch[0], "lengths": batch[1]}, tmp_path / "batch.pt")
    code = (
        "import json, sys, torch\n"
        "from w2v2nb.model import Classifier\n"
        "model, batch = Classifier.load(sys.argv[1], device='cpu'), torch.load(sys.argv[2], weights_only=True)\n"
        "with torch.no_grad(): scores = model.scores(model(**batch))\n"
        "print(json.dumps([model.labels, scores.tolist()]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "batch.pt")]
    labels, scores = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert labels == model.labels
    assert (torch.tensor(scores) - expected).abs().max() < 1e-6


def test_saved_files_hold_no_code(encoder, tmp_path):
    Classifier(encoder, [["über"]]).save(tmp_path / "model")
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert names == ["config.json", "model.safetensors", "preprocessor_config.json"]
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["classifiers"] == [["über"]] and config["backbone"]["model_type"] == "wav2vec2"
    assert str(tmp_path) not in json.dumps(config)


def test_saving_replaces_a_model(encoder, tmp_path):
    Classifier(encoder, [["a"]]).save(tmp_path / "model")
    Classifier(encoder, [["b"]]).save(tmp_path / "model")
    assert Classifier.load(tmp_path / "model", device="cpu").labels == ["b"]


def test_bf16_model(encoder, batch, tmp_path):
    Classifier(encoder, GROUPS).save(tmp_path)
    with torch.no_grad():
        expected = Classifier.load(tmp_path, device="cpu")(*batch)
        outputs = Classifier.load(tmp_path, device="cpu", precision="bf16")(*batch)
    assert outputs.dtype == torch.float32 and (outputs - expected).abs().max() < 0.1


@pytest.fixture
def saved(encoder, tmp_path):
    Classifier(encoder, GROUPS).save(tmp_path)
    return tmp_path


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(folder, change):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def refused(folder, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Classifier.load(folder, device="cpu")


def test_other_number_of_labels(saved):
    edit(saved, classifiers=[["slow rate", "rapid rate"], ["breathy", "strained"]])
    refused(saved, r"heads.1.output.weight \(breathy, strained\) is \(1, 16\) where config.json asks for \(2, 16\)")


def test_other_number_of_labels_with_one_head_for_all(encoder, tmp_path):
    Classifier(encoder, GROUPS, head=dict(shared=True)).save(tmp_path)
    edit(tmp_path, classifiers=[*GROUPS, ["strained"]])
    refused(tmp_path, r"heads.0.output.bias \(slow rate, rapid rate, breathy, strained\) is \(3,\) where .* asks for \(4,\)")


def test_other_number_of_classifiers(saved):
    edit(saved, classifiers=[["slow rate", "rapid rate"]])
    refused(saved, r"heads\.1\..* is left over")
    edit(saved, classifiers=[*GROUPS, ["strained"]])
    refused(saved, r"heads\.2\.dense\.bias \(strained\) is missing.*copy the model.s folder again")


def test_other_sizes(saved):
    edit(saved, backbone={**json.loads((saved / "config.json").read_text())["backbone"], "intermediate_size": 64})
    refused(saved, r"intermediate_dense.bias is \(32,\) where config.json asks for \(64,\).* and \d+ more; copy")


def test_weights_of_another_type(saved):
    edit_weights(saved, lambda weights: weights.update({"heads.0.dense.bias": weights["heads.0.dense.bias"].half()}))
    refused(saved, "torch.float16")


def test_missing_and_left_over(saved):
    edit_weights(saved, lambda weights: weights.update(extra=weights.pop("heads.0.dense.bias")))
    refused(saved, r"extra is left over, heads\.0\.dense\.bias \(slow rate, rapid rate\) is missing")


def test_broken_weights(saved):
    (saved / "model.safetensors").write_bytes(b"short")
    refused(saved, "model.safetensors cannot be read")
    (saved / "model.safetensors").unlink()
    refused(saved, "model.safetensors cannot be read")


def test_not_a_model(saved, checkpoints, tmp_path):
    refused(checkpoints["wav2vec2"], "a checkpoint, not a fine-tuned model.*NAME_model")
    refused(tmp_path / "none", "there is no folder .*none .beside it: ")
    edit(saved, format_version=3)
    refused(saved, "format version 3, and 1 and 2 are read here")
    (saved / "config.json").write_text('{"classifiers": []}')
    refused(saved, "not a model saved by w2v2nb")


def test_incomplete_config(saved):
    config = json.loads((saved / "config.json").read_text())
    for name in ("backbone", "classifiers", "pooling", "head"):
        (saved / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != name}))
        refused(saved, f"config.json lacks {name}")


def test_missing_preprocessor(saved):
    (saved / "preprocessor_config.json").unlink()
    refused(saved, "preprocessor_config.json")


def test_a_device_that_is_not_there(saved, checkpoints):
    for load, source in ((Classifier.load, saved), (Encoder.from_pretrained, checkpoints["wav2vec2"])):
        with pytest.raises(ValueError, match="device cuda:64 is not there; this machine has .*cpu: "):
            load(source, device="cuda:64")


def test_an_encoder_does_not_take_a_model(saved):
    with pytest.raises(ValueError, match="fine-tuned model, not a checkpoint"):
        Encoder.from_pretrained(saved)
