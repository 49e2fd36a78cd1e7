"""The committed table of what each form needs, and what is wrong with a new measurement beside it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from bench.gpu_static.compiling import Resources
from bench.gpu_static.forms import ARCHITECTURES, Form

PATH = Path(__file__).with_name("table.csv")
GROWTH = 1.10
"""How many times the table's registers a form may take."""

# The most shared memory of one program (CUDA C++ Programming Guide, compute capabilities).
_MOST_SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
_HEADER = [
    "module", "variant",
    *(f"{what}_{architecture}" for what in ("registers", "shared") for architecture in ARCHITECTURES),
]  # fmt: skip

Measured = Mapping[Form, Resources | str]
"""What forms need, or why they did not compile."""


class TableError(Exception):
    """The table's file cannot be read."""


class Table:
    """Registers and shared memory of every form, by one release of triton."""

    def __init__(self, triton: str, entries: Mapping[Form, Resources]) -> None:
        self.triton = triton
        self.entries = dict(entries)

    @classmethod
    def read(cls, text: str) -> Table:
        """Parse the file's text. Raises `TableError`."""
        first, _, rows = text.partition("\n")
        mark, _, triton = first.partition("triton ")
        if mark != "# " or not triton:
            raise TableError("the table's first line does not name triton's version: '# triton 3.6.0'")
        entries = {}
        try:
            for row in csv.DictReader(io.StringIO(rows)):
                for architecture in ARCHITECTURES:
                    form = Form(row["module"], row["variant"], architecture)
                    registers, shared = row[f"registers_{architecture}"], row[f"shared_{architecture}"]
                    if registers:
                        entries[form] = Resources(int(registers), 0, int(shared))
        except (KeyError, TypeError, ValueError) as error:
            raise TableError(f"the table has a row that cannot be read: {error!r}") from error
        return cls(triton, entries)

    def written(self) -> str:
        """The file's text; cells of an architecture that a variant has no entry for are empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_HEADER)
        for module, variant in sorted({form[:2] for form in self.entries}):
            found = [self.entries.get(Form(module, variant, architecture)) for architecture in ARCHITECTURES]
            registers = [resources.registers if resources else "" for resources in found]
            shared = [resources.shared if resources else "" for resources in found]
            writer.writerow([module, variant, *registers, *shared])
        return f"# triton {self.triton}\n{text.getvalue()}"

    def comparable(self, triton: str) -> bool:
        """Whether registers counted by that release mean the same: the same but for its last number."""
        return self.triton.split(".")[:2] == triton.split(".")[:2]


def own_problems(measured: Measured) -> list[str]:
    """What is wrong with forms by themselves: did not compile, spill, or take more memory than there is."""
    problems = []
    for form, result in measured.items():
        if isinstance(result, str):
            problems.append(f"{form.name} does not compile: {result}")
            continue
        if result.spilled:
            problems.append(f"{form.name} spills {result.spilled} bytes ({result.registers} registers)")
        most = _MOST_SHARED[form.architecture]
        if result.shared > most:
            problems.append(f"{form.name} wants {result.shared} bytes of shared memory, of {most}")
    return problems


def growth_problems(measured: Measured, table: Table) -> list[str]:
    """Forms that take over `GROWTH` times the table's registers."""
    problems = []
    for form, result in measured.items():
        entry = table.entries.get(form)
        if entry is None or isinstance(result, str):
            continue
        if result.registers > entry.registers * GROWTH:
            problems.append(f"{form.name} takes {result.registers} registers, {entry.registers} in the table")
    return problems


def naming_problems(forms: Iterable[Form], table: Table) -> list[str]:
    """Forms that the table lacks or that only the table has. `forms` are all that exist."""
    current, listed = set(forms), table.entries.keys()
    lacking = [f"{form.name} ({form.module}) is not in the table" for form in sorted(current - listed)]
    stale = [f"{form.name} ({form.module}) is only in the table" for form in sorted(listed - current)]
    return lacking + stale
