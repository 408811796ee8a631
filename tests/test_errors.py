"""The tree of errors: as its docstring draws it, with an exit code for each branch."""

from __future__ import annotations

import re

import pytest

from edged import errors
from edged.errors import (
    ConfigError,
    EdgedError,
    EngineError,
    InstanceError,
    JobError,
    NoDaemonError,
    PeerError,
    PluginError,
    PolicyViolation,
    ProtocolError,
    TrustError,
    by_code,
)

CLASSES = [value for value in vars(errors).values() if isinstance(value, type)]


def drawn() -> dict[str, tuple[str, int | None]]:
    """class -> (its parent, its exit code) in the docstring's drawing."""
    found: dict[str, tuple[str, int | None]] = {}
    path = ["EdgedError"]
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^((?:│   )*)[├└]── (\w+)(.*)$", line)
        if match:
            depth = len(match[1]) // 4 + 1
            path[depth:] = [match[2]]
            code = re.search(r"exit (\d)", match[3])
            found[match[2]] = (path[depth - 1], int(code[1]) if code else None)
    return found


def test_the_drawing_is_the_tree() -> None:
    tree = {cls.__name__: cls.__bases__[0].__name__ for cls in CLASSES if cls is not EdgedError}
    assert {name: parent for name, (parent, _) in drawn().items()} == tree


def test_the_drawing_has_the_exit_codes() -> None:
    for name, (_, code) in drawn().items():
        assert code is None or getattr(errors, name).exit_code == code


@pytest.mark.parametrize(
    ("cls", "exit_code"),
    [
        (EdgedError, 1), (ProtocolError, 1), (ConfigError, 2), (PluginError, 3), (InstanceError, 4),
        (TrustError, 5), (JobError, 6), (PolicyViolation, 6), (PeerError, 6), (EngineError, 6),
        (NoDaemonError, 7),
    ],
)  # fmt: skip
def test_scripts_rely_on_the_exit_codes(cls: type[EdgedError], exit_code: int) -> None:
    assert cls("x").exit_code == exit_code


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_described_by_its_fields_is_the_same_class_again(cls: type[EdgedError]) -> None:
    error = cls("what came", remedy="what to do")
    again = by_code(error.code, str(error), error.remedy, error.exit_code)
    assert type(again) is cls
    assert (str(again), again.remedy, again.code) == ("what came", "what to do", error.code)


@pytest.mark.parametrize(
    ("code", "exit_code", "cls"),
    [
        ("memory", 6, JobError),
        ("busy-model", 2, ConfigError),
        ("", 1, EdgedError),
        ("peer-lost", 99, EdgedError),
    ],
)
def test_an_unknown_code_is_the_widest_class_of_its_exit_code(
    code: str, exit_code: int, cls: type[EdgedError]
) -> None:
    error = by_code(code, "x", exit_code=exit_code)
    assert type(error) is cls
    assert error.code == code


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_with_a_code_of_its_own_keeps_its_class(cls: type[EdgedError]) -> None:
    error = by_code("memory", "x", exit_code=cls.exit_code, kind=cls.__name__)
    assert (type(error), error.code) == (cls, "memory")


@pytest.mark.parametrize("kind", ["", "Exception", "SystemExit", "type", "EngineError"])
def test_a_kind_that_is_none_of_that_exit_code_changes_nothing(kind: str) -> None:
    assert type(by_code("trust", "x", exit_code=5, kind=kind)) is TrustError


def test_every_code_is_a_word_of_its_own() -> None:
    assert len({cls.code for cls in CLASSES}) == len(CLASSES)
