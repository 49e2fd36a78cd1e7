"""Reasoning: how much of it is wanted, and where it is in an answer."""

from __future__ import annotations

from typing import Any, Literal

from sfllm_gateway.parsing.think import OPENER

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


def template_variables(effort: Effort | None, given: dict[str, Any] | None) -> dict[str, Any] | None:
    """The template's variables for an effort: templates know it by its name, or only whether to think at all.

    The client's own variables go before.
    """
    if effort is None:
        return given
    return {"reasoning_effort": effort, "enable_thinking": effort != "none", **(given or {})}


def begins_inside(prompt: str) -> bool:
    """Whether a prompt ends with thinking that is begun."""
    return prompt.rstrip().endswith(OPENER)
