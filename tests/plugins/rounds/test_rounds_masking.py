"""Secure aggregation against the plain weighted mean; what is left of a member; who is refused what."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from edged_plugins._rounds import masks, shamir
from edged_plugins._rounds.fixed_point import FixedPoint
from edged_plugins._rounds.masking import Masker
from edged_plugins._rounds.masks import CHUNK, Terms, add_stream, default_threshold
from edged_plugins._rounds.unmasking import Unmasker

from edged import ConfigError, EdgedError, PolicyViolation, ProtocolError

CLIP, WEIGHT_MOST, VALUES = 4.0, 1000.0, 33
NOBODY: frozenset[int] = frozenset()


def entropy(seed: int) -> Callable[[int], bytes]:
    return np.random.default_rng(seed).bytes


def terms(
    members: int, values: int = VALUES, threshold: int = 0, context: bytes = b"job 1, round 1"
) -> Terms:
    fixed = FixedPoint(members, CLIP, WEIGHT_MOST)
    return Terms(tuple(range(members)), values, fixed, context, threshold)


class Group:
    """A server and its members, who go on step by step; the values are theirs."""

    def __init__(self, said: Terms) -> None:
        self.terms = said
        self.server = Unmasker(said)
        self.members = {rank: Masker(said, rank, entropy(rank)) for rank in said.cohort}
        rng = np.random.default_rng(99)
        shape = (len(said.cohort), said.values)
        self.values = rng.uniform(-CLIP, CLIP, shape).astype(np.float32)
        self.weights = rng.integers(1, int(WEIGHT_MOST), len(said.cohort)).astype(float)
        self.sent: dict[int, bytes] = {}

    def with_keys(self, ranks: Iterable[int]) -> dict[int, bytes]:
        for rank in ranks:
            self.server.add_keys(rank, self.members[rank].keys())
        return self.server.keys()

    def with_shares(self, ranks: Iterable[int], keys: dict[int, bytes]) -> None:
        for rank in ranks:
            self.server.add_shares(rank, self.members[rank].shares(keys))

    def masked(self, ranks: Iterable[int]) -> dict[int, bytes]:
        for rank in ranks:
            self.members[rank].accept(self.server.shares_for(rank))
            self.sent[rank] = self.members[rank].masked(self.values[rank], self.weights[rank])
        return self.sent

    def with_masked(self, ranks: Iterable[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        for rank in ranks:
            self.server.add_masked(rank, self.sent[rank])
        return self.server.outcome()

    def with_revealed(self, ranks: Iterable[int], story: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
        for rank in ranks:
            self.server.add_revealed(rank, self.members[rank].reveal(*story))

    def run(self, *gone: frozenset[int]) -> tuple[np.ndarray, float]:
        """gone: who is not heard from the steps keys, shares, masked and revealed on."""
        left = set(self.terms.cohort)
        steps = [left := left - dropped for dropped in (*gone, *[NOBODY] * (4 - len(gone)))]
        self.with_shares(steps[1], self.with_keys(steps[0]))
        self.masked(steps[1])
        self.with_revealed(steps[3], self.with_masked(steps[2]))
        return self.server.sum()

    def until_masked(self) -> Group:
        self.with_shares(self.terms.cohort, self.with_keys(self.terms.cohort))
        self.masked(self.terms.cohort)
        return self

    def mean(self, ranks: Sequence[int]) -> np.ndarray:
        return np.average(self.values[ranks].astype(np.float64), axis=0, weights=self.weights[ranks])


def assert_is_mean(group: Group, found: tuple[np.ndarray, float], ranks: Iterable[int]) -> None:
    ranks = sorted(ranks)
    mean, weight = found
    assert weight == group.weights[ranks].sum()
    bound = group.terms.fixed.error(weight) + 1e-14  # F64's own, in the oracle
    np.testing.assert_allclose(mean, group.mean(ranks), rtol=0, atol=bound)


# --- the sum --------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [3, 4, 7, 12, 20])
def test_the_server_gets_the_weighted_mean_and_the_sum_of_weights(members: int) -> None:
    group = Group(terms(members))
    assert_is_mean(group, group.run(), range(members))


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("members", [10, 20])
def test_a_sum_survives_three_tenths_that_leave_at_any_step(members: int, step: int) -> None:
    group = Group(terms(members))
    gone = frozenset(range(1, members, 3)[: 3 * members // 10])
    assert len(gone) == 3 * members // 10
    found = group.run(*[NOBODY] * step, gone)
    assert_is_mean(group, found, set(range(members)) - (gone if step < 3 else NOBODY))


def test_a_sum_survives_some_that_leave_at_every_step() -> None:
    group = Group(terms(20))
    found = group.run(frozenset({0}), frozenset({1, 19}), frozenset({7, 8}), frozenset({12}))
    assert_is_mean(group, found, set(range(20)) - {0, 1, 19, 7, 8})


@pytest.mark.parametrize("step", range(4))
def test_fewer_than_the_threshold_end_the_round_with_nothing_unmasked(step: int) -> None:
    group = Group(terms(7))
    assert group.terms.threshold == 5
    with pytest.raises(PolicyViolation) as refused:
        group.run(*[NOBODY] * step, frozenset({0, 2, 4}))
    assert refused.value.code == "mask-few"


def test_members_do_not_answer_a_server_that_has_too_few_left() -> None:
    group = Group(terms(7)).until_masked()
    with pytest.raises(PolicyViolation, match="at least 5"):
        group.members[0].reveal((4, 5, 6), (0, 1, 2, 3))


def test_the_order_of_arrival_changes_no_bit() -> None:
    means = set()
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        group = Group(terms(6))
        group.with_shares(range(6), group.with_keys(reversed(range(6))))
        group.masked([3, 1, 5, 0, 2, 4])
        group.with_revealed(order, group.with_masked(order))
        means.add(group.server.sum()[0].tobytes())
    assert len(means) == 1


def test_the_server_says_who_is_missing_at_every_step() -> None:
    group = Group(terms(4, threshold=3))
    keys = group.with_keys([0, 1, 2, 3])
    group.with_shares([0, 1], keys)
    assert group.server.missing() == (2, 3)
    group.with_shares([2, 3], keys)
    group.masked(range(4))
    for rank in (0, 3, 1):
        group.server.add_masked(rank, group.sent[rank])
    assert group.server.missing() == (2,)
    assert group.server.outcome() == ((2,), (0, 1, 3))
    assert group.server.missing() == (0, 1, 3)


# --- what is left of a member ---------------------------------------------------------------------


def chi_square(data: bytes) -> float:
    """Of the counts of bytes, against uniform ones: 255 on average, with a standard deviation of 23."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    expected = len(data) / 256
    return float(((counts - expected) ** 2 / expected).sum())


