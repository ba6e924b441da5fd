"""Starts Python programs of the tests as forks of a process that has imported the heavy packages once.

Importing torch, DeepSpeed and transformers takes 5 to 10 s per process, and a launch with two ranks needs three to five
processes. `install` makes `subprocess.Popen` fork the programs that import them; every other program is started as
usual. The new process is what `Popen` would have started: same arguments, environment, working directory, streams,
session and exit code, and a true child of its caller. What differs is /proc/PID/cmdline and the order of imports, so
the wheel, the Slurm tests and the tour start real processes.

How a program becomes the child of its caller although the server forks it: the caller makes itself a subreaper, the
server forks twice, and the process in the middle exits. The kernel then gives the program to the caller.

Note: a launcher starts ranks, but a process with threads cannot be forked safely. So a launcher gets a server of its
own, forked before the launcher's program runs.
"""

import ctypes
import gc
import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn

TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parent
REAL_PROCESS = "PHI3V_TEST_REAL_PROCESS"  # set in a program's environment: start it as usual

# What a run imports before its first step, and what the commands import.
PRELOADED = (
    "deepspeed",
    "torch._inductor.compile_fx",  # imported by the first deepspeed.initialize
    "torch.distributed.run",
    "torch.multiprocessing",
    "torch.utils.tensorboard",
    "transformers.modeling_utils",
    "transformers.models.phi3.modeling_phi3",
    "transformers.models.clip.modeling_clip",
    "peft",
    "wandb",
    "webdataset",
    "pyarrow.parquet",
    "matplotlib.figure",
    "rich.progress",
    "simplejpeg",
)
LAUNCHERS = ("torchrun", "deepspeed", "deepspeed.launcher.launch", "supervise.py")
PR_SET_CHILD_SUBREAPER = 36
MESSAGE_BYTES = 200_000  # of one request; the environment is most of it
STREAMS = (0, 1, 2)

# Libraries and the interpreter read these when they are imported: another value needs another process.
READ_AT_IMPORT = (
    "PYTHON", "LD_", "OMP_", "MKL_", "KMP_", "MALLOC_", "DS_", "CUDA_", "TORCH", "HF_", "TRANSFORMERS_", "MPL", "LC_",
    "LANG", "XDG_", "HOME",
)  # fmt: skip
MAY_DIFFER = ("PYTHONPATH", "CUDA_VISIBLE_DEVICES", "TORCHELASTIC_", "TORCH_NCCL_", "TORCH_FR_")


@dataclass(frozen=True)
class Program:
    """A Python program and the process that it shall run in. name: a script's path, or a module's name."""

    name: str
    arguments: list[str]
    is_module: bool
    environment: dict[str, str]
    working_directory: str
    is_unbuffered: bool = False
    new_session: bool = False
    process_group: int = -1
    umask: int = 0o022
    cores: list[int] = field(default_factory=list)

    @property
    def is_launcher(self) -> bool:
        return Path(self.name).name in LAUNCHERS


# The caller's side


