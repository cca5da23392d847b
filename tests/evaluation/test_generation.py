"""Generation: batched equals one by one, greedy whatever the model says, every stop token, control tokens by id."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from chatlora.data.collate import pad_left
from chatlora.data.evaluation_set import EvalSample
from chatlora.evaluation import generation
from chatlora.evaluation.generation import (
    Budget,
    Results,
    all_stop_ids,
    batch_budget,
    collate,
    cost,
    greedy_settings,
    group,
    only_these_settings,
)
from chatlora.evaluation.predictions import Prediction, read_predictions, read_written_so_far
from chatlora.evaluation.sharding import shard_batches
from evaluate import generate
from tests.tiny_models import chatml_tokenizer, tiny_llama

MAX_NEW_TOKENS = 24
NEARLY_EQUAL = 1e-4  # where the two best logits are this close, rounding may decide
WIDE = Budget(tokens=10**9, rows=8)


class HostRuntime:
    """What `generate` asks for, of a model that lies in main memory."""

    device = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These models are so small that threads only get into each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return chatml_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return tiny_llama(len(tokenizer))


def samples_of(prompts: Sequence[Sequence[int]], references: Sequence[Sequence[int]] | None = None) -> list[EvalSample]:
    return [
        EvalSample(
            id=f"rows.jsonl:{index + 1}#0",
            place=f"rows.jsonl:{index + 1}",
            turn=0,
            input_ids=list(prompt),
            references=[list(references[index]) if references else [65] * (1 + index % 5)],
        )
        for index, prompt in enumerate(prompts)
    ]


def random_prompts(count: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    draws = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 60, (count,), generator=draws).tolist()
    return [torch.randint(0, vocab_size - 10, (length,), generator=draws).tolist() for length in lengths]


def run(
    path: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    samples: Sequence[EvalSample],
    stop_ids: Sequence[int],
    budget: Budget = WIDE,
) -> list[Prediction]:
    """The whole pass, in the samples' order."""
    path.unlink(missing_ok=True)
    batches = (collate(batch, 300) for batch in group(samples, budget, MAX_NEW_TOKENS))
    with only_these_settings(model):
        generate(
            HostRuntime(),  # type: ignore[arg-type]
            model,
            batches,
            greedy_settings(MAX_NEW_TOKENS, stop_ids, 300),
            Results(path, tokenizer, stop_ids),
        )
    order: dict[str | int, int] = {sample.id: place for place, sample in enumerate(samples)}
    return sorted(read_written_so_far(path), key=lambda prediction: order[prediction.id])


def one_by_one(
    model: LlamaForCausalLM, prompt: Sequence[int], stop_ids: Sequence[int]
) -> tuple[list[int], list[float]]:
    """Greedy ids from whole forward passes without a cache, and how far apart the two best logits were each time."""
    ids, gaps = list(prompt), []
    for _ in range(MAX_NEW_TOKENS):
        with torch.no_grad():
            best = model(torch.tensor([ids]), use_cache=False).logits[0, -1].topk(2)
        gaps.append(float(best.values[0] - best.values[1]))
        ids.append(int(best.indices[0]))
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt) :], gaps


class Recorder(Results):
    """Results that also keep the ids, which predictions.jsonl does not hold."""

    def append(self, samples: Any, generated: torch.Tensor, references: Any) -> None:
        self.rows = getattr(self, "rows", {}) | {
            sample.id: generation.until_stop(row, self.answers.stop_ids)[0]
            for sample, row in zip(samples, generated.tolist(), strict=True)
        }
        super().append(samples, generated, references)


STOP_IDS = [76, 258, 302]  # frequent enough that rows of one batch end at different lengths


@pytest.fixture(scope="module")
def some(tokenizer: PreTrainedTokenizerFast) -> list[EvalSample]:
    return samples_of(random_prompts(16, len(tokenizer)))


@pytest.fixture(scope="module")
def expected(model: LlamaForCausalLM, some: list[EvalSample]) -> dict[str, tuple[list[int], list[float]]]:
    return {sample.id: one_by_one(model, sample.input_ids, STOP_IDS) for sample in some}


