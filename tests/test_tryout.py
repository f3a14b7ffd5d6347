"""Every setting of the transforms view: what it shows, plays and writes down is the same waveform."""

import io

import numpy as np
import pytest
import soundfile
import torch

from w2v2nb import samples
from w2v2nb.augment import EFFECTS, Augment
from w2v2nb.config import configure
from w2v2nb.flags import parse
from w2v2nb.loading import RecordingError
from w2v2nb.transforms import pipeline
from w2v2nb.tryout import Change, Setting, apply, drawn_strengths, read_recording, transforms, write_code, write_flags

path = f"{samples.prefix()}/000026/waveform.flac"
RECORDINGS = {"path": path, "sample": read_recording(path), "pair": (read_recording(path)["waveform"], 16000)}
EVERY = {name: effect.high for name, effect in EFFECTS.items()}
SETTINGS = {
    "nothing": Setting(),
    "cut": Setting(is_trimmed=True, clip_s=0.7),
    "8 kHz": Setting(rate_hz=8000),
    **{name: Setting(strengths={name: strength}, draw=2) for name, strength in EVERY.items()},
    "everything": Setting(True, 1.5, EVERY, draw=5, is_masked=True),
    "drawn": Setting(True, 1.5, EVERY, epoch=3, seed=7),
}


def run(code, recording):
    names = {"recording": recording}
    exec(code, names)
    return names["waveform"]


@pytest.mark.parametrize("kind", RECORDINGS)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_code_makes_exactly_the_waveform(name, kind):
    setting, recording = SETTINGS[name], RECORDINGS[kind]
    expected = apply(setting, read_recording(recording))
    assert torch.equal(run(write_code(setting, recording), recording), expected)
    if name not in ("nothing", "8 kHz"):  # else a setting that does nothing would pass
        assert not torch.equal(expected, read_recording(recording)["waveform"])


def test_what_is_drawn_is_what_a_run_hears_in_that_epoch():
    setting = Setting(True, 1.5, EVERY, epoch=3, seed=7)
    run_transform = pipeline(samples.prefix(), clip_length=24000, trim=True, augment=Augment(tuple(EFFECTS), 7, max_frames=24000))
    expected = run_transform({"uid": "000026", "epoch": 3})["waveform"]
    assert torch.equal(apply(setting, read_recording(path)), expected)


@pytest.mark.parametrize("epoch", range(6))
@pytest.mark.parametrize("name", ["gain", "shift", "speed", "stretch", "pitch"])
def test_what_is_said_to_be_drawn_is_what_augment_does(name, epoch):
    sample, augment = read_recording(path), Augment((name,), seed=1)
    strengths = drawn_strengths(augment, sample["uid"], epoch)
    expected = Change(name, strengths[name])(sample) if strengths else sample
    assert torch.equal(augment({**sample, "epoch": epoch})["waveform"], expected["waveform"])


@pytest.mark.parametrize("name", SETTINGS)
def test_the_flags_are_those_of_a_run(name, tmp_path):
    setting = SETTINGS[name]
    given = dict(prefix=samples.prefix(), data_split_root=samples.split_root(), label_txt=samples.label_txt(), tune="all")
    given |= dict(checkpoint=samples.checkpoint(), exp_dir=str(tmp_path / "run"))
    flags = {name: text for name, text in parse(write_flags(setting)).items() if name != "words"}
    config = configure(mode="finetune", **given, **flags)
    assert (config.trim, config.clip_length, config.resample_rate) == (setting.is_trimmed, setting.clip_frames, setting.rate_hz)
    expected = ",".join([*setting.effects, *(["specaugment"] if setting.is_masked else [])])
    assert (config.augment or "") == expected and (not expected or config.seed == setting.seed)


@pytest.mark.parametrize(
    "recording, complaint",
    [
        (3, "of type int"),
        ({"uid": "a"}, "of type dict"),
        ((np.zeros((3, 4, 5)), 16000), "shape is"),
        (("nowhere.wav", 16000), "could not convert"),
        ((np.full(800, np.nan), 16000), "NaN"),
        (f"{samples.prefix()}/nobody/waveform.wav", "nobody"),
    ],
)
def test_what_is_no_recording_is_refused(recording, complaint):
    with pytest.raises((ValueError, RecordingError), match=complaint):
        read_recording(recording)


