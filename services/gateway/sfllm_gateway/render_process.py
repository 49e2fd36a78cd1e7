"""`python -m sfllm_gateway.render_process`: renders chat templates for one gateway, until it hangs up.

The gateway keeps the time and kills; the memory is bounded by `job_loop`.
"""

from __future__ import annotations

import msgspec

from sfllm_gateway.job_loop import serve_jobs
from sfllm_gateway.prompt import RenderJob, RenderResult, render

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


if __name__ == "__main__":
    serve_jobs(answer)
