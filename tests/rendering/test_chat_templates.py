"""Every chat template that trl carries, and every kind of conversation: exact, or refused with the reason foreseen.

Run: pytest tests/rendering/test_chat_templates.py. After a change that was meant,
`python tests/rendering/test_chat_templates.py` writes docs/templates.md anew.
"""

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trl
from transformers import PreTrainedTokenizerFast

from chatlora.embedded_model import EMBEDDED
from chatlora.errors import SetAside
from chatlora.reading.conversation import Conversation, Message, ToolCall
from chatlora.rendering.completion import completed, embedded_template
from chatlora.rendering.embedded import FAMILIES, family_template
from chatlora.rendering.remedies import lifted_by
from chatlora.rendering.renderer import EvalExample, Rendered, Renderer
from chatlora.rendering.template import resolve_template_kwargs
from tests.exactness import assert_exact, rendered_ids
from tests.templates_page import Table, page
from tests.tiny_tokenizers import control_tokens_in, tiny_tokenizer

TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
}
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "templates.md"
LONG = 1_000_000

EOS = (
    *("<|im_end|>", "<|eot_id|>", "<|END_OF_TURN_TOKEN|>", "<|end_of_text|>", "<|return|>", "<｜end▁of▁sentence｜>"),
    *("<end_of_turn>", "<turn|>", "<end_of_utterance>", "</s>", "<|endoftext|>"),
)
USER, ANSWER = Message("user", "Hi there, how are you?"), Message("assistant", "I am fine, thanks.")
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "its name"},
                "days": {"type": "integer", "description": "how many"},
            },
            "required": ["city"],
        },
    },
}
CALL = ToolCall("get_weather", {"city": "São Paulo", "days": 3}, id="call00001")
CONVERSATIONS = {
    "text": Conversation((USER, ANSWER)),
    "system": Conversation((Message("system", "Be brief."), USER, ANSWER)),
    "space": Conversation((USER, Message("assistant", "\n  I am fine. \n\n"))),
    "multi-turn": Conversation(
        (
            USER,
            ANSWER,
            Message("user", "2 + 2?"),
            Message("assistant", "4"),
            Message("user", "再见"),
            Message("assistant", "再见！"),
        )
    ),
    "tools": Conversation(
        (
            Message("user", "Weather?"),
            Message("assistant", "", tool_calls=(CALL,)),
            Message("tool", "sunny", tool_call_id="call00001", name="get_weather"),
            Message("assistant", "It is sunny."),
        ),
        (TOOL,),
    ),
    "reasoning": Conversation(
        (
            USER,
            Message("assistant", "Fine.", reasoning="They ask how I am."),
            Message("user", "2 + 2?"),
            Message("assistant", "4", reasoning="Two and two."),
        )
    ),
}
# Data in which a row carries reasoning is rendered under the template's own default, all of it.
BESIDE_REASONING = "text beside reasoning"
CONVERSATIONS[BESIDE_REASONING] = CONVERSATIONS["text"]
WITH_REASONING = ("reasoning", BESIDE_REASONING)

# What is foreseen, in the order of CONVERSATIONS: how many examples a conversation gives, or why it is refused.
# NAME+ stands for NAME_training too, trl's version of the template with marks around what is learned.
FORESEEN = """
1 1 1 1 raises 1 1                              : cohere+ cohere2+ gemma3+
prompt prompt prompt prompt prompt prompt prompt: deepseek_r1_distill+ deepseekv3+
1 1 1 1 1 2 1                                   : diffusion_gemma+ gemma4_v5 glm4moe+ lfm2_2_5 lfm2_2_5_v2 lfm2_2_5_vl
1 raises 1 1 raises 1 1                         : gemma+
1 1 1 1 1 1 1                                   : gemma4 gemma4_v2 gemma4_v3 gemma4_v4 lfm2_v2+ llama3_1 llama3_2
1 1 1 1 1 1 1                                   : qwen2_5+ qwen3_instruct_2507+ qwen3_vl+
1 1 1 3 1 2 1                                   : gptoss+ qwen3_5_think qwen3_6
text text text text raises reasoning text       : idefics3+ smolvlm+
1 1 1 1 calls 1 1                               : lfm2+ llama3+ phi3+ phi3_5+ qwen2_5_vl+
raises raises raises raises raises raises raises: llava_next+
1 1 1 1 1 1 1                                   : muse_glimmer+ qwen3_5_think_training qwen3_6_training qwen3_8+
1 1 1 1 1 1 1                                   : qwen3_training
1 1 1 1 1 2 prompt                              : nemotron_3_5_lightning+ nemotron_3_nano+ nemotron_3_super+
1 1 1 1 1 2 prompt                              : nemotron_3_ultra+
1 1 1 3 2 2 1                                   : qwen3
1 1 1 3 1 prompt 1                              : qwen3_5_nothink
1 1 1 1 1 prompt 1                              : qwen3_5_nothink_training
"""
REFUSALS = {
    "calls": "the chat template drops tool calls",
    "reasoning": "the chat template drops reasoning",
    "text": "the chat template drops the reply's text",
    "raises": "the chat template raises an error",
    "prompt": "the chat template's reply does not continue its generation prompt",
}


