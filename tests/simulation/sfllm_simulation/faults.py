"""What the lines of a script do to the world."""

from __future__ import annotations

from functools import partial

from .gateway import Gateway
from .network import Link
from .script import (
    Crash,
    Cut,
    Drain,
    Event,
    FailStep,
    Leave,
    Noise,
    Open,
    Pause,
    Poison,
    SlowStep,
    StopChoice,
)
from .worker import Worker
from .world import World, pipe_of


def play(world: World, event: Event) -> None:
    """Do what the line says, now; its end, if it has one, is put on the agenda."""
    match event:
        case Open():
            world.open(event)
        case Leave():
            _leave(world, event)
        case StopChoice() | Poison():
            pass  # known from the start
        case Crash():
            _crash(world, event)
        case Drain():
            _drain(world, event)
        case FailStep() | SlowStep():
            _spoil_step(world, event)
        case Pause():
            _pause(world, event)
        case Cut():
            _cut(world, event)
        case Noise():
            _disturb(world, event)


def over_at(event: Event) -> float:
    """When a fault and what it makes happen by itself are over."""
    match event:
        case Crash() | FailStep():
            return event.t + event.down
        case Drain():
            return event.t + event.down
        case Pause() | SlowStep() | Cut() | Noise():
            return event.t + event.seconds
    return event.t


def _leave(world: World, event: Leave) -> None:
    client = world.clients.get(event.request)
    if client is not None:
        gateway = world.peers[client.asked.gateway]
        assert isinstance(gateway, Gateway)
        gateway.do(partial(gateway.hang_up, client))


def _crash(world: World, event: Crash) -> None:
    if not world.process(event.process).alive:
        return
    world.happened["killed"] += 1
    if event.process == "scheduler":
        world.kill_scheduler()
        world.agenda.after(event.down, world.restart_scheduler)
        return
    takes_along = int(event.t * 1000) % 2 == 1  # the network may still have what it sent, or not
    world.kill(world.peers[event.process], takes_along)
    world.start_later(event.process, event.down)


def _drain(world: World, event: Drain) -> None:
    peer = world.peers[event.process]
    if not peer.alive:
        return
    world.down[event.process] = event.down
    peer.do(peer.drain)


def _spoil_step(world: World, event: FailStep | SlowStep) -> None:
    worker = world.peers[event.process]
    assert isinstance(worker, Worker)
    if not worker.alive:
        return
    if isinstance(event, FailStep):
        world.down[event.process] = event.down
        worker.fail_step()
    else:
        worker.slow_step(event.seconds)


def _pause(world: World, event: Pause) -> None:
    process = world.process(event.process)
    if not process.alive or process.still:
        return
    world.happened["stood still"] += 1
    process.stand_still()
    if event.process == "scheduler":
        world.block_all("scheduler still")
    else:
        world.links[event.process].block("still")

    def go_on() -> None:
        if not process.alive:
            return
        if event.process == "scheduler":
            world.unblock_all("scheduler still")
        else:
            world.links[event.process].unblock("still")
        process.go_on()

    world.agenda.after(event.seconds, go_on)


def _side(sender: str, receiver: str) -> tuple[str, str]:
    return (sender, "up") if receiver == "scheduler" else (receiver, "down")


def _cut(world: World, event: Cut) -> None:
    side = name, direction = _side(event.sender, event.receiver)
    world.cuts[side] += 1
    link = world.links[name]
    link.block(f"cut {direction}")
    pipe_of(link, direction).cut(True)

    def mend() -> None:
        world.cuts[side] -= 1
        if not world.cuts[side]:
            now_there: Link = world.links[name]
            pipe_of(now_there, direction).cut(False)
            now_there.unblock(f"cut {direction}")

    world.agenda.after(event.seconds, mend)


def _disturb(world: World, event: Noise) -> None:
    side = name, direction = _side(event.sender, event.receiver)
    world.noises[side] = event
    pipe_of(world.links[name], direction).noise = event

    def calm() -> None:
        if world.noises.get(side) is event:
            del world.noises[side]
            pipe_of(world.links[name], direction).noise = None

    world.agenda.after(event.seconds, calm)
