"""phi3v-dist: full fine-tuning of Phi-3-Vision-128K on your own images, from a laptop to a Slurm cluster.

Follow a training sample from a tar file to a point on a chart:

    data/shards.py      tar + index            → where every sample's bytes are
    data/order.py       (seed, position)       → sample id
    data/plan.py        lengths                → rows → optimizer steps, the same on every rank
    data/fetch.py       sample id              → bytes
    data/samples.py     bytes                  → Sample (pictures.py repairs, templates make turns)
    data/processor.py   Sample                 → Example (chat.py makes ids and labels, fit.py cuts what is too long)
    data/batch.py       Examples → Row         → Batch
    data/loader.py      all of the above, decoded ahead by threads
    model/phi3v.py      Batch                  → one loss per label token
    model/build.py      settings               → the model, partitioned (sources.py: weights, adapters.py: what learns)
    parallel/zero.py    settings + JSON        → DeepSpeed engine
    train/step.py       Batches                → StepResult
    train/loop.py       for each step: train, observe; every N steps evaluate and save
    survive/            checkpoints that any number of ranks can continue from, written while training goes on
    attempt/            one start of a run: the right to train in its folder, its surroundings, what is asked of it
    watch/              where every rank is; from outside: who died or hangs, what happened, start again
    evaluate/           weights                → answers → scores → records
    observe/            StepResult             → metrics.jsonl → console, W&B, report
    model/export.py     checkpoint             → a folder that others open

`run.py` names every part once, in this order: read it first.
"""

__version__ = "0.1.0"
