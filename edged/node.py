"""Who belongs to this node's group: members, invites, revocations. Pure; time comes in.

A node believes only what a member says over that member's own connection. Rights are what a member
may do here: submit (its jobs may use this node), serve (this node's jobs may use it), train.
"""

from __future__ import annotations

import dataclasses
import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from .errors import ConfigError, TrustError
from .types import RIGHTS, Right, Zone

MEMBERS_MAX = 256  # a person's devices, with room; bounds what introductions can grow
INVITES_MAX = 64
FORGOTTEN_MAX = 4096
PREFIX_CHARS = 8
VERSION_MAX = 2**53  # far beyond any real one; what a member claims must leave room for ours
JUMP_MAX = 1 << 20  # changes that another node may have seen and this one not

MemberState = Literal["joining", "member"]


@dataclass(frozen=True, slots=True)
class Member:
    """An admitted node. `joining` until it has proved its key by connecting with it."""

    node_id: str
    name: str
    rights: tuple[Right, ...] = RIGHTS
    zone: Zone = "own"
    addresses: tuple[str, ...] = ()
    port: int = 0
    state: MemberState = "member"
    joining_until: float = 0.0
    admission: int = 0  # the version at which it was invited after it was forgotten, if ever


@dataclass(frozen=True, slots=True)
class Invite:
    """A one-time admission, by the public half of the key that its token carries."""

    client_key: str  # hex
    expires_at: float
    rights: tuple[Right, ...]
    zone: Zone


