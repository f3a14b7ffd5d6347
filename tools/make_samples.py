"""Make the recordings that ship with w2v2nb: python tools/make_samples.py [folder] (default w2v2nb/assets).

Synthetic speech for trying things, not evidence: espeak-ng speaks our own sentences in voices that we invent, and the
"ratings" are the settings it was given. Needs espeak-ng; the same seed, espeak-ng and libsndfile give the same bytes.
"""

import csv
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from torchaudio.functional import resample

SEED = 24
ASSETS = Path(__file__).resolve().parents[1] / "w2v2nb" / "assets"
LABELS = ["slow rate", "rapid rate", "strained", "breathy", "monopitch"]
PRESENT = {"slow rate": 0.27, "rapid rate": 0.27, "strained": 0.3, "breathy": 0.33, "monopitch": 0.36}
MISSING = 0.08  # share of ratings left out
N_VOICES, N_TEST_VOICES = 24, 8
# en-gb is written en: under its full name espeak-ng 1.51 ignores the variant
ACCENTS = ["en-us", "en", "en-us-nyc", "en-gb-scotland", "en-029", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd"]
TASKS = ["puhtuhkuh", "buttercup", "sentence"] * 2  # what every voice says
SENTENCES = [
    "Nine old boats came home.",
    "Please put the blue cup back on the table.",
    "We walked along the river until it began to rain.",
    "My neighbor grows tomatoes and beans behind the garage.",
    "The baker opens early, so the whole street smells of bread.",
    "A small gray dog waited by the gate for somebody to throw the ball.",
]
ENCODINGS = {"wav": "LINEAR16", "flac": "FLAC", "ogg": "OGG_VORBIS", "mp3": "MP3"}
# (extension, rate in Hz, channels): how many recordings are kept so; wav and 44.1 kHz are large, so there are few
FORMATS = {
    ("mp3", 16000, 1): 42, ("ogg", 16000, 1): 42, ("flac", 16000, 1): 9, ("wav", 16000, 1): 2,
    ("mp3", 44100, 1): 5, ("ogg", 44100, 1): 3, ("mp3", 8000, 1): 12, ("ogg", 8000, 1): 9,
    ("flac", 8000, 1): 6, ("wav", 8000, 1): 3, ("mp3", 16000, 2): 5, ("ogg", 44100, 2): 2,
    ("flac", 16000, 2): 1, ("flac", 44100, 1): 1, ("wav", 8000, 2): 1, ("wav", 44100, 1): 1,
}  # fmt: skip


@dataclass
class Voice:
    """A voice that nobody has."""

    name: str
    accent: str
    gender: str
    pitch_hz: float  # typical pitch
    spread: float  # width of the pitch range over the typical pitch
    tract: float  # scale of all formants: a short vocal tract is above 1
    formants: list[float]  # each formant's own deviation


def invent_voice(i: int, rng: random.Random) -> Voice:
    """Voice i: even ones low and long, odd ones high and short, otherwise drawn."""
    gender = ("male", "female")[i % 2]
    pitch_hz = rng.uniform(85, 125) if gender == "male" else rng.uniform(155, 215)
    tract = rng.uniform(0.92, 1.03) if gender == "male" else rng.uniform(1.04, 1.16)
    formants = [rng.uniform(0.96, 1.04) for _ in range(5)]
    return Voice(f"v{i + 1:02d}", ACCENTS[i % len(ACCENTS)], gender, pitch_hz, rng.uniform(0.5, 0.7), tract, formants)


def rate(rng: random.Random) -> dict[str, int]:
    """Clinical scores for one recording, drawn independently of voice and task: 1 absent, 2 to 5 slight to severe."""
    scores = {label: rng.randint(2, 5) if rng.random() < PRESENT[label] else 1 for label in LABELS}
    if scores["slow rate"] > 1 and scores["rapid rate"] > 1:
        scores[rng.choice(["slow rate", "rapid rate"])] = 1  # nobody is both
    return scores


def strength(score: int) -> float:
    """How far a setting is moved: 0 for absent, 0.7 for slight to 1 for severe."""
    return 0.0 if score == 1 else 0.7 + 0.1 * (score - 2)


def words_per_minute(scores: dict[str, int], rng: random.Random) -> int:
    """espeak-ng's speed."""
    slow, rapid = strength(scores["slow rate"]), strength(scores["rapid rate"])
    return round(rng.uniform(155, 180) * (1 - 0.5 * slow) * (1 + 1.0 * rapid))


def variant(voice: Voice, scores: dict[str, int]) -> str:
    """An espeak-ng voice variant file: the voice, and what its scores do to it."""
    strained, breathy = strength(scores["strained"]), strength(scores["breathy"])
    pitch_hz = voice.pitch_hz * (1 + 0.2 * strained)
    spread = voice.spread * (1 - strength(scores["monopitch"]))
    lines = ["language variant", f"name {voice.name}", f"gender {voice.gender}"]
    # espeak-ng speaks near the upper end of its range
    lines.append(f"pitch {pitch_hz * (1 - 0.75 * spread):.0f} {pitch_hz * (1 + 0.25 * spread):.0f}")
    lines.append(f"flutter {round(2 * (1 - strength(scores['monopitch'])))}")
    lines.append(f"roughness {round(7 * strained)}")
    for i, own in enumerate(voice.formants, start=1):
        freq = 100 * voice.tract * own * (1 + (0.1 * strained if i == 1 else 0))
        # a tense voice has strong, narrow upper formants; a breathy one loses them
        height = 100 * (1 + (0.5 * strained if i > 1 else 0)) * (1 - (0.45 * breathy if i > 1 else 0))
        width = 100 * (1 - 0.35 * strained) * (1 + 0.6 * breathy)
        lines.append(f"formant {i} {freq:.0f} {height:.0f} {width:.0f}")
    lines.append(f"formant 0 {100 * voice.tract:.0f} {100 * (1 - 0.4 * strained):.0f} 100")
    lines.append(f"voicing {100 * (1 - 0.45 * breathy):.0f}")
    if breathy:
        lines.append("breath " + " ".join(f"{b * breathy:.0f}" for b in (0, 30, 50, 50, 40, 30)))
        lines.append("breathw 150 200 250 300 400 400")
    if strained:
        low, middle, high = 255 - 120 * strained, 200 + 55 * strained, 60 + 150 * strained
        lines.append(f"tone 100 {low:.0f} 800 {middle:.0f} 2500 255 4000 {high:.0f}")
    return "\n".join(lines) + "\n"


class Speaker:
    """espeak-ng with a data folder of our own, in which voice variants can be written."""

    def __init__(self, folder: Path):
        version = subprocess.run(["espeak-ng", "--version"], capture_output=True, text=True, check=True).stdout
        system = Path(version.split("Data at:")[1].strip())
        data = folder / "espeak-ng-data"
        (data / "voices" / "!v").mkdir(parents=True)
        for path in [*system.iterdir(), *(system / "voices").iterdir()]:
            if path.name not in ("voices", "!v"):
                os.symlink(path, data / path.relative_to(system))
        self.folder, self.variants = folder, data / "voices" / "!v"

    def say(self, text: str, accent: str, variant_text: str, wpm: int) -> tuple[np.ndarray, int]:
        """Mono float64 samples without silence around them, and their rate in Hz."""
        (self.variants / "ours").write_text(variant_text)
        wav = self.folder / "said.wav"
        command = ["espeak-ng", f"--path={self.folder}", "-v", f"{accent}+ours", "-s", str(wpm), "-a", "60", "-z", "-w", str(wav)]
        subprocess.run([*command, text], check=True)
        samples, rate_hz = sf.read(wav)
        loud = np.flatnonzero(np.abs(samples) > 1e-3)
        return samples[loud[0] : loud[-1] + 1], rate_hz


def prompt(task: str, n: int, sentence: int) -> str:
    """The text of a task: n repetitions, or the given sentence."""
    if task == "puhtuhkuh":
        return " ".join(["puh tuh kuh"] * n)
    return " ".join(["buttercup"] * n) if task == "buttercup" else SENTENCES[sentence]


def record(speech: np.ndarray, from_hz: int, to_hz: int, channels: int, rng: np.random.Generator) -> np.ndarray:
    """Float32 samples (frames, channels): resampled, silence around some, a little room noise, another level."""
    y = resample(torch.from_numpy(speech), from_hz, to_hz).numpy()
    room_s = max(0.0, 11.9 - len(y) / to_hz)
    before_s, after_s = rng.uniform(0.02, 0.15, 2)
    if rng.random() < 0.4:
        before_s, after_s = rng.uniform(0.3, 1.5, 2)
    scale = min(1.0, room_s / (before_s + after_s))
    y = np.pad(y, [int(s * scale * to_hz) for s in (before_s, after_s)])
    y = y / np.abs(y).max() * 10 ** (rng.uniform(-12, -2) / 20)
    gains = [1.0, rng.uniform(0.5, 0.9)][:channels]
    noise = rng.standard_normal((len(y), channels)) * 10 ** (rng.uniform(-80, -68) / 20)
    # in float64 up to here, so that rounding to 16 bits gives the same on every processor
    return (np.round((y[:, None] * gains + noise) * 32767) / 32767).astype(np.float32)


def crc(page: bytes) -> int:
    """Ogg's checksum: CRC-32 with polynomial 0x04c11db7, neither reflected nor inverted."""
    value = 0
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1) ^ (0x04C11DB7 if value & 0x80000000 else 0)
            value &= 0xFFFFFFFF
    return value


