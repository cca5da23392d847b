"""The card of an adapter: what it was made from and how, its scores, and the lines that use it.

It is made to be published: a base or data on this machine are called by their names, never by their paths, and what is
not known is left out of the metadata.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from chatlora.config import Config
from chatlora.model.origin import Origin, hub_data, origin_of, public_name
from chatlora.model.servers import MIXED_FLAG
from chatlora.run_directory import RunDirectory
from chatlora.run_log import LOG, VALIDATION, read_log
from chatlora.training.card_scores import CARD, END, NONE_YET, START, scores_of, with_scores

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes: vllm/config/lora.py
BEFORE_PUBLISHING = {  # in comments of the metadata, which no page shows
    "base_model": "the hub id of the base, which was a folder, is not known here: write it before this is published",
    "license": "that of the base is not known here: write yours before this is published",
    "adapter_config.json": "its base_model_name_or_path is a folder of the machine that trained, for those who load it "
    "there: write the base's hub id before this is published",
}


@dataclass(frozen=True, slots=True)
class Use:
    """What those who use an adapter must know.

    base_class: the class of transformers whose names of layers it has. template_kwargs: what the template was told.
    servers: which do something else than serve it as it is, and what.
    """

    base_class: str
    template_kwargs: Mapping[str, Any]
    servers: Mapping[str, str]


def write_card(folder: Path, config: Config, run: RunDirectory, step: int, use: Use) -> None:
    """README.md in `folder`, beside all else that an adapter of this run has. step: whose weights these are."""
    origin = origin_of(config.model)
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    ledger = json.loads((run.path / "ledger.json").read_text(encoding="utf-8"))
    parts = [
        f"---\n{_metadata(origin, settings, [source['path'] for source in ledger['sources']])}---",
        f"# LoRA adapter for {origin.name}",
        _made_from(origin),
        _made_how(config, run, step),
        _data_table(ledger["sources"]),
        f"## Scores\n\n{START}\n{NONE_YET}\n{END}",
        f"## Use\n\n{_use(settings, origin, use, config.data.system)}",
    ]
    card = with_scores("\n\n".join(parts) + "\n", run.path.absolute().name, scores_of(run.path, folder))
    (folder / CARD).write_text(card, encoding="utf-8")


def _metadata(origin: Origin, settings: Mapping[str, Any], sources: Sequence[str]) -> str:
    """YAML as the hub takes it; what is not known stands in comments."""
    known = {"base_model": origin.hub_id, **origin.licence}
    data = sorted({hub_id for path in sources if (hub_id := hub_data(path))})
    values: dict[str, Any] = {name: value for name, value in known.items() if value}
    values |= {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "chatlora"]}
    values |= {"datasets": data} if data else {}
    told = values if settings["base_model_name_or_path"] != origin.hub_id else {*values, "adapter_config.json"}
    missing = [f"# {name}: {why}\n" for name, why in BEFORE_PUBLISHING.items() if name not in told]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True) + "".join(missing)


def _made_from(origin: Origin) -> str:
    revision = f", revision `{origin.revision}`" if origin.revision else ""
    if origin.hub_id is None:
        return f"The base was a folder named `{origin.name}`, of which no hub id is known."
    link = f"[{origin.hub_id}](https://huggingface.co/{origin.hub_id}){revision}"
    return f"The base is {link}." if origin.name == origin.hub_id else f"The base is {origin.name}, made from {link}."


def _made_how(config: Config, run: RunDirectory, step: int) -> str:
    lora, optim = config.lora, config.optim
    steps, validations = read_log(run.path / LOG), read_log(run.path / VALIDATION)
    layers = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    settings = {
        "LoRA": f"rank {lora.rank}, alpha {lora.alpha:g}, {lora.variant or 'plain'}, dropout {lora.dropout:g}",
        "layers": f"`{layers}`",
        "steps": f"{len(steps):,} of {optim.global_batch_size:,} examples, {steps[-1]['epoch']:g} epochs",
        "this adapter": f"that of step {step:,}",
        "AdamW": f"learning rate {optim.learning_rate:g}, {optim.schedule}, warm-up {optim.warmup_ratio:.0%}, "
        f"weight decay {optim.weight_decay:g}, gradients up to norm {optim.max_grad_norm:g}",
        "rows": f"up to {config.data.max_length:,} tokens ({config.data.over_length}), targets in {_targets(config)}",
        "last training loss": f"{steps[-1]['loss']:.4f} nats a target",
    }
    losses = {line["step"]: line["loss"] for line in validations}
    best = run.best_step()
    if best is not None:
        last = validations[-1]["loss"]
        settings["validation loss"] = (
            f"{last:.4f} nats a target at the end, best {losses[best]:.4f} after step {best:,}"
        )
    told = "Trained with chatlora on what the assistant says in conversations, and the tokens that end it.\n\n"
    return told + _table(("setting", "value"), [tuple(pair) for pair in settings.items()])


def _targets(config: Config) -> str:
    return "all of a row's replies" if config.data.supervise == "all" else "a row's last reply"


def _data_table(sources: Sequence[Mapping[str, Any]]) -> str:
    numbers = ("rows_used", "rows_held_out", "turns", "targets")
    rows = [
        (public_name(one["path"]), *(f"{one[name]:,}" for name in numbers), f"{len(one['set_aside']):,}")
        for one in sources
    ]
    return _table(("data", "rows used", "held out", "turns", "targets (tokens)", "rows set aside"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("| --- ", "|---").replace("--- |", "---|")


def _use(settings: Mapping[str, Any], origin: Origin, use: Use, system: str | None) -> str:
    base = origin.hub_id if origin.hub_id == origin.name else "BASE"
    what = "" if base != "BASE" else "`BASE` is the folder of the base model. "
    servers = "".join(f"- {server} {told}\n" for server, told in use.servers.items())
    return f"""{what}All lines are run in this folder.

