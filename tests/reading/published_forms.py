"""Rows as people have them: one of each form, with the conversation that it is, or what is said of it.

Built after the forms in which data sets are published and frameworks document them; the words are ours.
"""

# ruff: noqa: E501  (a table)
import json
from dataclasses import dataclass, field, replace
from typing import Any

from chatlora.reading.conversation import Message, ToolCall

Q, A, Q2, A2 = "Where is Oslo?", "In Norway.", "And Bergen?", "In Norway as well."
ASK, REPLY, ASK2, REPLY2 = (Message(r, t) for r, t in (("user", Q), ("assistant", A), ("user", Q2), ("assistant", A2)))  # type: ignore[arg-type]
BRIEF = Message("system", "Be brief.")
BAD = Message("assistant", "In Sweden.", loss=False)
LEARNED = replace(REPLY2, loss=True)
THOUGHT = replace(REPLY, reasoning="It is a capital.")
WHEN = Message("user", "How warm is Oslo?")
CALLED = ToolCall("look_up", {"city": "Oslo"})
CALL = Message("assistant", "", tool_calls=(CALLED,))
RESULT = Message("tool", "5 degrees")
TOLD = Message("assistant", "Five degrees.")
TOOL_TALK = (WHEN, CALL, RESULT, TOLD)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "look_up", "description": "the weather of a city", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
PLAIN_CALL = {"name": "look_up", "arguments": {"city": "Oslo"}}
HEAD = "<think>\nIt is a capital.\n</think>\n\n"
THINK = f"{HEAD}In Norway."
THOUGHT_IN_TEXT = replace(THOUGHT, thought_text=HEAD)


