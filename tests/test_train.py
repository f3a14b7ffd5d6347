"""The loop: what should train moves, however a step is computed; an epoch can be repeated; tiny sets are learned by heart."""

import numpy as np
import pytest
import torch

from w2v2nb import samples
from w2v2nb.adapt import add_lora
from w2v2nb.batch import Batches, Failure
from w2v2nb.chance import Chance
from w2v2nb.data import WaveformDataset, read_annotations
from w2v2nb.encoder import Encoder
from w2v2nb.features import FeatureBatches, read_features
from w2v2nb.model import Classifier
from w2v2nb.optim import make_optimizer, make_schedule
from w2v2nb.predict import embed_batch, predict, validate
from w2v2nb.processes import make_accelerator
from w2v2nb.train import (
    Settings,
    Trainer,
    copy_weights,
    divide,
    draw_share,
    estimate_epoch_s,
    find_best,
    find_partners,
    fit,
    is_done,
    load_state,
    save_state,
    sum_losses,
    trainable,
)
from w2v2nb.transforms import pipeline

LABELS = ["slow rate", "rapid rate", "strained", "breathy", "monopitch"]
TABLE = read_annotations(f"{samples.split_root()}/train.csv")
NOISY = dict(feat_proj_dropout=0.1, hidden_dropout=0.1, attention_dropout=0.1, activation_dropout=0.1)


def make(
    tune="head", loss="MSE", learning_rate=3e-3, schedule=None, sgd=False, device="cpu", precision="fp32", head=None, **settings
):
    "A trainer of a new model on the tiny checkpoint."
    torch.manual_seed(0)
    encoder = Encoder.from_pretrained(samples.checkpoint(), device=device, precision=precision)
    if tune == "lora":
        add_lora(encoder, rank=16, alpha=32)
    model = Classifier(encoder, [LABELS], tune=tune, loss=loss, head=head)
    optimizer = make_optimizer(model, "adam", learning_rate)
    if sgd:
        optimizer = torch.optim.SGD(trainable(model).values(), learning_rate)
    schedule = schedule and make_schedule(optimizer, schedule, 12, 0.1)
    accelerator = make_accelerator(device, scales_loss=precision == "fp16")
    return Trainer(model, optimizer, schedule=schedule, settings=Settings(**settings), accelerator=accelerator)


def batches(table, max_items=8, shuffle=True, clip_length=0, **options):
    recordings = WaveformDataset(table, LABELS, pipeline(samples.prefix(), clip_length=clip_length))
    return Batches(recordings, max_items=max_items, shuffle=shuffle, **options)


def keep(model, table, max_items=8, shuffle=True, **options):
    "Batches of the table's features."
    table = read_features(model.encoder, batches(table, shuffle=False), model.layers, model.pooling)
    return FeatureBatches(table.uids, table.features, table.targets, max_items, shuffle, notes=table.notes, **options)


