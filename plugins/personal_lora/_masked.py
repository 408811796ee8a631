"""A round whose server learns the weighted mean of its members' updates, and no member's own.

`_rounds.masking` is the protocol and says what it promises; here are its steps as messages of a round:

    keys     before the local steps a member sends its keys; all of them come back, with their ranks
    same     from a member to each of these, on a link of their own: a digest of the keys that came. A server
             that gave a member keys of its own in place of another's is found out before anything is masked
    shares   what it sealed for each of these; what each sealed for it comes back
    masked   after the local steps: its values with its weight inside, masked; then its figures, in plain
    reveal   who dropped and who stayed comes; a share of each goes
    no       from a member in place of any of these: it leaves the round
    out      to a member that said no, or said something that cannot be before it was asked to reveal: it
             is out of the round

A member that is out trains nothing more in this round and takes part in the next one. All keys are made for
one round of one run: a run that goes on from a checkpoint makes others. What they are bound to (`context`)
has the digest of what a member loaded in it, so that members whom the server sent unlike adapters cannot mask
together: the mean of many that learned nothing and one that did would be that one's update.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edged import ConfigError, EngineError, Factors, PolicyViolation, ProtocolError

from .._rounds.fixed_point import FixedPoint
from .._rounds.masking import Masker
from .._rounds.masks import Terms
from .._rounds.unmasking import Unmasker
from .._training.link import Link
from .._training.sizes import message_bytes, pieces
from . import _messages
from ._inbox import is_stale
from ._messages import KEYS_BYTES, SEALED_BYTES, SHARE_BYTES
from ._rank import Arrays, Rank

log = logging.getLogger(__name__)
REVEALED = "revealed.jsonl"  # in a member's folder: [round, ranks that stayed], one a line
SAID_NO = "mask-no"
Refused = (ConfigError, PolicyViolation, ProtocolError)  # what costs one member its part in a round


class Left(Exception):
    """This member has no more part in the round."""


def terms_of(rank: Rank, number: int, sides: str, loaded: Factors, extras: Mapping[str, Any]) -> Terms:
    """What server and members agree on without a word: of a round, the sides that are trained, and what was
    loaded before it."""
    job = rank.job
    fixed = FixedPoint(len(job.clients), job.mask_clip, _messages.weight_most(job))
    values = _messages.masked_values(job, sides, job.r_most, rank.shapes)
    digest = hashlib.sha256(rank.flat(loaded, "AB").tobytes() if loaded else b"")
    for name, value in sorted(extras.items()):
        array = np.asarray(value, order="C")
        digest.update(json.dumps([name, array.dtype.str[1:], list(array.shape)]).encode() + array.tobytes())
    hello = rank.hello()
    said = [rank.spec.job, hello["job"], hello["model"], number, sides, digest.hexdigest()]
    return Terms(tuple(range(len(job.clients))), values, fixed, json.dumps(said).encode())


class MaskedMember:
    """A member's part in one round. Every method raises Left where it has none any more."""

    def __init__(self, rank: Rank, number: int, terms: Terms) -> None:
        self._rank, self._number = rank, number
        self._link = rank.link(rank.server)
        self._masker = Masker(terms, rank.rank)

    def agree(self) -> None:
        """Keys and shares, with all others."""
        self._say("keys", self._masker.keys())
        header, frames = self._hear("keys")
        with self._or_leave():
            keys = _by_rank(_ranks(header), frames, KEYS_BYTES)
            digest = self._tell_others(keys)
            dealt = self._masker.shares(keys)
            self._compare(keys, digest)
        self._say("shares", b"".join(dealt.values()))  # in the order of ranks
        header, frames = self._hear("shares")
        with self._or_leave():
            self._masker.accept(_by_rank(_ranks(header), frames, SEALED_BYTES))

    def send(self, values: np.ndarray, weight: float) -> None:
        """values (v,) F32."""
        with self._or_leave():
            masked = self._masker.masked(values, weight)
        if self._masker.clipped:
            log.warning(
                "values cut at mask_clip",
                extra={"round": self._number, "count": self._masker.clipped, "of": values.size},
            )
        self._link.send_values("masked", [self._number], {}, np.frombuffer(masked, "<f4"))

    def reveal(self) -> None:
        """Shares of those that dropped and stayed. What was revealed of a round is written down first: the
        same values, in a run that goes on, are not revealed with another group."""
        header, _ = self._hear("reveal")
        with self._or_leave():
            dropped, stayed = _ranks(header, "dropped"), _ranks(header, "stayed")
            shares = self._masker.reveal(dropped, stayed)
            keep_revealed(Path(self._rank.spec.state_folder) / REVEALED, self._number, stayed)
        self._say("reveal", b"".join(shares.values()))

    def _tell_others(self, keys: Mapping[int, bytes]) -> bytes:
        """The digest of all keys, which the members with keys now have of this one."""
        digest = hashlib.sha256(json.dumps(list(keys)).encode() + b"".join(keys.values())).digest()
        for other in keys:
            if other != self._rank.rank and other < self._rank.server:
                self._rank.link(other).send("same", [self._number], {}, [digest])
        return digest

    def _compare(self, keys: Mapping[int, bytes], digest: bytes) -> None:
        """ProtocolError (mask-keys) where another member was given other keys."""
        for other in keys:
            if other != self._rank.rank:
                _, frames = _answer(self._rank.link(other), self._number, "same")
                if not hmac.compare_digest(_one(frames), digest):
                    raise ProtocolError(
                        f"expected the same keys at all members; {self._rank.name(other)} has others",
                        code="mask-keys",
                    )

    def _say(self, kind: str, *frames: bytes) -> None:
        self._link.send(kind, [self._number], {}, list(frames))

    def _hear(self, kind: str) -> tuple[dict[str, Any], list[memoryview]]:
        header, frames = self._link.next()
        if header.get("at") == [self._number] and header.get("k") == "out":
            log.warning("left out of a round by its server", extra={"round": self._number})
            raise Left
        if header.get("at") != [self._number] or header.get("k") != kind:
            raise ProtocolError(
                f"expected {kind} of round {self._number} from {self._rank.name(self._rank.server)}, got "
                f"{str(header.get('k'))[:16]} {str(header.get('at'))[:40]}"
            )
        return header, frames

    @contextmanager
    def _or_leave(self) -> Iterator[None]:
        """What this member cannot go on with costs it the round, and others nothing."""
        try:
            yield
        except (PolicyViolation, ProtocolError) as error:
            log.warning("leaves a round", extra={"round": self._number, "reason": str(error)[:300]})
            self._say("no")
            self._hear("out")  # raises Left
            raise Left from error


