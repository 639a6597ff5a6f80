"""What a report makes of a trace, worked by hand; and the bytes that operators and kernels move, by the shapes of their tensors."""

import json
from pathlib import Path
from timeit import repeat

import numpy as np
import pytest
import torch
from torch import nn

from inscon.report import device
from inscon.report.device import Event, Traffic, class_of, read_trace, summary
from inscon.report.flops import measure_copy_rate
from inscon.report.measure import Measurement
from scripts.train import feed_of
from tests.scripts.planted import small_run

CUDA = torch.cuda.is_available()
CONV = "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_g1_kernel__5x_cudnn"
CALLS = [
    Event("cudaDeviceSynchronize", "cuda_runtime", 0, 100),
    Event("cudaLaunchKernel", "cuda_runtime", 120, 4),  # 20 after the host was free
    Event("cudaEventRecord", "cuda_runtime", 125, 3),  # belongs to the time between
    Event("cuLaunchKernel", "cuda_driver", 134, 4),  # 10
    Event("cudaMemcpyAsync", "cuda_runtime", 138, 6),  # 0
    Event("cudaDeviceSynchronize", "cuda_runtime", 150, 850),  # 6; waiting counts for nothing
    Event("cudaLaunchKernelExC", "cuda_runtime", 1014, 4),  # 14
    Event("cudaDeviceSynchronize", "cuda_runtime", 1018, 900),  # 0
]
WORK = [
    Event(CONV, "kernel", 300, 200),
    Event("_forward", "kernel", 450, 100),  # half of it beside the convolution
    Event("Memcpy DtoD (Device -> Device)", "gpu_memcpy", 460, 20),  # all of it beside others
    Event("Memset (Device)", "gpu_memset", 600, 10),
    Event(CONV, "kernel", 1100, 300),
]


def test_a_trace_worked_by_hand():
    others = [Event("aten::add", "cpu_op", 110, 500), Event("gpu step", "gpu_user_annotation", 0, 2000)]
    found = summary([*WORK, *others, *reversed(CALLS)], steps=2)
    assert found["launches"] == 2.0  # 4 of 4, 4, 6 and 4 us; the median is 4
    assert found["host_ms"] == pytest.approx((20 + 10 + 0 + 6 + 14 + 0 + 4 * 4) / 1e3 / 2)
    assert found["busy_ms"] == pytest.approx((250 + 10 + 300) / 1e3 / 2)
    kernels = {"convolution": 0.25, "BatchNorm": 0.05, "copies": 0.015}
    assert found["kernel_ms"] == pytest.approx(kernels) and list(found["kernel_ms"]) == list(kernels)


def test_launches_that_wait_for_room_count_as_those_that_do_not():
    """Each takes the host 2 us, and 8 before it; from the 1,001st on the device takes one out in 50."""
    calls, now = [Event("cudaDeviceSynchronize", "cuda_runtime", 0, 10)], 10
    for number in range(3000):
        took = 2 if number < 1000 else 42
        calls.append(Event("cudaLaunchKernel", "cuda_runtime", now + 8, took))
        now += 8 + took
    found = summary(calls, steps=1)
    assert found["launches"] == 3000 and found["host_ms"] == pytest.approx(30.0)


def test_a_step_without_launches():
    assert summary([], 3) == {"launches": 0.0, "host_ms": 0.0, "busy_ms": 0.0, "kernel_ms": {}}


def test_a_trace_is_read_from_its_file(tmp_path):
    lines = [dict(zip(("name", "cat", "ts", "dur"), event)) | {"ph": "X", "args": {}} for event in CALLS]
    lines += [{"ph": "M", "name": "process_name", "pid": 1}, {"ph": "f", "cat": "ac2g", "name": "ac2g", "ts": 5}]
    (tmp_path / "trace.json").write_text(json.dumps({"schemaVersion": 1, "traceEvents": lines}))
    assert read_trace(tmp_path / "trace.json") == CALLS
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
        torch.ones(3).add_(1)
    profiler.export_chrome_trace(str(tmp_path / "cpu.json"))
    events = read_trace(tmp_path / "cpu.json")
    assert (
        "cpu_op" in {event.kind for event in events if event.name == "aten::add_"}
        and summary(events, 1)["launches"] == 0
    )


@pytest.mark.parametrize(("kernel", "expected"), [
    (CONV, "convolution"),
    ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_256x64_32x4_nhwc_align8>()", "convolution"),
    ("sm80_xmma_wgrad_implicit_gemm_indexed_tf32f32_tf32f32_f32_nhwckrsc_nhwc_tilesize128x128x16_kernel__5x_cudnn", "convolution"),
    ("void convolve_common_engine_float_NHWC<__half, __half, 128, 5, 5, 3>(int, int)", "convolution"),
    ("void at::native::(anonymous namespace)::batch_norm_backward_reduce_channels_last_kernel<4, c10::BFloat16>", "BatchNorm"),
    ("void cudnn::batchnorm_fwtr_nhwc_semiPersist<__half, ...>", "BatchNorm"),
    ("void cudnn::bn_bw_1C11_kernel_new<float, float, float2, 512, true, 1>(float)", "BatchNorm"),
    *[(name, "BatchNorm") for name in ("_of_slices", "_of_group", "_follow", "_forward", "_backward_of_slices", "_backward")],
    *[(name, "color") for name in ("_sum_gray", "_rows", "_columns")],
    ("Memcpy HtoD (Pinned -> Device)", "copies"),
    ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_contig<at::native::OpaqueType<2u>, 4>", "copies"),
    ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>", "copies"),
    ("void cudnn::engines_precompiled::nchwToNhwcKernel<__half, __half, float, false, true>", "copies"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>", "elementwise"),
    ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<3>, FusedSgd>", "elementwise"),
    ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float>>>", "elementwise"),
    ("nvjet_sm90_tst_64x32_64x16_2x1_v_bz_TNT", "losses and matrix products"),
    ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_64x64_32x6_tn_align8>()", "losses and matrix products"),
    ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float>", "losses and matrix products"),
    ("void at::native::(anonymous namespace)::max_pool_forward_nhwc<c10::BFloat16>", "pooling"),
    *[(name, "pooling") for name in ("_max_of_windows", "_gradient_of_windows")],
    ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "other"),
])  # fmt: skip
def test_classes_of_kernels(kernel, expected):
    assert class_of(kernel) == expected


