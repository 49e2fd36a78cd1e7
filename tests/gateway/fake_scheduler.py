"""A scheduler and its worker in one thread, scripted: the gateway's peer, on real sockets.

The model is deterministic: a prompt that contains `say:TEXT` (up to `|` or a special
token) is answered with the bytes of TEXT and the end token, any other with the letters
a, b, c and so on for ever. The next token is a function of prompt and position, so a
request that is resubmitted with its tokens so far goes on where it was. Log probabilities
are a function of the token.
"""

from __future__ import annotations

import re
import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import zmq
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from sfllm import wire
from sfllm.asset_pull import asset_of, chunk_of
from sfllm.messages import (
    ALL_CHOICES,
    ASSETS,
    GATEWAY_TO_SCHEDULER,
    Admitted,
    AssetGet,
    Cancel,
    Finished,
    GatewayBeat,
    GatewayBye,
    GatewayHello,
    GatewayWelcome,
    Interrupted,
    Message,
    ModelCard,
    Models,
    ModelState,
    Pooling,
    PromptLogprobs,
    Rejected,
    Resend,
    SchedulerBeat,
    Submit,
    Timings,
    Tokens,
)
from sfllm.sockets import PeerUnreachableError, RouterLink
from sfllm.token_batch import NO_LOGPROBS, Logprobs, TokenBatch

