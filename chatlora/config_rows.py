"""What `data.train`, `data.validation` and `data.test` may say: sources, a share of the training rows, sets by name."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from chatlora.errors import did_you_mean

RowFormat = Literal[
    "auto",
    "messages",
    "conversations",
    "sharegpt",
    "prompt_completion",
    "alpaca",
    "prompt_calls",
    "self_instruct",
]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class Source(Section):
    """Where rows come from."""

    path: str = Field(min_length=1, description="a file, a folder, a glob, or the name of a data set on the hub")
    format: RowFormat = Field("auto", description="the form of a row; auto recognises it from its columns")
    columns: dict[str, str] = Field(
        {}, description="our column -> the file's, e.g. {prompt: content, completion: summary}"
    )
    ignore: tuple[str, ...] = Field(
        (), description="columns, and keys of messages, that say nothing about training, e.g. [rejected, quality]"
    )
    reader: str | None = Field(
        None,
        pattern=r"\.py:[A-Za-z_]\w*$",
        description="FILE.py:FUNCTION of yours that turns a row of the file into one of a known form, or into None",
    )
    repeat: int = Field(1, ge=1, description="how often its training rows are seen in an epoch")
    group_by: str | None = Field(
        None,
        description="a column, e.g. conversation_id: a share never holds out some of the rows that are equal in it",
    )
    split: str | None = Field(
        None, description="which part of a folder or hub data set; null: train, validation or test by its use"
    )


def _as_sources(value: Any) -> Any:
    """A path, a list of paths, or a list of sources."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


def _as_share_or_sources(value: Any) -> Any:
    if value is None or isinstance(value, bool) or value in ("null", "true", "false"):
        raise ValueError("a share of the training rows is expected, 0 for none of them, or the path of rows")
    try:
        return float(value)
    except (TypeError, ValueError):
        return _as_sources(value)


def _as_share_sources_or_sets(value: Any) -> Any:
    """A mapping with a key of Source is one source; any other gives sets of rows their names."""
    if not isinstance(value, Mapping):
        return _as_share_or_sources(value)
    keys = [name for name in value if name in Source.model_fields]
    others = [str(name) for name in value if name not in Source.model_fields]
    if keys and others and not any(did_you_mean(name, Source.model_fields) for name in others):
        raise ValueError(
            f"with {keys[0]} it is one source, which has no {others[0]}; sets of rows take any names but "
            f"{', '.join(Source.model_fields)}"
        )
    return _as_sources(value) if keys else dict(value)


def _kind(value: Any) -> str:
    return "a share" if isinstance(value, float) else "named sets" if isinstance(value, dict) else "a list"


Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_sources)]
Share = Annotated[float, Field(ge=0, lt=1), Tag("a share")]
NamedSets = Annotated[
    dict[Annotated[str, Field(min_length=1)], Annotated[Sources, Field(min_length=1)]],
    Field(min_length=1),
    Tag("named sets"),
]
ShareOrSources = Annotated[
    Share | Annotated[Sources, Tag("a list")], Discriminator(_kind), BeforeValidator(_as_share_or_sources)
]
ShareSourcesOrSets = Annotated[
    Share | Annotated[Sources, Tag("a list")] | NamedSets,
    Discriminator(_kind),
    BeforeValidator(_as_share_sources_or_sets),
]
UNNAMED = "validation"  # the one set of validation rows that has no name of its own
