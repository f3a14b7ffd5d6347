"""Augmentation: what each effect does to a signal, the same in every thread and process, short clips, SpecAugment."""

import multiprocessing
import os
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from w2v2nb.augment import EFFECTS, Augment, draw_spans, make_room, mask_spans, parse_effects, plot_effects
from w2v2nb.loading import RecordingError
from w2v2nb.transforms import Check, Truncate, pipeline

RATE = 16000
ROOT = os.environ.get("W2V2NB_DATA")
ALL = tuple(EFFECTS)


def voice(duration_s=2.0, rate=RATE, pitch_hz=200.0):
    "Harmonics that come and go four times a second, with a little noise: float32 samples."
    t = np.arange(round(duration_s * rate)) / rate
    tone = sum(np.sin(2 * np.pi * pitch_hz * k * t) / k for k in range(1, 8)) * (1 + np.sin(8 * np.pi * t)) / 8
    return (tone + 1e-3 * np.random.default_rng(0).standard_normal(len(t))).astype(np.float32)


def sample_of(wave, rate=RATE, uid="a", epoch=0, **more):
    return {"uid": uid, "waveform": torch.from_numpy(wave)[None], "sample_rate": rate, "epoch": epoch, **more}


def change(name, strength, wave, rate=RATE, seed=0):
    before = wave.copy()
    changed = EFFECTS[name].change(wave, rate, strength, np.random.default_rng(seed))
    assert np.array_equal(wave, before) and changed.dtype == np.float32 and changed.ndim == 1 and np.isfinite(changed).all()
    return changed


def level_db(wave):
    return 20 * np.log10(np.sqrt(np.square(wave.astype(float)).mean()))


def find_pitch_hz(wave, rate=RATE):
    "The strongest frequency; the first harmonic for `voice`."
    return np.abs(np.fft.rfft(wave * np.hanning(len(wave)))).argmax() * rate / len(wave)


# ---- what each effect does, and no more


@pytest.mark.parametrize("rate", [8000, RATE])
@pytest.mark.parametrize("factor", [0.9, 1.0375, 1.1])
def test_speed_changes_length_and_pitch_by_its_factor(rate, factor):
    wave = voice(rate=rate)
    changed = change("speed", factor, wave, rate)
    assert len(changed) == pytest.approx(len(wave) / factor, abs=2)
    assert find_pitch_hz(changed, rate) == pytest.approx(200 * factor, abs=1.5)
    assert level_db(changed) == pytest.approx(level_db(wave), abs=0.1)


@pytest.mark.parametrize("rate", [8000, RATE])
@pytest.mark.parametrize("factor", [0.85, 1.15])
def test_stretch_changes_length_and_not_pitch(rate, factor):
    wave = voice(rate=rate)
    changed = change("stretch", factor, wave, rate)
    assert len(changed) == pytest.approx(len(wave) / factor, abs=2)
    assert find_pitch_hz(changed, rate) == pytest.approx(200, abs=1.5)
    assert level_db(changed) == pytest.approx(level_db(wave), abs=1)


@pytest.mark.parametrize("rate", [8000, RATE])
@pytest.mark.parametrize("semitones", [-2, 2])
def test_pitch_changes_pitch_and_not_length(rate, semitones):
    wave = voice(rate=rate)
    changed = change("pitch", semitones, wave, rate)
    assert len(changed) == len(wave) and level_db(changed) == pytest.approx(level_db(wave), abs=1)
    assert find_pitch_hz(changed, rate) == pytest.approx(200 * 2 ** (semitones / 12), abs=2)


@pytest.mark.parametrize("share", [-0.25, -0.01, 0.1, 0.25])
def test_shift_keeps_content(share):
    wave = voice()
    back = np.roll(change("shift", share, wave), -round(share * len(wave)))
    is_other = np.flatnonzero(back != wave)
    assert 0 < len(is_other) <= 0.01 * RATE  # only the fades of 5 ms on both sides of the seam, which was the ends
    assert np.minimum(is_other, len(wave) - 1 - is_other).max() < 0.005 * RATE


