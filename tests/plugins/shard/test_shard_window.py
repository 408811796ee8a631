"""Weights that pass through a window give the tokens of weights that are all in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from edged_plugins.shard import _spill, _weights
from edged_plugins.shard._graph import NODES_PER_LAYER
from edged_plugins.shard._spill import Spill, blank, drop
from edged_plugins.shard._window import UNIT_BYTES, UNITS_AHEAD, Window
from shard_rig import ShardEngine, Shares, greedy_run, greedy_together, running, specs_of

from edged import EngineError, EngineSpec

LEAST = UNITS_AHEAD * UNIT_BYTES + (1 << 20)  # two units and the vectors
PROMPT = [1, 504, 725, 9966]


def limited(specs: Sequence[EngineSpec], folder: Path, weights_bytes: int = LEAST) -> list[EngineSpec]:
    return [
        dataclasses.replace(spec, weights_bytes=weights_bytes, cache_folder=str(folder)) for spec in specs
    ]


def window_of(engine: ShardEngine) -> Window:
    assert engine._weights._window is not None
    return engine._weights._window


@contextlib.contextmanager
def most_of(windows: Sequence[Window]) -> Iterator[list[int]]:
    """The largest sizes of the windows while the block ran, looked at all the time."""
    most, ended = [0] * len(windows), threading.Event()

    def look() -> None:
        while not ended.wait(0.0005):
            for index, window in enumerate(windows):
                most[index] = max(most[index], window.bytes)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("budget", [LEAST, 45 << 20], ids=["least", "half"])
@pytest.mark.parametrize(
    ("stages", "numerics", "threads"),
    [
        ([(1,)], "fast", 1),
        ([(1,)], "fast", 2),
        ([(1,)], "exact", 1),
        ([(2, 1)], "fast", 1),
        ([(1,), (1,)], "fast", 1),
    ],
    ids=["one", "two threads", "exact", "tensor", "layers"],
)
def test_a_window_changes_no_token_and_stays_within_its_budget(
    smollm2: str, tmp_path: Path, stages: Sequence[Shares], numerics: str, threads: int, budget: int
) -> None:
    specs = specs_of(smollm2, stages, numerics, threads)
    with running(specs) as (engine, *_):
        expected = greedy_run(engine, PROMPT, 8)
    with running(limited(specs, tmp_path, budget)) as engines:
        windows = [e._weights._window for e in engines if e._weights._window is not None]
        assert windows
        with most_of(windows) as most:
            assert greedy_run(engines[0], PROMPT, 8) == expected
        for window, seen in zip(windows, most, strict=True):
            assert 0 < seen <= budget
            assert window.spilled_bytes > budget
            assert window.bytes_read > window.spilled_bytes  # round and round
    assert os.listdir(tmp_path) == []


def test_prompts_of_several_batches_and_sequences_side_by_side_come_out_the_same(
    smollm2: str, tmp_path: Path
) -> None:
    """Their graphs end at different places, so the units do not always come in one order."""
    random = np.random.default_rng(5)
    prompts = [random.integers(0, 40000, size).tolist() for size in (520, 3)]
    specs = specs_of(smollm2, [(1,)], threads=1)
    with running(specs) as (engine,):
        expected = greedy_together(engine, prompts, 3)
    with running(limited(specs, tmp_path)) as (engine,):
        with most_of([window_of(engine)]) as most:
            assert greedy_together(engine, prompts, 3) == expected
        assert most[0] <= LEAST


@pytest.mark.parametrize("stages", [[(1,)], [(2, 1)]], ids=["one", "tensor"])
def test_matrices_in_many_bands_of_rows_come_out_the_same(
    smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: Sequence[Shares]
) -> None:
    """As the matrices of a large model: more bands in a layer than the layer has nodes."""
    specs = specs_of(smollm2, stages, threads=1)
    prompt = list(range(1, 40))
    with running(specs) as (engine, *_):
        expected = greedy_run(engine, prompt, 4)
    monkeypatch.setattr(_weights, "UNIT_BYTES", 32 << 10)
    with running(limited(specs, tmp_path, 8 << 20)) as engines:
        assert engines[0]._weights.extra_nodes > NODES_PER_LAYER
        assert greedy_run(engines[0], prompt, 4) == expected


def test_a_model_that_fits_has_no_window(smollm2: str, tmp_path: Path) -> None:
    with running(limited(specs_of(smollm2, [(1,)]), tmp_path, 1 << 30)) as (engine,):
        assert engine._weights._window is None


def test_part_of_the_weights_stays_where_there_is_room_beside_the_window(
    smollm2: str, tmp_path: Path
) -> None:
    """What a token reads again is what did not fit, but for the window itself and a unit's rounding."""
    specs = specs_of(smollm2, [(1,)], threads=1)
    budget = 60 << 20
    with running(limited(specs, tmp_path, budget)) as (engine,):
        window = window_of(engine)
        greedy_run(engine, PROMPT, 2)
        before, tokens = window.bytes_read, 10
        greedy_run(engine, PROMPT, tokens)
        read = (window.bytes_read - before) / tokens
        assert read <= window.spilled_bytes - budget + (UNITS_AHEAD + 2) * UNIT_BYTES


