"""The protocol of gateways, scheduler and workers, proved by breaking it in virtual time.

The very classes that run live, over a simulated network: `StreamTable` of the gateway, `SchedulerCore`, and
`WorkerProtocol` around the mock engine, whose every token is known beforehand. One seed makes a scenario
(`scenario.py`): some requests and some faults, written as plain lines (`script.py`) and played in virtual
time (`agenda.py`, `world.py`, `faults.py`), in which a minute takes a fraction of a second.

    python -m sfllm_simulation --seeds 5000        many scenarios; the first that fails is shrunk and printed
    python -m sfllm_simulation FILE                one script, as such a failure prints it

**What happens to processes.** They are killed, drained, fail a step, take long for one, or stand still and go
on late, their clocks having gone on; another run with another identity takes the place of one that went.
Requests kill workers that compute a certain token of theirs. Clients leave in every state and stop choices.

**What happens to messages** (`network.py`). A connection delivers in order, with delays; when it breaks,
what was under way is lost both ways, what a process sends meanwhile waits in its outbox, and the
scheduler's send fails at once, as with ROUTER_MANDATORY. It breaks when a process dies, and when
heartbeats are missed for two seconds because one direction is cut or a side stands still. On top of that
comes what TCP does not do: single messages are lost, doubled and overtaken. Every message goes through the
wire's own encoding.

**What must hold after every step** (`gateway.py`, `worker.py`, `scheduler.py`). Every journal is a prefix of
the true answer, so no token is lost, doubled or out of order, and its log probabilities are those of its
tokens; a choice ends once, whole; the core's tables agree; the worker's ledger and engine agree and no block
is lost; nothing is held, and no scheduler believed in, longer than a lease after the last message; a
request counts as alone at a crash only if it was.

**What must hold later** (`checks.py`). Workers let go of what ended: within two steps without faults, else
soon after them. After the last fault every request ends within two leases, two beats and the time to
compute it (`patience` adds drains and poison). It has finished, but for these: its client left or its
gateway was killed, its deadline really passed, it was poisonous, or it was alone on a worker at two losses of
workers without coming further in between. Then nothing is left: no hold, credit, deadline or tombstone, no
digest that differs, no sequence, no used block, no message in an outbox.

**What is not simulated.** Sockets, threads and event loops around the machines; messages that are malformed;
outboxes that overflow; HTTP, text and stop strings (a client stops a choice at a token); the asset link;
several models; clocks that run at different speeds (they start at different values). Tests of the real
processes cover those.
"""