```python
{_python(use, system)}
```

```bash
{_vllm(settings, base, use)}
chatlora chat {base} --adapter .
chatlora merge . ../merged --base {base}  # one model, for whatever takes no adapters
```

{servers}
Tokenizer and chat template here are those of training, and `generation_config.json` names every stop token."""


def _python(use: Use, system: str | None) -> str:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": "Who are you?"})
    given = "".join(f", {name}={value!r}" for name, value in use.template_kwargs.items())
    return f"""from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer, GenerationConfig, {use.base_class}

adapter = "."
trained = PeftConfig.from_pretrained(adapter)
base = {use.base_class}.from_pretrained(trained.base_model_name_or_path, revision=trained.revision)
stops = GenerationConfig.from_pretrained(adapter).eos_token_id
base.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=stops[0], max_new_tokens=512)  # greedy
model = PeftModel.from_pretrained(base, adapter).eval()
tokenizer = AutoTokenizer.from_pretrained(adapter)

messages = {messages!r}
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"{given}
)
answer = model.generate(**prompt)[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""


def _vllm(settings: Mapping[str, Any], base: str, use: Use) -> str:
    rank = max([settings["r"], *settings["rank_pattern"].values()])
    allowed = next((each for each in VLLM_RANKS if each >= rank), None)
    if settings["use_dora"] or allowed is None:
        what = "DoRA adapter" if settings["use_dora"] else f"rank beyond {VLLM_RANKS[-1]}"
        return f"# vLLM takes no {what}: serve what `chatlora merge` makes"
    mixed = f" {MIXED_FLAG}" if MIXED_FLAG in use.servers.get("vLLM", "") else ""
    kwargs = f" --default-chat-template-kwargs '{json.dumps(use.template_kwargs)}'" if use.template_kwargs else ""
    return (
        f"vllm serve {base} --enable-lora --max-lora-rank {allowed}{mixed} --lora-modules adapter=. \\\n"
        f"    --chat-template chat_template.jinja --generation-config .{kwargs}"
    )
