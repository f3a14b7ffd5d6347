"""Pooling windows of a recording: where they lie, which frames they hold, and pooling in pieces."""

import numpy as np
import pytest
import torch

from w2v2nb.encoder import POOLINGS
from w2v2nb.pooling import cut_windows, pool_pieces, pool_windows

SIZES = dict(min_frames=400, stride=320)


@pytest.mark.parametrize("n_samples", [400, 8000, 16_000, 16_001, 16_320, 47_999])
@pytest.mark.parametrize(("window", "hop"), [(8000, 8000), (8000, 4000), (320, 320), (3200, 5000), (8000, 16), (100_000, 100)])
def test_windows_cover_the_recording_and_hold_the_frames_centered_in_them(n_samples, window, hop):
    windows, frames = cut_windows(n_samples, window, hop, **SIZES)
    n_frames = (n_samples - 400) // 320 + 1
    centers = np.arange(n_frames) * 320 + 200
    assert windows[:, 0].tolist() == [k * hop for k in range(len(windows))]
    assert windows[:, 1].tolist() == [min(k * hop + window, n_samples) for k in range(len(windows))]
    # the end is reached, unless it lies in a gap between windows, and not by the window before
    assert windows[-1, 1] == n_samples or windows[-1, 0] + hop >= n_samples
    assert len(windows) == 1 or windows[-2, 1] < n_samples
    for (start, end), (first, last) in zip(windows, frames, strict=True):
        inside = np.flatnonzero((centers >= start) & (centers < end))
        expected = (inside[0], inside[-1] + 1) if len(inside) else (n_frames - 1, n_frames)
        assert (first, last) == expected


def test_no_window_is_one_with_all_frames():
    windows, frames = cut_windows(16_000, None, None, **SIZES)
    assert windows.tolist() == [[0, 16_000]] and frames.tolist() == [[0, 49]]


BY_HAND = {
    "mean": lambda x: x.mean(0),
    "sum": lambda x: x.sum(0),
    "max": lambda x: x.amax(0),
    "mean+std": lambda x: torch.cat([x.mean(0), x.std(0, unbiased=False).clamp(min=1e-6)]),
}


@pytest.mark.parametrize("mode", POOLINGS)
def test_pooling_many_windows_is_pooling_each(mode):
    hidden, (_, frames) = torch.randn(99, 4), cut_windows(32_000, 4000, 500, **SIZES)
    each = [BY_HAND[mode](hidden[a:b]) for a, b in frames]
    for max_frames in (1, 100, 2**14):
        torch.testing.assert_close(pool_windows(hidden, frames, mode, max_frames), torch.stack(each))


@pytest.mark.parametrize(("window", "hop"), [(None, None), (8000, 8000), (8000, 1000), (640, 3000), (320, 320)])
@pytest.mark.parametrize("n_piece", [1, 7, 48, 49, 1000])
@pytest.mark.parametrize("poolings", [["max", "mean", "sum"], ["mean+std"]])
def test_pieces_give_what_the_whole_gives(poolings, window, hop, n_piece):
    n_samples = 48_123
    _, frames = cut_windows(n_samples, window, hop, **SIZES)
    hidden = torch.randn(2, int(frames.max()), 5)
    pieces = [(i, list(hidden[:, i : i + n_piece])) for i in range(0, hidden.shape[1], n_piece)]
    ended = [torch.stack(some) for some in pool_pieces(pieces, frames, poolings)]
    expected = [pool_windows(h, frames, pooling) for h in hidden for pooling in poolings]
    torch.testing.assert_close(torch.cat(ended, 1), torch.stack(expected), rtol=1e-5, atol=1e-5)
