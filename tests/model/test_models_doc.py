"""docs/models.md says what the code supports."""

from __future__ import annotations

import re
from pathlib import Path

from model_variants import THROUGH_TRANSFORMERS

from sfllm_worker.load import gguf_families
from sfllm_worker.model.families import FAMILIES
from sfllm_worker.model.rope_config import SCALINGS

DOCUMENT = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")


def table(first_header: str) -> list[list[str]]:
    """The rows of the table whose first column has that header."""
    text = DOCUMENT[DOCUMENT.index(f"| {first_header} |") :].split("\n\n")[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines()[2:]]


def test_the_table_of_families_is_that_of_the_decoder() -> None:
    rows = [(models, architecture.strip("`")) for models, architecture, _ in table("models")]
    assert rows == [(family.name, name) for name, family in FAMILIES.items()]


def test_the_table_names_every_gguf_architecture() -> None:
    documented = {
        (architecture.strip("`"), found) for _, architecture, gguf in table("models") for found in names(gguf)
    }
    converted = {(family.architecture, name) for name, family in gguf_families.FAMILIES.items()}
    # Mistral has no architecture of its own there.
    assert documented == converted | {("MistralForCausalLM", "llama")}


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_table_of_scalings_is_that_of_the_decoder() -> None:
    assert {names(kind)[0] for kind, *_ in table("`rope_type`")} == set(SCALINGS)


def test_every_architecture_that_is_tested_through_transformers_is_named() -> None:
    plain = re.sub(r"[^a-z0-9]", "", DOCUMENT.lower())
    assert [name for name in THROUGH_TRANSFORMERS if name.replace("-", "") not in plain] == []
