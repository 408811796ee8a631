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
  with it, is the sum of n - floor(n (n - t) / t) members, since each lets it call n - t members dropped. With
  the default threshold, floor(2 n / 3) + 1, that is t for fewer than ten members and above half of them for
  more. (The paper's members sign who stayed, and so hear one story even if a third of them side with the
  server. Here they do not.)
- shares that a member gives falsely are found by their digests, and shares that were dealt falsely by the
  published key and the commitment of the seed; both name the member.

What does not, and what the caller must see to:
- keys must come over each member's own connection. A server that relays them could put in its own.
- nobody can look at a masked value: a member can spoil the mean with any numbers. Values beyond the clip are
  cut by an honest member only. Sums of unlike groups of the same values tell the difference: once a member
  has revealed for a round, it masks no values of that round again, or reveals them with the same group only.
- the mean itself tells something of each member, more so if few take part; noise is another matter.

A Masker is used for one round; it is never stored. A member that starts again in mid-round has dropped out.
Masks are expanded by ChaCha20 in counter mode, 1 MiB at a time: 2 to 4 GB/s on one core of a server.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable, Mapping

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from edged import ConfigError, PolicyViolation, ProtocolError

from . import shamir
from .masks import (
    DIGESTS_BYTES,
    KEY_BYTES,
    KEYS_BYTES,
    SEALED_BYTES,
    SECRET,
    SEED,
    Terms,
    add_stream,
    agreed,
    commitment,
    derived,
    own_key,
    packed,
    pair_key,
    share_digest,
)
from .shamir import SHARE_BYTES, Entropy


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
            + commitment(self._seed)
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

        ProtocolError (mask-share), with the dealer's rank, where one does not open or its digests differ.
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
        add_stream(total, own_key(self._terms, self._rank, self._seed))
        for other in self._held:
            if other != self._rank:
                key = pair_key(self._terms, self._masking, self._rank, other, self._published[other])
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
        digests = b"".join(share_digest(self._rank, to, kind, share) for kind, share in enumerate(shares))
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
        expected = b"".join(
            share_digest(dealer, self._rank, kind, share) for kind, share in enumerate(shares)
        )
        if not hmac.compare_digest(expected, digests):
            raise ProtocolError(f"shares of rank {dealer} are not what it announced", code="mask-share")
        return shares

    def _cipher(self, other: int) -> ChaCha20Poly1305:
        shared = agreed(self._sealing, other, self._published[other][:KEY_BYTES])
        return ChaCha20Poly1305(derived(self._terms, shared, b"seal", *sorted((self._rank, other))))

    def _bound(self, dealer: int, to: int, digests: bytes) -> bytes:
        """What a sealed message belongs to, all keys that its dealer saw included."""
        roster = hashlib.sha256(packed(*self._published) + b"".join(self._published.values())).digest()
        return packed(dealer, to) + digests + roster


def _nonce(dealer: int) -> bytes:
    """The key is of two members in one round, and each seals one message with it."""
    return dealer.to_bytes(12, "little")
