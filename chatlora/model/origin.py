"""What is publicly known of a base model and of data: hub ids, a licence, names without paths. Nothing is guessed.

A folder has a hub id where it lies in the hub's local cache, which names its folders after it. What stands elsewhere is
no proof: `_name_or_path` in a config.json and `base_model` in a README name what a model was made *from*.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from chatlora.config import ModelConfig
from chatlora.embedded_model import EMBEDDED, source_of

FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)^---[ \t\r]*$", re.DOTALL | re.MULTILINE)
CACHED = re.compile(r"models--(.+)")  # models--OWNER--NAME/snapshots/COMMIT
LICENCE = ("license", "license_name", "license_link")  # the last two where the first is `other`


@dataclass(frozen=True, slots=True)
class Origin:
    """name: for people, never a path. licence: `LICENCE` as the model's own card has them; empty where none is here."""

    name: str
    hub_id: str | None = None
    revision: str | None = None
    licence: dict[str, str] = field(default_factory=dict)


def origin_of(model: ModelConfig) -> Origin:
    """No network: of a model of the hub, the card counts that is in the local cache."""
    where = model.name_or_path
    if where.startswith(EMBEDDED):
        source = source_of(where)
        return Origin(source.title, source.hub_id, licence={"license": source.licence.lower()})
    folder = Path(where).absolute()
    if folder.is_dir():
        hub_id, revision = _cached_as(folder)
        return Origin(hub_id or folder.name, hub_id, revision, _licence_in(folder / "README.md", hub_id))
    if not is_hub_id(where):
        return Origin(folder.name)
    card = try_to_load_from_cache(where, "README.md", revision=model.revision)
    return Origin(where, where, model.revision, _licence_in(Path(card), where) if isinstance(card, str) else {})


def public_name(path: str) -> str:
    """A source of rows by its name: a file's or folder's own, without what it lies in, or that of a set of the hub."""
    return path if path.startswith(EMBEDDED) or hub_data(path) else Path(path).name


def hub_data(path: str) -> str | None:
    """The hub id of a source in a run's ledger, where all that is on this machine is an absolute path or a pattern."""
    hub_id = path.partition(":")[0]  # OWNER/NAME:CONFIG
    return None if path.startswith(EMBEDDED) or Path(path).exists() or not is_hub_id(hub_id) else hub_id


def is_hub_id(name: str) -> bool:
    """Whether the hub could have something of this name: by its form alone. A folder may be named so, too."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def front_matter(text: str) -> dict[str, Any]:
    """The metadata in front of a card; empty where there is none, or none that can be read."""
    found = FRONT_MATTER.match(text)
    try:
        values = yaml.safe_load(found.group(1)) if found else None
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def _cached_as(folder: Path) -> tuple[str | None, str | None]:
    """The hub id and the commit that a folder of the hub's local cache holds."""
    found = CACHED.fullmatch(folder.parent.parent.name)
    hub_id = found.group(1).replace("--", "/") if found else ""
    if folder.parent.name != "snapshots" or not is_hub_id(hub_id):
        return None, None
    return hub_id, folder.name


def _licence_in(card: Path, hub_id: str | None) -> dict[str, str]:
    """A link to a file beside the base's card would be a dead one in another place."""
    try:
        values = front_matter(card.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError):
        return {}
    licence = {name: values[name] for name in LICENCE if isinstance(values.get(name), str)}
    link = licence.pop("license_link", "")
    if "license" not in licence:
        return {}
    if link and hub_id and not link.startswith("http"):
        link = f"https://huggingface.co/{hub_id}/blob/main/{link}"
    return licence | ({"license_link": link} if link.startswith("http") else {})