def test_reverb_keeps_length_and_level_and_smears():
    wave = voice()
    wave[RATE:] = 0
    changed = change("reverb", 0.5, wave)
    assert len(changed) == len(wave) and level_db(changed) == pytest.approx(level_db(wave), abs=1e-3)
    assert np.abs(changed[RATE : RATE + 800]).max() > 0.01  # sound goes on where there was none
    assert np.abs(changed[RATE + 8000 :]).max() < 1e-5  # and is over when the room is
    assert 0.5 < np.corrcoef(changed, wave)[0, 1] < 0.999


@pytest.mark.parametrize("rate", [8000, RATE])
@pytest.mark.parametrize("decay_s", [1e-4, 0.1, 0.6])
def test_a_room_begins_with_the_sound_and_decays_by_60_db(rate, decay_s):
    room = make_room(rate, decay_s, np.random.default_rng(0)).astype(float)
    assert room[0] == 1 and np.square(room[1:]).sum() == pytest.approx(decay_s, rel=1e-4)
    if decay_s > 0.05:
        n = len(room) // 10
        steps = np.diff([level_db(room[1:][i * n : (i + 1) * n]) for i in range(9)])
        assert steps.sum() == pytest.approx(-48, abs=3)


@pytest.mark.parametrize("snr_db", [0, 15, 30])
def test_noise_reaches_its_ratio_and_is_white(snr_db):
    wave = voice()
    noise = change("noise", snr_db, wave) - wave
    assert level_db(wave) - level_db(noise) == pytest.approx(snr_db, abs=0.2)
    power = np.square(np.abs(np.fft.rfft(noise))).reshape(-1)[:16000].reshape(4, -1).mean(1)
    assert power.max() / power.min() < 1.2 and abs(np.corrcoef(noise, wave)[0, 1]) < 0.02


@pytest.mark.parametrize("gain_db", [-12, 6, 12])
def test_gain_changes_only_level(gain_db):
    wave = voice()
    changed = change("gain", gain_db, wave)
    assert np.corrcoef(changed, wave)[0, 1] > 1 - 1e-6 and level_db(changed) - level_db(wave) == pytest.approx(gain_db, abs=1e-3)
    assert np.abs(change("gain", 12, 3 * wave)).max() > 1  # louder than full scale, and not clipped


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rate", [8000, RATE])
def test_every_effect_changes_the_signal_at_strengths_within_its_range(name, rate):
    wave, effect, found = voice(1.0, rate), EFFECTS[name], []
    augment = Augment((name,), probability=1)
    for epoch in range(12):
        after = augment(sample_of(wave, rate, epoch=epoch))["waveform"][0].numpy()
        assert len(after) != len(wave) or np.abs(after - wave).max() > 1e-4
        if name in ("speed", "stretch"):
            found.append(len(wave) / len(after))
        elif name == "gain":
            found.append(level_db(after) - level_db(wave))
        elif name == "noise":
            found.append(level_db(wave) - level_db(after - wave))
    low, high = sorted((effect.low, effect.high))
    width = high - low
    assert all(low - 0.02 * width <= x <= high + 0.02 * width for x in found)
    assert not found or max(found) - min(found) > 0.4 * width


# ---- the same wherever it is made


def bits(samples, augment):
    return [augment(sample)["waveform"].numpy().tobytes() for sample in samples]


def bits_of_one(task):
    "In a worker: with global generators in a state of its own, which must stay as it is."
    augment, sample, seed = task
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    before = global_states()
    found = bits([sample], augment)[0]
    assert global_states() == before
    return found


def global_states():
    return random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().numpy().tobytes()


@pytest.fixture(scope="module")
def several():
    return [sample_of(voice(0.5), uid=uid, epoch=epoch) for uid in ("a", "b") for epoch in range(3)]


def test_it_follows_from_seed_epoch_and_recording(several):
    augment = Augment(ALL, seed=5)
    once = bits(several, augment)
    assert len(set(once)) == len(once)  # other epoch, other recording: another result
    assert bits(several[::-1], augment)[::-1] == once  # whatever the order
    assert set(bits(several, Augment(ALL, seed=6))).isdisjoint(once)


