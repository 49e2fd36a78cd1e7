"""`sfllm simulate`: the scheduler's own core over modelled workers, in virtual time.

workload.py    who asks for what, and when        profiles.py   what a worker is and how fast
engine.py      a worker's steps                   prefix_cache.py   what its cache still has
worker.py      its side of the protocol           gateways.py   theirs, and each request's times
scheduler.py   the core and its turns             world.py      everything together, and faults
figures.py     what came of it                    command.py    settings in, tables and files out
"""

from sfllm_cli.simulate.command import run

__all__ = ["run"]
