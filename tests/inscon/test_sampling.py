"""The order of samples: every image once per epoch, the same for every world size."""

import numpy as np
import pytest
from scipy import stats

from inscon.sampling import EpochOrder, permute, unpermute


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 97, 256, 1000, 12345])
@pytest.mark.parametrize("epoch", [0, 1, 199])
def test_permute_is_a_permutation(n, epoch):
    assert np.array_equal(np.sort(permute(np.arange(n), n, 42, epoch)), np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 97, 256, 12345])
def test_unpermute_is_the_inverse(n):
    for epoch in (0, 7):
        assert np.array_equal(unpermute(permute(np.arange(n), n, 42, epoch), n, 42, epoch), np.arange(n))


def test_positions_and_what_is_left_over():
    order = EpochOrder(103, 20, seed=1)
    for step in (0, 4, 13):
        within = step % 5 * 20 + np.arange(20)
        assert np.array_equal(order.positions(order.global_batch(step), step // 5), within)
    shown = np.concatenate([order.global_batch(step) for step in range(5, 10)])
    assert order.whole == 100 and set(order.left_over(1)) == set(range(103)) - set(shown)
    assert np.array_equal(order.positions(order.left_over(1), 1), [100, 101, 102])


def test_every_image_once_per_epoch_and_the_remainder_dropped():
    order = EpochOrder(103, 20, seed=1)
    assert order.steps_per_epoch == 5
    for epoch in range(3):
        steps = range(epoch * 5, epoch * 5 + 5)
        assert {order.epoch_of(step) for step in steps} == {epoch}
        ids = np.concatenate([order.global_batch(step) for step in steps])
        assert len(np.unique(ids)) == 100 and ids.min() >= 0 and ids.max() < 103
    dropped = [
        set(range(103)) - set(np.concatenate([order.global_batch(e * 5 + i) for i in range(5)])) for e in range(3)
    ]
    assert len({frozenset(d) for d in dropped}) == 3


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_take_contiguous_slices_of_the_same_global_batch(world_size):
    order = EpochOrder(1000, 64, seed=3)
    for step in (0, 14, 15, 77):
        parts = [order.rank_batch(step, rank, world_size) for rank in range(world_size)]
        assert np.array_equal(np.concatenate(parts), order.global_batch(step))
    with pytest.raises(ValueError, match="multiple of the 3 ranks. Found: 64"):
        order.rank_batch(0, 0, 3)


def test_orders_look_random():
    n, trials = 60, 3000
    table = np.stack([permute(np.arange(n), n, 9, epoch) for epoch in range(trials)])
    for position in (0, 1, 29, 59):
        assert stats.chisquare(np.bincount(table[:, position], minlength=n)).pvalue > 1e-4
    ascending = (np.diff(table, axis=1) == 1).mean()
    assert abs(ascending - 1 / n) < 0.003  # neighbours in the data set stay neighbours no more often than by chance
    big = permute(np.arange(1_281_167), 1_281_167, 0, 0)
    assert abs(stats.spearmanr(np.arange(len(big)), big).statistic) < 0.005
    halves = np.corrcoef(big[:-1], big[1:])[0, 1]
    assert abs(halves) < 0.005


def test_a_step_costs_no_memory_of_the_data_set():
    order = EpochOrder(300_000_000, 4096, seed=0)
    ids = order.global_batch(order.steps_per_epoch * 7 + 12345)
    assert len(np.unique(ids)) == 4096 and ids.max() > 290_000_000


def test_a_data_set_smaller_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="at least one batch of 256 images. Found: 103; set --batch-size 100"):
        EpochOrder(103, 256, 0)
