"""A server around plain `generate`, one request at a time: what serving looks like without an engine.

Runs in the environment of transformers: `python plain_generate.py MODEL_DIRECTORY PORT`.
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

MODEL: Any = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
TOKENIZER = AutoTokenizer.from_pretrained(sys.argv[1])
ONE_AT_A_TIME = threading.Lock()


class Stream(BaseStreamer):
    """Writes an event for each token; `generate` puts the prompt first."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self.tokens = -1

    def put(self, value: torch.Tensor) -> None:
        """The prompt, then each token."""
        self.tokens += 1
        if self.tokens:
            text = TOKENIZER.decode(value) or " "
            self._handler.event({"choices": [{"index": 0, "text": text, "finish_reason": None}]})

    def end(self) -> None:
        """Nothing is left to write."""


class Handler(BaseHTTPRequestHandler):
    """The two routes that a load client needs."""

    def do_GET(self) -> None:
        """`/v1/models`."""
        body = json.dumps({"object": "list", "data": [{"id": "m", "object": "model"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        """`/v1/completions`, streamed."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request["prompt"]
        ids = TOKENIZER(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        stream = Stream(self)
        with ONE_AT_A_TIME, torch.inference_mode():
            MODEL.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=request["max_tokens"],
                min_new_tokens=request["max_tokens"],
                do_sample=False,
                pad_token_id=TOKENIZER.pad_token_id,
                streamer=stream,
            )
        usage = {"prompt_tokens": len(ids), "completion_tokens": stream.tokens}
        self.event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, event: dict[str, Any]) -> None:
        """Send one event now."""
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 # the name in the base class
        """Say nothing of each request."""


class Server(ThreadingHTTPServer):
    """Takes all connections at once; the lock makes them wait their turn."""

    request_queue_size = 1024
    daemon_threads = True


Server(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
