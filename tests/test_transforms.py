"""From uid to waveform: exactness, trimming of real and synthetic speech, errors that travel."""

import json
import multiprocessing
import os
import pickle
import re
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from w2v2nb import samples, transforms
from w2v2nb.audio import AudioError, decode, find
from w2v2nb.loading import Load, RecordingError, in_bucket
from w2v2nb.storage import names
from w2v2nb.transforms import (
    Check,
    Compose,
    Mono,
    Normalize,
    PadClip,
    Resample,
    Trim,
    Truncate,
    normalize,
    pipeline,
)

RATE = 16000
ROOT = os.environ.get("W2V2NB_DATA")
needs_data = pytest.mark.skipif(not ROOT, reason="real speech: set W2V2NB_DATA to the folder of recordings")


def sample_of(waveform, rate=RATE, **more):
    return {"uid": "000123", "waveform": torch.as_tensor(waveform, dtype=torch.float32), "sample_rate": rate, **more}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shipped_uids():
    return [u for u in names(samples.prefix()) if Path(samples.prefix(), u).is_dir()]


# ---- load


def test_load_finds_decodes_and_keeps_the_rest(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full((800, 2), 0.25), 8000)
    targets, before = torch.tensor([1.0]), {"uid": "a", "path": None}
    sample = Load(str(tmp_path))({**before, "targets": targets})
    assert sample["waveform"].shape == (2, 800) and sample["sample_rate"] == 8000 and sample["duration_s"] == 0.1
    assert sample["path"] == f"{tmp_path}/a.wav" and sample["targets"] is targets and "rate_mismatch" not in sample
    assert before == {"uid": "a", "path": None}


