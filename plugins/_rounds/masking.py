"""Secure aggregation: a server learns the weighted mean of its members' values, and no member's own.

After Bonawitz et al. 2017 ("Practical secure aggregation for privacy-preserving machine learning", CCS), with
double masks. Each two members agree on a key (X25519); what it expands to is added by the one of lower rank
and subtracted by the other, so that it is gone from the sum. Each member adds one more mask, of a seed of its
own. The seed, and the secret of its pairwise keys, are shared among all (Shamir). Of a member that sent its
values the others give up shares of the seed; of one that did not, shares of the secret, which takes its
pairwise masks out of the others' values. Never both: both would unmask it.

The steps, and what travels (bytes; n members, v values):

    Masker                                        Unmasker
    keys()            -> 96                       add_keys(rank, keys);     keys() -> all
    shares(keys)      -> 212 for each             add_shares(rank, sealed); shares_for(rank) -> those for it
    accept(sealed), masked(values, weight)
                      -> 8 (v + 1)                add_masked(rank, masked); outcome() -> dropped, stayed
    reveal(dropped, stayed) -> 66 for each        add_revealed(rank, shares); sum() -> mean, weight

`Unmasker.missing()` says at every step who has not been heard in it; the loop decides how long it waits.

What holds, with a threshold t of n members:
- at any step members may leave while t are left; fewer, and the round ends with nothing learnt
  (PolicyViolation).
- a server that follows the steps learns the mean of at least t members' values and the sum of their weights.
- a server that tells members different stories of who dropped gets no member's own values either: for both
  kinds of share it would need 2 t members, and t is above n / 2. What it can get at worst, if no member sides
  with it, is the sum of n - floor(n (n - t) / t) members, since each lets it call n - t members dropped: of
  half of them with the default threshold, floor(2 n / 3) + 1. (The paper's members sign who stayed, and so
  tell one story even if a third of them side with the server. Here they do not.)
- shares that a member gives falsely are found by their digests, and shares that were dealt falsely by the
  published key and the commitment of the seed; both name the member.

What does not, and what the caller must see to:
- keys must come over each member's own connection. A server that relays them could put in its own.
- nobody can look at a masked value: a member can spoil the mean with any numbers. Values beyond the clip are
  cut by an honest member only. Sums of unlike groups of the same values tell the difference: once a member
  has revealed for a round, it masks no values of that round again.
- the mean itself tells something of each member, more so if few take part; noise is another matter.

A Masker is used for one round; it is never stored. A member that starts again in mid-round has dropped out.
Masks are expanded by ChaCha20 in counter mode, 1 MiB at a time: 2 to 4 GB/s on one core of a server.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from edged import ConfigError, PolicyViolation, ProtocolError

from . import shamir
from .fixed_point import FixedPoint
from .shamir import SHARE_BYTES, Entropy

KEY_BYTES = 32
KEYS_BYTES = 3 * KEY_BYTES  # for sealing, for masks, and the commitment of the seed
DIGESTS_BYTES = 2 * 32
SEALED_BYTES = DIGESTS_BYTES + 2 * SHARE_BYTES + 16  # with ChaCha20-Poly1305's tag
MEMBERS_LEAST = 3  # of two, each knows the other's values from the sum
CHUNK = 1 << 17  # numbers of 8 bytes that are expanded at once: 1 MiB, so that it stays in a cache
ZEROS = bytes(8 * CHUNK)
STEPS = ("keys", "shares", "masked", "revealed")
SEED, SECRET = 0, 1  # the two kinds of share


def default_threshold(members: int) -> int:
    """floor(2 n / 3) + 1: 30 % may leave."""
    return 2 * members // 3 + 1


@dataclass(frozen=True)
class Terms:
    """What all members and the server know of a round before it begins.

    cohort: the ranks; values: how many numbers each sends; context: what names job, epoch and round, so that
    nothing of another round fits. ConfigError for a threshold that is not above half the cohort, or fewer
    than 3 members.
    """

    cohort: tuple[int, ...]
    values: int
    fixed: FixedPoint
    context: bytes
    threshold: int = 0  # 0: the default

    def __post_init__(self) -> None:
        n = len(self.cohort)
        if n < MEMBERS_LEAST or len(set(self.cohort)) != n or min(self.cohort) < 0:
            raise ConfigError(f"expected at least {MEMBERS_LEAST} distinct ranks, got {n}")
        if self.values < 1:
            raise ConfigError(f"expected values to sum, got {self.values}")
        if self.fixed.members < n:
            raise ConfigError(f"sums of {self.fixed.members} members fit; the cohort has {n}")
        if not self.threshold:
            object.__setattr__(self, "threshold", default_threshold(n))
        if not n < 2 * self.threshold <= 2 * n:
            raise ConfigError(f"expected a threshold above half of {n} members, got {self.threshold}")

    def need(self, ranks: Iterable[int], what: str) -> None:
        """PolicyViolation (mask-few) where fewer than the threshold are left."""
        left = len(set(ranks))
        if left < self.threshold:
            raise PolicyViolation(
                f"expected at least {self.threshold} members {what}, got {left}: nothing is unmasked",
                code="mask-few",
            )


class Masker:
    """A member's part in one round. `clipped`: how many of its values were beyond the clip."""

    def __init__(self, terms: Terms, rank: int, entropy: Entropy = secrets.token_bytes) -> None:
        """`entropy(n)`: n fresh random bytes, never the same ones again."""
        if rank not in terms.cohort:
            raise ConfigError(f"rank {rank} is not in the cohort")
        self.clipped = 0
        self._terms = terms
        self._rank = rank
        self._entropy = entropy
        self._sealing = X25519PrivateKey.from_private_bytes(entropy(KEY_BYTES))
        self._masking = X25519PrivateKey.from_private_bytes(entropy(KEY_BYTES))
        self._seed = entropy(KEY_BYTES)
        self._published: dict[int, bytes] = {}
        self._held: dict[int, tuple[bytes, bytes]] = {}  # by dealer
        self._has_masked = False
        self._told: tuple[frozenset[int], frozenset[int]] | None = None

    def keys(self) -> bytes:
        """For everybody: two public keys, and the digest of the seed."""
        return (
            self._sealing.public_key().public_bytes_raw()
            + self._masking.public_key().public_bytes_raw()
            + _commitment(self._seed)
        )

    def shares(self, keys: Mapping[int, bytes]) -> dict[int, bytes]:
        """Keys by rank, one's own among them -> what is sealed for each of these ranks.

        ProtocolError (mask-keys) for keys that cannot be; PolicyViolation (mask-few) for too few.
        """
        if self._published:
            raise ProtocolError("shares were dealt already", code="mask-step")
        self._check_keys(keys)
        self._published = dict(sorted(keys.items()))
        points = {rank: rank + 1 for rank in self._published}
        threshold = self._terms.threshold
        seed = shamir.split(self._seed, points.values(), threshold, self._entropy)
        secret = shamir.split(self._masking.private_bytes_raw(), points.values(), threshold, self._entropy)
        return {rank: self._sealed(rank, (seed[point], secret[point])) for rank, point in points.items()}

    def accept(self, sealed: Mapping[int, bytes]) -> None:
        """What the others, and oneself, sealed for this member, by who dealt it: with them it will be masked.

        ProtocolError (mask-share) where one does not open or is not what its digests say; it names the
        dealer.
        """
        if not self._published or self._held:
            raise ProtocolError("expected shares once, after this member dealt its own", code="mask-step")
        if self._rank not in sealed or not sealed.keys() <= self._published.keys():
            raise ProtocolError(
                "expected one's own shares, and those of members with keys", code="mask-share"
            )
        self._terms.need(sealed, "that dealt shares")
        self._held = {dealer: self._opened(dealer, sealed[dealer]) for dealer in sorted(sealed)}

    def masked(self, values: np.ndarray, weight: float) -> bytes:
        """values (v,) F32 -> 8 (v + 1) bytes that look like noise. Once: the difference of two would not.

        PolicyViolation (update-nan, update-weight) for what must not go into a sum, ProtocolError (mask-size)
        for another number of values.
        """
        if not self._held or self._has_masked:
            raise PolicyViolation(
                "expected to mask values once, after shares were accepted", code="mask-step"
            )
        if values.dtype != np.float32 or values.shape != (self._terms.values,):
            raise ProtocolError(
                f"expected {self._terms.values} F32 values, got {values.shape} of {values.dtype}",
                code="mask-size",
            )
        total, self.clipped = self._terms.fixed.encode(values, weight)
        self._has_masked = True
        add_stream(total, _own_key(self._terms, self._rank, self._seed))
        for other in self._held:
            if other != self._rank:
                key = _pair_key(self._terms, self._masking, self._rank, other, self._published[other])
                add_stream(total, key, is_minus=self._rank > other)
        return total.astype("<u8", copy=False).tobytes()

    def reveal(self, dropped: Iterable[int], stayed: Iterable[int]) -> dict[int, bytes]:
        """A share of each: of the secret of who dropped, of the seed of who stayed.

        PolicyViolation: mask-both where one would be asked for both kinds, now or after an earlier answer;
        mask-few where too few stayed. ProtocolError (mask-step) where these are not the members it masked
        with. The same question may be asked again.
        """
        gone, there = frozenset(dropped), frozenset(stayed)
        if gone & there or self._told not in (None, (gone, there)):
            raise PolicyViolation("both kinds of share of one member would unmask it", code="mask-both")
        if not self._has_masked or self._rank not in there or gone | there != self._held.keys():
            raise ProtocolError(
                "expected who dropped and who stayed of those it masked with, itself among the latter",
                code="mask-step",
            )
        self._terms.need(there, "that sent values")
        self._told = (gone, there)
        return {rank: self._held[rank][SECRET if rank in gone else SEED] for rank in sorted(self._held)}

    def _check_keys(self, keys: Mapping[int, bytes]) -> None:
        if keys.get(self._rank) != self.keys() or not keys.keys() <= set(self._terms.cohort):
            raise ProtocolError("expected keys of the cohort, one's own as they are", code="mask-keys")
        if any(len(key) != KEYS_BYTES for key in keys.values()):
            raise ProtocolError(f"expected keys of {KEYS_BYTES} bytes", code="mask-keys")
        pieces = {key[at : at + KEY_BYTES] for key in keys.values() for at in range(0, KEYS_BYTES, KEY_BYTES)}
        if len(pieces) != 3 * len(keys):
            raise ProtocolError("expected keys that differ; two members have the same", code="mask-keys")
        self._terms.need(keys, "with keys")

    def _sealed(self, to: int, shares: tuple[bytes, bytes]) -> bytes:
        digests = b"".join(_digest(self._rank, to, kind, share) for kind, share in enumerate(shares))
        cipher, bound = self._cipher(to), self._bound(self._rank, to, digests)
        return digests + cipher.encrypt(_nonce(self._rank), b"".join(shares), bound)

    def _opened(self, dealer: int, sealed: bytes) -> tuple[bytes, bytes]:
        if len(sealed) != SEALED_BYTES:
            raise ProtocolError(
                f"shares of rank {dealer}: expected {SEALED_BYTES} bytes, got {len(sealed)}",
                code="mask-share",
            )
        digests, hidden = sealed[:DIGESTS_BYTES], sealed[DIGESTS_BYTES:]
        try:
            opened = self._cipher(dealer).decrypt(
                _nonce(dealer), hidden, self._bound(dealer, self._rank, digests)
            )
        except InvalidTag as error:
            raise ProtocolError(f"shares of rank {dealer} do not open", code="mask-share") from error
        shares = opened[:SHARE_BYTES], opened[SHARE_BYTES:]
        expected = b"".join(_digest(dealer, self._rank, kind, share) for kind, share in enumerate(shares))
        if not hmac.compare_digest(expected, digests):
            raise ProtocolError(f"shares of rank {dealer} are not what it announced", code="mask-share")
        return shares

    def _cipher(self, other: int) -> ChaCha20Poly1305:
        shared = _agreed(self._sealing, other, self._published[other][:KEY_BYTES])
        return ChaCha20Poly1305(_derived(self._terms, shared, b"seal", *sorted((self._rank, other))))

    def _bound(self, dealer: int, to: int, digests: bytes) -> bytes:
        """What a sealed message belongs to, all keys that its dealer saw included."""
        roster = hashlib.sha256(_numbers(*self._published) + b"".join(self._published.values())).digest()
        return _numbers(dealer, to) + digests + roster