class ForkServer:
    """A process that forks programs on request. One request at a time."""

    def __init__(self, connection: socket.socket, environment: Mapping[str, str], owner: int):
        self.connection, self.environment, self.owner = connection, environment, owner
        self.lock = threading.Lock()

    @classmethod
    def launch(cls, environment: Mapping[str, str]) -> "ForkServer":
        """Start one with `environment`. It needs some seconds for its imports; requests wait for it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), str(theirs.fileno())],
                pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip
        return cls(ours, environment, os.getpid())

    def can_start(self, program: Program) -> bool:
        return _read_at_import(program.environment) == _read_at_import(self.environment)

    def start(self, program: Program, streams: Sequence[int]) -> int:
        """Fork `program` with `streams` as its stdin, stdout and stderr. Returns its process number."""
        message = json.dumps(asdict(program)).encode()
        assert len(message) < MESSAGE_BYTES, "the environment of a test's program is too large for the fork server"

        with self.lock:
            _adopt_orphans(True)
            try:
                socket.send_fds(self.connection, [message], list(streams))
                answer = self.connection.recv(64)
            finally:
                _adopt_orphans(False)
        if not answer:
            raise RuntimeError("the fork server of the tests has exited; its message is above")
        return int(answer)


_server: ForkServer | None = None
_environment: dict[str, str] = {}
_execute_child = subprocess.Popen._execute_child


def install(environment: Mapping[str, str]) -> None:
    """From now on `subprocess` forks the programs of `find_program` in this process.

    Args:
        environment: what programs are usually started with. A test that starts the first program may have changed it.
    """
    global _environment
    _environment = dict(environment)
    subprocess.Popen._execute_child = _fork_or_execute


def _fork_or_execute(
    self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, p2cread,
    p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask, start_new_session,
    process_group,
):  # fmt: skip
    """`Popen._execute_child` of Python 3.11 to 3.13."""
    global _server
    is_plain = not (shell or executable or preexec_fn or pass_fds or gids or gid is not None or uid is not None)
    program = find_program(args, dict(env if env is not None else os.environ), cwd) if is_plain else None
    if program is not None:
        if _server is None or _server.owner != os.getpid():
            _server = ForkServer.launch(_environment)
        if not _server.can_start(program):
            program = None
    if program is None:
        return _execute_child(
            self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
            p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask,
            start_new_session, process_group,
        )  # fmt: skip

    details = asdict(program) | {
        "new_session": start_new_session,
        "process_group": process_group if process_group >= 0 else os.getpgid(0),
        "umask": umask if umask >= 0 else _current_umask(),
        "cores": sorted(os.sched_getaffinity(0)),
    }
    given = (p2cread, c2pwrite, errwrite)
    streams = [fd if fd >= 0 else own for fd, own in zip(given, STREAMS, strict=True)]
    self.pid = _server.start(Program(**details), streams)
    self._child_created = True
    self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def find_program(args, environment: dict[str, str], cwd) -> Program | None:
    """The program that a command line starts, if it is one that imports the heavy packages."""
    if REAL_PROCESS in environment or isinstance(args, str | bytes | os.PathLike):
        return None
    words = [os.fspath(word) for word in args]
    if not all(isinstance(word, str) for word in words):
        return None
    if not environment.get("PYTHONPATH", "").startswith(str(REPOSITORY)):
        return None
    directory = os.path.abspath(os.fspath(cwd) if cwd is not None else os.getcwd())

    is_unbuffered = False
    if Path(words[0]).name.startswith("python"):
        if os.path.realpath(shutil.which(words[0]) or "") != os.path.realpath(sys.executable):
            return None
        words = words[1:]
        if words[:1] == ["-u"]:
            is_unbuffered, words = True, words[1:]
        is_module = words[:1] == ["-m"]
        words = words[1:] if is_module else words
    else:
        is_module = False
        words[0] = shutil.which(words[0], path=environment.get("PATH")) or words[0]

    if not words or not _imports_heavy_packages(words[0], is_module, directory):
        return None
    return Program(words[0], words[1:], is_module, environment, directory, is_unbuffered)


def _imports_heavy_packages(name: str, is_module: bool, directory: str) -> bool:
    if is_module:
        return name in LAUNCHERS or name.startswith("phi3v_dist.cli.")
    path = Path(directory, name)
    is_launcher = path.name in LAUNCHERS and path.parent == Path(sys.executable).parent
    is_command = path.parent == REPOSITORY / "launch"
    is_ranks = path.is_relative_to(TESTS) and path.name.endswith("_ranks.py")
    return is_launcher or ((is_command or is_ranks) and path.is_file())


def _read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in environment.items() if k.startswith(READ_AT_IMPORT) and not k.startswith(MAY_DIFFER)}


def _adopt_orphans(yes: bool) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, int(yes), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _current_umask() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("Umask:", 1)[1].split(maxsplit=1)[0], 8)


# The server's side


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    sys.path.insert(0, str(REPOSITORY))
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()
    run(serve(connection))


def serve(connection: socket.socket) -> Program:
    """Fork a process for each request, until the caller is gone. Returns in each new process, with its program."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        message, streams, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, len(STREAMS))
        if not message:
            os._exit(0)
        middle = os.fork()
        if middle == 0:
            middle = os.getpid()
            if os.fork():
                os._exit(0)
            break
        os.waitpid(middle, 0)
        for stream in streams:
            os.close(stream)

    program = Program(**json.loads(message))
    for number, stream in zip(STREAMS, streams, strict=True):
        os.dup2(stream, number)
        os.close(stream)
    while os.getppid() == middle:
        os.sched_yield()
    _become(program)
    connection.send(str(os.getpid()).encode())
    connection.close()
    return program


def _become(program: Program) -> None:
    """Make this process what `Popen` would have started."""
    global _server
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if program.new_session:
        os.setsid()
    elif os.getpgid(0) != program.process_group:
        os.setpgid(0, program.process_group)
    os.umask(program.umask)
    os.sched_setaffinity(0, program.cores)
    os.chdir(program.working_directory)
    os.environ.clear()
    os.environ.update(program.environment)
    sys.stdout.reconfigure(line_buffering=os.isatty(1), write_through=program.is_unbuffered)
    sys.argv = [program.name, *program.arguments]
    own = program.working_directory if program.is_module else str(Path(program.name).resolve().parent)
    outside = [path for path in sys.path if path not in (str(TESTS), str(REPOSITORY))]
    sys.path[:] = [own, *program.environment["PYTHONPATH"].split(os.pathsep), *outside]
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # a new process draws other numbers; Python's own `random` does so itself
    _server = None


def run(program: Program) -> NoReturn:
    """Run `program` in this process and end it with its exit code."""
    while program.is_launcher and _server is None:
        program = _give_server(program)

    ended_by = None
    try:
        if program.is_module:
            runpy.run_module(program.name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program.name, run_name="__main__")
    except BaseException as error:
        ended_by = error

    # Without shutting the interpreter down: freeing each module copies all memory that is shared with the server
    from phi3v_dist.parallel.process_end import end_as_interpreter

    end_as_interpreter(ended_by)


def _give_server(launcher: Program) -> Program:
    """Fork a server for the programs that `launcher` will start, while it has no threads.

    Returns in the launcher, and later in each process that its server forks, with the program of that process.
    """
    global _server
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        for number in STREAMS:  # whoever reads the launcher's output must see its end
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        return serve(theirs)

    theirs.close()
    _server = ForkServer(ours, launcher.environment, os.getpid())
    install(launcher.environment)
    return launcher


if __name__ == "__main__":
    main()
