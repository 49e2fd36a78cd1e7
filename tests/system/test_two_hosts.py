"""Engines in two network namespaces: workers join over CURVE, nobody reads along, streams outlast cuts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager

import pytest
from chaos.ask import Delivery, Reading, ask, ask_until_accepted
from chaos.fleet import eventually
from chaos.http_client import Address
from chaos.judge import judge
from chaos.templates import Template
from docker_engine import Engine, EngineUnavailableError
from host_stacks import GATEWAY, PLAIN_GATEWAY, REMOTE_WORKERS, HostStacks, host_stacks, worker_addresses
from link_strangers import Keys, stranger
from namespaces import NetworkUnavailableError, Place
from short_streams import completion
from two_hosts import two_hosts
from wire_tap import Overheard, Tap, overheard

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

ALL_WORKERS = REMOTE_WORKERS + 1
STREAMS = 12
SECRET = "The bridge opens at a quarter past nine; four green bottles know."
SECRETS = 6
BEGUN = 10
"""Tokens that each stream has when the trouble begins."""
TOKENS_PER_SECOND = 50
"""What a mock worker makes of each stream by default."""


@pytest.fixture(scope="module")
def stacks(docker: Engine, images: dict[str, str]) -> Iterator[HostStacks]:
    assert images
    try:
        with two_hosts(docker) as hosts, host_stacks(hosts) as running:
            yield running
    except (NetworkUnavailableError, EngineUnavailableError) as error:
        pytest.skip(f"NO SECOND HOST WAS TESTED: {error}")


def streams_for(seconds: float) -> list[Template]:
    """Streams of several kinds that take so long when nothing disturbs them."""
    kinds: list[dict[str, object]] = [{}, {"n": 2}, {"logprobs": 2}, {"frequency_penalty": 1.0}]
    return [
        completion(
            f"stream {number}",
            prompt=f"This is stream number {number}.",
            seed=number,
            max_tokens=int(seconds * TOKENS_PER_SECOND),
            **kinds[number % len(kinds)],
        )
        for number in range(STREAMS)
    ]


class Trouble:
    """Streams under way. `pauses` has, when they have ended, the longest one of each."""

    def __init__(self, stacks: HostStacks, seconds: float) -> None:
        self.pauses: list[float] = []
        self._stacks = stacks
        self._templates = streams_for(seconds)
        self._tasks: list[asyncio.Task[Delivery]] = []

    async def begin(self) -> None:
        """Start the streams, and wait until each has some tokens."""
        have_begun = [asyncio.Event() for _ in self._templates]
        self._tasks = [
            asyncio.create_task(ask(GATEWAY, template, reading=Reading(on_tokens=_noticing(begun))))
            for template, begun in zip(self._templates, have_begun, strict=True)
        ]
        async with asyncio.timeout(30):
            await asyncio.gather(*(begun.wait() for begun in have_begun))

    async def end(self) -> list[Delivery]:
        """Wait for all streams."""
        async with asyncio.timeout(120):
            return await asyncio.gather(*self._tasks)

    async def end_well(self) -> None:
        """Wait for all streams: each must be what it was in calm."""
        deliveries = await self.end()
        calm = await asyncio.gather(*map(self._calm, self._templates))
        for expected, got in zip(calm, deliveries, strict=True):
            assert (got.ended, got.error) == ("complete", ""), got
            assert (fault := judge(expected, got)) is None, (got.template.name, fault)
            self.pauses.append(got.longest_pause)

    async def _calm(self, template: Template) -> Delivery:
        key = (template.name, int(template.body["max_tokens"]))
        if key not in self._stacks.calm:
            self._stacks.calm[key] = await ask_until_accepted(PLAIN_GATEWAY, template)
        return self._stacks.calm[key]


def _noticing(begun: asyncio.Event) -> Callable[[int], None]:
    return lambda tokens: begun.set() if tokens >= BEGUN else None


@asynccontextmanager
async def streams_under_way(
    stacks: HostStacks, what: str, seconds: float = 8.0, workers: int = ALL_WORKERS
) -> AsyncIterator[Trouble]:
    """Streams that have begun and take so long in calm; afterwards they are complete and right."""
    await stacks.until_serving(workers)
    moved = await stacks.scheduler_value("request_migrations_total") or 0.0
    found = Trouble(stacks, seconds)
    await found.begin()
    yield found
    await found.end_well()
    moves = (await stacks.scheduler_value("request_migrations_total") or 0.0) - moved
    pauses = " ".join(f"{pause:.1f}" for pause in sorted(found.pauses))
    # A new scheduler counts from the beginning.
    print(f"{what}: {max(moves, 0):.0f} moves, longest pauses of the streams in seconds: {pauses}")


async def test_workers_of_another_host_join_and_serve(stacks: HostStacks) -> None:
    async with streams_under_way(stacks, "nothing", seconds=1.0):
        pass
    assert all(tokens > 0 for tokens in stacks.tokens_of_remote_workers())


async def test_nobody_on_the_network_reads_prompts_or_answers(stacks: HostStacks) -> None:
    before = sum(stacks.tokens_of_remote_workers())
    heard, answers = await listen(stacks, GATEWAY)
    assert sum(stacks.tokens_of_remote_workers()) > before
    assert [heard.knows(text) for text in (SECRET, *answers)] == [[]] * (1 + SECRETS)
    # The same look finds all of it where links are open, so that it would have found it above.
    heard, answers = await listen(stacks, PLAIN_GATEWAY)
    assert heard.knows(SECRET) == ["token ids", "prompts"]
    assert [heard.knows(answer) for answer in answers] == [["answers"]] * SECRETS


async def listen(stacks: HostStacks, gateway: Address) -> tuple[Overheard, list[str]]:
    """What is on the cable of host b while secrets are asked for, and their answers."""
    network = stacks.hosts.network
    secrets = [completion("secret", prompt=f"{SECRET} {number}", max_tokens=40) for number in range(SECRETS)]
    with Tap(network.switch, stacks.hosts.b.place.port) as tap:
        deliveries = await asyncio.gather(*(ask(gateway, secret) for secret in secrets))
    assert tap.lost == 0
    assert [delivery.ended for delivery in deliveries] == ["complete"] * SECRETS
    heard = overheard(tap.frames)
    assert len(heard.raw) > 40 * len(SECRET)
    return heard, [delivery.choices[0].text for delivery in deliveries]


@pytest.mark.parametrize("keys", ["none", "of another scheduler", "of nobody"])
async def test_a_worker_whose_key_is_not_known_is_refused(stacks: HostStacks, keys: Keys) -> None:
    await stacks.until_serving(ALL_WORKERS)
    name = "scheduler_links_refused_total"
    before = await stacks.scheduler_value(name, socket="worker") or 0.0

    async def refused_more() -> bool:
        return (await stacks.scheduler_value(name, socket="worker") or 0.0) > before

    with stranger(stacks.hosts, keys):
        assert await eventually(refused_more, 30)
        assert await stacks.scheduler_value("workers", state="serving") == ALL_WORKERS


def test_a_worker_without_keys_does_not_reach_out_by_accident(stacks: HostStacks) -> None:
    with pytest.raises(AssertionError, match=r"gave 2:\n(.|\n)*--link-keys(.|\n)*--insecure-links"):
        stacks.hosts.b.engine.run("run", "--rm", "sfllm-worker", "--mock", *worker_addresses(stacks.hosts.a))


CUTS: dict[str, Callable[[HostStacks], AbstractContextManager[None]]] = {
    "both ways": lambda stacks: stacks.hosts.network.unplugged(stacks.hosts.b.place),
    "to the workers": lambda stacks: stacks.hosts.network.lossy(_way(stacks)),
    "from the workers": lambda stacks: stacks.hosts.network.lossy(_way(stacks)[::-1]),
}


def _way(stacks: HostStacks) -> tuple[Place, Place]:
    return stacks.hosts.a.place, stacks.hosts.b.place


@pytest.mark.parametrize(
    ("way", "seconds"),
    [
        ("both ways", 1.0),  # nobody notices
        ("both ways", 4.0),  # heartbeats are missed, the lease is not over
        ("both ways", 10.0),
        ("to the workers", 8.0),
        ("from the workers", 8.0),
    ],
)
async def test_streams_outlast_a_partition(stacks: HostStacks, way: str, seconds: float) -> None:
    async with streams_under_way(stacks, f"cut {way} for {seconds:.0f} s"):
        with CUTS[way](stacks):
            await asyncio.sleep(seconds)
        healed = time.monotonic()
        await stacks.until_serving(ALL_WORKERS)
        print(f"all workers there {time.monotonic() - healed:.1f} s later")


async def test_streams_wait_for_a_partition_to_heal_when_no_worker_is_left(stacks: HostStacks) -> None:
    stacks.a.compose("stop", "worker")
    try:
        async with streams_under_way(stacks, "cut off all workers for 8 s", workers=REMOTE_WORKERS) as found:
            with CUTS["both ways"](stacks):
                await asyncio.sleep(8.0)
        assert min(found.pauses) > 7.0
    finally:
        stacks.a.compose("start", "worker")


async def test_streams_do_not_suffer_from_a_bad_network(stacks: HostStacks) -> None:
    there, back = _way(stacks), _way(stacks)[::-1]
    async with streams_under_way(stacks, "5% of packets lost") as found:
        with stacks.hosts.network.lossy(there, back, share=0.05):
            await found.end()


async def test_streams_outlast_the_scheduler(stacks: HostStacks) -> None:
    async with streams_under_way(stacks, "scheduler killed and started again"):
        stacks.restart_abruptly("scheduler")


async def test_workers_come_back_to_a_host_that_was_switched_off_and_on(stacks: HostStacks) -> None:
    await stacks.until_serving(ALL_WORKERS)
    lives = stacks.remote_lives()
    lost = Trouble(stacks, 8.0)
    await lost.begin()
    stacks.restart_abruptly("scheduler", "gateway", "worker")
    assert {delivery.ended for delivery in await lost.end()} == {"broken"}
    async with streams_under_way(stacks, "host a was off", seconds=1.0):
        pass
    assert stacks.remote_lives() == lives


async def test_a_host_can_be_sent_away(stacks: HostStacks) -> None:
    """The last test, since its workers do not come back."""
    await stacks.until_serving(ALL_WORKERS)
    forget = ("-i", "/worker-host-b/d", "/keys/scheduler/link.keys")
    stacks.a.compose("run", "--rm", "--no-deps", "--entrypoint", "sed", "keys", *forget)
    stacks.a.compose("restart", "scheduler")

    async def both_refused() -> bool:
        refused = await stacks.scheduler_value("scheduler_links_refused_total", socket="worker") or 0.0
        return refused >= REMOTE_WORKERS

    assert await eventually(both_refused, 60)
    await stacks.until_serving(ALL_WORKERS - REMOTE_WORKERS)
