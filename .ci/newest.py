"""Which of the libraries that change most are installed here, beside what the index has and what README says was tried.

Run with the Python of an environment in which only torch was pinned.
"""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

LIBRARIES = ("transformers", "peft", "accelerate", "datasets")


def newest(name: str) -> str:
    told = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", name], capture_output=True, text=True, check=True
    )
    found = re.match(rf"{name} \((\S+)\)", told.stdout)
    assert found, told.stdout
    return found[1]


def main() -> None:
    (line,) = re.findall(r"^Tried last: (.*)$", Path("README.md").read_text(encoding="utf-8"), re.MULTILINE)
    said = dict(re.findall(r"(\w+) (\d[\w.]*\d)", line))
    print(f"beside torch {version('torch')}:")
    for name in LIBRARIES:
        here, there = version(name), newest(name)
        held = "" if here == there else f"; the newest is {there}, and others hold it back"
        print(f"  {name} {here}; README says {said.get(name)}{held}")


if __name__ == "__main__":
    main()
