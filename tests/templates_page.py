"""docs/templates.md, of what tests/rendering/test_chat_templates.py finds."""

from collections.abc import Mapping
from typing import NamedTuple

import trl

INTRODUCTION = """\
# Chat templates

What comes out of the chat templates that trl TRL carries, for seven kinds of conversation, and of those that come with
this package. The page is written by `python tests/rendering/test_chat_templates.py`, and a test holds it against what
is found.

**exact** means that a reply's targets begin where the generation prompt ends, are what the template renders for the
reply with the token that stops it, and hold the reply's text, reasoning and calls; that the ids in front of them are
those that inference sees; that every message before it stands in its prompt, however short or empty it is, but for
earlier thoughts; and that all of this was proved for the very row. Where a template renders a reply otherwise
once more messages follow (it drops earlier thoughts, or ends the last reply in its own way), such a reply gets an
example of its own: **exact, 2 examples**.

**refused** rows are not trained on: `ledger.json` names each with its place and reason, and where more than half of a
source is refused, the run does not start. Where a template of the package renders the row, which is found out by
rendering and proving it, the reason names it (`lifted_by` in the ledger), as the table does here.

Refused, whatever the kind, is also a row of which the template drops a message that leads to a reply (`the chat
template drops a system message`, and which): gptoss and qwen3_vl show no second system message, phi3 and phi3_5 no
result of a tool, llama3_1, llama3_2 and muse_glimmer no text beside a call. What the assistant says first is a
target where the template opens every conversation by itself, so that a prompt leads to it, and context elsewhere;
cohere, cohere2, gemma and gemma3 raise an error at it.

NAME_training is trl's version of a template with marks around what is learned. Where it has no row of its own, it comes
out as NAME does.

What a template changes in a reply without losing any of it is a target, since the model must generate it. It is in the
last column, and counted by kind in `ledger.json` under `altered`. A template that takes the arguments of calls as JSON
text only gets them so.
"""
SETTINGS = """\
## Thoughts

`data.reasoning` says where a reply's thought goes, whether the row has it in a field of its own (`reasoning_content`)
or at the head of the reply's text, between `<think>` and `</think>`:

- `auto`, the default: `field` where the template has a place for thoughts, else `text`. Which one is found out by
  rendering;
- `field`: the template writes it in its own way, and leaves earlier ones out where it does so. Rows are refused where
  it shows none;
- `text`: it stands in the text in front of the answer, in earlier replies as well. One that stood there in the row
  stays letter by letter, but for what the template trims; one of a field becomes
  `<think>\\nTHOUGHT\\n</think>\\n\\nANSWER`. Both are counted in `ledger.json`, as `altered`;
- `drop`: thoughts are left out, and counted there too.

In the text, the two tags around a thought are the tokens `<think>` and `</think>` where the vocabulary has them: that
is what a model of such a vocabulary writes, what a server takes the thought out by, and what `apply_chat_template`
makes of the text when it comes back as context. Where they are special tokens, a server that leaves those out of its
answers (`skip_special_tokens`) must be told to keep them. Tags inside a thought or an answer are text. Of a template
that has no place for thoughts, the ids are those of `embedded:completed` as well, which tells them in the same words.

## Control words and tool use in text

A message may spell a control token. Under `data.control_text: text`, the default, it means the letters, and the ids
of such a row are other than those that a server makes of it. Under `token` they are the server's, each time proved
against `apply_chat_template`, for the prompt and the whole.

Tool use that is told in text, as Hermes and Qwen have it, is read and then rendered as the template has it:
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>` at the end of a reply, `<tool_response>...</tool_response>`
in the turn of a tool or of the user who answers a call, and `<tools>[...]</tools>` in a system message between the
words of Hermes or Qwen, which the template's own replace. JSON may be written as Python writes it. Rows of which this
would lose or move something (broken JSON, text behind a call or between two, text beside a result, a template without
tools, or one that writes calls in another form than a system message in words of its own asks for) are refused where
a tag is a token of the vocabulary; otherwise, and under `control_text: token`, they stay the text that they are. All
of it is counted.
"""
EMBEDDED = """\
## Templates of the package

```yaml
model: {chat_template: "embedded:completed"}
```

`embedded:completed` is the tokenizer's own template, completed. For each kind of conversation that it refuses, these
are tried, and what makes a made-up conversation of that kind exact is put around it, as Jinja that rewrites the
messages:

- thoughts are switched on (`enable_thinking`) where its default leaves no room for them;
- a reply without a thought closes the one that the generation prompt opens, at once;
- a thought becomes `<think>...</think>` at the head of the reply's text;
- tools are listed in the system message (which then stands in the place of one that the template adds by itself), a
  call becomes `<tool_call>` with JSON in the reply's text, and a result `<tool_response>` in a user's message, as
  Hermes and Qwen have them;
- a system message becomes the head of the user's message;
- a reply is written behind the generation prompt, where that opens a thought which the template shows in no reply;
- text becomes a list of one part, for models that also see.

What the template renders exactly alone it renders so completed, with the same ids; nothing is added to a template that
needs nothing. There is one exception: where thoughts are switched on, replies without one (text beside
reasoning) follow the prompt of a reply with one.

Where a newer template of the family shows thoughts or calls in a form of its own (gemma4_v5, lfm2_v2), that one is the
better choice.

The others are written for a family, for tokenizers that bring no template (the error names the one whose control tokens
are there). A family's prompts are those of its own template. `deepseek-r1` is for DeepSeek-R1 and its distillations:
the prompt opens a thought, the reply closes it, earlier replies stand without theirs, and calls have DeepSeek's own
form. `zephyr` needs no control token but eos.

Whichever it is, the adapter's folder holds the text that trained it as `chat_template.jinja`, and with that it is
evaluated and served. A run that goes on is refused if the package's text has changed since it began.
"""


class Table(NamedTuple):
    heads: tuple[str, ...]
    rows: Mapping[str, tuple[str, ...]]  # by template

    def text(self) -> str:
        """Templates with equal rows share one."""
        grouped: dict[str, list[str]] = {}
        for name, cells in self.rows.items():
            grouped.setdefault(" | ".join(cell.replace("|", "\\|") for cell in cells), []).append(name)
        lines = [" | ".join(self.heads), " | ".join(["---"] * len(self.heads))]
        lines += [f"{', '.join(names)} | {cells}" for cells, names in grouped.items()]
        return "".join(f"| {line} |\n" for line in lines)


def page(published: Table, embedded: Table) -> str:
    introduction = INTRODUCTION.replace("TRL", trl.__version__)
    return "\n".join([introduction, published.text(), SETTINGS, EMBEDDED, embedded.text()])
