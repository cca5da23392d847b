"""Where a turn starts and stops: training, evaluation and the generation_config.json beside the adapter agree."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import evaluate
from chatlora.config import ModelConfig
from chatlora.evaluation.generation import all_stop_ids
from chatlora.model.adapter_folder import save_generation_config
from chatlora.model.loading import generation_stop_ids, load_tokenizer, renderer_for
from chatlora.reading.conversation import Conversation, Message
from chatlora.rendering.examples import IGNORE_INDEX
from tests.tiny_models import tiny_llama
from tests.tiny_tokenizers import CHATML, GLM, GLM_TOKENS, LLAMA3, LLAMA3_TOKENS, tiny_tokenizer

TURNS = Conversation(
    messages=(
        Message("user", "Where is Oslo?"),
        Message("assistant", "In Norway."),
        Message("user", "And Rome?"),
        Message("assistant", "In Italy."),
    )
)


def checkpoint(folder: Path, tokenizer: PreTrainedTokenizerFast, **generation: object) -> ModelConfig:
    model = tiny_llama(len(tokenizer))
    model.save_pretrained(folder)
    settings = json.dumps({"_from_model_config": False, "transformers_version": "5.23.0", **generation})
    (folder / "generation_config.json").write_text(settings)  # as published ones are: not all of them are valid
    tokenizer.save_pretrained(folder)
    return ModelConfig(name_or_path=str(folder))


def id_of(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def agree(model: ModelConfig, folder: Path) -> tuple[tuple[int, ...], list[int]]:
    """The stop tokens of all three, which are the same; and the targets of TURNS."""
    tokenizer = load_tokenizer(model)
    renderer = renderer_for(tokenizer, model, any_reasoning=False)
    base = AutoModelForCausalLM.from_pretrained(model.name_or_path)
    save_generation_config(base, renderer.stop_ids, folder)
    beside = GenerationConfig.from_pretrained(folder).eos_token_id
    assert sorted(beside) == sorted(renderer.stop_ids) == all_stop_ids(base, tokenizer, renderer.stop_ids)
    assert set(generation_stop_ids(model)) <= set(renderer.stop_ids)
    (example,) = renderer.render(TURNS, max_length=512).examples
    return renderer.stop_ids, [label for label in example.labels if label != IGNORE_INDEX]


def test_a_tokenizer_that_adds_bos_by_itself_adds_it_once(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat_template=LLAMA3, control_tokens=LLAMA3_TOKENS, eos="<|eot_id|>", splitting="llama3")
    bos = id_of(tokenizer, "<|begin_of_text|>")
    tokenizer.bos_token = "<|begin_of_text|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
    )
    model = checkpoint(tmp_path, tokenizer)
    loaded = load_tokenizer(model)
    assert loaded("hello").input_ids[0] == bos  # it does
    renderer = renderer_for(loaded, model, any_reasoning=False)
    (example,) = renderer.render(TURNS, max_length=512).examples
    evaluated = renderer.render_for_evaluation(TURNS, max_prompt_length=512, max_new_tokens=64).examples
    served = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        [{"role": message.role, "content": message.content} for message in TURNS.messages[:3]],
        add_generation_prompt=True,
    )["input_ids"]
    assert evaluated[-1].input_ids == served == example.input_ids[: len(served)]
    assert example.input_ids.count(bos) == served.count(bos) == 1


@pytest.mark.parametrize("generation", [{}, {"eos_token_id": 0}, {"eos_token_id": [0, 1]}])
def test_generation_config_and_tokenizer_that_name_different_ends(
    tmp_path: Path, generation: dict[str, object]
) -> None:
    tokenizer = tiny_tokenizer(eos="<|endoftext|>")  # a base model's: the template's end of turn is another
    end = id_of(tokenizer, "<|im_end|>")
    stops, targets = agree(checkpoint(tmp_path / "model", tokenizer, **generation), tmp_path)
    assert end in stops
    assert id_of(tokenizer, "<|endoftext|>") in stops
    assert targets.count(end) == 2


def test_a_stop_token_that_is_the_pad_token_is_a_target(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(eos="<|im_end|>", pad="<|im_end|>")
    end = id_of(tokenizer, "<|im_end|>")
    stops, targets = agree(checkpoint(tmp_path / "model", tokenizer, pad_token_id=end), tmp_path)
    assert end in stops
    assert targets.count(end) == 2


def test_a_stop_token_that_belongs_to_the_next_message(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat_template=GLM, control_tokens=GLM_TOKENS, eos="<|endoftext|>")
    user, end = id_of(tokenizer, "<|user|>"), id_of(tokenizer, "<|endoftext|>")
    stops, targets = agree(checkpoint(tmp_path / "model", tokenizer, eos_token_id=[end, user]), tmp_path)
    assert {user, end} <= set(stops)
    assert targets.count(user) >= 1
    assert targets[-1] in stops


def test_settings_that_contradict_each_other_do_not_cost_the_adapter(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(eos="<|im_end|>")
    contradiction = {"do_sample": False, "temperature": 0.6, "top_p": 0.9}
    model = checkpoint(tmp_path / "model", tokenizer, **contradiction)
    base = AutoModelForCausalLM.from_pretrained(model.name_or_path)
    base.generation_config.eos_token_id = [1, 2]
    with pytest.raises(ValueError, match="Fix these issues to save the configuration"):
        base.generation_config.save_pretrained(tmp_path)
    stops, _ = agree(model, tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == list(stops)


def test_a_base_model_with_a_template_by_file_stops_and_serves_as_it_was_trained(
    run: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    """Through the scripts: training, evaluation, and the files beside the adapter."""
    tokenizer = tiny_tokenizer(chat_template=None, eos="<|endoftext|>")
    model = checkpoint(tmp_path / "base", tokenizer, eos_token_id=id_of(tokenizer, "<|endoftext|>"))
    (tmp_path / "template.jinja").write_text(CHATML)
    folder = run(
        *("--model.name_or_path", model.name_or_path, "--model.chat_template", str(tmp_path / "template.jinja")),
        *("--data.test", str(world / "rows.jsonl"), "--optim.max_steps", "2", "--evaluation.max_new_tokens", "2"),
    )
    ends = {id_of(tokenizer, "<|endoftext|>"), id_of(tokenizer, "<|im_end|>")}
    assert set(GenerationConfig.from_pretrained(folder / "adapter").eos_token_id) == ends
    assert AutoTokenizer.from_pretrained(folder / "adapter").chat_template == CHATML
    torch.set_num_threads(1)
    evaluate.main([str(folder)])
    scores = json.loads((folder / "eval" / "test" / "scores.json").read_text())
    assert set(scores["decoding"]["stop_ids"]) == ends
