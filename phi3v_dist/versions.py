"""Tells which versions of the closest dependencies this code accepts, and names those that it does not.

Note: nothing is imported to find out. A package of another version may fail in its own import, without saying why.
"""

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from phi3v_dist.errors import ConfigError

# The same bounds as in setup.cfg. To change one, see "Versions" in CONTRIBUTING.md.
ACCEPTED = {
    "torch": ">=2.13,<2.14",  # fake tensors and profiler events in the planner and the recorder of steps
    "transformers": ">=5.23,<5.24",  # its decoder and CLIP layers are called one by one
    "deepspeed": "==0.19.8",  # checkpoints read and write the partitions of its ZeRO-3 optimizer
}


def accepts(package: str, found: str) -> bool:
    """Whether this version is one of `ACCEPTED`. A local label, as in 2.13.0+cu130, makes no difference."""
    try:
        return SpecifierSet(ACCEPTED[package]).contains(Version(found), prereleases=True)
    except InvalidVersion:
        return False


def problems(*packages: str) -> list[str]:
    """One line for each package that is missing or of another version. Of all packages if none is named."""
    found = []
    for package in packages or ACCEPTED:
        accepted = f"{package}{ACCEPTED[package]}"
        try:
            installed = version(package)
        except PackageNotFoundError:
            found.append(f"{package} is not installed: pip install '{accepted}'")
            continue
        if not accepts(package, installed):
            found.append(f"{package} {installed} is installed, phi3v-dist needs {accepted}: pip install '{accepted}'")
    return found


def require(*packages: str) -> None:
    """Raise ConfigError with all `problems`."""
    if wrong := problems(*packages):
        raise ConfigError(wrong)