def test_the_header_is_believed_and_a_disagreement_reported(tmp_path):
    (tmp_path / "a").mkdir()
    soundfile.write(tmp_path / "a/waveform.wav", np.full(800, 0.25), 8000)
    (tmp_path / "a/metadata.json").write_text(json.dumps({"sample_rate": "16000"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample = Load(str(tmp_path))({"uid": "a"})
        assert (sample["sample_rate"], sample["rate_mismatch"]) == (8000, (16000, 8000))
        assert sample["metadata_problem"] == "a: metadata.json says 16000 Hz, the file 8000 Hz; the file is believed"
        for text in ('{"sample_rate": "8000"}', '{"sample_rate_hz": null}', "{}"):
            (tmp_path / "a/metadata.json").write_text(text)
            assert not {"rate_mismatch", "metadata_problem"} & set(Load(str(tmp_path))({"uid": "a"}))


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "is not JSON"),
        ('{"sample_rate_hz": 8000', "is not JSON"),
        ("[1, 2]", "holds a list"),
        ('{"sample_rate_hz": "16 kHz"}', "sample rate '16 kHz'"),
        ('{"sample_rate_hz": [8000]}', r"sample rate \[8000\]"),
        ('{"sample_rate_hz": 1%s}' % ("0" * 400), "sample rate 1000"),
        ('{"sample_rate_hz": 1%s}' % ("0" * 5000), "digits"),
        ("[" * 100000, "recursion"),
        (b"\xff\xfe", "is not UTF-8"),
        (None, "metadata.json"),
    ],
)
def test_a_good_recording_survives_broken_metadata(tmp_path, text, reason):
    (tmp_path / "a").mkdir()
    soundfile.write(tmp_path / "a/waveform.wav", np.full(8000, 0.25), 8000)
    if text is None:
        (tmp_path / "a/metadata.json").mkdir()
    else:
        (tmp_path / "a/metadata.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    sample = pipeline(str(tmp_path))({"uid": "a"})
    assert sample["waveform"].shape == (1, 16000) and "rate_mismatch" not in sample
    assert re.match(f"a: .*{reason}", sample["metadata_problem"]) and len(sample["metadata_problem"]) < 400


@pytest.mark.parametrize(
    "prefix, bucket, expected",
    [
        ("/data", None, "/data"),
        ("data", "b", "gs://b/data"),
        ("/data/", "gs://b", "gs://b/data"),
        ("", "b", "gs://b"),
        ("gs://c/data", "b", "gs://c/data"),
    ],
)
def test_bucket(prefix, bucket, expected):
    assert in_bucket(prefix, bucket).rstrip("/") == expected


@pytest.mark.parametrize("lib", [None, True])
@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
def test_reading_only_the_beginning_changes_nothing(tmp_path, rate, extension, lib):
    soundfile.write(tmp_path / f"a.{extension}", 0.1 * np.random.default_rng(0).standard_normal((int(3.7 * rate) + 13, 2)), rate)
    for clip_length in (400, 16001, 47999, 59200, 59213, 200000):
        part = pipeline(str(tmp_path), lib=lib, clip_length=clip_length, min_frames=1)({"uid": "a"})
        whole = Compose((Load(str(tmp_path), lib=lib), Mono(), Resample(RATE), Truncate(clip_length)))({"uid": "a"})
        assert part["is_shortened"] == whole["is_shortened"] and part["waveform"].shape == whole["waveform"].shape
        # the very samples where nothing is resampled; torch's convolution rounds differently by length elsewhere
        tolerance = 0 if rate == RATE else 1e-7
        assert (part["waveform"] - whole["waveform"]).abs().max() <= tolerance
        assert part.get("duration_s", whole["duration_s"]) == whole["duration_s"]


def test_only_the_beginning_is_read(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(80000, 0.25), 8000)
    assert Load(str(tmp_path), length_s=1.0)({"uid": "a"})["waveform"].shape == (1, 8800)
    assert pipeline(str(tmp_path), clip_length=16000).transforms[0].length_s == 1.0
    assert pipeline(str(tmp_path), clip_length=16000, trim=True).transforms[0].length_s is None
    assert pipeline(str(tmp_path), clip_length=0).transforms[0].length_s is None


# ---- mono, resample, truncate, pad, normalize, check


def test_mono():
    stereo = noise(2, 100)
    assert torch.equal(Mono()(sample_of(stereo))["waveform"], stereo.mean(0, keepdim=True))
    assert torch.equal(Mono(1)(sample_of(stereo))["waveform"], stereo[1:])
    assert torch.equal(Mono()(sample_of(stereo[:1]))["waveform"], stereo[:1])
    for channel in (2, -1):
        with pytest.raises(ValueError, match=f"channel {channel} of a recording with 2"):
            Mono(channel)(sample_of(stereo))


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("n_channels", [1, 2])
def test_resample_is_torchaudios(rate, n_channels):
    import torchaudio

    waveform = noise(n_channels, rate + 7)
    sample = Resample(RATE)(sample_of(waveform, rate))
    assert torch.equal(sample["waveform"], torchaudio.functional.resample(waveform, rate, RATE))
    assert sample["sample_rate"] == RATE and sample["waveform"].shape[1] == -(-RATE * (rate + 7) // rate)


@pytest.mark.parametrize("rate", [8000, 11025, 12000, 22050, 32000, 44056, 44100, 48000, 88200, 96000, 176400, 192000, 384000])
@pytest.mark.parametrize("to_hz", [8000, 16000])
def test_usual_rates_are_resampled_with_a_kernel_of_the_size_foretold(rate, to_hz):
    assert Resample(to_hz)(sample_of(noise(1, rate // 8), rate))["waveform"].shape == (1, -(-(rate // 8) * to_hz // rate))
    if rate != to_hz:
        assert transforms.resampler(rate, to_hz).kernel.nbytes == transforms.kernel_bytes(rate, to_hz)


@pytest.mark.parametrize("rate", [44101, 192001, 15999, 16001, 2**31 - 1])
def test_rates_with_a_monstrous_kernel_are_set_aside_at_once(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", np.full(rate % 100000 + 1000, 0.25), rate)
    start = time.time()
    with pytest.raises(RecordingError, match=f"a: resample: from {rate} Hz to 16000 Hz takes .* convert the recording"):
        pipeline(str(tmp_path), min_frames=1)({"uid": "a"})
    assert time.time() - start < 5


def test_kernels_in_the_cache_stay_within_half_a_gigabyte():
    assert transforms.resampler.cache_info().maxsize * transforms.MAX_KERNEL_BYTES <= 2**29


def test_resampling_kernels_are_made_once():
    transforms.resampler.cache_clear()
    for _ in range(3):
        for rate in (8000, 44100, RATE):
            Resample(RATE)(sample_of(noise(1, 900), rate))
    assert transforms.resampler.cache_info().misses == 2
    assert len(pickle.dumps(Resample(RATE))) < 200


@pytest.mark.parametrize("n, offset, first, after", [(3, 0, 0, 3), (3, 4, 4, 6), (6, 0, 0, 6), (9, 0, 0, 6)])
def test_truncate(n, offset, first, after):
    kept = list(range(first, after))
    sample = Truncate(n, offset)(sample_of(torch.arange(6.0)[None]))
    assert sample["waveform"].tolist() == [kept] and sample["is_shortened"] == (len(kept) < 6)


def test_truncated_waveforms_do_not_carry_the_rest():
    kept = Truncate(10)(sample_of(torch.zeros(1, 100000)))["waveform"]
    assert kept.untyped_storage().nbytes() == 40


def test_truncate_errors():
    with pytest.raises(ValueError, match="6 frames, no more than the offset of 6"):
        Truncate(3, 6)(sample_of(torch.arange(6.0)[None]))
    for arguments in ((0,), (-1,), (3, -1)):
        with pytest.raises(ValueError, match="1 or more"):
            Truncate(*arguments)


def test_pad_clip():
    waveform = torch.tensor([[1.0, 3.0], [0.0, -1.0]])
    assert PadClip(4)(sample_of(waveform))["waveform"].tolist() == [[1, 3, 2, 2], [0, -1, -0.5, -0.5]]
    assert torch.equal(PadClip(1)(sample_of(waveform))["waveform"], waveform)


@pytest.mark.parametrize("scale, offset", [(1, 0), (1e-4, 0), (0.1, 0.5), (0, 0.3)])
def test_normalize_is_transformers(scale, offset):
    from transformers import Wav2Vec2FeatureExtractor

    waveform = scale * noise(30000) + offset
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True)
    theirs = torch.from_numpy(np.asarray(extractor(waveform.numpy(), sampling_rate=RATE)["input_values"][0]))
    assert (normalize(waveform) - theirs).abs().max() < 2e-6
    assert torch.equal(Normalize()(sample_of(waveform[None]))["waveform"][0], normalize(waveform))
    assert torch.isfinite(normalize(torch.zeros(400))).all()


@pytest.mark.parametrize(
    "waveform, message",
    [(torch.zeros(1, 399), "399 samples"), (torch.zeros(2, 400), "2 channels"), (torch.full((1, 400), torch.nan), "NaN")],
)
def test_check(waveform, message):
    with pytest.raises(ValueError, match=message):
        Check(400)(sample_of(waveform))
    assert Check(400)(sample_of(torch.zeros(1, 400)))["uid"] == "000123"


# ---- trim


def pause_free(waveform, rate, seconds=2.0):
    "The first stretch of so many seconds in which no 50 ms are 30 dB below the loudest; None without one."
    hop = rate // 20
    level = waveform[0, : waveform.shape[1] // hop * hop].reshape(-1, hop).pow(2).mean(1).sqrt()
    is_loud = (level > level.max() * 10 ** (-30 / 20)).tolist()
    n = int(seconds * 20)
    for i in range(len(is_loud) - n + 1):
        if all(is_loud[i : i + n]):
            return waveform[:, i * hop : (i + n) * hop]
    return None


def speech(n_wanted=12):
    "Pause-free speech of 2 s at 16 kHz: real where there is any, else shipped."
    if ROOT:
        paths = [p for study in ("svd", "librispeech", "coffee") for p in sorted(Path(ROOT, study, "audio").iterdir())[::9][:40]]
    else:
        paths = [find(uid, samples.prefix()) for uid in shipped_uids()]
    clips = []
    for path in paths:
        waveform, rate = decode(path)
        clip = pause_free(Resample(RATE)(Mono()(sample_of(waveform, rate)))["waveform"], RATE)
        clips += [] if clip is None else [clip]
    return clips[:: max(len(clips) // n_wanted, 1)][:n_wanted]


@pytest.fixture(scope="module")
def clips():
    return speech()


def surround(clip, before_s, after_s):
    "The clip with so much digital silence before and after it."
    return torch.cat([torch.zeros(1, int(before_s * RATE)), clip, torch.zeros(1, int(after_s * RATE))], 1)


def lost_s(clip, before_s, after_s, level):
    "Seconds of the clip lost at its beginning and end, and seconds kept, with silence of that noise level around it."
    waveform = surround(clip, before_s, after_s)
    waveform = waveform + level * noise(*waveform.shape)
    trimmed = Trim()(sample_of(waveform))["waveform"]
    # the trimmed is a stretch of the whole, and with noise its first samples occur there once
    (start,) = (waveform[0].unfold(0, 64, 1) == trimmed[0, :64]).all(1).nonzero()[:, 0].tolist()
    kept = trimmed.shape[1]
    return start / RATE - before_s, before_s + clip.shape[1] / RATE - (start + kept) / RATE, kept / RATE


@pytest.mark.parametrize("level", [1e-7, 5e-4])
def test_silence_around_speech_is_trimmed_and_speech_is_not(clips, level):
    assert len(clips) >= 3
    for clip in clips:
        at_start, at_end, kept_s = lost_s(clip, 3, 3, level)
        assert at_start <= 0.1 and at_end <= 0.1  # the limit, in seconds
        assert kept_s < 2.5  # and nearly all of the 6 s of silence is gone


def test_digital_silence_around_speech_is_trimmed(clips):
    for clip in clips:
        trimmed = Trim()(sample_of(surround(clip, 3, 3)))["waveform"]
        assert 1.9 < trimmed.shape[1] / RATE < 2.5 and trimmed.pow(2).sum() > 0.999 * clip.pow(2).sum()


def test_speech_without_silence_loses_nothing(clips):
    for clip in clips:
        assert torch.equal(Trim()(sample_of(clip))["waveform"], clip)


def test_a_short_word_survives(clips):
    for clip in clips[:6]:
        word = clip[:, 8000:12800]  # 0.3 s
        for before_s, after_s in ((0, 0), (1, 1), (3, 3), (0, 2)):
            at_start, at_end, kept_s = lost_s(word, before_s, after_s, 1e-4)
            assert at_start <= 0 and at_end <= 0 and kept_s >= 0.3


@needs_data
def test_spoken_digits_survive():
    for path in sorted(Path(ROOT, "fsdd", "audio").iterdir())[::60]:
        waveform, rate = decode(path)
        sample = Resample(RATE)(sample_of(waveform, rate))
        power = Trim()(sample)["waveform"].pow(2).sum() / sample["waveform"].pow(2).sum()
        assert power > 0.98


def test_a_steady_vowel_is_kept():
    t = torch.arange(2 * RATE) / RATE
    vowel = sum(torch.sin(2 * torch.pi * 120 * k * t) / k for k in range(1, 20))[None] * 0.1
    assert Trim()(sample_of(vowel))["waveform"].shape == vowel.shape


@pytest.mark.parametrize(
    "waveform",
    [torch.zeros(1, 3 * RATE), torch.zeros(1, 10), 1e-3 * (2 * torch.rand(1, 3 * RATE) - 1), 2e-4 * noise(1, 3 * RATE)],
)
def test_silence_is_set_aside(waveform):
    with pytest.raises(AudioError, match="silent: its peak is -"):
        Trim()(sample_of(waveform))
    with pytest.raises(RecordingError, match="000123: trim: silent"):
        Compose((Trim(),))(sample_of(waveform))


def test_where_nothing_is_found_but_something_is_there_it_is_kept():
    tick = torch.zeros(1, RATE)
    tick[0, 100] = 0.01  # -40 dBFS
    assert torch.equal(Trim()(sample_of(tick))["waveform"], tick)


def test_trim_at_other_rates_and_channels(clips):
    mono = surround(clips[0], 2, 2)
    for rate in (8000, 44100):
        stereo = Resample(rate)(sample_of(mono))["waveform"].repeat(2, 1)
        trimmed = Trim()(sample_of(stereo, rate))["waveform"]
        assert trimmed.shape[0] == 2 and 1.9 < trimmed.shape[1] / rate < 2.5


# ---- errors and workers


def test_recording_errors_travel():
    error = RecordingError("000123", "a/000123.wav", "decode", "empty")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, RecordingError) and isinstance(again, ValueError)
    assert (again.uid, again.path, again.stage, again.error) == ("000123", "a/000123.wav", "decode", "empty")
    assert str(again) == str(error) == "000123: decode: empty"


@pytest.mark.parametrize(
    "content, options, stage",
    [
        (None, {}, "find"),
        (b"", {}, "decode"),
        (b"not audio", {}, "decode"),
        (np.zeros(300), {}, "check"),
        (np.zeros(9000), {"trim": True}, "trim"),
        (np.zeros((9000, 2)), {"reduce": False}, "check"),
    ],
)
def test_stages(tmp_path, content, options, stage):
    path = tmp_path / "000123.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        soundfile.write(path, content, RATE)
    with pytest.raises(RecordingError) as caught:
        pipeline(str(tmp_path), **options)({"uid": "000123"})
    assert (caught.value.uid, caught.value.stage) == ("000123", stage)
    assert caught.value.path == ("" if content is None else str(path)) and caught.value.error


@pytest.mark.parametrize("content, stage", [(None, "find"), (b"not audio", "decode"), (np.zeros(300), "check")])
def test_an_error_has_the_path_that_is_known(tmp_path, content, stage):
    if isinstance(content, bytes):
        (tmp_path / "odd.wav").write_bytes(content)
    elif content is not None:
        soundfile.write(tmp_path / "odd.wav", content, RATE)
    with pytest.raises(RecordingError) as caught:
        pipeline(str(tmp_path))({"uid": "000123", "path": "odd.wav"})
    assert (caught.value.stage, caught.value.path) == (stage, "odd.wav" if stage == "find" else f"{tmp_path}/odd.wav")


def test_a_uid_that_leaves_the_prefix_is_one_recordings_error(tmp_path):
    with pytest.raises(RecordingError, match="leads out of the prefix") as caught:
        pipeline(str(tmp_path))({"uid": "../x"})
    assert caught.value.stage == "find"


def stumble(error):
    def transform(sample):
        raise error

    return transform


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyError, TypeError, AttributeError, NotImplementedError, RecursionError])
def test_mistakes_are_not_blamed_on_a_recording(error):
    with pytest.raises(error) as caught:
        Compose((stumble(error("x")),))(sample_of(torch.zeros(1, 1)))
    assert not isinstance(caught.value, RecordingError)


@pytest.mark.parametrize(
    "error, text",
    [
        (MemoryError(), "MemoryError"),
        (MemoryError("Unable to allocate 8 TiB"), "MemoryError: Unable to allocate 8 TiB"),
        (RuntimeError("can't allocate memory\nC++ frames"), "RuntimeError: can't allocate memory"),
    ],
)
def test_lack_of_memory_is_one_recordings_failure(error, text):
    with pytest.raises(RecordingError) as caught:
        Compose((stumble(error),))(sample_of(torch.zeros(1, 1), path="a.wav"))
    assert (caught.value.uid, caught.value.stage, caught.value.error) == ("000123", "transform", text)


def test_a_real_allocation_failure_names_its_stage():
    with pytest.raises(RecordingError, match="000123: padclip: RuntimeError: "):
        Compose((PadClip(1 << 55),))(sample_of(torch.zeros(1, 10)))


def test_standard_order():
    steps = pipeline("x", trim=True, padding="clip").transforms
    assert [type(s).__name__ for s in steps] == ["Load", "Mono", "Resample", "Trim", "Truncate", "PadClip", "Check"]
    augment = Normalize()  # any transform
    assert pipeline("x", trim=True, padding="clip", augment=augment).transforms == (*steps[:5], augment, *steps[5:])
    steps = pipeline("x", clip_length=0, reduce=False).transforms
    assert [type(s).__name__ for s in steps] == ["Load", "Resample", "Check"]
    for wrong in ({"padding": "clip", "clip_length": 0}, {"padding": "zeros"}):
        with pytest.raises(ValueError, match="padding is 'batch', or 'clip'"):
            pipeline("x", **wrong)


def test_padding_clip_gives_the_fixed_length(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(5000, 0.5), RATE)
    waveform = pipeline(str(tmp_path), padding="clip", clip_length=16000)({"uid": "a"})["waveform"]
    assert waveform.shape == (1, 16000) and torch.allclose(waveform, torch.tensor(0.5), atol=1e-4)


def test_workers_start_by_spawn():
    pipe, uids = pipeline(samples.prefix(), clip_length=16000), shipped_uids()[:3]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for uid, sample in zip(uids, pool.map(pipe, [{"uid": uid} for uid in uids]), strict=True):
            assert torch.equal(sample["waveform"], pipe({"uid": uid})["waveform"])
        with pytest.raises(RecordingError) as caught:
            pool.apply(pipe, ({"uid": "nobody"},))
    assert (caught.value.uid, caught.value.stage) == ("nobody", "find")


def test_shipped_recordings_go_through():
    pipe = pipeline(samples.prefix(), clip_length=0)
    for uid in shipped_uids():
        sample = pipe({"uid": uid})
        assert sample["waveform"].shape[0] == 1 and sample["sample_rate"] == RATE
        assert sample["duration_s"] == pytest.approx(sample["waveform"].shape[1] / RATE, abs=1e-3)