CHI_SQUARE_MOST = 255 + 5 * 23


def test_a_masked_message_looks_like_noise_and_its_values_do_not() -> None:
    group = Group(terms(3, values=40_000)).until_masked()
    for rank, sent in group.sent.items():
        plain, _ = group.terms.fixed.encode(group.values[rank], group.weights[rank])
        assert chi_square(sent) < CHI_SQUARE_MOST
        assert chi_square(plain.tobytes()) > 100 * CHI_SQUARE_MOST
        numbers = np.frombuffer(sent, "<i8")[:-1].astype(float)
        assert abs(np.corrcoef(numbers, group.values[rank])[0, 1]) < 5 / np.sqrt(40_000)
        assert not np.isin(np.frombuffer(sent, "<u8"), plain).any()


def test_values_that_arrive_after_their_member_was_called_dropped_stay_hidden() -> None:
    """Its pairwise masks are then known to the server; the mask of its seed is not."""
    group = Group(terms(4, values=40_000)).until_masked()
    group.with_revealed([0, 1, 2], group.with_masked([0, 1, 2]))
    left = np.frombuffer(group.sent[3], "<u8").copy()
    secret = group.server._secret_of(3)
    for other in (0, 1, 2):  # the member with the higher rank subtracted
        add_stream(left, masks.pair_key(group.terms, secret, 3, other, group.members[other].keys()))
    with pytest.raises(ProtocolError, match="not expected"):
        group.server.add_masked(3, group.sent[3])
    assert chi_square(left.tobytes()) < CHI_SQUARE_MOST
    add_stream(left, masks.own_key(group.terms, 3, group.members[3]._seed), is_minus=True)
    plain, _ = group.terms.fixed.encode(group.values[3], group.weights[3])
    assert (left == plain).all()  # and nothing but that mask was left


def test_a_second_round_of_the_same_values_sends_other_bytes() -> None:
    sent = []
    for seed in (0, 1):
        group = Group(terms(3))
        group.members = {rank: Masker(group.terms, rank, entropy(10 * seed + rank)) for rank in range(3)}
        sent.append(group.until_masked().sent[1])
    assert not np.isin(np.frombuffer(sent[0], "<u8"), np.frombuffer(sent[1], "<u8")).any()


