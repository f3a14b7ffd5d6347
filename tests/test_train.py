"""The loop: what is rated counts, what should train moves, an epoch can be repeated, and a tiny set is learned by heart."""

import numpy as np
import pytest
import torch

from w2v2nb import samples
from w2v2nb.batch import Batches
from w2v2nb.data import WaveformDataset, read_annotations
from w2v2nb.encoder import Encoder
from w2v2nb.model import Classifier
from w2v2nb.train import Trainer, load_state, masked_loss, predict, save_state, trainable, validate
from w2v2nb.transforms import pipeline

LABELS = ["slow rate", "rapid rate", "strained", "breathy", "monopitch"]
TABLE = read_annotations(f"{samples.split_root()}/train.csv")


def make(freeze=True, loss="MSE", **options):
    torch.manual_seed(0)
    encoder = Encoder.from_pretrained(samples.checkpoint(), device="cpu")
    return Trainer(Classifier(encoder, [LABELS], freeze=freeze, loss=loss), loss=loss, **{"learning_rate": 3e-3} | options)


def batches(table, max_items=8, shuffle=True, **options):
    return Batches(WaveformDataset(table, LABELS, pipeline(samples.prefix())), max_items=max_items, shuffle=shuffle, **options)


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


@pytest.mark.parametrize("loss", ["MSE", "BCE"])
def test_the_loss_is_the_mean_over_rated_entries(loss):
    outputs = torch.tensor([[0.3, -1.0], [2.0, 0.7], [0.1, 0.2]], requires_grad=True)
    targets = torch.tensor([[1.0, float("nan")], [float("nan"), 0.0], [0.0, 1.0]])
    entries = [(0.3, 1.0), (0.7, 0.0), (0.1, 0.0), (0.2, 1.0)]
    if loss == "MSE":
        expected = np.mean([(o - t) ** 2 for o, t in entries])
    else:
        expected = np.mean([np.log1p(np.exp(-o)) if t else np.log1p(np.exp(o)) for o, t in entries])
    value = masked_loss(outputs, targets, loss)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    value.backward()
    assert outputs.grad[0, 1] == 0 and outputs.grad[1, 0] == 0 and outputs.grad[0, 0] != 0


def test_nothing_rated_moves_nothing():
    outputs = torch.ones(2, 1, requires_grad=True)
    value = masked_loss(outputs, torch.full((2, 1), float("nan")))
    value.backward()
    assert value == 0 and not outputs.grad.any()


@pytest.mark.parametrize("freeze", [True, False])
def test_what_should_train_moves_and_nothing_else(freeze):
    trainer = make(freeze=freeze)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trainer.run_epoch(batches(TABLE.head(24)))
    moved = {name for name, weight in trainer.model.state_dict().items() if not torch.equal(weight, before[name])}
    if freeze:
        assert moved == {name for name in before if name.startswith("heads.")} == set(trainable(trainer.model))
    else:
        # a bias before softmax over keys has no gradient
        assert {name for name in before if name.startswith("encoder.") and "k_proj.bias" not in name} <= moved


def test_an_epoch_follows_from_its_seed_and_number():
    first, again, other = make(), make(), make(seed=1)
    for trainer in (first, again, other):
        trainer.run_epoch(batches(TABLE.head(24)))
    assert equal(first.model, again.model) and not equal(first.model, other.model)


def test_a_saved_state_goes_on_as_if_nothing_had_happened(tmp_path):
    straight, stopped, resumed = make(), make(), make()
    data, held_out = batches(TABLE.head(24)), batches(TABLE.tail(12), shuffle=False)
    for _ in range(3):
        straight.run_epoch(data, held_out)
    stopped.run_epoch(data, held_out)
    save_state(stopped, tmp_path / "state.pt")
    torch.rand(7)
    load_state(resumed, tmp_path / "state.pt")
    for _ in range(2):
        resumed.run_epoch(data, held_out)
    assert equal(straight.model, resumed.model) and straight.best_epoch == resumed.best_epoch
    drop = [{k: v for k, v in row.items() if k != "seconds"} for t in (straight, resumed) for row in t.history]
    assert drop[:3] == drop[3:]


