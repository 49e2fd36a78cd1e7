"""`sfllm doctor`: looks at a running stack from the outside and says what to mend.

command.py          settings in, findings out, the exit code
findings.py         what a check says                   report.py          table and JSON
gather.py           asks everything once                evidence.py        what was answered
probe.py            one HTTP question                   samples.py         what a page of metrics says
certificate.py      a server's TLS certificate          machine.py         disk, GPUs, kernels of this machine
api_checks.py       gateway, keys, certificate          model_checks.py    models and their workers
process_checks.py   ports, versions, clocks, limits     load_checks.py     caches and queues
link_checks.py      encryption, refused peers           key_checks.py      files of keys (key_files.py)
machine_checks.py   this machine                        gpu_checks.py      who has which GPU

The checks are pure: evidence in, findings out.
"""

from sfllm_cli.doctor.command import run

__all__ = ["run"]
