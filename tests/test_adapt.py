"""What of an encoder trains: that moves, and nothing else; adapters that leave no trace in a saved model."""

import subprocess
import sys

import pytest
import torch
from conftest import VARIANTS

from w2v2nb.adapt import TARGETS, add_lora, choose_trainable, find_adapters, is_lora, merged_state, parse_tune
from w2v2nb.chance import Chance
from w2v2nb.encoder import Encoder
from w2v2nb.model import Classifier

GROUPS = [["breathy", "strained"]]
ONE = ["wav2vec2", "wav2vec2-stable", "wavlm"]  # one of each kind that matters here


@pytest.fixture
def load(checkpoints):
    return lambda variant="wav2vec2": Encoder.from_pretrained(checkpoints[variant], device="cpu")


@pytest.fixture
def batch(recordings):
    chosen = recordings[1:4]
    return torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True), torch.tensor([len(x) for x in chosen])


def train(model, batch, n_steps=2):
    "Some steps of AdamW over all weights; the names of those that moved, buffers included."
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    for step in range(n_steps):
        model.train()(*batch, Chance([step, 8, 9])).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def expected(model, tune, last):
    "The names that should move, written down independently of how they are chosen."
    stable, n = model.encoder.config["do_stable_layer_norm"], model.encoder.n_layers
    names = {name for name, _ in model.named_parameters()}

    def is_meant(name):
        part = name.removeprefix("encoder.model.")
        if part == name:
            return True  # heads, weights of layers, attention
        if part.startswith("encoder.layers."):
            block = int(part.split(".")[2])
            first = {"head": last, "top:1": last - 1, "top:2": last - 2}.get(tune, 0)
            return first <= block < last and (tune != "lora" or ".lora_" in part)
        if part.startswith("encoder.layer_norm."):
            return tune in ("all", "transformer") and (last == n or not stable) or tune[:3] == "top" and stable and last == n
        return tune == "all" or tune == "transformer" and not part.startswith("feature_extractor.")

    return {name for name in names if is_meant(name)}


def compare(model, moved, tune, last):
    meant = expected(model, tune, last)
    # a bias of the keys moves all scores of a query alike, which a softmax does not notice: its gradient is rounding, or zero
    still = {name for name in meant if name.endswith("k_proj.bias")}
    assert moved - still == meant - still
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == meant


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tune", ["head", "top:1", "transformer", "all", "lora"])
def test_what_is_meant_to_train_moves_and_nothing_else(tune, variant, load, batch):
    encoder = add_lora(load(variant), rank=2, targets=TARGETS) if tune == "lora" else load(variant)
    model = Classifier(encoder, GROUPS, tune=tune)
    compare(model, train(model, batch), tune, encoder.n_layers)


@pytest.mark.parametrize("variant", ONE)
@pytest.mark.parametrize(("tune", "layer"), [("top:2", 2), ("transformer", 1), ("all", 0), ("lora", 2), ("top:2", "weighted")])
def test_blocks_that_are_not_computed_do_not_train(tune, layer, variant, load, batch):
    encoder = add_lora(load(variant), rank=2) if tune == "lora" else load(variant)
    model = Classifier(encoder, GROUPS, pooling="attention", layer=layer, tune=tune)
    compare(model, train(model, batch, 3), tune, 3 if layer == "weighted" else layer)


def test_a_choice_replaces_the_one_before(load):
    encoder = load()
    for tune, share in (("all", 1), ("head", 0), ("all", 1)):
        choose_trainable(encoder, tune)
        assert {weight.requires_grad for weight in encoder.parameters()} == {bool(share)}


@pytest.mark.parametrize(
    ("text", "found"),
    [("head", ("head", 0)), ("top:1", ("top", 1)), ("top:12", ("top", 12)), ("all", ("all", 0)), ("lora", ("lora", 0))],
)
def test_texts(text, found):
    assert parse_tune(text) == found


@pytest.mark.parametrize("text", ["", "top", "top:", "top:0", "top:-1", "top:1.5", "top:02", "All", "all ", "head:1", None, 2])
def test_refused_texts(text):
    with pytest.raises(ValueError, match="it should be head, top:K .the last K blocks: top:2., transformer, all or lora"):
        parse_tune(text)