def test_a_group_that_is_not_whole_does_not_pass_for_a_sum() -> None:
    """Members that were told unlike lists of who takes part add masks that nobody takes off."""
    group = Group(terms(4, threshold=3))
    group.with_shares(range(4), group.with_keys(range(4)))
    shares = group.server.shares_for(0)
    shares.pop(3)
    group.members[0].accept(shares)
    group.masked([1, 2, 3])
    group.sent[0] = group.members[0].masked(group.values[0], 1.0)
    story = group.with_masked(range(4))
    with pytest.raises(ProtocolError, match="itself among the latter"):
        group.members[0].reveal(*story)
    group.with_revealed([1, 2, 3], story)
    with pytest.raises(ProtocolError, match="a mask is left"):
        group.server.sum()


# --- a server that lies ---------------------------------------------------------------------------


def test_a_member_never_gives_both_kinds_of_share_of_another() -> None:
    group = Group(terms(7)).until_masked()
    member = group.members[0]
    with pytest.raises(PolicyViolation, match="both kinds") as refused:
        member.reveal((6,), (0, 1, 2, 3, 4, 5, 6))
    assert refused.value.code == "mask-both"
    told = member.reveal((6,), (0, 1, 2, 3, 4, 5))
    assert member.reveal((6,), (5, 4, 3, 2, 1, 0)) == told
    for story in (((), (0, 1, 2, 3, 4, 5, 6)), ((5, 6), (0, 1, 2, 3, 4))):
        with pytest.raises(PolicyViolation, match="both kinds"):
            member.reveal(*story)


def test_members_that_hear_different_stories_do_not_unmask_anybody_together() -> None:
    for told in range(8):  # so many hear that rank 6 dropped
        group = Group(terms(8)).until_masked()
        shares: dict[int, dict[int, bytes]] = {masks.SEED: {}, masks.SECRET: {}}
        for rank in (0, 1, 2, 3, 4, 5, 7):
            is_dropped = rank < told
            there = tuple(r for r in range(8) if r != 6 or not is_dropped)
            kind = masks.SECRET if is_dropped else masks.SEED
            shares[kind][rank + 1] = group.members[rank].reveal((6,) if is_dropped else (), there)[6]
        known = []
        for kind in shares.values():
            try:
                known.append(shamir.combine(kind, group.terms.threshold))
            except ProtocolError:
                continue
        assert len(known) <= 1


@pytest.mark.parametrize(
    ("dropped", "stayed"),
    [
        pytest.param((0,), (1, 2, 3, 4, 5, 6), id="the member itself"),
        pytest.param((), (0, 1, 2, 3, 4, 5), id="somebody neither"),
        pytest.param((7,), (0, 1, 2, 3, 4, 5, 6), id="a stranger"),
    ],
)
def test_a_member_answers_only_of_those_it_masked_with(dropped: Any, stayed: Any) -> None:
    group = Group(terms(7)).until_masked()
    with pytest.raises(ProtocolError) as refused:
        group.members[0].reveal(dropped, stayed)
    assert refused.value.code == "mask-step"


def test_shares_do_not_open_where_members_were_shown_unlike_keys() -> None:
    group = Group(terms(4, threshold=3))
    keys = group.with_keys(range(4))
    other = {**keys, 3: Masker(group.terms, 3, entropy(77)).keys()}
    group.with_shares([0], other)
    group.with_shares([1, 2, 3], keys)
    with pytest.raises(ProtocolError, match="shares of rank 0 do not open"):
        group.members[1].accept(group.server.shares_for(1))


def test_shares_of_another_round_do_not_open() -> None:
    group = Group(terms(4, threshold=3))
    keys = group.with_keys(range(4))
    late = Masker(terms(4, threshold=3, context=b"job 1, round 2"), 0, entropy(0))
    sealed = {rank: group.members[rank].shares(keys)[1] for rank in (1, 2, 3)}
    with pytest.raises(ProtocolError, match="rank 0 do not open"):
        group.members[1].accept({0: late.shares(keys)[1], **sealed})