def state(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def rows(trainer):
    return [{name: repr(value) for name, value in row.items() if name != "seconds"} for row in trainer.history]  # nan is not nan


# what trains


@pytest.mark.parametrize("tune", ["head", "top:1", "transformer", "all", "lora"])
def test_what_should_train_moves_and_nothing_else(tune):
    trainer = make(tune)
    before, meant = state(trainer.model), {*trainable(trainer.model)}
    trainer.run_epoch(batches(TABLE.head(16)))
    moved = {name for name, weight in trainer.model.state_dict().items() if not torch.equal(weight, before[name])}
    # a bias before softmax over keys has no gradient but rounding
    assert moved <= meant and {name for name in meant if "k_proj.bias" not in name} <= moved
    encoder = {name for name in meant if name.startswith("encoder.")}
    assert bool(encoder) == (tune != "head") and (
        tune != "all" or len(encoder) == len([n for n in before if n[:8] == "encoder."])
    )


def test_an_epoch_follows_from_its_seed_and_number():
    first, again, other = make(), make(), make(seed=1)
    for trainer in (first, again, other):
        torch.rand(3)
        trainer.run_epoch(batches(TABLE.head(24)))
    assert equal(first.model, again.model) and not equal(first.model, other.model)


def test_kept_features_train_as_the_recordings_do():
    table, held_out, histories = TABLE.head(20).copy(), TABLE.tail(12), []
    table.loc[3, "uid"] = "nobody"  # cannot be read
    for is_kept in (True, False):
        trainer = make(mixup=0.4, clip_norm=0.5)
        train, validation = (
            keep(trainer.model, part, shuffle=is_train, **dict(seed=0)) if is_kept else batches(part, shuffle=is_train, seed=0)
            for part, is_train in ((table, True), (held_out, False))
        )
        for _ in range(3):
            trainer.run_epoch(train, validation)
        histories.append(trainer.history)
        assert [failure["uid"] for failure in trainer.notes[0]["failures"]] == ["nobody"]
    for first, second in zip(*histories, strict=True):
        assert first | {"seconds": 0} == pytest.approx(second | {"seconds": 0}, abs=1e-5)


# a step


@pytest.mark.parametrize(
    ("n", "n_pieces", "sizes"),
    [
        (8, 1, [8]),
        (8, 3, [4, 4]),
        (5, 3, [2, 2, 1]),
        (7, 2, [4, 3]),
        (3, 8, [2, 1]),
        (1, 4, [1]),
        (0, 3, []),
        (8, 4, [2, 2, 2, 2]),
    ],
)
def test_pieces_of_a_step_are_all_of_it_and_keep_pairs_together(n, n_pieces, sizes):
    (batch, *_) = batches(TABLE.head(max(n, 1)), shuffle=True)
    pieces = divide(batch if n else type(batch)([], [], batch.waveform[:0], batch.lengths[:0], batch.targets[:0], 0.0), n_pieces)
    assert [len(piece.index) for piece in pieces] == sizes and len(pieces) <= n_pieces
    assert sum((piece.uids for piece in pieces), []) == (batch.uids if n else [])


@pytest.mark.parametrize("settings", [dict(), dict(mixup=0.3)])
def test_a_step_in_pieces_is_the_step_and_no_remainder_is_lost(settings):
    table, weights = TABLE.head(13), []  # a step of 8, and one of 5
    table = table.assign(strained=np.where(np.arange(13) < 9, np.nan, table.strained))  # rated unevenly
    for n_pieces in (1, 3):
        trainer = make("top:1", sgd=True, learning_rate=0.1, n_pieces=n_pieces, **settings)
        seen, step = [], trainer.optimizer.step
        trainer.optimizer.step = lambda step=step, seen=seen: (seen.append(1), step())
        trainer.run_epoch(batches(table))
        assert len(seen) == 2
        weights.append((state(trainer.model), trainer.history[0]["train_loss"]))
    (first, loss), (second, other) = weights
    assert loss == pytest.approx(other, abs=1e-6)
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_a_step_is_the_mean_over_the_rated_entries_of_all_its_recordings():
    trainer, before = make(sgd=True, learning_rate=0.1, head=dict(dropout=0.0)), make(head=dict(dropout=0.0))
    table = TABLE.head(6)
    trainer.run_epoch(batches(table))
    outputs, targets = (torch.from_numpy(x) for x in predict(before.model, batches(table, shuffle=False)))
    is_rated = ~targets.isnan()
    assert is_rated.sum() < targets.numel()
    assert trainer.history[0]["train_loss"] == pytest.approx((outputs - targets)[is_rated].square().mean().item(), rel=1e-5)


def test_a_norm_bounds_the_step():
    lengths = []
    for clip_norm in (0.0, 0.01):
        trainer = make(sgd=True, learning_rate=1.0, clip_norm=clip_norm)
        before = state(trainer.model)
        trainer.run_epoch(batches(TABLE.head(8)))
        moves = [(weight - before[name]).square().sum() for name, weight in trainer.model.state_dict().items()]
        lengths.append(float(sum(moves)) ** 0.5)
    assert lengths[0] > 0.02 and lengths[1] == pytest.approx(0.01, rel=1e-3)


def test_mixup_mixes_a_pair_s_embeddings_and_losses():
    model = make(head=dict(dropout=0.0)).model
    (batch,) = keep(model, TABLE.head(5), shuffle=False)
    objective, chance = Trainer(model, make_optimizer(model)).objective, Chance([1] * 5)
    partners, embedding = [1, 0, 3, 2, 4], embed_batch(model, batch)
    assert find_partners([0, 1, 2, 3, 4]).tolist() == partners and find_partners([1, 2, 3]).tolist() == [0, 2, 1]
    mixed = 0.7 * embedding + 0.3 * embedding[partners]
    expected = sum(
        w * objective.total(model.classify(mixed), t) for w, t in ((0.7, batch.targets), (0.3, batch.targets[partners]))
    )
    assert sum_losses(model, batch, objective, chance, 0.7).item() == pytest.approx(expected.item(), rel=1e-5)
    plain = objective.total(model.classify(embedding), batch.targets)
    assert sum_losses(model, batch, objective, chance).item() == pytest.approx(plain.item(), rel=1e-6)


def test_shares_of_mixup_follow_from_the_seed_and_are_beta():
    assert draw_share(0.0, 1, 2, 3) == 1.0 and draw_share(0.4, 1, 2, 3) == draw_share(0.4, 1, 2, 3) != draw_share(0.4, 1, 2, 4)
    shares = np.array([draw_share(0.4, 0, 1, step) for step in range(2000)])
    assert shares.mean() == pytest.approx(0.5, abs=0.03) and shares.var() == pytest.approx(0.25 / 1.8, abs=0.01)


@pytest.mark.parametrize("tune", ["head", "top:1"])
def test_steps_without_a_rating_move_nothing(tune):
    trainer = make(tune)
    before = state(trainer.model)
    trainer.run_epoch(batches(TABLE.head(4).assign(**dict.fromkeys(LABELS, np.nan))))
    assert np.isnan(trainer.history[0]["train_loss"])
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())


