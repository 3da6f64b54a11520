"""From a profile's trace to where the time went, with numbers worked out by hand."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.timeline import (
    ATTENTION,
    CONVOLUTION,
    COPIES,
    MATRIX,
    MAX_NAME,
    OTHER,
    POINTWISE,
    Gaps,
    Interval,
    Tick,
    busy_stretches,
    device_intervals,
    gaps_of,
    host_of,
    kernel_part,
    operator_part,
    timeline_of,
    top_level_operators,
)


def event(name: str, ts: float, dur: float, cat: str = "kernel", tid: int = 7, **more: Any) -> dict[str, Any]:
    """An event of a trace, in microseconds."""
    return {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": tid, "ts": ts, "dur": dur, **more}


# --- what a trace holds ------------------------------------------------------------


def test_kernels_copies_and_fills_of_all_streams_are_what_the_device_did() -> None:
    """Launches, annotations and arrows are of the host, whatever their length."""
    events = [
        event("Memset (Device)", 5000, 500, "gpu_memset", tid=20),
        event("gemm", 1000, 2000, tid=7),
        event("Memcpy HtoD", 2500, 1000, "gpu_memcpy", tid=7),
        event("cudaLaunchKernel", 0, 9000, "cuda_runtime"),
        event("annotation", 0, 9000, "gpu_user_annotation"),
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "ts": 1},
        {"ph": "M", "name": "process_name", "ts": 0, "args": {}},
    ]
    assert device_intervals(events) == [
        Interval("gemm", 1.0, 3.0),
        Interval("Memcpy HtoD", 2.5, 3.5),
        Interval("Memset (Device)", 5.0, 5.5),
    ]


def test_only_the_outermost_operators_of_each_thread_count() -> None:
    """What an operator calls lies within it, also where both begin together; threads are looked at on their own."""
    events = [
        event("aten::convolution", 0, 800, "cpu_op"),
        event("aten::conv2d", 0, 1000, "cpu_op"),
        event("aten::add", 1000, 500, "cpu_op"),
        event("aten::empty", 1100, 100, "cpu_op"),
        event("aten::mul", 200, 300, "cpu_op", tid=8),
        event("gemm", 0, 5000),
    ]
    assert top_level_operators(events) == [
        Interval("aten::conv2d", 0.0, 1.0),
        Interval("aten::mul", 0.2, 0.5),
        Interval("aten::add", 1.0, 1.5),
    ]


# --- busy and idle -----------------------------------------------------------------


def test_intervals_that_overlap_or_touch_are_one_stretch() -> None:
    """One within another adds nothing; one that begins as another ends leaves no gap."""
    intervals = [
        Interval("c", 10, 12),
        Interval("a", 0, 5),
        Interval("within a", 1, 2),
        Interval("b", 4, 6),
        Interval("touches b", 6, 7),
    ]
    assert busy_stretches(intervals) == [(0, 7), (10, 12)]
    assert busy_stretches([]) == []


def test_gaps_lie_between_stretches() -> None:
    """Lengths are 0.05, 1 and 0.45 ms; two are longer than a tenth, and the tenth itself would not be."""
    gaps = gaps_of([(0.0, 1.0), (1.05, 2.0), (3.0, 3.5), (3.95, 4.0)])
    assert gaps.count == 3
    assert gaps.total_ms == pytest.approx(1.5)
    assert gaps.p50_ms == pytest.approx(0.45)
    assert gaps.p95_ms == pytest.approx(0.945)
    assert gaps.max_ms == pytest.approx(1.0)
    assert (gaps.long_count, gaps.long_ms) == (2, pytest.approx(1.45))
    assert gaps_of([(0.0, 1.0)]) == Gaps(0, 0.0, 0.0, 0.0, 0.0, 0, 0.0)


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(1, 20)), min_size=1, max_size=30))
def test_busy_and_idle_make_up_the_window(starts_and_lengths: list[tuple[int, int]]) -> None:
    """The union is what counting milliseconds one by one gives, and the gaps are the rest."""
    timeline = timeline_of(
        [Interval("any", start, start + length) for start, length in starts_and_lengths], kernel_part
    )
    covered = {moment for start, length in starts_and_lengths for moment in range(start, start + length)}
    assert timeline.busy_ms == len(covered)
    assert timeline.busy_ms + timeline.gaps.total_ms == timeline.window_ms == max(covered) + 1 - min(covered)


# --- parts -------------------------------------------------------------------------


def test_parts_and_names_are_summed() -> None:
    """Two streams overlap for a millisecond: it counts for both, so that shares of the five busy ones are 120 %."""
    timeline = timeline_of(
        [
            Interval("gemm a", 0, 2),
            Interval("gemm b", 1, 3),
            Interval("gemm a", 5, 6),
            Interval("fmha", 6, 7),
        ],
        kernel_part,
        num_costliest=2,
    )
    assert (timeline.window_ms, timeline.busy_ms) == (7, 5)
    assert [(cost.name, cost.count, cost.total_ms, cost.busy_share) for cost in timeline.parts] == [
        (MATRIX, 3, 5, 1.0),
        (ATTENTION, 1, 1, 0.2),
    ]
    assert [(cost.name, cost.total_ms) for cost in timeline.costliest] == [("gemm a", 3), ("gemm b", 2)]


def test_long_names_are_cut() -> None:
    """Kernels that differ only in what is cut off are listed as one; their part is found in the whole name."""
    timeline = timeline_of([Interval("x" * MAX_NAME + end, 0, 1) for end in ("gemm", "fmha")], kernel_part)
    assert [(cost.name, cost.count) for cost in timeline.costliest] == [("x" * MAX_NAME, 2)]
    assert {cost.name for cost in timeline.parts} == {MATRIX, ATTENTION}


def test_a_timeline_of_nothing_is_an_error() -> None:
    """Nothing recorded is no device that idles."""
    with pytest.raises(ValueError, match="at least one interval"):
        timeline_of([], kernel_part)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>(Flash_fwd_params)", ATTENTION),
        ("fmha_cutlassF_f16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", ATTENTION),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64", ATTENTION),
        ("void (anonymous namespace)::softmax_warp_forward<float, c10::Half, float, 7>", ATTENTION),
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", CONVOLUTION),
        ("void cudnn::ops::nchwToNhwcKernel<__half, __half, float>", CONVOLUTION),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_f16_s16816fprop_optimized_f16_128x128>", CONVOLUTION),
        ("void at::native::im2col_kernel<c10::Half>(long, c10::Half const*)", CONVOLUTION),
        ("triton_tem_fused_convolution_3", CONVOLUTION),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_bias_TNT", MATRIX),
        ("sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64", MATRIX),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_f16_s161616gemm_f16_16x16_128x1_tn>", MATRIX),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __half, float, __half>", MATRIX),
        ("triton_tem_fused_addmm_12", MATRIX),
        ("triton_red_fused_native_group_norm_silu_5", POINTWISE),
        ("triton_poi_fused_convolution_add_div_7", POINTWISE),
        ("triton_poi_fused__scaled_dot_product_flash_attention_clone_9", POINTWISE),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::Half>>", POINTWISE),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::Half>", POINTWISE),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::Half, float>", POINTWISE),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", POINTWISE),
        ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>", COPIES),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<c10::Half, unsigned int>", COPIES),
        ("Memcpy DtoH (Device -> Pageable)", COPIES),
        ("Memset (Device)", COPIES),
        ("something_new", OTHER),
    ],
)
def test_kernels_are_known_by_their_names(name: str, part: str) -> None:
    """As cuDNN, cuBLAS, CUTLASS, torch and inductor name them."""
    assert kernel_part(name) == part


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("aten::scaled_dot_product_attention", ATTENTION),
        ("aten::bmm", ATTENTION),
        ("aten::softmax", ATTENTION),
        ("aten::conv2d", CONVOLUTION),
        ("aten::addmm", MATRIX),
        ("aten::linear", MATRIX),
        ("aten::matmul", MATRIX),
        ("aten::group_norm", POINTWISE),
        ("aten::silu", POINTWISE),
        ("aten::mul", POINTWISE),
        ("aten::add_", POINTWISE),
        ("aten::copy_", COPIES),
        ("aten::_to_copy", COPIES),
        ("aten::cat", COPIES),
        ("aten::view", OTHER),
    ],
)
def test_operators_are_known_by_their_names(name: str, part: str) -> None:
    """As torch's own library names them."""
    assert operator_part(name) == part


