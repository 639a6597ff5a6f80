"""The order of samples: every image once per epoch, the same for every world size."""

import numpy as np
import pytest
from scipy import stats

from inscon import sampling
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
    assert abs(ascending - 1 / n) < 0.003  # neighbors in the data set stay neighbors no more often than by chance
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


# ------------------------------------------------------------------------------------------------------ in windows


def whole_epoch(order: EpochOrder, epoch: int) -> np.ndarray:
    """All samples in the order of an epoch, those that are left over behind the others."""
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    return np.concatenate([*(order.global_batch(step) for step in steps), order.left_over(epoch)])


@pytest.mark.parametrize("n", [41, 64, 65, 79, 503])
@pytest.mark.parametrize("window", [8, 17, 40, 64])
@pytest.mark.parametrize("batch_size", [7, 40])
def test_windows_show_every_sample_once_and_keep_blocks_together(n, window, batch_size, monkeypatch):
    monkeypatch.setattr(sampling, "BLOCK", 8)
    order, size = EpochOrder(n, batch_size, 3, window), window // 8 * 8
    epochs = [whole_epoch(order, epoch) for epoch in range(4)]
    for epoch, shown in enumerate(epochs):
        assert np.array_equal(np.sort(shown), np.arange(n))
        assert np.array_equal(order.positions(shown, epoch), np.arange(n))
        # A window is whole blocks; of the block that is short, no more than it has.
        missing, start = -n % 8, 0
        while start < n:
            blocks, counts = np.unique(shown[start : start + size] // 8, return_counts=True)
            if (n - 1) // 8 in blocks and start + size <= n + missing:
                blocks, counts = np.unique(shown[start : start + size - missing] // 8, return_counts=True)
            assert all(count == min(8, n - 8 * block) for block, count in zip(blocks.tolist(), counts.tolist()))
            start += int(counts.sum())
    assert len({shown.tobytes() for shown in epochs}) == 4


def test_windows_mix_what_is_in_them():
    """Within a window every place is as likely as another, and blocks meet other blocks in every epoch."""
    order = EpochOrder(64 * 256, 256, 5, 8 * 256)
    first = np.stack([order.global_batch(epoch * 64) for epoch in range(400)])
    assert len(np.unique(first // 256)) == 64  # every block comes first some time
    offsets = np.bincount((first % 256).ravel(), minlength=256)
    assert stats.chisquare(offsets).pvalue > 1e-4
    blocks = np.array([len(np.unique(batch // 256)) for batch in first])
    assert (blocks == 8).all()
    company = np.array([(batch[0] // 256 == batch[1:] // 256).mean() for batch in first])
    assert abs(company.mean() - 1 / 8) < 0.01  # an eighth of a batch is of one's own block


def test_the_log_says_how_well_windows_shuffle():
    """Its probability against a count over whole epochs."""
    order = EpochOrder(4096, 64, 0, 1024)
    said = order.describe()
    assert "windows of 1024 samples, 4 blocks of 256 neighbors" in said and "6.16% instead of 1.54%" in said
    together = []
    for epoch in range(30):
        step_of = order.positions(np.arange(256), epoch) // 64
        counts = np.bincount(step_of)
        together.append((counts * (counts - 1)).sum() / (256 * 255))
    assert abs(np.mean(together) - 0.0616) < 0.002
    assert EpochOrder(4096, 64, 0).describe() == "" and EpochOrder(4096, 64, 0, 4096).describe() == ""


@pytest.mark.parametrize("n", [41, 64, 200, 1001])
@pytest.mark.parametrize("window", [8, 24, 40])
@pytest.mark.parametrize("batch_size", [3, 40])
def test_what_is_read_ahead_is_what_comes_next_once(n, window, batch_size, monkeypatch):
    monkeypatch.setattr(sampling, "BLOCK", 8)
    order = EpochOrder(n, batch_size, 3, window)
    steps = order.steps_per_epoch
    read = [i for run in order.runs(0, starting=True) for i in run]
    shown_before = 0
    for step in range(3 * steps):
        needed = set(order.global_batch(step).tolist())
        so_far = read[-2 * n :]
        assert needed <= set(so_far), "a sample was needed before it was read ahead"
        read += [i for run in order.runs(step + 1) for i in run] if step + 1 < 3 * steps else []
        shown_before += len(needed)
    per_epoch = [i for step in range(steps, 2 * steps) for run in order.runs(step) for i in run]
    assert len(per_epoch) >= n - window - 8 and len(read) <= 4 * n + window


def test_no_windows_nothing_read_ahead():
    assert EpochOrder(500, 10, 0).runs(3) == [] == EpochOrder(500, 10, 0, 500).runs(0, starting=True)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_windows_are_elastic(world_size):
    order = EpochOrder(5000, 64, 3, 1024)
    for step in (0, 15, 16, 77, 78, 500):
        parts = [order.rank_batch(step, rank, world_size) for rank in range(world_size)]
        assert np.array_equal(np.concatenate(parts), order.global_batch(step))


def test_windows_cost_no_memory_of_the_data_set():
    order = EpochOrder(300_000_000, 4096, 0, 65536)
    ids = order.global_batch(order.steps_per_epoch * 7 + 12345)
    assert len(np.unique(ids)) == 4096 and len(np.unique(ids // 256)) == 256


def test_a_window_of_less_than_a_block_is_refused():
    with pytest.raises(
        ValueError, match="shuffle_window must be at least 256 samples.*Found: 255; set --shuffle-window 65536"
    ):
        EpochOrder(1000, 100, 0, 255)
