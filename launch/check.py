"""Everything that can be wrong, before a node is allocated: settings, shards, batch arithmetic.

python launch/check.py --config launch/configs/quickstart.yaml --world_size 64
"""

import argparse

from phi3v_dist import config, run
from phi3v_dist.cli import run_script
from phi3v_dist.errors import ConfigError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--world_size", type=int, default=1, help="ranks that the job will have")
    parser.add_argument("overrides", nargs="*", help="settings as key=value")
    arguments = parser.parse_args()
    if arguments.world_size < 1:
        raise ConfigError(f"--world_size is {arguments.world_size}: a job has at least 1 rank")
    settings = config.load(arguments.config, arguments.overrides, lambda s: run.problems(s, arguments.world_size))
    train = run.Data.open(settings.data.train, settings)
    _, num_steps = run.plan(settings, train)
    for line in run.describe(settings, train, num_steps, arguments.world_size):
        print(line)


def cli() -> None:
    """Entry point of the installed command."""
    run_script(main)


if __name__ == "__main__":
    cli()
