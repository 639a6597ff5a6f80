"""Captured steps equal those that the host launches. Without a GPU, a recording of every operation stands in for the graph."""

import contextlib
import gc
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_flatten

from inscon import checkpoint, clock, methods, train
from inscon.config import Config, LoaderConfig, ModelConfig, OptimConfig, RunConfig, ViewConfig
from inscon.graph import AHEAD, WARM_UP, CudaGraphs, GraphedStep, NotCaptured
from inscon.methods import inscon
from inscon.methods.method import resolve
from pipelines import open_pipeline
from pipelines.feed import Feed, open_index
from tests.inscon.methods.steps import make_batch
from tests.inscon.methods.test_method import NobodyWaits
from tests.inscon.test_train import CPU, PER_EPOCH, batch_of, changed, lines, make_config, on_gpu

STEPS, OVERFLOW = 20, 13


class Recording(NobodyWaits):
    """Every operation of PyTorch, with its tensors and with its Python numbers as they were: what a CUDA graph keeps, too."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        assert operation is not torch.ops.aten.lift_fresh.default, "a tensor of the host's numbers waits for the device"
        made = super().__torch_dispatch__(operation, types, arguments, named)
        self.done.append((operation, arguments, named or {}, made))
        return made

    def play(self):
        with torch.inference_mode():
            for operation, arguments, named, made in self.done:
                for old, new in zip(
                    tree_flatten(made)[0], tree_flatten(operation(*arguments, **named))[0], strict=True
                ):
                    if torch.is_tensor(old) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.copy_(new)


class Recorded:
    """Stands in for CudaGraphs."""

    played = 0

    def warm(self, work):
        work()

    def capture(self, work):
        recording, first = Recording(), [True]
        with recording:
            work()

        def again():
            if not first:
                recording.play()
                self.played += 1
            first.clear()

        return again


class Called(Recorded):
    """The simpler one: works again, instead of a replay."""

    def capture(self, work):
        return work


class Refused(Recorded):
    """Half a step is under way when the capture fails."""

    def __init__(self, training):
        self.training = training

    def capture(self, work):
        self.training.scaler.scale(torch.ones(()))
        self.training.scaler.unscale_(self.training.optimizer)
        self.training.optimizer.found_inf = torch.ones(())
        raise NotCaptured("operation not permitted")


def run(config, upto, graphs=lambda training: None):
    """The trainer with a gradient scaler, and a gradient that overflows in one step; continues what is there."""
    training = train.set_up(config, CPU, "set A")
    training.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=6)
    if newest := checkpoint.latest(config.run.run_dir):
        training.scaler.load_state_dict(checkpoint.load(newest)["scaler"])
    made, factor, weight = graphs(training), torch.ones(()), next(training.method.backbone.parameters())
    training.graph = made and GraphedStep(made)
    weight.register_hook(lambda gradient: gradient * factor)
    training.seen = []

    def batches():
        for step in range(training.step, upto):
            training.seen.append(weight.detach().clone())
            factor.fill_(torch.inf if step == OVERFLOW else 1.0)
            yield batch_of(step)

    train.train(training, batches(), PER_EPOCH, upto)
    return training, made


@pytest.fixture(scope="module")
def cosine(tmp_path_factory):
    """The settings of a run of all heads whose rate changes at every step, in a folder of its own."""

    def config(**optim):
        whole = changed(make_config(tmp_path_factory.mktemp("run")), "optim", epochs=7, schedule="cosine-step", **optim)
        return changed(whole, "run", checkpoint_every=STEPS // 2)

    return config


@pytest.fixture(scope="module")
def eager(cosine):
    return run(cosine(), STEPS)[0]


def assert_equal(ours, theirs, folder, other):
    """Losses of every step, weights, statistics, queues, momentum and scale, bit for bit."""
    names = (
        "step",
        "lr",
        "loss",
        "loss_single",
        "loss_multi",
        "loss_cell",
        "top1_single",
        "queue_renewed_cell",
        "key_moved",
    )
    assert [[line.get(name) for name in names] for line in lines(folder)] == [
        [line.get(name) for name in names] for line in lines(other)
    ]
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours["scaler"] == theirs["scaler"] and ours["model"].keys() == theirs["model"].keys()
    for name, value in theirs["model"].items():
        same = torch.equal(ours["model"][name], value) if torch.is_tensor(value) else ours["model"][name] == value
        assert same, name
    for index, state in theirs["optimizer"]["state"].items():
        assert torch.equal(ours["optimizer"]["state"][index]["momentum_buffer"], state["momentum_buffer"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Called, Recorded])
def test_a_graph_and_a_resume_in_the_middle_equal_the_eager_run(cosine, eager, kind):
    config = cosine()
    run(config, STEPS // 2, lambda training: kind())
    training, graphs = run(config, STEPS, lambda training: kind())
    assert training.graph._again is None  # forgotten at the end
    assert graphs.played == (0 if kind is Called else STEPS // 2 - WARM_UP - 1)
    assert_equal(training, eager, config.run.run_dir, eager.config.run.run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("name", methods.names())
def test_every_method_can_be_captured(tmp_path, name):
    """Its steps wait for nothing, and what it schedules reaches a captured one."""
    losses = []
    for graphs in (None, Recorded()):
        config = Config(
            method=methods.settings_of(name)(), loader=LoaderConfig(pipeline="synthetic"), views=ViewConfig(view_size=64),
            model=ModelConfig(backbone="test_resnet"), run=RunConfig(run_dir=tmp_path),
            optim=OptimConfig(batch_size=8, epochs=8, schedule="cosine-step"),
        )  # fmt: skip
        config = resolve(config, 1)
        views = config.method.view_specs(config.views)
        feed = Feed(open_index(config.loader), views, config.method.mosaics(), batch_size=8, seed=0)
        training = train.set_up(config, CPU, "none")
        training.graph = graphs and GraphedStep(graphs)
        training.method.train()
        with open_pipeline(feed, config.loader, total_steps=8) as pipeline:
            for batch in pipeline:
                train.take_step(training, batch, 1)
                losses.append(training.losses.read())
    assert graphs.played == 8 - WARM_UP - 1
    assert losses[8:] == losses[:8]


def test_the_recording_notices_numbers_of_the_host():
    with pytest.raises(AssertionError, match="waits for the device"), Recording():
        torch.ones(3) + torch.tensor(0.5)


@pytest.mark.slow
def test_what_a_graph_cannot_see_makes_a_difference(cosine, eager):
    """Otherwise the recording would show nothing: an optimizer with a rate on the host goes on with that of the capture."""
    config = cosine()

    def graphs(training):
        training.optimizer.param_groups[0]["lr"] = 0.03
        return Recorded()

    training, _ = run(config, 8, graphs)
    losses = [[line["loss"] for line in lines(c.run.run_dir)][:8] for c in (config, eager.config)]
    assert losses[0][:WARM_UP] == pytest.approx(losses[1][:WARM_UP], rel=1e-5)
    assert training.step == 8 and losses[0][7] != pytest.approx(losses[1][7], rel=1e-5)


@pytest.mark.slow
def test_a_refused_capture_is_said_once_and_costs_nothing(cosine, eager, capsys):
    config = cosine()
    training, _ = run(config, STEPS, Refused)
    assert (
        training.graph is None
        and capsys.readouterr().err.count("no CUDA graph, the host launches its kernels: operation") == 1
    )
    assert_equal(training, eager, config.run.run_dir, eager.config.run.run_dir)


@pytest.mark.slow
def test_an_overflow_in_the_middle_skips_one_update_alone(eager):
    stood_still = [torch.equal(before, after) for before, after in zip(eager.seen, eager.seen[1:])]
    assert [step for step, still in enumerate(stood_still) if still] == [OVERFLOW]
    assert eager.scaler.get_scale() == 64 * 2 * 2 / 2 * 2  # grew after 6 and 12 steps, halved, and grew after 6 more


def test_a_graph_takes_a_copy_of_its_batch_and_nobody_hears_the_capture():
    taken, heard, mean = [], [], torch.zeros(())

    def step(batch):
        taken.append(batch)
        with clock.part(clock.BACKWARD):
            mean.copy_(batch.mosaic.mean())

    def hear(name):
        heard.append(name)
        return contextlib.nullcontext()

    class Noted(Called):
        def capture(self, work):
            work()  # as a capture walks through it
            return work

    graph, batches = GraphedStep(Noted()), [batch_of(number) for number in range(WARM_UP + 2)]
    with clock.listen(hear):
        for batch in batches:
            graph(step, batch)
            assert torch.equal(mean, batch.mosaic.mean())
    assert len(taken) == WARM_UP + 3 and len(heard) == WARM_UP + 2
    assert len({id(batch) for batch in taken}) == 1 and taken[0] is not batches[0]
    assert all(torch.equal(own, given) for own, given in zip(taken[0].tensors(), batches[-1].tensors(), strict=True))


def test_the_host_is_two_replays_ahead_at_most(monkeypatch):
    """A device stood in for, which works only while somebody waits for it."""
    done, waiting, most = [], [], [0]

    class Graph:
        def replay(self):
            waiting.append(object())
            most[0] = max(most[0], len(waiting))

    class Event:
        def __init__(self, blocking):
            assert blocking  # else the host's thread would spin

        def record(self):
            self.last = waiting[-1]

        def synchronize(self):
            while self.last in waiting:
                done.append(waiting.pop(0))

    fake = {
        "Stream": object,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph_pool_handle": tuple,
        "stream": contextlib.nullcontext,
    }
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(**fake, graph=lambda *_, **__: contextlib.nullcontext()))
    again = CudaGraphs().capture(lambda: None)
    for _ in range(6):
        again()
    assert (len(done), len(waiting), most) == (4, 2, [AHEAD])


def test_an_optimizer_of_the_host_gets_no_graph(tmp_path, capsys):
    training = train.set_up(changed(make_config(tmp_path), "optim", optimizer="foreach"), CPU, "set A")
    assert training.graph is None and train._graph(training) is None
    assert "SGD by foreach takes the learning rate from there; set --optimizer torch-fused" in capsys.readouterr().err


def on_gpus(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test))


def on_a_gpu(config, steps, batches=batch_of, **optim):
    """A training after so many steps, and their losses; kernels are chosen alike every time."""
    training = train.set_up(changed(config, "optim", **optim), torch.device("cuda"), "set A")
    training.method.train()
    losses = []
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True):
        for step in range(steps):
            train.take_step(training, on_gpu(batches(step)), PER_EPOCH)
            losses.append(training.losses.read()["loss"])
    return training, losses


def assert_equal_to_eager(config, precision, digits, steps=STEPS):
    ours, losses = on_a_gpu(config, steps, precision=precision)
    with contextlib.closing(ours):
        theirs, expected = on_a_gpu(config, steps, precision=precision, graph="off")
        assert ours.graph._again is not None and theirs.graph is None
        assert losses == pytest.approx(expected, rel=digits)
        made = ours.method.state_dict()
        for name, value in theirs.method.state_dict().items():
            if torch.is_tensor(value):
                largest = value.abs().max().item()
                torch.testing.assert_close(made[name], value, rtol=digits, atol=digits * largest, msg=name)


@on_gpus
@pytest.mark.parametrize(("precision", "digits"), [("fp32", 1e-4), ("bf16", 2e-3), ("fp16", 2e-3)])
def test_on_a_gpu_a_graph_equals_the_eager_steps(cosine, precision, digits):
    """To rounding, which 20 steps carry on: some kernels of PyTorch add in any order."""
    assert_equal_to_eager(cosine(), precision, digits)


@on_gpus
def test_collectives_of_nccl_are_captured(cosine, tmp_path):
    """In a group of one rank: gradients are reduced and keys gathered as in a larger one."""
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert_equal_to_eager(cosine(), "fp32", 1e-4, steps=8)
    finally:
        dist.destroy_process_group()


@on_gpus
def test_the_host_launches_a_replay_and_the_copies(cosine):
    training, _ = on_a_gpu(cosine(), WARM_UP + 2, precision="fp16")
    batch = on_gpu(batch_of(0))
    torch.cuda.synchronize()
    with torch.profiler.profile() as profiler:
        train.take_step(training, batch, PER_EPOCH)
        torch.cuda.synchronize()
    calls = {event.key: event.count for event in profiler.key_averages()}
    launches = sum(count for name, count in calls.items() if name.startswith(("cudaLaunchKernel", "cuLaunchKernel")))
    assert calls["cudaGraphLaunch"] == 1 and calls.get("cudaMemcpyAsync", 0) <= len(batch.tensors()) + 1  # the rate
    # Before 2.8 PyTorch fills the generator's seed and offset at each replay.
    assert launches <= (0 if torch.__version__ >= (2, 8) else 2)


@on_gpus
def test_a_graph_needs_no_more_memory_than_its_batch(cosine):
    peaks, size = [], 64
    config = changed(
        changed(cosine(), "model", backbone="resnet50"), "method", queue_size=size, cell_queue_size=9 * size
    )
    large = lambda step: make_batch(inscon.Settings(), step, size, torch.float32, config.views)  # noqa: E731
    for graph in ("off", "auto"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        training, _ = on_a_gpu(config, WARM_UP + 3, large, batch_size=size, graph=graph)
        peaks.append(torch.cuda.max_memory_allocated() - start)
        training.close()
        del training
    batch = sum(tensor.nbytes for tensor in large(0).tensors())
    assert peaks[1] <= 1.02 * (peaks[0] + batch) + 2**27  # cuBLAS keeps some for each stream


@on_gpus
def test_a_capture_that_fails_leaves_everything_as_it_was():
    """Streams, memory and the next capture."""
    graphs, before = CudaGraphs(), torch.cuda.current_stream()
    one = torch.ones((), device="cuda")
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    with pytest.raises(NotCaptured, match="captur"):
        graphs.capture(lambda: one.expand(2**26).add(torch.rand((), device="cuda")).sum().item())
    assert torch.cuda.current_stream() == before
    gc.collect()  # the error's frames
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < reserved + 2**26
    assert 0 <= torch.rand((), device="cuda").item() < 1
    again = graphs.capture(lambda: one.add_(1))
    assert one.item() == 1
    for expected in (2, 3, 4):
        again()
        assert one.item() == expected
