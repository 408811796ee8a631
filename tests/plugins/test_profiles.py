"""The shipped profiles: valid, explained line by line, and free of repeated defaults."""

import dataclasses
import re
import tomllib
from importlib import metadata

import pytest
from edged_plugins import static

from edged import config

CLASSES = ["cloud-cpu", "cloud-gpu", "jetson-orin-nano", "laptop-cpu", "phone-termux", "raspberrypi-5"]
EACH = pytest.mark.parametrize("name", CLASSES)
FIGURES = {
    "idle_watts": (0.1, 100),
    "load_watts": (1, 1000),
    "battery_wh": (1, 200),
    "thermal_limit_celsius": (50, 110),
}


def settings_of(table, prefix=""):
    """Every value of a TOML table, as (dotted key, value)."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from settings_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def comment_of(text, key):
    """What stands beside a setting, or in the comment lines right above it."""
    lines = text.splitlines()
    [number] = [n for n, line in enumerate(lines) if re.match(rf"{re.escape(key.split('.')[-1])}\s*=", line)]
    above = []
    for line in reversed(lines[:number]):
        if not line.startswith("#"):
            break
        above.append(line)
    return " ".join([*above, lines[number].partition("  #")[2]]).strip()


def test_the_six_device_classes_are_shipped():
    assert config.shipped_names() == CLASSES


@EACH
def test_a_profile_is_valid_and_named_as_its_file(name):
    profile = config.parse(config.shipped(name), name)
    assert (profile.version, profile.name) == (1, name)


@EACH
def test_every_plugin_a_profile_enables_is_installed(name):
    installed = {entry.name for entry in metadata.entry_points(group="edged")}
    profile = config.parse(config.shipped(name), name)
    assert set(profile.plugins) <= installed
    assert set(profile.plugin) <= set(profile.plugins)


@EACH
def test_the_static_plugin_accepts_its_settings(name):
    profile = config.parse(config.shipped(name), name)
    assert static.read(profile.plugin.get("static", {})) == static.Settings()


@EACH
def test_a_figure_of_the_device_is_plausible_and_names_its_source(name):
    text = config.shipped(name)
    for key, value in tomllib.loads(text).get("device", {}).items():
        low, high = FIGURES[key]
        assert low <= value <= high
        assert "source:" in comment_of(text, key), key


@EACH
def test_a_value_differs_from_the_default_and_gives_its_reason(name):
    text = config.shipped(name)
    defaults = dict(settings_of(dataclasses.asdict(config.Profile())))
    for key, value in settings_of(tomllib.loads(text)):
        if key in ("version", "name", "plugins"):
            continue
        effective = config.duration(value) if isinstance(defaults.get(key), config.Duration) else value
        assert effective != defaults.get(key, "nothing"), f"{key} repeats the default"
        assert len(comment_of(text, key)) > 15, f"{key} has no reason beside it"


@EACH
def test_plugins_other_than_the_default_have_a_reason(name):
    text = config.shipped(name)
    profile = config.parse(text, name)
    if profile.plugins != config.DEFAULT_PLUGINS:
        assert len(comment_of(text, "plugins")) > 15


@EACH
def test_a_profile_finds_peers_in_one_way_and_reads_the_device(name):
    plugins = config.parse(config.shipped(name), name).plugins
    assert len({"mdns", "static"} & set(plugins)) == 1
    assert "monitor" in plugins


@EACH
def test_no_profile_loosens_privacy_or_encryption(name):
    profile = config.parse(config.shipped(name), name)
    assert profile.network.encryption == "required"
    assert not profile.jobs.allow_guest


def test_where_a_firewall_stands_the_ports_are_known_and_do_not_overlap():
    for name in ("cloud-cpu", "cloud-gpu"):
        network = config.parse(config.shipped(name), name).network
        ports = config.data_ports(network.data_ports)
        assert network.port not in (0, *ports)
        assert len(ports) > 8


def test_a_phone_leaves_more_memory_and_gives_it_back_sooner_than_a_laptop():
    phone, laptop = (config.parse(config.shipped(name), name) for name in ("phone-termux", "laptop-cpu"))
    assert phone.budget.memory_share < laptop.budget.memory_share
    assert phone.jobs.worker_idle < laptop.jobs.worker_idle
