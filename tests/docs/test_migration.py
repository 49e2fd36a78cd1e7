"""What docs/migration.md names of sfllm exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import requests
from fake_scheduler import FakeScheduler
from gateway_process import GatewayProcess

from sfllm.config import Settings, options
from sfllm_cli.bench_settings import BenchSettings
from sfllm_cli.settings import AllServeSettings, BatchSettings, ChatSettings, PullSettings
from sfllm_gateway.native import GenerateRequest, SamplingParams
from sfllm_gateway.openai.chat import ChatRequest
from sfllm_gateway.openai.completions import CompletionRequest
from sfllm_gateway.openai.unbuilt import UNBUILT

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "migration.md").read_text(encoding="utf-8")

FLAG = re.compile(r"--[a-z][a-z0-9-]*")
ENDPOINT = re.compile(r"(?:GET|POST) (/[\w{}/]*)")
VARIABLE = re.compile(r"SFLLM_[A-Z_]+")
NAME = re.compile(r"`([a-z][a-z0-9_]+)`")

COMMANDS: dict[str, type[Settings]] = {
    "serve": AllServeSettings,
    "batch": BatchSettings,
    "bench": BenchSettings,
    "chat": ChatSettings,
    "pull": PullSettings,
}


class Cell(NamedTuple):
    """What the page says of sfllm in one row of a table."""

    sections: tuple[str, ...]
    text: str


def cells() -> list[Cell]:
    """The cells of the columns that are headed sfllm."""
    found, sections, column = [], [""], None
    for line in PAGE.splitlines():
        if heading := re.match(r"(#+) (.*)", line):
            sections = [*sections[: len(heading[1]) - 1], heading[2]]
        row = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not row:
            column = None
        elif column is not None and not set(line) <= set("|-"):
            found.append(Cell(tuple(sections), row[column]))
        elif column is None:
            heads = [index for index, head in enumerate(row) if head.startswith("sfllm")]
            column = heads[0] if heads else None
    return found


CELLS = cells()


def in_section(name: str, pattern: re.Pattern[str]) -> list[str]:
    return [match for cell in CELLS if name in cell.sections for match in pattern.findall(cell.text)]


def flags_of(settings: type[Settings]) -> set[str]:
    """All spellings that the command line takes."""
    known = {"--config"}
    for option in options(settings):
        known.add(option.flag)
        if option.type is bool:
            known.add(f"--no-{option.flag[2:]}")
    return known


def commands() -> list[list[str]]:
    """The words of each sfllm command in a block of commands."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.startswith("sfllm ")]


@pytest.fixture(scope="module")
def endpoints() -> Iterator[set[str]]:
    """The endpoints of a gateway's own document, as `GET /health`."""
    scheduler = FakeScheduler()
    process = GatewayProcess(scheduler)
    process.wait_ready()
    paths = requests.get(f"{process.url}/openapi.json", timeout=10).json()["paths"]
    yield {f"{method.upper()} {path.replace(':path', '')}" for path in paths for method in paths[path]}
    process.stop()
    scheduler.close()


def test_the_tables_are_found() -> None:
    assert len(CELLS) > 80
    assert all(cell.text for cell in CELLS)


def test_the_flags_exist() -> None:
    known = set[str]().union(*map(flags_of, COMMANDS.values()))
    assert set(FLAG.findall(" ".join(cell.text for cell in CELLS))) - known == set()


def test_serve_takes_the_flags_of_the_section_on_flags() -> None:
    named = set(in_section("Flags", FLAG))
    assert len(named) > 30
    assert named - flags_of(AllServeSettings) == set()


def test_the_commands_can_be_typed() -> None:
    assert commands()
    for _, command, *arguments in commands():
        flags = {word for word in arguments if word.startswith("--")}
        assert flags - flags_of(COMMANDS[command]) == set(), command


def test_the_variables_exist() -> None:
    settings = {option.variable for known in COMMANDS.values() for option in options(known)}
    # Those that are no setting: where models are kept, the file of settings, and the seed's name of a flag.
    others = set(VARIABLE.findall((DOCS / "configuration.md").read_text(encoding="utf-8"))) - settings
    named = set(VARIABLE.findall(" ".join(cell.text for cell in CELLS)))
    assert named - settings <= others & {"SFLLM_CACHE_DIR", "SFLLM_CONFIG", "SFLLM_MODEL_PATH"}


def test_the_endpoints_exist(endpoints: set[str]) -> None:
    named = {match[0] for cell in CELLS for match in re.finditer(ENDPOINT, cell.text)}
    assert len(named) > 10
    assert named - endpoints == set()


def test_the_request_fields_exist() -> None:
    types = (ChatRequest, CompletionRequest, GenerateRequest, SamplingParams)
    known = {field for struct in types for field in struct.__struct_fields__} | set(UNBUILT)
    named = set(in_section("Request fields", NAME))
    assert len(named) > 15
    assert named - known == set()


def test_the_metrics_exist() -> None:
    reference = (DOCS / "api-reference.md").read_text(encoding="utf-8").partition("## Metrics")[2]
    known = set(re.findall(r"^\| `(\w+)`", reference, flags=re.MULTILINE))
    named = set(in_section("Metrics", NAME))
    assert len(named) > 12
    assert named - known == set()


def test_the_tables_of_compatibility_say_yes_no_or_what_a_note_tells() -> None:
    text, _, notes = (DOCS / "compatibility.md").read_text(encoding="utf-8").partition("## Notes")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.count("|") == 7]
    said = [cell.strip() for row in rows for cell in row[1:] if not set(cell) <= set("-")]
    answer = re.compile(r"(yes|no|partly)(, and of others)?( \(\d+\))?|-|sfllm|vLLM|SGLang|llama\.cpp|TGI")
    assert [cell for cell in said if not answer.fullmatch(cell)] == []
    assert all("(" in cell for cell in said if cell.startswith("partly"))
    numbers = re.findall(r"^(\d+)\. ", notes, flags=re.MULTILINE)
    assert set(re.findall(r"\((\d+)\)", " ".join(said))) == set(numbers)


def test_what_the_tables_of_compatibility_say_of_sfllm_is_so(endpoints: set[str]) -> None:
    text = (DOCS / "compatibility.md").read_text(encoding="utf-8").partition("## Notes")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.count("|") == 7]
    given = " ".join(row[0] for row in rows if row[1].strip().startswith(("yes", "partly")))
    denied = " ".join(row[0] for row in rows if row[1].strip() == "no")
    served = endpoints | {"GET /openapi"}
    assert {match[0] for match in re.finditer(ENDPOINT, given)} - served == set()
    assert {match[0] for match in re.finditer(ENDPOINT, denied)} & served == set()
    types = (ChatRequest, CompletionRequest)
    built = {field for struct in types for field in struct.__struct_fields__} - set(UNBUILT)
    # Answers and single values are no fields of a request.
    assert set(NAME.findall(given)) - built == {"reasoning_content"}
    assert set(NAME.findall(denied)) & built == set()