@functools.cache
def foreseen() -> dict[str, list[str]]:
    table = {}
    for line in FORESEEN.strip().splitlines():
        verdicts, names = line.split(":")
        for name in names.split():
            table[name.removesuffix("+")] = verdicts.split()
            if name.endswith("+"):
                table[name.removesuffix("+") + "_training"] = verdicts.split()
    return table


@functools.cache
def renderer_of(template: str, *, any_reasoning: bool) -> Renderer:
    """The template with a tiny tokenizer that has its control tokens."""
    kwargs = resolve_template_kwargs(template, {}, any_reasoning=any_reasoning)
    return Renderer(tokenizer_of(template), chat_template_kwargs=kwargs)


@functools.cache
def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    tokens = list(dict.fromkeys([*control_tokens_in(template), "<s>", "<|endoftext|>"]))
    bos = next(token for token in ("<|begin_of_text|>", "<bos>", "<s>") if token in tokens)
    plain = [token for token in tokens if token.startswith(("<tool", "</tool", "<think", "</think"))]
    return tiny_tokenizer(
        chat_template=template,
        control_tokens=[token for token in tokens if token not in plain],
        plain_tokens=plain,
        eos=next(token for token in EOS if token in tokens),
        bos=bos if "bos_token" in template else None,
        splitting="llama3",
    )


@dataclass(frozen=True)
class Outcome:
    """What became of one conversation, proved and looked at a second time; `rendered` is None where it was refused.

    lifted: the template of the package that is told as the remedy, and what becomes of the conversation under it.
    completed: of a conversation that is rendered, what becomes of it under the same template with additions.
    """

    refusal: str = ""
    rendered: Rendered | None = None
    samples: tuple[EvalExample, ...] = ()
    lifted: tuple[str, "Outcome"] | None = None
    completed: "Outcome | None" = None

    @property
    def verdict(self) -> str:
        if self.rendered is not None:
            return str(len(self.rendered.examples))
        return next(name for name, reason in REFUSALS.items() if self.refusal.startswith(reason))

    def told(self) -> str:
        if self.rendered is None:
            reason = REFUSALS[self.verdict].removeprefix("the chat template").removeprefix("'s").strip()
            return f"refused: {reason}" + (f"; `{self.lifted[0]}`: {self.lifted[1].told()}" if self.lifted else "")
        return "exact" if self.verdict == "1" else f"exact, {self.verdict} examples"


def outcome_of(template: str, kind: str, *, lifting: bool = True) -> Outcome:
    """Under this template of a tokenizer; where it is refused, under the remedy that is told as well."""
    renderer, conversation = renderer_of(template, any_reasoning=kind in WITH_REASONING), CONVERSATIONS[kind]
    outcome = outcome_under(renderer, conversation, lifting=lifting)
    more = completed_once(template) if lifting else template
    if outcome.rendered is None or more == template:
        return outcome
    assert resolve_template_kwargs(more, {}, any_reasoning=kind in WITH_REASONING) == renderer.chat_template_kwargs
    return replace(outcome, completed=outcome_under(renderer.under(more), conversation, lifting=False))


@functools.cache
def completed_once(template: str) -> str:
    return completed(tokenizer_of(template))


def outcome_under(renderer: Renderer, conversation: Conversation, *, lifting: bool = True) -> Outcome:
    try:
        rendered = renderer.render(conversation, max_length=LONG)
        samples = tuple(renderer.render_for_evaluation(conversation, max_prompt_length=None, max_new_tokens=9))
    except SetAside as refused:
        name = lifted_by(renderer, conversation, refused, "all") if lifting else ""
        return Outcome(refusal=str(refused), lifted=(name, _lifted(renderer, conversation, name)) if name else None)
    assert_exact(renderer, conversation, rendered.examples)
    assert_samples(renderer, conversation, samples)
    return Outcome(rendered=rendered, samples=samples)