def test_effects_apply_in_one_order_and_do_not_disturb_each_other(several):
    assert bits(several, Augment(ALL[::-1])) == bits(several, Augment(ALL)) == bits(several, Augment((*ALL, "specaugment")))
    # where gain is not drawn, adding it changes nothing; where it is, only the level
    for sample in several:
        alone, louder = (Augment(names)(sample)["waveform"][0] for names in (("noise",), ("noise", "gain")))
        assert torch.corrcoef(torch.stack([alone, louder]))[0, 1] > 1 - 1e-5


def test_threads_and_global_generators_make_no_difference(several):
    augment = Augment(ALL)
    tasks = [(augment, sample, i) for i, sample in enumerate(several)]
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    before = global_states()
    once = bits(several, augment)
    assert global_states() == before
    random.seed(1), np.random.seed(1)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda sample: bits([sample], augment)[0], several * 4)) == once * 4
    assert [bits_of_one(task) for task in tasks] == once


def test_spawned_workers_make_no_difference(several):
    augment = Augment(ALL, probability=0.9)
    assert pickle.loads(pickle.dumps(augment)) == augment
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(bits_of_one, [(augment, sample, 7) for sample in several]) == bits(several, augment)


def test_probability():
    wave = voice(0.2)
    for probability, low, high in ((0, 0, 0), (0.5, 70, 130), (1, 200, 200)):
        augment = Augment(("gain",), probability=probability)
        changed = [not np.array_equal(augment(sample_of(wave, epoch=i))["waveform"][0], wave) for i in range(200)]
        assert low <= sum(changed) <= high


# ---- what it leaves alone


def test_without_an_epoch_nothing_happens():
    sample = sample_of(voice(0.1), epoch=None)
    assert Augment(ALL, probability=1)(sample) is sample
    del sample["epoch"]
    assert Augment(ALL, probability=1)(sample) is sample


def test_specaugment_alone_changes_nothing():
    sample = sample_of(voice(0.1))
    assert torch.equal(Augment(("specaugment",), probability=1)(sample)["waveform"], sample["waveform"])


@pytest.mark.parametrize("wave", [np.full(800, np.nan, np.float32), np.full(800, np.inf, np.float32), np.zeros(0, np.float32)])
def test_what_check_refuses_gets_there(wave):
    sample = Augment(ALL, probability=1)(sample_of(wave))
    with pytest.raises(ValueError, match="NaN or infinite|0 samples"):
        Check(400)(sample)
    stereo = {**sample_of(voice(0.1)), "waveform": torch.ones(2, 800)}
    assert Augment(ALL, probability=1)(stereo) is stereo


@pytest.mark.parametrize("rate", [8000, RATE])
@pytest.mark.parametrize("duration_s", [0.03, 0.05, 0.1, 0.11, 0.5])
def test_short_clips_stay_finite_and_long_enough(rate, duration_s):
    wave = voice(duration_s, rate)
    for names in (*[(name,) for name in ALL], ALL[:-1]):  # all but gain, whose 12 dB are a factor of 4
        augment = Augment(names, probability=1, max_frames=len(wave))
        for epoch in range(6):
            after = augment(sample_of(wave, rate, epoch=epoch))["waveform"]
            assert after.shape[0] == 1 and after.dtype == torch.float32 and torch.isfinite(after).all()
            assert min(400, len(wave)) <= after.shape[1] <= len(wave)
            assert abs(level_db(after.numpy()) - level_db(wave)) < 12.1  # not lost, not blown up


@pytest.mark.parametrize("name, duration_s", [("stretch", 0.1), ("pitch", 0.1), ("shift", 0.05)])
def test_clips_shorter_than_an_effect_can_treat_are_left_alone(name, duration_s):
    augment, short, enough = Augment((name,), probability=1), voice(duration_s - 0.001), voice(duration_s)
    assert np.array_equal(augment(sample_of(short))["waveform"][0], short)
    assert not np.array_equal(augment(sample_of(enough))["waveform"][0], enough)


def test_an_effect_that_leaves_too_little_is_left_out():
    wave, augment = voice(420 / RATE), Augment(("speed",), probability=1)
    lengths = {augment(sample_of(wave, epoch=epoch))["waveform"].shape[1] for epoch in range(20)}
    assert min(lengths) >= 400 and 420 in lengths and max(lengths) > 420
    lengths = {Augment(("speed",), probability=1, min_frames=1)(sample_of(wave, epoch=e))["waveform"].shape[1] for e in range(20)}
    assert min(lengths) < 400


