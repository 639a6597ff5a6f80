"""Which images a rank sees at a step: a pure function of (seed, step), elastic and resumable.

The order of an epoch is a pseudo-random permutation that is evaluated where it is needed instead of being stored: a
Feistel network over a x b >= n with modular addition, walked along its cycles until it lands below n (Black and
Rogaway, "Ciphers with arbitrary finite domains", 2002). So 300 million samples cost no memory and a step in the middle
of an epoch costs what any step costs.
"""

import bisect
import math

import numpy as np

from inscon.philox import philox

_ROUNDS = 8
BLOCK = 256
"""Neighbors on the disk that a windowed order reads in one run: 28 MB of ImageNet."""
_WHOLE, _BLOCKS = 0xFFFFFFFF, 0xFFFFFFFE
"""Which permutation of an epoch: of all samples, of the blocks; a smaller number is that of a window's samples."""


class EpochOrder:
    """Every sample exactly once per epoch, in an order of its own; the remainder of the last batch is dropped.

    Args:
        num_samples: size of the data set.
        batch_size: images per step over all ranks.
        seed: 0 .. 2**64-1.
        window: None shuffles the whole set. Else blocks of `BLOCK` neighbors are shuffled and then the samples of each
            `window // BLOCK` blocks, so that only two windows need be in memory.

    Raises ValueError if there is not one whole batch, or not one whole block in a window.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, window: int | None = None):
        if num_samples < batch_size:
            raise ValueError(
                f"the data set must hold at least one batch of {batch_size} images. Found: {num_samples}; "
                f"set --batch-size {max(num_samples // 4, 1) * 4} or add pictures"
            )
        if window is not None and window < BLOCK:
            raise ValueError(
                f"shuffle_window must be at least {BLOCK} samples, one run of the disk. Found: {window}; set "
                "--shuffle-window 65536, or leave it out to shuffle the whole set"
            )
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self._windows = None if window is None or window >= num_samples else _Windows(num_samples, seed, window)

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.batch_size

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that global step `step` belongs to."""
        return step // self.steps_per_epoch

    def global_batch(self, step: int) -> np.ndarray:
        """[batch_size] int64 sample ids of global step `step`, counted over all epochs, the same for every world size."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self._samples(within * self.batch_size + np.arange(self.batch_size), epoch)

    def rank_batch(self, step: int, rank: int, world_size: int) -> np.ndarray:
        """[batch_size / world_size] int64: this rank's contiguous slice of the global batch."""
        return self.rank_batches(range(step, step + 1), rank, world_size)[0]

    def rank_batches(self, steps: range, rank: int, world_size: int) -> np.ndarray:
        """[steps, batch_size / world_size] int64: `rank_batch` of several steps of one epoch, for less than one by one."""
        share, remainder = divmod(self.batch_size, world_size)
        if remainder:
            raise ValueError(f"batch_size must be a multiple of the {world_size} ranks. Found: {self.batch_size}")
        epoch = self.epoch_of(steps[0])
        within = np.arange(len(steps)) + (steps[0] - epoch * self.steps_per_epoch)
        assert self.epoch_of(steps[-1]) == epoch
        positions = within[:, None] * self.batch_size + np.arange(rank * share, (rank + 1) * share)
        return self._samples(positions.ravel(), epoch).reshape(positions.shape)

    def positions(self, sample_ids: np.ndarray, epoch: int) -> np.ndarray:
        """Where samples lie in the order of `epoch`, int64; from `whole` on: in no batch."""
        if self._windows is not None:
            return self._windows.positions(np.asarray(sample_ids), epoch)
        return unpermute(sample_ids, self.num_samples, self.seed, epoch)

    @property
    def whole(self) -> int:
        """How many samples an epoch shows."""
        return self.steps_per_epoch * self.batch_size

    def left_over(self, epoch: int) -> np.ndarray:
        """The samples that `epoch` does not show, less than a batch, int64, in the epoch's order."""
        return self._samples(np.arange(self.whole, self.num_samples), epoch)

    def runs(self, step: int, starting: bool = False) -> list[range]:
        """Runs of neighboring sample ids to be read ahead while `step` is made: its share of the window after its own,
        and, `starting` there, all of its own window too. None for an order without windows."""
        if self._windows is None:
            return []
        epoch, within = divmod(step, self.steps_per_epoch)
        last = within + 1 == self.steps_per_epoch
        stop = self.num_samples if last else (within + 1) * self.batch_size
        return self._windows.runs(epoch, within * self.batch_size, stop, starting)

    def describe(self) -> str:
        """How well it shuffles, for the log; "" for an order without windows."""
        return "" if self._windows is None else self._windows.describe(self.batch_size)

    def _samples(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        if self._windows is not None:
            return self._windows.samples(positions, epoch)
        return permute(positions, self.num_samples, self.seed, epoch)


class _Windows:
    """A shuffle that reads the disk in runs: blocks of neighbors in a random order, and the samples of each few blocks mixed.

    Every sample is once in an epoch, whatever the sizes; the last block may be short, and lies anywhere. The set was shuffled
    when it was packed, so a block is a fair mixture; what is lost is that a sample meets its block's others more often
    than strangers (`describe`).
    """

    def __init__(self, num_samples: int, seed: int, window: int):
        self._n, self._seed = num_samples, seed
        self._blocks = -(-num_samples // BLOCK)
        self._per_window = window // BLOCK
        self._lacking = self._blocks * BLOCK - num_samples
        """Samples that the last block has less than the others."""

    def samples(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        short = self._place_of_short(epoch)
        mixed = self._within_windows(positions, epoch, short, permute)
        behind = mixed >= self._start(short + 1, short)
        place, offset = np.divmod(mixed + behind * self._lacking, BLOCK)
        return permute(place, self._blocks, self._seed, epoch, _BLOCKS) * BLOCK + offset

    def positions(self, samples: np.ndarray, epoch: int) -> np.ndarray:
        block, offset = np.divmod(samples, BLOCK)
        short = self._place_of_short(epoch)
        place = unpermute(block, self._blocks, self._seed, epoch, _BLOCKS)
        return self._within_windows(self._start(place, short) + offset, epoch, short, unpermute)

    def runs(self, epoch: int, first: int, stop: int, starting: bool) -> list[range]:
        """What `EpochOrder.runs` says, for positions `first` to `stop` - 1."""
        starts = self._window_starts(self._place_of_short(epoch)).tolist()
        here = range(bisect.bisect(starts, first) - 1, bisect.bisect_left(starts, stop))
        runs = self._blocks_of(epoch, here[0]) if starting else []
        for window in here:
            begin, end = starts[window], starts[window + 1]
            ahead = self._blocks_of(epoch, window + 1) if window + 2 < len(starts) else self._blocks_of(epoch + 1, 0)
            share = [(min(max(place, begin), end) - begin) * len(ahead) // (end - begin) for place in (first, stop)]
            runs += ahead[slice(*share)]
        return runs

    def describe(self, batch_size: int) -> str:
        size = min(self._per_window * BLOCK, self._n)
        return (
            f"shuffled in windows of {size} samples, {self._per_window} blocks of {BLOCK} neighbors; two of a block share a batch "
            f"with probability {(batch_size - 1) / (size - 1):.2%} instead of {(batch_size - 1) / (self._n - 1):.2%}"
        )

    def _place_of_short(self, epoch: int) -> int:
        """Where in the order of blocks the last one comes."""
        return int(unpermute(np.array([self._blocks - 1]), self._blocks, self._seed, epoch, _BLOCKS)[0])

    def _start(self, place, short: int):
        """The position at which the block at `place` begins."""
        return place * BLOCK - (place > short) * self._lacking

    def _window_starts(self, short: int) -> np.ndarray:
        """[windows + 1]; the last one is the end."""
        places = np.append(np.arange(0, self._blocks, self._per_window), self._blocks)
        return self._start(places, short)

    def _blocks_of(self, epoch: int, window: int) -> list[range]:
        places = np.arange(window * self._per_window, min((window + 1) * self._per_window, self._blocks))
        blocks = permute(places, self._blocks, self._seed, epoch, _BLOCKS)
        return [range(block * BLOCK, min((block + 1) * BLOCK, self._n)) for block in blocks.tolist()]

    def _within_windows(self, positions: np.ndarray, epoch: int, short: int, move) -> np.ndarray:
        starts = self._window_starts(short)
        windows = np.searchsorted(starts, positions, "right") - 1
        moved = np.empty(positions.shape, np.int64)
        for window in np.unique(windows).tolist():
            here, start = windows == window, int(starts[window])
            size = int(starts[window + 1]) - start
            moved[here] = start + move(positions[here] - start, size, self._seed, epoch, window)
        return moved


def permute(positions: np.ndarray, n: int, seed: int, epoch: int, part: int = _WHOLE) -> np.ndarray:
    """Where a pseudo-random permutation of 0..n-1, chosen by (seed, epoch, part), sends `positions` [any], int64."""
    return _walk(positions, n, _round_keys(seed, epoch, part), _feistel)


def unpermute(values: np.ndarray, n: int, seed: int, epoch: int, part: int = _WHOLE) -> np.ndarray:
    """The positions that `permute` sends to `values` [any], int64."""
    return _walk(values, n, _round_keys(seed, epoch, part), _feistel_back)


def _walk(numbers: np.ndarray, n: int, keys: np.ndarray, network) -> np.ndarray:
    a = math.isqrt(n - 1) + 1 if n > 1 else 1
    b = -(-n // a)
    result = np.array(numbers, np.int64)
    walking = np.ones(result.shape, bool)
    while walking.any():
        result[walking] = network(result[walking].astype(np.uint64), a, b, keys).astype(np.int64)
        walking = result >= n
    return result


def _round_keys(seed: int, epoch: int, part: int) -> np.ndarray:
    """[rounds] uint64, from the plan's generator at a counter no view uses (its purpose word is all ones)."""
    rounds = np.arange(_ROUNDS)
    full = np.full(_ROUNDS, 0xFFFFFFFF)
    w0, w1, _, _ = philox(seed, (rounds, np.full(_ROUNDS, part), np.full(_ROUNDS, epoch), full))
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
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
