"""`edged status, peers, drain, plugins, profile`: what this node is and whom it knows."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import TrustError
from ..identity import fingerprint_of
from .asking import ask
from .options import HomeOption, JsonOption
from .output import Document, show
from .tables import facts, lasting, short, sized, table

DRAIN_S = 600.0  # roles finish first; the daemon has its own, shorter bound


def status(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """This node, and its health conditions with what to do about each."""
    show(ask(home, "status"), as_json, _show_status)


def peers(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Peers with their state and links; nodes that are only seen on the network are not trusted."""
    show(ask(home, "peers"), as_json, _show_peers)


def drain(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Finish or hand over all roles, then leave."""
    show(ask(home, "drain", silence_s=DRAIN_S), as_json, _show_drained)


def plugins(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Loaded and installed plugins, their hooks, and how often each was called and failed."""
    show(ask(home, "plugins"), as_json, _show_plugins)


def profile(
    measure: Annotated[bool, typer.Option("--measure", help="Run the micro-benchmarks first.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """What this device is and can do: processor, memory, sensors, engines, links."""
    show(ask(home, "profile", {"measure": measure}, silence_s=None), as_json, _show_profile)


# --- for a person -----------------------------------------------------------------------------------


def _show_status(status: Document) -> None:
    facts(
        {
            "node": f"{status.get('name')} ({short(status.get('node_id'))})",
            "fingerprint": _fingerprint(status),
            "edged": f"{status.get('version')}, protocol {status.get('protocol')}",
            "state": status.get("state"),
            "up for": lasting(status.get("uptime_s")),
            "plugins": [_name(plugin) for plugin in status.get("plugins", ())],
            "memory": _memory(status),
            "battery": status.get("battery"),
            "daemon": sized(status.get("rss_bytes")),
        }
    )
    conditions = status.get("conditions") or ()
    if conditions:
        print()
        table(
            ("severity", "condition", "what to do"),
            [(c.get("severity"), c.get("text"), c.get("remedy")) for c in conditions],
        )


def _show_peers(document: Document) -> None:
    rows = [
        (
            peer.get("name"),
            short(peer.get("node_id")) or short(peer.get("fingerprint")),
            peer.get("state"),
            peer.get("trusted"),
            peer.get("zone"),
            peer.get("rights"),
            peer.get("address"),
            _with_unit(peer.get("rtt_ms"), "ms"),
            _with_unit(sized(peer.get("bandwidth_bytes_s")), "/s", ""),
        )
        for peer in document.get("peers", ())
    ]
    headings = ("name", "id", "state", "trusted", "zone", "rights", "address", "rtt", "bandwidth")
    table(headings, rows, empty="no peers; pair one with `edged invite` and `edged join`")


def _show_drained(document: Document) -> None:
    handed_over = document.get("handed_over") or ()
    print(f"drained; {len(handed_over)} roles handed over")


def _show_plugins(document: Document) -> None:
    keys = ("name", "version", "state", "calls", "failures", "hooks")
    table(keys, [[plugin.get(key) for key in keys] for plugin in document.get("plugins", ())])


def _show_profile(profile: Document) -> None:
    known = {key: profile.get(key) for key in ("name", "cpu", "memory", "battery", "power", "thermal", "use")}
    facts(known | {"memory": _memory(profile)})
    print()
    engines = profile.get("engines") or ()
    table(
        ("engine", "weights", "decode", "prefill", "sustained"),
        [
            (
                engine.get("name"),
                engine.get("weight_type"),
                _with_unit(sized(engine.get("decode_bytes_s")), "/s", ""),
                _with_unit(engine.get("prefill_flops_s"), "FLOP/s"),
                _percent(engine.get("sustained")),
            )
            for engine in engines
        ],
        empty="nothing measured yet; run `edged profile --measure`",
    )
    links = profile.get("links") or ()
    if links:
        print()
        table(
            ("link to", "ping", "exchange", "bandwidth", "all-reduce"),
            [
                (
                    link.get("name") or short(link.get("node_id")),
                    _with_unit(link.get("rtt_ms"), "ms"),
                    _with_unit(_milli(link.get("latency_s")), "ms"),
                    _with_unit(sized(link.get("bandwidth_bytes_s")), "/s", ""),
                    _with_unit(link.get("all_reduce_ms"), "ms"),
                )
                for link in links
            ],
        )


def _percent(part: Any) -> str | None:
    return f"{100 * part:.0f} %" if isinstance(part, float) else None


def _milli(seconds: Any) -> float | None:
    return seconds * 1000 if isinstance(seconds, float) else None


def _name(plugin: Any) -> Any:
    return plugin.get("name") if isinstance(plugin, dict) else plugin


def _fingerprint(status: Document) -> str | None:
    """What discovery announces of this node, and what [plugin.static] of another one names."""
    try:
        return fingerprint_of(str(status.get("node_id")))
    except TrustError:
        return None


def _memory(document: Document) -> str | None:
    memory = document.get("memory") or {}
    if memory.get("free") is None or memory.get("total") is None:
        return None
    text = f"{sized(memory['free'])} free of {sized(memory['total'])}"
    return f"{text}, {sized(memory['budget'])} for edged" if memory.get("budget") is not None else text


def _with_unit(value: Any, unit: str, space: str = " ") -> str | None:
    if value is None:
        return None
    return f"{value:.4g}{space}{unit}" if isinstance(value, int | float) else f"{value}{space}{unit}"
