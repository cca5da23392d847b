"""`chatlora chat` by a pipe: evaluate.py's text for the same history, and answers alone on standard output."""

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from chatlora.commands import dispatch
from tests.chats import QUESTIONS, SYSTEM, Chatted, chat, predictions
from tests.fork_server import ForkServer

APART = [line for question in QUESTIONS for line in (json.dumps(question), "/reset")]
FEW = APART[:12]
WITHOUT_KWARGS = """
from chatlora.chat import answers
renderer_for = answers.renderer_for
answers.renderer_for = lambda tokenizer, model, *rest, **more: renderer_for(
    tokenizer, model.model_copy(update={"chat_template_kwargs": {}}), *rest, **more
)
"""
WITHOUT_STOP_TOKENS = """
from chatlora.chat import answers
settings_for = answers.greedy_settings_for
def with_one(model, tokenizer, *rest):
    settings = settings_for(model, tokenizer, *rest)
    settings.eos_token_id = [tokenizer.eos_token_id]
    return settings
answers.greedy_settings_for = with_one
"""
AS_THE_RUN = ("--run.precision", "fp32", "--max_new_tokens", "16")
Chats = Callable[..., Chatted]


@pytest.fixture
def chats(server: ForkServer, made: Path, tmp_path: Path) -> Chats:
    """`chats("--json", lines=[...])`: with the run of `made`."""

    def chatted(*words: str, lines: list[str], named: str = "run", **options: str) -> Chatted:
        return chat(server, tmp_path, [str(made / named), *words], lines, **options)

    return chatted


def texts(chatted: Chatted, by: str = "adapter") -> list[str]:
    assert chatted.status == 0, chatted.told
    return [answer["prediction"] for answer in chatted.answers if answer["by"] == by]


def test_greedy_text_is_that_of_evaluate_for_twenty_prompts(made: Path, chats: Chats) -> None:
    done = chats("--json", lines=["/both", *APART])
    for by, folder in (("adapter", "test"), ("base", "test-base")):
        wanted = predictions(made / "run/eval" / folder)
        assert texts(done, by) == [line["prediction"] for line in wanted]
        assert [a["stop_reason"] for a in done.answers if a["by"] == by] == [line["stop_reason"] for line in wanted]
    assert len(set(texts(done))) > 10
    assert {answer["stop_reason"] for answer in done.answers} == {"stop", "length"}
    assert texts(done) != texts(done, "base")


@pytest.mark.parametrize("broken", [WITHOUT_KWARGS, WITHOUT_STOP_TOKENS], ids=["kwargs", "stop tokens"])
def test_a_chat_that_leaves_something_of_the_run_out_is_caught(made: Path, chats: Chats, broken: str) -> None:
    wanted = [line["prediction"] for line in predictions(made / "run/eval/test")[:6]]
    assert texts(chats("--json", lines=FEW, broken=broken)) != wanted


def test_an_adapter_alone_says_what_its_run_says(made: Path, chats: Chats) -> None:
    """As on another machine, where the settings are those beside the adapter; the system message was the rows'."""
    wanted = [line["prediction"] for line in predictions(made / "run/eval/test")]
    (made / "elsewhere").symlink_to(made / "run/adapter")
    lines = [f"/system {SYSTEM}", *APART]
    assert texts(chats("--json", *AS_THE_RUN, lines=lines, named="elsewhere")) == wanted
    words = ("--json", *AS_THE_RUN, "--adapter", str(made / "elsewhere"))
    assert texts(chats(*words, lines=[lines[0], *FEW], named="model")) == wanted[:6]
    assert texts(chats(*words, lines=FEW, named="model")) != wanted[:6]


def test_a_merged_model_says_what_its_run_says(made: Path, merged: Path, chats: Chats) -> None:
    """Under the settings beside it."""
    wanted = [line["prediction"] for line in predictions(made / "run/eval/test")]
    done = chats("--json", *AS_THE_RUN, "--data.system", SYSTEM, lines=APART, named=merged.name)
    assert texts(done, "model") == wanted


def test_a_model_alone_answers_and_has_no_adapter_to_switch(made: Path, chats: Chats) -> None:
    wanted = [line["prediction"] for line in predictions(made / "run/eval/test-base")[:6]]
    kwargs = ("--model.chat_template_kwargs", "{enable_thinking: false}")
    done = chats("--json", *kwargs, *AS_THE_RUN, "--data.system", SYSTEM, lines=FEW, named="model")
    assert texts(done, "model") == wanted
    done = chats(lines=["/both"], named="model")
    assert done.status == 2
    assert "line 1: there is a model alone, without an adapter" in done.told


def test_standard_output_is_answers_and_nothing_else(made: Path, chats: Chats) -> None:
    wanted = predictions(made / "run/eval/test")
    done = chats(lines=[QUESTIONS[0], "", "/reset", QUESTIONS[1], "/help"])
    assert (done.status, done.out) == (0, "".join(f"{line['prediction']}\n" for line in wanted[:2]))
    assert "all exchanges are forgotten" in done.told
    assert "/save FILE" in done.told
    assert "%|" not in done.told  # a bar of transformers
    assert "Loading" not in done.told


def test_the_first_line_that_cannot_be_answered_ends_it(chats: Chats) -> None:
    done = chats("--json", lines=['"Hello"', "/undo", "Hello"])
    assert (done.status, len(done.answers)) == (2, 1)
    assert "The chat cannot go on:\n  line 3: no JSON" in done.told
    assert "Traceback" not in done.told


def test_a_reader_who_leaves_ends_it(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as nowhere:
        monkeypatch.setattr(sys, "stdout", nowhere)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\n/foo\n")))
        dispatch(["chat", str(made / "model"), "--max_new_tokens", "2"])


def test_a_talk_is_a_row_that_evaluate_answers_as_the_chat_did(
    server: ForkServer, made: Path, chats: Chats, tmp_path: Path
) -> None:
    """Each turn's prompt has the turns before it as they were generated."""
    lines = [json.dumps(question) for question in QUESTIONS[:4]]
    done = chats("--json", "--max_new_tokens", "200", lines=[*lines, "/save talk.jsonl"])
    assert {answer["stop_reason"] for answer in done.answers} == {"stop"}
    longer = ["--evaluation.max_new_tokens", "200", "--evaluation.max_prompt_length", "2000"]
    words = [str(made / "run"), "--data", str(tmp_path / "talk.jsonl"), "--output_dir", str(tmp_path / "eval"), *longer]
    assert server.run(words, tmp_path, script="evaluate") == [0]
    assert [line["prediction"] for line in predictions(tmp_path / "eval")] == texts(done)
