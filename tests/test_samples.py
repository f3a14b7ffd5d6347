"""What ships with the package is as the documents promise, and its scripts make it again."""

import csv
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import soundfile as sf

from w2v2nb import samples

ROOT = Path(__file__).parents[1]
ASSETS = Path(samples.asset("."))
README = (ASSETS / "README.md").read_text(encoding="utf-8")
LABELS = Path(samples.label_txt()).read_text(encoding="utf-8").splitlines()
MAX_BYTES, MAX_CHECKPOINT_BYTES = 5_000_000, 3_000_000
ENCODINGS = {".wav": "LINEAR16", ".flac": "FLAC", ".ogg": "OGG_VORBIS", ".mp3": "MP3"}
FORMATS = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG", ".mp3": "MP3"}


def read(name):
    with open(f"{samples.split_root()}/{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


SPLITS = {name: read(name) for name in ("train", "test")}
ROWS = SPLITS["train"] + SPLITS["test"]
FILES = {path.parent.name: path for path in Path(samples.prefix()).glob("*/waveform.*")}
METADATA = {uid: json.loads((path.parent / "metadata.json").read_text(encoding="utf-8")) for uid, path in FILES.items()}


def n_bytes(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_the_four_paths_are_text():
    for path in (samples.prefix(), samples.split_root(), samples.label_txt(), samples.checkpoint()):
        assert isinstance(path, str) and Path(path).exists()


def test_a_missing_asset_says_what_to_do():
    with pytest.raises(FileNotFoundError, match=r"w2v2nb/assets/splits/val.csv is missing.*install w2v2nb again"):
        samples.asset("splits/val.csv")


def test_importing_takes_nothing_heavy():
    code = "import sys, w2v2nb.samples; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "pandas", "soundfile", "transformers"} & set(loaded)


def test_sizes():
    assert n_bytes(ASSETS) <= MAX_BYTES
    assert n_bytes(samples.checkpoint()) <= MAX_CHECKPOINT_BYTES


def test_voices_and_splits():
    voices = {name: {row["subject"] for row in rows} for name, rows in SPLITS.items()}
    assert not voices["train"] & voices["test"]
    assert len(voices["train"] | voices["test"]) >= 24
    assert len(voices["test"]) == 8
    for voice in voices["train"] | voices["test"]:
        tasks = [row["task"] for row in ROWS if row["subject"] == voice]
        assert len(tasks) >= 5 and set(tasks) == {"puhtuhkuh", "buttercup", "sentence"}


def test_labels_file_has_no_commas():
    assert LABELS == ["slow rate", "rapid rate", "strained", "breathy", "monopitch"]
    assert list(ROWS[0]) == ["uid", "subject", "task", *LABELS]


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("label", LABELS)
def test_both_classes_of_each_label_in_both_splits(name, label):
    ratings = [row[label] for row in SPLITS[name]]
    assert set(ratings) <= {"0", "1", ""}
    assert min(ratings.count("0"), ratings.count("1")) >= 8


def test_some_ratings_are_missing():
    ratings = [row[label] for row in ROWS for label in LABELS]
    assert 0.05 <= ratings.count("") / len(ratings) <= 0.11


def test_nobody_is_slow_and_rapid_but_other_labels_meet():
    assert not [row["uid"] for row in ROWS if row["slow rate"] == row["rapid rate"] == "1"]
    assert len({frozenset(label for label in LABELS if row[label] == "1") for row in ROWS}) > 10


def test_labels_do_not_follow_voice_or_task():
    for column in ("subject", "task"):
        for value in {row[column] for row in ROWS}:
            rated = [row[label] for row in ROWS if row[column] == value for label in LABELS if row[label]]
            assert 0.05 <= rated.count("1") / len(rated) <= 0.65


def test_uids_are_text_and_name_the_folders():
    uids = [row["uid"] for row in ROWS]
    assert all(re.fullmatch(r"00\d{4}", uid) for uid in uids)
    assert len(set(uids)) == len(uids) and set(uids) == set(FILES)
    assert {path.name for path in Path(samples.prefix()).iterdir()} == set(FILES)


def test_formats_rates_channels_and_durations():
    infos = {uid: sf.info(path) for uid, path in FILES.items()}
    assert {info.format for info in infos.values()} == {"WAV", "FLAC", "OGG", "MP3"}
    assert {info.samplerate for info in infos.values()} == {8000, 16000, 44100}
    assert {info.channels for info in infos.values()} == {1, 2}
    durations_s = [info.duration for info in infos.values()]
    assert 1 <= min(durations_s) < 1.5 and 10 < max(durations_s) <= 12


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["uid"])
def test_metadata_agree_with_header_and_table(row):
    path, metadata = FILES[row["uid"]], METADATA[row["uid"]]
    info = sf.info(path)
    assert info.format == FORMATS[path.suffix] and metadata["encoding"] == ENCODINGS[path.suffix]
    assert int(metadata["sample_rate_hz"]) == info.samplerate
    assert (metadata["subject"], metadata["task"]) == (row["subject"], row["task"])
    assert [feature["name"] for feature in metadata["features"]] == LABELS
    for feature in metadata["features"]:
        expected = {-1: "", 6: "", 1: "0", 2: "1", 3: "1", 4: "1", 5: "1"}[feature["score"]]
        assert row[feature["name"]] == expected


def test_metadata_come_in_both_manners():
    assert {type(metadata["sample_rate_hz"]) for metadata in METADATA.values()} == {int, str}
    assert {f["score"] for metadata in METADATA.values() for f in metadata["features"]} == {-1, 1, 2, 3, 4, 5, 6}


def test_recordings_are_audible_not_clipped_and_some_have_silence_around():
    n_silent_ends = 0
    for path in FILES.values():
        audio, rate_hz = sf.read(path, always_2d=True)
        level = abs(audio[:, 0])
        assert 0.1 < level.max() < 1
        ends = level[: int(0.25 * rate_hz)].max(), level[-int(0.25 * rate_hz) :].max()
        n_silent_ends += max(ends) < 0.02 * level.max()
    assert 30 <= n_silent_ends <= 80


def test_said_to_be_synthetic_and_untrained():
    for text in (README, samples.__doc__, load_tool("make_samples").__doc__):
        assert "not evidence" in text and "ynthetic" in text
    for text in (README, samples.__doc__, samples.checkpoint.__doc__, load_tool("make_checkpoint").__doc__):
        assert re.search(r"untrained|never trained", text)


def test_checkpoint_loads_with_no_key_missing():
    from transformers import AutoFeatureExtractor, Wav2Vec2Model

    model, info = Wav2Vec2Model.from_pretrained(samples.checkpoint(), output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.feat_extract_norm == "group" and not model.config.add_adapter
    assert list(model.config.conv_kernel) == [10, 3, 3, 3, 3, 2, 2]
    assert list(model.config.conv_stride) == [5, 2, 2, 2, 2, 2, 2]
    extractor = AutoFeatureExtractor.from_pretrained(samples.checkpoint())
    assert (extractor.do_normalize, extractor.sampling_rate, extractor.return_attention_mask) == (True, 16000, False)


def test_checkpoint_tells_recordings_apart():
    import torch
    from transformers import Wav2Vec2Model

    model = Wav2Vec2Model.from_pretrained(samples.checkpoint()).eval()
    paths = [FILES[uid] for uid in sorted(FILES) if FILES[uid].suffix == ".mp3" and sf.info(FILES[uid]).channels == 1][:6]
    pooled = []
    with torch.no_grad():
        for path in paths:
            audio = torch.from_numpy(sf.read(path, dtype="float32")[0])
            pooled.append(model(((audio - audio.mean()) / audio.std())[None]).last_hidden_state[0].mean(0))
    assert torch.stack(pooled).std(0).mean() > 0.1


def made_with(name):
    """The version that the assets' README names."""
    return re.search(rf"{name} (?:\(.*?\) )?([\d.]*\d)", README).group(1)


def test_the_checkpoint_script_makes_the_same_bytes(tmp_path):
    if (torch_version := version("torch").split("+")[0]) != made_with("torch and torchaudio"):
        pytest.skip(f"torch is {torch_version}, the checkpoint was made with {made_with('torch and torchaudio')}")
    load_tool("make_checkpoint").main(tmp_path)
    expected = Path(samples.checkpoint(), "model.safetensors").read_bytes()
    assert (tmp_path / "model.safetensors").read_bytes() == expected


def test_the_samples_script_makes_the_same_bytes(tmp_path):
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed; it is needed only to make the recordings again")
    said = subprocess.run(["espeak-ng", "--version"], capture_output=True, text=True, check=True).stdout
    found = {"espeak-ng": re.search(r"([\d.]*\d)  ", said).group(1), "libsndfile": sf.__libsndfile_version__}
    for name, found_version in found.items():
        if found_version != made_with(name):
            pytest.skip(f"{name} is {found_version}, the recordings were made with {made_with(name)}")
    # one of each format
    uids = list({path.suffix: uid for uid, path in sorted(FILES.items())}.values())
    load_tool("make_samples").main(tmp_path, uids)
    for uid in uids:
        made = tmp_path / "recordings" / uid
        assert (made / FILES[uid].name).read_bytes() == FILES[uid].read_bytes(), uid
        assert (made / "metadata.json").read_bytes() == (FILES[uid].parent / "metadata.json").read_bytes()
    for name in ("train.csv", "test.csv", "labels.txt"):
        assert (tmp_path / "splits" / name).read_bytes() == Path(samples.split_root(), name).read_bytes()