# what is no number


def test_a_loss_that_is_no_number_names_the_recordings_and_changes_nothing():
    trainer = make(head=dict(dropout=0.0))
    with torch.no_grad():
        trainer.model.heads[0].output.weight.fill_(1e30)
    before = state(trainer.model)
    with pytest.raises(FloatingPointError, match=f"(?=.*{TABLE.uid[0]})(?=.*{TABLE.uid[1]})the loss is .*lower --learning_rate"):
        trainer.run_epoch(batches(TABLE.head(2)))
    assert not trainer.history and all(torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_a_gradient_that_is_no_number_names_the_recordings_and_changes_nothing(clip_norm):
    trainer = make(clip_norm=clip_norm)
    trainer.model.heads[0].output.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = state(trainer.model)
    with pytest.raises(FloatingPointError, match=f"the gradient is .* recordings {TABLE.uid[0]}"):
        trainer.run_epoch(batches(TABLE.head(1)))
    assert not trainer.history and all(torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())


def test_a_training_that_fails_late_leaves_the_best_weights():
    trainer, kept = make(learning_rate=1e-2), []

    def spoil(row):
        kept.append(copy_weights(trainer.model))
        if row["epoch"] == 3:
            trainer.model.heads[0].output.weight.register_hook(lambda gradient: gradient * float("nan"))

    train, held_out = keep(trainer.model, TABLE.head(24)), keep(trainer.model, TABLE.tail(24), shuffle=False)
    with pytest.raises(FloatingPointError):
        fit(trainer, train, held_out, 9, spoil)
    assert len(trainer.history) == 3
    assert all(torch.equal(weight, kept[trainer.best_epoch - 1][name]) for name, weight in trainable(trainer.model).items())


# epochs


@pytest.mark.parametrize(
    ("monitor", "rows", "best"),
    [
        ("auc", [(0.5, 1.0), (0.7, 2.0), (0.7, 0.5)], 2),
        ("loss", [(0.5, 1.0), (0.7, 2.0), (0.7, 0.5)], 3),
        ("loss", [(0.5, 1.0), (0.7, 1.0)], 1),
        ("auc", [(np.nan, 1.0), (0.4, 2.0), (np.nan, 0.5)], 2),
        ("auc", [(np.nan, np.nan)] * 3, 3),
        ("loss", [(0.9, np.nan), (0.1, 3.0)], 2),
    ],
)
def test_the_best_epoch(monitor, rows, best):
    history = [{"epoch": i + 1, "metric": auc, "validation_loss": loss} for i, (auc, loss) in enumerate(rows)]
    assert find_best(history, monitor) == best


@pytest.mark.parametrize("monitor", ["auc", "loss"])
def test_fit_ends_with_the_weights_of_the_best_epoch(monitor):
    trainer, kept = make(learning_rate=3e-2, monitor=monitor, seed=3), []
    train, held_out = keep(trainer.model, TABLE.head(24)), keep(trainer.model, TABLE.tail(24), shuffle=False)
    fit(trainer, train, held_out, 8, lambda row: kept.append(copy_weights(trainer.model)))
    values = [row["metric"] if monitor == "auc" else -row["validation_loss"] for row in trainer.history]
    assert len(values) == 8 and trainer.best_epoch == int(np.argmax(values)) + 1 < len(values)
    best = kept[trainer.best_epoch - 1]
    assert all(torch.equal(weight, best[name]) for name, weight in trainable(trainer.model).items())
    found = validate(trainer.model, held_out, trainer.objective)
    assert {found["metric"], -found["validation_loss"]} & {max(values)}


@pytest.mark.parametrize(("patience", "n_expected"), [(0, 6), (1, 2), (3, 4)])
def test_training_ends_when_no_better_epoch_came(patience, n_expected):
    trainer = make(learning_rate=1e-12, patience=patience)  # so that nothing ever gets better
    fit(trainer, keep(trainer.model, TABLE.head(8)), keep(trainer.model, TABLE.tail(24), shuffle=False), 6)
    assert len(trainer.history) == n_expected and trainer.best_epoch == 1
    assert is_done(trainer, 6)


def test_without_validation_the_last_epoch_is_kept_and_patience_waits_for_nothing():
    trainer = make(patience=1)
    fit(trainer, keep(trainer.model, TABLE.head(8)), None, 3)
    assert trainer.best_epoch == 3 and np.isnan([row["metric"] for row in trainer.history]).all()


@pytest.mark.parametrize(("tune", "schedule"), [("head", None), ("top:1", "cosine"), ("lora", "onecycle")])
def test_a_saved_state_goes_on_as_if_nothing_had_happened(tmp_path, tune, schedule):
    trainers = [make(tune, schedule=schedule, patience=2, mixup=0.2, learning_rate=1e-2) for _ in range(3)]
    straight, stopped, resumed = trainers
    model, n = straight.model, 6 if tune == "head" else 4
    data, held_out = batches(TABLE.head(12), clip_length=16000), batches(TABLE.tail(8), shuffle=False, clip_length=16000)
    if tune == "head":
        data, held_out = keep(model, TABLE.head(24)), keep(model, TABLE.tail(12), shuffle=False)
    fit(straight, data, held_out, n)
    for _ in range(2):
        stopped.run_epoch(data, held_out)
    save_state(stopped, tmp_path / "state.pt")
    torch.rand(7)
    load_state(resumed, tmp_path / "state.pt")
    fit(resumed, data, held_out, n)
    assert rows(straight) == rows(resumed) and straight.best_epoch == resumed.best_epoch and equal(straight.model, resumed.model)
    if schedule:
        assert len({row["learning_rate"] for row in straight.history}) == len(straight.history)


@pytest.mark.parametrize("tune", ["top:1", "all", "lora"])
def test_validation_sees_the_weights_of_its_epoch(tune):
    trainer, held_out = make(tune), batches(TABLE.tail(8), shuffle=False, clip_length=16000)
    for _ in range(2):
        row = trainer.run_epoch(batches(TABLE.head(8), clip_length=16000), held_out)
    fresh = make(tune)
    fresh.model.load_state_dict(trainer.model.state_dict())
    assert validate(fresh.model, held_out, fresh.objective)["validation_loss"] == row["validation_loss"]


def test_an_interrupted_training_has_the_best_weights_and_can_go_on(tmp_path):
    straight, stopped, resumed = (make(learning_rate=1e-2) for _ in range(3))

    def interrupt(row):
        save_state(stopped, tmp_path / "state.pt")
        if row["epoch"] == 4:
            raise KeyboardInterrupt

    train, held_out = keep(straight.model, TABLE.head(24)), keep(straight.model, TABLE.tail(24), shuffle=False)
    fit(straight, train, held_out, 7)
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, train, held_out, 7, interrupt)
    assert validate(stopped.model, held_out, stopped.objective)["metric"] == max(row["metric"] for row in stopped.history)
    load_state(resumed, tmp_path / "state.pt")
    fit(resumed, train, held_out, 7)
    assert rows(straight) == rows(resumed) and equal(straight.model, resumed.model)


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


