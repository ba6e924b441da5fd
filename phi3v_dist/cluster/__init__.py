"""The machines of a job, before it trains: what each says about itself, and which of them are fit to train on.

launch/doctor.py on each node → preflight.py (machine, storage, devices, network) → RUN/preflight/HOST.json (report.py)
                                                                 all reports → findings.py → good and bad nodes
"""