TEMPLATE = (
    "{% if tools %}{{ tools | length }} tools\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END_TOKEN = 257
VOCABULARY = 259
POLL_MILLISECONDS = 5
PROMPT_PIECE = 4


def byte_tokenizer() -> Tokenizer:
    """Token i is byte i; 256, 257 and 258 are special."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = {byte: chr(byte) for byte in printable}
    rest = [byte for byte in range(256) if byte not in characters]
    characters |= {byte: chr(256 + number) for number, byte in enumerate(rest)}
    vocabulary = {characters[byte]: byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>", "<pad>")]
    )
    return tokenizer


ASSET_FILES = {
    "tokenizer.json": byte_tokenizer().to_str().encode(),
    "chat_template.jinja": TEMPLATE.encode(),
    "tokenizer_config.json": b'{"eos_token": "<|im_end|>"}',
}


def model_card(
    name: str = "tiny", aliases: tuple[str, ...] = ("tiny-alias",), pooling: Pooling | None = None
) -> ModelCard:
    return ModelCard(
        name=name,
        aliases=aliases,
        root="tiny-root",
        created=1_700_000_000,
        max_model_len=512,
        vocab_size=VOCABULARY,
        eos_token_ids=(END_TOKEN,),
        assets=tuple(asset_of(file, content) for file, content in ASSET_FILES.items()),
        pooling=pooling,
    )


def next_token(prompt: list[int], position: int) -> int:
    """The model."""
    text = bytes(token if token < 256 else 0x7C for token in prompt)
    script = re.search(rb"say:([^|]*)", text)
    if script is None:
        return ord("a") + position % 26
    return script[1][position] if position < len(script[1]) else END_TOKEN


def row_of(prompt: Sequence[int]) -> tuple[float, ...]:
    """The model's embedding of a prompt."""
    return (float(len(prompt)), float(sum(prompt)), float(prompt[0]), -float(prompt[-1]))


def candidates(token: int, top: int) -> list[tuple[int, float]]:
    """The token itself and the `top` likeliest ones; z is never among them, and impossible."""
    if token == ord("z"):
        return [(token, float("-inf")), *((ord("a") + rank, -0.5 - rank) for rank in range(top))]
    others = [((token + rank) % VOCABULARY, -0.5 - rank) for rank in range(1, top)]
    return [(token, -0.25), *[(token, -0.25), *others][:top]]


def logprobs(tokens: list[int], top: int) -> Logprobs:
    if top < 0:
        return NO_LOGPROBS
    flat = [candidate for token in tokens for candidate in candidates(token, top)]
    return Logprobs(top + 1, [token for token, _ in flat], [value for _, value in flat])


@dataclass
class Script:
    """What the next requests meet. Changed by tests between requests."""

    tokens_per_message: int = 1
    reject: Rejected | None = None
    interrupt_at: list[int] = field(default_factory=list)
    """At which generated lengths to lose the worker, once each."""
    suspects: int = 0
    """Of how many requests the worker may have died that is lost next."""
    pause_at: int | None = None
    """Send no more once a choice has so many tokens, until `resume`."""
    repeat_tokens: bool = False
    skip_at: list[int] = field(default_factory=list)
    """At which lengths to lose one token message, once each."""
    skip_prompt_at: list[int] = field(default_factory=list)
    """At which starts to lose one message of the prompt's log probabilities, once each."""
    ignore_submits: int = 0
    cached_tokens: int = 0
    forget_embeddings: int = 0
    """How many ends of prompts to send without their embedding."""


@dataclass
class _Running:
    peer: bytes
    submit: Submit
    prompt: list[int]
    generated: dict[int, list[int]]


class FakeScheduler:
    """Serves until `close`. `seen` records what came from gateways; wait for it with `wait_for`."""

    def __init__(self, gateway_address: str = "tcp://127.0.0.1:*", asset_address: str = "") -> None:
        self.script = Script()
        self.models: tuple[ModelState, ...] = (ModelState(model_card(), 1),)
        self.files = {asset_of("", content).sha256: content for content in ASSET_FILES.values()}
        self.seen: list[Message] = []
        self.prompts: list[list[int]] = []
        self.epoch = id(self)
        self.lease_seconds = 1.0
        self._changed = threading.Condition()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = RouterLink(self._context, gateway_address)
        self._assets = RouterLink(self._context, asset_address or "tcp://127.0.0.1:*")
        self.gateway_address, self.asset_address = self._router.address, self._assets.address
        self._running: dict[tuple[bytes, int], _Running] = {}
        self.gateways: set[bytes] = set()
        self._resumed = False
        self._forget = False
        self._announce = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Vanish without a goodbye."""
        self._stop.set()
        self._thread.join(10)
        self._router.close(linger_milliseconds=0)
        self._assets.close(linger_milliseconds=0)
        self._context.term()

    def wait_for(self, kind: type[Message], count: int = 1, timeout: float = 10) -> list[Message]:
        """The messages of this kind once `count` of them came."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.of(kind)) >= count, timeout), (kind, self.seen)
            return self.of(kind)

    def of(self, kind: type[Message]) -> list[Message]:
        return [message for message in self.seen if isinstance(message, kind)]

    def resume(self) -> None:
        """Go on after `pause_at`."""
        self.script.pause_at = None

    def forget_gateways(self) -> None:
        """As if every gateway's lease had run out."""
        self._forget = True

    def set_models(self, *states: ModelState) -> None:
        self.models = states
        self._announce = True

    @property
    def running(self) -> int:
        return len(self._running)

    # the thread

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router.socket, zmq.POLLIN)
        poller.register(self._assets.socket, zmq.POLLIN)
        decode, decode_asset = wire.decoder(GATEWAY_TO_SCHEDULER), wire.decoder(ASSETS)
        while not self._stop.is_set():
            poller.poll(0 if self._running else POLL_MILLISECONDS)
            while received := self._router.receive():
                peer, frame = received
                self._take(peer, *decode(frame))
            while received := self._assets.receive():
                peer, frame = received
                get = decode_asset(frame).message
                assert isinstance(get, AssetGet)
                content = self.files.get(get.sha256)
                self._assets.send(peer, wire.encode(chunk_of(get.sha256, content, get.offset)))
            if self._forget:
                self._forget = False
                self.gateways.clear()
                self._running.clear()
            if self._announce:
                self._announce = False
                for peer in self.gateways:
                    self._send(peer, Models(self.models))
            for running in list(self._running.values()):
                self._step(running)

    def _take(self, peer: bytes, message: Message, arrays: tuple[wire.Array, ...]) -> None:
        if isinstance(message, GatewayHello):
            self.gateways.add(peer)
            self._send(peer, GatewayWelcome(self.epoch, 0.2, self.lease_seconds))
            self._send(peer, Models(self.models))
        elif isinstance(message, GatewayBye):
            self.gateways.discard(peer)
        elif peer not in self.gateways:
            self._send(peer, GatewayWelcome(self.epoch, 0.2, self.lease_seconds))
            return
        elif isinstance(message, GatewayBeat):
            self._send(peer, SchedulerBeat(self.epoch))
        elif isinstance(message, Submit):
            self.prompts.append(list(arrays[0]))
            self._admit(peer, message, arrays)
        elif isinstance(message, Cancel):
            self._cancel(peer, message)
        elif isinstance(message, Resend):
            self._resend(peer, message)
        with self._changed:
            self.seen.append(message)
            self._changed.notify_all()

    def _admit(self, peer: bytes, submit: Submit, arrays: tuple[wire.Array, ...]) -> None:
        if self.script.ignore_submits:
            self.script.ignore_submits -= 1
            return
        if self.script.reject is not None:
            fields = self.script.reject
            self._send(
                peer,
                Rejected(
                    submit.handle, submit.attempt, fields.code, fields.message, fields.retry_after_seconds
                ),
            )
            return
        held = self._running.get((peer, submit.handle))
        if held is None or held.submit.attempt < submit.attempt:
            so_far, generated = list(arrays[1]), {}
            for choice, count in zip(submit.choices, submit.generated_counts, strict=True):
                generated[choice], so_far = so_far[:count], so_far[count:]
            self._running[peer, submit.handle] = _Running(peer, submit, list(arrays[0]), generated)
        self._send(peer, Admitted(submit.handle, submit.attempt))
        if submit.sampling.prompt_logprobs >= 0:
            self._report_prompt(peer, submit, list(arrays[0]))

    def _report_prompt(self, peer: bytes, submit: Submit, prompt: list[int]) -> None:
        """In pieces, each of which repeats the last token of the one before."""
        for start in range(1, len(prompt), PROMPT_PIECE):
            begin = max(start - 1, 1)
            if begin in self.script.skip_prompt_at:
                self.script.skip_prompt_at.remove(begin)
                continue
            found = logprobs(prompt[begin : start + PROMPT_PIECE], submit.sampling.prompt_logprobs)
            message = PromptLogprobs(submit.handle, submit.attempt, begin, found.width)
            arrays = memoryview(array("I", found.ids)), memoryview(array("f", found.values))
            self._send(peer, message, *arrays)

    def _cancel(self, peer: bytes, cancel: Cancel) -> None:
        running = self._running.get((peer, cancel.handle))
        if running is None or running.submit.attempt > cancel.attempt:
            return
        if cancel.choice == ALL_CHOICES:
            running.generated.clear()
        else:
            running.generated.pop(cancel.choice, None)
        if not running.generated:
            del self._running[peer, cancel.handle]

    def _resend(self, peer: bytes, resend: Resend) -> None:
        running = self._running.get((peer, resend.handle))
        if running is None or resend.choice not in running.generated:
            return
        batch = TokenBatch()
        ids = running.generated[resend.choice][resend.start :]
        batch.append(resend.handle, resend.attempt, resend.choice, resend.start, ids)
        self._send(peer, Tokens(), *batch.arrays())

    def _step(self, running: _Running) -> None:
        submit = running.submit
        if submit.sampling.pooling:
            self._end(running, [(0, "stop", -1, 0)])
            return
        batch = TokenBatch()
        finished = []
        for choice, tokens in list(running.generated.items()):
            if self.script.pause_at is not None and len(tokens) >= self.script.pause_at:
                continue
            start, reason, stop_token = len(tokens), "", -1
            while len(tokens) - start < self.script.tokens_per_message and not reason:
                token = next_token(running.prompt, len(tokens))
                stops = {*submit.sampling.stop_token_ids, END_TOKEN}
                if token in stops and not submit.sampling.ignore_eos:
                    reason, stop_token = "stop", token
                    break
                tokens.append(token)
                if len(tokens) >= submit.sampling.max_tokens:
                    reason = "length"
            repeated = max(start - 2, 0) if self.script.repeat_tokens else start
            if start in self.script.skip_at:
                self.script.skip_at.remove(start)
            elif len(tokens) > repeated:
                fresh = tokens[repeated:]
                batch.append(
                    *(submit.handle, submit.attempt, choice, repeated, fresh),
                    logprobs=logprobs(fresh, submit.sampling.logprobs),
                )
            if reason:
                finished.append((choice, reason, stop_token, len(tokens)))
        if len(batch):
            self._send(running.peer, Tokens(), *batch.arrays())
        self._end(running, finished)

    def _end(self, running: _Running, finished: list[tuple[int, str, int, int]]) -> None:
        submit, key = running.submit, (running.peer, running.submit.handle)
        embedding: Sequence[float] = ()
        if submit.sampling.pooling and self.script.forget_embeddings > 0:
            self.script.forget_embeddings -= 1
        elif submit.sampling.pooling:
            embedding = row_of(running.prompt)
        for choice, reason, stop_token, count in finished:
            del running.generated[choice]
            self._send(
                running.peer,
                Finished(
                    *(submit.handle, submit.attempt, choice, reason, stop_token),
                    *(len(running.prompt), self.script.cached_tokens, count, Timings(0.1, 0.2, 0.3)),
                ),
                wire.as_array("f", embedding),
            )
        if not running.generated:
            self._running.pop(key, None)
        longest = max(map(len, running.generated.values()), default=-1)
        if longest in self.script.interrupt_at:
            self.script.interrupt_at.remove(longest)
            del self._running[key]
            self._send(
                running.peer, Interrupted(submit.handle, submit.attempt, "lost", "w-1", self.script.suspects)
            )

    def _send(self, peer: bytes, message: Message, *arrays: wire.Array) -> None:
        try:
            self._router.send(peer, wire.encode(message, *arrays))
        except PeerUnreachableError:
            self.gateways.discard(peer)
