"""`edged bench`: the benchmarks of tests/bench, which only a checkout has."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .options import HomeOption, JsonOption
from .output import show
from .tables import facts, table

FOLDER = Path(__file__).parents[2] / "tests" / "bench"


def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A file of tests/bench, without its .py.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON there, too.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a benchmark: ratios measured in one run, interleaved. From a checkout only."""
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the document alone
        document = _load(FOLDER, name.replace("-", "_")).main(out)
    if out is not None:
        out.write_text(json.dumps(document, indent=2) + "\n")
    show(document, as_json, _show)


def _load(folder: Path, name: str) -> Any:
    if not folder.is_dir():
        raise ConfigError(
            "expected a checkout of edged with tests/bench; this is an installed edged",
            remedy="clone its repository and run `edged bench` there",
        )
    known = sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith("_"))
    if name not in known:
        raise ConfigError(
            f"no benchmark {name!r}; there are: {', '.join(known) or 'none'}", remedy="name one of these"
        )
    sys.path.insert(0, str(folder))  # a benchmark may import a file beside it
    spec = importlib.util.spec_from_file_location(f"edged_bench_{name}", folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _show(document: dict[str, Any]) -> None:
    facts({key: document.get(key) for key in ("name", "commit", "machine")})
    rows = [row if isinstance(row, dict) else {"": row} for row in document.get("rows", ())]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    table(keys, [[row.get(key) for key in keys] for row in rows])
