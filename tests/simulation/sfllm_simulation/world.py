"""Everything together: processes that come and go, and the connections between them."""

from __future__ import annotations

from collections import Counter
from functools import partial
from random import Random

from sfllm.messages import Capacity
from sfllm_gateway.streams import StreamTable
from sfllm_scheduler.core.events import Record
from sfllm_scheduler.core.state import PolicyValues

from .agenda import Agenda
from .gateway import Client, Gateway, MakeTable
from .model import BEAT_SECONDS, LEASE_SECONDS, STEP_TOKENS, make_engine
from .network import Link, Pipe
from .process import Process
from .scheduler import Scheduler
from .script import Noise, Open, Poison, Script, StopChoice
from .worker import Worker

MAX_ATTEMPTS = 20
RESTART_SECONDS = 0.5
"""How long after a worker died of a request another takes its place."""

OPEN_AGAIN_SECONDS = 0.25

MAX_OVERTAKES = 2
"""Few, so that it happens."""


def policy_of(script: Script) -> PolicyValues:
    """What its scheduler decides by."""
    return PolicyValues(
        policy=script.setup.policy,
        beat_seconds=BEAT_SECONDS,
        lease_seconds=LEASE_SECONDS,
        max_queue_requests=64,
        max_overtakes=MAX_OVERTAKES,
    )


