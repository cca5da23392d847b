"""What Arrow's types make of a row: maps are objects, nulls that a row really has stay, those that Arrow puts in go."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from chatlora.config import Source
from chatlora.errors import DataError
from chatlora.reading.conversation import ToolCall
from chatlora.reading.sources import read_conversations

STRING = pa.string()


def calls_of(path: Path, table: pa.Table) -> list[ToolCall]:
    parquet.write_table(table, path / "rows.parquet")
    feather.write_feather(table, str(path / "rows.feather"), compression="uncompressed")
    found = [
        [
            call
            for row in read_conversations(Source(path=str(path / name)))
            for m in row.messages
            for call in m.tool_calls
        ]
        for name in ("rows.parquet", "rows.feather")
    ]
    assert found[0] == found[1]
    return found[0]


def table_of(arguments: list[Any], kind: pa.DataType) -> pa.Table:
    """A row for each of these arguments: a question, and a call with them."""
    function = pa.struct([("name", STRING), ("arguments", kind)])
    message = pa.struct(
        [("role", STRING), ("content", STRING), ("tool_calls", pa.list_(pa.struct([("function", function)])))]
    )
    rows = [
        [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": each}}]},
        ]
        for each in arguments
    ]
    return pa.table({"messages": pa.array(rows, pa.list_(message))})


def test_arguments_in_a_map_are_an_object_and_its_nulls_stay(tmp_path: Path) -> None:
    table = table_of([[("city", "Oslo"), ("unit", None)], [("place", "Bergen")], []], pa.map_(STRING, STRING))
    assert [call.arguments for call in calls_of(tmp_path, table)] == [
        {"city": "Oslo", "unit": None},
        {"place": "Bergen"},
        {},
    ]


def test_arguments_in_json_text_keep_their_nulls(tmp_path: Path) -> None:
    table = table_of(['{"a": null, "b": [1, null]}'], STRING)
    assert [call.arguments for call in calls_of(tmp_path, table)] == [{"a": None, "b": [1, None]}]


def test_what_arrow_puts_into_a_struct_is_absent_and_nulls_of_lists_stay(tmp_path: Path) -> None:
    kind = pa.struct([("a", pa.int64()), ("b", pa.list_(pa.int64()))])
    table = table_of([{"a": 1}, {"b": [1, None]}], kind)
    assert [call.arguments for call in calls_of(tmp_path, table)] == [{"a": 1}, {"b": [1, None]}]


def test_json_of_datasets_is_what_was_written(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Json, List, Value

    rows = [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": None, "b": 1}}]}]
    features = Features({"messages": List(Json()), "id": Value("int64")})
    Dataset.from_list([{"messages": rows, "id": 1}], features=features).to_parquet(tmp_path / "rows.parquet")
    (row,) = read_conversations(Source(path=str(tmp_path / "rows.parquet")))
    assert row.messages[0].tool_calls == (ToolCall("f", {"a": None, "b": 1}),)


def test_a_map_with_a_key_twice_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 1: a map has a key twice: a, a"):
        calls_of(tmp_path, table_of([[("a", "1"), ("a", "2")]], pa.map_(STRING, STRING)))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([text]) for text in "qab"], names=["prompt", "completion", "completion"])
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="two columns or fields have one name: prompt, completion, completion"):
        list(read_conversations(Source(path=str(tmp_path / "a.arrow"))))
