"""The monitor plugin: sysfs trees as devices show them, written below a temporary root."""

import json
import os
import subprocess
import sys
import types
from dataclasses import replace

import psutil
import pytest
from edged_plugins import monitor
from edged_plugins.monitor import _battery, _files, _heat, _network, _power, _processor, _termux, _use

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
    found = _battery.battery(supplies(tree, described))
    assert found == (found and replace(expected, joules=found.joules, capacity_joules=found.capacity_joules))
    assert (found is None) == (expected is None)


@pytest.mark.parametrize(
    ("described", "joules", "capacity"),
    [
        ({"BAT0": LAPTOP}, 108e3, 177048.0),
        ({"B": CHARGE}, 27360.0, 54720.0),
        ({"BAT0": SMALL, "BAT1": LARGE}, 97200.0, 360e3),
        ({"A": SMALL, "B": {"type": "Battery", "capacity": 50}}, None, None),
        ({"B": {**LAPTOP, "energy_now": -1}}, None, 177048.0),
        ({"B": {**LAPTOP, "energy_now": "", "energy_full": ""}}, None, None),
    ],
    ids=["energy", "charge", "two", "one unknown", "negative", "empty"],
)
def test_the_energy_in_the_batteries_is_in_joules(tree, described, joules, capacity):
    found = _battery.battery(supplies(tree, described))
    assert (found.joules, found.capacity_joules) == (pytest.approx(joules), pytest.approx(capacity))


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
    assert _battery.battery_watts(supplies(tree, described)) == pytest.approx(watts)


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
    assert _heat.temperature(root) == expected


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
    assert _power.jetson_watts(root) == pytest.approx(watts)


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
    assert _power.joules(before, after, range_uj) == pytest.approx(expected)


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
            rapl = _power.Rapl(root, clock)
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
    rapl = _power.Rapl(root, clock)
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
    assert _processor.cpu_name(tree("proc", **files)) == expected


@pytest.mark.parametrize(
    ("content", "load"), [("0.52 0.58 0.59 1/957 12345", 0.52), ("", None), ("idle", None)]
)
def test_the_load_is_the_mean_of_one_minute(tree, content, load):
    assert _processor.load_1m(tree("proc", loadavg=content)) == load


def test_a_file_that_cannot_be_read_is_none(tree, tmp_path):
    (tmp_path / "folder").mkdir()
    assert _files.text(tmp_path / "folder") is None
    assert _files.text(tmp_path / "absent") is None
    (tmp_path / "pipe").symlink_to("pipe")
    assert _files.text(tmp_path / "pipe") is None


def test_every_sensor_of_an_empty_root_is_none_but_memory_and_cores(tmp_path):
    state = {entry.name: entry.read() for entry in monitor.Monitor(tmp_path).entries()}
    for name in ("battery", "heat", "power", "use", "network"):
        assert state[name] == DeviceState()
    assert state["cpu"] == DeviceState(cpu_count=state["cpu"].cpu_count)


def test_the_input_rail_comes_before_the_batteries_and_these_before_the_packages(tree, monkeypatch):
    root = tree(f"{RAPL}/intel-rapl:0", **zone("package-0", 0))
    device = monitor.Monitor(root)
    clock = Clock()
    monkeypatch.setattr(device, "_rapl", _power.Rapl(root, clock))
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
    assert [entry.name for entry in entries] == [
        "memory",
        "cpu",
        "battery",
        "heat",
        "power",
        "use",
        "network",
    ]
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


# --- throttling ---

FIRMWARE = "sys/devices/platform/soc/soc:firmware"
CPU0 = "sys/devices/system/cpu/cpu0/thermal_throttle"


@pytest.mark.parametrize(
    ("bits", "is_throttled"),
    [
        ("0", False),
        ("50000", False),
        ("0x4", True),
        ("50005", True),
        ("80008", True),
        ("x", None),
        ("", None),
    ],
)
def test_a_raspberry_s_firmware_says_what_is_so_now_and_what_was(tree, bits, is_throttled):
    root = tree(FIRMWARE, get_throttled=bits)
    assert _heat.Throttling(root).read() is is_throttled


