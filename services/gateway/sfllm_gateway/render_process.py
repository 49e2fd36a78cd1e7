"""`python -m sfllm_gateway.render_process`: renders chat templates for one gateway, until it hangs up.

Jobs come on the standard input and results go to the standard output, each a length (see `LENGTH`)
and JSON. The gateway keeps the time and kills; the memory is bounded here.
"""

from __future__ import annotations

import resource
import sys

import msgspec

from sfllm_gateway.prompt import LENGTH, RenderJob, RenderResult, render

MEMORY_BYTES = 2**30
LONGEST_PROMPT_CHARACTERS = 2**26

_decoder = msgspec.json.Decoder(RenderJob)
_encode = msgspec.json.Encoder().encode


def answer(body: bytes) -> bytes:
    """The encoded result of an encoded job, whatever the template does."""
    try:
        result = render(_decoder.decode(body))
        if result.text is not None and len(result.text) > LONGEST_PROMPT_CHARACTERS:
            raise ValueError("the prompt is too long")
        return _encode(result)
    except Exception as error:  # noqa: BLE001 - out of memory, text that is no Unicode: all the template's
        reason = str(error) or type(error).__name__
        text = f"the model's chat template cannot render these messages: {reason[:200]}"
        return _encode(RenderResult(None, text.encode("utf-8", "replace").decode(), "messages"))


def main() -> None:
    """Answer jobs until the standard input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    jobs, results = sys.stdin.buffer, sys.stdout.buffer
    while len(head := jobs.read(LENGTH.size)) == LENGTH.size:
        (size,) = LENGTH.unpack(head)
        body = jobs.read(size)
        if len(body) < size:
            return
        result = answer(body)
        results.write(LENGTH.pack(len(result)) + result)
        results.flush()


if __name__ == "__main__":
    main()
