"""Reports on tokens in OpenAI's shapes (chat, completions) and in vLLM's (prompts)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sfllm_gateway.logprobs import TokenReport


class TokenNames:
    r"""How tokens are called in answers: by their text, or by "token_id:N" with `as_ids`.

    A token that is only a part of a character is called by its bytes, as in "bytes:\xe2\x82".
    """

    def __init__(self, token_bytes: Callable[[int], bytes], as_ids: bool = False) -> None:
        self.bytes_of = token_bytes
        self._as_ids = as_ids

    def name(self, token: int) -> str:
        """The name of `token` where the client wants names."""
        return f"token_id:{token}" if self._as_ids else self.text(token)

    def text(self, token: int) -> str:
        """The text of `token`."""
        found = self.bytes_of(token)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


def chat_logprobs(reports: Sequence[TokenReport], names: TokenNames) -> dict[str, Any]:
    """`choices[].logprobs` of a chat."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": names.name(token), "logprob": logprob, "bytes": list(names.bytes_of(token))}

    content = [
        {
            **entry(report.token, report.logprob),
            "top_logprobs": [entry(candidate.token, candidate.logprob) for candidate in report.top],
        }
        for report in reports
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(reports: Sequence[TokenReport], names: TokenNames) -> dict[str, Any]:
    """`choices[].logprobs` of a completion."""
    return {
        "text_offset": [report.offset for report in reports],
        "token_logprobs": [report.logprob for report in reports],
        "tokens": [names.name(report.token) for report in reports],
        "top_logprobs": [_top_by_name(report, names) for report in reports],
    }


def _top_by_name(report: TokenReport, names: TokenNames) -> dict[str, float] | None:
    """The likeliest tokens and the token itself; of several with the same name the likeliest."""
    if report.logprob is None:
        return None
    found: dict[str, float] = {}
    for token, logprob in ((report.token, report.logprob), *report.top):
        name = names.name(token)
        found[name] = max(logprob, found.get(name, logprob))
    return found


def prompt_logprobs(reports: Sequence[TokenReport], names: TokenNames) -> list[dict[str, Any] | None]:
    """`prompt_logprobs`: for each token of the prompt itself and the likeliest ones, by id.

    `rank` counts from 1; it is null for a token that is not among those reported as likeliest.
    """
    found: list[dict[str, Any] | None] = []
    for report in reports:
        if report.logprob is None:
            found.append(None)
            continue
        ranks = {candidate.token: rank for rank, candidate in enumerate(report.top, start=1)}
        entries = dict([(report.token, report.logprob), *report.top])
        found.append(
            {
                str(token): {"logprob": logprob, "rank": ranks.get(token), "decoded_token": names.text(token)}
                for token, logprob in entries.items()
            }
        )
    return found