class World:
    """The processes by name, the run of each that lives now, and the clients of all.

    `happened` counts what the scheduler recorded. Only `faults.py` breaks things here.
    """

    def __init__(self, script: Script, make_table: MakeTable = StreamTable) -> None:
        self.script = script
        self.agenda = Agenda()
        self.clients: dict[int, Client] = {}
        self.peers: dict[str, Gateway | Worker] = {}
        self.links: dict[str, Link] = {}
        self.happened: Counter[str] = Counter()
        self.down: dict[str, float] = {}
        self.cuts: Counter[tuple[str, str]] = Counter()
        self.noises: dict[tuple[str, str], Noise] = {}
        self.scheduler_blocks: set[str] = set()
        self._routes: dict[bytes, Link] = {}
        self._random = Random(f"{script.setup.seed} world")
        self._make_table = make_table
        self._runs: Counter[str] = Counter()
        poisons = [event for event in script.events if isinstance(event, Poison)]
        self._poison = {event.request: (event.token, event.how == "kills") for event in poisons}
        self.scheduler = self._new_scheduler()
        for index in range(script.setup.workers):
            self.start(f"worker-{index}")
        for index in range(script.setup.gateways):
            self.start(f"gateway-{index}")

    # clients

    def open(self, event: Open) -> None:
        """A client comes, and comes again until its gateway takes the request."""
        stops = {
            each.choice: each.tokens
            for each in self.script.events
            if isinstance(each, StopChoice) and each.request == event.request and each.choice < event.n
        }
        client = self.clients[event.request] = Client(self.agenda, event, stops)
        self._ask(client)

    def _ask(self, client: Client) -> None:
        if client.opened is None and client.outcome is None:
            gateway = self.peers[client.asked.gateway]
            assert isinstance(gateway, Gateway)
            gateway.do(partial(gateway.ask, client))
            self.agenda.after(OPEN_AGAIN_SECONDS, partial(self._ask, client))

    # processes

    def process(self, name: str) -> Process:
        """The run of that name that lives now, or lived last."""
        return self.scheduler if name == "scheduler" else self.peers[name]

    def start(self, name: str) -> None:
        """A new run of a gateway or worker, which knows nothing of earlier ones."""
        self._runs[name] += 1
        kind, _, index = name.partition("-")
        identity = f"{kind[0]}-{index}.{self._runs[name]}".encode()
        offset = self._random.uniform(0.0, 1e6)
        peer: Gateway | Worker
        if kind == "gateway":
            epoch = self._random.getrandbits(62)
            peer = Gateway(self.agenda, name, offset, identity, epoch, self._make_table, MAX_ATTEMPTS)
            peer.on_left = partial(self._gone, peer, said_goodbye=True)
            deliver = partial(self._to_scheduler, "gateway", identity)
        else:
            peer = self._new_worker(name, offset, identity)
            deliver = partial(self._to_scheduler, "worker", identity)
        self.peers[name] = peer
        link = self._new_link(name, identity, deliver, peer)
        peer.start(link)

    def _new_worker(self, name: str, offset: float, identity: bytes) -> Worker:
        setup = self.script.setup
        engine = make_engine(setup.slots, setup.kv_tokens, self._poison)
        capacity = Capacity(setup.slots, engine.usable_kv_tokens, STEP_TOKENS)
        worker = Worker(self.agenda, name, offset, identity, engine, capacity, setup.step_milliseconds / 1000)
        worker.on_left = lambda said_goodbye: self._gone(worker, said_goodbye=said_goodbye)
        return worker

    def _gone(self, peer: Gateway | Worker, said_goodbye: bool) -> None:
        """It went by itself; another takes its place."""
        self.happened[f"{peer.name.partition('-')[0]} left"] += 1
        self.kill(peer, takes_along=not said_goodbye)
        self.start_later(peer.name, self.down.pop(peer.name, RESTART_SECONDS))

    def kill(self, peer: Gateway | Worker, takes_along: bool) -> None:
        """End a run. `takes_along`: and all that it had sent and that has not arrived."""
        peer.die()
        self.links[peer.name].die(takes_along)

    def start_later(self, name: str, seconds: float) -> None:
        """The supervisor's part."""
        self.agenda.after(seconds, partial(self.start, name))

    def kill_scheduler(self) -> None:
        """Connections break, and there are none until another scheduler is there."""
        self.scheduler.die()
        self.block_all("scheduler down")
        for link in self.links.values():
            link.break_off()

    def restart_scheduler(self) -> None:
        """A scheduler that knows nobody."""
        self.scheduler_blocks.clear()
        self.scheduler = self._new_scheduler()
        for link in self.links.values():
            link.unblock("scheduler down")
            link.unblock("scheduler still")

    def block_all(self, cause: str) -> None:
        """Nothing can reach the scheduler."""
        self.scheduler_blocks.add(cause)
        for link in self.links.values():
            link.block(cause)

    def unblock_all(self, cause: str) -> None:
        """It can again."""
        self.scheduler_blocks.discard(cause)
        for link in self.links.values():
            link.unblock(cause)

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(
            self.agenda,
            policy_of(self.script),
            self._random.getrandbits(62),
            self._random.uniform(0.0, 1e6),
            self._routes,
            self._on_record,
        )

    def _on_record(self, record: Record) -> None:
        self.happened[record.event] += 1

    # connections

    def _new_link(
        self, name: str, identity: bytes, to_scheduler: partial[None], peer: Gateway | Worker
    ) -> Link:
        seed = f"{self.script.setup.seed} {name} {self._runs[name]}"
        link = Link(self.agenda, seed, to_scheduler, peer.receive, partial(self._route, identity, name))
        self.links[name] = link
        for cause in sorted(self.scheduler_blocks):
            link.block(cause)
        for direction in ("up", "down"):
            if self.cuts[name, direction]:
                link.block(f"cut {direction}")
                pipe_of(link, direction).cut(True)
            pipe_of(link, direction).noise = self.noises.get((name, direction))
        return link

    def _route(self, identity: bytes, name: str, reachable: bool) -> None:
        if reachable:
            self._routes[identity] = self.links[name]
        else:
            self._routes.pop(identity, None)

    def _to_scheduler(self, kind: str, identity: bytes, frame: bytes) -> None:
        if kind == "gateway":
            self.scheduler.from_gateway(identity, frame)
        else:
            self.scheduler.from_worker(identity, frame)


def pipe_of(link: Link, direction: str) -> Pipe:
    """ "up" is to the scheduler."""
    return link.to_scheduler if direction == "up" else link.to_process
