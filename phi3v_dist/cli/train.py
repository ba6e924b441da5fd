"""Train: one YAML, `key=value` overrides, any launcher.

    deepspeed --num_accelerators 2 launch/train.py --config launch/configs/quickstart.yaml train.steps=100
    torchrun --nproc_per_node 8 launch/train.py --config …
    srun --kill-on-bad-exit=1 python launch/train.py --config …          (one task per rank)

Started again with the same words, a run goes on from its last checkpoint; a finished one says so and ends. SIGTERM,
SIGUSR1, Ctrl-C or `touch RUN/STOP` end it after the step in hand, saved; `touch RUN/SAVE` saves now;
`touch RUN/PROFILE` records a few steps (docs/goodput.md).
"""

import argparse
import logging

from phi3v_dist.attempt.requests import Requests
from phi3v_dist.cli.app import new_parser, run_script, say_attempt


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("train", __doc__)
    parser.add_argument("--config", required=True, help="YAML file, or a recipe that ships with phi3v-dist")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # some launchers add it; the environment has it too
    parser.add_argument("overrides", nargs="*", help="settings as key=value")
    return parser


def run_command() -> None:
    arguments = build_parser().parse_args()
    requests = Requests.listen()  # before the imports that take seconds: until then a signal is a crash
    from phi3v_dist import versions

    versions.require()  # before the imports that may fail for want of the right version, and take seconds
    from torch.distributed.elastic.multiprocessing.errors import record

    from phi3v_dist.cli.error_file import RedactingErrorHandler

    record(train, RedactingErrorHandler())(arguments, requests)


def train(arguments: argparse.Namespace, requests: Requests) -> None:
    """Train until the run is finished or is asked to stop."""
    from phi3v_dist import config, run
    from phi3v_dist.attempt.finished import is_finished
    from phi3v_dist.parallel.topology import Topology
    from phi3v_dist.parallel.waits import WAITS

    topology = Topology.from_environment()

    def problems(settings: config.Settings) -> list[str]:
        looks = topology.is_main and not is_finished(settings)
        return run.problems(settings, topology.world_size) if looks else []

    settings = config.load(arguments.config, arguments.overrides, problems)
    if is_finished(settings):
        logging.info(
            "%s is finished; for more steps raise train.steps, for another run change run.name", settings.run.folder
        )
        return
    from phi3v_dist.attempt import environment
    from phi3v_dist.attempt.attempt import Attempt
    from phi3v_dist.train.loop import fit
    from phi3v_dist.watch import flight_recorder, heartbeat, watcher

    if topology.device.type == "cuda":
        flight_recorder.record(settings.run.folder)
    topology.start(settings.parallel.timeout_s)
    WAITS.watch(topology)
    environment.require_writable(settings.run.folder, topology)
    attempt = Attempt.begin(settings.run.folder, topology)
    say_attempt(attempt.number, topology.rank)
    try:
        requests.opened(settings.run.folder, attempt, settings.checkpoint.grace_s)
        watcher.attach(attempt.folder, topology, settings.watch)
        summary = fit(run.build(settings, topology, attempt, requests))
        topology.stop()
    finally:
        attempt.end()
    heartbeat.close(heartbeat.STOPPED if summary is None else heartbeat.DONE)


def main() -> None:
    """Entry point of `phi3v-train` and `launch/train.py`."""
    run_script(run_command)


if __name__ == "__main__":
    main()
