"""train.py, evaluate.py and accelerate_configs/: beside the package in a checkout, inside it in a wheel.

A wheel has the scripts under other names (setup.py). One called evaluate.py would, where a launcher runs it or where
it lies beside packages, hide the package of that name from every library that imports it.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from chatlora.errors import ConfigError, did_you_mean

PACKAGE = Path(__file__).resolve().parent
SHIPPED = PACKAGE / "shipped"
HOME = SHIPPED if SHIPPED.is_dir() else PACKAGE.parent
CONFIGS = HOME / "accelerate_configs"


def script_path(name: str) -> Path:
    """`train` or `evaluate` -> its file, for a launcher."""
    return HOME / (f"{name}.py" if HOME != SHIPPED else f"chatlora_{name}.py")


def load_script(name: str) -> ModuleType:
    """`train` or `evaluate` as a module, under a name that nobody else has."""
    private = f"chatlora_{name}"
    if private not in sys.modules:
        spec = spec_from_file_location(private, script_path(name))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[private] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[private])
    return sys.modules[private]


def launcher_file(name: str) -> Path:
    """A file for a launcher: as named from here, else that of accelerate_configs/, which `zero2` is enough to name."""
    if Path(name).is_file():
        return Path(name)
    wanted = Path(name)
    ours = CONFIGS / (wanted.name if wanted.suffix else f"{wanted.name}.yaml")
    if wanted.parent.name in ("", CONFIGS.name) and not wanted.is_absolute() and ours.is_file():
        return ours
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    hint = did_you_mean(wanted.stem, known) or f"; there is {', '.join(known)}"
    raise ConfigError(f"--config_file: {name} does not exist, neither here nor in {CONFIGS}{hint}")
