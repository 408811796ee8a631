"""The profile: what a file may say, what an error tells, where each value comes from."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edged import config
from edged.config import Duration, Profile, Size
from edged.errors import ConfigError

PATH = "profile.toml"
WATTS = "[device]\nidle_watts = 2\nload_watts = 9\n"
settings.register_profile("patient", deadline=None)  # a busy machine is slow, not wrong
settings.load_profile("patient")


def parse(text: str) -> Profile:
    return config.parse(f"version = 1\n{text}", PATH)


@pytest.mark.parametrize("name", config.shipped_names())
def test_a_shipped_profile_is_sound_and_has_its_own_name(name: str) -> None:
    assert config.parse(config.shipped(name), name).name == name


def test_an_unknown_shipped_profile_is_answered_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"no profile 'toaster'; edged brings: .*laptop-cpu"):
        config.shipped("toaster")


def test_an_empty_profile_has_every_default() -> None:
    assert parse("") == Profile()


def test_every_kind_of_value_is_read() -> None:
    read = parse(
        """
        name = "attic"
        plugins = ["echo"]
        [device]
        idle_watts = 3
        load_watts = 9.5
        [budget]
        memory = "2GiB"
        memory_share = 0.5
        [network]
        interfaces = ["lo", "192.0.2.1"]
        [jobs]
        orphan_after = "90s"
        allow_guest = true
        cache_type = "q8_0"
        [energy]
        harvest_watts = [0, 20.5]
        is_solar = true
        [plugin.echo]
        any = [1, { of = "it" }]
        """
    )
    assert read.name, read.plugins == ("attic", ("echo",))
    assert (read.device.idle_watts, type(read.device.idle_watts)) == (3.0, float)
    assert (read.budget.memory, read.budget.memory_share) == (2 << 30, 0.5)
    assert read.network.interfaces == ("lo", "192.0.2.1")
    assert (read.jobs.orphan_after, read.jobs.allow_guest, read.jobs.cache_type) == (90.0, True, "q8_0")
    assert (read.energy.harvest_watts, read.energy.is_solar) == ((0.0, 20.5), True)
    assert read.device.watts == (3.0, 9.5)
    assert read.plugin == {"echo": {"any": [1, {"of": "it"}]}}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("plugin = 3", "expected a table for each plugin for plugin"),
        ("plugin.echo = 3", "expected a table for each plugin for plugin"),
        ("plugns = []", "no setting plugns in profile.toml; did you mean plugins?"),
        ("[budjet]", "did you mean budget?"),
        (
            "[budget]\nmemroy = '1GiB'",
            "no setting budget.memroy in profile.toml; did you mean budget.memory?",
        ),
        (
            "[jobs]\nzzz = 1",
            "no setting jobs.zzz in profile.toml; known: allow_guest, cache_type, context, keep",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest_one(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name = 3", "expected text for name in profile.toml; 3 came"),
        ("plugins = 'echo'", "expected a list of texts for plugins in profile.toml; 'echo' came"),
        ("plugins = ['echo', 1]", "expected a list of texts for plugins"),
        ("plugins = ['echo', 'echo']", "expected each plugin once"),
        ("budget = 3", "expected a table for budget"),
        ("[budget]\nthreads = '2'", "expected a whole number for budget.threads in profile.toml; '2' came"),
        ("[budget]\nthreads = true", "expected a whole number for budget.threads in profile.toml; True came"),
        ("[budget]\nthreads = 2.0", "expected a whole number for budget.threads"),
        ("[budget]\nthreads = -1", "expected budget.threads of 0 (every core) or more"),
        ("[budget]\nworkers = 0", "expected budget.workers from 1 to 64"),
        ("[budget]\nmemory = 512", 'expected a size like "512MiB"'),
        ("[budget]\nmemory_share = true", "expected a number for budget.memory_share"),
        ("[budget]\nmemory_share = 0", "expected budget.memory_share above 0 and at most 1"),
        ("[budget]\nmemory_share = 1.01", "expected budget.memory_share above 0 and at most 1"),
        ("[budget]\nmemory_share = nan", "expected budget.memory_share above 0 and at most 1"),
        ("[device]\nidle_watts = 'few'", "expected a number for device.idle_watts"),
        ("[network]\nport = 65536", "expected network.port from 0 to 65535"),
        ("[network]\nencryption = 'off'", 'expected network.encryption "required" or "disabled"'),
        ("[network]\ndata_ports = '1'", "expected network.data_ports"),
        ("[jobs]\nallow_guest = 1", "expected true or false for jobs.allow_guest"),
        ("[jobs]\nqueue = 0", "expected jobs.queue of 1 or more"),
        ("[jobs]\ncontext = 63", "expected jobs.context of 64 or more"),
        ("[jobs]\nsequences = 0", "expected jobs.sequences from 1 to 32"),
        ("[jobs]\nsequences = 33", "expected jobs.sequences from 1 to 32"),
        ("[jobs]\ncache_type = 'q4_0'", 'expected "f32" or "f16" or "q8_0" for jobs.cache_type'),
        ("[jobs]\ncache_type = []", 'expected "f32" or "f16" or "q8_0" for jobs.cache_type'),
        ("[jobs]\nkeep = 7", 'expected a duration like "30s"'),
        ("[energy]\nharvest_watts = 5", "expected a list of 2 for energy.harvest_watts"),
        ("[energy]\nharvest_watts = ['0W', '20W']", "expected a number for energy.harvest_watts[1]"),
        ("[energy]\nharvest_watts = [0, 20]", "expected device.idle_watts and device.load_watts beside"),
        (f"{WATTS}[energy]\nharvest_watts = [20, 0]", "expected energy.harvest_watts as least and most"),
        (f"{WATTS}[energy]\nharvest_watts = [-1, 20]", "expected energy.harvest_watts as least and most"),
        (f"{WATTS}[energy]\nharvest_watts = [0, nan]", "expected energy.harvest_watts as least and most"),
        (f"{WATTS}[energy]\nharvest_watts = [0, 1e5]", "expected energy.harvest_watts as least and most"),
        ("[energy]\nis_solar = true", "expected energy.harvest_watts with energy.is_solar"),
    ],
)
def test_a_wrong_value_says_what_was_expected_where_and_what_came(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        parse(text)
    assert caught.value.remedy


@pytest.mark.parametrize("version", ["", "version = 0", "version = 2", "version = '1'"])
def test_a_profile_of_another_version_is_refused(version: str) -> None:
    with pytest.raises(ConfigError, match=r"expected version = 1 in profile\.toml"):
        config.parse(version, PATH)


def test_a_file_that_is_not_toml_says_which_line() -> None:
    with pytest.raises(ConfigError, match=r"expected TOML in profile\.toml; .*line 2"):
        parse("name = 1 2")


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_read_says_how_to_make_one(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / PATH
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="expected a readable profile") as caught:
        config.read(path)
    assert caught.value.remedy == "make one with `edged init`"


DURATIONS = {
    "0s": 0, "1s": 1, "500ms": 0.5, "1.5s": 1.5, "5m": 300, "2h": 7200, "7d": 604800,
    "": None, "30": None, "s": None, "-1s": None, "1 s": None, "1w": None, "1S": None, "1s ": None,
    "1e3s": None, ".5s": None, "1.s": None, "infs": None,
}  # fmt: skip


@pytest.mark.parametrize(("text", "seconds"), DURATIONS.items())
def test_durations(text: str, seconds: float | None) -> None:
    if seconds is None:
        with pytest.raises(ConfigError, match="expected a duration"):
            config.duration(text)
    else:
        assert config.duration(text) == seconds
        assert type(config.duration(text)) is Duration


SIZES = {
    "0B": 0, "4096B": 4096, "1KB": 1000, "1KiB": 1024, "512MiB": 512 << 20, "10MB": 10**7, "4GiB": 4 << 30,
    "2TiB": 2 << 40, "1TB": 10**12, "1.5GiB": 3 << 29,
    "": None, "512": None, "MiB": None, "-1B": None, "1 MiB": None, "1mib": None, "1MiB\n": None,
    "1PB": None, "1iB": None, "1e3B": None,
}  # fmt: skip


@pytest.mark.parametrize(("text", "count"), SIZES.items())
def test_sizes(text: str, count: int | None) -> None:
    if count is None:
        with pytest.raises(ConfigError, match="expected a size"):
            config.size(text)
    else:
        assert config.size(text) == count
        assert type(config.size(text)) is Size


@pytest.mark.parametrize("value", [None, 5, 5.0, True, [], "x"])
@pytest.mark.parametrize("read", [config.duration, config.size])
def test_a_duration_or_size_that_is_no_text_with_a_unit_is_refused(read: Any, value: Any) -> None:
    with pytest.raises(ConfigError):
        read(value)


PORTS = {
    "0": range(0, 1), "1024-1024": range(1024, 1025), "47100-47199": range(47100, 47200),
    "65535-65535": range(65535, 65536),
    "": None, "1": None, "47100": None, "1023-2000": None, "47199-47100": None, "47100-65536": None,
    "47100 - 47199": None, "a-b": None, "-": None,
}  # fmt: skip


@pytest.mark.parametrize(("text", "ports"), PORTS.items())
def test_data_ports(text: str, ports: range | None) -> None:
    if ports is None:
        with pytest.raises(ConfigError, match=r"expected network\.data_ports"):
            config.data_ports(text)
    else:
        assert config.data_ports(text) == ports


def test_every_setting_is_explained_with_its_origin(tmp_path: Path) -> None:
    path = tmp_path / PATH
    path.write_text('version = 1\n[budget]\nthreads = 2\n[plugin.static]\npeers = ["a"]\n')
    found = {setting.key: setting for setting in config.explain(config.read(path), path)}
    from_file = {key for key, setting in found.items() if setting.origin == str(path)}
    assert from_file == {"version", "budget.threads", "plugin.static.peers"}
    assert all(setting.origin == "default" for key, setting in found.items() if key not in from_file)
    assert found["budget.threads"].value == 2
    assert found["plugin.static.peers"].value == ["a"]
    parts = [field.name for field in dataclasses.fields(Profile)]
    assert {key.partition(".")[0] for key in found} == set(parts)


@given(st.text(max_size=200))
def test_any_text_is_a_profile_or_a_config_error(text: str) -> None:
    for candidate in (text, f"version = 1\n{text}"):
        try:
            config.parse(candidate, PATH)
        except ConfigError:
            continue
        tomllib.loads(candidate)


KEYS = st.sampled_from(["name", "plugins", "budget", "network", "jobs", "device", "plugin", "threads", "x"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(KEYS, VALUES))
def test_any_table_is_a_profile_or_a_config_error(table: dict[str, Any]) -> None:
    """What TOML can hold and more, against every type a setting has."""
    with contextlib.suppress(ConfigError):
        config._build(Profile, table, "", PATH)
