"""Random numbers of a recording: the same wherever it is, another one each time and for each recording."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from w2v2nb.chance import Chance, make_seed


def test_a_seed_is_the_same_in_another_process_and_another_one_for_other_parts():
    code = "from w2v2nb.chance import make_seed; print(make_seed(3, 'uid', 7))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(said) == make_seed(3, "uid", 7)
    parts = [(3, "uid", 7), (3, "uid", 8), (4, "uid", 7), (3, "uie", 7), (3, "uid"), ("3uid", 7), (3, "uid7"), ()]
    seeds = [make_seed(*some) for some in parts]
    assert len({*seeds}) == len(parts) and all(0 <= seed < 2**63 for seed in seeds)
    torch.manual_seed(max(seeds)), np.random.default_rng(max(seeds))


@pytest.mark.parametrize("counts", [None, [3, 1, 2]])
def test_dropout_does_not_depend_on_the_rest_of_the_batch(counts):
    n_rows = sum(counts or [1, 1, 1])
    x, seeds = torch.rand(n_rows, 50) + 1, [5, 6, 7]
    whole = Chance(seeds).drop(x, 0.4, counts)
    parts = zip(seeds, x.split(counts or [1, 1, 1]), counts or [1, 1, 1], strict=True)
    alone = [Chance([seed]).drop(rows, 0.4, [n] if counts else None) for seed, rows, n in parts]
    assert torch.equal(whole, torch.cat(alone))
    assert not torch.equal(whole[0] == 0, whole[-1] == 0)


def test_dropout_drops_its_share_and_keeps_the_mean():
    x = torch.ones(40, 1000)
    dropped = Chance(list(range(40))).drop(x, 0.25)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(dropped[dropped != 0].unique(), torch.tensor([1 / 0.75])) and dropped.mean().item() == pytest.approx(
        1, abs=0.02
    )
    assert Chance([1]).drop(x[:1], 0) is not None and torch.equal(Chance([1]).drop(x[:1], 0), x[:1])


def test_each_draw_is_new_and_the_global_state_is_left_alone():
    before, chance, x = torch.get_rng_state(), Chance([1, 2]), torch.ones(2, 100)
    first, second = chance.drop(x, 0.5), chance.drop(x, 0.5)
    assert not torch.equal(first, second) and torch.equal(torch.get_rng_state(), before)
    numbers = [rng.random() for _ in range(2) for rng in chance.numbers()]
    assert len({*numbers}) == 4
    assert [rng.random() for rng in Chance([1, 2]).numbers()] == [rng.random() for rng in Chance([1, 2]).numbers()]


def test_gradients_flow_through_what_is_kept():
    x = torch.ones(1, 100, requires_grad=True)
    dropped = Chance([1]).drop(x, 0.5)
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped.detach())


def test_another_number_of_recordings_is_an_error():
    with pytest.raises(RuntimeError, match="split_sizes"):
        Chance([1, 2]).drop(torch.ones(3, 4), 0.5)