def fix_serial(path: Path, serial: int) -> None:
    """libsndfile draws an Ogg stream's serial number from the clock: set it, and the pages' checksums."""
    data, at = bytearray(path.read_bytes()), 0
    while at < len(data):
        n_segments = data[at + 26]
        end = at + 27 + n_segments + sum(data[at + 27 : at + 27 + n_segments])
        data[at + 14 : at + 18] = serial.to_bytes(4, "little")
        data[at + 22 : at + 26] = bytes(4)
        data[at + 22 : at + 26] = crc(data[at:end]).to_bytes(4, "little")
        at = end
    path.write_bytes(data)


def write(path: Path, samples: np.ndarray, rate_hz: int, serial: int) -> None:
    """Encode as the extension says, small where that can be chosen.

    From float32: of 16-bit samples libsndfile 1.2.2 makes distorted stereo mp3.
    """
    extra = {"compression_level": 0.9} if path.suffix in (".mp3", ".ogg") else {}
    sf.write(path, samples, rate_hz, **extra)
    if path.suffix == ".ogg":
        fix_serial(path, serial)


@dataclass
class Plan:
    """A recording before it is spoken."""

    uid: str
    voice: Voice
    task: str
    n: int  # repetitions
    sentence: int
    wpm: int
    scores: dict[str, int]
    is_missing: dict[str, bool]
    form: tuple[str, int, int]  # extension, rate in Hz, channels


