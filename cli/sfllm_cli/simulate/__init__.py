"""`sfllm simulate`: the scheduler's own core over modelled workers, in virtual time.

workload.py    who asks for what, and when        profiles.py   what a worker is and how fast
engine.py      a worker's steps                   sharing.py    how they are shared out
stepping.py    when they begin and end            reports.py    what it tells of them
blocks.py      its cache                          prefix_cache.py   the beginnings that it still has
worker.py      its side of the protocol           membership.py     which scheduler it belongs to
gateways.py    theirs, and each request's times   placing.py    which scheduler gets a request
scheduler.py   the core and its turns             schedulers.py     several of them
world.py       everything together, and faults
figures.py     what came of it                    overtakes.py, fairness.py   to whom
search.py      the load with the best goodput     calibrate.py  a profile of a real server
command.py     settings in, runs                  report.py, plots.py    tables and files out
"""

from sfllm_cli.simulate.command import run

__all__ = ["run"]
