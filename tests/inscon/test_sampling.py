"""The order of samples: every image once per epoch, the same for every world size; and who stands in for a bad one."""

import numpy as np
import pytest
from scipy import stats

from inscon.sampling import EpochOrder, permute, philox


@pytest.mark.parametrize(
    ("seed", "counter", "expected"),
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**64 - 1, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers_of_random123(seed, counter, expected):
    assert tuple(int(word) for word in philox(seed, counter)) == expected


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 97, 256, 1000, 12345])
@pytest.mark.parametrize("epoch", [0, 1, 199])
def test_permute_is_a_permutation(n, epoch):
    assert np.array_equal(np.sort(permute(np.arange(n), n, 42, epoch)), np.arange(n))


def test_every_image_once_per_epoch_and_the_remainder_dropped():
    order = EpochOrder(103, 20, seed=1)
    assert order.steps_per_epoch == 5
    for epoch in range(3):
        steps = range(epoch * 5, epoch * 5 + 5)
        assert {step // order.steps_per_epoch for step in steps} == {epoch}
        ids = np.concatenate([order.rank_batch(step, 0, 1) for step in steps])
        assert len(np.unique(ids)) == 100 and ids.min() >= 0 and ids.max() < 103
    dropped = [
        set(range(103)) - set(np.concatenate([order.rank_batch(e * 5 + i, 0, 1) for i in range(5)])) for e in range(3)
    ]
    assert len({frozenset(d) for d in dropped}) == 3


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_take_contiguous_slices_of_the_same_global_batch(world_size):
    order = EpochOrder(1000, 64, seed=3)
    for step in (0, 14, 15, 77):
        parts = [order.rank_batch(step, rank, world_size) for rank in range(world_size)]
        assert np.array_equal(np.concatenate(parts), order.rank_batch(step, 0, 1))
    with pytest.raises(ValueError, match="multiple of the 3 ranks. Found: 64"):
        order.rank_batch(0, 0, 3)


def test_orders_look_random():
    n, trials = 60, 3000
    table = np.stack([permute(np.arange(n), n, 9, epoch) for epoch in range(trials)])
    for position in (0, 1, 29, 59):
        assert stats.chisquare(np.bincount(table[:, position], minlength=n)).pvalue > 1e-4
    ascending = (np.diff(table, axis=1) == 1).mean()
    assert abs(ascending - 1 / n) < 0.003  # neighbors in the data set stay neighbors no more often than by chance
    big = permute(np.arange(1_281_167), 1_281_167, 0, 0)
    assert abs(stats.spearmanr(np.arange(len(big)), big).statistic) < 0.005
    halves = np.corrcoef(big[:-1], big[1:])[0, 1]
    assert abs(halves) < 0.005


def test_a_step_costs_no_memory_of_the_data_set():
    order = EpochOrder(300_000_000, 4096, seed=0)
    ids = order.rank_batch(order.steps_per_epoch * 7 + 12345, 0, 1)
    assert len(np.unique(ids)) == 4096 and ids.max() > 290_000_000


def test_a_data_set_smaller_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="at least one batch of 256 images. Found: 103; set --batch-size 100"):
        EpochOrder(103, 256, 0)


# -------------------------------------------------------------------------------------------------------- stand-ins


@pytest.mark.parametrize(("samples", "batch_size"), [(40, 20), (103, 20), (64, 8), (15, 5)])
def test_stand_ins_are_those_of_the_same_place_from_half_an_epoch_on(samples, batch_size):
    """Each of another batch of the epoch, shown as many steps away as is said, all other batches in turn."""
    order = EpochOrder(samples, batch_size, 7)
    steps = order.steps_per_epoch
    for step in range(steps, 2 * steps):  # of an epoch that isn't the first
        for place in range(batch_size):
            candidates = list(order.stand_ins(step, place))
            assert [order.rank_batch(step + away, 0, 1)[place] for _, away in candidates] == [i for i, _ in candidates]
            assert {(step + away) // order.steps_per_epoch for _, away in candidates} == {1}
            assert sorted(away + step for _, away in candidates) == [s for s in range(steps, 2 * steps) if s != step]
            assert candidates[0][1] in (steps // 2, steps // 2 - steps)


@pytest.mark.parametrize(("samples", "batch_size"), [(40, 20), (103, 20), (64, 8)])
def test_stand_ins_never_meet_in_a_batch(samples, batch_size):
    """However many samples are bad, adjacent ones too: no place takes a sample of the batch, or that of another place."""
    order = EpochOrder(samples, batch_size, 3)
    for step in range(order.steps_per_epoch):
        own = set(order.rank_batch(step, 0, 1).tolist())
        taken = [{other for other, _ in order.stand_ins(step, place)} for place in range(batch_size)]
        assert not own & set().union(*taken) and sum(map(len, taken)) == len(set().union(*taken))


def test_nobody_stands_in_where_an_epoch_is_one_batch():
    assert list(EpochOrder(20, 20, 0).stand_ins(5, 3)) == [] == list(EpochOrder(39, 20, 0).stand_ins(0, 0))
