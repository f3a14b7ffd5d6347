import json
import subprocess
import sys

import pytest
import torch
from conftest import VARIANTS

from w2v2nb.encoder import Encoder, pool
from w2v2nb.model import Classifier, Head, check_labels, flatten_labels, score_recordings

GROUPS = [["slow rate", "rapid rate"], ["breathy"]]


@pytest.fixture
def encoder(checkpoints):
    return Encoder.from_pretrained(checkpoints["wav2vec2"], device="cpu")


@pytest.fixture
def batch(recordings):
    chosen = recordings[1:4]
    return torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True), torch.tensor([len(x) for x in chosen])


# --- pooling and the head


def test_pool_by_hand():
    hidden = torch.tensor([[[1.0, -4.0], [3.0, -2.0], [9.0, 9.0]], [[5.0, 0.0], [6.0, 0.0], [7.0, 3.0]]])
    n_frames = torch.tensor([2, 3])
    assert pool(hidden, n_frames, "mean").tolist() == [[2.0, -3.0], [6.0, 1.0]]
    assert pool(hidden, n_frames, "sum").tolist() == [[4.0, -6.0], [18.0, 3.0]]
    assert pool(hidden, n_frames, "max").tolist() == [[3.0, -2.0], [7.0, 3.0]]


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
def test_pool_ignores_padding_and_works_in_float32(mode):
    hidden = torch.randn(2, 5, 3).bfloat16()
    hidden[0, 2:] = torch.nan
    pooled = pool(hidden, torch.tensor([2, 5]), mode)
    assert pooled.dtype == torch.float32
    assert torch.allclose(pooled[0], pool(hidden[:1, :2].float(), torch.tensor([2]), mode)[0])


def test_head_is_the_originals():
    head = Head(16, 3)
    assert [tuple(weight.shape) for weight in head.parameters()] == [(16, 16), (16,), (3, 16), (3,)]
    assert head.dropout.p == 0.25
    x = torch.randn(4, 16)
    expected = head.output(head.dense(x).clamp(min=0))
    assert torch.allclose(head.eval()(x), expected)
    torch.manual_seed(0)
    assert not torch.allclose(head.train()(x), expected)


def test_outputs_are_in_the_order_of_the_labels(encoder, batch):
    model = Classifier(encoder, GROUPS).eval()
    assert model.labels == ["slow rate", "rapid rate", "breathy"]
    outputs, embedding = model(*batch), model.embed(*batch)
    assert outputs.shape == (3, 3)
    assert torch.equal(outputs[:, :2], model.heads[0](embedding)) and torch.equal(outputs[:, 2:], model.heads[1](embedding))


@pytest.mark.parametrize("pooling", ["mean", "sum", "max"])
def test_features_are_the_encoders_embeddings(pooling, encoder, batch, recordings):
    for layer in (0, 2, -1):
        model = Classifier(encoder, GROUPS, pooling=pooling, layer=layer).eval()
        expected = encoder.embed(recordings[1:4], layer, pooling)
        assert (model.embed(*batch) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_scores(encoder, batch):
    outputs = Classifier(encoder, GROUPS).eval()(*batch)
    assert torch.equal(Classifier(encoder, GROUPS).scores(outputs), outputs)
    assert torch.equal(Classifier(encoder, GROUPS, loss="BCE").scores(outputs), outputs.sigmoid())


# --- what trains


@pytest.mark.parametrize("loss", ["MSE", "BCE"])
def test_recordings_are_scored_as_in_a_batch(loss, encoder, batch, recordings):
    torch.manual_seed(0)
    model = Classifier(encoder, GROUPS, loss=loss).train()
    scores = score_recordings(model, recordings[1:4])
    assert model.heads.training and not scores.requires_grad and scores.dtype == torch.float32
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
    assert not model.embed(*batch).requires_grad


@pytest.mark.parametrize("variant", VARIANTS)
def test_trainable(variant, checkpoints, batch):
    model = Classifier(Encoder.from_pretrained(checkpoints[variant], device="cpu"), GROUPS, freeze=False).train()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    model(*batch).square().sum().backward()
    optimizer.step()
    assert not [name for name, weight in model.named_parameters() if torch.equal(weight, before[name])]
    with torch.no_grad():
        assert not model(*batch).requires_grad


def test_a_model_can_be_thawed_from_a_frozen_encoder(encoder):
    Classifier(encoder, GROUPS, freeze=True)
    assert all(weight.requires_grad for weight in Classifier(encoder, GROUPS, freeze=False).parameters())


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
        Classifier(encoder, GROUPS, loss="CE")
    with pytest.raises(ValueError, match="mean, sum or max"):
        Classifier(encoder, GROUPS, pooling="median")
    with pytest.raises(ValueError, match="layers 0 to 3"):
        Classifier(encoder, GROUPS, layer=12)


# --- save and load


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant, checkpoints, batch, tmp_path):
    encoder = Encoder.from_pretrained(checkpoints[variant], device="cpu")
    model = Classifier(encoder, GROUPS, pooling="max", layer=2, freeze=False, loss="BCE").eval()
    model.save(tmp_path / "model")
    loaded = Classifier.load(tmp_path / "model", device="cpu")
    assert repr(loaded) == repr(model) and not loaded.training
    assert (loaded.classifiers, loaded.pooling, loaded.layer, loaded.freeze, loaded.loss) == (GROUPS, "max", 2, False, "BCE")
    assert (loaded.encoder.sample_rate, loaded.encoder.do_normalize) == (16000, True)
    weights, expected = loaded.state_dict(), model.state_dict()
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)
    assert {weight.device.type for weight in loaded.parameters()} == {"cpu"}
    with torch.no_grad():
        assert (loaded(*batch) - model(*batch)).abs().max() < 1e-6
    assert all(weight.requires_grad for weight in loaded.parameters())


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
    edit(saved, format_version=2)
    refused(saved, "format version 2")
    (saved / "config.json").write_text('{"classifiers": []}')
    refused(saved, "not a model saved by w2v2nb")


def test_incomplete_config(saved):
    config = json.loads((saved / "config.json").read_text())
    for name in ("backbone", "classifiers", "pooling"):
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
