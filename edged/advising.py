"""What model a device should run, in which weights, how it should be tuned. Pure; every row has its source.

A model is worth running where it fits beside the device's own work and answers as fast as a person reads.
Decoding reads all weights for each token, so the measured bytes/s of a weight type bound its speed. Where
none was measured the memory of the likest known device stands for it, and the advice says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .sizes import WORKER_BYTES

READING_TOKENS_S = 5.0
READING_SOURCE = "He et al., arXiv:2407.00029: a person reads about a token in 200 ms"
BITS = {"Q8_0": 8.5, "Q6_K": 6.5625, "Q4_K_M": 4.85, "Q4_0": 4.5}  # a weight; the best first
MEASURED_AS = {"Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q4_K_M": "Q4_K", "Q4_0": "Q4_0"}
BITS_SOURCE = "ggml's block sizes; Q4_K_M as llama.cpp mixes it"
SIZES = (0.135e9, 0.36e9, 0.5e9, 1.1e9, 1.7e9, 3e9, 4e9, 8e9, 14e9, 32e9, 70e9)  # that are published
LORA_BYTES, LORA_SOURCE = (
    2.6,
    "Hu et al., arXiv:2106.09685: the frozen weights (F16) stay, the adapters are small",
)
FORWARD_BYTES, FORWARD_SOURCE = (
    2.1,
    "Malladi et al., arXiv:2305.17333: tuning by forward passes takes inference's memory",
)
EFFICIENCY = 0.5  # of a memory's bandwidth, that decoding on processors reaches; on accelerators up to 0.85
SMALL_SOURCE = "Qin et al., arXiv:2406.03777: a compressed model may learn better from little personal data"


@dataclass(frozen=True, slots=True)
class Hardware:
    """A device whose memory bandwidth is published. `machine`: as `uname -m` says."""

    name: str
    machine: str
    processors: int
    memory_bytes: float
    bytes_s: float
    source: str


KNOWN = (
    Hardware("Raspberry Pi 5", "aarch64", 4, 8e9, 17e9, "Raspberry Pi: 32 bits of LPDDR4X-4267"),
    Hardware("Jetson Orin Nano", "aarch64", 6, 8e9, 68e9, "NVIDIA's data sheet, 102 GB/s as Super"),
    Hardware("Jetson AGX Orin", "aarch64", 12, 64e9, 204.8e9, "NVIDIA's data sheet"),
    Hardware(
        "phone with a Snapdragon 8 Elite", "aarch64", 8, 12e9, 77e9, "Qualcomm's slides, the lower figure"
    ),
    Hardware("laptop with DDR4-3200", "x86_64", 8, 16e9, 51.2e9, "JEDEC JESD79-4: two channels of 8 bytes"),
)
OTHER_MACHINE = 2.0  # another instruction set counts as much as a quarter of the processors


@dataclass(frozen=True, slots=True)
class Advice:
    what: str  # "model size", "quantisation", "tuning"
    choice: str
    reason: str
    source: str


def advise(
    room_bytes: int,
    decode_bytes_s: Mapping[str, float],
    parameters: float | None = None,
    like: Hardware | None = None,
) -> list[Advice]:
    """Advice for a device with `room_bytes` for edged and these measured speeds, by weight type; for a model
    of so many parameters, or for the largest that should run here. Types that were not measured are judged by
    memory; where none was, all as on a device `like` this one."""
    room = room_bytes - WORKER_BYTES
    if not decode_bytes_s and like is not None:
        speed = EFFICIENCY * like.bytes_s
        likened = advise(room_bytes, dict.fromkeys(MEASURED_AS.values(), speed), parameters)
        return [_likened(advice, like) for advice in likened]
    found = []
    if parameters is None:
        size = max((size for size in SIZES if weights_for(size, room, decode_bytes_s)), default=None)
        found.append(_size_advice(size, room))
        if size is None:
            return found
        parameters = size
    found.append(_weights_advice(parameters, room, decode_bytes_s))
    found.append(_tuning_advice(parameters, room))
    return found


def weights_for(parameters: float, room: float, decode_bytes_s: Mapping[str, float]) -> str | None:
    """The best weight type that fits and reads as fast as a person does; None where none does."""
    for name, bits in BITS.items():
        size, speed = parameters * bits / 8, decode_bytes_s.get(MEASURED_AS[name])
        if size <= room and (speed is None or speed / size >= READING_TOKENS_S):
            return name
    return None


def _likened(advice: Advice, like: Hardware) -> Advice:
    """Advice that rests on speed, with what the speed was taken from."""
    if advice.what == "tuning":
        return advice
    guess = f"by half of a {like.name}'s memory bandwidth"
    reason = f"{advice.reason}; not measured here (edged profile --measure), so {guess}"
    return dataclasses.replace(advice, reason=reason, source=f"{advice.source}; {like.source}")


def nearest(known: Sequence[Hardware], machine: str, processors: int, memory_bytes: float) -> Hardware:
    """The known device likest to one of these figures, itself where it is known.

    After MetaInf (arXiv:2410.21340): what is predicted for hardware never seen is what holds for the nearest.
    """

    def distance(each: Hardware) -> float:
        sizes = abs(math.log2(each.memory_bytes / memory_bytes)), abs(math.log2(each.processors / processors))
        return sum(sizes) + OTHER_MACHINE * (each.machine != machine)

    return min(known, key=distance)


def tokens_s(read_bytes: float, bytes_s: float, efficiency: float = EFFICIENCY) -> float:
    """Tokens a second of a device that reads `read_bytes`, weights and KV cache, for each, over a memory of
    `bytes_s`."""
    return efficiency * bytes_s / read_bytes


def quickest(seconds: Mapping[str, float], cost: Mapping[str, float], budget: float) -> str | None:
    """The method of the least predicted time among those whose cost is within the budget; None where none is.

    Source: MetaInf (arXiv:2410.21340), with any predictor; the first of equals.
    """
    return min((name for name in seconds if cost[name] <= budget), key=lambda n: seconds[n], default=None)


def _size_advice(size: float | None, room: float) -> Advice:
    if size is None:
        return Advice(
            "model size",
            "none alone",
            f"{_mib(room)} hold no published model; let other nodes help",
            BITS_SOURCE,
        )
    reason = f"the largest that fits {_mib(room)} and answers at {READING_TOKENS_S:g} tokens a second or more"
    return Advice("model size", f"{size / 1e9:g}B", reason, READING_SOURCE)


def _weights_advice(parameters: float, room: float, decode_bytes_s: Mapping[str, float]) -> Advice:
    name = weights_for(parameters, room, decode_bytes_s)
    if name is None:
        size = {each: parameters * bits / 8 for each, bits in BITS.items()}
        time = {n: size[n] / decode_bytes_s.get(MEASURED_AS[n], math.inf) for n in BITS}
        fits = quickest(time, size, room)
        if fits is None:
            reason = (
                f"not even Q4_0 fits {_mib(room)}: run it over several nodes (--strategy layers or tensor)"
            )
            return Advice("quantisation", "Q4_0, divided", reason, BITS_SOURCE)
        reason = (
            "it fits, but reads slower than a person: several nodes (--strategy tensor) or a smaller model"
        )
        return Advice("quantisation", fits, reason, READING_SOURCE)
    known = decode_bytes_s.get(MEASURED_AS[name])
    bytes_ = parameters * BITS[name] / 8
    speed = (
        f", {tokens_s(bytes_, known, 1):.0f} tokens a second"
        if known
        else "; its speed was not measured here"
    )
    return Advice("quantisation", name, f"the finest weights that fit: {_mib(bytes_)}{speed}", BITS_SOURCE)


def _tuning_advice(parameters: float, room: float) -> Advice:
    if parameters * LORA_BYTES <= room:
        return Advice(
            "tuning",
            "LoRA here",
            f"weights in F16 and a step take {_mib(parameters * LORA_BYTES)}",
            LORA_SOURCE,
        )
    if parameters * FORWARD_BYTES <= room:
        return Advice(
            "tuning",
            "forward passes only (fedkseed, mezo, fwdllm)",
            "a backward pass does not fit, a forward one does",
            FORWARD_SOURCE,
        )
    return Advice(
        "tuning", "split learning, or a smaller model", f"F16 weights do not fit {_mib(room)}", SMALL_SOURCE
    )


def _mib(size: float) -> str:
    return f"{size / 2**20:.0f} MiB"


def rows(advice: Sequence[Advice]) -> list[dict[str, str]]:
    return [{"what": a.what, "choice": a.choice, "reason": a.reason, "source": a.source} for a in advice]
