"""An installation of the wheel in a virtual environment of its own, for tests that use it without the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from conftest import REPOSITORY

SOURCES = (
    "phi3v_dist",
    "launch",
    "ds_configs",
    "slurm",
    "setup.py",
    "setup.cfg",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
NOT_OURS = ("PYTHONPATH", "PYTHONWARNINGS", "PHI3V_", "VIRTUAL_ENV", "RANK", "WORLD_SIZE", "LOCAL_RANK")
LAUNCHERS = {"torchrun": "torch.distributed.run", "deepspeed": "deepspeed.launcher.runner"}
TIMEOUT_S = 280

# Runs in each Python process of the installation: writes down which paths of the repository it opens or lists.
RECORDER = """
import os, sys

def record(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and arguments and isinstance(arguments[0], (str, os.PathLike)):
        path = os.path.abspath(os.fspath(arguments[0]))
        if path.startswith({repository!r} + os.sep) and not path.startswith({packages!r}):
            file = os.open({out!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(file, (path + "\\n").encode())
            os.close(file)

sys.addaudithook(record)
"""


@dataclass(frozen=True)
class Installation:
    """A virtual environment that holds nothing but our wheel, and sees the dependencies of the tests' environment."""

    folder: Path

    @classmethod
    def build(cls, folder: Path) -> "Installation":
        """Build the wheel from a copy of the sources, and install it. Needs no network."""
        source = folder / "source"
        source.mkdir(parents=True)
        for name in SOURCES:
            copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
            copy(REPOSITORY / name, source / name)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
        wheel = [*pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
        subprocess.run(wheel, check=True, timeout=TIMEOUT_S)
        shutil.rmtree(source)

        installation = cls(folder)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", installation.venv], check=True)
        (built,) = folder.glob("*.whl")
        into = [*pip, "--python", installation.python, "install", "--no-index", "--no-deps", built]
        subprocess.run(into, check=True, timeout=TIMEOUT_S, env=installation.environment(folder))

        # The launchers of torch and DeepSpeed, as installing those would write them
        for name, module in LAUNCHERS.items():
            script = installation.venv / "bin" / name
            script.write_text(f"#!{installation.python}\nfrom {module} import main\nmain()\n")
            script.chmod(0o755)

        # A .pth file adds a path, whose own .pth files, such as that of an editable install, are not read
        packages = sysconfig.get_path("purelib")
        (installation.site_packages / "dependencies.pth").write_text(packages + "\n")
        recorder = RECORDER.format(
            repository=str(REPOSITORY), packages=str(Path(packages).parents[2]), out=str(installation.opened_file)
        )
        (installation.site_packages / "sitecustomize.py").write_text(recorder)
        return installation

    @property
    def venv(self) -> Path:
        return self.folder / "venv"

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        return self.venv / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"

    @property
    def opened_file(self) -> Path:
        return self.folder / "opened.txt"

    def opened(self) -> list[str]:
        """Paths of the repository that programs of the installation have opened or listed."""
        return self.opened_file.read_text().splitlines() if self.opened_file.exists() else []

    def environment(self, home: Path) -> dict[str, str]:
        """Of a person who has activated the virtual environment and knows nothing of the repository."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(NOT_OURS)}
        path = f"{self.venv / 'bin'}{os.pathsep}/usr/local/bin{os.pathsep}/usr/bin{os.pathsep}/bin"
        return kept | {"PATH": path, "HOME": str(home), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

    def run(self, directory: Path, *words: str, expect: int = 0) -> str:
        """Run an installed command in `directory`; returns what it prints."""
        done = subprocess.run(
            [str(self.venv / "bin" / words[0]), *words[1:]], cwd=directory, env=self.environment(directory),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_S,
        )  # fmt: skip
        assert done.returncode == expect, f"{words}: exit code {done.returncode}\n{done.stdout[-4000:]}"
        return done.stdout