@pytest.mark.parametrize("at", [0, 40, masks.DIGESTS_BYTES, masks.SEALED_BYTES - 1])
def test_shares_that_were_changed_on_the_way_do_not_open(at: int) -> None:
    group = Group(terms(3))
    group.with_shares(range(3), group.with_keys(range(3)))
    sealed = group.server.shares_for(0)
    changed = bytearray(sealed[2])
    changed[at] ^= 1
    with pytest.raises(ProtocolError, match="shares of rank 2 do not open"):
        group.members[0].accept({**sealed, 2: bytes(changed)})
    with pytest.raises(ProtocolError, match="shares of rank 2: expected 212 bytes, got 5"):
        group.members[0].accept({**sealed, 2: b"short"})


# --- members that lie, or err ---------------------------------------------------------------------


def test_a_false_share_is_refused_by_name_and_the_others_are_enough() -> None:
    group = Group(terms(7)).until_masked()
    story = group.with_masked(range(6))
    false = group.members[2].reveal(*story)
    false[6] = bytes(len(false[6]))
    with pytest.raises(ProtocolError, match="rank 2: its share of rank 6 is false"):
        group.server.add_revealed(2, false)
    group.with_revealed([0, 1, 3, 4, 5], story)
    assert_is_mean(group, group.server.sum(), range(6))


@pytest.mark.parametrize("is_there", [True, False])
def test_who_dealt_shares_of_something_else_is_named(is_there: bool) -> None:
    group = Group(terms(4, threshold=3))
    keys, liar, other = group.with_keys(range(4)), group.members[3], Masker(group.terms, 3, entropy(50))
    published = liar.keys()
    liar._seed, liar._masking = other._seed, other._masking
    liar.keys = lambda: published  # type: ignore[method-assign]
    group.with_shares(range(4), keys)
    group.masked(range(4))
    there = range(4) if is_there else range(3)
    group.with_revealed(there, group.with_masked(there))
    with pytest.raises(ProtocolError, match="what rank 3 dealt does not combine"):
        group.server.sum()


def test_a_key_that_nobody_can_agree_with_is_refused_by_the_server() -> None:
    group = Group(terms(3))
    keys = group.members[0].keys()
    with pytest.raises(ProtocolError, match="the key of rank 0 is none"):
        group.server.add_keys(0, keys[:32] + bytes(32) + keys[64:])
    assert group.server.missing() == (0, 1, 2)


WRONG_VALUES = [
    pytest.param(np.zeros(VALUES + 1, np.float32), 1.0, "mask-size", id="too many values"),
    pytest.param(np.zeros(VALUES, np.float64), 1.0, "mask-size", id="another type"),
    pytest.param(np.full(VALUES, np.nan, np.float32), 1.0, "update-nan", id="NaN"),
    pytest.param(np.full(VALUES, -np.inf, np.float32), 1.0, "update-nan", id="infinity"),
    pytest.param(np.zeros(VALUES, np.float32), 0.0, "update-weight", id="no weight"),
    pytest.param(np.zeros(VALUES, np.float32), float("nan"), "update-weight", id="a weight of NaN"),
    pytest.param(np.zeros(VALUES, np.float32), WEIGHT_MOST + 1, "update-weight", id="too large a weight"),
    pytest.param(np.zeros(VALUES, np.float32), 1e-9, "update-weight", id="too small a weight"),
]


@pytest.mark.parametrize(("values", "weight", "code"), WRONG_VALUES)
def test_a_member_does_not_mask_what_must_not_go_into_a_sum(values: Any, weight: float, code: str) -> None:
    group = Group(terms(3))
    group.with_shares(range(3), group.with_keys(range(3)))
    member = group.members[0]
    member.accept(group.server.shares_for(0))
    with pytest.raises(EdgedError) as refused:
        member.masked(values, weight)
    assert refused.value.code == code
    assert member.masked(group.values[0], 1.0)  # the member may still send what is right


def test_a_member_masks_once() -> None:
    group = Group(terms(3)).until_masked()
    with pytest.raises(PolicyViolation, match="once"):
        group.members[0].masked(group.values[0], 1.0)


WRONG_KEYS: list[Any] = [
    pytest.param(lambda keys: {**keys, 0: keys[1]}, id="one's own are others"),
    pytest.param(lambda keys: {rank: keys[rank] for rank in (1, 2, 3)}, id="one's own are missing"),
    pytest.param(lambda keys: {**keys, 2: keys[1]}, id="two are the same"),
    pytest.param(lambda keys: {**keys, 2: keys[2][:-1]}, id="too short"),
    pytest.param(lambda keys: {**keys, 9: keys[2]}, id="of a stranger"),
]


