"""The settings of each service. Units are in the names; the description is the help text."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address
from typing import Annotated, Literal

from msgspec import Meta

from sfllm.config import SECRET, Settings

Port = Annotated[int, Meta(ge=0, le=65535)]
Addresses = Annotated[tuple[str, ...], Meta(min_length=1)]


class CommonSettings(Settings, frozen=True, kw_only=True):
    """Logging and monitoring."""

    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="how much to log")
    ] = "info"
    log_format: Annotated[Literal["text", "json"], Meta(description="how log lines look")] = "text"
    admin_host: Annotated[str, Meta(description="address of this process's own /health and /metrics")] = (
        "127.0.0.1"
    )
    admin_port: Annotated[
        int, Meta(ge=0, le=65535, description="port of this process's own /health and /metrics; 0 for none")
    ] = 0
    metrics_prefix: Annotated[
        str, Meta(pattern="^[a-zA-Z_][a-zA-Z0-9_:]*$", description="prefix of metric names")
    ] = "sfllm:"
    link_keys: Annotated[
        str | None,
        Meta(
            description="file of this process's keys for the links between the services, made by "
            "`sfllm keys links`; without it links are neither encrypted nor do they know their peers"
        ),
    ] = None
    insecure_links: Annotated[
        bool, Meta(description="let links without keys go beyond this machine, as in a private network")
    ] = False
    otlp_endpoint: Annotated[
        Annotated[str, Meta(pattern=r"^https?://[^/]")] | None,
        Meta(
            description="where an OpenTelemetry collector takes OTLP over HTTP, as http://collector:4318; "
            "no request is traced if unset"
        ),
    ] = None
    trace_sample_rate: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="share of requests that are traced, unless a header traceparent comes along and "
            "decides; the gateway's value counts",
        ),
    ] = 1.0


class GatewaySettings(CommonSettings, frozen=True, kw_only=True):
    """HTTP gateway."""

    host: Annotated[str, Meta(description="address that the HTTP API listens on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="port of the HTTP API")] = 8081
    api_key: Annotated[
        tuple[str, ...],
        Meta(
            description="keys that clients may present, for trying out; better as a variable than as a flag, "
            "which everyone on the machine can read",
            extra=SECRET,
        ),
    ] = ()
    api_key_file: Annotated[
        str | None,
        Meta(
            description="a file of hashed keys that clients may present, made by `sfllm keys add`; "
            "read again when it changes; without any key everyone is let in"
        ),
    ] = None
    allow_anonymous: Annotated[
        bool, Meta(description="let everyone use the API beyond this machine without a key")
    ] = False
    tool_call_parser: Annotated[
        Literal["auto", "hermes", "llama3", "mistral", "none"],
        Meta(
            description="how models write tool calls: hermes also for Qwen; "
            "auto: by each model's chat template; none: calls stay text"
        ),
    ] = "auto"
    reasoning_parser: Annotated[
        Literal["auto", "think", "none"],
        Meta(
            description="think: what stands in <think> goes to reasoning_content; "
            "auto: of models whose chat template knows it"
        ),
    ] = "auto"
    cors_origins: Annotated[
        tuple[Annotated[str, Meta(pattern=r"^(\*|https?://[^/*]+)$")], ...],
        Meta(
            description="origins of web pages that may read answers, as https://chat.example.com; * for all"
        ),
    ] = ()
    tls_cert_file: Annotated[
        str | None, Meta(description="certificate chain in PEM, to serve HTTPS instead of HTTP")
    ] = None
    tls_key_file: Annotated[str | None, Meta(description="the certificate's private key in PEM")] = None
    gateway_address: Annotated[
        Addresses,
        Meta(description="where the scheduler waits for gateways; several schedulers: an address of each"),
    ] = ("tcp://127.0.0.1:5557",)
    asset_address: Annotated[
        Addresses,
        Meta(description="where the scheduler hands out tokenizer files; several: in the same order"),
    ] = ("tcp://127.0.0.1:5559",)
    max_body_bytes: Annotated[int, Meta(ge=1024, description="largest request body")] = 16 * 2**20
    max_streams: Annotated[int, Meta(ge=1, description="most requests open at once in one gateway")] = 2048
    max_journal_bytes: Annotated[
        int, Meta(ge=2**20, description="most bytes of prompts and answers that one gateway keeps at once")
    ] = 512 * 2**20
    max_idempotency_bytes: Annotated[
        int,
        Meta(
            ge=0,
            description="most bytes of answers that one gateway keeps for retries with an Idempotency-Key",
        ),
    ] = 64 * 2**20
    idempotency_seconds: Annotated[
        float, Meta(gt=0, description="how long an answer is kept for retries with an Idempotency-Key")
    ] = 600.0
    max_attempts: Annotated[
        int, Meta(ge=1, description="times a request may be on a worker that crashes before it fails")
    ] = 20
    request_timeout_seconds: Annotated[
        float, Meta(gt=0, description="deadline of a request without a header X-Request-Timeout")
    ] = 600.0
    connect_wait_seconds: Annotated[
        float,
        Meta(ge=0, description="how long a new request waits for a scheduler and its model to be there"),
    ] = 10.0
    max_request_timeout_seconds: Annotated[
        float, Meta(gt=0, description="latest deadline that a request may ask for")
    ] = 3600.0
    keep_alive_seconds: Annotated[
        float, Meta(gt=0, description="a silent stream gets a comment this often")
    ] = 15.0
    drain_seconds: Annotated[float, Meta(ge=0, description="how long SIGTERM waits for open requests")] = 30.0
    shutdown_delay_seconds: Annotated[
        float,
        Meta(ge=0, description="how long after SIGTERM open connections are still served new requests"),
    ] = 1.0

    def __post_init__(self) -> None:
        """Refuse addresses that do not fit together, half of what TLS needs, and doors that nobody keeps."""
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("--tls-cert-file and --tls-key-file need each other")
        _check_addresses(gateway_address=self.gateway_address, asset_address=self.asset_address)
        _check_links(self, self.gateway_address, self.asset_address)
        anonymous = not self.api_key and self.api_key_file is None
        if anonymous and not self.allow_anonymous and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} lets everyone who reaches it use the API: give --api-key-file, "
                "made by `sfllm keys add`, or say --allow-anonymous"
            )


class SchedulerSettings(CommonSettings, frozen=True, kw_only=True):
    """Scheduler."""

    gateway_address: Annotated[str, Meta(description="address to bind for gateways")] = "tcp://127.0.0.1:5557"
    worker_address: Annotated[str, Meta(description="address to bind for workers")] = "tcp://127.0.0.1:5558"
    asset_address: Annotated[str, Meta(description="address to bind for tokenizer files")] = (
        "tcp://127.0.0.1:5559"
    )
    policy: Annotated[
        Literal["auto", "length", "prefix", "fcfs"],
        Meta(
            description="order of waiting requests and choice of workers: length (short prompts first, "
            "grouped, age wins), prefix (by arrival, to whoever has the beginning cached), auto (both), fcfs"
        ),
    ] = "auto"
    max_queue_requests: Annotated[int, Meta(ge=1, description="waiting requests before answering 429")] = 1024
    max_overtakes: Annotated[
        int,
        Meta(
            ge=0,
            description="times a request may be passed by later ones of its tenant and priority, for each "
            "worker that serves its model",
        ),
    ] = 1_000
    target_ttft_seconds: Annotated[
        float,
        Meta(gt=0, description="requests that can still have a first token in so long go before later ones"),
    ] = 2.0
    tenant_weights: Annotated[
        tuple[Annotated[str, Meta(pattern=r"^.+=(?=.*[1-9])[0-9]+(\.[0-9]+)?$")], ...],
        Meta(description="shares of tenants, as name=2, for those that get more or less than a share of 1"),
    ] = ()
    tenant_requests_per_minute: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="requests a minute of one tenant before answering 429; no limit if unset"),
    ] = None
    tenant_tokens_per_minute: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(
            description="prompt and output tokens a minute of one tenant before answering 429; "
            "no limit if unset"
        ),
    ] = None
    tenant_limits: Annotated[
        tuple[Annotated[str, Meta(pattern=r"^.+=([1-9][0-9]*)?:([1-9][0-9]*)?$")], ...],
        Meta(
            description="requests and tokens a minute of single tenants instead of those for all, as "
            "name=60:20000; without a number, as name=60: or name=:, there is no such limit"
        ),
    ] = ()
    worker_wait_seconds: Annotated[
        float, Meta(gt=0, description="how long a request waits for a worker of its model")
    ] = 30.0
    beat_seconds: Annotated[float, Meta(gt=0, description="interval of liveness messages")] = 2.0
    lease_seconds: Annotated[float, Meta(gt=0, description="silence after which a peer counts as lost")] = 6.0
    record: Annotated[
        str | None,
        Meta(
            description="a file for every event that decisions depend on, without texts and token ids; "
            "`sfllm replay` decides them again"
        ),
    ] = None
    record_max_bytes: Annotated[
        int, Meta(ge=2**16, description="recording ends when the file has so much")
    ] = 2**30

    def __post_init__(self) -> None:
        """Refuse links beyond this machine without keys."""
        _check_links(self, (self.gateway_address, self.worker_address, self.asset_address))


class WorkerSettings(CommonSettings, frozen=True, kw_only=True):
    """Worker."""

    model: Annotated[
        str, Meta(description="a model directory, a .gguf file, a hub id, or 'smollm2' for the default model")
    ] = "smollm2"
    served_model_name: Annotated[
        tuple[str, ...], Meta(description="names the model answers to in the API, the first one its id")
    ] = ()
    worker_address: Annotated[
        Addresses,
        Meta(
            description="where the scheduler waits for workers; several schedulers: an address of each, "
            "in any order; the worker belongs to one of them at a time"
        ),
    ] = ("tcp://127.0.0.1:5558",)
    asset_address: Annotated[
        Addresses,
        Meta(description="where the scheduler takes tokenizer files; several: in the order of the workers'"),
    ] = ("tcp://127.0.0.1:5559",)
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Meta(description="where the model runs; auto takes a GPU if there is one"),
    ] = "auto"
    gpu_claims: Annotated[
        str | None,
        Meta(
            description="folder that all workers of this host share: each takes a GPU that no other has, of "
            "those that CUDA_VISIBLE_DEVICES shows, and keeps it until its process ends"
        ),
    ] = None
    gpu_claim_seconds: Annotated[
        float, Meta(ge=0, description="how long to wait for a GPU that no other worker has claimed")
    ] = 60.0
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Meta(description="number format of weights and cache; auto is bfloat16 where it is fast"),
    ] = "auto"
    quantization: Annotated[
        Literal["none", "int8", "int4", "fp8"],
        Meta(
            description="number format of the weights of products: int8; int4, on CPUs; fp8, on GPUs of "
            "compute capability 8.0 or more. On CPUs GGUF weights that have few bits already keep theirs"
        ),
    ] = "none"
    deterministic: Annotated[
        bool,
        Meta(
            description="the same tokens in any batch, in 16 bits as well: on GPUs by products with fixed "
            "tiles, which are slower; the native kernels of CPUs are so anyway"
        ),
    ] = False
    load_format: Annotated[
        Literal["auto", "dummy"], Meta(description="dummy: random weights of the model's shape")
    ] = "auto"
    pooling: Annotated[
        Literal["auto", "mean", "last", "none"],
        Meta(
            description="how /v1/embeddings makes one row of a text's: mean of all tokens, or the last one; "
            "auto: as the model's own files say, which for most models is that there are no embeddings"
        ),
    ] = "auto"
    generation_defaults: Annotated[
        bool, Meta(description="take defaults of sampling fields from the model's generation_config.json")
    ] = True
    max_context_length: Annotated[
        int | None,
        Meta(description="most tokens of prompt and output together; the model's own limit if unset"),
    ] = None
    max_batch_size: Annotated[
        int | None, Meta(description="most sequences in one step; sized by the KV cache if unset")
    ] = None
    max_step_tokens: Annotated[
        Annotated[int, Meta(ge=16)] | None,
        Meta(
            description="most tokens in one step; longer prompts are prefilled in chunks; "
            "512 if unset, 2048 on a GPU"
        ),
    ] = None
    target_itl_ms: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(
            description="keep the time between tokens within this, as measured while it runs: fewer "
            "sequences in a step, and less prefill beside decodes; as large as memory allows if unset"
        ),
    ] = None
    block_size: Annotated[
        int,
        Meta(ge=2, le=256, multiple_of=2, description="tokens in one block of the KV cache, an even number"),
    ] = 32
    max_running_tokens: Annotated[
        int | None,
        Meta(
            description="most tokens of all running sequences together, which the KV cache holds; "
            "sized by --mem-fraction if unset"
        ),
    ] = None
    mem_fraction: Annotated[
        Annotated[float, Meta(gt=0, le=1)] | None,
        Meta(
            description="share of the device's free memory for the KV cache; "
            "0.9 of a GPU's if unset, half of a CPU's up to 4 GiB"
        ),
    ] = None
    cuda_graph_max_bs: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="on GPUs: largest batch of a captured decode step; the largest of all if unset"),
    ] = None
    cuda_graph_bs: Annotated[
        tuple[Annotated[int, Meta(ge=1)], ...],
        Meta(description="on GPUs: batch sizes of captured decode steps; 1, 2, 4, 8, 16, 24, ... if unset"),
    ] = ()
    disable_cuda_graph: Annotated[
        bool, Meta(description="on GPUs: launch every operation of a decode step by itself")
    ] = False
    step_timeout_seconds: Annotated[
        float,
        Meta(
            gt=0,
            description="a step that takes longer than this, and than ten times the longest one expected, "
            "counts as stuck: the worker ends",
        ),
    ] = 20.0
    threads: Annotated[int | None, Meta(description="CPU threads of the model; all cores if unset")] = None
    drain_seconds: Annotated[float, Meta(ge=0, description="how long SIGTERM waits for running requests")] = (
        30.0
    )
    mock: Annotated[
        bool, Meta(description="no model: made-up tokens at a set rate, for trying out everything around it")
    ] = False
    mock_tokens_per_second: Annotated[
        float, Meta(gt=0, description="mock: tokens a second of each sequence")
    ] = 50.0
    mock_prefill_tokens_per_second: Annotated[
        float, Meta(gt=0, description="mock: prompt tokens a second of the whole worker")
    ] = 20000.0
    mock_output_tokens: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="mock: tokens after which a sequence ends; max_tokens if unset"),
    ] = None
    mock_poison_token: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="mock: a prompt with this token id breaks the worker"),
    ] = None
    mock_poison: Annotated[
        Literal["crash", "fail", "stall"],
        Meta(description="mock: end the process, fail the step, or let the step never end"),
    ] = "crash"

    def __post_init__(self) -> None:
        """Refuse lists of addresses that do not fit together, and links beyond this machine without keys."""
        _check_addresses(worker_address=self.worker_address, asset_address=self.asset_address)
        _check_links(self, self.worker_address, self.asset_address)


def _check_addresses(**lists: Sequence[str]) -> None:
    """Each list must name every scheduler once. Raises ValueError."""
    flags = {name: "--" + name.replace("_", "-") for name in lists}
    for name, addresses in lists.items():
        if len(set(addresses)) < len(addresses):
            raise ValueError(f"{flags[name]}: a scheduler is named twice")
    if len({len(addresses) for addresses in lists.values()}) > 1:
        found = " and ".join(f"{flags[name]} has {len(addresses)}" for name, addresses in lists.items())
        raise ValueError(f"{found}: each scheduler needs an address in both")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address: 127.0.0.0/8, ::1 or localhost."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _is_local(address: str) -> bool:
    """Whether a ZeroMQ address stays on this machine."""
    transport, _, rest = address.partition("://")
    return transport in ("ipc", "inproc") or (transport == "tcp" and is_loopback(rest.rpartition(":")[0]))


def _check_links(settings: CommonSettings, *lists: Sequence[str]) -> None:
    """Links beyond this machine must have keys, unless somebody says that they need none."""
    if settings.link_keys or settings.insecure_links:
        return
    for address in (address for addresses in lists for address in addresses):
        if not _is_local(address):
            raise ValueError(
                f"{address} is beyond this machine: give --link-keys, made by `sfllm keys links`, "
                "or say --insecure-links"
            )