@pytest.mark.parametrize(
    ("tune", "last", "message"),
    [
        ("top:4", None, "tune is top:4 but 3 blocks are computed; give top:3 or fewer"),
        ("top:2", 1, "tune is top:2 but 1 blocks are computed; give top:1"),
        ("top:1", 0, "tune is top:1 but 0 blocks are computed"),
        ("lora", None, "no adapters; call `add_lora` before"),
    ],
)
def test_refused_choices(tune, last, message, load):
    encoder = load()
    with pytest.raises(ValueError, match=message):
        choose_trainable(encoder, tune, last)
    assert all(weight.requires_grad for weight in encoder.parameters())  # nothing has changed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(targets=["q_proj", "query"]), r"should be some of q_proj, k_proj, v_proj, out_proj, intermediate_dense, output"),
        (dict(targets=[]), "should be some of"),
        (dict(targets="q_proj"), "should be some of"),
        (dict(rank=0), "rank 0 and alpha 16; both should be positive"),
        (dict(alpha=0), "rank 8 and alpha 0"),
    ],
)
def test_refused_adapters(options, message, load):
    with pytest.raises(ValueError, match=message):
        add_lora(load(), **options)
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(add_lora(load()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_begin_as_nothing_and_merge_into_the_weights(variant, load, recordings):
    encoder, plain = load(variant), load(variant)
    names = list(encoder.state_dict())
    add_lora(encoder, rank=2, alpha=3, targets=TARGETS)
    assert torch.equal(encoder.embed(recordings), plain.embed(recordings))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in find_adapters(encoder).values():
            weight.normal_(std=0.3)
    state = encoder.state_dict()
    merged = merged_state(encoder)
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in state.items())  # stays as it is
    assert sorted(merged) == sorted(names)
    adapted = encoder.embed(recordings)
    scale = adapted.abs().max()
    assert (adapted - plain.embed(recordings)).abs().max() > 0.01 * scale
    plain.load_state_dict(merged)
    assert (plain.embed(recordings) - adapted).abs().max() < 1e-5 * scale
    # by the formula, for one layer
    layer = encoder.model["encoder"]["layers"][1]["feed_forward"]["output_dense"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert is_lora(layer) and not is_lora(layer.base_layer)
    name = "model.encoder.layers.1.feed_forward.output_dense.weight"
    assert torch.allclose(merged[name], layer.base_layer.weight + 3 / 2 * b @ a, atol=1e-6)


def test_adapters_follow_from_the_seed_and_leave_others_chance_alone(load):
    def first(seed):
        torch.manual_seed(7)
        adapters = find_adapters(add_lora(load(), seed=seed))
        return next(iter(adapters.values())), torch.rand(1)

    (a, x), (b, y), (c, _) = first(1), first(1), first(2)
    torch.manual_seed(7)
    assert torch.equal(a, b) and not torch.equal(a, c) and x == y == torch.rand(1)


def test_a_state_without_adapters_is_its_own(load):
    encoder = load()
    merged = merged_state(encoder)
    assert all(torch.equal(merged[name], value) for name, value in encoder.state_dict().items())


def test_an_adapted_model_loads_where_there_is_no_peft(load, batch, tmp_path):
    model = Classifier(add_lora(load(), rank=2), GROUPS, tune="lora", loss="BCE")
    train(model, batch)
    with torch.no_grad():
        expected = model.eval().scores(model(*batch))
    model.save(tmp_path / "model")
    torch.save({"waveform": batch[0], "lengths": batch[1], "expected": expected}, tmp_path / "batch.pt")
    code = (
        "import sys, torch\n"
        "sys.modules['peft'] = None\n"  # importing it raises ImportError
        "from w2v2nb.model import Classifier\n"
        "model, batch = Classifier.load(sys.argv[1], device='cpu'), torch.load(sys.argv[2], weights_only=True)\n"
        "expected = batch.pop('expected')\n"
        "with torch.no_grad(): print((model.scores(model(**batch)) - expected).abs().max().item(), model.tune)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "batch.pt")]
    error, tune = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert float(error) < 1e-5 and tune == "head"


def test_only_adapters_import_peft():
    code = (
        "import sys; from w2v2nb import samples; from w2v2nb.encoder import Encoder; from w2v2nb.model import Classifier\n"
        "Classifier(Encoder.from_pretrained(samples.checkpoint(), device='cpu'), [['a']], tune='top:1')\n"
        "print('peft' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["False"]