def test_an_estimate_changes_nothing():
    trainer, untouched = make("top:1"), make("top:1")
    train = batches(TABLE.head(12))
    assert estimate_epoch_s(trainer, train) > 0
    for each, data in ((trainer, train), (untouched, batches(TABLE.head(12)))):
        each.run_epoch(data)
    assert rows(trainer) == rows(untouched) and equal(trainer.model, untouched.model)
    assert np.isnan(estimate_epoch_s(make(), batches(TABLE.head(1).assign(uid="nobody"))))


# predictions


def test_predictions_are_in_the_dataset_s_order_and_the_model_is_not_changed():
    trainer = make()
    before = state(trainer.model)
    outputs, targets = predict(trainer.model, batches(TABLE.head(12), max_items=5, shuffle=True))
    again, _ = predict(trainer.model, batches(TABLE.head(12), max_items=1, shuffle=False))
    kept, _ = predict(trainer.model, keep(trainer.model, TABLE.head(12), shuffle=False))
    np.testing.assert_allclose(outputs, again, atol=1e-5)
    np.testing.assert_allclose(outputs, kept, atol=1e-5)
    np.testing.assert_array_equal(targets, TABLE.head(12)[LABELS].to_numpy(dtype=np.float32))
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())


def test_predictions_of_a_batch_that_does_not_fit_are_those_of_its_halves(monkeypatch):
    model, data = make().model, batches(TABLE.head(8), shuffle=False)
    expected, _ = predict(model, data)
    forward = Encoder.forward

    def forward_of_few(self, waveform, lengths, *more):
        if len(lengths) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, waveform, lengths, *more)

    monkeypatch.setattr(Encoder, "forward", forward_of_few)
    found, _ = predict(model, data)
    assert np.allclose(found, expected, atol=1e-5) and not data.failures


