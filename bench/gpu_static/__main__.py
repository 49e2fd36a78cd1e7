"""Compiles every GPU kernel ahead of time: none may spill, nor outgrow the committed table of registers.

`make gpu-static` compiles everything, which takes minutes; `--subset` compiles a few forms in which every
two features are together once. After a change that is meant, `make gpu-static ARGS=--write` writes the
table anew (with `--only`, the rows of those kernels).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TypeVar

from bench.gpu_static import table as tables
from bench.gpu_static.compiling import Resources, compile_all, prepare
from bench.gpu_static.forms import (
    ARCHITECTURES,
    CatalogueError,
    Form,
    all_forms,
    features,
    kernel_variants,
    pairwise,
)
from bench.gpu_static.table import Measured, Table, TableError

T = TypeVar("T")
PROGRESS = 100
SHOWN = 60


def main() -> int:
    """Compile, print a short table and what is wrong; 1 when something is, 2 when nothing could be told."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as cache:
        prepare(cache)
        return check(arguments)


def check(arguments: argparse.Namespace) -> int:
    """Compile and compare; see `main`."""
    triton = importlib.metadata.version("triton")
    try:
        variants = kernel_variants()
        table = Table.read(tables.PATH.read_text()) if tables.PATH.exists() else Table(triton, {})
    except (CatalogueError, TableError) as error:
        print(f"gpu-static: {error}", file=sys.stderr)
        return 2
    forms = all_forms(variants)
    chosen = [form for form in forms if not arguments.only or form.module in arguments.only]
    if arguments.subset:
        chosen = pairwise({form: features(form.module, variants[form[:2]]) for form in chosen})
    if not chosen:
        print(f"gpu-static: no kernel module is called {' or '.join(arguments.only)}", file=sys.stderr)
        return 2
    print(
        f"gpu-static: {len(chosen)} of {len(forms)} forms, triton {triton}, {arguments.jobs} jobs", flush=True
    )
    measured = dict(watched(compile_all(chosen, arguments.jobs)))
    print(summary(measured))
    problems = tables.own_problems(measured)
    if arguments.write:
        if not problems:
            tables.PATH.write_text(_updated(table, triton, forms, measured).written())
            print(f"gpu-static: wrote {tables.PATH}")
    else:
        problems += tables.naming_problems(forms, table)
        if table.comparable(triton):
            problems += tables.growth_problems(measured, table)
        else:
            print(f"gpu-static: registers not compared: the table is triton {table.triton}'s")
    more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    print("\n".join([*problems[:SHOWN], *more, f"gpu-static: {len(problems)} problems"]))
    return bool(problems)


def watched(results: Iterable[T]) -> Iterator[T]:
    """The same, with a word now and then of how far it is."""
    for count, result in enumerate(results, start=1):
        if count % PROGRESS == 0:
            print(f"gpu-static: {count} done", file=sys.stderr, flush=True)
        yield result


def summary(measured: Measured) -> str:
    """A row for each kernel module: forms, the most registers on each architecture, spills, shared memory."""
    rows: dict[str, dict[Form, Resources]] = defaultdict(dict)
    for form, result in measured.items():
        if isinstance(result, Resources):
            rows[form.module][form] = result
    columns = "".join(f"{f'sm_{architecture}':>8}" for architecture in ARCHITECTURES)
    lines = [f"{'kernel':24}{'forms':>7}{columns}{'spilling':>10}{'shared KiB':>12}"]
    for module, found in sorted(rows.items()):
        most = [
            max((r.registers for form, r in found.items() if form.architecture == architecture), default=0)
            for architecture in ARCHITECTURES
        ]
        spilling = sum(resources.spilled > 0 for resources in found.values())
        shared = max(resources.shared for resources in found.values()) / 1024
        cells = "".join(f"{registers or '-':>8}" for registers in most)
        lines.append(f"{module:24}{len(found):>7}{cells}{spilling:>10}{shared:>12.1f}")
    return "\n".join(lines)


def _updated(table: Table, triton: str, forms: list[Form], measured: Measured) -> Table:
    """The table with new entries for what was measured, without what no longer exists."""
    kept = {form: entry for form, entry in table.entries.items() if form in set(forms)}
    new = {form: result for form, result in measured.items() if isinstance(result, Resources)}
    return Table(triton, kept | new)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_static", description=__doc__)
    add = parser.add_argument
    add("--subset", action="store_true", help="a few forms that cover every pair of features")
    add("--only", nargs="+", default=[], metavar="MODULE", help="these kernel modules and no others")
    add("--write", action="store_true", help="write what was measured into the table, unless a form spills")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile (default: all cores)")
    arguments = parser.parse_args()
    if arguments.write and arguments.subset:
        parser.error("--write needs every form: leave out --subset")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
