"""Which ways to decode there are, and which a measurement chooses."""

from pipelines.decoding import Decode, candidates, choose

CPU, MIXED = Decode("cpu", None), Decode("mixed", None)


def test_without_a_gpu_or_with_color_on_the_host_there_is_one_way():
    assert candidates(None, True) == candidates(None, False) == candidates((9, 0), True) == [CPU]
    assert choose([CPU], {}) == (CPU, "")


def test_gpus_that_may_have_a_jpeg_engine_try_shares_for_it():
    assert candidates((7, 0), False) == [CPU, MIXED]
    ways = candidates((8, 0), False)
    assert ways[0] == CPU and {way.device for way in ways[1:]} == {"mixed"}
    assert len({way.engine_share for way in ways[1:]}) == len(ways) - 1 >= 2


def test_the_fastest_is_chosen_and_the_figures_are_told():
    engine = Decode("mixed", 0.9)
    chosen, why = choose([CPU, MIXED, engine], {CPU: 900.0, MIXED: 1800.0, engine: 2500.4})
    assert chosen == engine
    assert why == " (measured, images/s: cpu: 900, mixed: 1800, mixed, up to 90% by the JPEG engine: 2500)"


def test_the_gpu_is_left_alone_where_it_gains_little():
    assert choose([CPU, MIXED], {CPU: 1000.0, MIXED: 1090.0})[0] == CPU
    assert choose([CPU, MIXED], {CPU: 1000.0, MIXED: 1110.0})[0] == MIXED