# --- the loop ----------------------------------------------------------------------


def test_the_loops_time_within_and_outside_steps() -> None:
    """Steps of 80, 80 and 60 ms begin at 0, 100 and 200 ms; outside are 20, 20 and 40 ms, the last before the end."""
    ticks = [Tick(0.0, 0.08, 8, 4), Tick(0.1, 0.18, 8, 4), Tick(0.2, 0.26, 4, 2)]
    host = host_of(ticks, ended_at=0.3, images_finished=2, steps=20)
    assert (host.ticks, host.images_finished) == (3, 2)
    assert host.seconds == pytest.approx(0.3)
    assert host.tick_ms == pytest.approx(100)
    assert host.step_ms == pytest.approx(80)
    assert host.outside_p50_ms == pytest.approx(20)
    assert host.outside_p95_ms == pytest.approx(38)
    assert host.outside_share == pytest.approx(80 / 300)
    assert host.rows == pytest.approx(20 / 3)
    assert host.images == pytest.approx(10 / 3)
    assert host.images_per_second == pytest.approx(10 / 20 / 0.3)


def test_a_window_without_steps_is_an_error() -> None:
    """A worker that never stepped has no figures."""
    with pytest.raises(ValueError, match="at least one step"):
        host_of([], 1.0, 0, 20)