def plans(rng: random.Random) -> list[Plan]:
    """Every recording's settings, drawn before anything is spoken, in the order of their uids."""
    forms = [form for form, n in FORMATS.items() for _ in range(n)]
    rng.shuffle(forms)
    uids = rng.sample(range(1, 2000), len(forms))
    drawn = []
    for i in range(N_VOICES):
        voice = invent_voice(i, rng)
        for task in TASKS:
            scores = rate(rng)
            missing = {label: rng.random() < MISSING for label in LABELS}
            n, sentence, wpm = rng.choice([2, 3, 3, 4, 4, 5, 12]), rng.randrange(len(SENTENCES)), words_per_minute(scores, rng)
            drawn.append(Plan(f"{uids.pop():06d}", voice, task, n, sentence, wpm, scores, missing, forms.pop()))
    return sorted(drawn, key=lambda p: p.uid)


def metadata(plan: Plan) -> dict:
    """As the original's folders hold it: the rate is numeric text in some, and 6 or -1 mean not rated."""
    extension, rate_hz, _ = plan.form
    odd = int(plan.uid) % 2
    raw = {label: (6 if odd else -1) if plan.is_missing[label] else plan.scores[label] for label in LABELS}
    return {
        "encoding": ENCODINGS[extension],
        "sample_rate_hz": str(rate_hz) if int(plan.uid) % 3 == 0 else rate_hz,
        "task": plan.task,
        "subject": plan.voice.name,
        "features": [{"name": label, "score": raw[label]} for label in LABELS],
    }


def make_recording(plan: Plan, speaker: Speaker, folder: Path) -> Path:
    """Speak a plan and write its folder; returns the audio file's path."""
    extension, rate_hz, channels = plan.form
    n = plan.n
    while True:
        text = prompt(plan.task, n, plan.sentence)
        speech, from_hz = speaker.say(text, plan.voice.accent, variant(plan.voice, plan.scores), plan.wpm)
        if plan.task == "sentence" or 1.0 <= len(speech) / from_hz <= 11.0:
            break
        n += 1 if len(speech) < from_hz else -1
    path = folder / plan.uid / f"waveform.{extension}"
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = record(speech, from_hz, rate_hz, channels, np.random.default_rng([SEED, int(plan.uid)]))
    write(path, samples, rate_hz, serial=int(plan.uid))
    (path.parent / "metadata.json").write_text(json.dumps(metadata(plan), indent=1) + "\n", encoding="utf-8")
    return path


def write_splits(drawn: list[Plan], folder: Path, rng: random.Random) -> None:
    """train.csv and test.csv without a voice in both, and labels.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    voices = sorted({(p.voice.gender, p.voice.name) for p in drawn})
    by_gender = [[name for g, name in voices if g == gender] for gender in ("female", "male")]
    test = {name for names in by_gender for name in rng.sample(names, N_TEST_VOICES // 2)}
    for name, is_test in (("train", False), ("test", True)):
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["uid", "subject", "task", *LABELS])
            for p in drawn:
                if (p.voice.name in test) == is_test:
                    ratings = ["" if p.is_missing[x] else int(p.scores[x] > 1) for x in LABELS]
                    table.writerow([p.uid, p.voice.name, p.task, *ratings])
    (folder / "labels.txt").write_text("\n".join(LABELS) + "\n", encoding="utf-8")


def main(assets: Path = ASSETS, uids: list[str] | None = None) -> None:
    """Write recordings/ and splits/; with uids only those recordings."""
    rng = random.Random(SEED)
    drawn = plans(rng)
    with tempfile.TemporaryDirectory() as temporary:
        speaker = Speaker(Path(temporary))
        for plan in drawn:
            if uids is None or plan.uid in uids:
                make_recording(plan, speaker, assets / "recordings")
    write_splits(drawn, assets / "splits", rng)


if __name__ == "__main__":
    main(*[Path(folder) for folder in sys.argv[1:2]])
