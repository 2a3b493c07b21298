"""What setup.cfg cannot say: in a wheel, `data_tools`, docs, recipes and Slurm profiles lie inside `stamo_dist`.

`pip install -e` leaves them where they are, and `data_tools` is a top-level package there. stamo_dist/shipped.py finds
either.
"""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

SHIPPED = ("data_tools", "docs", "recipes", "slurm")


class BuildPy(build_py):
    def run(self) -> None:
        if self.editable_mode:
            super().run()
            self.distribution.packages += find_packages(include=["data_tools", "data_tools.*"])
            return
        shutil.rmtree(self.build_lib, ignore_errors=True)  # modules of an earlier build, removed since
        super().run()
        for folder in SHIPPED:
            target = Path(self.build_lib) / "stamo_dist" / "_shipped" / folder
            shutil.copytree(folder, target, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildPy})
