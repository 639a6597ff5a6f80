"""Who stands in for a sample that cannot be used: one that its epoch does not show otherwise.

An epoch is whole batches; what is left over, less than a batch, is shown to nobody and serves as spares. Who stands in for
whom is a pure function of the step and of the set of bad samples met so far, so a resumed run makes the same choices once
it is told that set. Positions of a batch are dealt into lanes of neighbors, and every lane has spares of its own, so
ranks, which hold whole lanes, need not ask each other and never choose the same sample.
"""

import math

import numpy as np

from data_prep.index import ShardError
from inscon.sampling import EpochOrder

LANES = 8
"""A multiple of these, and of the ranks: so with up to 8 ranks, their number changes no choice."""


class Spares:
    """The stand-ins of one data set.

    Args:
        order: of the samples.
        world_size: ranks that share a batch.
        window: steps during which a key stays in the queue: a sample must not be seen again so soon. Where the queue
            holds an epoch or more every sample is, and the window counts for nothing.
    """

    def __init__(self, order: EpochOrder, world_size: int, window: int):
        self._order, self._window = order, window if window < order.steps_per_epoch else 0
        left_over = order.num_samples - order.whole
        lanes = math.lcm(LANES, world_size)
        # Few spares are better kept together.
        self._lanes = lanes if left_over >= LANES * lanes and order.batch_size % lanes == 0 else world_size

    def stand_ins(self, step: int, places: range, bad: set[int]) -> dict[int, int]:
        """{place: sample id} for those of `places`, a rank's share of the global batch of `step`, whose sample is `bad`.

        Raises ShardError where a lane has no spare left.
        """
        order = self._order
        epoch, within = divmod(step, order.steps_per_epoch)
        known = np.fromiter(sorted(bad), np.int64, len(bad))
        positions = np.sort(order.positions(known, epoch))
        first = within * order.batch_size
        here = {int(p) for p in positions if p - first in places}
        found = {}
        for lane in sorted({self._lane(position) for position in here}):
            so_far = [int(p) for p in positions if p <= max(here) and self._lane(p) == lane]
            chosen = self._choose(epoch, lane, so_far, bad)
            found |= {position - first: chosen[position] for position in here & chosen.keys()}
        return found

    def _lane(self, position: int) -> int:
        return int(position % self._order.batch_size) * self._lanes // self._order.batch_size

    def _choose(self, epoch: int, lane: int, positions: list[int], bad: set[int]) -> dict[int, int]:
        """A spare for each position, first come, first served."""
        all_spares = self._order.left_over(epoch)
        spares, chosen = [int(sample) for sample in all_spares[lane :: self._lanes] if int(sample) not in bad], {}
        for position in positions:
            step = epoch * self._order.steps_per_epoch + position // self._order.batch_size
            fit = next((sample for sample in spares if not self._seen_nearby(sample, step)), None)
            if fit is None:
                raise ShardError(
                    f"no sample is left to stand in at step {step}: {len(bad)} bad samples are known, and of the {len(all_spares)} "
                    f"samples that epoch {epoch} leaves over, those for this part of the batch are used up. Pack the set again "
                    "without the bad ones, or set another --batch-size, which leaves others over"
                )
            spares.remove(fit)
            chosen[position] = fit
        return chosen

    def _seen_nearby(self, sample: int, step: int) -> bool:
        """Whether the epoch before or after shows `sample` within the queue's window of `step`."""
        epoch, within = divmod(step, self._order.steps_per_epoch)
        for other in (epoch - 1, epoch + 1):
            if other < 0 or (within if other < epoch else self._order.steps_per_epoch - within) > self._window:
                continue
            position = int(self._order.positions(np.array([sample]), other)[0])
            if position >= self._order.whole:  # a spare there too, and perhaps in use
                if other < epoch:
                    return True
                continue
            shown = other * self._order.steps_per_epoch + position // self._order.batch_size
            if abs(shown - step) <= self._window:
                return True
        return False
