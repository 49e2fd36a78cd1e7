"""Grammars for structured output: tried out in a process that can be killed, and kept.

What a worker is given has been compiled here before: see `grammar_process.py` for what could happen else.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec
import structlog
from tokenizers import Tokenizer

from sfllm.errors import ECHO_LIMIT_CHARACTERS, ErrorCode, ServiceError
from sfllm_gateway.grammar_jobs import GrammarJob, GrammarResult, Kind
from sfllm_gateway.helpers import HelperBusyError, HelperPool

PROCESSES = 2
COMPILE_SECONDS = 5.0
MAX_TEXT_BYTES = 2**17
KEPT_BYTES = 2**24

JSON_SPACE = r"( |\n[ \t]{0,40})"
"""Between the parts of JSON: at most a space, or a line break with its indentation. A small model that may
write as much space as it likes writes nothing else."""

log = structlog.get_logger()

_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(GrammarResult)


class GrammarPool:
    """Tries out grammars and keeps the results. Owns its processes until `close`."""

    def __init__(self) -> None:
        self._helpers = HelperPool(
            "sfllm_gateway.grammar_process", first_job=_encode(GrammarJob("regex", "a")), count=PROCESSES
        )
        self._kept: OrderedDict[GrammarJob, GrammarResult] = OrderedDict()
        self._kept_bytes = 0

    async def compile(self, job: GrammarJob) -> GrammarResult:
        """What came of a job. Raises 503 when too many wait."""
        if (found := self._find(job)) is not None:
            return found
        try:
            async with self._helpers.take() as helper:
                if (found := self._find(job)) is not None:  # many ask for the same at the same time
                    return found
                result = _decoder.decode(await helper.run(_encode(job), COMPILE_SECONDS))
        except HelperBusyError as error:
            raise ServiceError(
                ErrorCode.SERVICE_UNAVAILABLE, "too many grammars wait to be compiled", retry_after_seconds=1
            ) from error
        except TimeoutError:
            log.warning("grammar takes too long, its process was killed")
            return GrammarResult("", f"it takes longer than {COMPILE_SECONDS:g} s to compile")
        except OSError as error:
            log.warning("grammar not compiled", reason=str(error))
            return GrammarResult("", "it is too large or too deep")
        self._keep(job, result)
        return result

    async def close(self) -> None:
        """Kill the processes."""
        await self._helpers.close()

    def _find(self, job: GrammarJob) -> GrammarResult | None:
        found = self._kept.get(job)
        if found is not None:
            self._kept.move_to_end(job)
        return found

    def _keep(self, job: GrammarJob, result: GrammarResult) -> None:
        self._kept[job] = result
        self._kept_bytes += _size(job, result)
        while self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= _size(*self._kept.popitem(last=False))


class ModelGrammars:
    """Grammars for one model, whose special tokens they may name."""

    def __init__(self, pool: GrammarPool, tokenizer: Tokenizer) -> None:
        self._pool = pool
        self._tokenizer = tokenizer

    async def compile(self, kind: Kind, text: str, param: str, whitespace: str = JSON_SPACE) -> str:
        """The grammar for a worker. Raises 400 naming `param` for a text that says nothing sensible.

        `whitespace` is what JSON may have between its parts, as in `GrammarJob`.
        """
        if len(text) > MAX_TEXT_BYTES or len(text.encode()) > MAX_TEXT_BYTES:
            raise _refused(param, f"more than {MAX_TEXT_BYTES} bytes")
        job = GrammarJob(kind, text, whitespace if kind == "json" else "")
        if kind == "grammar" and "<" in text:
            added = self._tokenizer.get_added_tokens_decoder().values()
            names = tuple(token.content for token in added if token.content.startswith("<"))
            size = self._tokenizer.get_vocab_size() if "<[" in text else 0
            job = msgspec.structs.replace(job, special_tokens=names, vocab_size=size)
        result = await self._pool.compile(job)
        if result.error:
            raise _refused(param, result.error)
        return result.grammar


def _size(job: GrammarJob, result: GrammarResult) -> int:
    """Roughly the bytes that both hold."""
    names = sum(map(len, job.special_tokens))
    return 500 + 4 * (len(job.text) + len(job.whitespace) + names + len(result.grammar) + len(result.error))


def _refused(param: str, reason: str) -> ServiceError:
    message = f"{param}: {reason}"[: ECHO_LIMIT_CHARACTERS + len(param)]
    return ServiceError(ErrorCode.INVALID_REQUEST, message, param=param)
