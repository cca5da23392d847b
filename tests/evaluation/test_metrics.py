"""Scores: the original's numbers, the three repairs, several references, signatures."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_chinese import Rouge

from chatlora.errors import PredictionsError
from chatlora.evaluation import metrics
from chatlora.evaluation.metrics import MEASURES, mostly_han, rouge_l, score, split_words

CHINESE = "宽松的阔腿裤这两年真的吸粉不少，明星时尚达人的心头爱。毕竟好穿时尚，谁都能穿出腿长2米的效果。"
ENGLISH = "The quick brown fox jumps over the lazy dog."


def golden_pairs(shared: Path) -> list[dict[str, Any]]:
    pairs: list[dict[str, Any]] = json.loads((shared / "chatglm3/compute_metrics.json").read_text("utf-8"))["pairs"]
    by_ids = json.loads((shared / "chatglm3/compute_metrics_ids.json").read_text("utf-8"))
    assert (len(pairs), len(by_ids)) == (48, 8)
    return pairs + [{**pair, "pred": pair["pred_text"], "label": pair["label_text"]} for pair in by_ids]


def differences(pairs: list[dict[str, Any]]) -> list[str]:
    """The recorded pairs whose numbers in style chatglm3 are off by more than 1e-9; a recorded crash means 0."""
    different = []
    for pair in pairs:
        found = score([pair["pred"]], [pair["label"]], style="chatglm3").per_sample[0]
        expected = pair.get("metrics") or dict.fromkeys(MEASURES, 0.0)
        if any(abs(found[name] - expected[name]) > 1e-9 for name in MEASURES):
            different.append(pair["pred"])
    return different


def test_style_chatglm3_equals_every_recorded_number(shared: Path) -> None:
    assert differences(golden_pairs(shared)) == []


def test_words_are_the_recorded_words(shared: Path) -> None:
    for pair in golden_pairs(shared)[:48]:
        assert split_words(pair["pred"], "chatglm3") == pair["pred_tokens"]
        assert split_words(pair["label"], "chatglm3") == pair["label_tokens"]


@pytest.mark.parametrize(
    ("broken", "replacement"),
    [
        ("_rouge_words", str.split),  # without the cut into sentences a newline's empty word is lost
        ("rouge_l", lambda predicted, reference: Rouge().get_scores(predicted, reference)[0]["rouge-l"]["r"]),
        ("split_words", lambda text, style: list(text.strip())),  # characters instead of words
    ],
)
def test_a_broken_metric_differs_from_the_recording(
    shared: Path, monkeypatch: pytest.MonkeyPatch, broken: str, replacement: Any
) -> None:
    pairs = [*golden_pairs(shared), newline_after_a_stop()]
    assert differences(pairs) == []
    monkeypatch.setattr(metrics, broken, replacement)
    assert differences(pairs) != []


def newline_after_a_stop() -> dict[str, Any]:
    """A pair whose newline leaves rouge_chinese an empty word; its numbers come from rouge_chinese itself."""
    predicted, reference = "你好。\n再见。\n谢谢", "你好。再见。谢谢"
    lines = [" ".join(split_words(text, "chatglm3")) for text in (predicted, reference)]
    numbers = {name: round(value["f"] * 100, 4) for name, value in Rouge().get_scores(*lines)[0].items()}
    bleu = score([predicted], [reference], style="chatglm3").per_sample[0]["bleu-4"]
    return {"pred": predicted, "label": reference, "metrics": {**numbers, "bleu-4": bleu}}


lines_of_words = st.lists(
    st.sampled_from(["a", "b", "c", "你", "。", "？", "！", "”", "......", ".......", "……", "\n", "\r\n", "\t", "?x"]),
    min_size=1,
    max_size=30,
).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(lines_of_words, lines_of_words)
def test_rouge_l_is_exactly_rouge_chineses(predicted: str, reference: str) -> None:
    if predicted.strip() and reference.strip():
        assert rouge_l(predicted, reference) == Rouge(["rouge-l"]).get_scores(predicted, reference)[0]["rouge-l"]["f"]


def test_an_empty_prediction_scores_zero_and_is_counted() -> None:
    scores = score([CHINESE, "", " \n"], [CHINESE, CHINESE, CHINESE])
    assert scores.per_sample[1] == scores.per_sample[2] == dict.fromkeys(MEASURES, 0.0)
    assert scores.values["rouge-1"] == pytest.approx(100 / 3, abs=1e-4)


def test_an_empty_reference_scores_zero() -> None:
    assert score([CHINESE], [""]).per_sample == [dict.fromkeys(MEASURES, 0.0)]
    assert score([""], [""]).per_sample == [dict.fromkeys(MEASURES, 0.0)]


def test_whitespace_is_no_word_in_style_chatlora() -> None:
    assert split_words("  The quick\u3000fox \n", "chatlora") == ["The", "quick", "fox"]
    assert split_words("  The quick fox \n", "chatglm3") == ["The", " ", "quick", " ", "fox"]
    spaced, plain = "one  two\n\nthree   four five", "one two three four five"
    assert score([spaced], [plain]).values["bleu-4"] == pytest.approx(100)
    assert score([spaced], [plain], style="chatglm3").values["bleu-4"] < 0.9


def test_all_of_style_chatlora_stands_on_0_to_100() -> None:
    values = score([ENGLISH, CHINESE], [ENGLISH, CHINESE]).values
    assert values == pytest.approx(dict.fromkeys([*MEASURES, "sacrebleu"], 100.0), abs=1e-4)
    assert score([ENGLISH], [ENGLISH], style="chatglm3").values["bleu-4"] == pytest.approx(1.0)


def test_rouge_takes_the_best_reference_for_each_measure() -> None:
    prediction = "a b c d e"
    many_words, right_order = "e d c b a", "a b c x y z"
    apart = [score([prediction], [reference]).per_sample[0] for reference in (many_words, right_order)]
    together = score([prediction], [[many_words, right_order]]).per_sample[0]
    assert apart[0]["rouge-1"] > apart[1]["rouge-1"]
    assert apart[0]["rouge-l"] < apart[1]["rouge-l"]
    for name in ("rouge-1", "rouge-2", "rouge-l"):
        assert together[name] == max(sample[name] for sample in apart)


def test_bleu_uses_all_references_at_once() -> None:
    prediction, references = "a b c d w x y z", ["a b c d p p p p", "q q q q w x y z"]
    together = score([prediction], [references]).per_sample[0]["bleu-4"]
    assert together > max(score([prediction], [reference]).per_sample[0]["bleu-4"] for reference in references)


def test_real_rows_with_ragged_references(shared: Path) -> None:
    """Human sentences of E2E scored against the others: near what people reach, and sacrebleu as called directly."""
    by_prompt: dict[str, list[str]] = {}
    for line in (shared / "data/e2e.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        by_prompt.setdefault(row["prompt"], []).append(row["completion"])
    assert len(by_prompt) == 547
    groups = [texts for texts in by_prompt.values() if len(texts) > 1][:60]
    predictions, references = [texts[0] for texts in groups], [texts[1:] for texts in groups]
    assert len({len(texts) for texts in references}) > 1
    scores = score(predictions, references)

    import sacrebleu

    width = max(map(len, references))
    streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(width)]
    assert scores.values["sacrebleu"] == pytest.approx(sacrebleu.corpus_bleu(predictions, streams).score, abs=1e-9)
    assert "nrefs:var" in scores.signatures["sacrebleu"]
    assert 40 < scores.values["rouge-l"] < 90
    assert scores.values["rouge-l"] > score(predictions, [texts[0] for texts in references]).values["rouge-l"]


def test_sacrebleus_tokenizer_follows_the_letters_of_the_references() -> None:
    assert "|tok:zh|" in score([ENGLISH], [CHINESE]).signatures["sacrebleu"]
    assert "|tok:13a|" in score([CHINESE], [ENGLISH]).signatures["sacrebleu"]
    assert mostly_han(["ab中文字"])
    assert not mostly_han(["ab中文", "12345 ！？"])
    assert not mostly_han([""])


def test_signatures_say_what_made_the_numbers() -> None:
    ours, original = score([CHINESE], [CHINESE]), score([CHINESE], [[CHINESE, ENGLISH]], style="chatglm3")
    assert set(ours.signatures) == set(ours.values)
    for part in ("style:chatlora", "words:jieba-0.42.1", "smooth:method3", "scale:0-100", "nltk:"):
        assert part in ours.signatures["bleu-4"]
    assert "scale:0-1|" in original.signatures["bleu-4"]
    assert "refs:all" in original.signatures["bleu-4"]
    assert "refs:best" in original.signatures["rouge-l"]
    assert all(signature in ours.signature for signature in ours.signatures.values())


def test_sides_that_do_not_match_are_told_all_at_once() -> None:
    with pytest.raises(PredictionsError) as caught:
        score(["a"], ["a", []], style="rouge")  # type: ignore[arg-type]
    assert [problem.split()[0] for problem in caught.value.problems] == ["style", "1", "references[1]"]
    with pytest.raises(PredictionsError, match="nothing to score"):
        score([], [])


def test_scoring_is_silent_needs_no_torch_and_keeps_its_dictionary_in_the_cache(tmp_path: Path) -> None:
    program = (
        "import sys; from chatlora.evaluation.metrics import score; score(['你好世界'], ['您好世界']);"
        "print('torch' in sys.modules)"
    )
    environment = {"CHATLORA_CACHE": str(tmp_path), "PATH": "", "TMPDIR": str(tmp_path / "nowhere")}
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:jieba", "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    assert (done.stdout, done.stderr) == ("False\n", "")
    assert (tmp_path / "jieba-0.42.1/jieba.cache").is_file()