@dataclass(slots=True)
class Membership:
    """The table that every message is checked against."""

    version: int = 0
    members: dict[str, Member] = field(default_factory=dict)
    invites: dict[str, Invite] = field(default_factory=dict)
    forgotten: dict[str, int] = field(default_factory=dict)

    # --- asking ---

    def member(self, node_id: str) -> Member | None:
        return self.members.get(node_id)

    def is_invited(self, client_key: bytes, now: float) -> bool:
        """May this one-time key send `pair` now?"""
        invite = self.invites.get(client_key.hex())
        return invite is not None and now < invite.expires_at

    def find(self, text: str, others: Iterable[tuple[str, str]] = ()) -> str:
        """The node id that a name, an id or a prefix of one means. `others`: more (id, name) pairs."""
        known = dict(others) | {member.node_id: member.name for member in self.members.values()}
        found = [node for node, name in known.items() if text in (node, name)]
        if not found and len(text) >= PREFIX_CHARS:
            found = [node for node in known if node.startswith(text)]
        if len(found) == 1:
            return found[0]
        names = ", ".join(f"{name} ({node[:8]})" for node, name in sorted(known.items(), key=lambda i: i[1]))
        what = f"{len(found)} nodes match {text!r}" if found else f"no node {text!r}"
        raise ConfigError(f"{what}; known: {names or 'none'}", remedy="use a full id; see `edged peers`")

    # --- pairing ---

    def invite(
        self, client_key: bytes, expires_at: float, rights: tuple[Right, ...], zone: Zone, now: float
    ) -> None:
        self.expire(now)
        if len(self.invites) >= INVITES_MAX:
            raise TrustError(
                f"expected fewer than {INVITES_MAX} open invites", remedy="wait until some expire"
            )
        self.invites[client_key.hex()] = Invite(client_key.hex(), expires_at, rights, zone)

    def redeem(self, client_key: bytes, newcomer: Member, now: float, patience_s: float = 60.0) -> Member:
        """Use an invite up for `newcomer`, who stays `joining` until its own key connects.

        One that is a member already stays the member it is: whoever holds the token has not proved that
        key, so its rights and zone are not his to change.
        """
        key = client_key.hex()
        found = next((k for k in self.invites if hmac.compare_digest(k, key)), None)
        invite = self.invites.pop(found) if found else None
        if invite is None or now >= invite.expires_at:
            raise TrustError(
                "expected a token that is unused and not expired", remedy="ask for a new `edged invite`"
            )
        known = self.members.get(newcomer.node_id)
        if known is not None and known.state == "member":
            return known
        member = dataclasses.replace(
            newcomer,
            rights=invite.rights,
            zone=invite.zone,
            state="joining",
            joining_until=now + patience_s,
        )
        return self.admit(member)

    def prove(self, node_id: str) -> bool:
        """A message came under this node's own key. True when that ends its joining."""
        member = self.members.get(node_id)
        if member is None or member.state == "member":
            return False
        self._put(dataclasses.replace(member, state="member", joining_until=0.0))
        return True

    def admit(self, member: Member) -> Member:
        """Add a node on this node's own authority (it joined us, or we joined it).

        Only this brings a forgotten node back; introductions tell the other members that it did.
        """
        known = self.members.get(member.node_id, member)
        was_forgotten = member.node_id in self.forgotten
        admitted = dataclasses.replace(
            member, admission=self.version + 1 if was_forgotten else known.admission
        )
        self._put(admitted)
        self.forgotten.pop(member.node_id, None)
        return admitted

    def introduce(self, introducer: str, newcomer: Member) -> bool:
        """A member presents another node. True when that adds it; never widens what is known."""
        by = self.members.get(introducer)
        if by is None or by.state != "member":
            raise TrustError("expected an introduction by a member")
        if by.zone == "own":
            _check_version(newcomer.admission, self.version)
        else:  # a guest says nothing of versions
            newcomer = dataclasses.replace(newcomer, admission=0)
        known = self.members.get(newcomer.node_id)
        if by.zone == "own":  # a guest's word brings nobody back
            self.version = max(self.version, newcomer.admission)
            if known is not None and known.admission < newcomer.admission:
                self._put(dataclasses.replace(known, admission=newcomer.admission))
            if newcomer.admission > self.forgotten.get(newcomer.node_id, newcomer.admission):
                del self.forgotten[newcomer.node_id]
        if known is not None or newcomer.node_id in self.forgotten:
            return False
        rights = tuple(right for right in newcomer.rights if right in by.rights)
        zone: Zone = newcomer.zone if by.zone == "own" else "guest"
        self._put(dataclasses.replace(newcomer, rights=rights, zone=zone, state="member"))
        return True

    def trust(self, node_id: str, rights: tuple[Right, ...] | None, zone: Zone | None) -> Member:
        member = self.members[node_id]
        changed = dataclasses.replace(
            member, rights=rights if rights is not None else member.rights, zone=zone or member.zone
        )
        self._put(changed)
        return changed

    def relocate(self, node_id: str, name: str, addresses: tuple[str, ...], port: int) -> None:
        """Remember what a member said of itself, with the addresses where it was really reached first."""
        member = self.members.get(node_id)
        if member is not None:
            merged = tuple(dict.fromkeys((*addresses, *member.addresses)))[:8]
            self.members[node_id] = dataclasses.replace(
                member, name=name, addresses=merged, port=port or member.port
            )

    # --- leaving ---

    def forget(self, node_id: str) -> int:
        """Revoke a node here and now; the version at which it happened."""
        self.version += 1
        self.members.pop(node_id, None)
        self.forgotten[node_id] = self.version
        while len(self.forgotten) > FORGOTTEN_MAX:
            self.forgotten.pop(next(iter(self.forgotten)))
        return self.version

    def is_revoked_by(self, teller: str, node_id: str, version: int | None = None) -> bool:
        """Does a member's word, said at its `version`, end what is known of a node?

        A guest's does not remove my own devices, an old one not a node that was invited since.
        """
        by, member = self.members.get(teller), self.members.get(node_id)
        if by is None or by.zone != "own":
            return False
        _check_version(version or 0, self.version)
        since = member.admission if member is not None else self.forgotten.get(node_id, -1) + 1
        return version is None or version >= since

    def forget_on_word(self, teller: str, node_id: str, version: int | None = None) -> bool:
        """A member says that a node is revoked. True when that ends a member here."""
        if not self.is_revoked_by(teller, node_id, version):
            return False
        is_member = node_id in self.members
        self.version = max(self.version, version or 0)
        ours = self.forget(node_id)
        self.forgotten[node_id] = ours if version is None else version
        return is_member

    def expire(self, now: float) -> list[str]:
        """Drop what is over: invites, and newcomers that never proved their key (returned)."""
        self.invites = {key: invite for key, invite in self.invites.items() if now < invite.expires_at}
        late = [m.node_id for m in self.members.values() if m.state == "joining" and now >= m.joining_until]
        for node_id in late:
            del self.members[node_id]
        return late

    # --- storing ---

    def to_map(self) -> dict[str, Any]:
        stored = msgspec.to_builtins(
            {
                "version": self.version,
                "members": self.members,
                "invites": self.invites,
                "forgotten": self.forgotten,
            }
        )
        assert isinstance(stored, dict)
        return stored

    def _put(self, member: Member) -> None:
        if member.node_id not in self.members and len(self.members) >= MEMBERS_MAX:
            raise TrustError(f"expected at most {MEMBERS_MAX} members", remedy="forget some")
        self.version += 1
        self.members[member.node_id] = member


def _check_version(version: int, ours: int) -> None:
    """A member may be ahead of us, but not so far that our own next version could not be said."""
    if not 0 <= version <= min(ours + JUMP_MAX, VERSION_MAX):
        raise TrustError(f"expected a membership version from 0 to {ours + JUMP_MAX}")


def from_map(stored: dict[str, Any]) -> Membership:
    """Membership as it was stored; TrustError when it is not one."""
    try:
        return msgspec.convert(stored, Membership)
    except msgspec.ValidationError as error:
        raise TrustError(
            f"expected a stored membership; {error}", remedy="restore it from a backup"
        ) from error