def test_the_next_weights_are_read_while_the_current_ones_compute(smollm2: str, tmp_path: Path) -> None:
    """What a price counts on: nobody asks for the next unit, and it comes."""
    with running(limited(specs_of(smollm2, [(1,)], threads=1), tmp_path)) as (engine,):
        greedy_run(engine, PROMPT, 2)  # so that the order of units is known
        window = window_of(engine)
        current = next(u.number for u in window._units if not u.is_kept and u.number > 0)
        following = window._after[current]
        while window._units[following].is_kept:
            following = window._after[following]
        window.acquire(current)
        with window._changed:
            assert window._changed.wait_for(lambda: following in window._loaded, 60)
            assert window._current == current
            assert current in window._loaded


def test_a_budget_below_the_smallest_window_is_refused_with_the_numbers(smollm2: str, tmp_path: Path) -> None:
    specs = limited(specs_of(smollm2, [(1,)]), tmp_path, 2 << 20)
    expected = r"expected at least \d+ bytes for a window.*; \d+ came"
    with pytest.raises(EngineError, match=expected), running(specs):
        pass


def test_the_disk_is_checked_before_anything_is_written(
    smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_spill, "RESERVE_BYTES", 1 << 60)
    specs = limited(specs_of(smollm2, [(1,)]), tmp_path)
    with pytest.raises(EngineError, match=r"expected \d+ bytes free in .* are"), running(specs):
        pass
    assert os.listdir(tmp_path) == []


def test_weights_that_cannot_be_read_are_an_error_and_never_a_token(
    smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = specs_of(smollm2, [(1,)], threads=1)
    with running(limited(specs, tmp_path)) as (engine,):
        greedy_run(engine, PROMPT, 2)

        def fail(address: int, size: int, offset: int) -> None:
            raise EngineError("expected weights to be read; the disk failed")

        monkeypatch.setattr(window_of(engine)._spill, "load", fail)
        with pytest.raises(EngineError, match="the disk failed"):
            greedy_run(engine, PROMPT, 2)


# --- the file ---------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[tuple[np.ndarray, int]]:
    """Four pages, and their address; plain memory again at the end."""
    room = mmap.mmap(-1, 4 * mmap.PAGESIZE)
    array = np.frombuffer(room, dtype=np.uint8)
    array[:] = np.random.default_rng(0).integers(0, 256, array.size)
    yield array, array.ctypes.data
    blank(array.ctypes.data, array.nbytes)
    del array


def test_what_was_spilled_is_read_back_as_often_as_it_is_dropped(
    tmp_path: Path, memory: tuple[np.ndarray, int]
) -> None:
    array, address = memory
    expected, spill = array.copy(), Spill(str(tmp_path), array.nbytes)
    offset = spill.append(address, array.nbytes)
    spill.seal()
    spill.map(address, array.nbytes, offset)
    for _ in range(3):
        spill.load(address, array.nbytes, offset)
        assert (array == expected).all()
        drop(address, array.nbytes)
    spill.close()
    assert os.listdir(tmp_path) == []


def test_a_file_that_ends_early_is_an_error_that_names_the_folder(
    tmp_path: Path, memory: tuple[np.ndarray, int]
) -> None:
    array, address = memory
    spill = Spill(str(tmp_path), array.nbytes)
    offset = spill.append(address, array.nbytes)
    spill.seal()
    spill.map(address, array.nbytes, offset)
    os.ftruncate(spill._file.fileno(), mmap.PAGESIZE)
    with pytest.raises(EngineError, match=str(tmp_path)):
        spill.load(address, array.nbytes, offset)
    spill.close()


def test_a_kernel_without_populate_reads_through_a_buffer(
    tmp_path: Path, memory: tuple[np.ndarray, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    array, address = memory
    expected, spill = array.copy(), Spill(str(tmp_path), array.nbytes)
    offset = spill.append(address, array.nbytes)
    spill.seal()
    spill.map(address, array.nbytes, offset)
    monkeypatch.setattr(_spill, "MADV_POPULATE_READ", 999)  # no such advice: EINVAL
    spill.load(address, array.nbytes, offset)
    assert (array == expected).all()
    os.ftruncate(spill._file.fileno(), 0)
    with pytest.raises(EngineError, match="it ends early"):
        spill.load(address, array.nbytes, offset)
    spill.close()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"expected weights to be written in .*nowhere"):
        Spill(str(tmp_path / "nowhere"), 1)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K_M", "random"])
def test_every_weight_type_passes_through_a_window(
    models: Callable[[str], str], tmp_path: Path, name: str
) -> None:
    specs = specs_of(models(name), [(1,)], threads=1)
    budget = LEAST if name != "random" else 5 << 20
    with running(specs) as (engine,):
        expected = greedy_run(engine, [1, 2, 3], 6)
    with running(limited(specs, tmp_path, budget)) as (engine,):
        assert window_of(engine).spilled_bytes > budget
        assert greedy_run(engine, [1, 2, 3], 6) == expected
