"""What a client may ask of the control socket, checked: bodies as dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import msgspec

from .errors import ConfigError
from .types import Numerics, Right, Zone

TOKENS_MAX = 1 << 20
PROMPT_BYTES_MAX = 2 << 20  # it travels in one header
DEFERRABLE_MAX_S = 7 * 86400.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """`edged generate`, `chat` and `plan`: either `prompt` or `messages` (role, content)."""

    model: str
    prompt: str | None = None
    messages: list[dict[str, str]] | None = None
    n: int = 128
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    seed: int | None = None
    strategy: str = "auto"
    policy: str | None = None
    nodes: list[str] | None = None
    shares: list[float] | None = None
    raw: bool = False
    ignore_eos: bool = False
    numerics: Numerics = "fast"
    recovery: str = "fast"
    private: bool = False
    allow_guest: bool = False
    detach: bool = False
    strict: bool = False
    adapter: str | None = None
    explain: bool = False
    deferrable_s: float | None = None  # so long its start may wait, where the policy knows a better time

    @property
    def may_leave(self) -> bool:
        """May a later epoch of this job go to somebody outside the group? Where its first one might have."""
        return self.strategy == "cloud" or (self.strategy == "auto" and not self.nodes)

    @property
    def prompt_bytes(self) -> int:
        texts = [self.prompt or "", *(m.get("content", "") for m in self.messages or ())]
        return sum(len(text.encode()) for text in texts)


@dataclass(frozen=True, slots=True)
class FinetuneRequest:
    """`edged finetune`: the table of a job's file. `file_clients`: of its clients those whose data came along
    as open files, in order. `name`: of the adapter, where the file gives none."""

    kind: str
    name: str
    settings: dict[str, Any]
    file_clients: list[int] = field(default_factory=list)
    resume: str | None = None
    detach: bool = False


@dataclass(frozen=True, slots=True)
class WriteAdapter:
    """`edged adapters write`: the name, and the type of the model's matrices."""

    name: str
    type: Literal["f32", "f16"] = "f32"


@dataclass(frozen=True, slots=True)
class Invite:
    ttl_s: float = 600.0
    rights: tuple[Right, ...] = ("submit", "serve", "train")
    zone: Zone = "own"


@dataclass(frozen=True, slots=True)
class Trust:
    node: str
    rights: tuple[Right, ...] | None = None
    zone: Zone | None = None


def read(kind: type[T], body: dict[str, Any]) -> T:
    """The body as `kind`; ConfigError says which field was wrong."""
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"expected a sound request; {error}", remedy="mend the argument") from error


def check_generate(request: GenerateRequest, *, needs_prompt: bool) -> GenerateRequest:
    """The rules that single types do not say."""
    has_one = (request.prompt is None) != (request.messages is None)
    rules = (
        (not needs_prompt or has_one, "either a prompt or messages"),
        (1 <= request.n <= TOKENS_MAX, f"-n from 1 to {TOKENS_MAX}; {request.n} came"),
        (0 <= request.temperature <= 100, f"--temperature from 0 to 100; {request.temperature} came"),
        (request.top_k >= 0, f"--top-k of 0 (off) or more; {request.top_k} came"),
        (0 < request.top_p <= 1, f"--top-p above 0 and at most 1; {request.top_p} came"),
        (request.seed is None or 0 <= request.seed < 2**63, "--seed from 0 to 2**63 - 1"),
        (request.prompt_bytes <= PROMPT_BYTES_MAX, f"a prompt of at most {PROMPT_BYTES_MAX >> 20} MiB"),
        (request.recovery in ("fast", "exact"), f"--recovery fast or exact; {request.recovery!r} came"),
        (
            request.deferrable_s is None or 0 < request.deferrable_s <= DEFERRABLE_MAX_S,
            f"--deferrable above 0 and at most 7d; {request.deferrable_s} s came",
        ),
        (not (request.raw and request.messages), "--raw with a prompt, not with messages"),
    )
    for holds, expected in rules:
        if not holds:
            raise ConfigError(f"expected {expected}", remedy="mend the argument")
    return request
