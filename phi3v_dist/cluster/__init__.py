"""A run on the nodes of a Slurm job: which of them are fit, and what to do when a start has ended.

launch/doctor.py on each node → preflight.py (machine, storage, devices, network) → RUN/preflight/HOST.json (report.py)
                                                                 all reports → findings.py → good and bad nodes
slurm/train.sh asks launch/job.py → nodes.py (where to train), judge.py (how it ended) → RUN/starts.jsonl (starts.py)
"""