def differing_samples(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    expected: dict[str, tuple[list[int], list[float]]],
    samples: Sequence[EvalSample],
    path: Path,
) -> list[str]:
    results = Recorder(path, tokenizer, STOP_IDS)
    batches = (collate(batch, 300) for batch in group(samples, WIDE, MAX_NEW_TOKENS))
    with only_these_settings(model):
        generate(HostRuntime(), model, batches, greedy_settings(MAX_NEW_TOKENS, STOP_IDS, 300), results)  # type: ignore[arg-type]
    different = []
    for sample in samples:
        alone, gaps = expected[sample.id]
        found = results.rows[sample.id]
        first = next((i for i, pair in enumerate(zip(alone, found, strict=False)) if pair[0] != pair[1]), None)
        if first is None and len(alone) == len(found):
            continue
        if first is not None and gaps[first] < NEARLY_EQUAL:
            warnings.warn(f"sample {sample.id}: a tie of {gaps[first]:.1e} at token {first}", stacklevel=1)
            continue
        different.append(sample.id)
    return different


def test_batched_equals_one_by_one_token_for_token(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    expected: dict[str, tuple[list[int], list[float]]],
    some: list[EvalSample],
    tmp_path: Path,
) -> None:
    assert differing_samples(model, tokenizer, expected, some, tmp_path / "predictions.jsonl") == []
    assert len({len(ids) for ids, _ in expected.values()}) > 5
    assert {prediction.stop_reason for prediction in read_predictions(tmp_path / "predictions.jsonl")} == {
        "stop",
        "length",
    }


