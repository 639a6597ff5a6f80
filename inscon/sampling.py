"""Which images a rank sees at a step: a pure function of (seed, step), elastic and resumable.

The order of an epoch is a pseudo-random permutation that is evaluated where it is needed instead of being stored: a
Feistel network over a x b >= n with modular addition, walked along its cycles until it lands below n (Black and
Rogaway, "Ciphers with arbitrary finite domains", 2002). So 300 million samples cost no memory and a step in the middle
of an epoch costs what any step costs.
"""

import functools
import math
from collections.abc import Iterator

import numpy as np

_ROUNDS = 8


class EpochOrder:
    """Every sample exactly once per epoch, in an order of its own; the remainder of the last batch is dropped.

    Args:
        num_samples: size of the data set.
        batch_size: images per step over all ranks.
        seed: 0 .. 2**64-1.

    Raises ValueError if there is not one whole batch.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int):
        if num_samples < batch_size:
            raise ValueError(
                f"the data set must hold at least one batch of {batch_size} images. Found: {num_samples}; "
                f"set --batch-size {max(num_samples // 4, 1) * 4} or add pictures"
            )
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.steps_per_epoch = num_samples // batch_size

    def rank_batch(self, step: int, rank: int, world_size: int) -> np.ndarray:
        """[batch_size / world_size] sample ids: a rank's contiguous slice of the global batch of a step."""
        share, remainder = divmod(self.batch_size, world_size)
        if remainder:
            raise ValueError(f"batch_size must be a multiple of the {world_size} ranks. Found: {self.batch_size}")
        epoch, within = divmod(step, self.steps_per_epoch)
        positions = within * self.batch_size + np.arange(rank * share, (rank + 1) * share)
        return permute(positions, self.num_samples, self.seed, epoch)

    def stand_ins(self, step: int, place: int) -> Iterator[tuple[int, int]]:
        """(sample id, steps from `step` to where its epoch shows it) of who may stand in, in order, for the sample at `place` of
        the global batch of `step`: those at the same place of the batches from half an epoch later on. So no two places of a
        batch ever have the same stand-in, and none is in the batch already."""
        epoch, within = divmod(step, self.steps_per_epoch)
        for further in range(self.steps_per_epoch):
            other = (within + max(self.steps_per_epoch // 2, 1) + further) % self.steps_per_epoch
            if other != within:
                position = np.array([other * self.batch_size + place])
                yield int(permute(position, self.num_samples, self.seed, epoch)[0]), other - within


def permute(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where a pseudo-random permutation of 0..n-1, chosen by (seed, epoch), sends `positions` [any], int64."""
    keys, side = _keys(seed, epoch), math.isqrt(n - 1) + 1 if n > 1 else 1
    a, b = np.uint64(side), np.uint64(-(-n // side))
    result = np.array(positions, np.int64)
    walking = np.ones(result.shape, bool)
    while walking.any():
        left, right = np.divmod(result[walking].astype(np.uint64), b)
        for i in range(0, _ROUNDS, 2):
            left = (left + _mix(right ^ keys[i]) % a) % a
            right = (right + _mix(left ^ keys[i + 1]) % b) % b
        result[walking] = left * b + right
        walking = result >= n
    return result


@functools.lru_cache(maxsize=2)
def _keys(seed: int, epoch: int) -> np.ndarray:
    # From the plan's generator, at a counter that no view uses: its purpose word is all ones.
    full = np.full(_ROUNDS, 0xFFFFFFFF)
    high, low, _, _ = philox(seed, (np.arange(_ROUNDS), full, np.full(_ROUNDS, epoch), full))
    return (high << np.uint64(32)) | low


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def philox(seed: int, counter: tuple) -> tuple:
    """Philox4x32-10: four arrays of 32-bit counter words to four arrays of 32-bit random words, held in uint64.

    `seed` is the 64-bit key. Checked against the known answers of the Random123 library.
    """
    c0, c1, c2, c3 = (np.asarray(word).astype(np.uint64) for word in counter)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        high1, high0 = p1 >> shift, p0 >> shift  # changed in place, which saves a tenth of the time
        high1 ^= c1
        high1 ^= np.uint64(k0)
        high0 ^= c3
        high0 ^= np.uint64(k1)
        p0 &= low
        p1 &= low
        c0, c1, c2, c3 = high1, p1, high0, p0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3
