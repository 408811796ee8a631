"""The server's side of a masked sum; the protocol, and what it promises, are in `masking`."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from edged import ProtocolError

from . import shamir
from .masks import (
    KEY_BYTES,
    KEYS_BYTES,
    SEALED_BYTES,
    SECRET,
    SEED,
    Terms,
    add_stream,
    agreed,
    commitment,
    own_key,
    pair_key,
    share_digest,
)
from .shamir import SHARE_BYTES

STEPS = ("keys", "shares", "masked", "revealed")


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
            agreed(self._probe, rank, keys[at : at + KEY_BYTES])
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
        """Who dropped and who stayed, for the latter: ends the step "masked". PolicyViolation for too few."""
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
            announced = self._dealt[dealer][rank][32 * kind : 32 * (kind + 1)]
            if len(share) != SHARE_BYTES or not hmac.compare_digest(
                announced, share_digest(dealer, rank, kind, share)
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
        keys = [(own_key(self._terms, rank, self._seed_of(rank)), True) for rank in there]
        for gone in sorted(self._dealt.keys() - self._stayed):
            secret = self._secret_of(gone)
            keys += [
                (pair_key(self._terms, secret, gone, rank, published[rank]), rank < gone) for rank in there
            ]
        return keys

    def _seed_of(self, rank: int) -> bytes:
        seed = self._combined(rank)
        if not hmac.compare_digest(commitment(seed), self._keys[rank][2 * KEY_BYTES :]):
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


def _dealt_falsely(rank: int) -> ProtocolError:
    return ProtocolError(
        f"what rank {rank} dealt does not combine",
        remedy="begin the round again without it",
        code="mask-share",
    )