@pytest.mark.parametrize("rate", [8000, RATE])
def test_silence_stays_silent_and_finite(rate):
    for epoch in range(3):
        after = Augment(ALL, probability=1)(sample_of(np.zeros(rate, np.float32), rate, epoch=epoch))["waveform"]
        assert torch.isfinite(after).all() and after.abs().max() < 1e-6


def test_what_an_effect_made_longer_is_cut_and_not_called_shortened():
    wave, lengths = voice(1.0), []
    for epoch in range(10):
        sample = Truncate(len(wave))(sample_of(wave, epoch=epoch))
        before = sample["waveform"].clone()
        after = Augment(("speed",), probability=1, max_frames=len(wave))(sample)
        free = Augment(("speed",), probability=1)(sample)["waveform"]
        assert torch.equal(after["waveform"], free[:, : len(wave)]) and torch.equal(sample["waveform"], before)
        assert after["is_shortened"] is False and after["waveform"].untyped_storage().nbytes() == 4 * after["waveform"].shape[1]
        lengths.append(free.shape[1])
    assert max(lengths) > len(wave) > min(lengths)


# ---- names and settings


@pytest.mark.parametrize(
    "text, names", [("", ()), (None, ()), (" noise ,gain", ("noise", "gain")), ("gain,gain,noise,", ("gain", "noise"))]
)
def test_parse_effects(text, names):
    assert parse_effects(text) == names
    assert parse_effects(",".join([*names, "specaugment"])) == (*names, "specaugment")


@pytest.mark.parametrize("make", [parse_effects, lambda name: Augment((name,)), lambda name: plot_effects(None, 8, (name,))])
def test_unknown_effects(make):
    with pytest.raises(ValueError, match="no augmentation 'Noise'; there are speed, .* gain and specaugment: choose among them"):
        make("Noise")


@pytest.mark.parametrize("settings", [{"probability": -0.1}, {"probability": 1.1}, {"max_frames": -1}])
def test_settings_that_cannot_be(settings):
    with pytest.raises(ValueError, match="probability should be from 0 to 1 and max_frames 0 or more"):
        Augment((), **settings)


def test_plot_effects():
    wave = torch.from_numpy(voice(0.5))
    for waveform in (wave, wave[None]):
        assert len(plot_effects(waveform, RATE).axes) == 2 * len(EFFECTS)
    figure = plot_effects(wave, RATE, ("speed", "specaugment", "gain"))
    assert [ax.get_ylabel() for ax in figure.axes] == ["speed", "", "gain", ""]
    before, after = (np.asarray(figure.axes[i].images[0].get_array()) for i in (2, 3))
    assert np.median(after - before) == pytest.approx(12, abs=0.1)  # the columns show the signal before and after


# ---- in the pipeline


def test_the_pipeline_augments_before_the_check(tmp_path):
    soundfile.write(tmp_path / "a.wav", voice(0.5), RATE)
    soundfile.write(tmp_path / "b.wav", voice(0.01), RATE)
    pipe = pipeline(str(tmp_path), clip_length=4000, augment=Augment(("gain", "speed"), probability=1, max_frames=4000))
    plain = pipeline(str(tmp_path), clip_length=4000)
    assert torch.equal(pipe({"uid": "a"})["waveform"], plain({"uid": "a"})["waveform"])
    assert not torch.equal(pipe({"uid": "a", "epoch": 0})["waveform"], plain({"uid": "a"})["waveform"])
    with pytest.raises(RecordingError, match="b: check: 160 samples"):
        pipe({"uid": "b", "epoch": 0})