@pytest.mark.parametrize("wrong", WRONG_KEYS)
def test_a_member_deals_no_shares_for_keys_that_cannot_be(wrong: Callable[[Any], Any]) -> None:
    group = Group(terms(4, threshold=3))
    with pytest.raises(ProtocolError) as refused:
        group.members[0].shares(wrong(group.with_keys(range(4))))
    assert refused.value.code == "mask-keys"


def test_a_server_hears_each_member_once_in_its_step_and_nobody_else() -> None:
    group = Group(terms(3))
    server = group.server
    with pytest.raises(ProtocolError, match="now: 'keys'"):
        server.add_masked(0, b"")
    with pytest.raises(ProtocolError, match="has not begun"):
        server.outcome()
    with pytest.raises(ProtocolError, match="rank 3 is not expected"):
        server.add_keys(3, group.members[0].keys())
    with pytest.raises(ProtocolError, match="96 bytes, got 5"):
        server.add_keys(0, b"short")
    keys = group.with_keys(range(3))
    with pytest.raises(ProtocolError, match="now: 'shares'"):
        server.add_keys(0, group.members[0].keys())
    dealt = group.members[0].shares(keys)
    with pytest.raises(ProtocolError, match="for each member with keys"):
        server.add_shares(0, {rank: dealt[rank] for rank in (0, 1)})
    server.add_shares(0, dealt)
    group.with_shares([1, 2], keys)
    group.masked(range(3))
    with pytest.raises(ProtocolError, match="expected 272 bytes, got 271"):
        server.add_masked(0, group.sent[0][:-1])
    server.add_masked(0, group.sent[0])
    with pytest.raises(ProtocolError, match="heard in the step 'masked' before"):
        server.add_masked(0, group.sent[0])
    with pytest.raises(ProtocolError, match="who dropped before the sum"):
        server.sum()
    group.with_revealed(range(3), group.with_masked([1, 2]))
    assert_is_mean(group, server.sum(), range(3))


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda: terms(2), id="two members"),
        pytest.param(lambda: terms(4, threshold=2), id="a threshold of half"),
        pytest.param(lambda: terms(4, threshold=5), id="a threshold above all"),
        pytest.param(lambda: terms(4, values=0), id="no values"),
        pytest.param(lambda: Terms((0, 1, 1), 1, FixedPoint(3, 1, 1), b""), id="a rank twice"),
        pytest.param(lambda: Terms((0, 1, 2), 1, FixedPoint(2, 1, 1), b""), id="more than fit"),
        pytest.param(lambda: FixedPoint(3, 0.0, 1), id="no clip"),
        pytest.param(lambda: FixedPoint(3, 1.0, float("inf")), id="an endless weight"),
        pytest.param(lambda: FixedPoint(3, 1e10, 1), id="a clip that leaves no bits"),
        pytest.param(lambda: FixedPoint(0, 1.0, 1), id="nobody"),
        pytest.param(lambda: Masker(terms(3), 3), id="a rank outside"),
    ],
)
def test_terms_that_protect_nobody_or_do_not_fit_are_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        wrong()


def test_three_tenths_may_always_leave() -> None:
    for members in range(3, 500):
        threshold = default_threshold(members)
        assert 2 * threshold > members
        assert threshold <= members - 3 * members // 10


def test_what_different_stories_could_sum_is_a_group() -> None:
    """Whoever is outside the sum was called dropped by a threshold of members, each of whom lets it call but
    n - t so."""
    for n in range(3, 500):
        least = [n - n * (n - t) // t for t in range(n // 2 + 1, n + 1)]
        assert min(least) >= 2
        t = default_threshold(n)
        smallest = n - n * (n - t) // t
        assert smallest == t if n < 10 else 2 * smallest > n


# --- fixed point ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "clip", "weight_most"), [(20, 4.0, 1000.0), (3, 1e-3, 7.5), (1000, 100.0, 1e6)]
)
def test_the_largest_sums_do_not_wrap_around(members: int, clip: float, weight_most: float) -> None:
    fixed = FixedPoint(members, clip, weight_most)
    total = np.zeros(3, np.uint64)
    for _ in range(members):
        total += fixed.encode(np.array([clip, -clip], np.float32), weight_most)[0]
    mean, weight = fixed.decode(total)
    assert mean.tolist() == [fixed.clip, -fixed.clip]
    assert weight == pytest.approx(members * weight_most, rel=2.0**-28)


