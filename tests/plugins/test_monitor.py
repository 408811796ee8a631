"""The monitor plugin: sysfs trees as devices show them, written below a temporary root."""

import os
import subprocess
import sys

import psutil
import pytest
from edged_plugins import _sensors, monitor

from edged import Battery, ConfigError, DeviceState

SUPPLY = "sys/class/power_supply"
ZONE = "sys/class/thermal"
HWMON = "sys/class/hwmon"
INA = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"
RAPL = "sys/class/powercap"


@pytest.fixture
def tree(tmp_path):
    """Write files: a folder and the names in it, or a path and its text."""

    def write(folder, **files):
        for name, content in files.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")
        return tmp_path

    write("sys")
    return write


def supplies(tree, described):
    root = tree("sys")
    for name, files in described.items():
        root = tree(f"{SUPPLY}/{name}", **files)
    return root


LAPTOP = {
    "type": "Battery",
    "status": "Discharging",
    "capacity": 61,
    "energy_now": 30_000_000,
    "energy_full": 49_180_000,
    "power_now": 7_500_000,
    "voltage_now": 11_400_000,
}
MAINS_OFF = {"type": "Mains", "online": 0}
MAINS_ON = {"type": "Mains", "online": 1}
SMALL = {
    "type": "Battery",
    "status": "Discharging",
    "capacity": 90,
    "energy_now": 9_000_000,
    "energy_full": 10_000_000,
}
LARGE = {
    "type": "Battery",
    "status": "Unknown",
    "capacity": 20,
    "energy_now": 18_000_000,
    "energy_full": 90_000_000,
}
MOUSE = {"type": "Battery", "scope": "Device", "status": "Discharging", "capacity": 5, "power_now": 1_000_000}
CHARGE = {
    "type": "Battery",
    "status": "Charging",
    "charge_now": 2_000_000,
    "charge_full": 4_000_000,
    "voltage_now": 3_800_000,
}

BATTERIES = {
    "no supply at all": ({}, None),
    "mains only": ({"AC": MAINS_ON}, None),
    "a laptop on battery": ({"AC": MAINS_OFF, "BAT0": LAPTOP}, Battery(61.0, False, False)),
    "a laptop that charges": (
        {"AC": MAINS_ON, "BAT0": {**LAPTOP, "status": "Charging"}},
        Battery(61.0, True, True),
    ),
    "full and plugged": ({"AC": MAINS_ON, "BAT0": {**LAPTOP, "status": "Full"}}, Battery(61.0, False, True)),
    "not charging": ({"BAT0": {**LAPTOP, "status": "Not charging"}}, Battery(61.0, False, None)),
    "no charger to read": ({"BAT0": LAPTOP}, Battery(61.0, False, None)),
    "charged by USB": (
        {"usb": {"type": "USB_PD", "online": 1}, "battery": LAPTOP},
        Battery(61.0, False, True),
    ),
    "one of two chargers": (
        {"AC": MAINS_OFF, "usb": {"type": "USB", "online": 1}, "B": LAPTOP},
        Battery(61.0, False, True),
    ),
    "a charger that says nothing": ({"AC": {"type": "Mains"}, "BAT0": LAPTOP}, Battery(61.0, False, None)),
    "status unknown": ({"BAT0": {**LAPTOP, "status": "Unknown"}}, Battery(61.0, None, None)),
    "status garbled": ({"BAT0": {**LAPTOP, "status": "\x00\xff"}}, Battery(61.0, None, None)),
    "percent from energies": (
        {"B": {**LAPTOP, "capacity": "", "energy_full": 60_000_000}},
        Battery(50.0, False, None),
    ),
    "percent from charges": ({"B": CHARGE}, Battery(50.0, True, None)),
    "percent out of range": ({"B": {"type": "Battery", "capacity": 255}}, Battery(None, None, None)),
    "percent negative": ({"B": {"type": "Battery", "capacity": -1}}, Battery(None, None, None)),
    "percent not a number": ({"B": {"type": "Battery", "capacity": "nan"}}, Battery(None, None, None)),
    "more energy than full": (
        {"B": {**LAPTOP, "capacity": "", "energy_now": 50_000_000}},
        Battery(100.0, False, None),
    ),
    "full energy zero": ({"B": {**LAPTOP, "capacity": "", "energy_full": 0}}, Battery(None, False, None)),
    "nothing but a type": ({"B": {"type": "Battery"}}, Battery(None, None, None)),
    "an empty bay": ({"B": {"type": "Battery", "present": 0}}, None),
    "a mouse only": ({"hidpp": MOUSE}, None),
    "a mouse beside a laptop": ({"hidpp": MOUSE, "BAT0": LAPTOP}, Battery(61.0, False, None)),
    "two batteries, by energy": ({"BAT0": SMALL, "BAT1": LARGE}, Battery(27.0, None, None)),
    "two, one charging": ({"A": {**SMALL, "status": "Charging"}, "B": LARGE}, Battery(27.0, True, None)),
    "two, one without energy": (
        {"A": SMALL, "B": {"type": "Battery", "capacity": 50}},
        Battery(None, None, None),
    ),
}


