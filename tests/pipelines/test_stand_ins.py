"""Who stands in for a bad sample: the rule against a slow obvious version, then every engine, over ranks and from the middle."""

import numpy as np
import pytest
import torch

from data_prep.index import ShardError
from inscon.plan import plan_views
from inscon.sampling import EpochOrder
from pipelines.feed import Feed
from tests.pipelines.conftest import (
    NO_JPEG,
    PAIR,
    SIZES,
    as_jpeg,
    assert_same,
    batches,
    beton_beside,
    damage,
    data_for,
    draw_picture,
    every,
    ids_of,
    opened,
    write_shards,
)


def slow(order: EpochOrder, step: int, bad: set[int]) -> list[int]:
    """The batch of a step, out of the epoch as a table with a row for each batch: in place of a bad sample stands the first good
    one of its own column, searched from half an epoch further down on, and from the top again."""
    epoch, row = divmod(step, order.steps_per_epoch)
    first = epoch * order.steps_per_epoch
    table = [order.rank_batch(first + r, 0, 1).tolist() for r in range(order.steps_per_epoch)]
    half = max(len(table) // 2, 1)
    shown = []
    for column, sample in enumerate(table[row]):
        others = [table[(row + half + further) % len(table)][column] for further in range(len(table))]
        shown.append(next(candidate for candidate in [sample, *others] if candidate not in bad))
    return shown


class Sizes:
    """As much of an index as a feed asks for."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def sizes(self, sample_ids) -> np.ndarray:
        return np.stack([np.asarray(sample_ids) % 70 + 30, np.asarray(sample_ids) % 50 + 40], 1)

    def describe(self, sample_id: int) -> str:
        return f"sample {sample_id}"


def feed_over(count: int, bad=(), **settings) -> Feed:
    feed = Feed(Sizes(count), PAIR, **{"batch_size": 4, "seed": 0, "substitute": True, **settings})
    for sample in bad:
        feed.reject(sample, ShardError("it is bad"))
    return feed


def in_epoch(count: int, *places: tuple[int, int], batch_size: int = 4) -> set[int]:
    """Samples by (row, column) of the first epoch's table."""
    order = EpochOrder(count, batch_size, 0)
    return {int(order.rank_batch(row, 0, 1)[column]) for row, column in places}


BAD = {
    "one": (30, 4, in_epoch(30, (2, 1))),
    "neighbors in a column": (30, 4, in_epoch(30, (0, 1), (1, 1), (2, 1))),
    "one and its stand-ins": (30, 4, in_epoch(30, (0, 2), (3, 2), (4, 2), (5, 2))),
    "several in a batch": (30, 4, in_epoch(30, (3, 0), (3, 1), (3, 3))),
    "a whole batch": (30, 4, in_epoch(30, (3, 0), (3, 1), (3, 2), (3, 3))),
    "an epoch of two batches": (10, 4, in_epoch(10, (0, 0), (1, 2), (0, 3))),
    "an epoch of three batches": (12, 4, in_epoch(12, (0, 0), (1, 0), (1, 2))),
    "a tenth of many": (1000, 8, set(range(0, 1000, 10))),
    "one that an epoch leaves over": (10, 4, {int(i) for i in set(range(10)) - in_epoch(10, *np.ndindex(2, 4))}),
}


@pytest.mark.parametrize("case", BAD)
def test_the_rule_is_the_obvious_one(case):
    """Of all samples known to be bad, and of those met on the way, in any order and from any step: the same batches."""
    count, batch_size, bad = BAD[case]
    knowing = feed_over(count, bad, batch_size=batch_size)
    halves = [feed_over(count, bad, batch_size=batch_size, rank=rank, world_size=2) for rank in range(2)]
    order, spe = knowing.order, knowing.steps_per_epoch
    for step in [*range(min(spe, 12)), spe + 1]:
        shown, work = slow(order, step, bad), knowing.work(step)
        assert work.sample_ids.tolist() == shown and len(set(shown)) == batch_size and not bad & set(shown)
        assert work.substituted == len(bad & set(order.rank_batch(step, 0, 1).tolist()))
        wanted = plan_views(
            knowing.seed, step // order.steps_per_epoch, np.array(shown), knowing.index.sizes(shown), knowing.views
        )
        np.testing.assert_array_equal(work.plan.views["key"].crop_box, wanted.views["key"].crop_box)
        np.testing.assert_array_equal(np.concatenate([feed.work(step).sample_ids for feed in halves]), shown)
        learning = feed_over(count, batch_size=batch_size)
        while met := bad & set(learning.work(step).sample_ids.tolist()):
            learning.reject(met.pop(), ShardError("it is bad"))
        assert learning.work(step).sample_ids.tolist() == shown


@pytest.mark.parametrize(("count", "rows"), [(7, 1), (9, 2), (14, 3)])
def test_where_nobody_is_left_a_sentence_says_so(count, rows):
    """A column of nothing but bad samples, at one batch per epoch every bad one."""
    feed = feed_over(count, in_epoch(count, *[(row, 2) for row in range(rows)]))
    with pytest.raises(
        ShardError, match=r"no sample is left to stand in for sample \d+: pack the set again .*--batch-size"
    ):
        feed.work(0)


def test_without_substitution_a_bad_sample_is_an_error():
    with pytest.raises(ShardError, match="it is bad"):
        feed_over(30, [4], substitute=False)


@pytest.mark.parametrize(("step", "away", "memory", "told"), [
    (0, 3, 0, False), (0, 3, 2, False), (0, 3, 3, True), (5, 4, 3, False), (5, 4, 4, True),
])  # fmt: skip
def test_a_stand_in_whose_key_is_still_queued_is_told(step, away, memory, told, caplog):
    """Of seven batches, the first takes one that comes three steps later, the sixth one that came four steps before."""
    feed = feed_over(30, in_epoch(30, (step, 1)), memory=memory)
    feed.work(step)
    assert (f"stand-in of step {step} is seen again {away} steps away, while its key is queued" in caplog.text) == told


# ------------------------------------------------------------------------------------------------------------- engines

MET = {3: "changed", 5: "cannot be decoded", 13: "decodes to", 15: "cannot be decoded"}
"""Bad samples: of five batches per epoch two lie in the first one, and of three of them the first stand-in is bad or a neighbor."""


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    half = as_jpeg(draw_picture(15, *SIZES[15]))
    folder = write_shards(
        tmp_path_factory.mktemp("damaged") / "shards",
        jpegs={5: NO_JPEG, 15: half[: len(half) // 2]},
        sizes={13: (900, 900)},
    )
    for data in (folder, beton_beside(folder)):
        damage(data, 3)
    return folder


SETTINGS = {"substitute": True, "batch_size": 4}


@pytest.fixture(scope="module")
def by_pil(damaged):
    return batches("reference", damaged, 8, **SETTINGS)


@every
def test_engines_choose_alike_name_each_once_and_count(name, damaged, by_pil, caplog):
    order = EpochOrder(20, 4, 0)
    with opened(name, damaged, 8, **SETTINGS) as pipeline:
        made = list(pipeline)
        figures = pipeline.read()
    assert ids_of(made) == [slow(order, step, set(MET)) for step in range(8)]
    for one, other in zip(made, by_pil, strict=True):
        assert_same(one, other, by_pil=True)
    assert figures["loader_substituted"] == sum(
        len(set(MET) & set(order.rank_batch(s, 0, 1).tolist())) for s in range(8)
    )
    for sample, fault in MET.items():
        [said] = [m for r in caplog.records if f"sample {sample} (" in (m := r.getMessage())]
        assert fault in said and said.endswith("Another sample stands in for it.") and "\n" not in said


@every
@pytest.mark.parametrize("start_step", [3, 6])
def test_who_begins_in_the_middle_chooses_alike(name, start_step, damaged, by_pil):
    """Nothing is known of what was met before; nor by the reference's workers, each a process of its own."""
    loader = {"threads": 2 if start_step == 3 else 0} if name == "reference" else {}
    rest = batches(name, damaged, 8, start_step=start_step, loader=loader, **SETTINGS)
    for one, other in zip(rest, by_pil[start_step:], strict=True):
        assert_same(one, other, by_pil=True)


@every
def test_ranks_choose_alike_though_each_meets_others(name, damaged, by_pil):
    settings = {**SETTINGS, "mosaics": None, "world_size": 2}
    left, right = (batches(name, damaged, 6, rank=rank, **settings) for rank in range(2))
    for one, other, wanted in zip(left, right, by_pil):
        assert torch.equal(torch.cat([one.sample_ids, other.sample_ids]), wanted.sample_ids)
        boxes = torch.cat([batch.views["key"].crop_box for batch in (one, other)])
        assert torch.equal(boxes, wanted.views["key"].crop_box)


@every
def test_a_sample_that_goes_bad_during_the_run_is_replaced_from_then_on(name, make_shards):
    """A file cut short: 17 is the last sample of its shard, in the .beton two others follow."""
    folder, gone = make_shards(), {17, 18, 19} if name == "ffcv" else {17}
    with opened(name, folder, 30, **SETTINGS) as pipeline:
        made = iter(pipeline)
        for _ in range(5):  # until every shard is open
            next(made)
        damage(data_for(name, folder), 17, "cut")
        rest = ids_of(made)
        assert pipeline.read()["loader_substituted"] > 0
    late = range(12, 30)  # made after the cut, whatever was made ahead
    assert rest[12 - 5 :] == [slow(EpochOrder(20, 4, 0), step, gone) for step in late]


@every
def test_nobody_left_is_a_sentence_from_every_engine(name, make_shards):
    folder = make_shards()
    for sample in range(20):
        damage(data_for(name, folder), sample)
    with pytest.raises(ValueError, match=r"no sample is left to stand in for sample \d+ \(a/picture_\d+.jpg\) in "):
        batches(name, folder, 4, **SETTINGS)