def keep_revealed(path: Path, number: int, stayed: Sequence[int]) -> None:
    """Write down with whom a member's values of a round are summed. PolicyViolation (mask-again) where that
    was with others before: the difference of both sums would tell of few. EngineError (disk)."""
    there = sorted(stayed)
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        whole = [json.loads(line) for line in lines[:-1] if line]  # the last one may have been cut off
        if any(of == number and before != there for of, before in whole):
            raise PolicyViolation(
                f"round {number}: what was revealed before it was done again was of other members",
                code="mask-again",
            )
        if [number, there] in whole:
            return
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(path, "r+b" if path.exists() else "wb") as file:
            file.truncate(sum(len(line) + 1 for line in lines[:-1]))
            file.seek(0, os.SEEK_END)
            file.write(json.dumps([number, there]).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except (OSError, ValueError, TypeError) as error:
        raise EngineError(f"expected to read and write {path.name}; {error}", code="disk") from error


class MaskedServer:
    """The server's part in one round.

    gather: all that a member says up to its figures; told: these figures; refuse: counts and logs what a
    member said wrong.
    """

    def __init__(
        self,
        rank: Rank,
        number: int,
        terms: Terms,
        gather: Callable[[int, int], Link],
        told: Callable[[Link, int], dict[str, float]],
        refuse: Callable[[int, int, Exception], None],
    ) -> None:
        self._rank, self._number, self._terms = rank, number, terms
        self._gather, self._told, self._refuse = gather, told, refuse
        self._unmasker = Unmasker(terms)
        self._said: Counter[int] = Counter()  # bytes, by rank
        self.told: dict[
            int, dict[str, float]
        ] = {}  # figures of those whose values are in the sum, and "said"

    def mean(self) -> tuple[np.ndarray, float]:
        """The weighted mean (v,) F64, and the sum of the weights. PolicyViolation (mask-few) where too few
        members are left at a step."""
        unmasker, number = self._unmasker, self._number
        self._each("keys", lambda rank, frames: unmasker.add_keys(rank, bytes(_one(frames))))
        keys = unmasker.keys()
        self._say("keys", keys, {"ranks": list(keys)}, lambda rank: [b"".join(keys.values())])
        dealers = self._each(
            "shares", lambda rank, frames: unmasker.add_shares(rank, _by_rank(keys, frames, SEALED_BYTES))
        )
        self._terms.need(dealers, "that dealt shares")
        self._say(
            "shares",
            dealers,
            {"ranks": dealers},
            lambda rank: [b"".join(unmasker.shares_for(rank).values())],
        )
        for rank in unmasker.missing():
            with self._or_out(rank):
                self._add_masked(rank)
        dropped, stayed = unmasker.outcome()
        self._say("reveal", stayed, {"dropped": list(dropped), "stayed": list(stayed)}, lambda rank: [])
        revealed = self._each(
            "reveal", lambda rank, frames: unmasker.add_revealed(rank, _by_rank(dealers, frames, SHARE_BYTES))
        )
        size = message_bytes({"k": "reveal", "at": [number]}, [SHARE_BYTES * len(dealers)])
        for rank, figures in self.told.items():
            figures["sent"] += size if rank in revealed else 0  # after what a member could tell of itself
            figures["said"] = float(self._said[rank])
        with self._rank.computing():
            mean, weight = unmasker.sum()
        log.info("masked sum", extra={"round": number, "stayed": len(stayed), "dropped": len(dropped)})
        return mean, weight

    def _add_masked(self, rank: int) -> None:
        link = self._gather(self._number, rank)
        masked = _received(link, self._number, 8 * (self._terms.values + 1))
        figures = self._told(link, self._number)
        with self._rank.computing():
            self._unmasker.add_masked(rank, masked)
        self.told[rank] = figures

    def _each(self, kind: str, take: Callable[[int, list[memoryview]], None]) -> list[int]:
        """Hear every member that takes part in a step; those that said what can be."""
        found = []
        for rank in self._unmasker.missing():
            with self._or_out(rank, is_awaited=kind != "reveal"):
                _, frames = _answer(self._rank.link(rank), self._number, kind)
                take(rank, frames)
                found.append(rank)
        return found

    @contextmanager
    def _or_out(self, rank: int, is_awaited: bool = True) -> Iterator[None]:
        """What a member said wrong costs it the round. `is_awaited`: does it wait for more in this one?"""
        try:
            yield
        except Refused as error:
            self._refuse(self._number, rank, error)
            if is_awaited or error.code == SAID_NO:
                self._rank.link(rank).send("out", [self._number], {}, [])

    def _say(
        self,
        kind: str,
        ranks: Iterable[int],
        words: Mapping[str, Any],
        frames: Callable[[int], list[bytes]],
    ) -> None:
        for rank in ranks:
            before = self._rank.bytes_sent
            self._rank.link(rank).send(kind, [self._number], words, frames(rank))
            self._said[rank] += self._rank.bytes_sent - before


def unmasked(rank: Rank, sides: str, loaded: Factors, values: np.ndarray) -> tuple[Arrays, dict[str, Any]]:
    """Factors and extras of one update in place of all members', out of the mean of what they sent; what is
    not trained is that of `loaded`."""
    if not loaded:
        name, *_ = _messages.SUMS
        return {}, {name: values}
    given = rank.unflat(values, sides, rank.job.r_most)
    return {
        layer: (given[layer].get("A", pair[0]), given[layer].get("B", pair[1]))
        for layer, pair in loaded.items()
    }, {}


def _answer(link: Link, number: int, kind: str) -> tuple[dict[str, Any], list[memoryview]]:
    """The next message, if it is of this kind and round; what is of an earlier one is left out."""
    while True:
        header, frames = link.next()
        if not is_stale(header, number):
            break
    if header.get("k") != kind or header.get("at") != [number]:
        said = str(header.get("k"))[:16]
        code = SAID_NO if said == "no" else "mask-step"
        raise ProtocolError(f"expected {kind} of rank {link.other}, got {said}", code=code)
    return header, frames


def _received(link: Link, number: int, size: int) -> bytearray:
    """Masked values, in pieces. ProtocolError (mask-size)."""
    joined = bytearray()
    for piece, expected in enumerate(pieces(size)):
        _, frames = link.receive("masked", [number, piece] if piece else [number])
        if [frame.nbytes for frame in frames] != [expected]:
            raise ProtocolError(
                f"expected {size} bytes of masked values of rank {link.other}", code="mask-size"
            )
        joined += frames[0]
    return joined


def _one(frames: Sequence[memoryview]) -> memoryview:
    if len(frames) != 1:
        raise ProtocolError(f"expected one frame, got {len(frames)}", code="mask-step")
    return frames[0]


def _by_rank(ranks: Iterable[int], frames: Sequence[memoryview], size: int) -> dict[int, bytes]:
    """A frame of `size` bytes for each rank, in order."""
    frame, there = _one(frames), list(ranks)
    if frame.nbytes != size * len(there):
        raise ProtocolError(
            f"expected {size} bytes for each of {len(there)} members, got {frame.nbytes}", code="mask-step"
        )
    return {rank: bytes(frame[size * i : size * (i + 1)]) for i, rank in enumerate(there)}


def _ranks(header: Mapping[str, Any], word: str = "ranks") -> list[int]:
    found = header.get(word)
    if (
        not isinstance(found, list)
        or not all(type(rank) is int for rank in found)
        or found != sorted(set(found))
    ):
        raise ProtocolError(f"expected {word} as ranks in order, each once", code="mask-step")
    return found