def test_a_state_is_read_without_pickle(tmp_path):
    import os
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/harm",)

    with open(tmp_path / "state.pt", "wb") as file:
        pickle.dump(Evil(), file)
    with pytest.raises(Exception, match="(?i)weights.only|unsupported|unpickl"):
        load_state(make(), tmp_path / "state.pt")
    assert not (tmp_path / "harm").exists()


def test_the_best_epoch_is_the_first_with_the_highest_validation_metric():
    trainer, kept = make(learning_rate=1e-2), []
    train, held_out = batches(TABLE.head(24)), batches(TABLE.tail(24), shuffle=False)
    for _ in range(6):
        trainer.run_epoch(train, held_out)
        kept.append({name: weight.detach().clone() for name, weight in trainable(trainer.model).items()})
    metrics = [row["metric"] for row in trainer.history]
    assert len(set(metrics)) > 2 and trainer.best_epoch == int(np.argmax(metrics)) + 1 < 6
    trainer.restore_best()
    best = kept[trainer.best_epoch - 1]
    assert all(torch.equal(weight, best[name]) for name, weight in trainable(trainer.model).items())
    assert validate(trainer.model, held_out)["metric"] == max(metrics)


def test_without_validation_the_last_epoch_is_kept():
    trainer = make()
    for _ in range(3):
        trainer.run_epoch(batches(TABLE.head(8)))
    assert trainer.best_epoch == 3 and np.isnan([row["metric"] for row in trainer.history]).all()


def test_predictions_are_in_the_dataset_s_order_and_the_model_is_not_changed():
    trainer = make()
    outputs, targets = predict(trainer.model, batches(TABLE.head(12), max_items=5, shuffle=True))
    again, _ = predict(trainer.model, batches(TABLE.head(12), max_items=1, shuffle=False))
    np.testing.assert_allclose(outputs, again, atol=1e-5)
    np.testing.assert_array_equal(targets, TABLE.head(12)[LABELS].to_numpy(dtype=np.float32))


def test_predictions_of_a_batch_that_does_not_fit_are_those_of_its_halves(monkeypatch):
    model, data = make().model, batches(TABLE.head(8), shuffle=False)
    expected, _ = predict(model, data)
    forward = Encoder.forward

    def forward_of_few(self, waveform, lengths, layers):
        if len(lengths) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, waveform, lengths, layers)

    monkeypatch.setattr(Encoder, "forward", forward_of_few)
    found, _ = predict(model, data)
    assert np.allclose(found, expected, atol=1e-5) and not data.failures


def test_a_recording_set_aside_has_no_prediction():
    table = TABLE.head(4).copy()
    table.loc[1, "uid"] = "nobody"
    data = batches(table, shuffle=False)
    outputs, targets = predict(make().model, data)
    assert np.isnan(outputs[1]).all() and np.isfinite(outputs[[0, 2, 3]]).all() and [f.uid for f in data.failures] == ["nobody"]
    assert np.isfinite(list(validate(make().model, data).values())).any()


def test_what_is_not_finite_is_set_aside_and_not_scored():
    trainer = make()
    with torch.no_grad():
        trainer.model.heads[0].output.bias.fill_(float("nan"))
    data = batches(TABLE.head(4), shuffle=False)
    outputs, _ = predict(trainer.model, data)
    assert np.isnan(outputs).all() and [f.stage for f in data.failures] == ["encode"] * 4


def test_nothing_to_validate_on_is_no_number_rather_than_zero():
    table = TABLE.head(2).assign(uid=["nobody", "noone"])
    assert np.isnan(list(validate(make().model, batches(table)).values())).all()


def test_a_loss_that_is_no_number_names_the_recordings():
    trainer = make()
    with torch.no_grad():
        trainer.model.heads[0].dense.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=TABLE.uid[0]):
        trainer.run_epoch(batches(TABLE.head(1)))


def test_eight_recordings_are_learned_by_heart():
    trainer = make(freeze=False, learning_rate=1e-3)
    data = batches(TABLE.dropna().head(8))
    for _ in range(60):
        trainer.run_epoch(data)
    assert validate(trainer.model, batches(TABLE.dropna().head(8), shuffle=False))["validation_loss"] < 0.02
