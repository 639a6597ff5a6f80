"""Working ahead: order, bounds, errors, ends. The batches are small stand-ins; the thread does not look into them."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from pipelines.prefetch import Pipeline, StageClock

CPU = torch.device("cpu")


def ahead(make, depth=2, timeout_s=30.0, clock=None, end=lambda: None) -> Pipeline:
    engine = SimpleNamespace(description="", has_stages=True, end=end, figures=dict)
    return Pipeline(make, engine, clock or StageClock(), depth=depth, device=CPU, timeout_s=timeout_s)


def loader_threads() -> int:
    return sum(thread.name == "inscon-loader" for thread in threading.enumerate())


def test_everything_comes_in_order_and_then_it_ends():
    batches = ahead(iter_of(range(50)))
    assert list(batches) == list(range(50)) and list(batches) == []
    batches.close()
    assert loader_threads() == 0


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)


def iter_of(items):
    yield from items


def test_no_more_is_made_ahead_than_the_depth():
    made = []

    def make():
        for i in range(100):
            made.append(i)
            yield i

    batches = ahead(make(), depth=3)
    assert next(batches) == 0
    wait_for(lambda: len(made) == 5)
    time.sleep(0.2)
    assert len(made) == 5  # one handed out, three waiting, one that found no room
    batches.close()
    assert loader_threads() == 0


def test_nothing_is_made_before_it_is_asked_for():
    made = []
    batches = ahead(made.append(i) or i for i in range(3))
    time.sleep(0.1)
    assert made == []
    batches.close()
    assert made == [] and loader_threads() == 0


def test_an_error_comes_in_its_turn_and_ends_the_thread():
    def make():
        yield 1
        raise ValueError("the sentence")

    batches = ahead(make())
    assert next(batches) == 1
    with pytest.raises(ValueError, match="the sentence"):
        next(batches)
    assert list(batches) == []
    batches.close()
    assert loader_threads() == 0


def test_closing_closes_the_maker():
    ended = []

    def make():
        try:
            yield from range(1000)
        finally:
            ended.append("maker")

    batches = ahead(make(), end=lambda: ended.append("engine"))
    next(batches)
    batches.close()
    batches.close()
    assert ended == ["maker", "engine"] and loader_threads() == 0 and list(batches) == []


def test_without_a_depth_batches_are_made_when_they_are_asked_for():
    made = []
    with ahead((made.append(i) or i for i in range(3)), depth=None) as batches:
        assert next(batches) == 0 and made == [0] and loader_threads() == 0
        assert list(batches) == [1, 2]
        assert not any("starved" in name for name in batches.read())
    assert list(batches) == []


def test_a_stage_that_hangs_is_named():
    clock, over = StageClock(), threading.Event()

    def make():
        with clock.at("reading the samples of step 7", "read"):
            over.wait(30)
        yield 1

    batches = ahead(make(), timeout_s=1.0, clock=clock)
    with pytest.raises(
        TimeoutError, match=r"no batch came for 1 s; the pipeline hangs at: reading the samples of step 7\."
    ):
        next(batches)
    over.set()
    batches.close()
    assert loader_threads() == 0


def test_an_end_that_does_not_come_is_told(monkeypatch):
    monkeypatch.setattr("pipelines.prefetch.END_S", 0.2)
    clock, over = StageClock(), threading.Event()

    def make():
        yield 1
        with clock.at("reading the samples of step 8", "read"):
            over.wait(30)

    batches = ahead(make(), clock=clock)
    next(batches)
    wait_for(lambda: clock.doing == "reading the samples of step 8")
    with pytest.raises(RuntimeError, match="does not stop, it hangs at: reading the samples of step 8"):
        batches.close()
    over.set()


def test_starvation_is_counted():
    slow = ahead(time.sleep(0.05) or i for i in range(6))
    list(slow)
    assert slow.read()["loader_starved_percent"] > 60
    made = []
    fast = ahead((made.append(i) or i for i in range(20)), depth=4)
    next(fast)
    fast.read()
    for i in range(1, 11):
        wait_for(lambda until=i + 2: len(made) >= until)  # the one after it is begun: it is there
        next(fast)
    assert fast.read()["loader_starved_percent"] == 0
    fast.close()


def test_stages_exclude_each_other(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = StageClock()

    def spend(seconds):
        now[0] += seconds

    with clock.at("decoding", "decode"):
        spend(1)
        with clock.at("reading", "read"):
            assert clock.doing == "reading"
            spend(2)
        assert clock.doing == "decoding"
        spend(4)
    spend(8)
    with clock.at("x", "read"):
        spend(16)
    clock.add("read", 32)
    assert clock.read() == {"start": 8.0, "decode": 5.0, "read": 50.0}
    assert clock.read() == {}


def test_what_was_not_ready_is_counted_without_what_it_waited_for(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = StageClock()
    for own, nested in [(0.0, 5.0), (0.5, 0.0), (0.0, 0.0), (0.0009, 1.0)]:
        with clock.at("decoding", "decode", waits=True):
            now[0] += own
            with clock.at("reading", "read"):
                now[0] += nested
    spent = clock.read()
    assert (spent["waits"], spent["late"]) == (4, 1)
