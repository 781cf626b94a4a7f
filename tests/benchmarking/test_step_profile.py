"""Test the kinds of kernels and the time without any kernel."""

from __future__ import annotations

import pytest

from cogflow.benchmarking import step_profile


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x64", "attention"),
        ("nvjet_sm90_tst_192x192_64x3_1x2_h_bz_coopB_NTN", "linear layers"),
        ("aten::addmm", "linear layers"),
        ("void at::native::multi_tensor_apply_kernel<...FusedAdamMathFunctor", "optimizer"),
        ("triton_red_fused_gelu_gelu_backward_sum_view_5", "compiled"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::reduce_kernel<128, 4>", step_profile.OTHER),
    ],
)
def test_a_kernel_has_the_kind_of_its_name(name: str, kind: str) -> None:
    assert step_profile.kind_of(name) == kind


def test_the_union_of_spans_is_measured() -> None:
    assert step_profile.covered_length([(3, 5), (0, 2), (1, 4), (7, 8)]) == 6
    assert step_profile.covered_length([]) == 0
