"""What pyproject.toml has no word for: a wheel carries the scripts under other names, and accelerate_configs/."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithScripts(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the checkout's own are used
            return
        shipped = Path(self.build_lib) / "chatlora" / "shipped"  # chatlora/scripts.py looks there
        self.mkpath(str(shipped))
        for name in ("train", "evaluate"):
            self.copy_file(f"{name}.py", str(shipped / f"chatlora_{name}.py"))
        self.copy_tree("accelerate_configs", str(shipped / "accelerate_configs"))


setup(cmdclass={"build_py": BuildWithScripts})
