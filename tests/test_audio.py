"""Finding, decoding and probing recordings: tables of formats, parts and faults."""

import io
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from w2v2nb import audio
from w2v2nb.audio import AudioError, decode, find, probe, read_metadata


def has_ffmpeg_libraries() -> bool:
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return False
    return True


needs_libraries = pytest.mark.skipif(not has_ffmpeg_libraries(), reason="needs FFmpeg's libraries: apt-get install ffmpeg")
needs_ffmpeg = pytest.mark.skipif(
    not (shutil.which("ffmpeg") and has_ffmpeg_libraries()), reason="needs the ffmpeg program: apt-get install ffmpeg"
)
RATES = [8000, 16000, 22050, 44100, 48000]


def signal(rate: int, n_channels: int = 1, seconds: float = 1.7) -> np.ndarray:
    "A rising tone with noise, (frames, channels); an odd number of frames."
    t = np.arange(int(rate * seconds) + 13)[:, None] / rate
    tones = 0.4 * np.sin(2 * np.pi * (200 + 90 * np.arange(n_channels)) * t * (1 + 0.2 * t))
    return tones + 0.05 * np.random.default_rng(rate + n_channels).standard_normal(tones.shape)


def write(path, rate=16000, n_channels=1, **kwargs):
    soundfile.write(path, signal(rate, n_channels), rate, **kwargs)
    return path


def convert(source, target, *options):
    "By the ffmpeg program; `target` None returns bytes written to a pipe, which cannot be finished afterwards."
    command = ["ffmpeg", "-y", "-loglevel", "error", "-i", str(source), *options, str(target or "pipe:1")]
    return subprocess.run(command, check=True, capture_output=True).stdout


# ---- finding


def test_find_prefers_the_column_then_the_folder_then_flat(tmp_path):
    (tmp_path / "s" / "000123").mkdir(parents=True)
    for name in ("s/000123.wav", "s/000123/waveform.mp3", "elsewhere.wav"):
        (tmp_path / name).touch()
    base = str(tmp_path)
    assert find("000123", base, "s", "elsewhere.wav") == f"{base}/elsewhere.wav"
    assert find("000123", base, "s", f"{base}/elsewhere.wav") == f"{base}/elsewhere.wav"
    assert find("000123", base, "s", None) == find("000123", base, "s", "") == f"{base}/s/000123/waveform.mp3"
    (tmp_path / "s/000123/waveform.mp3").unlink()
    assert find("000123", base, "s") == f"{base}/s/000123.wav"


@pytest.mark.parametrize(
    "names, chosen",
    [
        (["waveform.mp3", "waveform.flac", "waveform.wav"], "waveform.wav"),
        (["waveform.webm", "waveform.m4a"], "waveform.m4a"),
        (["waveform.zzz", "waveform.aaa"], "waveform.aaa"),
        (["waveform.WAV", "metadata.json", "waveform.json", "._waveform.wav", "waveform"], "waveform.WAV"),
        (["metadata.json", "waveform_old.wav"], None),
    ],
)
def test_several_extensions_are_chosen_by_rule(names, chosen):
    assert audio.choose(names, "waveform") == audio.choose(names[::-1], "waveform") == chosen


def test_flat_layout_takes_unusual_extensions_and_sites(tmp_path):
    (tmp_path / "site1").mkdir()
    (tmp_path / "site1" / "7.sph").touch()
    assert find("site1/7", str(tmp_path)) == f"{tmp_path}/site1/7.sph"


@pytest.mark.parametrize(
    "uid", ["../x", "a/../../x", "..", ".", "", "/etc/passwd", "a//b", "..\\x", "C:\\x", "C:x", "gs://b/x", "~root", "a\0b", "a/"]
)
def test_a_uid_that_leaves_the_prefix_is_refused(tmp_path, uid):
    with pytest.raises(ValueError, match="leads out of the prefix"):
        find(uid, str(tmp_path))
    with pytest.raises(ValueError, match="leads out of the prefix"):
        read_metadata(uid, str(tmp_path))


def test_what_is_not_found_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="000123.*s/000123/waveform.*s/000123[.]"):
        find("000123", str(tmp_path), "s")
    with pytest.raises(FileNotFoundError, match="gone.wav"):
        find("000123", str(tmp_path), path="gone.wav")