def _lifted(renderer: Renderer, conversation: Conversation, name: str) -> Outcome:
    template = embedded_template(name.removeprefix(EMBEDDED), renderer.tokenizer)
    return outcome_under(renderer.under(template), conversation, lifting=False)


def assert_samples(renderer: Renderer, conversation: Conversation, samples: Sequence[EvalExample]) -> None:
    """One for each assistant message; its prompt is what transformers gives, its reference ends with a stop token."""
    assistants = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
    assert [sample.turn for sample in samples] == list(range(len(assistants)))
    for sample in samples:
        assert sample.output_ids[-1] in renderer.stop_ids
        assert sample.input_ids == rendered_ids(renderer, conversation, assistants[sample.turn], prompt=True)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[Outcome]]:
    return all_outcomes()


def all_outcomes() -> dict[str, list[Outcome]]:
    return {name: row(name, lifting=name == original(name)) for name in TEMPLATES}


def row(name: str, *, lifting: bool) -> list[Outcome]:
    return [outcome_of(TEMPLATES[name], kind, lifting=lifting) for kind in CONVERSATIONS]


def original(name: str) -> str:
    """Without trl's marks: the same for whoever reads no marks, where trl has not changed more."""
    base = name.removesuffix("_training")
    return base if foreseen()[base] == foreseen()[name] else name


def test_every_template_and_kind_of_conversation_is_exact_or_refused_as_foreseen(
    outcomes: dict[str, list[Outcome]],
) -> None:
    found = {name: [outcome.verdict for outcome in row] for name, row in outcomes.items()}
    assert found == foreseen()


def test_every_refusal_names_a_template_of_the_package_that_renders_the_row(
    outcomes: dict[str, list[Outcome]],
) -> None:
    rows = [row for name, row in outcomes.items() if name == original(name)]
    assert_lifted(rows)
    assert sum(outcome.lifted is not None for row in rows for outcome in row) > 50


@pytest.mark.slow
def test_every_refusal_of_a_template_with_marks_names_one_too() -> None:
    assert_lifted([row(name, lifting=True) for name in TEMPLATES if name != original(name)])


def assert_lifted(rows: list[list[Outcome]]) -> None:
    for outcome in (outcome for row in rows for outcome in row if outcome.rendered is None):
        assert outcome.lifted is not None
        assert outcome.lifted[1].rendered is not None


def test_a_template_completed_gives_the_ids_that_it_gives_alone(outcomes: dict[str, list[Outcome]]) -> None:
    """Prompts and targets, wherever it renders a conversation; but where thoughts are on, they are on for all."""
    others = {
        (name, kind)
        for name, row in outcomes.items()
        for kind, outcome in zip(CONVERSATIONS, row, strict=True)
        if outcome.completed is not None
        and (outcome.rendered, outcome.samples) != (outcome.completed.rendered, outcome.completed.samples)
    }
    assert others == {("qwen3_5_nothink", BESIDE_REASONING), ("qwen3_5_nothink_training", BESIDE_REASONING)}
    assert sum(outcome.completed is not None for row in outcomes.values() for outcome in row) > 100


def test_each_family_s_template_is_exact_for_every_kind_of_conversation() -> None:
    found = {name: [outcome.verdict for outcome in row] for name, row in family_outcomes().items()}
    assert found.pop("deepseek-r1") == ["1", "1", "1", "3", "2", "2", "1"]
    assert all(verdicts == ["1"] * len(CONVERSATIONS) for verdicts in found.values())


def test_the_tables_in_the_documents_are_what_is_found(outcomes: dict[str, list[Outcome]]) -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == page_of(outcomes)


def page_of(outcomes: dict[str, list[Outcome]]) -> str:
    published = {name: row for name, row in outcomes.items() if name == original(name)}
    return page(told(published), told(family_outcomes()))


def family_outcomes() -> dict[str, list[Outcome]]:
    return {name: [outcome_of(family_template(name), kind) for kind in CONVERSATIONS] for name in FAMILIES}


def told(outcomes: dict[str, list[Outcome]]) -> Table:
    heads = ("template", *CONVERSATIONS, "changes in a reply")
    rows = {}
    for name, row in outcomes.items():
        changes = sorted({kind for outcome in row if outcome.rendered for kind in outcome.rendered.altered})
        rows[name] = (*(outcome.told() for outcome in row), "; ".join(changes))
    return Table(heads, rows)


if __name__ == "__main__":
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(page_of(all_outcomes()), encoding="utf-8")
    sys.exit(f"{DOCUMENT} is written")
