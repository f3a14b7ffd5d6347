"""Whole runs on the shipped recordings: what each mode writes, what it refuses, and what survives a kill."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import w2v2nb.run
from w2v2nb import samples, storage
from w2v2nb.__main__ import main
from w2v2nb.backbone import find_bf16
from w2v2nb.config import ConfigError, configure
from w2v2nb.data import WaveformDataset
from w2v2nb.folder import RunFolder, claim, recording
from w2v2nb.parts import rows_done
from w2v2nb.run import start

SPLITS = samples.split_root()
LABELS = ["slow rate", "rapid rate", "strained", "breathy", "monopitch"]
SHIPPED = dict(prefix=samples.prefix(), device="cpu")


def read(path):
    return pd.read_csv(path, dtype={"uid": str, "subject": str})


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A split of few recordings: train.csv, val.csv, test.csv, labels.txt."
    folder = tmp_path_factory.mktemp("small")
    train, test = read(f"{SPLITS}/train.csv"), read(f"{SPLITS}/test.csv")
    val = train[train.subject.isin(train.subject.unique()[:2])]
    for name, table in dict(train=train.drop(val.index).head(24), val=val, test=test.head(16)).items():
        table.to_csv(folder / f"{name}.csv", index=False)
    shutil.copy(samples.label_txt(), folder / "labels.txt")
    return folder


def tune(split, exp_dir, **changes):
    given = dict(SHIPPED, data_split_root=str(split), label_txt=samples.label_txt(), checkpoint=samples.checkpoint())
    return configure("finetune", **given | dict(exp_dir=str(exp_dir), learning_rate=3e-3) | changes)


def embed(table, exp_dir, **changes):
    given = dict(SHIPPED, data_split_root=str(table), checkpoint=samples.checkpoint(), exp_dir=str(exp_dir))
    return configure("extraction", **given | changes)


@pytest.fixture(scope="module")
def tuned(small, tmp_path_factory):
    return start(tune(small, tmp_path_factory.mktemp("tuned"), epochs=3, dataset="clinic", loss="BCE"))


def test_finetune_leaves_the_files_of_the_contract(tuned, small):
    written = {path.name for path in tuned.path.iterdir()}
    names = ["model", "history.csv", "predictions.csv", "metrics.csv", "failures.csv", "split"]
    assert written == {"run.json", *(f"clinic_{name}" for name in names)}
    history = read(tuned / "history.csv")
    assert list(history) == ["epoch", "train_loss", "validation_loss", "metric", "learning_rate", "seconds"]
    assert history.epoch.tolist() == [1, 2, 3] and history.notna().all(axis=None)
    predictions, test = read(tuned / "predictions.csv"), read(small / "test.csv")
    assert predictions.uid.tolist() == test.uid.tolist() and predictions.uid.str.startswith("000").all()
    assert list(predictions)[:4] == ["uid", "subject", "slow rate_target", "slow rate_score"]
    scores = predictions[[f"{label}_score" for label in LABELS]]
    assert scores.ge(0).all(axis=None) and scores.le(1).all(axis=None)
    for label in LABELS:
        pd.testing.assert_series_equal(predictions[f"{label}_target"], test[label], check_names=False, check_dtype=False)
    metrics = read(tuned / "metrics.csv")
    assert list(metrics)[:4] == ["Label", "AUC", "n_pos", "n_neg"] and metrics.Label.tolist() == LABELS
    assert (metrics.n_pos + metrics.n_neg).tolist() == test[LABELS].notna().sum().tolist()
    assert (tuned / "failures.csv").read_text() == "uid,path,stage,error\n"


def test_run_json_explains_the_run(tuned):
    about = json.loads((tuned.path / "run.json").read_text())
    assert (about["state"], about["mode"], about["seed"]) == ("finished", "finetune", 0)
    assert about["counts"] == {"rows": 16, "failures": 0, "shortened": about["counts"]["shortened"]}
    assert about["parameters"]["epochs"] == 3 and about["parameters"]["padding"] == "batch"
    assert {"torch", "transformers", "w2v2nb", "python"} <= set(about["versions"])
    assert {"train.csv", "val.csv", "test.csv", "labels.txt", "weights"} <= set(about["fingerprints"])
    assert about["seconds"] > 0 and about["finished"] >= about["started"]


def test_the_model_scores_the_same_in_a_new_process(tuned, small, tmp_path):
    arguments = ["eval-only", "-i", samples.prefix(), "-d", str(small), "-mp", str(tuned / "model")]
    arguments += ["-o", str(tmp_path / "e")]
    done = subprocess.run([sys.executable, "-m", "w2v2nb", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = RunFolder(tmp_path / "e")
    assert done.stdout.splitlines()[-1].startswith("16 rows written")
    first, again = read(tuned / "predictions.csv"), read(folder / "predictions.csv")
    pd.testing.assert_frame_equal(first, again, rtol=0, atol=1e-6)
    names = {f"{small.name}_{what}.csv" for what in ("predictions", "metrics", "failures")}
    assert {path.name for path in folder.path.iterdir()} == {"run.json", *names}


def test_a_fine_tuned_model_s_own_labels_count(tuned, small, tmp_path):
    (tmp_path / "other.txt").write_text("breathy\nhoarse\n")
    config = dict(SHIPPED, data_split_root=str(small), mdl_path=str(tuned / "model"), exp_dir=str(tmp_path / "e"))
    for mode in ("eval-only", "extraction"):
        with pytest.raises(ConfigError, match="hoarse"):
            table = dict(data_split_root=str(small / "test.csv"), label_txt=str(tmp_path / "other.txt"))
            start(configure(mode, **config | table))
    assert start(configure("eval-only", **config, label_txt=samples.label_txt())).about["counts"]["rows"] == 16


def test_a_difference_in_how_the_sound_is_treated_is_a_warning(tuned, small, tmp_path, capsys):
    config = dict(SHIPPED, data_split_root=str(small / "test.csv"), mdl_path=str(tuned / "model"), exp_dir=str(tmp_path / "e"))
    folder = start(configure("eval-only", **config, clip_length=32000))
    assert folder.about["warnings"] == ["clip_length is 32000, the model was trained with 160000"]
    assert "warning: clip_length is 32000" in capsys.readouterr().out
    assert folder.about["counts"]["shortened"] > 0


def test_embeddings_are_those_of_each_recording_alone_in_the_table_s_order(small, tmp_path):
    from w2v2nb.encoder import Encoder
    from w2v2nb.transforms import pipeline

    table = read(small / "test.csv").sample(frac=1, random_state=0)
    table.to_csv(tmp_path / "t.csv", index=False)
    folder = start(embed(tmp_path / "t.csv", tmp_path / "x", layer="0,2,-1", pooling_mode="max", clip_length=0))
    stored = pq.read_table(folder / "embeddings.parquet")
    hidden = Encoder.from_pretrained(samples.checkpoint()).hidden_size
    assert stored.schema.names == ["uid", "embedding_0", "embedding_2", "embedding_3"]
    assert stored.schema.field("uid").type == pa.string()
    assert stored.schema.field("embedding_0").type == pa.list_(pa.float32(), hidden)
    assert stored["uid"].to_pylist() == table.uid.tolist()
    about = {key.decode(): value.decode() for key, value in stored.schema.metadata.items()}
    assert (about["pooling_mode"], about["layers"], about["clip_length"]) == ("max", "[0, 2, 3]", "0")
    assert about["model"] == samples.checkpoint() and {"weights", "torch", "w2v2nb"} <= set(about)
    encoder, transform = Encoder.from_pretrained(samples.checkpoint(), device="cpu"), pipeline(samples.prefix(), clip_length=0)
    for i in (0, 7):
        alone = encoder.embed([transform({"uid": table.uid.iloc[i]})["waveform"][0]], layer=[0, 2, -1], pooling="max")[0]
        rows = [stored[name][i].as_py() for name in stored.schema.names[1:]]
        np.testing.assert_allclose(np.array(rows), alone.numpy(), rtol=1e-5, atol=1e-5)


def test_one_layer_is_one_column_and_the_model_s_own_encoder_counts(tuned, small, tmp_path):
    config = embed(small / "test.csv", tmp_path / "x", mdl_path=str(tuned / "model"), checkpoint="no/such-checkpoint")
    assert pq.read_table(start(config) / "embeddings.parquet").schema.names == ["uid", "embedding"]


def test_all_layers_and_several_poolings_are_those_of_single_runs(small, tmp_path):
    folder = start(embed(small / "test.csv", tmp_path / "x", layer="all", pooling_mode="max,mean"))
    table = pd.read_parquet(folder / "embeddings.parquet")
    assert list(table) == ["uid", *(f"embedding_{layer}_{pooling}" for layer in range(4) for pooling in ("max", "mean"))]
    for layer, pooling in ((2, "mean"), (-1, "max")):
        one = start(embed(small / "test.csv", tmp_path / f"{layer}", layer=layer, pooling_mode=pooling)) / "embeddings.parquet"
        column = f"embedding_{layer % 4}_{pooling}"
        np.testing.assert_allclose(np.stack(table[column]), np.stack(pd.read_parquet(one).embedding), rtol=0, atol=1e-5)


def test_windows_have_their_times_and_metadata(small, tmp_path):
    folder = start(embed(small / "test.csv", tmp_path / "x", window=0.5, hop=0.25))
    stored = pq.read_table(folder / "embeddings.parquet")
    assert stored.schema.names == ["uid", "start_s", "end_s", "embedding"]
    assert stored.schema.types[1:3] == [pa.float64(), pa.float64()]
    frame = stored.to_pandas()
    assert frame.uid.unique().tolist() == read(small / "test.csv").uid.tolist() and len(frame) == folder.about["counts"]["rows"]
    for _, rows in frame.groupby("uid", sort=False):
        assert rows.start_s.tolist() == [0.25 * k for k in range(len(rows))] and (rows.end_s - rows.start_s).le(0.5).all()
    about = stored.schema.metadata
    assert (about[b"window"], about[b"hop"], about[b"pooling_mode"]) == (b"0.5", b"0.25", b"mean")


def test_frames_are_a_folder_of_parts_in_the_table_s_order(small, tmp_path):
    from w2v2nb.encoder import Encoder
    from w2v2nb.transforms import pipeline

    folder = start(embed(small / "test.csv", tmp_path / "x", frames=True, layer="1,3"))
    assert not (folder / "embeddings.parquet").exists()
    stored = pa.concat_tables(pq.read_table(part) for part in sorted((folder / "frames").glob("*.parquet")))
    assert stored.schema.names == ["uid", "time_s", "embedding_1", "embedding_3"]
    assert folder.about["counts"] == {"rows": stored.num_rows, "recordings": 16, "failures": 0, "shortened": 0}
    assert stored.schema.metadata[b"pooling_mode"] == b"none"
    assert pd.unique(np.array(stored["uid"].to_pylist())).tolist() == read(small / "test.csv").uid.tolist()
    encoder, transform = Encoder.from_pretrained(samples.checkpoint(), device="cpu"), pipeline(samples.prefix())
    last = read(small / "test.csv").uid.iloc[-1]
    hidden, times = encoder.frames(transform({"uid": last})["waveform"][0], layer=3)
    rows = stored.slice(stored.num_rows - len(hidden))
    assert rows["uid"].to_pylist() == [last] * len(hidden) and rows["time_s"].to_pylist() == times.tolist()
    np.testing.assert_allclose(np.stack(rows["embedding_3"].to_numpy()), hidden.numpy(), rtol=1e-5, atol=1e-5)


def test_a_model_s_own_embeddings_and_the_labels_of_its_dense_layers(small, tmp_path):
    from w2v2nb.model import Classifier

    changes = dict(separate_heads=True, dataset="m", pooling_mode="max", layer=2, epochs=1)
    model = start(tune(small, tmp_path / "m", **changes)) / "model"
    given = dict(mdl_path=str(model))
    made = [start(embed(small / "test.csv", tmp_path / kind, **given, embedding=kind)) for kind in ("pooled", "dense")]
    pooled, dense = (pq.read_table(folder / "embeddings.parquet") for folder in made)
    assert pooled.schema.names == ["uid", "embedding"]
    assert (pooled.schema.metadata[b"layers"], pooled.schema.metadata[b"pooling_mode"]) == (b"[2]", b"max")
    names = [f"embedding_{k}" for k in range(len(LABELS))]
    assert dense.schema.names[1:] == names
    assert json.loads(dense.schema.metadata[b"classifiers"]) == {n: [label] for n, label in zip(names, LABELS, strict=True)}
    heads, embedding = Classifier.load(model, device="cpu").heads, torch.from_numpy(np.stack(pooled["embedding"].to_numpy()))
    for name, head in zip(names, heads, strict=True):
        expected = torch.relu(head.dense(embedding)).detach()
        np.testing.assert_allclose(np.stack(dense[name].to_numpy()), expected.numpy(), rtol=1e-5, atol=1e-5)
    given |= dict(SHIPPED, data_split_root=str(small / "test.csv"), exp_dir=str(tmp_path / "e"))
    scores = read(start(configure("eval-only", **given)) / "predictions.csv")
    outputs = torch.cat([head.output(torch.relu(head.dense(embedding))) for head in heads], 1).detach()
    np.testing.assert_allclose(scores[[f"{label}_score" for label in LABELS]], outputs, rtol=1e-4, atol=1e-4)


def test_clip_padding_is_the_original_s_recipe(small, tmp_path):
    import torch
    from transformers import Wav2Vec2Model

    from w2v2nb.transforms import pipeline

    read(small / "test.csv").head(3).to_csv(tmp_path / "t.csv", index=False)
    folder = start(embed(tmp_path / "t.csv", tmp_path / "x", padding="clip", clip_length=48000))
    stored = pd.read_parquet(folder / "embeddings.parquet")
    plain, transform = Wav2Vec2Model.from_pretrained(samples.checkpoint()).eval(), pipeline(samples.prefix(), clip_length=48000)
    for uid, embedding in zip(stored.uid, stored.embedding, strict=True):
        waveform = transform({"uid": uid})["waveform"][0]
        padded = torch.cat([waveform, waveform.mean().expand(48000 - len(waveform))])
        normal = (padded - padded.mean()) / (padded.var(correction=0) + 1e-7).sqrt()
        with torch.no_grad():
            expected = plain(normal[None]).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(embedding, expected.numpy(), rtol=1e-4, atol=2e-5)


def test_bad_recordings_are_set_aside_and_listed(tmp_path):
    audio = tmp_path / "audio"
    good = read(f"{SPLITS}/test.csv").uid[:2].tolist()
    for uid in good:
        shutil.copytree(f"{samples.prefix()}/{uid}", audio / uid)
    (audio / "empty.wav").touch()
    (audio / "text.wav").write_text("these are words" * 100)
    import soundfile

    soundfile.write(audio / "short.wav", np.zeros(300) + 0.1, 16000)
    soundfile.write(audio / "silent.wav", np.zeros(16000), 16000)
    uids = ["missing", good[0], "empty", "text", "short", "silent", "../outside", good[1]]
    pd.DataFrame({"uid": uids}).to_csv(tmp_path / "t.csv", index=False)
    for n_workers in (0, 2):
        changes = dict(prefix=str(audio), trim=True, num_workers=n_workers)
        folder = start(embed(tmp_path / "t.csv", tmp_path / f"x{n_workers}", **changes))
        assert pd.read_parquet(folder / "embeddings.parquet").uid.tolist() == good
        failures = read(folder / "failures.csv").set_index("uid")
        assert set(failures.index) == set(uids) - set(good)
        assert folder.about["counts"] == {"rows": 2, "failures": 6, "shortened": 0}
        expected = dict(missing="find", empty="decode", text="decode", silent="trim", short="check")
        assert failures.stage.drop("../outside").to_dict() == expected and failures.stage["../outside"] == "find"
        assert "400" in failures.error["short"]
        assert failures.error.str.len().between(20, 400).all()


def test_no_row_is_exit_status_1(tmp_path, capsys):
    (tmp_path / "audio").mkdir()
    (tmp_path / "t.csv").write_text("uid\nnobody\n")
    arguments = ["-i", str(tmp_path / "audio"), "-d", str(tmp_path / "t.csv"), "-c", samples.checkpoint()]
    arguments += ["-o", str(tmp_path / "x")]
    assert main(["extraction", *arguments]) == 1
    example, last = capsys.readouterr().out.splitlines()[-2:]
    assert "0 rows written" in last and "nobody (find)" in example
    assert not (tmp_path / "x" / "t_embeddings.parquet").exists() and (tmp_path / "x" / "t_failures.csv").exists()


@pytest.mark.parametrize("cache, n_read", [(True, 24 + 12 + 16), (False, 24 + 12)])  # kept: all parts
def test_training_recordings_that_cannot_be_read_leave_no_model(tmp_path, small, cache, n_read):
    (tmp_path / "audio").mkdir()
    folder = start(tune(small, tmp_path / "x", prefix=str(tmp_path / "audio"), cache=cache))
    assert folder.about["counts"]["rows"] == 0 and not (folder / "model").exists()
    assert len(read(folder / "failures.csv")) == n_read


def test_one_folder_one_run(tuned, small, tmp_path):
    for config in (tune(small, tuned.path), embed(small / "test.csv", tuned.path, dataset="other")):
        with pytest.raises(ConfigError, match="already holds a run .finetune, finished.: give exp_dir another folder"):
            start(config)
    folder = start(embed(small / "test.csv", tmp_path / "x"))
    (folder.path / "notes.txt").write_text("mine")
    replaced = start(embed(small / "test.csv", tmp_path / "x", overwrite=True, dataset="new"))
    written = {"run.json", "new_embeddings.parquet", "new_failures.csv"}
    assert {path.name for path in replaced.path.iterdir()} == written | {"notes.txt"}


def test_a_resume_with_other_parameters_is_refused_with_the_difference(small, tmp_path, capsys):
    start(embed(small / "test.csv", tmp_path / "x"))
    now = dict(trim=True, layer="all", pooling_mode="mean,max", window=2.0, frames=True, chunk_s=3.0, context_s=1.0)
    was = dict(trim=False, layer=-1, pooling_mode="mean", window=None, frames=False, chunk_s=0.0, context_s=5.0)
    for name in now:
        with pytest.raises(ConfigError) as e:
            start(embed(small / "test.csv", tmp_path / "x", resume=True, **{name: now[name]}))
        assert f"other parameters: {name} was {was[name]!r}, now {now[name]!r}; resume with the same" in str(e.value)
    before = (tmp_path / "x" / "run.json").read_text()
    assert start(embed(small / "test.csv", tmp_path / "x", resume=True)).about["counts"]["rows"] == 16
    assert "nothing left to do" in capsys.readouterr().out and (tmp_path / "x" / "run.json").read_text() == before


def test_a_resume_that_would_compute_in_another_precision_is_refused(small, tmp_path, monkeypatch):
    "`auto` means bf16 on one machine and fp32 on the next."
    if not find_bf16():
        pytest.skip("this CPU has no instructions for bfloat16")
    folder = start(embed(small / "test.csv", tmp_path / "x", precision="auto"))
    assert folder.about["fingerprints"]["precision"] == "bf16"
    metadata = pq.read_schema(folder / "embeddings.parquet").metadata
    assert metadata[b"precision"] == b"bf16"
    (folder / "embeddings.parquet").unlink()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    with pytest.raises(ConfigError, match="precision changed since it was started"):
        start(embed(small / "test.csv", tmp_path / "x", precision="auto", resume=True))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nTried to"), MemoryError()])
def test_memory_that_runs_out_is_one_line(small, tmp_path, monkeypatch, capsys, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(w2v2nb.run, "extract", fail)
    arguments = ["-i", samples.prefix(), "-d", str(small / "test.csv"), "-c", samples.checkpoint(), "--device", "cpu"]
    assert main(["extraction", *arguments, "-o", str(tmp_path / "x")]) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "emory" in told and told.endswith("what is done is kept, --resume goes on")
    assert RunFolder(tmp_path / "x").about["state"] == "failed"


def test_recordings_are_read_while_the_weights_are(small, tmp_path, monkeypatch):
    seen, load, read_item = [], w2v2nb.run.load_encoder, WaveformDataset.__getitem__

    def load_late(config):
        deadline = time.monotonic() + 30
        while not seen and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append("weights")
        return load(config)

    monkeypatch.setattr(w2v2nb.run, "load_encoder", load_late)
    monkeypatch.setattr(WaveformDataset, "__getitem__", lambda self, i: (seen.append("recording"), read_item(self, i))[1])
    start(embed(small / "test.csv", tmp_path / "x"))
    assert seen[0] == "recording" and seen.count("weights") == 1 and seen.count("recording") == 16


def test_a_resume_on_other_inputs_is_refused_with_their_names(small, tmp_path):
    table = shutil.copy(small / "test.csv", tmp_path / "t.csv")
    start(embed(table, tmp_path / "x"))
    about = json.loads((tmp_path / "x" / "run.json").read_text())
    (tmp_path / "x" / "run.json").write_text(json.dumps(about | {"state": "running"}))
    read(table).iloc[::-1].to_csv(table, index=False)
    with pytest.raises(ConfigError, match="t.csv changed since"):
        start(embed(table, tmp_path / "x", resume=True))


@pytest.mark.parametrize("resume", [False, True])
def test_parts_without_a_record_are_not_used(small, tmp_path, resume):
    from w2v2nb.parts import rows_table, write_part

    stale = rows_table([0], ["stale"], [False], [1], {"embedding": torch.zeros(1, 80)})
    write_part(tmp_path / "x" / "test_work", [stale])
    folder = start(embed(small / "test.csv", tmp_path / "x", resume=resume))
    assert pd.read_parquet(folder / "embeddings.parquet").uid.tolist() == read(small / "test.csv").uid.tolist()


def test_a_finished_run_whose_results_were_lost_is_done_again(small, tmp_path):
    folder = start(embed(small / "test.csv", tmp_path / "x"))
    (folder / "embeddings.parquet").unlink()
    assert start(embed(small / "test.csv", tmp_path / "x", resume=True)).about["state"] == "finished"
    assert (folder / "embeddings.parquet").exists()


def test_overwrite_does_not_remove_what_the_run_is_to_read(small, tmp_path):
    folder = start(tune(small, tmp_path / "x"))
    for changes in (dict(mdl_path=str(folder / "model")), dict(data_split_root=str(folder / "split" / "test.csv"))):
        config = dict(SHIPPED, data_split_root=str(small), mdl_path=str(folder / "model"), exp_dir=str(tmp_path / "x"))
        with pytest.raises(ConfigError, match="overwrite would remove"):
            start(configure("eval-only", **config | changes, overwrite=True))
    assert (folder / "model").is_dir()


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', "not json"])
def test_a_foreign_run_json_is_one_sentence(small, tmp_path, content):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "run.json").write_text(content)
    for changes in ({}, dict(resume=True), dict(overwrite=True)):
        with pytest.raises(ConfigError, match="is damaged or not the record of a run"):
            start(embed(small / "test.csv", tmp_path / "x", **changes))


def test_a_place_that_cannot_be_a_folder_is_refused(small, tmp_path):
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        with pytest.raises(ConfigError, match="file is a file; give another folder"):
            start(embed(small / "test.csv", tmp_path / place))


def test_two_processes_do_not_share_a_folder(small, tmp_path):
    from filelock import FileLock

    with FileLock(tmp_path / ".lock"), pytest.raises(ConfigError, match="another process is at work"):
        start(embed(small / "test.csv", tmp_path))
    assert start(embed(small / "test.csv", tmp_path)).about["state"] == "finished"


def run_limited(arguments, n_bytes):
    "Run in a process of its own that cannot write a file of more than `n_bytes`, as on a full disk; the finished process."
    command = [sys.executable, "-m", "w2v2nb", *arguments]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))

    return subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)


def test_a_folder_that_another_process_used_meanwhile_is_left_alone(small, tmp_path):
    config = embed(small / "test.csv", tmp_path)
    first, second = claim(config), claim(config)
    with recording(first, config, {}, []):
        pass
    before = (tmp_path / "run.json").read_text()
    with pytest.raises(ConfigError, match="another process has been at work"), recording(second, config, {}, []):
        pass
    assert (tmp_path / "run.json").read_text() == before


def test_a_run_that_failed_says_so_and_forgets_it_once_it_is_finished(small, tmp_path):
    arguments = ["extraction", "-i", samples.prefix(), "-d", str(small / "test.csv"), "-c", samples.checkpoint()]
    arguments += ["-o", str(tmp_path / "x")]
    done = run_limited(arguments, 6000)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "--resume goes on" in done.stderr.splitlines()[-1]
    about = RunFolder(tmp_path / "x").about
    assert about["state"] == "failed" and "OSError" in about["error"]
    assert main([*arguments, "--resume"]) == 0
    again = RunFolder(tmp_path / "x").about
    assert again["state"] == "finished" and again["error"] is None and again["started"] == about["started"]


def test_a_training_that_failed_after_its_last_epoch_loses_nothing(small, tmp_path):
    split = shutil.copytree(small, tmp_path / "split")
    train = read(split / "train.csv")
    train.loc[0, "uid"] = "nobody"
    train.to_csv(split / "train.csv", index=False)
    arguments = ["finetune", "-i", samples.prefix(), "-d", str(split), "-l", samples.label_txt(), "-c", samples.checkpoint()]
    arguments += ["-e", "2", "-o", str(tmp_path / "x")]
    assert run_limited(arguments, 500_000).returncode == 1
    folder = RunFolder(tmp_path / "x")
    assert folder.about["state"] == "failed" and (folder / "work").exists() and not (folder / "model").exists()
    (folder / "history.csv").unlink()
    assert main([*arguments, "--resume"]) == 0
    folder = RunFolder(tmp_path / "x")
    assert read(folder / "failures.csv").uid.tolist() == ["nobody"] and len(read(folder / "history.csv")) == 2
    assert folder.about["counts"]["rows"] == 16 and (folder / "model").exists() and not (folder / "work").exists()


def test_layers_named_twice_and_broken_models_are_refused_before_any_work(small, tmp_path, tuned):
    with pytest.raises(ConfigError, match="names one layer twice"):
        start(embed(small / "test.csv", tmp_path / "x", layer="3,-1"))
    model = shutil.copytree(tuned / "model", tmp_path / "model")
    (model / "sound.json").write_text("{")
    with pytest.raises(ConfigError, match="sound.json should hold a JSON object"):
        start(embed(small / "test.csv", tmp_path / "x", mdl_path=str(model)))
    assert not (tmp_path / "x").exists()


def test_what_is_given_and_has_no_effect_is_said(small, tmp_path):
    folder = start(embed(small / "test.csv", tmp_path / "x", epochs=3))
    assert folder.about["warnings"] == ["epochs has no effect in extraction"]
    folder = start(tune(small, tmp_path / "y", val_share=0.5))
    assert folder.about["warnings"] == ["val_share has no effect: the split has a validation table of its own"]


def test_people_that_cannot_be_told_apart_are_mentioned(small, tmp_path):
    split = shutil.copytree(small, tmp_path / "split")
    read(split / "test.csv").drop(columns="subject").to_csv(split / "test.csv", index=False)
    folder = start(tune(split, tmp_path / "x"))
    assert folder.about["warnings"] == ["16 of 16 rows for test have no subject: these people may be in other parts too"]


def test_the_same_recording_on_both_sides_is_refused_whatever_is_allowed(small, tmp_path):
    split = shutil.copytree(small, tmp_path / "split")
    test, train = read(split / "test.csv"), read(split / "train.csv")
    test.loc[0, "uid"] = train.uid[0]
    test.to_csv(split / "test.csv", index=False)
    with pytest.raises(ConfigError) as e:
        start(tune(split, tmp_path / "x", allow_overlap=True))
    assert "--allow_overlap" not in str(e.value) and train.uid[0] in str(e.value)


def test_a_group_does_not_replace_the_subject(small, tmp_path):
    split = shutil.copytree(small, tmp_path / "split")
    test, train = read(split / "test.csv"), read(split / "train.csv")
    test.loc[0, "subject"] = train.subject[0]
    test.assign(pair=range(100, 116)).to_csv(split / "test.csv", index=False)
    train.assign(pair=range(24)).to_csv(split / "train.csv", index=False)
    (split / "val.csv").unlink()
    with pytest.raises(ConfigError, match="subject"):
        start(tune(split, tmp_path / "x", group="pair"))


def test_metadata_that_disagree_are_counted_and_the_recording_is_kept(tmp_path, capsys):
    uids = read(f"{SPLITS}/test.csv").uid[:3]
    for uid, rate in zip(uids, ["8001", "16 kHz", None], strict=True):
        shutil.copytree(f"{samples.prefix()}/{uid}", tmp_path / "audio" / uid)
        if rate:
            (tmp_path / "audio" / uid / "metadata.json").write_text(json.dumps({"sample_rate_hz": rate}))
    pd.DataFrame({"uid": uids}).to_csv(tmp_path / "t.csv", index=False)
    folder = start(embed(tmp_path / "t.csv", tmp_path / "x", prefix=str(tmp_path / "audio")))
    assert folder.about["counts"]["rows"] == 3 and len(folder.about["metadata_problems"]) == 2
    assert "2 metadata.json disagree" in capsys.readouterr().out


def test_workers_end_with_the_run(small, tmp_path):
    import multiprocessing

    start(tune(small, tmp_path / "x", num_workers=1))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("flags", ["-e 500", "-e 50 --tune top:1 --cache False"])
def test_an_interrupted_training_leaves_a_model_and_goes_on(small, tmp_path, flags):
    from w2v2nb.model import Classifier

    arguments = ["finetune", "-i", samples.prefix(), "-d", str(small), "-l", samples.label_txt(), "-c", samples.checkpoint()]
    arguments += ["--dataset", "s", "--device", "cpu", "-o", str(tmp_path / "x"), "--clip_length", "32000", *flags.split()]
    process = subprocess.Popen([sys.executable, "-m", "w2v2nb", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (tmp_path / "x" / "s_history.csv").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors.decode() and "--resume goes on" in errors.decode()
    folder = RunFolder(tmp_path / "x")
    assert folder.about["state"] == "interrupted" and (folder / "work" / "state.pt").exists()
    history = read(folder / "history.csv")
    best = history.epoch[history.metric.idxmax()]
    assert f"interrupted: s_model has the weights of epoch {best}; --resume goes on" in out.decode()
    assert Classifier.load(folder / "model", device="cpu").labels == LABELS
    given = dict(SHIPPED, data_split_root=str(small / "val.csv"), mdl_path=str(folder / "model"), clip_length=32000)
    measured = start(configure("eval-only", **given, exp_dir=str(tmp_path / "e")))
    assert read(measured / "metrics.csv").AUC.mean() == pytest.approx(history.metric.max(), abs=1e-6)
    n_kept = len(torch.load(folder / "work" / "state.pt", weights_only=True)["history"])
    assert n_kept in (len(history), len(history) - 1), "the last epoch's state may not have been written yet"


def kill_when(arguments, happened):
    "Start a run in a process of its own and kill it (SIGKILL) once `happened()`; whether it was still running."
    command = [sys.executable, "-m", "w2v2nb", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while not happened() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    was_running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert was_running or process.returncode == 0, errors.decode()
    return was_running


def repeated(folder, n_times):
    "A table that names every recording of train.csv several times, so that a run takes a while."
    table = read(f"{SPLITS}/train.csv")
    paths = [f"{uid}/{file.name}" for uid in table.uid for file in Path(samples.prefix(), uid).glob("waveform.*")]
    rows = pd.DataFrame({"uid": [f"{i:05}" for i in range(len(paths) * n_times)], "path": paths * n_times})
    rows.to_csv(folder / "t.csv", index=False)
    return rows


def stored(folder):
    "What an extraction wrote, in one table, and its files."
    files = sorted(folder.glob("t_frames/*")) or [folder / "t_embeddings.parquet"]
    return pa.concat_tables(pq.read_table(file) for file in files), storage.names(folder), [file.name for file in files]


def compare(first, second):
    "Assert that two extractions wrote the same."
    (table, *files), (expected, *its) = stored(first), stored(second)
    assert files == its and table.schema.equals(expected.schema, check_metadata=True)
    for name, values in zip(table.schema.names, table.columns, strict=True):
        if name.startswith("embedding"):
            a, b = np.stack(values.to_numpy()), np.stack(expected[name].to_numpy())
            # other neighbours in the batch round differently: by a few units in the last place of a vector's largest values
            assert (np.abs(a - b) <= 1e-6 * np.abs(b).max(axis=1, keepdims=True).clip(1)).all()
        else:
            assert values.equals(expected[name])


SEVERAL = "--layer 0,-1 --pooling_mode mean,max"


@pytest.mark.parametrize("flags", [SEVERAL + " --window 0.7 --hop 0.3 --chunk_s 2 --context_s 1", "--frames"])
def test_a_killed_extraction_resumes_to_the_same_table(tmp_path, flags):
    arguments = ["extraction", "-i", samples.prefix(), "-d", str(tmp_path / "t.csv"), "-c", samples.checkpoint()]
    arguments += ["--device", "cpu", "--clip_length", "48000", *flags.split()]
    killed, work = [*arguments, "-o", str(tmp_path / "killed")], tmp_path / "killed" / "t_work"
    wait_s, seen = np.random.default_rng().uniform(0, 1), []

    def happened():
        seen.extend([time.monotonic()] if not seen and list(work.glob("part-*.parquet")) else [])
        return seen and time.monotonic() >= seen[0] + wait_s

    for n_times in (6, 12, 24, 48):  # a fast machine takes more to be caught at work
        rows = repeated(tmp_path, n_times)
        if kill_when([*killed, "--overwrite"], happened):
            break
        seen.clear()
    assert RunFolder(tmp_path / "killed").about["state"] == "running"
    assert not list((tmp_path / "killed").glob("t_[ef]*"))
    done, about = rows_done(work)[0], json.loads((work / "progress.json").read_text())
    assert 0 < len(done) < len(rows) and about["total"] == len(rows) and 0 <= about["done"] <= len(done)
    assert main([*killed, "--resume"]) == 0
    assert main([*arguments, "-o", str(tmp_path / "whole")]) == 0
    compare(tmp_path / "killed", tmp_path / "whole")
    assert pd.unique(stored(tmp_path / "killed")[0]["uid"].to_pandas()).tolist() == rows.uid.tolist()
    counts = [RunFolder(tmp_path / name).about["counts"] for name in ("killed", "whole")]
    assert counts[0] == counts[1] and counts[0]["shortened"] > 0


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 64 MB of its own."
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(tmp_path / "disk")]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system of limited size needs rights that this process lacks")
    yield tmp_path / "disk"
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def fill_when(arguments, ballast, happened):
    "Start a run in a process of its own and fill its disk once `happened()`; its exit status and last line of errors."
    process = subprocess.Popen([sys.executable, "-m", "w2v2nb", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while not happened() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(OSError, match="No space left"), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(bytes(2**12))
    _, errors = process.communicate(timeout=120)
    ballast.unlink()
    return process.returncode, errors.decode().splitlines()[-1]


def test_an_extraction_that_filled_the_disk_goes_on_from_its_parts(tmp_path, small_disk):
    arguments = ["extraction", "-i", samples.prefix(), "-d", str(tmp_path / "t.csv"), "-c", samples.checkpoint()]
    arguments += [*SEVERAL.split(), "--device", "cpu"]
    full, work = [*arguments, "-o", str(small_disk / "full")], small_disk / "full" / "t_work"
    for n_times in (6, 12, 24, 48):  # as above
        rows = repeated(tmp_path, n_times)
        status, last = fill_when([*full, "--overwrite"], small_disk / "ballast", lambda: list(work.glob("part-*.parquet")))
        if status:
            break
    assert status == 1 and "No space left" in last and "--resume goes on" in last
    assert 0 < len(rows_done(work)[0]) < len(rows)
    assert main([*full, "--resume"]) == 0
    assert main([*arguments, "-o", str(tmp_path / "whole")]) == 0
    compare(small_disk / "full", tmp_path / "whole")


KEPT = "-e 20 --mixup 0.2 --schedule onecycle --clip_norm 1 --patience 15"
MOVING = "-e 6 --tune top:1 --cache False --augment noise,gain,shift,specaugment --schedule cosine --warmup 0.2 --optim adamw"


@pytest.mark.parametrize("flags", [KEPT, MOVING])
def test_a_training_killed_at_any_moment_resumes_to_the_same_model(small, tmp_path, flags):
    from safetensors.numpy import load_file

    arguments = ["finetune", "-i", samples.prefix(), "-d", str(small), "-l", samples.label_txt(), "-c", samples.checkpoint()]
    arguments += ["-lr", "0.003", "--dataset", "s", "--device", "cpu", "--clip_length", "32000", *flags.split()]
    killed, history = [*arguments, "-o", str(tmp_path / "killed")], tmp_path / "killed" / "s_history.csv"
    rng = np.random.default_rng()
    for n_times in range(3):  # at any moment after the first epoch, the next epoch, ...
        n_epochs, wait_s, seen = n_times + 1, rng.uniform(0, 0.3), []

        def happened(n_epochs=n_epochs, wait_s=wait_s, seen=seen):
            if not seen and history.exists() and len(read(history)) >= n_epochs:
                seen.append(time.monotonic())
            return seen and time.monotonic() >= seen[0] + wait_s

        if not kill_when([*killed, "--resume"], happened):
            break
        assert RunFolder(tmp_path / "killed").about["state"] == "running", (n_epochs, wait_s)
    assert main([*killed, "--resume"]) == 0
    assert main([*arguments, "-o", str(tmp_path / "whole")]) == 0
    folders = [RunFolder(tmp_path / name) for name in ("killed", "whole")]
    first, second = (read(folder / "history.csv").drop(columns="seconds") for folder in folders)
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    assert first.learning_rate.nunique() > 2
    weights = [load_file(folder / "model" / "model.safetensors") for folder in folders]
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
    pd.testing.assert_frame_equal(*(read(folder / "predictions.csv") for folder in folders), check_exact=True)


METHODS = {
    "BCE auto": dict(loss="BCE", pos_weight="auto", label_smoothing=0.1, mixup=0.3),
    "focal": dict(loss="focal", pos_weight="1,2,3,4,5", focal_gamma=1, head_size=8, activation="silu", layer_norm=True),
    "CE": dict(loss="CE", label_smoothing=0.1, shared_dense=True),
    "CORN": dict(loss="CORN", scale="clinical", separate_heads=True),
    "weighted": dict(layer="weighted", pooling_mode="mean+std"),
    "attention": dict(pooling_mode="attention", loss="BCE", layer=2),
    "lora": dict(tune="lora", lora_rank=4, lora_targets="q_proj,k_proj,output_dense", layer_decay=0.9),
    "all": dict(tune="all", augment="noise,speed,pitch,stretch,reverb,specaugment", precision="bf16", clip_norm=1),
    "transformer": dict(tune="transformer", layer="weighted", pooling_mode="max", shared_dense=True, accumulate=3),
}


@pytest.fixture(scope="module")
def rated(small, tmp_path_factory):
    "Splits for the methods: as they are, with exclusive labels, with grades from 1 to 5."
    root = tmp_path_factory.mktemp("rated")
    for kind in ("CE", "CORN"):
        (root / kind).mkdir()
        for part in ("train", "val", "test"):
            table = read(small / f"{part}.csv")
            if kind == "CE":
                table["neither"] = 1 - table[["slow rate", "rapid rate"]].max(axis=1, skipna=False)
            else:
                grades = np.random.default_rng(0).integers(2, 6, (len(table), len(LABELS)))
                table[LABELS] = np.where(table[LABELS].isna(), -1, np.where(table[LABELS] == 0, 1, grades))
            table.to_csv(root / kind / f"{part}.csv", index=False)
    (root / "CE" / "labels.txt").write_text("slow rate, rapid rate, neither\n")
    return root


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_is_saved_measures_the_same_again_and_extracts(small, rated, tmp_path, name):
    changes = METHODS[name]
    split = rated / name if (rated / name).exists() else small
    labels = rated / "CE" / "labels.txt" if name == "CE" else samples.label_txt()
    given = dict(label_txt=str(labels), epochs=2, clip_length=16000, dataset="m", optim="adamw", schedule="cosine", warmup=0.2)
    tuned = start(tune(split, tmp_path / "t", **given | changes))
    history, metrics = read(tuned / "history.csv"), read(tuned / "metrics.csv")
    assert history[["train_loss", "validation_loss", "metric"]].notna().all(axis=None) and metrics.AUC.notna().any()
    scores = read(tuned / "predictions.csv").filter(like="_score")
    if name == "CORN":
        assert scores.ge(1).all(axis=None) and scores.le(5).all(axis=None)
        assert read(tuned / "predictions.csv").filter(like="_target").max(axis=None) > 1
    if name == "CE":
        np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-5)
    again = dict(SHIPPED, mdl_path=str(tuned / "model"), data_split_root=str(split / "test.csv"), clip_length=16000)
    again |= {key: changes[key] for key in ("precision",) if key in changes}
    scale = dict(scale="clinical") if name == "CORN" else {}
    measured = start(configure("eval-only", **again, **scale, exp_dir=str(tmp_path / "e")))
    atol = 2e-2 if "precision" in changes else 1e-5
    for table in ("metrics.csv", "predictions.csv"):
        pd.testing.assert_frame_equal(read(measured / table), read(tuned / table), rtol=0, atol=atol)
    for embedding in ("pooled", "dense"):
        folder = start(configure("extraction", **again, exp_dir=str(tmp_path / embedding), embedding=embedding))
        table = pd.read_parquet(folder / "embeddings.parquet")
        assert table.uid.tolist() == read(split / "test.csv").uid.tolist()
        assert all(np.isfinite(np.stack(table[column])).all() for column in list(table)[1:])


@pytest.mark.parametrize("flags", ["--search learning_rate=0.01,0.001;dropout=0,0.5", "--folds 3 --search dropout=0,0.5"])
def test_a_study_killed_at_any_moment_resumes_to_the_same_result(small, tmp_path, flags):
    arguments = ["finetune", "-i", samples.prefix(), "-d", str(small), "-l", samples.label_txt(), "-c", samples.checkpoint()]
    arguments += ["-e", "12", "--dataset", "s", "--device", "cpu", "--val_share", "0.3", "--clip_length", "32000"]
    arguments += flags.split()
    killed, work = [*arguments, "-o", str(tmp_path / "killed")], tmp_path / "killed" / "s_work"
    wait_s, seen = np.random.default_rng().uniform(0, 0.5), []

    def happened():
        trials = [*work.glob("trial_*/trial.json"), *work.glob("fold_*/trial_*/trial.json")]
        seen.extend([time.monotonic()] if not seen and trials else [])
        return seen and time.monotonic() >= seen[0] + wait_s

    was_running = kill_when(killed, happened)
    done = {path: path.stat().st_mtime_ns for path in work.rglob("trial.json")}
    assert not was_running or done
    repeated = {}
    if was_running:  # what is there is not written again: looked at while the rest is done
        finish = w2v2nb.run.finish

        def look(*given, **more):
            repeated.update({path: path.stat().st_mtime_ns for path in done if path.exists()})
            return finish(*given, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(w2v2nb.run, "finish", look)
            assert main([*killed, "--resume"]) == 0
        assert repeated == done
    assert main([*arguments, "-o", str(tmp_path / "whole")]) == 0
    folders = [RunFolder(tmp_path / name) for name in ("killed", "whole")]
    names = ("folds.csv", "metrics.csv") if "folds" in flags else ("search.csv", "history.csv")
    for name in (*names, "predictions.csv"):
        one, other = (read(folder / name).drop(columns="seconds", errors="ignore") for folder in folders)
        pd.testing.assert_frame_equal(one, other, check_exact=True)


def test_subjects_on_both_sides_are_refused_before_any_work(small, tmp_path):
    split = shutil.copytree(small, tmp_path / "split")
    test, train = read(split / "test.csv"), read(split / "train.csv")
    test.loc[0, "subject"] = train.subject[0]
    test.to_csv(split / "test.csv", index=False)
    with pytest.raises(ConfigError, match="(?s)1 .*--allow_overlap"):
        start(tune(split, tmp_path / "x"))
    assert not (tmp_path / "x").exists()
    assert start(tune(split, tmp_path / "x", allow_overlap=True)).about["counts"]["rows"] == 16


def test_one_table_is_split_by_the_group_and_the_split_is_kept(tmp_path):
    table = read(f"{SPLITS}/train.csv")
    table["pair"] = table.subject.map({s: i // 2 for i, s in enumerate(table.subject.unique())})
    table.to_csv(tmp_path / "all.csv", index=False)
    folder = start(tune(tmp_path / "all.csv", tmp_path / "x", group="pair", val_share=0.25, test_share=0.3))
    parts = {part: read(folder / "split" / f"{part}.csv") for part in ("train", "val", "test")}
    pairs = [set(part.pair) for part in parts.values()]
    assert not pairs[0] & pairs[1] | pairs[0] & pairs[2] | pairs[1] & pairs[2]
    assert sorted(uid for part in parts.values() for uid in part.uid) == sorted(table.uid)
    assert read(folder / "predictions.csv").uid.tolist() == parts["test"].uid.tolist()
    assert read(folder / "history.csv").metric.notna().all()


def test_a_label_with_one_class_has_an_empty_auc_and_a_reason(small, tmp_path):
    split = shutil.copytree(small, tmp_path / "split")
    test = read(split / "test.csv").assign(strained=1, breathy=np.nan)
    test.to_csv(split / "test.csv", index=False)
    metrics = read(start(tune(split, tmp_path / "x")) / "metrics.csv").set_index("Label")
    assert metrics.AUC[["strained", "breathy"]].isna().all() and metrics.reason[["strained", "breathy"]].notna().all()
    assert metrics.AUC[["slow rate", "monopitch"]].notna().all()


def test_clinical_ratings_of_several_raters(small, tmp_path):
    split = tmp_path / "split"
    split.mkdir()
    for name in ("train", "test"):
        table = read(small / f"{name}.csv")
        first = table.assign(**{label: table[label].map({0: 1, 1: 3}).fillna(6) for label in LABELS})
        second = table.assign(**dict.fromkeys(LABELS, -1))
        pd.concat([first, second]).to_csv(split / f"{name}.csv", index=False)
    with pytest.raises(ConfigError, match="--scale clinical"):
        start(tune(split, tmp_path / "no"))
    predictions = read(start(tune(split, tmp_path / "x", scale="clinical")) / "predictions.csv")
    expected = read(small / "test.csv")
    assert predictions.uid.tolist() == expected.uid.tolist()
    for label in LABELS:
        pd.testing.assert_series_equal(predictions[f"{label}_target"], expected[label], check_names=False, check_dtype=False)


def test_labels_file_forms_and_separate_heads(small, tmp_path):
    from w2v2nb.model import Classifier

    (tmp_path / "groups.txt").write_text("slow rate, rapid rate\n\nbreathy,\n")
    folder = start(tune(small, tmp_path / "a", label_txt=str(tmp_path / "groups.txt")))
    assert Classifier.load(folder / "model").classifiers == [["slow rate", "rapid rate"], ["breathy"]]
    folder = start(tune(small, tmp_path / "b", separate_heads=True))
    assert Classifier.load(folder / "model").classifiers == [[label] for label in LABELS]


def test_a_batch_of_one_and_workers_give_the_same(small, tmp_path):
    one = start(embed(small / "test.csv", tmp_path / "one", batch_size=1))
    two = start(embed(small / "test.csv", tmp_path / "two", num_workers=2, batch_size=5))
    first, second = (pd.read_parquet(folder / "embeddings.parquet") for folder in (one, two))
    np.testing.assert_allclose(np.stack(first.embedding), np.stack(second.embedding), rtol=0, atol=1e-5)


def test_an_unfrozen_encoder_is_trained_and_saved(small, tmp_path):
    from w2v2nb.encoder import Encoder
    from w2v2nb.model import Classifier

    folder = start(tune(small, tmp_path / "x", freeze=False, epochs=1))
    before = Encoder.from_pretrained(samples.checkpoint(), device="cpu").state_dict()
    after = Classifier.load(folder / "model", device="cpu").encoder.state_dict()
    moved = [name for name in before if not np.array_equal(before[name].numpy(), after[name].numpy())]
    assert len(moved) > 0.9 * len(before)


def test_the_test_table_never_chooses_the_epoch(small, tmp_path):
    split = shutil.copytree(small, tmp_path / "split")
    other = read(split / "test.csv")
    other[LABELS] = 1 - other[LABELS]
    other.to_csv(split / "test.csv", index=False)
    first, second = (start(tune(s, tmp_path / name, epochs=3)) for s, name in ((small, "a"), (split, "b")))
    pd.testing.assert_frame_equal(*(read(f / "history.csv").drop(columns="seconds") for f in (first, second)))
    scores = [read(f / "predictions.csv").filter(like="_score") for f in (first, second)]
    pd.testing.assert_frame_equal(*scores)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(prefix="no/such/folder"), "there is no folder no/such/folder"),
        (dict(study="nowhere"), "there is no folder"),
        (dict(checkpoint="no/such-checkpoint"), "hf download no/such-checkpoint"),
        (dict(layer=4), "this model has layers 0 to 3"),
        (dict(data_split_root="."), "is a folder; extraction takes one CSV"),
        (dict(mdl_path=samples.checkpoint()), "is a checkpoint, not a fine-tuned model"),
        (dict(precision="fp16"), "fp16 needs a CUDA device"),
    ],
)
def test_a_wrong_input_stops_the_run_before_anything_is_written(small, tmp_path, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        start(embed(small / "test.csv", tmp_path / "x", **changes))
    assert not (tmp_path / "x").exists()


def test_demo_takes_the_three_modes_to_the_end(tmp_path, capsys):
    assert main(["demo", str(tmp_path / "demo")]) == 0
    out = capsys.readouterr().out
    for name in ("samples_model", "samples_metrics.csv", "test_metrics.csv", "test_embeddings.parquet"):
        assert name in out and list((tmp_path / "demo").glob(f"*/{name}"))
    assert "not evidence" in out and "w2v2nb finetune -i RECORDINGS" in out
    metrics = read(tmp_path / "demo" / "eval-only" / "test_metrics.csv").set_index("Label")
    assert metrics.AUC["rapid rate"] > 0.7


def test_demo_does_not_replace_a_person_s_own_run(tmp_path, small, capsys):
    shutil.copytree(samples.prefix(), tmp_path / "mine")
    start(embed(small / "test.csv", tmp_path / "demo" / "finetune", prefix=str(tmp_path / "mine")))
    assert main(["demo", str(tmp_path / "demo")]) == 2
    assert "already holds a run" in capsys.readouterr().err