@pytest.mark.parametrize(
    ("devices", "is_throttled"),
    [
        ([{"type": "Processor", "cur_state": 0}], False),
        ([{"type": "Processor", "cur_state": 0}, {"type": "cpufreq-cpu4", "cur_state": 2}], True),
        ([{"type": "pwm-fan", "cur_state": 3}], None),
        ([{"type": "Processor"}], None),
        ([{"type": "Processor", "cur_state": "no"}], None),
    ],
)
def test_passive_cooling_at_work_is_throttling_and_a_fan_is_not(tree, devices, is_throttled):
    root = tree("sys")
    for number, files in enumerate(devices):
        tree(f"{ZONE}/cooling_device{number}", **files)
    assert _heat.Throttling(root).read() is is_throttled


def test_a_counter_that_rises_between_two_readings_is_throttling(tree):
    throttling = _heat.Throttling(tree(CPU0, core_throttle_count=7))
    assert throttling.read() is None
    assert throttling.read() is False
    tree(CPU0, core_throttle_count=9)
    assert throttling.read() is True
    tree(CPU0, core_throttle_count="")
    assert throttling.read() is None


# --- power ---


def test_a_jetson_of_jetpack_4_says_its_power_itself(tree):
    folder = "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"
    root = tree(
        folder, rail_name_0="POM_5V_IN", in_power0_input=3152, rail_name_1="POM_5V_GPU", in_power1_input=120
    )
    assert _power.jetson_watts(root) == pytest.approx(3.152)


def test_a_rail_below_zero_draws_nothing(tree):
    root = tree(INA, **rail(1, "VDD_GPU", 5000, -20), **rail(2, "VDD_CPU", 5000, 400))
    assert _power.jetson_watts(root) == pytest.approx(2.0)


class Failed(Exception):
    pass


def cards(*milliwatts, init=None):
    """Stands for NVIDIA's bindings: no card is here."""

    def power(index):
        if milliwatts[index] is None:
            raise Failed
        return milliwatts[index]

    def start():
        if init is not None:
            raise init

    return types.SimpleNamespace(
        NVMLError=Failed,
        nvmlInit=start,
        nvmlDeviceGetCount=lambda: len(milliwatts),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetPowerUsage=power,
    )


@pytest.mark.parametrize(
    ("library", "watts"),
    [
        (None, None),
        (cards(), None),
        (cards(150_000, 50_500), 200.5),
        (cards(None, 50_500), 50.5),
        (cards(None), None),
        (cards(1, init=Failed()), None),
    ],
    ids=["no library", "no card", "two", "one that does not say", "none that says", "no driver"],
)
def test_the_power_of_cards_is_summed(library, watts):
    assert _power.Nvml(library).watts() == watts


# --- use ---

DESK = {"ACTIVE": 1, "TYPE": "wayland", "CLASS": "user", "REMOTE": 0}


def session(**values):
    return "\n".join(f"{key}={value}" for key, value in values.items())


@pytest.mark.parametrize(
    ("sessions", "screens", "in_use"),
    [
        ([], {}, None),
        ([DESK], {}, True),
        ([DESK], {"card0-eDP-1": {"status": "connected", "dpms": "Off"}}, False),
        ([DESK], {"card0-DP-1": {"status": "connected", "dpms": "On"}}, True),
        ([DESK], {"card0-DP-1": {"status": "disconnected", "dpms": "Off"}}, True),
        ([{**DESK, "ACTIVE": 0}], {}, False),
        ([{**DESK, "CLASS": "greeter"}], {}, False),
        ([{**DESK, "TYPE": "tty", "REMOTE": 1}], {}, False),
    ],
)
def test_somebody_at_a_lit_screen_uses_the_device(tree, sessions, screens, in_use):
    root = tree("sys")
    for number, values in enumerate(sessions):
        tree("run/systemd/sessions", **{str(number): session(**values)})
    for name, files in screens.items():
        tree(f"sys/class/drm/{name}", **files)
    assert _use.in_use(root, 0.0) is in_use


def test_a_panel_whose_light_is_off_is_not_looked_at(tree):
    tree("run/systemd/sessions", **{"1": session(**DESK)})
    tree("sys/class/drm/card0-eDP-1", status="connected", dpms="On")
    root = tree("sys/class/backlight/intel_backlight", bl_power=4)
    assert _use.in_use(root, 0.0) is False


