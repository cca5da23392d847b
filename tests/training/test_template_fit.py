"""The fit of the chat template: told apart on real rows with a real model, and nothing is changed by looking."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatlora.reading.formats import parse_row
from chatlora.rendering.renderer import Renderer
from chatlora.training import setup
from chatlora.training.template_fit import EXPECTED, Measured, TemplateFit, fit_of, kinds_of, token_losses
from tests.engine_runs import environment_of
from tests.fork_server import ForkServer
from tests.tiny_models import tiny_llama
from tests.tiny_tokenizers import tiny_tokenizer

GEMMA = (
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ROWS = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("name[Alimentum], area[city centre]", "There is a place in the city centre, Alimentum."),
    ("故宫门票多少钱？", "故宫的门票是60元。"),
]


def conversations() -> list[dict[str, object]]:
    roles = ("user", "assistant")
    return [{"messages": [{"role": r, "content": c} for r, c in zip(roles, row, strict=True)]} for row in ROWS]


@pytest.fixture(scope="module")
def real(smollm2: Path) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return tokenizer, AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.mark.parametrize(("template", "is_foreign"), [(None, False), (GEMMA, True), (LLAMA3, True)])
def test_a_real_model_knows_its_own_template_only(
    real: tuple[Any, Any], template: str | None, is_foreign: bool
) -> None:
    tokenizer, model = real
    renderer = Renderer(tokenizer, chat_template=template)
    rows, losses = [], []
    for each in conversations():
        conversation = parse_row(each)
        (example,) = renderer.render(conversation, max_length=512).examples
        rows.append(Measured(example.input_ids, kinds_of(tokenizer, example, conversation)))
        losses.append(token_losses(model, example.input_ids, torch.device("cpu")))
    fit = fit_of(tokenizer, rows, losses)
    assert fit.is_foreign == is_foreign, fit
    mean, _ = fit.means["between"]
    margin = EXPECTED["between"]
    assert mean > 2 * margin if is_foreign else mean < margin / 2
    assert bool(fit.surprising) or not is_foreign
    assert any("WARNING" in line for line in fit.lines()) == is_foreign


def test_the_templates_own_tokens_are_told_from_what_messages_say() -> None:
    tokenizer = tiny_tokenizer()
    turns = [("user", "user user"), ("assistant", "好 assistant"), ("user", "user more"), ("assistant", "last")]
    conversation = parse_row({"messages": [{"role": role, "content": content} for role, content in turns]})
    (example,) = Renderer(tokenizer).render(conversation, max_length=512).examples
    kinds = kinds_of(tokenizer, example, conversation)
    shown = {
        kind: tokenizer.decode([token for token, each in zip(example.input_ids, kinds, strict=True) if each == kind])
        for kind in EXPECTED
    }
    assert shown == {
        "stop": "<|im_end|><|im_end|>",
        "end": "<|im_end|>",
        "between": "\n<|im_start|>assistant\n\n<|im_start|>user\n",  # the third time the row itself has shown it
    }


def test_means_are_those_of_each_token() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(len(tokenizer))
    ids = tokenizer.encode("name, area: in the city centre, 0123456789")
    row = Measured(ids, ["", *("between" if index % 2 else "stop" for index in range(len(ids) - 1))])
    losses = token_losses(model, ids, torch.device("cpu"))
    fit = fit_of(tokenizer, [row], [losses])
    logits = model(input_ids=torch.tensor([ids])).logits[0].detach()
    plain = [-float(logits[index].log_softmax(0)[ids[index + 1]]) for index in range(len(ids) - 1)]
    assert losses == pytest.approx(plain, rel=1e-5)
    mean, count = fit.means["between"]
    assert (mean, count) == pytest.approx((sum(plain[1::2]) / len(plain[1::2]), len(plain[1::2])), rel=1e-5)
    assert TemplateFit({}, {}).lines()[0].startswith("fit of the chat template: not measured")


def test_a_look_changes_nothing(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, gradients, modes and draws are those from before; the run says what was found and keeps it."""
    looks: list[bool] = []

    def watched(model: torch.nn.Module, *others: Any) -> TemplateFit:
        def state() -> list[Any]:
            grads = [parameter.grad is None and parameter.requires_grad for parameter in model.parameters()]
            weights = [value.clone() for value in model.state_dict().values()]
            return [torch.get_rng_state(), grads, [module.training for module in model.modules()], weights]

        before = state()
        fit: TemplateFit = look(model, *others)
        after = state()
        looks.append(all(torch.equal(one, other) for one, other in zip(before[3], after[3], strict=True)))
        looks.append(torch.equal(before[0], after[0]))
        looks.append(before[1:3] == after[1:3])
        return fit

    look: Any = setup.template_fit
    monkeypatch.setattr(setup, "template_fit", watched)
    folder = run("--optim.max_steps", "1")
    assert looks == [True] * 3
    kept = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["template_fit"]
    assert kept["between"]["loss"] > 1  # a random model knows no template
    assert kept["stop"]["tokens"] >= 8


@pytest.mark.slow
def test_a_spread_model_is_measured_as_a_whole_one(server: ForkServer, world: Path, tmp_path: Path) -> None:
    found = []
    for name, ranks, engine in (("one", 1, None), ("two", 2, "zero3")):
        argv = [str(world / "my.yaml"), "--run.output_dir", name, "--optim.max_steps", "1"]
        assert server.run(argv, tmp_path, ranks=ranks, environment=environment_of(engine)) == [0] * ranks
        environment = json.loads((tmp_path / name / "environment.json").read_text(encoding="utf-8"))
        assert environment["engine"] == (engine or "single")
        found.append(environment["template_fit"])
    assert found[0].keys() == found[1].keys()
    for kind in EXPECTED:
        assert found[0][kind] == pytest.approx(found[1][kind], abs=2e-4)