@pytest.mark.parametrize(("described", "expected"), BATTERIES.values(), ids=BATTERIES.keys())
def test_all_batteries_of_the_device_are_read_as_one(tree, described, expected):
    assert _sensors.battery(supplies(tree, described)) == expected


@pytest.mark.parametrize(
    ("described", "watts"),
    [
        ({"AC": MAINS_OFF, "BAT0": LAPTOP}, 7.5),
        ({"BAT0": {**LAPTOP, "power_now": "", "current_now": -500_000}}, 5.7),
        ({"BAT0": SMALL, "BAT1": LAPTOP}, 7.5),
        ({"BAT0": LAPTOP, "BAT1": LAPTOP}, 15.0),
        ({"AC": MAINS_ON, "BAT0": LAPTOP}, None),
        ({"BAT0": {**LAPTOP, "status": "Charging"}}, None),
        ({"BAT0": {**LAPTOP, "power_now": 0}}, None),
        ({"BAT0": SMALL}, None),
        ({"hidpp": MOUSE}, None),
    ],
)
def test_the_draw_from_the_batteries_is_the_device_s_while_it_runs_on_them(tree, described, watts):
    assert _sensors.battery_watts(supplies(tree, described)) == pytest.approx(watts)


TEMPERATURES = {
    "no sensor": ([], None),
    "one zone": ([(f"{ZONE}/thermal_zone0", {"type": "cpu-thermal", "temp": 48312})], 48.312),
    "the hottest of several": (
        [
            (f"{ZONE}/thermal_zone0", {"type": "CPU-therm", "temp": 51000}),
            (f"{ZONE}/thermal_zone1", {"type": "GPU-therm", "temp": 53500}),
            (f"{ZONE}/thermal_zone2", {"type": "CV0-therm", "temp": 99000}),
        ],
        53.5,
    ),
    "a radio is no processor": ([(f"{ZONE}/thermal_zone0", {"type": "iwlwifi_1", "temp": 61000})], None),
    "a zone that is off": ([(f"{ZONE}/thermal_zone0", {"type": "gpu-thermal", "temp": -256000})], None),
    "a zone that reads zero": ([(f"{ZONE}/thermal_zone0", {"type": "x86_pkg_temp", "temp": 0})], None),
    "beyond belief": ([(f"{ZONE}/thermal_zone0", {"type": "x86_pkg_temp", "temp": 400000})], None),
    "garbled": ([(f"{ZONE}/thermal_zone0", {"type": "x86_pkg_temp", "temp": "hot"})], None),
    "a zone without temperature": ([(f"{ZONE}/thermal_zone0", {"type": "x86_pkg_temp"})], None),
    "a chip": ([(f"{HWMON}/hwmon3", {"name": "k10temp", "temp1_input": 44125, "temp3_input": 46000})], 46.0),
    "a disk is no processor": ([(f"{HWMON}/hwmon0", {"name": "nvme", "temp1_input": 70000})], None),
}


@pytest.mark.parametrize(("folders", "expected"), TEMPERATURES.values(), ids=TEMPERATURES.keys())
def test_the_hottest_processor_sensor_counts(tree, folders, expected):
    root = tree("sys")
    for folder, files in folders:
        root = tree(folder, **files)
    assert _sensors.temperature(root) == expected


def rail(number, label, millivolts, milliamperes):
    return {f"in{number}_label": label, f"in{number}_input": millivolts, f"curr{number}_input": milliamperes}


