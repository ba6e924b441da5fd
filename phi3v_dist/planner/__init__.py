"""Settings and a cluster → what a step will take, before a job is queued.

Three sources make one answer. (1) The real model and loss run forwards and backwards on fake tensors, which have sizes
and life times but no content, and every storage is counted (`trace.py`, `row.py`); three layers and three rounds of a
loop are traced, the rest follows exactly (`unroll.py`). (2) DeepSpeed's share: what it holds by formula
(`zero_share.py`), what it gathers and reduces by replaying its rules on the traced order of modules (`gathering.py`).
(3) What nobody can trace: the GPU's own context, its allocator, the speed that will be reached (`gpus.py`, `cost.py`),
each a named line with its assumption. `memory.py` puts them together, `plan.py` words the answer, `recommend.py` tries
settings until one fits. Surprise: no GPU is needed, and no weights and no data either; config.json is enough.
"""
