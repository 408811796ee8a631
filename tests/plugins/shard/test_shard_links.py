"""Two ranks in processes of their own settle, over real streams, on what their link asks for."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"
PATIENCE_S = 60.0

RANK = """
import sys
from edged.certificate import new_credential
from edged.channel import End, ZmqChannel
from edged.streams import Streams
from edged_plugins.shard import _ggml
from edged_plugins.shard._reduce import settle
rank, own, other = int(sys.argv[1]), sys.argv[2], sys.argv[3]
channel = ZmqChannel(rank, 2, [own], range(1), Streams(new_credential("group", rank)))
ports = channel.listen([1] if rank == 0 else [])
stream_port = channel.stream_ports.get(1, 0)
print(channel.public_key.hex(), ports.get(1, 0), channel.certificate.hex(), stream_port, flush=True)
key, port, certificate, stream_port = sys.stdin.readline().split()
end = End(bytes.fromhex(key), other, int(port), bytes.fromhex(certificate), int(stream_port))
channel.open("group", {1 - rank: end})
assert 1 - rank in channel._streams
terms = settle(_ggml.load(), channel, (0, 1), "auto", (2048, 44, 300e6))
print(terms.codec, flush=True)
channel.close()
"""


def codecs_of(prefixes: Sequence[Sequence[str]], addresses: Sequence[str]) -> list[str]:
    """What each of two ranks settles on for the 1.1B shape."""
    with contextlib.ExitStack() as stack:
        ranks: list[Any] = []
        for rank, prefix in enumerate(prefixes):
            command = [*prefix, sys.executable, "-c", RANK, str(rank), addresses[rank], addresses[1 - rank]]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            ranks.append(process)
        ends = [process.stdout.readline() for process in ranks]
        for process, end in zip(ranks, reversed(ends), strict=True):
            process.stdin.write(end)
            process.stdin.flush()
        found = []
        for process in ranks:
            said, errors = process.communicate(timeout=PATIENCE_S)
            assert process.returncode == 0, errors
            found.append(said.strip())
        return found


def test_loopback_is_not_worth_rounding() -> None:
    assert codecs_of([(), ()], ["127.0.0.1"] * 2) == ["f32", "f32"]


@pytest.mark.network
def test_a_narrow_link_takes_a_narrow_codec_and_a_wide_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0 or shutil.which("tc") is None:
        pytest.skip("needs root and iproute2: network namespaces")
    monkeypatch.syspath_prepend(str(BENCH))
    with importlib.import_module("_network").network(2) as cable:
        prefixes = [cable.prefix(number) for number in range(2)]
        addresses = [cable.address(number) for number in range(2)]
        assert codecs_of(prefixes, addresses) == ["f32", "f32"]
        cable.limit(100)
        assert codecs_of(prefixes, addresses) in (["f16", "f16"], ["q8", "q8"])
