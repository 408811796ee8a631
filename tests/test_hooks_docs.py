"""Every hook has a test and a heading in docs/hooks.md; what docs/plugins.md shows is a plugin that loads."""

from __future__ import annotations

import ast
import inspect
import re
import types
from pathlib import Path

import pytest

from edged import hookspecs
from edged.errors import ConfigError
from edged.plugins import Host
from edged.types import Engine, Sampling, Step

ROOT = Path(__file__).parent.parent
HOOKS_PAGE = (ROOT / "docs" / "hooks.md").read_text()
PLUGINS_PAGE = (ROOT / "docs" / "plugins.md").read_text()
HEADING = re.compile(r"^### `(\w+)(.*)`$", re.MULTILINE)


def signature(hook: str) -> str:
    """As it stands in the source."""
    return f"{hook}{inspect.signature(getattr(hookspecs, hook))}".replace("'", "")


def sections() -> dict[str, str]:
    """hook -> its section."""
    starts = [*HEADING.finditer(HOOKS_PAGE)]
    ends = [*(match.start() for match in starts[1:]), len(HOOKS_PAGE)]
    return {match[1]: HOOKS_PAGE[match.start() : end] for match, end in zip(starts, ends, strict=True)}


def test_functions() -> set[str]:
    """The names of all test functions there are."""
    return {
        node.name
        for file in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


test_functions.__test__ = False  # type: ignore[attr-defined]


def users(hook: str) -> set[str]:
    """First-party plugins that implement it."""
    return {
        file.parent.name if file.name == "__init__.py" else file.stem
        for file in (ROOT / "plugins").rglob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == hook
    }


@pytest.mark.parametrize("hook", hookspecs.KINDS)
def test_a_hook_has_a_test_of_its_name(hook: str) -> None:
    assert f"test_{hook}" in test_functions()


@pytest.mark.parametrize("hook", hookspecs.KINDS)
def test_a_hook_has_a_heading_with_its_signature(hook: str) -> None:
    assert f"### `{signature(hook)}`" in HOOKS_PAGE


def test_the_page_has_no_hook_that_there_is_not() -> None:
    assert set(sections()) == set(hookspecs.KINDS)


@pytest.mark.parametrize("hook", hookspecs.KINDS)
def test_a_hook_stands_under_its_kind(hook: str) -> None:
    before = HOOKS_PAGE[: HOOKS_PAGE.index(f"### `{hook}(")]
    assert re.findall(r"^## (\w+)$", before, re.MULTILINE)[-1].lower() == hookspecs.KINDS[hook]


@pytest.mark.parametrize("hook", hookspecs.KINDS)
def test_a_section_says_where_it_is_called_and_who_uses_it(hook: str) -> None:
    section = sections()[hook]
    assert "Called in: " in section
    assert "```python" in section
    named = section.split("First-party: ")[1]
    for plugin in users(hook):
        assert f"`{plugin}`" in named, f"{plugin} implements {hook}"
    assert users(hook) or named.startswith("none yet")


@pytest.mark.parametrize("hook", hookspecs.KINDS)
def test_an_example_is_python_that_a_host_takes(hook: str) -> None:
    [code] = re.findall(r"```python\n(.*?)```", sections()[hook], re.DOTALL)
    [function] = [n for n in ast.parse(code).body if isinstance(n, ast.FunctionDef) and n.name == hook]
    allowed = set(inspect.signature(getattr(hookspecs, hook)).parameters)
    assert {argument.arg for argument in function.args.args} <= allowed


def test_the_plugin_of_the_page_loads_and_does_what_it_says(tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", PLUGINS_PAGE, re.DOTALL)[0]
    stove = types.ModuleType("edged_stove")
    exec(compile(code, "docs/plugins.md", "exec"), stove.__dict__)
    file = tmp_path / "stove"
    host = Host()
    host.register("stove", stove, {"file": str(file)})
    assert host.loaded["stove"].hooks == ("edged_job_finished", "edged_sensors")

    sensor = host.registrations("edged_sensors")["stove"]
    assert sensor.read().temperature_celsius is None
    file.write_text("41.5\n")
    assert sensor.read().temperature_celsius == 41.5

    host.observe("edged_job_finished", job_id="1", state="done", measured={})
    assert stove.finished == {"done": 1}
    assert host.loaded["stove"].failures == 0

    mistaken = Host()
    mistaken.register("stove", stove, {"fiel": "x"})
    with pytest.raises(ConfigError, match=r"no setting plugin\.stove\.fiel; known: file"):
        mistaken.registrations("edged_sensors")


def test_the_engine_of_the_page_does_what_it_says() -> None:
    code = re.findall(r"```python\n(.*?)```", PLUGINS_PAGE, re.DOTALL)[1]
    alphabet = types.ModuleType("edged_alphabet")
    exec(compile(code, "docs/plugins.md", "exec"), alphabet.__dict__)
    written = {name for name in vars(alphabet.Alphabet) if not name.startswith("_")}
    assert written == {name for name in vars(Engine) if not name.startswith("_")} | {"end_tokens"}

    spec = types.SimpleNamespace(context_tokens=8, cache_tokens=12)
    engine: Engine = alphabet.Alphabet(spec, None)
    prompt = engine.encode([{"role": "user", "content": "uv"}], raw=False)
    assert [engine.open(number, prompt, 6) for number in (1, 2, 3)] == [0, 0, None]
    engine.begin([Step(1, prompt, 0, Sampling()), Step(2, prompt[:1], 0, None)])
    engine.begin([Step(2, prompt[1:], 1, Sampling())])
    assert [engine.finish(), engine.finish()] == [[ord("w"), None], [ord("w")]]
    assert engine.decode(prompt) == b"uv"
    engine.release(1)
    assert engine.open(3, prompt, 6) == 0
    engine.close()


def test_pages_name_files_that_are_there() -> None:
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "CHANGELOG.md"]
    for page in pages:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} names {link}"


def test_records_are_numbered_without_a_gap_and_fit_a_page() -> None:
    records = sorted((ROOT / "docs" / "adr").glob("*.md"))
    assert [int(record.name[:4]) for record in records] == list(range(1, len(records) + 1))
    for record in records:
        text = record.read_text()
        assert text.startswith(f"# {record.name[:4]} ")
        assert len(text.splitlines()) < 70, f"{record.name} is longer than a page"