def test_a_recording_set_aside_has_no_prediction():
    table = TABLE.head(4).copy()
    table.loc[1, "uid"] = "nobody"
    trainer = make()
    for data in (batches(table, shuffle=False), keep(trainer.model, table, shuffle=False)):
        outputs, targets = predict(trainer.model, data)
        assert (
            np.isnan(outputs[1]).all() and np.isfinite(outputs[[0, 2, 3]]).all() and [f.uid for f in data.failures] == ["nobody"]
        )
        assert np.isfinite(list(validate(trainer.model, data, trainer.objective).values())).all()


def test_what_is_not_finite_is_set_aside_and_not_scored():
    trainer = make()
    with torch.no_grad():
        trainer.model.heads[0].output.bias.fill_(float("nan"))
    data = batches(TABLE.head(4), shuffle=False)
    outputs, _ = predict(trainer.model, data)
    assert (
        np.isnan(outputs).all() and [f.stage for f in data.failures] == ["encode"] * 4 and isinstance(data.failures[0], Failure)
    )


def test_nothing_to_validate_on_is_no_number_rather_than_zero():
    trainer, table = make(), TABLE.head(2).assign(uid=["nobody", "noone"])
    for data in (batches(table), None):
        assert np.isnan(list(validate(trainer.model, data, trainer.objective).values())).all()


# the whole chain


@pytest.mark.parametrize(
    ("tune", "learning_rate", "n_epochs"), [("head", 3e-3, 300), ("top:1", 3e-3, 50), ("lora", 1e-2, 60), ("all", 1e-3, 50)]
)
def test_eight_recordings_are_learned_by_heart(tune, learning_rate, n_epochs):
    head = dict(dropout=0.0) if tune != "head" else dict(dropout=0.0, size=256, activation="gelu", layer_norm=True)
    trainer, table = make(tune, loss="BCE", learning_rate=learning_rate, head=head), TABLE.dropna().head(8)
    data, held = keep(trainer.model, table), keep(trainer.model, table)
    if tune != "head":
        data, held = (batches(table, clip_length=12000, shuffle=is_train) for is_train in (True, False))  # short, to be quick
    for _ in range(n_epochs):
        trainer.run_epoch(data)
    found = validate(trainer.model, held, trainer.objective)
    assert found["validation_loss"] < 0.05 and found["metric"] == 1.0


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="half precision is trained on a GPU")


@needs_gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_an_encoder_is_trained_in_half_precision(precision):
    found = {}
    for name in ("fp32", precision):
        trainer = make("all", loss="BCE", device="cuda", precision=name, head=dict(dropout=0.0), learning_rate=1e-3)
        for _ in range(30):
            trainer.run_epoch(batches(TABLE.dropna().head(8)))
        found[name] = trainer.history[-1]["train_loss"]
        assert (trainer.accelerator.scaler is not None) == (name == "fp16")
    assert found[precision] < 0.3 and found[precision] == pytest.approx(found["fp32"], abs=0.15)


@needs_gpu
def test_a_step_that_overflows_half_precision_is_left_out():
    trainer = make("all", device="cuda", precision="fp16")
    hook = trainer.model.heads[0].output.weight.register_hook(lambda gradient: gradient * float("inf"))
    before, scale = state(trainer.model), trainer.accelerator.scaler.get_scale()
    trainer.run_epoch(batches(TABLE.head(4)))
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())
    assert trainer.accelerator.scaler.get_scale() < scale
    hook.remove()
    trainer.run_epoch(batches(TABLE.head(4)))
    assert not torch.equal(trainer.model.heads[0].output.weight, before["heads.0.output.weight"])