def test_stereo_at_another_rate_is_shown_as_it_is_and_changed_to_what_the_encoder_takes():
    view = transforms((np.random.default_rng(0).uniform(-0.5, 0.5, (2, 44100)).astype(np.float32), 44100))
    rates = [soundfile.read(io.BytesIO(player.value))[1] for player in view.players.values()]
    assert rates == [44100, 16000]
    assert apply(view.controls.read(), view.sample).shape == (1, 16000)


def heard(view):
    wave, _ = soundfile.read(io.BytesIO(view.players["as the encoder gets it"].value), dtype="float32")
    return torch.from_numpy(wave)


def test_every_control_changes_what_is_heard_and_the_code_says_so():
    pause = 0.001 * torch.randn(1, 16000, generator=torch.Generator().manual_seed(0))
    recording = torch.cat([pause, read_recording(path)["waveform"], pause], 1), 16000
    view = transforms(recording)
    controls, before = view.controls, heard(view)
    changes = [(controls.trim, True), (controls.clip_s, 1.0)]
    changes += [(effect.is_on, True) for effect in controls.effects.values()]
    changes += [(effect.strength, EFFECTS[name].low) for name, effect in controls.effects.items()]
    changes += [(controls.is_drawn, True), (controls.epoch, 4), (controls.seed, 3)]
    for control, value in changes:
        code = view.text
        control.value = value
        after = heard(view)
        assert view.text != code and not torch.equal(after, before), control.description
        assert torch.allclose(run(view.text, recording)[0].clip(-1, 1), after, atol=1e-4), control.description
        before = after
    controls.another.click()
    assert controls.epoch.value == 5 and not torch.equal(heard(view), before)


def test_strengths_that_mean_nothing_are_switched_off():
    controls = transforms(path).controls
    noise, gain = controls.effects["noise"], controls.effects["gain"]
    noise.is_on.value = True
    assert not noise.strength.disabled and gain.strength.disabled
    controls.is_drawn.value = True
    assert noise.strength.disabled


def test_sliders_go_as_far_as_training_draws():
    for name, effect in transforms(path).controls.effects.items():
        assert {effect.strength.min, effect.strength.max} == {EFFECTS[name].low, EFFECTS[name].high}


def test_specaugment_is_a_picture_and_changes_no_sound():
    view = transforms(path)
    before = heard(view)
    view.controls.specaugment.value = True
    assert "img" in view.masks.value and torch.equal(heard(view), before) and "specaugment" in view.code.value
    picture = view.masks.value
    view.controls.another.click()
    assert view.masks.value != picture
    view.controls.specaugment.value = False
    assert not view.masks.value


def test_silence_cannot_be_trimmed_and_that_is_said_in_a_sentence():
    view = transforms((np.zeros(16000, np.float32), 16000))
    view.controls.trim.value = view.controls.specaugment.value = True
    name = "as the encoder gets it"
    assert "silent" in view.notice.value and not view.players[name].value and not view.pictures[name].value
    view.controls.trim.value = False
    assert "silent" not in view.notice.value and view.players[name].value


def test_what_is_louder_than_full_scale_is_said():
    view = transforms((0.9 * np.sin(np.arange(16000) / 10), 16000))
    assert "full scale" not in view.notice.value
    view.controls.effects["gain"].is_on.value = True
    assert "full scale" in view.notice.value


def test_text_from_a_path_is_escaped(tmp_path):
    soundfile.write(tmp_path / "<b>&.wav", np.full(8000, 0.1), 16000)
    view = transforms(tmp_path / "<b>&.wav")
    assert "<b>" not in view.code.value + view.notice.value and "<b>&.wav" in view.text


def test_the_static_form_shows_both_pictures_and_the_code():
    form = transforms(path).static()
    assert form.count("<img") == 2 and "Compose((" in form
