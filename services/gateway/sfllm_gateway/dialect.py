"""What a model is taught to write besides content, as far as its chat template shows it."""

from __future__ import annotations

from typing import NamedTuple

from sfllm_gateway.parsing.formats import FORMATS, HERMES, CallFormat, format_of
from sfllm_gateway.parsing.think import CLOSER


def knows_tools(template: str) -> bool:
    """Whether a chat template shows tools to its model."""
    return "tools" in template


class Dialect(NamedTuple):
    """`calls`: tool calls are looked for, in this `form`. `thinks`: answers may begin with thinking."""

    form: CallFormat = HERMES
    calls: bool = True
    thinks: bool = False


class DialectChoice(NamedTuple):
    """What the operator says of all models: `auto`, `none`, or a parser by its name."""

    tool_calls: str = "auto"
    reasoning: str = "auto"

    def of(self, template: str) -> Dialect:
        """The dialect of a model with this chat template."""
        form = FORMATS.get(self.tool_calls) or (format_of(template) if knows_tools(template) else HERMES)
        thinks = CLOSER in template if self.reasoning == "auto" else self.reasoning == "think"
        return Dialect(form, self.tool_calls != "none", thinks)
