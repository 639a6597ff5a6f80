"""Which images a rank sees at a step: a pure function of (seed, step), elastic and resumable.

The order of an epoch is a pseudo-random permutation that is evaluated where it is needed instead of being stored: a
Feistel network over a x b >= n with modular addition, walked along its cycles until it lands below n (Black and
Rogaway, "Ciphers with arbitrary finite domains", 2002). So 300 million samples cost no memory and a step in the middle
of an epoch costs what any step costs.
"""

import math

import numpy as np

from inscon.philox import philox

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

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.batch_size

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that global step `step` belongs to."""
        return step // self.steps_per_epoch

    def global_batch(self, step: int) -> np.ndarray:
        """[batch_size] int64 sample ids of global step `step`, counted over all epochs, the same for every world size."""
        epoch, within = divmod(step, self.steps_per_epoch)
        positions = within * self.batch_size + np.arange(self.batch_size)
        return permute(positions, self.num_samples, self.seed, epoch)

    def rank_batch(self, step: int, rank: int, world_size: int) -> np.ndarray:
        """[batch_size / world_size] int64: this rank's contiguous slice of the global batch."""
        share, remainder = divmod(self.batch_size, world_size)
        if remainder:
            raise ValueError(f"batch_size must be a multiple of the {world_size} ranks. Found: {self.batch_size}")
        return self.global_batch(step)[rank * share : (rank + 1) * share]

    def positions(self, sample_ids: np.ndarray, epoch: int) -> np.ndarray:
        """Where samples lie in the order of `epoch`, int64, the inverse of `permute`; from `whole` on: in no batch."""
        return unpermute(sample_ids, self.num_samples, self.seed, epoch)

    @property
    def whole(self) -> int:
        """How many samples an epoch shows."""
        return self.steps_per_epoch * self.batch_size

    def left_over(self, epoch: int) -> np.ndarray:
        """The samples that `epoch` does not show, less than a batch, int64, in the epoch's order."""
        return permute(np.arange(self.whole, self.num_samples), self.num_samples, self.seed, epoch)


def permute(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where a pseudo-random permutation of 0..n-1, chosen by (seed, epoch), sends `positions` [any], int64."""
    return _walk(positions, n, seed, epoch, _feistel)


def unpermute(values: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """The positions that `permute` sends to `values` [any], int64."""
    return _walk(values, n, seed, epoch, _feistel_back)


def _walk(numbers: np.ndarray, n: int, seed: int, epoch: int, network) -> np.ndarray:
    a = math.isqrt(n - 1) + 1 if n > 1 else 1
    b = -(-n // a)
    keys = _round_keys(seed, epoch)
    result = np.array(numbers, np.int64)
    walking = np.ones(result.shape, bool)
    while walking.any():
        result[walking] = network(result[walking].astype(np.uint64), a, b, keys).astype(np.int64)
        walking = result >= n
    return result


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    """[rounds] uint64, from the plan's generator at a counter no view uses (its purpose word is all ones)."""
    rounds = np.arange(_ROUNDS)
    full = np.full(_ROUNDS, 0xFFFFFFFF)
    w0, w1, _, _ = philox(seed, (rounds, full, np.full(_ROUNDS, epoch), full))
    return (w0 << np.uint64(32)) | w1


def _feistel(x: np.ndarray, a: int, b: int, keys: np.ndarray) -> np.ndarray:
    a, b = np.uint64(a), np.uint64(b)
    left, right = x // b, x % b
    for i in range(0, _ROUNDS, 2):
        left = (left + _mix(right ^ keys[i]) % a) % a
        right = (right + _mix(left ^ keys[i + 1]) % b) % b
    return left * b + right


def _feistel_back(x: np.ndarray, a: int, b: int, keys: np.ndarray) -> np.ndarray:
    a, b = np.uint64(a), np.uint64(b)
    left, right = x // b, x % b
    for i in reversed(range(0, _ROUNDS, 2)):
        right = (right + b - _mix(left ^ keys[i + 1]) % b) % b
        left = (left + a - _mix(right ^ keys[i]) % a) % a
    return left * b + right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
