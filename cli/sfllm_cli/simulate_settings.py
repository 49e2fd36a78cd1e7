"""The settings of `sfllm simulate`: the fleet, the load, the faults, the scheduler and where results go."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from sfllm.config import Settings

Share = Annotated[float, Meta(ge=0, le=1)]
Milliseconds = Annotated[float, Meta(gt=0)]
Seconds = Annotated[float, Meta(gt=0, le=1e9)]


class FleetSettings(Settings, frozen=True, kw_only=True):
    """The fleet."""

    profile: Annotated[
        str, Meta(description="what a worker is: cpu, gpu, or a file that --calibrate wrote")
    ] = "gpu"
    workers: Annotated[int, Meta(ge=1, le=100_000, description="workers at the beginning")] = 8
    gateways: Annotated[int, Meta(ge=1, le=1000, description="gateways")] = 2
    worker_itl_ms: Annotated[
        Milliseconds | None,
        Meta(
            description="workers keep steps within this, as with their --target-itl-ms; "
            "nine tenths of --itl-target-ms if unset"
        ),
    ] = None
    link_ms: Annotated[Milliseconds, Meta(description="time of a message on its way")] = 0.3
    fail_share: Annotated[Share, Meta(description="share of the workers that are killed and replaced")] = 0.0
    drain_share: Annotated[Share, Meta(description="share of the workers that drain and are replaced")] = 0.0
    slow_share: Annotated[Share, Meta(description="share of the workers that become four times as slow")] = (
        0.0
    )
    joining: Annotated[int, Meta(ge=0, description="workers that join later, one every 10 s")] = 0
    schedulers: Annotated[
        int, Meta(ge=1, le=100, description="schedulers, among which gateways and workers choose")
    ] = 1
    kill_scheduler_at: Annotated[
        Seconds | None,
        Meta(description="second at which one of them is killed; requests come from the first on"),
    ] = None
    restart_scheduler_after: Annotated[
        Annotated[float, Meta(ge=2, le=1e9)] | None,
        Meta(description="seconds after which it runs again; it does not if unset"),
    ] = None


class WorkloadSettings(FleetSettings, frozen=True, kw_only=True):
    """The load."""

    mix: Annotated[
        Literal["conversation", "two-sizes", "uniform", "equal", "w2", "chats"],
        Meta(
            description="lengths of requests: conversation (like Azure's trace of 2023), two-sizes (80% of "
            "64 and 20% of 4,096 prompt tokens), uniform (100 to 1,024), equal (512 in, 128 out), w2 (16 to "
            "512 in, 128 out), chats (that share system prompts and histories)"
        ),
    ] = "conversation"
    trace: Annotated[
        str | None,
        Meta(description="CSV file of time, prompt_tokens and output_tokens instead of --mix"),
    ] = None
    requests: Annotated[int, Meta(ge=1, le=10_000_000, description="how many requests come")] = 5000
    load: Annotated[
        tuple[Annotated[float, Meta(gt=0)], ...],
        Meta(description="share of the fleet's measured capacity that comes; several are run in turn"),
    ] = (0.8,)
    rate: Annotated[
        tuple[Annotated[float, Meta(gt=0)], ...],
        Meta(description="requests a second instead of --load; inf for all at once"),
    ] = ()
    arrivals: Annotated[
        Literal["poisson", "bursts"],
        Meta(description="when requests of a mix come: at random, or at random within a fifth of the time"),
    ] = "poisson"
    tenants: Annotated[
        tuple[Annotated[float, Meta(gt=0)], ...],
        Meta(description="shares of the requests that tenants send; one tenant if unset"),
    ] = ()
    weights: Annotated[
        tuple[Annotated[float, Meta(gt=0)], ...],
        Meta(description="shares of the service that these tenants are to have; equal ones if unset"),
    ] = ()
    deadline_seconds: Annotated[Seconds, Meta(description="deadline of every request")] = 600.0
    max_tokens: Annotated[
        int, Meta(ge=0, description="what clients allow an answer to have; 0: they know how long it will be")
    ] = 2048
    seed: Annotated[int, Meta(ge=0, description="seed of lengths, times and faults")] = 0


class SimulateSettings(WorkloadSettings, frozen=True, kw_only=True):
    """The scheduler and the results."""

    policy: Annotated[
        tuple[Literal["auto", "length", "prefix", "fcfs"], ...],
        Meta(description="the scheduler's policy; several are compared, each with fcfs or else the last one"),
    ] = ("auto",)
    find_goodput: Annotated[
        bool, Meta(description="search the load at which each policy has its best goodput, instead of --load")
    ] = False
    max_overtakes: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(
            description="times a waiting request may be passed, for each worker; the scheduler's default if "
            "unset",
        ),
    ] = None
    max_queue_requests: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="waiting requests before answering 429; no bound if unset"),
    ] = None
    ttft_target_ms: Annotated[Milliseconds, Meta(description="goodput: first token within this")] = 2000.0
    itl_target_ms: Annotated[
        Milliseconds, Meta(description="goodput: mean time between tokens within this")
    ] = 50.0
    json: Annotated[str | None, Meta(description="file to write the results to; - for standard output")] = (
        None
    )
    csv: Annotated[str | None, Meta(description="file to write one line a run to")] = None
    png: Annotated[str | None, Meta(description="file to write plots to")] = None
    timing: Annotated[bool, Meta(description="say what the simulation and the scheduler's core cost")] = False
    calibrate: Annotated[
        str | None,
        Meta(description="address of a served model: measure it and write its profile to --profile-out"),
    ] = None
    calibrate_workers: Annotated[int, Meta(ge=1, description="workers behind the calibrated address")] = 1
    calibrate_slots: Annotated[int, Meta(ge=1, description="sequences that each of them takes")] = 64
    calibrate_kv_tokens: Annotated[int, Meta(ge=1, description="tokens that the cache of each holds")] = (
        60_000
    )
    calibrate_step_tokens: Annotated[
        int, Meta(ge=16, description="tokens that a step of theirs takes in: their --max-step-tokens")
    ] = 512
    profile_out: Annotated[str, Meta(description="file for the profile")] = "profile.json"