@pytest.mark.parametrize("text, hz", [('"16000"', 16000), ("44100.0", 44100), ("8000", 8000), ('"8e3"', 8000)])
@pytest.mark.parametrize("key", ["sample_rate_hz", "sample_rate"])
def test_metadata_rates(tmp_path, text, hz, key):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/metadata.json").write_text(f'{{"{key}": {text}, "task": "amr"}}')
    metadata = read_metadata("a", str(tmp_path))
    assert metadata["sample_rate_hz"] == hz and isinstance(metadata["sample_rate_hz"], int) and metadata["task"] == "amr"


@pytest.mark.parametrize(
    "text", ['{"sample_rate": "16 kHz"}', '{"sample_rate": -1}', '{"sample_rate": NaN}', '{"sample_rate": [1]}', "[]", "{", ""]
)
def test_broken_metadata_is_said(tmp_path, text):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/metadata.json").write_text(text)
    with pytest.raises(ValueError, match="metadata.json.*correct"):
        read_metadata("a", str(tmp_path))


def test_metadata_is_optional(tmp_path):
    assert read_metadata("a", str(tmp_path)) == {}
    (tmp_path / "a").mkdir()
    (tmp_path / "a/metadata.json").write_text('{"task": "x"}')
    assert read_metadata("a", str(tmp_path)) == {"task": "x"}


# ---- decoding: the same frames by every library, whole or in part


@needs_libraries
@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("n_channels", [1, 2])
@pytest.mark.parametrize("rate", RATES)
def test_three_libraries_agree_and_parts_are_slices(tmp_path, rate, n_channels, extension):
    path = write(tmp_path / f"a.{extension}", rate, n_channels)
    whole, found_rate = decode(path)
    assert found_rate == rate and whole.dtype == torch.float32 and whole.is_contiguous()
    assert whole.shape == (n_channels, int(rate * 1.7) + 13)
    rng = random.Random(rate)
    parts = [(0.0, None), (0.0, 0.2), (1.0, None)] + [(rng.uniform(0, 1.6), rng.uniform(0.001, 2)) for _ in range(6)]
    for lib in (None, True, False):
        for offset_s, length_s in parts:
            start = round(offset_s * rate)
            expected = whole[:, start : None if length_s is None else start + round(length_s * rate)]
            part, _ = decode(path, offset_s, length_s, lib)
            assert part.shape == expected.shape
            if lib is not False:
                assert torch.equal(part, expected)  # sample-exact
            assert (part - expected).abs().max() < 1e-5  # the issue asks for 1e-4


@needs_ffmpeg
@pytest.mark.parametrize("options", ["-q:a 4", "-b:a 32k", "-write_xing 0", "-id3v2_version 3 -metadata title=x"])
@pytest.mark.parametrize("rate", [8000, 44100])
def test_mp3_of_another_encoder(tmp_path, rate, options):
    convert(write(tmp_path / "a.wav", rate, 2), tmp_path / "a.mp3", *options.split())
    whole, _ = decode(tmp_path / "a.mp3")
    for lib in (None, True, False):
        part, _ = decode(tmp_path / "a.mp3", 0.61, 0.37, lib)
        start = round(0.61 * rate)
        assert (part - whole[:, start : start + round(0.37 * rate)]).abs().max() < 1e-5


@needs_ffmpeg
def test_mp3_without_a_length_is_read_to_its_end(tmp_path):
    # libsndfile guesses the length from the loud beginning and would stop after 6 of 15 s
    loud = np.random.default_rng(0).standard_normal(160000) * 0.3
    soundfile.write(tmp_path / "a.wav", np.concatenate([loud, np.zeros(80000)]), 16000)
    convert(tmp_path / "a.wav", tmp_path / "a.mp3", "-q:a", "2", "-write_xing", "0")
    assert soundfile.info(tmp_path / "a.mp3").duration < 10
    assert decode(tmp_path / "a.mp3")[0].shape[1] > 15 * 16000
    assert probe(tmp_path / "a.mp3").duration_s > 15


OTHER = {
    "m4a": ["-c:a", "aac"],
    "webm": ["-c:a", "libopus"],
    "opus": ["-c:a", "libopus"],
    "wma": ["-c:a", "wmav2"],
    "aac": ["-c:a", "aac"],
    "mkv": ["-c:a", "libvorbis"],
    "mov": ["-c:a", "alac"],
}


