"""Stand-ins against the whole order of an epoch, written out: unseen, never twice, never soon before or after."""

import numpy as np
import pytest

from data_prep.index import ShardError
from inscon.sampling import EpochOrder
from pipelines.spares import Spares


def all_stand_ins(spares, order, bad, world_size=1, epochs=(0,)):
    """{(step, place): sample id} over whole epochs, asked rank by rank."""
    share = order.batch_size // world_size
    found = {}
    for epoch in epochs:
        for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
            for rank in range(world_size):
                places = range(rank * share, (rank + 1) * share)
                made = spares.stand_ins(step, places, bad)
                assert set(made) <= set(places)
                found |= {(step, place): sample for place, sample in made.items()}
    return found


@pytest.mark.parametrize("seed", range(5))
def test_stand_ins_are_unseen_this_epoch_and_all_different(seed):
    order = EpochOrder(1000 + 140, 200, seed)
    bad = set(np.random.default_rng(seed).choice(1140, 12, replace=False).tolist())
    found = all_stand_ins(Spares(order, 1, 0), order, bad, epochs=(0, 3))
    for epoch in (0, 3):
        steps = range(epoch * 5, epoch * 5 + 5)
        shown = np.stack([order.global_batch(step) for step in steps])
        here = {key: sample for key, sample in found.items() if key[0] in steps}
        wanted = {(steps[s], p) for s, p in zip(*np.nonzero(np.isin(shown, list(bad))))}
        assert set(here) == wanted and len(wanted) >= 5
        chosen = list(here.values())
        assert len(set(chosen)) == len(chosen)
        assert not set(chosen) & set(shown.ravel().tolist()) and not set(chosen) & bad


def test_what_is_learnt_later_changes_nothing_before():
    """As in a run: each step knows the bad samples met up to it. A resumed run knows more, and must choose alike."""
    order = EpochOrder(1140, 200, 3)
    spares, everything = Spares(order, 1, 0), {7, 99, 500, 1001, 640, 641, 320}
    whole = all_stand_ins(spares, order, everything)
    met: set[int] = set()
    for step in range(order.steps_per_epoch):
        # Met in this step: those shown, and bad ones among the spares that were tried for them.
        met |= everything & set(order.global_batch(step).tolist())
        while (trial := set(spares.stand_ins(step, range(200), met).values()) & everything) - met:
            met |= trial
        now = spares.stand_ins(step, range(200), met)
        assert now == {place: sample for (s, place), sample in whole.items() if s == step}


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_number_of_ranks_changes_nothing(world_size):
    order = EpochOrder(6 * 256 + 200, 256, 1)
    bad = set(range(0, 1700, 170))
    one = all_stand_ins(Spares(order, 1, 0), order, bad)
    many = all_stand_ins(Spares(order, world_size, 0), order, bad, world_size)
    assert one == many and len(one) >= 8


@pytest.mark.parametrize("window", [1, 3, 6])
def test_no_stand_in_is_shown_again_within_the_queues_window(window):
    order = EpochOrder(10 * 64 + 60, 64, 9)
    epochs = range(4)
    shown = {
        (step, int(sample))
        for step in range(40)
        for sample in order.global_batch(step)
    }  # fmt: skip
    steps_of = {}
    for step, sample in shown:
        steps_of.setdefault(sample, []).append(step)
    checked = 0
    for bad in ({5, 77, 300}, {650, 41, 8}, {111, 222, 333}):
        found = all_stand_ins(Spares(order, 1, window), order, bad, epochs=epochs)
        for (step, _), sample in found.items():
            distance = min(abs(step - other) for other in steps_of.get(sample, [10**9]))
            assert distance > window
            checked += 1
        in_order = sorted((step, sample) for (step, _), sample in found.items())
        for i, (step, sample) in enumerate(in_order):
            assert all(other != sample or step - s > window for s, other in in_order[:i])
    assert checked > 20
    # Without the rule some would be: the test can fail.
    careless = all_stand_ins(Spares(order, 1, 0), order, {5, 77, 300, 650, 41, 8, 111, 222, 333}, epochs=epochs)
    near = [
        min(abs(s - other) for other in steps_of.get(sample, [99])) <= window for (s, _), sample in careless.items()
    ]
    assert window < 3 or any(near)


def test_when_nobody_is_left_it_says_so():
    order = EpochOrder(22, 10, 0)
    left_over = order.left_over(0)
    assert len(left_over) == 2
    bad = set(order.global_batch(0)[:3].tolist())
    with pytest.raises(
        ShardError, match=r"no sample is left to stand in at step 0: 3 bad samples.* the 2 samples.*--batch-size"
    ):
        Spares(order, 1, 0).stand_ins(0, range(10), bad)
    exact = EpochOrder(20, 10, 0)
    with pytest.raises(ShardError, match="the 0 samples that epoch 0 leaves over"):
        Spares(exact, 1, 0).stand_ins(0, range(10), {int(exact.global_batch(0)[4])})


def test_other_ranks_shortage_is_not_ours():
    order = EpochOrder(4 * 16 + 8, 16, 2)
    spares = Spares(order, 2, 0)
    theirs = set(order.global_batch(0)[8:].tolist())
    assert spares.stand_ins(0, range(8), theirs) == {}
    with pytest.raises(ShardError):
        spares.stand_ins(0, range(8, 16), theirs)