class Unmasker:
    """The server's part in one round. It keeps one sum, whatever the number of members.

    A message that cannot be is a ProtocolError that names its rank, and changes nothing: mask-step from a
    rank that is not in this step or was heard in it, mask-size, mask-keys, mask-share.
    """

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._step = 0
        self._keys: dict[int, bytes] = {}
        self._dealt: dict[int, Mapping[int, bytes]] = {}
        self._stayed: set[int] = set()
        self._revealed: dict[int, Mapping[int, bytes]] = {}
        self._heard = (self._keys, self._dealt, self._stayed, self._revealed)  # by step
        self._total = np.zeros(terms.values + 1, np.uint64)
        self._mean: tuple[np.ndarray, float] | None = None
        self._probe = X25519PrivateKey.generate()

    def missing(self) -> tuple[int, ...]:
        """Ranks that take part in this step and have not been heard in it."""
        return tuple(sorted(set(self._expected()) - set(self._heard[self._step])))

    def add_keys(self, rank: int, keys: bytes) -> None:
        self._check("keys", rank)
        if len(keys) != KEYS_BYTES:
            raise ProtocolError(
                f"rank {rank}: expected keys of {KEYS_BYTES} bytes, got {len(keys)}", code="mask-keys"
            )
        for at in (0, KEY_BYTES):  # one that nobody can agree with would stop all who try
            _agreed(self._probe, rank, keys[at : at + KEY_BYTES])
        self._keys[rank] = keys

    def keys(self) -> dict[int, bytes]:
        """All that came, for those that sent them: ends the step "keys". PolicyViolation for too few."""
        self._end("keys", "with keys")
        return dict(sorted(self._keys.items()))

    def add_shares(self, rank: int, sealed: Mapping[int, bytes]) -> None:
        self._check("shares", rank)
        if sealed.keys() != self._keys.keys() or {len(s) for s in sealed.values()} != {SEALED_BYTES}:
            raise ProtocolError(
                f"rank {rank}: expected {SEALED_BYTES} bytes for each member with keys", code="mask-share"
            )
        self._dealt[rank] = dict(sealed)

    def shares_for(self, rank: int) -> dict[int, bytes]:
        """What was sealed for a rank, by dealer: ends the step "shares". PolicyViolation for too few."""
        self._end("shares", "that dealt shares")
        return {dealer: self._dealt[dealer][rank] for dealer in sorted(self._dealt)}

    def add_masked(self, rank: int, masked: bytes | memoryview) -> None:
        """Adds it and forgets it; the sum is the same bits in any order."""
        self._check("masked", rank)
        if len(masked) != 8 * len(self._total):
            raise ProtocolError(
                f"rank {rank}: expected {8 * len(self._total)} bytes, got {len(masked)}", code="mask-size"
            )
        self._total += np.frombuffer(masked, "<u8")
        self._stayed.add(rank)

    def outcome(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Who dropped and who stayed, for those who stayed: ends the step "masked". PolicyViolation for too
        few.
        """
        self._end("masked", "that sent values")
        dealers, there = self._dealt.keys(), self._stayed
        return tuple(sorted(dealers - there)), tuple(sorted(there))

    def add_revealed(self, rank: int, shares: Mapping[int, bytes]) -> None:
        """Each share is held against the digest that its dealer sent."""
        self._check("revealed", rank)
        if shares.keys() != self._dealt.keys():
            raise ProtocolError(f"rank {rank}: expected a share of each member that dealt", code="mask-share")
        for dealer, share in shares.items():
            kind = SEED if dealer in self._stayed else SECRET
            digest = self._dealt[dealer][rank][32 * kind : 32 * (kind + 1)]
            if len(share) != SHARE_BYTES or not hmac.compare_digest(
                digest, _digest(dealer, rank, kind, share)
            ):
                raise ProtocolError(f"rank {rank}: its share of rank {dealer} is false", code="mask-share")
        self._revealed[rank] = dict(shares)

    def sum(self) -> tuple[np.ndarray, float]:
        """The weighted mean (v,) F64 of those who stayed, and the sum of their weights.

        PolicyViolation (mask-few) where too few revealed; ProtocolError: mask-share where what a rank dealt
        does not combine, by name, mask-sum where a mask is left.
        """
        if self._mean is None:
            if STEPS[self._step] != "revealed":
                raise ProtocolError("expected who dropped before the sum", code="mask-step")
            self._terms.need(self._revealed, "that revealed shares")
            keys = self._keys_left()  # all of them first: what cannot be unmasked is not begun
            for key, is_minus in keys:
                add_stream(self._total, key, is_minus=is_minus)
            self._mean = self._terms.fixed.decode(self._total)
        return self._mean

    def _keys_left(self) -> list[tuple[bytes, bool]]:
        """The masks in the sum: each key, and whether it is to be taken off."""
        published, there = self._keys, sorted(self._stayed)
        keys = [(_own_key(self._terms, rank, self._seed_of(rank)), True) for rank in there]
        for gone in sorted(self._dealt.keys() - self._stayed):
            secret = self._secret_of(gone)
            keys += [
                (_pair_key(self._terms, secret, gone, rank, published[rank]), rank < gone) for rank in there
            ]
        return keys

    def _seed_of(self, rank: int) -> bytes:
        seed = self._combined(rank)
        if not hmac.compare_digest(_commitment(seed), self._keys[rank][2 * KEY_BYTES :]):
            raise _dealt_falsely(rank)
        return seed

    def _secret_of(self, rank: int) -> X25519PrivateKey:
        secret = X25519PrivateKey.from_private_bytes(self._combined(rank))
        if secret.public_key().public_bytes_raw() != self._keys[rank][KEY_BYTES : 2 * KEY_BYTES]:
            raise _dealt_falsely(rank)
        return secret

    def _combined(self, dealer: int) -> bytes:
        shares = {rank + 1: shares[dealer] for rank, shares in self._revealed.items()}
        try:
            return shamir.combine(shares, self._terms.threshold)
        except ProtocolError as error:
            raise _dealt_falsely(dealer) from error

    def _expected(self) -> Iterable[int]:
        return self._heard[self._step - 1] if self._step else self._terms.cohort

    def _check(self, step: str, rank: int) -> None:
        if STEPS[self._step] != step or rank not in self._expected():
            raise ProtocolError(
                f"rank {rank} is not expected in the step {step!r}; now: {STEPS[self._step]!r}",
                code="mask-step",
            )
        if rank in self._heard[self._step]:
            raise ProtocolError(f"rank {rank} was heard in the step {step!r} before", code="mask-step")

    def _end(self, step: str, what: str) -> None:
        """Ends a step once; afterwards its answer stays the same."""
        at = STEPS.index(step)
        if self._step < at:
            raise ProtocolError(
                f"the step {step!r} has not begun; now: {STEPS[self._step]!r}", code="mask-step"
            )
        if self._step == at:
            self._terms.need(self._heard[at], what)
            self._step += 1


def add_stream(total: np.ndarray, key: bytes, *, is_minus: bool = False) -> None:
    """Adds what a key of 32 bytes expands to, or takes it off: total (n,) uint64, in place, modulo 2^64.

    The stream is ChaCha20's (RFC 8439) from block 0 with a nonce of zeros, as little-endian integers.
    """
    encryptor = Cipher(ChaCha20(key, bytes(16)), None).encryptor()
    drawn = bytearray(8 * min(len(total), CHUNK))
    numbers = np.frombuffer(drawn, "<u8")
    combine = np.subtract if is_minus else np.add
    zeros = memoryview(ZEROS)
    for start in range(0, len(total), CHUNK):
        part = total[start : start + CHUNK]
        encryptor.update_into(zeros[: 8 * len(part)], drawn)
        combine(part, numbers[: len(part)], out=part)


def _own_key(terms: Terms, rank: int, seed: bytes) -> bytes:
    return _derived(terms, seed, b"own", rank)


def _pair_key(terms: Terms, secret: X25519PrivateKey, rank: int, other: int, keys: bytes) -> bytes:
    shared = _agreed(secret, other, keys[KEY_BYTES : 2 * KEY_BYTES])
    return _derived(terms, shared, b"pair", *sorted((rank, other)))


def _agreed(secret: X25519PrivateKey, other: int, public: bytes) -> bytes:
    try:
        return secret.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:  # a point of low order, which makes a secret that everybody knows
        raise ProtocolError(f"the key of rank {other} is none", code="mask-keys") from error


def _derived(terms: Terms, secret: bytes, use: bytes, *ranks: int) -> bytes:
    said = b"edged masking 1 " + use + _numbers(*ranks, len(terms.context)) + terms.context
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=said).derive(secret)


def _commitment(seed: bytes) -> bytes:
    return hashlib.sha256(b"edged masking 1 seed" + seed).digest()


def _digest(dealer: int, holder: int, kind: int, share: bytes) -> bytes:
    return hashlib.sha256(b"edged masking 1 share" + _numbers(dealer, holder, kind) + share).digest()


def _nonce(dealer: int) -> bytes:
    """The key is of two members in one round, and each seals one message with it."""
    return dealer.to_bytes(12, "little")


def _numbers(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(8, "little") for number in (len(numbers), *numbers))


def _dealt_falsely(rank: int) -> ProtocolError:
    return ProtocolError(
        f"what rank {rank} dealt does not combine",
        remedy="begin the round again without it",
        code="mask-share",
    )
