"""A program that tells what it is started with. Its tests: test_fork_server.py.

python fork_server_ranks.py facts FILE      write them as JSON; FILE may hold {rank}
python fork_server_ranks.py wait            print `ready`, then wait for a signal
python fork_server_ranks.py fail            raise an error
"""

import json
import os
import sys
import time
from pathlib import Path


def facts() -> dict:
    umask = os.umask(0)
    return {
        "arguments": sys.argv,
        "search path": sys.path[:2],
        "is main": __name__ == "__main__",
        "directory": os.getcwd(),
        "parent": os.getppid(),
        "has own session": os.getsid(0) == os.getpid(),
        "has own group": os.getpgid(0) == os.getpid(),
        "value": os.environ.get("SOME_VALUE"),
        "umask": umask,
        "cores": sorted(os.sched_getaffinity(0)),
        "input": sys.stdin.read(),
        "open files": len(os.listdir("/proc/self/fd")),
        "is forked": "fork_server.py" in Path("/proc/self/cmdline").read_text(),
    }


if __name__ == "__main__":
    if sys.argv[1] == "facts":
        Path(sys.argv[2].format(rank=os.environ.get("RANK"))).write_text(json.dumps(facts()))
        print("to stdout")
        print("to stderr", file=sys.stderr)
        sys.exit(3 if "RANK" not in os.environ else 0)
    elif sys.argv[1] == "wait":
        print("ready", flush=True)
        time.sleep(600)
    else:
        raise ValueError("this one")
