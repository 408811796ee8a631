"""The stream is Philox4x64-10 as its authors published it, and its numbers are sound normal ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
from edged_plugins.zeroth_order import _stream
from edged_plugins.zeroth_order._stream import key, normals, uniforms, words

MASK = (1 << 64) - 1
# Random123's known answers for "philox4x64 10": counter and key, low word first, and the four words.
PUBLISHED = [
    (
        [0, 0, 0, 0],
        [0, 0],
        [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B],
    ),
    (
        [MASK, MASK, MASK, MASK],
        [MASK, MASK],
        [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0],
    ),
    (
        [0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89],
        [0x452821E638D01377, 0xBE5466CF34E90C6C],
        [0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6],
    ),
]


def joined(parts: list[int]) -> int:
    return sum(part << 64 * i for i, part in enumerate(parts))


def philox(counter: int, key: int) -> list[int]:
    """The paper's ten rounds, in whole numbers."""
    c = [counter >> 64 * i & MASK for i in range(4)]
    k = [key & MASK, key >> 64]
    for _ in range(10):
        first, second = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [second >> 64 ^ c[1] ^ k[0], second & MASK, first >> 64 ^ c[3] ^ k[1], first & MASK]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED, ids=["zeros", "ones", "pi"])
def test_words_are_the_published_ones(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert words(joined(key), 4 * joined(counter), 4).tolist() == expected
    assert philox(joined(counter), joined(key)) == expected


def test_words_are_those_of_the_papers_rounds() -> None:
    stream = key(3, "direction 7")
    expected = [word for block in range(50) for word in philox(block, stream)]
    assert words(stream, 0, 200).tolist() == expected


@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 3), (3, 2), (4, 4), (5, 1000), (997, 3), (10, 0)])
def test_a_part_is_drawn_without_the_rest(first: int, count: int) -> None:
    whole = normals(5, 0, 2000)
    assert normals(5, first, count).tobytes() == whole[first : first + count].tobytes()


def test_a_part_far_out_is_as_quick_to_reach() -> None:
    at = 10**15 + 2
    assert words(9, at, 1).tolist() == [philox(at // 4, 9)[2]]


def test_a_normal_number_is_its_words_bits_less_32_over_4() -> None:
    expected = [(word.bit_count() - 32) / 4 for word in words(1, 0, 1000).tolist()]
    made = normals(1, 0, 1000)
    assert made.dtype == np.float32
    assert made.tolist() == expected


def test_these_are_the_numbers_of_seed_0_on_every_device() -> None:
    """For whoever draws them elsewhere, without this code."""
    stream = int.from_bytes(bytes.fromhex("dafad1f3bc4a4ec3c660b762829fd9c3"), "little")
    assert key(0, "direction 0") == stream
    assert normals(stream, 0, 8).tolist() == [-0.25, -0.5, 1.25, -1.25, -0.75, 1.25, -0.25, 1.0]


def test_bits_are_counted_alike_without_numpy_2() -> None:
    drawn = np.concatenate([words(2, 0, 10_000), np.array([0, MASK], np.uint64)])
    assert _stream._ones_by_halves(drawn).tolist() == [word.bit_count() for word in drawn.tolist()]


def test_moments_are_a_normal_numbers() -> None:
    """Within 5 standard errors of mean 0, variance 1, skewness 0 and kurtosis 3 - 2/64."""
    n = 1 << 20
    z = normals(key(0, "moments"), 0, n).astype(np.float64)
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs((z**2).mean() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - (3 - 2 / 64)) < 5 * math.sqrt(96 / n)


def test_values_come_as_often_as_sums_of_64_bits() -> None:
    n = 1 << 20
    bits = np.bincount((normals(key(1, "levels"), 0, n) * 4 + 32).astype(int), minlength=65)
    expected = np.array([math.comb(64, k) / 2**64 * n for k in range(65)])
    common = expected > 20
    chi2 = ((bits - expected)[common] ** 2 / expected[common]).sum()
    freedom = common.sum() - 1
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)


def test_seeds_and_neighbours_are_not_correlated() -> None:
    n = 1 << 16
    z = np.stack([normals(key(0, f"direction {s}"), 0, n) for s in range(12)])
    shifted = np.stack([z[0][lag : n - 16 + lag] for lag in range(16)])
    for rows in (z, shifted):
        off = np.corrcoef(rows.astype(np.float64)) - np.eye(len(rows))
        assert abs(off).max() < 5 / math.sqrt(n - 16)


def test_uniform_numbers_are_odd_multiples_and_even_over_minus_one_to_one() -> None:
    n = 1 << 18
    u = uniforms(key(0, "even"), 0, n).astype(np.float64)
    assert (u * 2**24 % 2 == 1).all()
    assert abs(u).max() < 1
    assert abs(u.mean()) < 5 / math.sqrt(3 * n)
    counts, _ = np.histogram(u, bins=64, range=(-1, 1))
    assert abs(((counts - n / 64) ** 2 / (n / 64)).sum() - 63) < 5 * math.sqrt(126)


def test_names_and_seeds_make_unlike_streams() -> None:
    keys = {key(seed, f"direction {s}") for seed in range(10) for s in range(100)}
    assert len(keys) == 1000
    assert key(1, "direction 1") == key(1, "direction 1")