@pytest.mark.parametrize(("age_s", "in_use"), [(10, True), (3600, False)])
def test_somebody_who_typed_lately_uses_the_device(tree, age_s, in_use):
    root = tree("dev/pts", **{"0": ""})
    os.utime(root / "dev/pts/0", (1e9 - age_s, 1e9))
    assert _use.in_use(root, 1e9) is in_use


# --- network ---

ROUTES = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"


def route(name, metric, destination="00000000", mask="00000000"):
    return f"{name}\t{destination}\t0101A8C0\t0003\t0\t0\t{metric}\t{mask}\t0\t0\t0\n"


@pytest.mark.parametrize(
    ("routes", "kinds", "is_wireless", "is_metered"),
    [
        ("", {}, None, None),
        (route("eth0", 100, "0001A8C0", "00FFFFFF"), {}, None, None),
        (route("eth0", 100), {"eth0": ""}, False, False),
        (route("eth0", 100) + route("wlan0", 600), {"wlan0": "DEVTYPE=wlan"}, False, False),
        (route("wlan0", 600), {"wlan0": "DEVTYPE=wlan"}, True, False),
        (route("wwp0", 700), {"wwp0": "DEVTYPE=wwan"}, True, True),
        (route("usb0", 100), {}, False, True),
        (route("bnep0", 100), {}, False, True),
        ("wlan0\tgarbled", {}, None, None),
    ],
)
def test_the_way_out_is_wireless_or_metered_by_its_kind(tree, routes, kinds, is_wireless, is_metered):
    root = tree("proc/net", route=ROUTES + routes)
    for name, said in kinds.items():
        tree(f"sys/class/net/{name}", uevent=f"{said}\nINTERFACE={name}")
    assert _network.is_wireless(root) is is_wireless
    assert _network.is_metered(root) is is_metered


# --- a phone ---

PHONE = {
    "present": True,
    "technology": "Li-ion",
    "health": "GOOD",
    "plugged": "UNPLUGGED",
    "status": "DISCHARGING",
    "temperature": 31.4,
    "voltage": 3800,
    "current": -820000,
    "current_average": -576,
    "percentage": 61,
    "charge_counter": 3000000,
}


@pytest.mark.parametrize(
    ("said", "battery", "watts"),
    [
        (json.dumps(PHONE), Battery(61.0, False, False, pytest.approx(41040), pytest.approx(67278.7)), 3.116),
        (
            json.dumps({**PHONE, "current": -820}),
            Battery(61.0, False, False, pytest.approx(41040), pytest.approx(67278.7)),
            3.116,
        ),
        (
            json.dumps({**PHONE, "status": "CHARGING", "plugged": "PLUGGED_AC", "charge_counter": None}),
            Battery(61.0, True, True),
            None,
        ),
        (json.dumps({**PHONE, "percentage": -1, "status": "x", "charge_counter": 0}), None, None),
        (json.dumps({"present": False, "percentage": 100}), None, None),
        (json.dumps([1]), None, None),
        ("", None, None),
        ("{", None, None),
    ],
    ids=["unpacked", "in mA", "charging", "nonsense", "absent", "a list", "empty", "cut off"],
)
def test_a_phone_s_battery_is_read_from_termux(said, battery, watts):
    state = _termux.parse(said)
    assert state.battery == battery
    assert state.power_watts == pytest.approx(watts)


def test_termux_is_asked_beside_the_daemon_and_the_last_word_stands(tmp_path):
    clock = Clock()
    said = tmp_path / "said"
    said.write_text(json.dumps(PHONE))
    termux = _termux.Termux(["cat", str(said)], clock)
    assert termux.read() == DeviceState()
    termux._running.wait(10)
    assert termux.read().battery.percent == 61.0
    said.write_text("{")
    clock.now += _termux.EVERY_S
    termux.read()
    termux._running.wait(10)
    assert termux.read().battery is None


def test_a_termux_that_hangs_is_ended(tmp_path):
    clock = Clock()
    termux = _termux.Termux(["sleep", "60"], clock)
    termux.read()
    pid = termux._running.pid
    clock.now += _termux.LIMIT_S
    assert termux.read() == DeviceState()
    assert not psutil.pid_exists(pid)


def test_a_termux_that_is_not_there_is_asked_once(tmp_path):
    termux = _termux.Termux([str(tmp_path / "absent")], Clock())
    assert termux.read() == termux.read() == DeviceState()
    assert termux._running is None