JETSONS = {
    "Orin Nano: the input feeds the others": (
        [
            {
                **rail(1, "VDD_IN", 5000, 1200),
                **rail(2, "VDD_CPU_GPU_CV", 5000, 400),
                **rail(3, "VDD_SOC", 5000, 300),
            }
        ],
        6.0,
    ),
    "Nano: the older name": ([{**rail(1, "POM_5V_IN", 5000, 800), **rail(2, "POM_5V_GPU", 5000, 100)}], 4.0),
    "AGX Orin: two chips and no total": (
        [
            {
                **rail(1, "VDD_GPU_SOC", 20000, 200),
                **rail(2, "VDD_CPU_CV", 20000, 50),
                **rail(3, "VIN_SYS_5V0", 5000, 600),
            },
            {**rail(1, "NC", 0, 0), **rail(2, "VDDQ_VDD2_1V8AO", 1800, 500), **rail(3, "NC", 5000, 999)},
        ],
        8.9,
    ),
    "the sum of shunts is no rail": (
        [{**rail(1, "VDD_IN", 5000, 1200), **rail(7, "sum of shunt voltages", 9, 9)}],
        6.0,
    ),
    "a rail without current": ([{"in1_label": "VDD_IN", "in1_input": 5000}], None),
    "garbled": ([rail(1, "VDD_IN", "five", 1200)], None),
    "without labels": ([{"in1_input": 5000, "curr1_input": 1200}], None),
}


@pytest.mark.parametrize(("chips", "watts"), JETSONS.values(), ids=JETSONS.keys())
def test_a_jetson_s_power_is_its_input_rail_or_the_sum_where_it_has_none(tree, chips, watts):
    for number, files in enumerate(chips):
        root = tree(INA.replace("1-0040", f"1-004{number}"), **files)
    assert _sensors.jetson_watts(root) == pytest.approx(watts)


@pytest.mark.parametrize(
    ("before", "after", "range_uj", "expected"),
    [
        (1_000_000, 3_500_000, 262_143_328_850, 2.5),
        (262_143_000_000, 1_000_000, 262_143_328_850, 1.32885),
        (5, 5, 262_143_328_850, 0.0),
        (5_000_000, 1_000_000, None, None),
        (5_000_000, 1_000_000, 4_000_000, None),
    ],
    ids=["onward", "around", "at rest", "around without a range", "beyond its range"],
)
def test_an_energy_counter_wraps_at_its_range(before, after, range_uj, expected):
    assert _sensors.joules(before, after, range_uj) == pytest.approx(expected)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def zone(name, energy, range_uj=262_143_328_850):
    return {"name": name, "energy_uj": energy, "max_energy_range_uj": range_uj}


def test_packages_and_their_memory_are_summed_without_their_cores(tree):
    clock = Clock()
    for step in (0, 1):
        root = tree(f"{RAPL}/intel-rapl:0", **zone("package-0", 10_000_000 * (1 + step)))
        tree(f"{RAPL}/intel-rapl:0:0", **zone("core", 8_000_000 * (1 + step)))
        tree(f"{RAPL}/intel-rapl:0:1", **zone("dram", 2_000_000 * (1 + step)))
        tree(f"{RAPL}/intel-rapl:1", **zone("psys", 30_000_000 * (1 + step)))
        tree(f"{RAPL}/intel-rapl-mmio:0", **zone("package-0", 10_000_000 * (1 + step)))
        if step == 0:
            rapl = _sensors.Rapl(root, clock)
            assert rapl.watts() is None
            clock.now += 2.0
    assert rapl.watts() == pytest.approx(6.0)
    clock.now += 0.01
    tree(f"{RAPL}/intel-rapl:0", **zone("package-0", 99_000_000))
    assert rapl.watts() == pytest.approx(6.0)  # too little time to say anything new


