"Convolutions as products: exact for each recording wherever it lies, and with statistics that survive an offset."

import pytest
import torch
from conftest import VARIANTS, make_model
from torch.nn import functional as F

from w2v2nb.architecture import build, complete
from w2v2nb.frontend import (
    convolve,
    fold_group_norm,
    frame_geometry,
    plan_strips,
    prepare_front_end,
    run_front_end,
    split_kernel,
    window_moments,
)
from w2v2nb.transforms import normalize


def front_end(variant):
    "Our weights and the library's model, the same values."
    library = make_model(variant)
    config = complete(library.config.to_dict())
    model = build(config)
    weights = {name: weight for name, weight in library.state_dict().items() if name != "masked_spec_embed"}
    model.load_state_dict(weights)
    return prepare_front_end(model, config, torch.float32), config, library


def run(weights, config, waveforms, **options):
    with torch.inference_mode():
        return torch.cat([*run_front_end(weights, config, waveforms, torch.float32, **options)])


def library_features(library, waveform):
    "The slow path: one recording alone through the library's convolutions and projection."
    with torch.no_grad():
        features = library.feature_extractor(waveform[None]).transpose(1, 2)
        hidden = library.feature_projection(features)
    return (hidden[0] if isinstance(hidden, tuple) else hidden)[0]


def error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("is_even", [False, True])
@pytest.mark.parametrize("max_slots", [2, 3, 17, 10_000])
@pytest.mark.parametrize("variant", VARIANTS)
def test_features_equal_the_slow_path_wherever_recordings_are_cut(variant, max_slots, is_even, recordings):
    weights, config, library = front_end(variant)
    waveforms = [normalize(x) for x in recordings if max_slots > 3 or len(x) < 20_000]
    packed = run(weights, config, waveforms, max_slots=max_slots, is_even=is_even)
    assert error(packed, torch.cat([library_features(library, x) for x in waveforms])) < 1e-5


@pytest.mark.parametrize("variant", ["wav2vec2", "wav2vec2-stable", "wavlm"])
@pytest.mark.parametrize("offset", [0.0, 1.0, 100.0])
def test_an_offset_costs_no_more_than_in_the_slow_path(variant, offset):
    "Samples far from zero, and a preprocessor that does not normalize."
    from w2v2nb.backbone import Backbone

    torch.manual_seed(0)
    weights, config, library = front_end(variant)
    waveform = torch.randn(8000) * 0.1 + offset
    backbone = Backbone(build(config), config, {"sampling_rate": 16000, "do_normalize": False})
    backbone.model.load_state_dict({k: v for k, v in library.state_dict().items() if k != "masked_spec_embed"})
    exact = library_features(library.double(), waveform.double())
    slow = error(library_features(library.float(), waveform), exact)
    with torch.inference_mode():
        (hidden,), _ = backbone(waveform[None], torch.tensor([8000]), [0])
    from w2v2nb.backbone import center

    ours = error(run(weights, config, [center(backbone, waveform)]), exact)
    assert ours <= max(1.5 * slow, 1e-6) and hidden.isfinite().all()


def test_moments_in_blocks_are_those_of_all_windows():
    torch.manual_seed(0)
    x = torch.randn(2, 5003)  # what follows the second recording's end is not zero
    for block in (1, 7, 1000, 10_000):
        mean, covariance = window_moments(x, [5003, 777], 10, 5, block)
        for i, n in enumerate([5003, 777]):
            windows = x[i, :n].double().unfold(0, 10, 5)
            assert torch.allclose(mean[i], windows.mean(0)) and torch.allclose(covariance[i], windows.T.cov(correction=0))


def test_group_norm_of_a_silent_recording_is_finite():
    weight, norm = torch.randn(8, 1, 10), torch.nn.GroupNorm(8, 8)
    folded, bias = fold_group_norm(*window_moments(torch.zeros(1, 16000), [16000], 10, 5), weight, norm)
    assert folded.isfinite().all() and bias.isfinite().all()


@pytest.mark.parametrize("kernel, stride", [(2, 2), (3, 2), (10, 5), (7, 3), (4, 1), (1, 1)])
@pytest.mark.parametrize("is_training", [False, True])
def test_convolve(kernel, stride, is_training):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(stride * 20, 6), torch.randn(5, 6, kernel, requires_grad=is_training), torch.randn(5)
    expected = F.conv1d(x.T[None], weight, bias, stride=stride)[0].T
    with torch.set_grad_enabled(is_training):
        y = convolve(x, split_kernel(weight, stride), bias, stride)[: len(expected)]
    assert torch.allclose(y, expected, atol=1e-5)
    if is_training:
        (ours,), (theirs,) = (torch.autograd.grad(v.square().sum(), weight) for v in (y, expected))
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_frames", [[1], [3, 2, 12], [500], [1] * 50, [7, 300, 1, 1, 299]])
@pytest.mark.parametrize("max_slots, n_extra", [(2, 1), (8, 1), (9, 3), (200, 1)])
@pytest.mark.parametrize("is_even", [False, True])
def test_strips_hold_every_frame_once_and_in_order(n_frames, max_slots, n_extra, is_even):
    if max_slots <= n_extra:
        return
    found = []
    for strip in plan_strips(n_frames, max_slots, n_extra, is_even):
        end = 0
        for piece in strip:
            assert piece.slot == end and piece.n_frames > 0 and piece.n_slots >= piece.n_frames + n_extra
            end = piece.slot + piece.n_slots
            found += [(piece.recording, piece.first + i) for i in range(piece.n_frames)]
        assert end <= max_slots
    assert found == [(i, k) for i, n in enumerate(n_frames) for k in range(n)]


def test_geometry_of_all_published_models():
    assert frame_geometry(complete({"model_type": "wav2vec2"})) == (400, 320)
