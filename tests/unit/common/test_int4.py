"""Int4 layouts: eight levels to an int32 and back, for AWQ, GPTQ and compressed-tensors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fpforensics.common.int4 import (
    AWQ_ORDER,
    IN_ORDER,
    Levels,
    pack_awq,
    pack_compressed,
    pack_gptq,
    pack_nibbles,
    unpack_awq,
    unpack_gptq,
    unpack_nibbles,
)

LEVELS = st.tuples(st.integers(1, 5), st.integers(1, 4)).flatmap(
    lambda shape: arrays(np.int32, (shape[0], 8 * shape[1]), elements=st.integers(0, 15))
)


@given(LEVELS, st.sampled_from([IN_ORDER, AWQ_ORDER]))
def test_nibbles_round_trip(levels: Levels, order: tuple[int, ...]) -> None:
    packed = pack_nibbles(levels, order)
    assert packed.dtype == np.int32
    assert packed.shape == (levels.shape[0], levels.shape[1] // 8)
    np.testing.assert_array_equal(unpack_nibbles(packed, order), levels)


def test_nibbles_lie_where_the_kernels_look() -> None:
    levels = np.arange(8, 16, dtype=np.int32)[None]
    assert pack_nibbles(levels).view(np.uint32)[0, 0] == 0xFEDCBA98
    # AutoAWQ: nibble 1 holds column 2, nibble 4 holds column 1
    assert pack_nibbles(levels, AWQ_ORDER).view(np.uint32)[0, 0] == 0xFDB9ECA8


@given(st.integers(0, 2**32 - 1), st.sampled_from([16, 32]))
def test_formats_round_trip(seed: int, group: int) -> None:
    draw = np.random.default_rng(seed)
    outputs, inputs = 16, 64
    levels = draw.integers(0, 16, (outputs, inputs)).astype(np.int32)
    zeros = draw.integers(0, 16, (outputs, inputs // group)).astype(np.int32)
    scales = draw.random((outputs, inputs // group)).astype(np.float16).astype(np.float32)

    awq = pack_awq(levels, zeros, scales)
    assert {name: array.shape for name, array in awq.items()} == {
        "qweight": (inputs, outputs // 8),
        "qzeros": (inputs // group, outputs // 8),
        "scales": (inputs // group, outputs),
    }
    wide = np.repeat(scales, group, axis=1)
    np.testing.assert_array_equal(unpack_awq(awq), (levels - np.repeat(zeros, group, axis=1)) * wide)

    gptq = pack_gptq(levels - 8, scales)
    assert {name: array.shape for name, array in gptq.items()} == {
        "qweight": (inputs // 8, outputs),
        "qzeros": (inputs // group, outputs // 8),
        "scales": (inputs // group, outputs),
        "g_idx": (inputs,),
    }
    assert set(gptq["qzeros"].ravel().view(np.uint32).tolist()) == {0x77777777}
    np.testing.assert_array_equal(unpack_gptq(gptq), (levels - 8) * wide)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"g_idx": np.full(64, -1, np.int32)}, "g_idx names group -1; scales holds 2 groups"),
        ({"g_idx": np.full(64, 2, np.int32)}, "g_idx names group 2; scales holds 2 groups"),
        ({"g_idx": np.zeros(1, np.int32)}, r"g_idx has shape \(1,\) for 64 inputs"),
        ({"scales": np.ones((1, 16), np.float16)}, r"qzeros is of shape \(16, 2\), scales \(16, 1\), for 16 outputs"),
        ({"scales": np.ones((2, 8), np.float16)}, r"scales \(8, 2\), for 16 outputs"),
    ],
)
def test_malformed_gptq_is_refused(changed: dict[str, np.ndarray], said: str) -> None:
    sound = pack_gptq(np.zeros((16, 64), np.int32), np.ones((16, 2), np.float32))
    assert unpack_gptq(sound | {"g_idx": sound["g_idx"][::-1]}).shape == (16, 64)
    if "scales" in changed:
        sound["g_idx"] = np.zeros(64, np.int32)
    with pytest.raises(ValueError, match=said):
        unpack_gptq(sound | changed)


@pytest.mark.parametrize("groups", [0, 3, 65, 128])
def test_malformed_awq_is_refused(groups: int) -> None:
    sound = pack_awq(np.zeros((16, 64), np.int32), np.zeros((16, 2), np.int32), np.ones((16, 2), np.float32))
    sound |= {"qzeros": np.zeros((groups, 2), np.int32), "scales": np.ones((groups, 16), np.float16)}
    with pytest.raises(ValueError, match=f"scales holds {groups} groups, which do not divide 64 inputs"):
        unpack_awq(sound)


def test_compressed_tensors_reads_ours() -> None:
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason="pip install compressed-tensors==0.17.0"
    )
    levels = np.random.default_rng(0).integers(-8, 8, (24, 64)).astype(np.int32)
    ours = pack_compressed(levels, np.ones((24, 2), np.float32))
    assert ours["weight_shape"].tolist() == [24, 64]
    back = helpers.unpack_from_int32(torch.from_numpy(ours["weight_packed"]), 4, torch.Size((24, 64)))
    np.testing.assert_array_equal(back.numpy(), levels)
