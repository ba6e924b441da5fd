"""Puts the recipes, DeepSpeed files and Slurm scripts into the package; everything else is in setup.cfg."""

from setuptools import find_packages, setup

# In an installation `phi3v_dist.resources` holds copies of these folders. phi3v_dist/resources/__init__.py finds them.
FOLDERS = {"configs": "launch/configs", "ds_configs": "ds_configs", "slurm": "slurm"}
PACKAGES = {f"phi3v_dist.resources.{name}": folder for name, folder in FOLDERS.items()}
FILES = ["*.yaml", "imports/*.yaml", "*.json", "*.sh", "*.txt", "README.md"]

setup(
    packages=[*find_packages(include=["phi3v_dist*"]), *PACKAGES],
    package_dir=PACKAGES,
    package_data={"": ["*.j2", "py.typed"]} | dict.fromkeys(PACKAGES, FILES),
    exclude_package_data={"phi3v_dist.resources.slurm": ["container.sh"]},  # it installs from the repository
)
