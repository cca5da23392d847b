"""Values out of Arrow (Parquet, Feather, `datasets`) -> what the row said, by their types.

A struct has a value for every field that any row has: null there means absent, and a null that a row really had cannot
be told from it. A map holds only its own keys, and JSON text (`datasets.Json`) only what was written: nulls stay.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Clean = Callable[[Any], Any]


def cleaner_of(schema: Any) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """What makes a row of the rows that `to_pylist` gives for this schema. It raises ValueError where a map has a key
    twice, or a name stands for two columns."""
    return _of_struct(schema)


def _of(kind: Any) -> Clean | None:
    """None where a value of this type is already what the row said."""
    import pyarrow as pa

    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _from_json if kind.extension_name == "arrow.json" else None
    if types.is_struct(kind):
        return _of_struct(kind)
    if types.is_map(kind):
        return _of_map(_of(kind.item_type))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _of_list(_of(kind.value_type))
    return None


def _of_struct(fields: Iterable[Any]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    names = [field.name for field in fields]
    cleaners = {field.name: _of(field.type) for field in fields}

    def refuse(value: Mapping[str, Any]) -> dict[str, Any]:
        raise ValueError(f"two columns or fields have one name: {', '.join(names)}; rename one of them")

    def clean(value: Mapping[str, Any]) -> dict[str, Any]:
        return {key: _cleaned(cleaners.get(key), item) for key, item in value.items() if item is not None}

    return clean if len(cleaners) == len(names) else refuse


def _of_map(clean_item: Clean | None) -> Clean:
    def clean(pairs: Any) -> dict[str, Any]:
        found = {key: _cleaned(clean_item, item) for key, item in pairs}
        if len(found) < len(pairs):
            raise ValueError(f"a map has a key twice: {', '.join(str(key) for key, _ in pairs)}; keep one of them")
        return found

    return clean


def _of_list(clean_item: Clean | None) -> Clean | None:
    if clean_item is None:
        return None
    return lambda items: [_cleaned(clean_item, item) for item in items]


def _from_json(text: Any) -> Any:
    return json.loads(text) if isinstance(text, str) else text  # `datasets` has read it already


def _cleaned(clean: Clean | None, value: Any) -> Any:
    return value if clean is None or value is None else clean(value)
