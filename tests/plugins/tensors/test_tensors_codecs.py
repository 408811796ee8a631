"""Wire codecs against their definition in numpy: values, bytes, error feedback, and hostile frames."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the train extra is not installed")

from edged_plugins._codec_sizes import CODECS, ada_ratios, kept, payload_bytes  # noqa: E402
from edged_plugins._tensors.codecs import RESIDUALS_MOST, Codec, make  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from edged import ConfigError, ProtocolError  # noqa: E402

SHAPES = [(1,), (7,), (3, 5), (2, 4, 64), (2, 1, 1)]
RATIOS = [1.0, 1.5, 2.0, 3.0, 10.0, 1000.0]
ALL = [(name, ratio) for name in CODECS for ratio in (RATIOS if "topk" in name else [1.0])]
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32))


def there_and_back(codec: Codec, x: torch.Tensor, key: str = "") -> torch.Tensor:
    """Through bytes, as a channel carries them."""
    header, frames = codec.encode(x, key)
    return make(codec.name, codec.ratio).decode(header, [bytes(frame) for frame in frames], tuple(x.shape))


# --- what numpy says ---------------------------------------------------------------------------------


def int8_of(x: np.ndarray) -> np.ndarray:
    scale = (np.abs(x).max(-1, keepdims=True) / np.float32(127)).astype(np.float32)
    scale[scale == 0] = 1
    return (np.rint(x / scale) * scale).astype(np.float32)


def topk_of(x: np.ndarray, k: int, kind: type) -> np.ndarray:
    """The first k of a stable sort, the rest zero."""
    flat, out = x.reshape(-1), np.zeros(x.size, np.float32)
    first = np.argsort(-np.abs(flat), kind="stable")[:k]
    out[first] = flat[first].astype(kind)
    return out.reshape(x.shape)


def by_numpy(name: str, x: np.ndarray, ratio: float) -> np.ndarray:
    k = math.ceil(x.size / ratio)
    return {
        "f32": lambda: x,
        "f16": lambda: x.astype(np.float16).astype(np.float32),
        "int8": lambda: int8_of(x),
        "topk": lambda: topk_of(x, k, np.float32),
        "topk-f16": lambda: topk_of(x, k, np.float16),
        "adatopk": lambda: topk_of(x, k, np.float32) if 2 * k < x.size else x,
    }[name]()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "ratio"), ALL)
def test_a_codec_computes_its_definition(name: str, ratio: float, shape: Sequence[int]) -> None:
    x = random(*shape, seed=len(shape))
    assert (there_and_back(make(name, ratio), x).numpy() == by_numpy(name, x.numpy(), ratio)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "ratio"), ALL)
def test_bytes_are_what_the_planner_counts(name: str, ratio: float, shape: Sequence[int]) -> None:
    _, frames = make(name, ratio).encode(random(*shape))
    assert sum(len(bytes(frame)) for frame in frames) == payload_bytes(name, shape, ratio)
    assert all(frame.contiguous for frame in frames)


@pytest.mark.parametrize(
    ("name", "ratio", "expected"),
    [
        ("f32", 1, 1_179_648),  # 4 x 128 x 576 values
        ("f16", 1, 589_824),
        ("int8", 1, 294_912 + 4 * 512),
        ("topk", 100, 2950 * 8),
        ("topk-f16", 100, 2950 * 6),
        ("adatopk", 100, 2950 * 8),
        ("adatopk", 1.9, 1_179_648),
        ("topk", 1, 2 * 1_179_648),
    ],
)
def test_bytes_of_a_batch_of_smollm2(name: str, ratio: float, expected: int) -> None:
    assert payload_bytes(name, (4, 128, 576), ratio) == expected


@pytest.mark.parametrize("name", CODECS)
def test_any_layout_of_a_tensor_and_any_float_travels(name: str) -> None:
    x = random(4, 6).requires_grad_()
    for seen in (x, x.t(), x[:, ::2], x.double(), x.bfloat16()):
        got = there_and_back(make(name), seen)
        assert not got.requires_grad
        assert (got == there_and_back(make(name), seen.detach().float().contiguous().clone())).all()


@pytest.mark.parametrize("name", CODECS)
def test_what_is_decoded_has_memory_of_its_own(name: str) -> None:
    x = random(2, 8)
    header, frames = make(name).encode(x)
    buffers = [bytearray(frame) for frame in frames]
    got = make(name).decode(header, buffers, (2, 8))
    before = got.clone()
    for buffer in buffers:
        buffer[:] = bytes(len(buffer))
    assert (got == before).all()
    got += 1  # and may be written to


@given(st.lists(FLOATS, min_size=1, max_size=40))
def test_int8_errs_by_half_its_scale_at_most(values: list[float]) -> None:
    x = torch.tensor([values])
    scale = x.abs().max().double() / 127
    error = (there_and_back(make("int8"), x).double() - x).abs().max()
    assert error <= scale / 2 * (1 + 1e-5) + np.finfo(np.float32).tiny / 2


def test_int8_rounds_ties_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert there_and_back(make("int8"), x).tolist() == [[127.0, 0.0, 2.0, 2.0, 0.0, -2.0]]


def test_half_precision_of_single_values_keeps_what_it_cannot_reach_finite() -> None:
    x = torch.tensor([1e6, -1e6, 65504.0])
    assert there_and_back(make("topk-f16"), x).tolist() == [65504.0, -65504.0, 65504.0]


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-8, 1.0, 1e6, 1e38])
def test_half_precision_has_eleven_bits_whatever_the_size_of_a_tensor(size: float) -> None:
    """Relative to each value down to 2^-28 of the largest: half a unit in the last of 11 bits; and to what
    F32 itself has of the smallest."""
    spread = torch.tensor([1.0, -0.7, 0.1, 1e-3, -1e-6], dtype=torch.float64) * size
    x = spread.float()
    error = (there_and_back(make("f16"), x).double() - x.double()).abs()
    assert (error <= x.double().abs() * 2.0**-11 + 2.0**-150).all()


def test_gradients_of_1e_8_arrive_in_half_precision() -> None:
    x = 1e-8 * random(4, 64)
    got = there_and_back(make("f16"), x)
    assert (got - x).norm() < 1e-3 * x.norm()
    assert (got != 0).all()


@given(st.lists(FLOATS, min_size=1, max_size=8), st.integers(-60, 20))
def test_a_power_of_two_passes_half_precision_exactly(values: list[float], exponent: int) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    x = torch.where(x.abs() < 2.0**-40, 0, x)  # so that no product is below F32's normal range
    scaled = there_and_back(make("f16"), x * 2.0**exponent)
    assert (scaled == there_and_back(make("f16"), x) * 2.0**exponent).all()


def test_an_infinity_in_half_precision_stays_one_and_harms_no_other() -> None:
    got = there_and_back(make("f16"), torch.tensor([[1.0, math.inf], [-math.inf, 0.25]]))
    assert got.tolist() == [[1.0, math.inf], [-math.inf, 0.25]]


@pytest.mark.parametrize("exponent", [None, True, 1.0, "1", -165, 114, 2**40])
def test_an_exponent_that_no_tensor_has_is_refused(exponent: Any) -> None:
    header, frames = make("f16").encode(random(2, 8))
    with pytest.raises(ProtocolError, match="exponent"):
        make("f16").decode({**header, "e": exponent}, frames, (2, 8))


@pytest.mark.parametrize(("name", "ratio"), ALL)
def test_nan_arrives_as_nan(name: str, ratio: float) -> None:
    """A run that has gone wrong must be seen to have, at both ends."""
    x = random(2, 8)
    x[1, 3] = math.nan
    assert there_and_back(make(name, ratio), x).isnan().any()


@given(st.lists(FLOATS, min_size=1, max_size=8), st.integers(1, 8))
def test_no_sparse_vector_is_nearer_than_top_k(values: list[float], ratio: int) -> None:
    x = np.array(values, np.float32)
    k = math.ceil(len(x) / ratio)
    got = there_and_back(make("topk", ratio), torch.from_numpy(x)).numpy()
    error = ((x - got).astype(np.float64) ** 2).sum()
    # the nearest vector on given places is x there: all choices of k places
    errors = [
        (np.delete(x, places).astype(np.float64) ** 2).sum()
        for places in itertools.combinations(range(len(x)), k)
    ]
    assert error <= min(errors) * (1 + 1e-12)
    assert np.count_nonzero(got) <= k


# --- error feedback ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.0, 3.0, 50.0])
@pytest.mark.parametrize("name", ["topk", "topk-f16"])
def test_what_was_sent_and_what_is_kept_back_are_all_there_was(name: str, ratio: float) -> None:
    """Exactly: multiples of 1/8 below 2^10 add up without rounding."""
    codec, drawn = make(name, ratio), np.random.default_rng(1)
    true, sent = torch.zeros(5, 11), torch.zeros(5, 11)
    for _ in range(40):
        x = torch.from_numpy((drawn.integers(-64, 65, (5, 11)) / 8).astype(np.float32))
        true += x
        sent += there_and_back(codec, x, "up 0")
    (residual,) = codec.state_dict().values()
    assert (sent + residual == true).all()


def test_what_half_precision_rounds_away_is_sent_later() -> None:
    codec = make("topk-f16", 1.0)
    x = torch.tensor([1 + 2**-12, 1e6])  # neither is an F16
    sent = sum(there_and_back(codec, x, "a") for _ in range(4))
    (residual,) = codec.state_dict().values()
    assert (sent + residual == 4 * x).all()


def test_keys_and_shapes_have_residuals_of_their_own() -> None:
    codec, x = make("topk", 4.0), random(2, 8)
    first = there_and_back(codec, x, "a")
    assert (there_and_back(codec, x, "b") == first).all()
    assert (there_and_back(codec, x[:1], "a") == there_and_back(make("topk", 4.0), x[:1])).all()
    assert not (there_and_back(codec, x, "a") == first).all()


def test_without_a_key_nothing_is_kept() -> None:
    codec, x = make("topk", 4.0), random(2, 8)
    assert (there_and_back(codec, x) == there_and_back(codec, x)).all()
    assert codec.state_dict() == {}


def test_a_resumed_run_sends_the_same_bits() -> None:
    steps = [(random(2, 8, seed=seed), f"slot {seed % 3}") for seed in range(12)]
    whole, begun = make("topk", 4.0), make("topk", 4.0)
    expected = [there_and_back(whole, *step) for step in steps]
    for step in steps[:6]:
        begun.encode(*step)
    resumed = make("topk", 4.0)
    resumed.load_state_dict(
        {name: kept_back.clone() for name, kept_back in sorted(begun.state_dict().items())}
    )
    got = [there_and_back(resumed, *step) for step in steps[6:]]
    assert all((one == other).all() for one, other in zip(got, expected[6:], strict=True))
    assert list(resumed.state_dict()) == list(whole.state_dict())


@pytest.mark.parametrize("most", [3, RESIDUALS_MOST])
def test_residuals_are_bounded_and_the_oldest_goes(most: int) -> None:
    codec = make("topk", 4.0, most)
    for key in range(most):
        codec.encode(random(4), f"k{key}")
    codec.encode(random(4), "k0")
    codec.encode(random(4), "new")
    keys = {name.partition(" ")[2] for name in codec.state_dict()}
    assert keys == {"new", *(f"k{key}" for key in range(most))} - {"k1"}


@pytest.mark.parametrize("name", ["f32", "f16", "int8"])
def test_a_codec_that_keeps_nothing_refuses_anothers_residuals(name: str) -> None:
    make(name).load_state_dict(make(name).state_dict())
    with pytest.raises(ConfigError, match="residuals"):
        make(name).load_state_dict({"000000 a": torch.zeros(2)})


# --- ratios of links --------------------------------------------------------------------------------


def test_ratios_follow_the_published_formula() -> None:
    times = {"fast": 0.01, "middle": 0.5, "slow": 1.0}
    assert ada_ratios(times, 10.0) == {"fast": 1.0, "middle": 15.0, "slow": 30.0}
    assert ada_ratios(times, 10.0, 1.0) == {"fast": 1.0, "middle": 5.0, "slow": 10.0}


@given(
    st.dictionaries(st.integers(0, 9), st.floats(0, 1e6), max_size=8),
    st.floats(1, 1e4),
    st.integers(1, 5000),
)
def test_no_link_is_slower_for_being_compressed(times: dict[int, float], r: float, n: int) -> None:
    ratios = ada_ratios(times, r)
    assert set(ratios) == set(times)
    for ratio in ratios.values():
        assert ratio >= 1
        assert payload_bytes("adatopk", (n,), ratio) <= payload_bytes("f32", (n,))
        assert ratio <= 3 * r * (1 + 1e-12)
    if any(times.values()) and n > 6 * r:
        slowest = max(times, key=times.__getitem__)
        assert payload_bytes("adatopk", (n,), ratios[slowest]) < payload_bytes("f32", (n,))


def test_a_ratio_of_one_is_lossless() -> None:
    x = random(3, 17)
    assert (there_and_back(make("adatopk", 1.0), x) == x).all()


@pytest.mark.parametrize("ratio", [0.99, 0.0, -1.0, math.inf, math.nan])
def test_a_ratio_below_one_is_refused(ratio: float) -> None:
    for use in (lambda: make("topk", ratio), lambda: ada_ratios({}, ratio), lambda: kept(5, ratio)):
        with pytest.raises(ConfigError, match="ratio"):
            use()


@pytest.mark.parametrize("time", [-1.0, math.inf, math.nan])
def test_a_link_without_a_time_is_named(time: float) -> None:
    with pytest.raises(ConfigError, match="link pi"):
        ada_ratios({"pi": time}, 2.0)


@pytest.mark.parametrize("use", [make, lambda name: payload_bytes(name, (2, 2))])
def test_an_unknown_codec_is_named(use: Any) -> None:
    with pytest.raises(ConfigError, match="no codec 'zip'; there are f32, f16"):
        use("zip")


@pytest.mark.parametrize(
    "x", [torch.zeros(3, dtype=torch.int64), torch.tensor(1.0), torch.zeros(0, 4)], ids=str
)
def test_only_rows_of_floats_are_encoded(x: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="float tensor"):
        make("f32").encode(x)


# --- hostile peers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "ratio"), ALL)
def test_what_does_not_fit_is_refused(name: str, ratio: float) -> None:
    codec = make(name, ratio)
    header, frames = codec.encode(random(2, 8))
    kept_whole = [bytes(frame) for frame in frames]
    assert codec.decode(header, kept_whole, (2, 8)).shape == (2, 8)
    attacks = [
        ({}, kept_whole, (2, 8)),
        ({**header, "codec": "zip"}, kept_whole, (2, 8)),
        ({**header, "more": 1}, kept_whole, (2, 8)),
        ({**header, "shape": [2, 9]}, kept_whole, (2, 8)),
        ({**header, "shape": None}, kept_whole, (2, 8)),
        (header, kept_whole, (8, 2)),
        (header, [], (2, 8)),
        (header, [*kept_whole, b""], (2, 8)),
        (header, [kept_whole[0][:-1], *kept_whole[1:]], (2, 8)),
        (header, [kept_whole[0] + b"\0", *kept_whole[1:]], (2, 8)),
        (header, [*kept_whole[:-1], b""], (2, 8)),
    ]
    attacks += [
        ({**header, "shape": list(bad)}, kept_whole, bad) for bad in ((), (0, 8), (-2, -8), (2**40, 8))
    ]
    attacks += [({**header, "shape": list(bad)}, kept_whole, bad) for bad in ((True, 8), (2.0, 8), ("2", 8))]
    if "k" in header:
        attacks.append(({**header, "k": header["k"] + 1}, kept_whole, (2, 8)))
    for attack in attacks:
        with pytest.raises(ProtocolError):
            codec.decode(*attack)


@pytest.mark.parametrize("indices", [(-1, 2), (2, 16), (5, 5), (6, 2), (-(2**31), 2**31 - 1)], ids=str)
@pytest.mark.parametrize("name", ["topk", "topk-f16", "adatopk"])
def test_indices_that_do_not_rise_within_the_tensor_are_refused(name: str, indices: tuple[int, int]) -> None:
    codec = make(name, 8.0)
    header, (_, values) = codec.encode(random(2, 8))
    with pytest.raises(ProtocolError, match="indices"):
        codec.decode(header, [struct.pack("<2i", *indices), values], (2, 8))
