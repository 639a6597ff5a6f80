"""The ring of keys."""

import pytest
import torch

from inscon.nn.queue import KeyQueue


def test_queue_is_a_ring_and_its_pointer_is_saved():
    queue = KeyQueue(6, 2, 2)
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(6))
    rows = torch.arange(20.0).view(10, 2)
    for i in range(0, 10, 2):
        queue.enqueue(rows[i : i + 2])
    assert queue.keys.tolist() == [*rows[6:10].tolist(), *rows[4:6].tolist()] and queue.pointer == 4
    other = KeyQueue(6, 2, 2)
    other.load_state_dict(queue.state_dict())
    assert other.pointer == 4 and torch.equal(other.keys, queue.keys)
    with pytest.raises(AssertionError, match="a queue of 6 keys takes no 4 at once"):
        queue.enqueue(rows[:4])
