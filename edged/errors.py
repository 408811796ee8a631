"""Every exception edged raises on purpose, ordered by what the catcher can do.

EdgedError
├── ConfigError        fix the file or the argument (exit 2)
├── PluginError        fix the installation (exit 3)
├── InstanceError      another instance holds this home (exit 4)
├── TrustError         keys, tokens or membership are wrong (exit 5)
├── JobError           the job was refused, cancelled or failed (exit 6)
│   ├── PolicyViolation    never retry: a rule forbids it
│   ├── PeerError          go elsewhere: a node is gone, refuses or is too slow
│   └── EngineError        run elsewhere or smaller: model, memory or library
├── ProtocolError      close the connection: the peer does not speak our language
└── NoDaemonError      start a daemon (exit 7)

A message says what was expected, what came; `remedy` says what to do. Neither ever holds a prompt,
a weight or a key. `code` is a stable word for scripts.
"""

from __future__ import annotations


class EdgedError(Exception):
    """Base of all; `code` for scripts, `remedy` for people."""

    code = "error"
    exit_code = 1

    def __init__(self, message: str, *, remedy: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.remedy = remedy
        if code is not None:
            self.code = code


class ConfigError(EdgedError):
    code = "config"
    exit_code = 2


class PluginError(EdgedError):
    code = "plugin"
    exit_code = 3


class InstanceError(EdgedError):
    code = "busy-home"
    exit_code = 4


class TrustError(EdgedError):
    code = "trust"
    exit_code = 5


class JobError(EdgedError):
    code = "job-failed"
    exit_code = 6


class PolicyViolation(JobError):
    code = "refused"


class PeerError(JobError):
    """`rank`: which one of a plan's ranks it is about, where it is known."""

    code = "peer-lost"

    def __init__(
        self, message: str, *, remedy: str = "", code: str | None = None, rank: int | None = None
    ) -> None:
        super().__init__(message, remedy=remedy, code=code)
        self.rank = rank


class EngineError(JobError):
    code = "engine"


class ProtocolError(EdgedError):
    code = "protocol"


class NoDaemonError(EdgedError):
    code = "no-daemon"
    exit_code = 7


def by_code(code: str, message: str, remedy: str = "", exit_code: int = 1, kind: str = "") -> EdgedError:
    """The error that another process described by its fields; the narrowest class that fits.

    `kind`: the name of its class, for a code that is not its class's own.
    """
    classes: list[type[EdgedError]] = [EdgedError]
    for cls in classes:
        classes.extend(cls.__subclasses__())
    same_exit = [cls for cls in classes if cls.exit_code == exit_code]
    named = [cls for cls in same_exit if cls.__name__ == kind] or [
        cls for cls in same_exit if cls.code == code
    ]
    chosen = next(iter(named or same_exit), EdgedError)
    return chosen(message, remedy=remedy, code=code)