@needs_ffmpeg
@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize("extension", OTHER)
def test_other_formats_go_to_ffmpeg(tmp_path, extension, rate):
    path = tmp_path / f"a.{extension}"
    convert(write(tmp_path / "a.wav", rate), path, *OTHER[extension])
    whole, found_rate = decode(path)
    assert found_rate == (48000 if "libopus" in OTHER[extension] else rate)
    assert whole.shape[1] / found_rate == pytest.approx(1.7, abs=0.25)
    assert whole.abs().max() > 0.2
    info = probe(path)
    assert (info.sample_rate_hz, info.n_channels) == (found_rate, 1)
    assert info.duration_s == pytest.approx(whole.shape[1] / found_rate, abs=0.25)
    for lib in (None, True, False):
        for offset_s, length_s in ((0.3, 0.5), (0.7, None), (0, 0.1), (0.123, 9.0)):
            start = round(offset_s * found_rate)
            expected = whole[:, start : None if length_s is None else start + round(length_s * found_rate)]
            assert torch.equal(decode(path, offset_s, length_s, lib)[0], expected)


@needs_libraries
def test_amr_from_a_phone(tmp_path):
    # 12.2 kbit/s frames of random bits: noise, but AMR (no free encoder is installed)
    rng = random.Random(0)
    amr = b"#!AMR\n" + b"".join(b"\x3c" + rng.randbytes(31) for _ in range(50))
    waveform, rate = decode(amr)
    assert (waveform.shape, rate) == ((1, 8000), 8000)
    assert probe(amr) == audio.AudioInfo(1.0, 8000, 1, 8000, "amr_nb")
    assert torch.equal(decode(amr, 0.5, 0.25)[0], waveform[:, 4000:6000])


@needs_ffmpeg
def test_the_sound_of_a_video(tmp_path):
    write(tmp_path / "a.wav")
    video = ["-f", "lavfi", "-i", "testsrc=duration=3:size=64x64:rate=5"]
    convert(tmp_path / "a.wav", tmp_path / "a.mp4", *video, "-c:v", "mpeg4", "-c:a", "aac")
    assert decode(tmp_path / "a.mp4")[0].shape[1] / 16000 == pytest.approx(1.7, abs=0.1)
    assert probe(tmp_path / "a.mp4").duration_s == pytest.approx(1.7, abs=0.1)  # the sound's, not the picture's 3 s
    convert(tmp_path / "a.wav", tmp_path / "b.mp4", *video, "-c:v", "mpeg4", "-map", "1:v")
    with pytest.raises(AudioError, match="is not a recording"):
        decode(tmp_path / "b.mp4")


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("lib", [None, True, pytest.param(False, marks=needs_libraries)])
def test_paths_bytes_and_files(tmp_path, extension, lib):
    path = write(tmp_path / f"a.{extension}")
    content = path.read_bytes()
    expected, _ = decode(path, 0.4, 0.5, lib)
    with open(path, "rb") as file:
        file.seek(100)  # wherever it stands, the recording begins at its beginning
        sources = [str(path), content, bytearray(content), memoryview(content), io.BytesIO(content), file]
        for source in sources:
            assert torch.equal(decode(source, 0.4, 0.5, lib)[0], expected)
        assert not file.closed
    assert probe(content) == probe(path)


def test_a_stream_that_cannot_seek(tmp_path):
    write(tmp_path / "a.flac")
    read, write_end = os.pipe()
    with open(read, "rb") as stream, open(write_end, "wb") as sink:
        sink.write((tmp_path / "a.flac").read_bytes()[:60000])
        sink.close()
        assert decode(stream, 0, 0.1)[0].shape == (1, 1600)


def test_text_file_object_is_a_type_error(tmp_path):
    (tmp_path / "a.wav").write_text("x")
    with open(tmp_path / "a.wav") as file, pytest.raises(TypeError, match="binary"):
        decode(file)


