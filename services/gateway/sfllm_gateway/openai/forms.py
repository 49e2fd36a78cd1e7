"""The fields that say what form an answer must have."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

Schema = Annotated[dict[str, Any], Meta(description="a JSON schema")]
SchemaOrText = Annotated[dict[str, Any] | str, Meta(description="a JSON schema, as an object or as its text")]


class JsonSchemaFormat(msgspec.Struct, kw_only=True):
    """A schema with its name. It is enforced whether `strict` or not."""

    name: str
    schema: Schema | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    """OpenAI's way: `type` is text, json_object or json_schema."""

    type: str
    json_schema: JsonSchemaFormat | None = None
    schema: Annotated[dict[str, Any], Meta(description="with json_object, as llama.cpp has it")] | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """vLLM's way: one form, and what white space its JSON may have."""

    json: SchemaOrText | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: Annotated[str, Meta(description="Lark, or GBNF")] | None = None
    json_object: bool | None = None
    whitespace_pattern: (
        Annotated[str, Meta(description="what JSON may have between its parts, as a regular expression")]
        | None
    ) = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: Annotated[bool, Meta(description="only false")] | None = None
    structural_tag: Annotated[str, Meta(description="not supported")] | None = None