@pytest.mark.parametrize(
    ("seconds", "second"),
    [
        (1000.0, zone("package-0", 20_000_000)),
        (2.0, {}),
        (2.0, zone("package-0", "?")),
        (2.0, zone("package-0", 1, range_uj="?")),
    ],
    ids=["after a long sleep", "counters gone", "counter garbled", "wrapped without a range"],
)
def test_power_is_unknown_when_two_readings_do_not_belong_together(tree, seconds, second):
    clock = Clock()
    root = tree(f"{RAPL}/intel-rapl:0", **zone("package-0", 10_000_000))
    rapl = _sensors.Rapl(root, clock)
    rapl.watts()
    for name in ("name", "energy_uj", "max_energy_range_uj"):
        (root / RAPL / "intel-rapl:0" / name).unlink()
    tree(f"{RAPL}/intel-rapl:0", **second)
    clock.now += seconds
    assert rapl.watts() is None


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (
            {
                "cpuinfo": "processor\t: 0\n"
                "model name\t: Intel(R) Core(TM) i5-8250U CPU @ 1.60GHz\nflags\t: fpu"
            },
            "Intel(R) Core(TM) i5-8250U CPU @ 1.60GHz",
        ),
        (
            {"cpuinfo": "processor\t: 0\nBogoMIPS\t: 108.00\n\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0"},
            "Raspberry Pi 5 Model B Rev 1.0",
        ),
        ({"cpuinfo": "Hardware\t: Qualcomm SM8550"}, "Qualcomm SM8550"),
        ({"cpuinfo": "model name\t:\n"}, None),
        (
            {"device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0"},
            "NVIDIA Jetson Orin Nano Developer Kit",
        ),
        ({"cpuinfo": f"model name\t: {'x' * 1000}"}, "x" * 100),
    ],
)
def test_the_processor_is_named_as_the_kernel_does(tree, files, expected):
    assert _sensors.cpu_name(tree("proc", **files)) == expected


@pytest.mark.parametrize(
    ("content", "load"), [("0.52 0.58 0.59 1/957 12345", 0.52), ("", None), ("idle", None)]
)
def test_the_load_is_the_mean_of_one_minute(tree, content, load):
    assert _sensors.load_1m(tree("proc", loadavg=content)) == load


def test_a_file_that_cannot_be_read_is_none(tree, tmp_path):
    (tmp_path / "folder").mkdir()
    assert _sensors.text(tmp_path / "folder") is None
    assert _sensors.text(tmp_path / "absent") is None
    (tmp_path / "pipe").symlink_to("pipe")
    assert _sensors.text(tmp_path / "pipe") is None


def test_every_sensor_of_an_empty_root_is_none_but_memory_and_cores(tmp_path):
    state = {entry.name: entry.read() for entry in monitor.Monitor(tmp_path).entries()}
    assert state["battery"] == state["temperature"] == state["power"] == DeviceState()
    assert state["cpu"] == DeviceState(cpu_count=state["cpu"].cpu_count)


def test_the_input_rail_comes_before_the_batteries_and_these_before_the_packages(tree, monkeypatch):
    root = tree(f"{RAPL}/intel-rapl:0", **zone("package-0", 0))
    device = monitor.Monitor(root)
    clock = Clock()
    monkeypatch.setattr(device, "_rapl", _sensors.Rapl(root, clock))
    assert device.power().power_watts is None
    clock.now += 1.0
    tree(f"{RAPL}/intel-rapl:0", **zone("package-0", 3_000_000))
    assert device.power().power_watts == pytest.approx(3.0)
    tree(f"{SUPPLY}/BAT0", **LAPTOP)
    assert device.power().power_watts == pytest.approx(7.5)
    tree(INA, **rail(1, "VDD_IN", 5000, 1200))
    assert device.power().power_watts == pytest.approx(6.0)


def test_this_device_answers_with_memory_and_cores():
    entries = monitor.edged_sensors(settings={})
    assert [entry.name for entry in entries] == ["memory", "cpu", "battery", "temperature", "power"]
    state = {entry.name: entry.read() for entry in entries}
    assert state["memory"].memory_total == psutil.virtual_memory().total
    assert 0 < state["memory"].memory_free <= state["memory"].memory_total
    assert 1 <= state["cpu"].cpu_count <= os.cpu_count()


def test_a_device_without_meminfo_does_not_crash(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("no /proc/meminfo")

    monkeypatch.setattr(psutil, "virtual_memory", broken)
    assert monitor.Monitor(tmp_path).memory() == DeviceState()


def test_a_setting_is_refused_since_there_is_none():
    with pytest.raises(ConfigError, match=r"plugin\.monitor\.root"):
        monitor.edged_sensors(settings={"root": "/"})


def test_the_monitor_loads_no_tensors():
    code = "import edged_plugins.monitor, sys; print({'numpy', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