@pytest.mark.parametrize("extension", ["mp3", "ogg", "m4a", "txt", ""])
def test_content_counts_not_the_name(tmp_path, extension):
    wav = write(tmp_path / "a.wav")
    renamed = tmp_path / f"b.{extension}"
    renamed.write_bytes(wav.read_bytes())
    assert torch.equal(decode(renamed)[0], decode(wav)[0])
    assert probe(renamed).format == "wav"


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ALAW", "ULAW"])
def test_kinds_of_wav(tmp_path, subtype):
    path = write(tmp_path / "a.wav", 8000, 2, subtype=subtype)
    whole, _ = decode(path)
    assert np.abs(whole.T.numpy()[:8000] - signal(8000, 2)[:8000]).max() < 0.2
    assert torch.equal(decode(path, 0.37, 0.2)[0], whole[:, 2960:4560])
    if has_ffmpeg_libraries():
        assert (decode(path, lib=False)[0] - whole).abs().max() < 1e-6


def test_only_the_part_asked_for_is_decoded(tmp_path, monkeypatch):
    path = write(tmp_path / "a.wav")
    asked = []
    read = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, n, **kw: asked.append(n) or read(self, n, **kw))
    decode(path, 1.0, 0.25)
    assert asked == [4000]


@pytest.mark.parametrize("offset_s, length_s", [(-1, None), (0, 0), (0, -1), (float("nan"), None), (0, float("inf"))])
def test_parts_that_cannot_be(tmp_path, offset_s, length_s):
    with pytest.raises(ValueError, match="offset of 0 or more"):
        decode(write(tmp_path / "a.wav"), offset_s, length_s)


# ---- faults


def test_missing_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="a.wav is not there"):
        decode(tmp_path / "a.wav")
    (tmp_path / "a.wav").touch()
    with pytest.raises(AudioError, match="is empty"):
        decode(tmp_path / "a.wav")
    with pytest.raises(AudioError, match="is a folder"):
        probe(tmp_path)
    assert issubclass(AudioError, ValueError)


@pytest.mark.parametrize("lib", [None, True, pytest.param(False, marks=needs_libraries)])
@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3", "aiff", "au"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_cut_recordings(tmp_path, extension, share, lib):
    content = write(tmp_path / f"a.{extension}", 16000, 2).read_bytes()
    assert decode(content, lib=lib)[0].shape[1] == 27213
    with pytest.raises(AudioError, match="cut short|not a recording"):
        decode(content[: int(len(content) * share)], lib=lib)