def says(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def speaks(who: str, value: Any, **more: Any) -> dict[str, Any]:
    return {"from": who, "value": value, **more}


USER, ASSISTANT = says("user", Q), says("assistant", A)
TURNS = [USER, ASSISTANT]
HUMAN, GPT = speaks("human", Q), speaks("gpt", A)
WARM = says("user", "How warm is Oslo?")
FIVE = says("assistant", "Five degrees.")


def with_id(call: Message, result: Message, name: str) -> tuple[Message, Message]:
    (one,) = call.tool_calls
    return replace(call, tool_calls=(replace(one, id=name),)), replace(result, tool_call_id=name)


@dataclass(frozen=True)
class Published:
    """messages, tools, kwargs: what is read; refused: parts of what is said instead. not_used: what nothing reads."""

    name: str
    row: dict[str, Any]
    messages: tuple[Message, ...] = (ASK, REPLY)
    tools: tuple[dict[str, Any], ...] = ()
    not_used: tuple[str, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    refused: tuple[str, ...] = ()


OPENAI_CALL = {"id": "c1", "type": "function", "function": PLAIN_CALL}
CALL_C1, RESULT_C1 = with_id(CALL, RESULT, "c1")
BAD_THEN_GOOD = (ASK, BAD, ASK2, LEARNED)


def flagged(bad: dict[str, Any], good: dict[str, Any]) -> dict[str, Any]:
    turns = [USER, says("assistant", "In Sweden.", **bad), says("user", Q2), says("assistant", A2, **good)]
    return {"messages": turns}


FLAGS = [
    Published("OpenAI: weight 0 and 1", flagged({"weight": 0}, {"weight": 1}), BAD_THEN_GOOD),
    Published("a weight of 0.5", flagged({"weight": 0.5}, {}), refused=("messages[1].weight is the number 0.5", "1 or 0")),
    Published("axolotl: train", flagged({"train": False}, {"train": True}), BAD_THEN_GOOD),
    Published("axolotl: training", flagged({"training": False}, {"training": True}), BAD_THEN_GOOD),
    Published("trainable", flagged({"trainable": False}, {"trainable": True}), BAD_THEN_GOOD),
    Published("train_on_turn", flagged({"train_on_turn": False}, {"train_on_turn": True}), BAD_THEN_GOOD),
    Published("ms-swift: loss", flagged({"loss": False}, {"loss": True}), BAD_THEN_GOOD),
    Published("loss 0 and 1", flagged({"loss": 0}, {"loss": 1}), BAD_THEN_GOOD),
    Published("torchtune: masked", flagged({"masked": True}, {"masked": False}), BAD_THEN_GOOD),
    Published("mask, on all turns, 1 for learned", {"messages": [{**USER, "mask": 0}, says("assistant", "In Sweden.", mask=0), says("user", Q2, mask=0), says("assistant", A2, mask=1)]}, (replace(ASK, loss=False), BAD, replace(ASK2, loss=False), LEARNED)),
    Published("mask, on all turns, true for hidden", {"messages": [{**USER, "mask": True}, says("assistant", "In Sweden.", mask=True), says("user", Q2, mask=True), says("assistant", A2, mask=False)]}, (replace(ASK, loss=False), BAD, replace(ASK2, loss=False), LEARNED)),
    Published("mask, on replies only", flagged({"mask": True}, {"mask": False}), refused=("mask, which data sets write in both senses", "columns: {loss: mask}", "columns: {masked: mask}")),
    Published("SlimOrca: weight null, 0.0 and 1.0", {"conversations": [speaks("system", "Be brief.", weight=None), {**HUMAN, "weight": 0.0}, {**GPT, "weight": 1.0}]}, (BRIEF, replace(ASK, loss=False), replace(REPLY, loss=True))),
    Published("a flag nobody knows", flagged({"good": False}, {}), refused=("messages[1].good is false, which nothing reads", "columns: {loss: good}", "ignore: [good]")),
    Published("two flags that contradict", flagged({"train": False, "weight": 1}, {}), refused=("train and weight contradict each other", "keep one")),
]  # fmt: skip
OPENAI = [
    Published("messages", {"messages": TURNS}),
    Published("OpenAI: calls, content null", {"messages": [WARM, says("assistant", None, tool_calls=[OPENAI_CALL]), says("tool", [{"type": "text", "text": "5 degrees"}], tool_call_id="c1"), FIVE], "tools": [TOOL], "parallel_tool_calls": False}, (WHEN, CALL_C1, RESULT_C1, TOLD), (TOOL,), ("parallel_tool_calls",)),
    Published("OpenAI: arguments as JSON text", {"messages": [WARM, {"role": "assistant", "tool_calls": [{"id": "c1", "function": {**PLAIN_CALL, "arguments": json.dumps(CALLED.arguments)}}]}, says("tool", "5 degrees", tool_call_id="c1"), FIVE]}, (WHEN, CALL_C1, RESULT_C1, TOLD)),
    Published("OpenAI before tool_calls", {"messages": [WARM, says("assistant", None, function_call={**PLAIN_CALL, "arguments": json.dumps(CALLED.arguments)}), says("function", "5 degrees", name="look_up"), FIVE], "functions": [FUNCTION]}, (WHEN, CALL, replace(RESULT, name="look_up"), TOLD), (TOOL,)),
    Published("content null, no calls", {"messages": [USER, says("assistant", None, tool_calls=[])]}, refused=("messages[1].content is missing or null", 'is written as ""')),
    Published("a user's content null", {"messages": [says("user", None), ASSISTANT]}, refused=("messages[0].content is missing or null", 'is written as ""')),
    Published("developer, two system messages, a name", {"messages": [says("developer", "Be brief."), says("system", "Be kind."), says("user", Q, name="ana"), says("assistant", A, refusal=None, annotations=[])]}, (BRIEF, Message("system", "Be kind."), replace(ASK, name="ana"), REPLY)),
    Published("OpenAI: refusal", {"messages": [USER, says("assistant", None, refusal="I cannot say.")]}, (ASK, Message("assistant", "I cannot say."))),
    Published("reasoning_content", {"messages": [USER, says("assistant", A, reasoning_content="It is a capital.")], "tools": []}, (ASK, THOUGHT)),
    Published("a thought in the text", {"messages": [USER, says("assistant", THINK)]}, (ASK, THOUGHT_IN_TEXT)),
    Published("a thought beside a thought in the text", {"messages": [USER, says("assistant", "<think>x</think>In Norway.", reasoning_content="It is a capital.")]}, (ASK, replace(THOUGHT, content="<think>x</think>In Norway."))),
    Published("an image part", {"messages": [says("user", [{"type": "text", "text": Q}, {"type": "image_url", "image_url": {"url": "o.png"}}]), ASSISTANT]}, refused=("messages[0].content[1].type is 'image_url'", "on_bad_row: set_aside")),
    Published("Anthropic: tool_use and tool_result", {"messages": [WARM, says("assistant", [{"type": "text", "text": "A moment."}, {"type": "tool_use", "id": "c1", "name": "look_up", "input": {"city": "Oslo"}}]), says("user", [{"type": "tool_result", "tool_use_id": "c1", "content": "5 degrees"}]), FIVE], "tools": [{"name": "look_up", "description": "the weather of a city", "input_schema": SCHEMA}]}, (WHEN, replace(CALL_C1, content="A moment."), RESULT_C1, TOLD), (TOOL,)),
    Published("Anthropic: thinking", {"messages": [USER, says("assistant", [{"type": "thinking", "thinking": "It is a capital."}, {"type": "text", "text": A}])]}, (ASK, THOUGHT)),
    Published("Gemini: contents with parts", {"systemInstruction": {"parts": [{"text": "Be brief."}]}, "contents": [{"role": "user", "parts": [{"text": Q}]}, {"role": "model", "parts": [{"text": A}]}]}, (BRIEF, ASK, REPLY)),
    Published("Responses API: input and output as messages", {"input": [USER], "output": [ASSISTANT]}),
    Published("a tool's result as an object", {"messages": [WARM, says("assistant", "", tool_calls=[{"function": PLAIN_CALL}]), says("tool", {"degrees": 5}), FIVE]}, (WHEN, CALL, Message("tool", '{"degrees": 5}'), TOLD)),
    Published("an empty tool_call_id", {"messages": [WARM, says("assistant", "", tool_calls=[OPENAI_CALL]), says("tool", "5 degrees", tool_call_id=""), FIVE]}, (WHEN, CALL_C1, RESULT, TOLD)),
    Published("a note between call and result", {"messages": [WARM, says("assistant", "", tool_calls=[OPENAI_CALL]), says("system", "Calling."), says("tool", "5 degrees", tool_call_id="c1"), FIVE]}, refused=("message 4 of 5 is a tool's result", "put the call there")),
    Published("content as a list of one text", {"messages": [says("user", [Q]), ASSISTANT]}),
    Published("content as a number", {"messages": [says("user", 5), ASSISTANT]}, refused=("messages[0].content is the number 5", "put it in quotes")),
    Published("arguments as Python writes them", {"messages": [USER, says("assistant", "", tool_calls=[{"function": {"name": "look_up", "arguments": "{'city': 'Oslo'}"}}])]}, refused=("tool_calls[0].function.arguments should be JSON", "write it with a JSON library")),
    Published("arguments that are one text", {"messages": [WARM, says("assistant", "", tool_calls=[{"function": {"name": "look_up", "arguments": '"Oslo"'}}])]}, (WHEN, Message("assistant", "", tool_calls=(ToolCall("look_up", "Oslo"),)))),
    Published("NaN in arguments", {"messages": [WARM, says("assistant", "", tool_calls=[{"function": {"name": "look_up", "arguments": {"days": float("nan")}}}])]}, refused=("tool_calls[0].function.arguments holds NaN or infinity", "write null, text or a number")),
    Published("null in arguments", {"messages": [WARM, says("assistant", "", tool_calls=[{"function": {"name": "look_up", "arguments": {"city": None}}}])]}, (WHEN, Message("assistant", "", tool_calls=(ToolCall("look_up", {"city": None}),)))),
    Published("an empty question", {"messages": [says("user", ""), ASSISTANT]}, (Message("user", ""), REPLY)),
    Published("an empty reply", {"messages": [USER, says("assistant", "")]}, (ASK, Message("assistant", ""))),
    Published("GLM-4: tools in the system message", {"messages": [says("system", "", tools=[TOOL]), USER, ASSISTANT]}, tools=(TOOL,)),
    Published("tools as JSON text in the system message", {"messages": [says("system", "Be brief.", tools=json.dumps([TOOL])), *TURNS]}, (BRIEF, ASK, REPLY), (TOOL,)),
    Published("ms-swift: tool_call and tool_response", {"messages": [WARM, says("tool_call", json.dumps(PLAIN_CALL)), says("tool_response", "5 degrees"), FIVE], "tools": json.dumps([TOOL])}, TOOL_TALK, (TOOL,)),
    Published("ms-swift: two calls at once", {"messages": [WARM, says("tool_call", json.dumps(PLAIN_CALL)), says("tool_call", json.dumps(PLAIN_CALL)), says("tool_response", "5 degrees"), FIVE]}, (WHEN, replace(CALL, tool_calls=(CALLED, CALLED)), RESULT, TOLD)),
    Published("LLaMA-Factory: function_call as a role", {"messages": [WARM, says("function_call", json.dumps(PLAIN_CALL)), says("observation", "5 degrees"), FIVE], "tools": json.dumps([TOOL])}, TOOL_TALK, (TOOL,)),
    Published("messages as JSON text", {"messages": json.dumps(TURNS), "tools": json.dumps([TOOL])}, tools=(TOOL,)),
    Published("messages as Python writes them", {"messages": str(TURNS)}),
    Published("roles and contents in two lists", {"messages": {"role": ["user", "assistant"], "content": [Q, A]}}),
    Published("two columns of turns", {"messages": TURNS, "conversations": [HUMAN, GPT]}, not_used=("conversations",)),
    Published("UltraChat 200k: prompt beside messages", {"prompt": Q, "prompt_id": "7", "messages": TURNS}, not_used=("prompt", "prompt_id")),
    Published("Dolphin-R1: messages, reasoning, answer", {"messages": [says("system", "Be brief."), USER], "reasoning": "It is a capital.", "answer": A, "model": "r1"}, (BRIEF, ASK, THOUGHT), not_used=("model",)),
    Published("SmolTalk 2: chat_template_kwargs", {"messages": TURNS, "chat_template_kwargs": {"enable_thinking": False}, "source": "x"}, not_used=("source",), kwargs={"enable_thinking": False}),
    Published("LMSYS: conversation", {"conversation": TURNS, "model": "x"}, not_used=("model",)),
]  # fmt: skip
SHAREGPT = [
    Published("ShareGPT", {"id": "x", "conversations": [speaks("system", "Be brief."), HUMAN, GPT]}, (BRIEF, ASK, REPLY), not_used=("id",)),
    Published("ShareGPT: user and chatgpt", {"conversations": [speaks("user", Q), speaks("chatgpt", A)]}),
    Published("ShareGPT: bing", {"conversations": [speaks("user", Q), speaks("bing", A)]}),
    Published("ShareGPT: Human and Assistant", {"conversations": [speaks("Human", Q), speaks("Assistant", A)]}),
    Published("ShareGPT: function_call and observation", {"conversations": [speaks("human", WHEN.content), speaks("function_call", json.dumps(PLAIN_CALL)), speaks("observation", "5 degrees"), speaks("gpt", TOLD.content)], "system": "Be brief.", "tools": json.dumps([FUNCTION])}, (BRIEF, *TOOL_TALK), (TOOL,)),
    Published("ShareGPT: tool_call and tool_response", {"conversations": [speaks("human", WHEN.content), speaks("tool_call", json.dumps(PLAIN_CALL)), speaks("tool_response", "5 degrees"), speaks("gpt", TOLD.content)]}, TOOL_TALK),
    Published("ShareGPT: a call a line", {"conversations": [speaks("human", WHEN.content), speaks("function_call", f"{json.dumps(PLAIN_CALL)}\n{json.dumps(PLAIN_CALL)}"), speaks("observation", "5 degrees"), speaks("gpt", TOLD.content)]}, (WHEN, replace(CALL, tool_calls=(CALLED, CALLED)), RESULT, TOLD)),
    Published("ShareGPT: a call with parameters", {"conversations": [speaks("human", WHEN.content), speaks("function_call", json.dumps({"name": "look_up", "parameters": {"city": "Oslo"}})), speaks("observation", "5 degrees"), speaks("gpt", TOLD.content)]}, TOOL_TALK),
    Published("Hermes: calls as text", {"conversations": [speaks("system", "<tools>[]</tools>"), speaks("human", WHEN.content), speaks("gpt", "<tool_call>\n{}\n</tool_call>"), speaks("tool", "<tool_response>\n5\n</tool_response>"), speaks("gpt", TOLD.content)], "category": "x"}, (Message("system", "<tools>[]</tools>"), WHEN, Message("assistant", "<tool_call>\n{}\n</tool_call>"), Message("tool", "<tool_response>\n5\n</tool_response>"), TOLD), not_used=("category",)),
    Published("ToolACE: calls in a language of their own", {"system": "Be brief.", "conversations": [speaks("user", WHEN.content), speaks("assistant", "[look_up(city='Oslo')]"), speaks("tool", "5 degrees"), speaks("assistant", TOLD.content)]}, (BRIEF, WHEN, Message("assistant", "[look_up(city='Oslo')]"), RESULT, TOLD)),
    Published("the assistant begins", {"conversations": [speaks("gpt", "Hello."), HUMAN, GPT]}, (Message("assistant", "Hello."), ASK, REPLY)),
    Published("the user has the last word", {"conversations": [HUMAN, GPT, speaks("human", "Thanks.")]}, (ASK, REPLY, Message("user", "Thanks."))),
    Published("no turns", {"conversations": []}, ()),
    Published("BELLE: conversations", {"id": "1", "conversations": [HUMAN, speaks("assistant", A)]}, not_used=("id",)),
    Published("OpenHermes: system_prompt null", {"conversations": [HUMAN, GPT], "system_prompt": None, "source": "x", "custom_instruction": None}, not_used=("source",)),
    Published("OpenHermes: system_prompt", {"conversations": [HUMAN, GPT], "system_prompt": "Be brief."}, (BRIEF, ASK, REPLY)),
    Published("OpenThoughts: thoughts between markers of their own", {"system": "Be brief.", "conversations": [speaks("user", Q), speaks("assistant", "<|begin_of_thought|>h<|end_of_thought|>a")]}, (BRIEF, ASK, Message("assistant", "<|begin_of_thought|>h<|end_of_thought|>a"))),
    Published("LLaMA-Factory: images", {"conversations": [speaks("human", f"<image>{Q}"), GPT], "images": ["o.png"]}, refused=("images: chatlora trains on text", "ignore: [images]")),
    Published("ChatGLM3: tool messages", {"tools": ["look_up: the weather"], "conversations": [WARM, {"role": "tool", "name": "look_up", "parameters": {"city": "Oslo"}, "observation": "5 degrees"}, FIVE]}, (WHEN, CALL, replace(RESULT, name="look_up"), TOLD), ({"type": "text", "text": "look_up: the weather"},)),
]  # fmt: skip
OTHERS = [
    Published("MOSS 003", {"conversation": [{"human": Q, "assistant": A}, {"human": Q2, "assistant": A2}], "category": "x"}, (ASK, REPLY, ASK2, REPLY2), not_used=("category",)),
    Published("MOSS: marked turns", {"meta_instruction": "Be brief.", "num_turns": 1, "chat": {"turn_1": {"Human": f"<|Human|>: {Q}<eoh>\n", "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n", "MOSS": f"<|MOSS|>: {A}<eom>\n"}}}, (BRIEF, ASK, REPLY), not_used=("num_turns",)),
    Published("Capybara: pairs", {"source": "x", "conversation": [{"input": Q, "output": A}, {"input": Q2, "output": A2}]}, (ASK, REPLY, ASK2, REPLY2), not_used=("source",)),
    Published("UltraChat: a list of texts", {"id": "0", "data": [Q, A, Q2, A2]}, (ASK, REPLY, ASK2, REPLY2), not_used=("id",)),
    Published("LIMA: a list of texts", {"conversations": [Q, A], "source": "x"}, not_used=("source",)),
    Published("Glaive: marked text", {"system": "SYSTEM: You are a helper with access to the following functions. Use them if required -\n" + json.dumps(FUNCTION, indent=4), "chat": "USER: How warm is Oslo?\n\n\nASSISTANT: <functioncall> {\"name\": \"look_up\", \"arguments\": '{\"city\": \"Oslo\"}'} <|endoftext|>\n\n\nFUNCTION RESPONSE: 5 degrees\n\n\nASSISTANT: Five degrees. <|endoftext|>\n\n\n"}, (Message("system", "You are a helper."), *TOOL_TALK), (TOOL,)),
    Published("xLAM: query, answers, tools", {"id": 0, "query": WHEN.content, "answers": json.dumps([PLAIN_CALL]), "tools": json.dumps([{"name": "look_up", "description": "the weather of a city", "parameters": {"city": {"type": "string"}}}])}, (WHEN, CALL), (TOOL,), ("id",)),
    Published("Alpaca: history", {"instruction": Q2, "input": "", "output": A2, "history": [[Q, A]], "system": "Be brief."}, (BRIEF, ASK, REPLY, ASK2, REPLY2)),
    Published("Alpaca: history null", {"instruction": Q, "input": None, "output": A, "history": None}),
    Published("Alpaca: an empty output", {"instruction": Q, "input": "", "output": ""}, (ASK, Message("assistant", ""))),
    Published("Alpaca: several outputs", {"instruction": Q, "input": "", "output": [A, A2]}, refused=("output is a list, not text", "reader")),
    Published("Alpaca: text beside it", {"instruction": Q, "input": "", "output": A, "text": "Below is"}, not_used=("text",)),
    Published("Alpaca: prompt beside it", {"instruction": Q, "input": "", "output": A, "prompt": "Below is"}, not_used=("prompt",)),
    Published("Self-Instruct: one instance", {"instruction": Q, "instances": [{"input": "", "output": A}]}),
    Published("Self-Instruct: several instances", {"instruction": Q, "instances": [{"input": "", "output": A}] * 2}, refused=("instances is not one object", "a row of its own")),
    Published("COIG", {"instruction": Q, "input": "", "output": A, "task_type": {"major": ["x"]}, "answer_from": "human"}, not_used=("answer_from", "task_type")),
    Published("Dolly: context", {"instruction": Q, "context": "A city.", "response": A, "category": "x"}, (Message("user", f"{Q}\nA city."), REPLY), not_used=("category",)),
    Published("Firefly: input and target", {"kind": "x", "input": Q, "target": A}, not_used=("kind",)),
    Published("OpenOrca", {"id": "1", "system_prompt": "Be brief.", "question": Q, "response": A}, (BRIEF, ASK, REPLY), not_used=("id",)),
    Published("GSM8K: question and answer", {"question": Q, "answer": A}),
    Published("MetaMath: query and response", {"query": Q, "response": A, "type": "x"}, not_used=("type",)),
    Published("ms-swift: query, response, history", {"query": Q2, "response": A2, "history": [[Q, A]], "system": "Be brief."}, (BRIEF, ASK, REPLY, ASK2, REPLY2)),
    Published("Nemotron: input as messages, output as text", {"input": [USER], "output": THINK, "reasoning": "on", "system_prompt": "Be brief.", "category": "x"}, (BRIEF, ASK, THOUGHT_IN_TEXT), not_used=("category", "reasoning")),
    Published("prompt as messages, completion as text", {"prompt": [USER], "completion": A}),
    Published("TRL: prompt and completion as messages", {"prompt": [USER, ASSISTANT, says("user", Q2)], "completion": [says("assistant", A2)]}, (ASK, replace(REPLY, loss=False), ASK2, REPLY2)),
    Published("reasoning in a column of its own", {"prompt": Q, "completion": A, "reasoning": "It is a capital."}, (ASK, THOUGHT)),
    Published("question with context", {"question": Q, "context": "A city.", "answer": A}, refused=("question, context, answer can be read in several ways", "columns: {instruction: question, input: context, output: answer}")),
    Published("KTO: label false", {"prompt": Q, "completion": "In Sweden.", "label": False}, refused=("label is False: preference data (KTO)", "on_bad_row: set_aside")),
    Published("KTO: label true", {"prompt": Q, "completion": A, "label": True}, not_used=("label",)),
    Published("KTO: kto_tag", {"messages": TURNS, "kto_tag": True}, refused=("kto_tag is True: preference data (KTO)", "ignore: [kto_tag]")),
    Published("DPO: chosen and rejected", {"prompt": Q, "chosen": A, "rejected": "In Sweden."}, refused=("chosen, rejected: preference data (DPO)", "columns: {completion: chosen}, ignore: [rejected]")),
    Published("UltraFeedback: messages beside chosen and rejected", {"prompt": Q, "messages": TURNS, "chosen": TURNS, "rejected": [USER, says("assistant", "In Sweden.")]}, refused=("chosen, rejected: preference data (DPO)", "ignore: [chosen, rejected] trains on prompt, messages alone")),
    Published("plain text", {"text": "Oslo is in Norway."}, refused=("the row has the columns text", "reader: my_rows.py:read")),
    Published("text in ChatML", {"text": f"<|im_start|>user\n{Q}<|im_end|>"}, refused=("the row has the columns text", "reader: my_rows.py:read")),
    Published("summaries", {"id": "1", "dialogue": "A: Hi. B: Hello.", "summary": "They greet."}, refused=("the row has the columns id, dialogue, summary", "columns: {prompt: dialogue, completion: summary}")),
    Published("turns with keys of their own", {"messages": [{"speaker": "human", "utterance": Q}, {"speaker": "bot", "utterance": A}]}, refused=("messages[0] has neither role nor content, but speaker, utterance", "columns: {role: speaker, content: utterance}")),
]  # fmt: skip
FORMS = FLAGS + OPENAI + SHAREGPT + OTHERS
