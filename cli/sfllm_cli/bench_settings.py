"""The settings of `sfllm bench`: the servers, the load, the rounds and where the results go."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from sfllm.config import Settings

Span = Annotated[str, Meta(pattern=r"^\d+(:\d+)?$")]
Milliseconds = Annotated[float, Meta(gt=0)]


class TargetSettings(Settings, frozen=True, kw_only=True):
    """The servers."""

    url: Annotated[
        tuple[str, ...],
        Meta(
            description="base address of the server, or several as NAME=ADDRESS to compare; "
            "this machine and --port if unset"
        ),
    ] = ()
    port: Annotated[int, Meta(ge=1, le=65535, description="the server's port on this machine")] = 8081
    model: Annotated[
        str | None, Meta(description="name of the model; the first that each server lists if unset")
    ] = None
    api_key: Annotated[str | None, Meta(description="key for a server that asks for one")] = None


class LoadSettings(TargetSettings, frozen=True, kw_only=True):
    """The load."""

    requests: Annotated[int, Meta(ge=1, le=1_000_000, description="how many requests to send")] = 100
    concurrency: Annotated[
        tuple[Annotated[int, Meta(ge=1, le=10000)], ...],
        Meta(description="closed loop: requests open at once; several are measured one after the other"),
    ] = (40,)
    request_rate: Annotated[
        tuple[Annotated[float, Meta(gt=0)], ...],
        Meta(
            description="open loop instead: requests a second, at random (Poisson) times or a trace's; "
            "inf sends all at once; several are measured one after the other"
        ),
    ] = ()
    prompt_tokens: Annotated[Span, Meta(description="tokens of a prompt, or a range such as 16:512")] = "128"
    output_tokens: Annotated[Span, Meta(description="most tokens of an answer, or a range")] = "128"
    prefix_tokens: Annotated[
        int, Meta(ge=0, description="tokens before the prompt that requests share with others")
    ] = 0
    prefixes: Annotated[int, Meta(ge=1, description="how many such beginnings there are")] = 1
    trace: Annotated[
        str | None,
        Meta(
            description="CSV file of time, prompt_tokens and output_tokens to replay, "
            "or 'chat' for made-up traffic like that of a chat service"
        ),
    ] = None
    endpoint: Annotated[
        Literal["completions", "chat"], Meta(description="which API; completions takes exact prompt lengths")
    ] = "completions"
    ignore_eos: Annotated[
        bool,
        Meta(description="generate to the last token whatever the model says (sfllm, vLLM, llama.cpp)"),
    ] = False
    extra_body: Annotated[
        str, Meta(description='JSON object with more fields for every request, such as {"top_k": 20}')
    ] = "{}"
    temperature: Annotated[float, Meta(ge=0, le=2, description="sampling temperature")] = 0.0
    seed: Annotated[int, Meta(ge=0, description="seed of prompts, lengths and times")] = 0
    warmup: Annotated[int, Meta(ge=0, description="requests sent first to each server and not counted")] = 1
    fresh_connections: Annotated[
        bool, Meta(description="open a connection for every request; some servers drop those kept open")
    ] = False
    timeout_seconds: Annotated[float, Meta(gt=0, description="a request that takes longer is an error")] = (
        600.0
    )


class RoundSettings(LoadSettings, frozen=True, kw_only=True):
    """Rounds."""

    rounds: Annotated[
        int, Meta(ge=1, le=1000, description="how often to measure everything in turn; medians are reported")
    ] = 1
    max_disturbance: Annotated[
        float,
        Meta(
            gt=0,
            description="with several rounds: one in which other processes used more CPU cores than this "
            "is dropped and repeated",
        ),
    ] = 0.1
    max_repeats: Annotated[int, Meta(ge=0, description="how often one round is repeated at most")] = 3
    quiet_seconds: Annotated[
        float,
        Meta(ge=0, description="with several rounds: how long to wait at most for other processes to rest"),
    ] = 30.0


class BenchSettings(RoundSettings, frozen=True, kw_only=True):
    """Results."""

    ttft_target_ms: Annotated[
        Milliseconds | None, Meta(description="goodput counts answers whose first token came within this")
    ] = None
    itl_target_ms: Annotated[
        Milliseconds | None,
        Meta(description="goodput counts answers whose mean time between arrivals is within this"),
    ] = None
    json: Annotated[str | None, Meta(description="file to write the results to; - for standard output")] = (
        None
    )
    csv: Annotated[str | None, Meta(description="file to write one line a round to")] = None
    html: Annotated[str | None, Meta(description="file to write a report with plots to")] = None
    png: Annotated[str | None, Meta(description="file to write the plots to")] = None