@needs_ffmpeg
@pytest.mark.parametrize("extension", ["m4a", "webm", "opus", "mkv", "mov", "wma", "aac"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_cut_recordings_of_other_formats(tmp_path, extension, share):
    convert(write(tmp_path / "a.wav"), tmp_path / f"a.{extension}", *OTHER[extension])
    content = (tmp_path / f"a.{extension}").read_bytes()
    with pytest.raises(AudioError, match="cut short|not a recording"):
        decode(content[: int(len(content) * share)])


@needs_ffmpeg
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_cut_mp4_with_its_index_in_front(tmp_path, share):
    convert(write(tmp_path / "a.wav"), tmp_path / "a.m4a", "-movflags", "+faststart")
    content = (tmp_path / "a.m4a").read_bytes()
    with pytest.raises(AudioError, match="cut short"):
        decode(content[: int(len(content) * share)])


@needs_ffmpeg
@pytest.mark.parametrize("kind", ["wav", "flac", "webm", "mp3", "ogg"])
def test_streamed_files_of_unknown_length_are_whole(tmp_path, kind):
    # written to a pipe, so the header could not be completed afterwards
    content = convert(write(tmp_path / "a.wav"), None, "-f", kind)
    waveform, rate = decode(content)
    assert waveform.shape[1] / rate == pytest.approx(1.7, abs=0.15)
    assert probe(content).n_frames == waveform.shape[1]


@needs_libraries
@pytest.mark.parametrize(
    "content",
    [b"Dear colleague,\n" * 100, b'{"a": 1}', b"\x89PNG\r\n\x1a\n" + bytes(500), b"RIFF", b"\0" * 5000, b"OggS" + bytes(99)],
)
def test_what_is_not_audio(content):
    with pytest.raises(AudioError, match="is not a recording|cut short"):
        decode(content)
    with pytest.raises(AudioError):
        probe(content)


@needs_libraries
def test_random_bytes_never_become_a_recording():
    rng = random.Random(0)
    for start in (b"", b"\xff\xfb", b"ID3", b"OggS", b"fLaC", b"RIFF", b"\x1aE\xdf\xa3", b"\0\0\0\x20ftypM4A "):
        for n in (1, 100, 3000, 20000):
            with pytest.raises(AudioError):
                decode(start + rng.randbytes(n))


@pytest.mark.parametrize("extension", ["wav", "ogg"])
def test_zero_samples(tmp_path, extension):
    soundfile.write(tmp_path / f"a.{extension}", np.zeros(0), 16000)
    with pytest.raises(AudioError, match="no samples"):
        decode(tmp_path / f"a.{extension}")


@pytest.mark.parametrize("lib", [None, True, pytest.param(False, marks=needs_libraries)])
@pytest.mark.parametrize("extension", ["wav", "flac", "mp3"])
def test_a_part_behind_the_end_has_no_samples(tmp_path, extension, lib):
    with pytest.raises(AudioError, match="no samples"):
        decode(write(tmp_path / f"a.{extension}"), 5.0, 1.0, lib)


@pytest.mark.parametrize("lib", [None, True, pytest.param(False, marks=needs_libraries)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite(tmp_path, bad, lib):
    soundfile.write(tmp_path / "a.wav", np.array([0.0, bad, 0.5]), 16000, subtype="FLOAT")
    with pytest.raises(AudioError, match="NaN or infinity in 1 samples"):
        decode(tmp_path / "a.wav", lib=lib)


NO_FFMPEG = """
import sys
from w2v2nb.audio import AudioError, decode, probe
print(tuple(decode(sys.argv[1])[0].shape), tuple(decode(sys.argv[1], lib=True)[0].shape))
for call in (lambda: decode(sys.argv[1], lib=False), lambda: decode(sys.argv[2]), lambda: probe(sys.argv[2])):
    try:
        call()
    except AudioError as e:
        print(e)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="hides FFmpeg's libraries by the Linux loader's search path")
def test_without_ffmpeg(tmp_path):
    # libraries of those names that are no libraries come first in the loader's path: FFmpeg really cannot be loaded
    (tmp_path / "lib").mkdir()
    for name in ("avutil", "avcodec", "avformat", "avdevice", "avfilter", "swscale", "swresample"):
        for version in [*range(2, 12), *range(56, 64)]:
            (tmp_path / "lib" / f"lib{name}.so.{version}").write_text("not a library")
    (tmp_path / "b.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
    command = [sys.executable, "-c", NO_FFMPEG, str(write(tmp_path / "a.wav")), str(tmp_path / "b.m4a")]
    env = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path / "lib")}
    out = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.splitlines()
    assert out[0] == "(1, 27213) (1, 27213)"
    assert len(out) == 4 and all("apt-get install ffmpeg" in line and "conda install ffmpeg" in line for line in out[1:])


# ---- the header


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate, n_channels", [(8000, 1), (44100, 2)])
def test_probe_agrees_with_decode(tmp_path, extension, rate, n_channels):
    path = write(tmp_path / f"a.{extension}", rate, n_channels)
    n = decode(path)[0].shape[1]
    assert probe(path) == audio.AudioInfo(n / rate, rate, n_channels, n, extension)


def test_probe_decodes_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "a.flac")
    monkeypatch.setattr(soundfile.SoundFile, "read", None)
    assert probe(path).n_frames == 27213


def test_shipped_recordings_decode_as_their_metadata_says():
    from w2v2nb import samples

    for uid in sorted(os.listdir(samples.prefix()))[:20]:
        if not os.path.isdir(os.path.join(samples.prefix(), uid)):
            continue
        waveform, rate = decode(find(uid, samples.prefix()))
        assert rate == read_metadata(uid, samples.prefix())["sample_rate_hz"] and waveform.abs().max() > 0.01


def test_real_recordings():
    root = os.environ.get("W2V2NB_DATA")
    if not root:
        pytest.skip("real recordings: set W2V2NB_DATA to their folder")
    for study in ("fsdd", "svd", "librispeech", "coffee"):
        for name in sorted(os.listdir(f"{root}/{study}/audio"))[:5]:
            path = find(name.removesuffix(".flac"), f"{root}/{study}", "audio")
            assert probe(path).n_frames == decode(path)[0].shape[1]


def test_import_is_light():
    code = "import sys, w2v2nb.audio; print([m for m in ('librosa', 'torchaudio', 'torchcodec', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