def _padded_on_the_right(prompts: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    flipped = pad_left([prompt[::-1] for prompt in prompts], pad_token_id)
    return {name: tensor.flip(1) for name, tensor in flipped.items()}


def _without_a_mask(prompts: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    inputs = pad_left(prompts, pad_token_id)
    return {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}


@pytest.mark.parametrize("broken", [_padded_on_the_right, _without_a_mask])
def test_wrong_padding_is_caught(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    expected: dict[str, tuple[list[int], list[float]]],
    some: list[EvalSample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: Callable[..., Any],
) -> None:
    monkeypatch.setattr(generation, "pad_left", broken)
    assert differing_samples(model, tokenizer, expected, some, tmp_path / "predictions.jsonl") != []


def test_a_model_that_samples_and_forbids_is_still_greedy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    samples = samples_of(random_prompts(6, len(tokenizer)))
    plain = run(tmp_path / "plain.jsonl", model, tokenizer, samples, [302])
    unruly = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=3.0, suppress_tokens=list(range(150)))
    own, model.generation_config = model.generation_config, unruly
    try:
        assert run(tmp_path / "unruly.jsonl", model, tokenizer, samples, [302]) == plain
        assert model.generation_config is unruly
        # What the guard is for: a GenerationConfig alone leaves the model's own settings in force.
        alone = model.generate(torch.tensor([samples[0].input_ids]), generation_config=greedy_settings(24, [302], 300))
        assert tokenizer.decode(alone[0, len(samples[0].input_ids) :]) != plain[0].prediction_raw
    finally:
        model.generation_config = own


def test_the_stop_set_is_full(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    own, model.generation_config = model.generation_config, GenerationConfig(eos_token_id=[76, 258])
    try:
        assert all_stop_ids(model, tokenizer, [301]) == [76, 258, 301, 302]
        model.generation_config = GenerationConfig(eos_token_id=258)
        assert all_stop_ids(model, tokenizer, []) == [258, 302]
    finally:
        model.generation_config = own
    samples = samples_of(random_prompts(12, len(tokenizer)))
    free = run(tmp_path / "free.jsonl", model, tokenizer, samples, [302])
    stops = one_by_one(model, samples[0].input_ids, [])[0][5:7]
    for stop in stops:
        [stopped] = run(tmp_path / "stopped.jsonl", model, tokenizer, samples[:1], [302, *stops])
        assert stopped.stop_reason == "stop"
        assert (free[0].prediction_raw or "").startswith(stopped.prediction_raw or "?")
        assert tokenizer.decode([stop]) not in stopped.prediction
    assert {prediction.stop_reason for prediction in free} == {"length"}


def test_the_model_never_sees_the_references(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    prompts = random_prompts(6, len(tokenizer))
    ones = run(tmp_path / "a.jsonl", model, tokenizer, samples_of(prompts, [[65]] * 6), [302])
    others = run(tmp_path / "b.jsonl", model, tokenizer, samples_of(prompts, [[66] * 9] * 6), [302])
    assert [one.prediction_raw for one in ones] == [other.prediction_raw for other in others]
    assert [one.reference for one in ones] != [other.reference for other in others]


def test_control_tokens_go_by_id_and_typed_spellings_stay(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    typed = [token for char in "<|im_end|>" for token in tokenizer(char)["input_ids"]]
    assert 302 not in typed
    answer = torch.tensor([[301, *typed, 303, *tokenizer("你好")["input_ids"], 302, 300, 300]])
    sample = samples_of([[70, 71]], [[*typed, 302]])
    results = Results(tmp_path / "predictions.jsonl", tokenizer, [302])
    results.append(sample, answer, [sample[0].references])
    [prediction] = read_predictions(tmp_path / "predictions.jsonl")
    assert prediction.prediction == "<|im_end|><tool_call>你好"
    assert prediction.prediction_raw == "<|im_start|><|im_end|><tool_call>你好<|im_end|>"
    assert prediction.reference == "<|im_end|>"
    assert prediction.stop_reason == "stop"


def test_an_ordinary_token_that_stops_goes_at_the_end_only(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    [newline] = tokenizer("\n")["input_ids"]
    word = tokenizer("place")["input_ids"]
    [sample] = samples_of([[70, 71]], [[*word, newline, *word, newline]])
    results = Results(tmp_path / "predictions.jsonl", tokenizer, [newline])
    results.append([sample], torch.tensor([[*word, newline, 300, 300]]), [sample.references])
    [prediction] = read_predictions(tmp_path / "predictions.jsonl")
    assert (prediction.prediction, prediction.reference) == ("place", "place\nplace")


def test_several_references_are_a_list_and_one_is_a_string(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    words = [tokenizer(text)["input_ids"] for text in ("a", "place", "city")]
    sample = EvalSample(id="rows.jsonl:1#0", place="rows.jsonl:1", turn=0, input_ids=words[0], references=words)
    results = Results(tmp_path / "predictions.jsonl", tokenizer, [302])
    results.append([sample], torch.tensor([[*words[1]]]), [sample.references])
    results.append([sample], torch.tensor([[*words[1]]]), [words[2:]])
    several, one = read_predictions(tmp_path / "predictions.jsonl")
    assert (several.reference, one.reference) == (["a", "place", "city"], "city")
    assert several.stop_reason == "length"


@trials(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 200), st.integers(1, 60)), min_size=1, max_size=40),
    st.integers(100, 2000),
    st.integers(1, 9),
    st.integers(1, 5),
)
def test_every_sample_is_in_one_batch_of_one_process_within_the_budget(
    lengths: list[tuple[int, int]], tokens: int, rows: int, num_processes: int
) -> None:
    samples = samples_of([[1] * prompt for prompt, _ in lengths], [[1] * answer for _, answer in lengths])
    batches = group(samples, Budget(tokens, rows), MAX_NEW_TOKENS)
    for batch in batches:
        longest = max(len(sample.input_ids) for sample in batch)
        assert len(batch) == 1 or (len(batch) <= rows and len(batch) * (longest + MAX_NEW_TOKENS) <= tokens)
    shares = [
        shard_batches(batches, lambda batch: cost(batch, MAX_NEW_TOKENS), rank, num_processes)
        for rank in range(num_processes)
    ]
    dealt = [sample.id for part in shares for batch in part for sample in batch]
    assert sorted(dealt) == sorted(sample.id for sample in samples)
    loads = [sum(cost(batch, MAX_NEW_TOKENS) for batch in part) for part in shares]
    assert max(loads) - min(loads) <= max(cost(batch, MAX_NEW_TOKENS) for batch in batches)


def test_the_budget_follows_from_the_size_of_the_cache(model: LlamaForCausalLM) -> None:
    bytes_per_token = 2 * 2 * 2 * 16 * 4  # keys and values, layers, key/value heads, head size, fp32
    assert batch_budget(model, torch.device("cpu")).tokens == 2 * 2**30 // bytes_per_token
