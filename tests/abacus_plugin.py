"""A training without tensors, on engine echo: ranks that add each other's numbers, with checkpoints.

It stands in for split learning where the work of daemons is tested: its worker is up at once, a step takes
as long as the job's file says, and the adapter is a function of every step of every rank in order. A step
that is done twice, left out, or done from another rank's older state gives other bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edged import (
    ConfigError,
    EngineError,
    PeerError,
    PolicyViolation,
    ProtocolError,
    Role,
    Training,
    TrainingCost,
    TrainingPlan,
    TrainingSpec,
    hookimpl,
)

DEFAULTS: dict[str, Any] = {
    "model": "",
    "clients": [],
    "server": "",
    "steps": 4,
    "step_s": 0.0,
    "load_s": 0.0,
    "eval_every": 2,
    "checkpoint_every": 1,
    "fails_at": -1,
    "adapter": "",
    "patience_s": 60.0,
    "memory": 0,
    "max_length": 8,
}
PRIME = (1 << 61) - 1
KEPT = 3


@hookimpl
def edged_trainings(settings: Mapping[str, Any]) -> Sequence[Training]:
    return [Training("abacus", "echo", check, plan, cost, "abacus_plugin:Abacus")]


def check(table: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in table:
        if key not in DEFAULTS:
            raise ConfigError(f"no key {key!r} in a training job")
    found = DEFAULTS | dict(table)
    if isinstance(found["server"], Mapping):
        found["server"] = found["server"]["node"]
    return found


def plan(settings: Mapping[str, Any], model: Any, nodes: Sequence[Any]) -> TrainingPlan:
    by_name = {node.name: node for node in nodes}
    wanted = [*(client["node"] for client in settings["clients"]), settings["server"]]
    for name in wanted:
        if name not in by_name:
            raise PeerError(f"node {name!r} is not online", code="not-online")
    chosen = [by_name[name] for name in wanted]
    if nodes[0].node_id not in [node.node_id for node in chosen]:
        chosen.append(nodes[0])
    for node in chosen:
        if node.refuses:
            raise PolicyViolation(f"{node.name} takes no work now: {node.refuses}")
    roles = tuple(
        Role(rank, node.node_id, rank, (0, model.layers), (0, model.heads), (0, model.ffn), (0, 0), 1.0,
             settings["memory"])
        for rank, node in enumerate(chosen)
    )  # fmt: skip
    data = [client["data"] for client in settings["clients"]]
    mine = next(role.rank for role in roles if role.node_id == nodes[0].node_id)
    return TrainingPlan(
        dict(settings), roles, (*data, *[""] * (len(roles) - len(data))), settings["steps"],
        reporters=(len(settings["clients"]),), collector=mine,
    )  # fmt: skip


def cost(planned: TrainingPlan, model: Any, surveys: Sequence[Mapping[str, Any]]) -> TrainingCost:
    return TrainingCost(bytes_sent=planned.steps)


class _Stopped(Exception):
    pass


class Abacus:
    """One rank: clients, then the server, then maybe a collector without a part."""

    def __init__(self, spec: TrainingSpec, loaded: Any, channel: Any) -> None:
        self.spec, self.channel, self.settings = spec, channel, spec.settings
        self.clients = len(spec.settings["clients"])
        self.server = self.clients
        self.folder = Path(spec.state_folder)
        self.value = spec.rank + 1
        if spec.data_path:
            self.value += sum(Path(spec.data_path).read_bytes())
        time.sleep(self.settings["load_s"])
        self.survey = {"keeps": spec.rank <= self.server, "spent": {"beads": float(spec.rank)}}
        if spec.rank == self.server:
            self.survey["spent"] = {"beads": float("nan"), "wires": "many"}  # that counts for nothing
        self.steps_kept = tuple(sorted(self._kept()))

    def run(self, step: int, report: Callable[..., None], is_stopped: Callable[[], bool]) -> None:
        self.is_stopped = is_stopped
        with contextlib.suppress(_Stopped):
            if self.spec.rank <= self.server:
                self._steps(step, report)
            self._finish(report)

    def close(self) -> None:
        pass

    def _steps(self, first: int, report: Callable[..., None]) -> None:
        if first:
            self.value = json.loads(self._path(first).read_text())["value"]
        for later in [step for step in self._kept() if step > first]:
            self._path(later).unlink()
        for step in range(first, self.settings["steps"]):
            is_server = self.spec.rank == self.server
            if is_server and step % self.settings["eval_every"] == 0:
                report("eval", step, {"loss": self.value / PRIME, "targets": 1.0})
            if step == self.settings["fails_at"] and is_server:
                raise EngineError(f"step {step} fails", code="nan-loss")
            if is_server:
                for client in range(self.clients):
                    given = self._receive(client, step)
                    self._add(given)
                    self.channel.send(client, {"step": step, "value": self.value}, [])
                report("step", step, {"loss": self.value / PRIME, "targets": 1.0, "seconds": 0.01})
            else:
                self._pause()
                self.channel.send(self.server, {"step": step, "value": self.value}, [])
                self._add(self._receive(self.server, step))
            if (step + 1) % self.settings["checkpoint_every"] == 0 or step + 1 == self.settings["steps"]:
                self._keep(step + 1)
        if self.spec.rank == self.server:
            report("eval", self.settings["steps"], {"loss": self.value / PRIME, "targets": 1.0})

    def _add(self, other: int) -> None:
        self.value = (self.value * 48271 + other) % PRIME

    def _pause(self) -> None:
        until = time.monotonic() + self.settings["step_s"]
        while (left := until - time.monotonic()) > 0:
            if self.is_stopped():
                raise _Stopped
            time.sleep(min(left, 0.1))

    def _receive(self, other: int, step: int) -> int:
        while not self.channel.poll(other, 0.2):
            if self.is_stopped():
                raise _Stopped
        header, _ = self.channel.receive(other, 0.2)
        if header.get("step") != step:
            raise ProtocolError(f"expected step {step} of rank {other}, got {header.get('step')}")
        return int(header["value"])

    # --- checkpoints ---

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step}.json"

    def _kept(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        found = (re.fullmatch(r"step-(\d+)\.json", path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def _keep(self, step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        making = self.folder / "making"
        making.write_text(json.dumps({"value": self.value}))
        os.replace(making, self._path(step))
        for old in self._kept()[:-KEPT]:
            self._path(old).unlink()

    # --- the end ---

    def _finish(self, report: Callable[..., None]) -> None:
        steps, collector = self.settings["steps"], self.spec.collector
        if self.spec.rank != collector:
            if self.spec.rank <= self.server:
                self.channel.send(collector, {"step": -1, "value": self.value}, [])
            return
        values = [
            self.value if rank == collector else self._receive(rank, -1) for rank in range(self.server + 1)
        ]
        folder = self.folder / "adapter"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps({"r": 1, "lora_alpha": 1.0}))
        data = b"".join(value.to_bytes(8, "little") for value in values)
        head = {"values": {"dtype": "I64", "shape": [len(values)], "data_offsets": [0, len(data)]}}
        packed = json.dumps(head).encode()
        (folder / "adapter_model.safetensors").write_bytes(len(packed).to_bytes(8, "little") + packed + data)
        report("done", steps, {})