def test_an_encoded_value_is_the_nearest_integer() -> None:
    fixed = FixedPoint(20, 4.0, 1000.0)
    values = np.random.default_rng(1).uniform(-4, 4, 1000).astype(np.float32)
    for weight in (1.0, 999.0, 0.5, 123.25):
        encoded, clipped = fixed.encode(values, weight)
        units = int(weight * 2**fixed.weight_bits)
        exact = [round(int(float(x) * 2**60) * units / 2 ** (60 - fixed.value_bits)) for x in values[:50]]
        assert encoded.view(np.int64)[:50].tolist() == exact
        assert (encoded[-1], clipped) == (units, 0)


def test_values_beyond_the_clip_are_cut_and_counted() -> None:
    group = Group(terms(3, values=4))
    group.values[:] = np.array([5.0, -1e30, 4.0, 1.0], np.float32)
    mean, _ = group.run()
    assert mean.tolist() == [4.0, -4.0, 4.0, 1.0]
    assert [member.clipped for member in group.members.values()] == [2, 2, 2]


def test_the_error_of_fixed_point_is_far_below_that_of_f32() -> None:
    assert FixedPoint(20, 4.0, 1000.0).error(2000.0) < 2.0**-52
    assert FixedPoint(1000, 100.0, 1e6).error(1000.0) < 2.0**-24


# --- its parts ------------------------------------------------------------------------------------


def test_any_threshold_of_shares_gives_the_secret_and_no_fewer() -> None:
    assert pow(3, shamir.PRIME - 1, shamir.PRIME) == 1
    for secret in (bytes(32), b"\xff" * 32, entropy(5)(32)):
        shares = shamir.split(secret, [1, 2, 5, 9, 1000], 3, entropy(1))
        for chosen in itertools.combinations(shares, 3):
            assert shamir.combine({point: shares[point] for point in chosen}, 3) == secret
        with pytest.raises(ProtocolError, match="expected 3 shares, got 2"):
            shamir.combine({1: shares[1], 2: shares[2]}, 3)
        with pytest.raises(ProtocolError, match="do not combine"):
            shamir.combine({1: shares[1], 2: shares[2], 3: shares[5]}, 3)
        with pytest.raises(ProtocolError, match="no share"):
            shamir.combine({1: shares[1], 2: shares[2], 5: b"\xff" * 66}, 3)


def test_fewer_shares_than_the_threshold_fit_every_secret() -> None:
    """Two of three points, and any value at 0: there is a polynomial of degree 2 through them."""
    shares = shamir.split(entropy(5)(32), [1, 2, 3], 3, entropy(1))
    a, b = (int.from_bytes(shares[point], "big") for point in (1, 2))
    for secret in (0, 12345):
        third = (secret - 3 * a + 3 * b) % shamir.PRIME  # Lagrange at 0: 3 f(1) - 3 f(2) + f(3)
        found = shamir.combine({1: shares[1], 2: shares[2], 3: third.to_bytes(66, "big")}, 3)
        assert int.from_bytes(found, "big") == secret


@pytest.mark.parametrize(
    ("points", "threshold", "size"), [([1, 1, 2], 2, 32), ([0, 1], 2, 32), ([1, 2], 3, 32), ([1, 2], 2, 31)]
)
def test_a_secret_is_not_split_in_a_way_that_loses_it(points: list[int], threshold: int, size: int) -> None:
    with pytest.raises(ConfigError):
        shamir.split(bytes(size), points, threshold, entropy(0))


def test_the_stream_is_that_of_rfc_8439() -> None:
    """Its appendix A.1, the first vector: key, nonce and counter of zeros."""
    total = np.zeros(8, np.uint64)
    add_stream(total, bytes(32))
    assert total.astype("<u8").tobytes() == bytes.fromhex(
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    )


def test_a_stream_longer_than_a_piece_goes_on_and_is_taken_off_again() -> None:
    key, size = entropy(3)(32), 2 * CHUNK + 5
    total = np.arange(size, dtype=np.uint64)
    add_stream(total, key)
    begun = np.arange(CHUNK + 1, dtype=np.uint64)
    add_stream(begun, key)
    assert (total[: CHUNK + 1] == begun).all()
    assert len(np.unique(total)) == size
    add_stream(total, key, is_minus=True)
    assert (total == np.arange(size)).all()