@pytest.mark.skipif(not ROOT, reason="real speech: set W2V2NB_DATA to the folder of recordings")
@pytest.mark.parametrize("rate", [8000, RATE])
def test_spoken_digits(rate):
    augment = Augment(ALL, max_frames=rate)
    plain = pipeline(str(Path(ROOT, "fsdd", "audio")), resample_rate=rate, clip_length=rate)
    pipe = pipeline(str(Path(ROOT, "fsdd", "audio")), resample_rate=rate, clip_length=rate, augment=augment)
    paths = sorted(Path(ROOT, "fsdd", "audio").iterdir(), key=lambda path: (path.stat().st_size, path.name))
    n_changed = 0
    for i, path in enumerate([*paths[:20], *paths[:: len(paths) // 20]]):
        before, after = plain({"uid": path.stem})["waveform"], pipe({"uid": path.stem, "epoch": i})["waveform"]
        assert after.shape[1] <= rate and 0.2 < after.norm() / before.norm() < 5
        n_changed += not torch.equal(before, after)
    assert n_changed > 30


# ---- SpecAugment


@pytest.mark.parametrize("n_frames", [1, 2, 3, 5, 9, 50, 500])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.9, 1.0])
def test_some_frame_always_stays_and_the_share_is_right(n_frames, share):
    rng = np.random.default_rng(0)
    masks = np.stack([draw_spans(n_frames, share, 10, rng) for _ in range(2000)])
    assert masks.shape == (2000, n_frames) and not masks.all(1).any()
    if n_frames == 1:
        assert not masks.any()
    elif share == 0.05:  # so few that spans hardly overlap
        assert masks.mean() == pytest.approx(share, rel=0.15)
    else:
        assert 0.2 * share < masks.mean() <= share + 0.02


def test_spans_have_their_length():
    rng = np.random.default_rng(0)
    for n, span, expected in ((500, 10, 10), (12, 10, 6), (5, 10, 2), (2, 10, 1)):
        drawn = [draw_spans(n, 0.01, span, rng) for _ in range(2000)]
        assert {int(mask.sum()) for mask in drawn} - {0} == {expected}
        starts = {int(mask.argmax()) for mask in drawn if mask.any()}
        assert starts <= set(range(n - expected + 1)) and (n > 12 or starts == set(range(n - expected + 1)))


@pytest.mark.parametrize("n_frames", [1, 2, 5, 50, 500])
@pytest.mark.parametrize("n_channels", [1, 16, 512, 768])
def test_mask_spans_masks_frames_and_channels(n_frames, n_channels):
    hidden, fill = torch.ones(n_frames, n_channels), torch.full((n_channels,), 7.0)
    for i in range(30):
        masked = mask_spans(hidden, np.random.default_rng(i), fill=fill)
        assert masked is not hidden and bool((hidden == 1).all()) and set(masked.unique().tolist()) <= {0, 1, 7}
        is_frame, is_channel = (masked == 7).any(1), (masked == 0).any(0)
        assert bool((masked[is_frame][:, ~is_channel] == 7).all()) and bool((masked[:, is_channel] == 0).all())
        assert not is_frame.all() and not is_channel.all()
        assert torch.equal(masked, mask_spans(hidden, np.random.default_rng(i), fill=fill))


def test_mask_spans_masks_its_shares():
    rng = np.random.default_rng(0)
    masked = torch.stack([mask_spans(torch.ones(250, 768), rng, fill=torch.full((768,), 2.0)) for _ in range(400)])
    assert (masked == 2).any(2).float().mean().item() == pytest.approx(0.05, abs=0.006)
    assert (masked == 0).any(1).float().mean().item() == pytest.approx(0.04, abs=0.008)
    same = torch.randn(20, 30)
    assert torch.equal(mask_spans(same, rng, 0, 10, 0), same)


def test_mask_spans_without_a_vector_puts_zeros():
    masked = mask_spans(torch.ones(50, 8), np.random.default_rng(0), 0.5, 5, 0)
    assert 0 < (masked == 0).all(1).sum() < 50 and bool(((masked == 0).all(1) | (masked == 1).all(1)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mask_spans_is_differentiable(dtype):
    hidden = torch.randn(50, 16, dtype=dtype, requires_grad=True)
    fill = torch.randn(16, requires_grad=True)
    masked = mask_spans(hidden, np.random.default_rng(0), 0.3, 5, 0.3, 4, fill=fill)
    assert masked.dtype == dtype
    masked.sum().backward()
    is_kept = masked == hidden
    assert 0 < is_kept.sum() < hidden.numel() and torch.equal(hidden.grad, is_kept.to(dtype))
    assert fill.grad.max() == (~is_kept).all(1).sum() > 0
