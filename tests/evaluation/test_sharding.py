"""Several processes, one evaluation: parts come together exactly once, and a line cut off by a crash does no harm."""

from pathlib import Path

import pytest

from chatlora.errors import LaunchError, PredictionsError
from chatlora.evaluation.predictions import Prediction, append_predictions, read_predictions, read_written_so_far
from chatlora.evaluation.sharding import collect, mark_complete, open_parts, remove_parts


def test_parts_of_several_processes_come_together_in_order(tmp_path: Path) -> None:
    wanted = [(index, 0) for index in range(5)]
    parts = [open_parts({"model": tmp_path}, rank, 2, lambda: None)["model"] for rank in (0, 1)]
    predictions = [Prediction(id=index, turn=turn, prediction="p", reference="r") for index, turn in wanted]
    for index in (4, 1, 0, 3, 2):
        append_predictions(parts[index % 2], [predictions[index]])
    mark_complete(parts[0])
    mark_complete(parts[1])
    assert collect(tmp_path, 2, wanted) == predictions
    with pytest.raises(PredictionsError, match="1 of 6 samples have no prediction"):
        collect(tmp_path, 2, [*wanted, (5, 0)])
    with pytest.raises(PredictionsError, match="belong to no sample"):
        collect(tmp_path, 2, wanted[:4])
    append_predictions(parts[0], [predictions[4], predictions[4]])
    with pytest.raises(PredictionsError, match="predicted twice"):
        collect(tmp_path, 2, wanted)
    remove_parts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_a_folder_that_other_machines_do_not_see_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="process 1 of 2 does not see"):
        open_parts({"model": tmp_path}, 1, 2, lambda: None)


def test_a_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    kept = [Prediction(id=index, prediction="好\ud83d\u2028", reference=["a", "b"]) for index in range(2)]
    append_predictions(path, kept)
    whole = path.read_bytes()
    for size in range(len(whole) // 2 + 1, len(whole)):
        path.write_bytes(whole[:size])
        assert read_written_so_far(path) == kept[:1]
    path.write_bytes(whole)
    assert read_written_so_far(path) == read_predictions(path) == kept
