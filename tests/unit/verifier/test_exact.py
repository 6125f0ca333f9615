"""When equality is the test: one family of GPUs, the same software and kernels, in decode."""

from __future__ import annotations

import pytest

from fpforensics.verifier.exact import gpu_family


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA H100 NVL", "NVIDIA H100 PCIe", "NVIDIA H200"])
def test_hopper_is_one_family(name: str) -> None:
    assert gpu_family(name) == "H100"


def test_form_factors_of_an_a100_are_one_family_and_other_names_are_their_own() -> None:
    assert gpu_family("NVIDIA A100-SXM4-80GB") == gpu_family("NVIDIA A100-PCIE-40GB") == "A100"
    assert gpu_family("NVIDIA A10") == "NVIDIA A10"
    assert gpu_family("") == ""