def triton_33() -> None:
    """Skip before that version: what interprets a kernel was no KernelInterface."""
    language = pytest.importorskip("triton.language", reason="Triton is not installed")
    if not hasattr(language, "gather"):
        pytest.skip("Triton before 3.3, that of torch 2.7, interprets kernels by another class")


def test_our_kernels_have_their_class():
    """Those that their modules launch; the others are parts of them."""
    triton_33()
    from triton import runtime

    from inscon.nn import fused_norm
    from pipelines import fused_color

    for module, kind in ((fused_norm, "BatchNorm"), (fused_color, "color")):
        kernels = [name for name, value in vars(module).items() if isinstance(value, runtime.KernelInterface)]
        launched = [name for name in kernels if f" {name}[" in Path(module.__file__).read_text()]
        assert len(launched) >= 3 and {class_of(name) for name in launched} == {kind}


def test_bytes_that_operators_move():
    x, conv = torch.randn(2, 3, 8, 8), nn.Conv2d(3, 5, 3, padding=1, bias=False)
    inner = 4 * (2 * 5 * 8 * 8)
    with Traffic() as traffic:
        y = conv(x)  # reads x and the weight, writes y
        y.view(2, -1).relu_()  # a view moves nothing; in place it is read and written
        torch.empty_like(y)  # nothing
        torch.ones(()).expand(9, 9).sum()  # writes a number, reads the only one that lies in memory, writes one
    assert traffic.moved == 4 * (x.numel() + conv.weight.numel()) + inner + 2 * inner + 4 + 4 + 4
    with Traffic() as traffic:
        (3 * x).sum()
    assert traffic.moved == 4 * (2 * x.numel() + x.numel() + 1)


@pytest.mark.parametrize("where", [pytest.param("cuda", marks=pytest.mark.gpu) if CUDA else "cpu"])
def test_bytes_that_our_kernels_move(where):
    triton_33()
    from inscon.nn.fused_norm import batch_norm, channels_last

    moved = []

    class Noted(Traffic):
        def _ran(self, *args, **kwargs):
            before = self.moved
            super()._ran(*args, **kwargs)
            moved.append(self.moved - before)

    x, ones = channels_last(torch.randn(4, 70, 9, 9, device=where)), torch.ones(70, device=where)
    running = ones.clone(), ones.clone(), torch.zeros((), dtype=torch.int64, device=where)
    with Noted() as traffic:
        batch_norm(x, ones, ones, running, groups=2, relu=True)
    image, vector = 4 * x.numel(), 4 * 70
    partial = 2 * 2 * 11 * vector  # of 2 groups of 162 rows, in slices of 16
    # Of the running statistics mean and variance, one vector each; of a group, too. One tensor given twice is read once.
    assert moved[:2] == [image + partial, partial + 2 * 2 * vector]
    assert moved[2:] == [2 * image + 2 * 2 * vector + vector, 2 * vector + 2 * 2 * vector + 8]
    assert traffic.moved >= sum(moved) and not any(kernel.pre_run_hooks for kernel in device._triton_kernels())


def test_the_copy_rate_is_that_of_numpy():
    """Which copies on one core; within what a busy machine makes of it."""
    source = np.ones(2**27, np.uint8)
    made = source.copy()
    rate = 2 * len(source) / min(repeat(lambda: np.copyto(made, source), number=1, repeat=5))
    assert rate / 4 < measure_copy_rate(torch.device("cpu")) < 4 * rate * torch.get_num_threads()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_a_real_trace(tmp_path):
    config = small_run(None, backbone="resnet18")
    measurement = Measurement(config, feed_of, torch.device("cuda"), tmp_path, steps=10, warm_up=4)
    found = measurement.on_device({}, fed=False)
    step, kernels = found["step"], found["step"]["kernel_ms"]
    # Each of the 20 convolutions and BatchNorms of a ResNet-18 is launched for two views, forward and backward.
    assert step["launches"] > 2 * 3 * 2 * 20 and step["host_ms"] > step["launches"] * 1e-3
    assert 0 < step["busy_ms"] <= sum(kernels.values()) + 1e-6
    assert {"convolution", "BatchNorm", "elementwise", "losses and matrix products"} <= set(kernels)
    assert kernels.get("other", 0.0) < 0.5 * sum(kernels.values())
    assert found["bytes"] > 16 * (64**2 + 32**2) * 3 * 4
