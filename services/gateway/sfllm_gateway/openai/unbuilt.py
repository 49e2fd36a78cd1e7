"""Request fields that clients know and this server does not do yet.

Each is accepted at the values that change nothing and otherwise answered with 501:
a field is never ignored in silence. Building a feature deletes its row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from sfllm.errors import ErrorCode, ServiceError
from sfllm.wire import DECODE_ERRORS

UNBUILT: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "documents": ([],),
    "ebnf": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "grammar": (),
    "json_schema": (),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "prediction": (),
    "regex": (),
    "return_logprob": (False,),
    "store": (False,),
    "structural_tag": (),
    "suffix": ("",),
    "use_beam_search": (False,),
    "web_search_options": (),
}


def refuse_unbuilt(fields: Mapping[str, msgspec.Raw], path: str = "") -> None:
    """Raise 501 for the first field of a request body that asks for something unbuilt.

    `path` is where the fields are inside the body, such as "sampling_params.".
    """
    for name, raw in fields.items():
        if name not in UNBUILT:
            continue
        try:
            value = msgspec.json.decode(raw)
        except DECODE_ERRORS as error:
            raise ServiceError(
                ErrorCode.INVALID_REQUEST, f"{path}{name} is malformed", param=path + name
            ) from error
        if value is not None and not any(_same(value, neutral) for neutral in UNBUILT[name]):
            raise ServiceError(
                ErrorCode.NOT_SUPPORTED, f"{path}{name} is not supported yet", param=path + name
            )


def _same(value: Any, neutral: Any) -> bool:
    """Equality in which true is not 1."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)
