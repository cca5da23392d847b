"""`evaluate.py --predictions`: files made anywhere, scored without a model and torch, or refused with the place."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import evaluate
from chatlora.errors import ConfigError, PredictionsError
from chatlora.evaluation.metrics import score
from chatlora.evaluation.predictions import read_predictions
from chatlora.evaluation.scoring import told_in

ROOT = Path(__file__).resolve().parents[2]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def test_a_prediction_file_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows: list[dict[str, Any]] = [
        {"prediction": "宽松的阔腿裤", "reference": "宽松的裤子"},
        {"id": "b", "prediction": "", "reference": ["one", "two"], "prompt": "[/bold] \ud83d"},
    ]
    (tmp_path / "mine.jsonl").write_text("\ufeff\n" + "".join(json.dumps(row) + "\r\n" for row in rows), "utf-8")
    evaluate.main(["--predictions", "mine.jsonl"])
    expected = score([row["prediction"] for row in rows], [row["reference"] for row in rows])
    told = json.loads((tmp_path / "eval/mine/scores.json").read_text("utf-8"))
    assert {name: entry["value"] for name, entry in told["scores"].items()} == expected.values
    assert {name: entry["signature"] for name, entry in told["scores"].items()} == expected.signatures
    assert (told["samples"], told["references"], told["empty_predictions"]) == (2, 3, 1)
    written = lines_of(tmp_path / "eval/mine/predictions.jsonl")
    assert [line["scores"] for line in written] == expected.per_sample
    assert [line["id"] for line in written] == ["mine.jsonl:2", "b"]
    assert json.loads((tmp_path / "eval/mine/status.json").read_text("utf-8"))["state"] == "done"


def test_style_chatglm3_scores_the_raw_prediction(tmp_path: Path) -> None:
    row = {"prediction": "4", "prediction_raw": "4<|user|>", "reference": "4"}
    path = write_lines(tmp_path / "p.jsonl", [row])
    values = {}
    for style in ("chatglm3", "chatlora"):
        evaluate.main(["--predictions", str(path), "--evaluation.style", style, "--output_dir", str(tmp_path / style)])
        told = json.loads((tmp_path / style / "scores.json").read_text("utf-8"))
        values[style] = told["scores"]["rouge-1"]["value"]
    assert values == {"chatglm3": 33.3333, "chatlora": pytest.approx(100, abs=1e-4)}


def test_scoring_imports_no_torch_and_importing_does_nothing(tmp_path: Path) -> None:
    write_lines(tmp_path / "p.jsonl", [{"prediction": "a b", "reference": "a c"}])
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import evaluate; loaded = set(sys.modules);"
        "assert not {'torch', 'transformers', 'jieba', 'rich'} & loaded, loaded;"
        "evaluate.main(['--predictions', 'p.jsonl']); print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr == ""


BAD_LINES = {
    '{"prediction": "a"}': "field 'reference' is missing; add it",
    '{"predict": "a", "reference": "b"}': "field 'prediction' is missing; rename 'predict'",
    '{"prediction": null, "reference": "b"}': "'prediction' is null; it must be a string",
    '{"prediction": "a", "reference": []}': "'reference' is a list; it must hold at least one string",
    '{"prediction": "a", "reference": ["b", 1]}': "only strings",
    '{"prediction": "a", "reference": {"text": "b"}}': "'reference' is an object",
    '{"prediction": "a", "prediction_raw": 1, "reference": "b"}': "'prediction_raw' is a number",
    '["a", "b"]': "a list where a row was expected; a row is an object",
    '{"prediction": "a", "refer': "was the file cut while it was written or copied?",
    "{'prediction': 'a', 'reference': 'b'}": "write the line with a JSON library",
    "[" * 100_000: "nested too deeply",
    '{"prediction": "a", "prediction": "b", "reference": "c"}': "the key 'prediction' stands twice in one object",
    f'{{"id": {"7" * 5_000}, "prediction": "a", "reference": "b"}}': "a number of more than 4,300 digits; put it in",
    '{"prediction": "a", "reference": "\0"}': "NUL bytes, as a crash or a full disk leaves them",
}


def test_every_bad_line_is_told_with_place_reason_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(['{"prediction": "a", "reference": "b"}', *BAD_LINES]), "utf-8")
    with pytest.raises(PredictionsError) as caught:
        read_predictions(path)
    assert len(caught.value.problems) == len(BAD_LINES)
    for number, (problem, expected) in enumerate(zip(caught.value.problems, BAD_LINES.values(), strict=True), start=2):
        assert problem.startswith(f"{path}:{number}: ")
        assert expected in problem


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"prediction": "a", "reference": "b"}\n{"prediction": "\xff"}\n', "bad.jsonl:2: not UTF-8 (byte 0xff"),
        (
            '{"prediction": "好", "reference": "b"}'.encode("gb18030"),
            "it could be GB18030: convert the file with: iconv",
        ),
        ('{"prediction": "a", "reference": "b"}'.encode("utf-16"), "bad.jsonl:1: the file is UTF-16; convert it with"),
        (b'{"id": ' + b"7" * 5_000 + b', "prediction": "a", "reference": "b"}', "bad.jsonl:1: a number of more than"),
        (b"", "bad.jsonl: holds no predictions; write one JSON object"),
        (None, "bad.jsonl: cannot be read (No such file or directory)"),
    ],
)
def test_a_file_that_cannot_be_scored_exits_with_2_and_no_traceback(
    tmp_path: Path, content: bytes | None, expected: str
) -> None:
    if content is not None:
        (tmp_path / "bad.jsonl").write_bytes(content)
    command = [sys.executable, str(ROOT / "evaluate.py"), "--predictions", "bad.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "eval").exists()


def test_a_folder_that_cannot_be_one_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told = "--output_dir: no results can be written to .*file"
    with pytest.raises(ConfigError, match=told), told_in(tmp_path / "file"):
        pass
