"""A sliding window over weights that do not fit into memory: loaded ahead, dropped behind.

After TPI-LLM (arXiv 2410.00531, section on its memory scheduler): a thread loads the next weights while
the current ones compute, round and round, token after token. Where TPI-LLM has blocks of half a layer,
a unit here is one matrix, or a band of its rows, of at most `UNIT_BYTES`, so that the smallest window is
the same for every model. Part of the units stays in memory for good, as many as the budget has room for
beside the window, spread evenly over a token (TPI-LLM's proposition 6 keeps one in T blocks).

A graph waits for a unit in a node of its own just before the product that reads it (`Ops`), so there is
one graph as without a window, and the order of units is learnt from the first one that runs. Threads of
ggml meet after every node: when the next unit is asked for, nobody reads the one before.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edged import EngineError

from . import _ggml
from ._spill import PAGE, Spill, blank, drop, whole_pages

UNIT_BYTES = 8 << 20  # of memory; a larger matrix is cut into bands of rows
NODES_PER_BAND = 3  # of a graph: wait for it, multiply, put below the ones before
UNITS_AHEAD = 2  # the one that computes and the one that loads
LOAD_S = 120.0  # a unit from the slowest of disks
HOOK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)


@dataclass(slots=True)
class Unit:
    """A tensor of weights with pages of its own."""

    number: int
    tensor: int
    buffer: int
    address: int
    bytes: int
    offset: int  # in the spill file
    is_kept: bool = False


class Window:
    """Units in at most `budget_bytes` of memory. Used by one computing thread."""

    def __init__(self, lib: _ggml.Ggml, folder: str, budget_bytes: int, spilled_bytes: int) -> None:
        """`spilled_bytes`: a bound of what `add` will be given. EngineError where that finds no room."""
        self._lib, self._budget = lib, budget_bytes
        self._spill = Spill(folder, spilled_bytes)
        self._units: list[Unit] = []
        self._bands: dict[int, list[Unit]] = {}  # by the tensor that stands for the matrix
        self._hook = HOOK(self._on_node)
        self._loader: threading.Thread | None = None
        self._changed = threading.Condition()
        self._after: dict[int, int] = {}  # unit -> the one asked for next, as last seen
        self._held: deque[int] = deque()  # loaded and not kept, in the order they will be asked for
        self._loaded: set[int] = set()
        self._bytes = 0  # of units that are loaded, or being loaded
        self._current: int | None = None
        self._wanted: int | None = None  # asked for and not there
        self._error: EngineError | None = None
        self._is_closed = False
        self._window_bytes = 0  # of the budget, what is not kept
        self.bytes_read = 0

    @property
    def bytes(self) -> int:
        """Bytes of units now in memory or on their way there; never above the budget."""
        return self._bytes

    @property
    def spilled_bytes(self) -> int:
        return sum(unit.bytes for unit in self._units)

    # --- filling ---------------------------------------------------------------------------------

    def add(self, bands: Sequence[tuple[int, int]], fill: Callable[[int, int], None]) -> int:
        """Take one matrix as bands of rows, (tensor, buffer type) each, without memory yet; `fill(band,
        tensor)` writes one. The tensor that stands for the matrix in `Ops.mul_mat`."""
        units = []
        for band, (tensor, kind) in enumerate(bands):
            size = whole_pages(self._lib.backend_buft_get_alloc_size(kind, tensor))
            buffer = self._lib.backend_buft_alloc_buffer(kind, size + PAGE)
            if not buffer:
                raise EngineError("out of memory for the model's weights", remedy="free memory there")
            address = whole_pages(self._lib.backend_buffer_get_base(buffer))
            unit = Unit(len(self._units), tensor, buffer, address, size, 0)
            self._units.append(unit)
            self._lib.backend_buffer_set_usage(buffer, _ggml.USAGE_WEIGHTS)
            self._lib.backend_tensor_alloc(buffer, tensor, address)
            fill(band, tensor)
            unit.offset = self._spill.append(address, size)
            self._spill.map(address, size, unit.offset)
            units.append(unit)
        self._bands[units[0].tensor] = units
        return units[0].tensor

    def start(self) -> None:
        """Everything was added: flush it, choose what stays, begin."""
        self._spill.seal()
        self._choose_kept()
        self._loader = threading.Thread(target=self._load_ahead, name="weights", daemon=True)
        self._loader.start()

    def _choose_kept(self) -> None:
        """Of every stretch of units the same part, so that loading can go on while they compute."""
        total, least = self.spilled_bytes, UNITS_AHEAD * max(unit.bytes for unit in self._units)
        if self._budget < least:
            raise EngineError(
                f"expected at least {least} bytes for a window over the weights; {self._budget} came",
                remedy="free memory there, or give it a smaller share",
            )
        room = self._budget if total <= self._budget else self._budget - least
        credit = 0.0
        for unit in self._units:
            credit += unit.bytes * min(1.0, room / total)
            if unit.bytes <= credit + 0.5:
                unit.is_kept, credit = True, credit - unit.bytes
        self._window_bytes = self._budget - sum(unit.bytes for unit in self._units if unit.is_kept)

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._loader is not None:
            self._loader.join(LOAD_S)
        for unit in self._units:
            blank(unit.address, unit.bytes)  # the allocator's own memory again, before it gets it back
            self._lib.backend_buffer_free(unit.buffer)
        self._units, self._bands = [], {}
        self._spill.close()

    # --- while a graph runs ----------------------------------------------------------------------

    def ops(self, context: int) -> Ops:
        return Ops(self._lib, context, self._bands, self._hook)

    def check(self) -> None:
        """After a graph: EngineError where it computed with weights that could not be loaded."""
        if self._error is not None:
            raise self._error

    def _on_node(self, target: int, source: int, thread: int, threads: int, number: int) -> None:
        """Called inside a graph, by every thread of it; userdata 0 would be a null pointer."""
        if thread == 0:
            try:
                self.acquire(number - 1)
            except EngineError as error:
                self._error = self._error or error
                unit = self._units[number - 1]
                blank(unit.address, unit.bytes)  # a touch of what cannot be read would end the process

    def acquire(self, number: int) -> None:
        """Return when unit `number` is in memory; the one acquired before it may go."""
        with self._changed:
            self._leave(number)
            while number in self._held and self._held[0] != number:
                self._drop(self._held.popleft())  # another graph than the last one: these are not next
            if number not in self._loaded:
                self._wanted = number
            self._changed.notify_all()
            self._changed.wait_for(lambda: number in self._loaded or self._error, LOAD_S)
            if self._error is not None:
                raise self._error
            if number not in self._loaded:
                raise EngineError(
                    f"expected the disk to give {self._units[number].bytes} bytes of weights "
                    f"within {LOAD_S:.0f} s; it did not"
                )

    def _leave(self, following: int) -> None:
        """Done with the current unit; remember what came after it."""
        if self._current is not None:
            self._after[self._current] = following
            if self._held and self._held[0] == self._current != following:
                self._drop(self._held.popleft())
        self._current = following

    def _drop(self, number: int) -> None:
        unit = self._units[number]
        drop(unit.address, unit.bytes)
        self._loaded.discard(number)
        self._bytes -= unit.bytes

    # --- loading ---------------------------------------------------------------------------------

    def _load_ahead(self) -> None:
        while (unit := self._take_next()) is not None:
            error = None
            try:
                self._spill.load(unit.address, unit.bytes, unit.offset)
            except EngineError as failed:
                error = failed
            with self._changed:
                self._error = self._error or error
                self._loaded.add(unit.number)
                self.bytes_read += unit.bytes
                self._changed.notify_all()

    def _take_next(self) -> Unit | None:
        """Wait for a unit that shall be loaded and has room, which it takes at once; None at the end."""
        with self._changed:
            while not self._is_closed and self._error is None:
                unit = self._next()
                if unit is not None:
                    self._bytes += unit.bytes
                    if not unit.is_kept:
                        self._held.append(unit.number)
                    return unit
                self._changed.wait()
        return None

    def _next(self) -> Unit | None:
        """What somebody waits for, else what should be asked for after all that is held."""
        if self._wanted is not None and self._wanted not in self._loaded:
            unit = self._units[self._wanted]
            while not unit.is_kept and self._held:  # what was loaded ahead is not what was asked for
                self._drop(self._held.popleft())
            return unit
        self._wanted = None
        at = self._held[-1] if self._held else self._current
        for _ in self._units:
            at = self._after.get(at) if at is not None else None
            if at is None or at == self._current or at in self._held:
                return None
            unit = self._units[at]
            if at not in self._loaded:
                has_room = unit.is_kept or self._bytes_held() + unit.bytes <= self._window_bytes
                return unit if has_room else None
        return None

    def _bytes_held(self) -> int:
        return sum(self._units[number].bytes for number in self._held)


class Ops(_ggml.Ops):
    """Graph operations, of which `mul_mat` waits for the weights of a window."""

    def __init__(self, lib: _ggml.Ggml, context: int, bands: Mapping[int, Sequence[Unit]], hook: Any) -> None:
        super().__init__(lib, context)
        self._bands, self._hook = bands, hook

    def mul_mat(self, weight: int, x: int) -> int:
        """weight times x; of a matrix in bands of rows, the bands' products one below the other."""
        found: int | None = None
        for unit in self._bands.get(weight, ()):
            ready = self._lib.map_custom1_inplace(self._context, x, self._hook, 1, unit.number + 1)
            product = self._lib.mul_mat(self._context, unit.tensor, ready)
            found = product if found is None else self._lib.concat(self._context, found, product, 0)
        return int(self._lib.mul_mat(self._context, weight, x) if found is None else found)
