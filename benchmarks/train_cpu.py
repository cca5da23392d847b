"""Training speed on this machine's CPU: this project's loop against transformers' Trainer.

    python benchmarks/train_cpu.py [--data FILE] [--steps N] [--rounds N]

Both train the same LoRA on the same rows, rendered once, in the same steps of 16 examples, with all cores, on the
embedded SmolLM2-135M. Each measurement is a process of its own; the contenders take turns, so that a noisy machine is
noisy for both. Tokens are real ones: padding does not count. Read the ratios, not the absolute figures.

The Trainer runs with good settings, not its defaults: no gradient checkpointing, fused AdamW, padding to the longest
of a batch, and in bf16 autocast over an fp32 base (a bf16 base with padded masks is slower still on a CPU).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
BATCH, WARM_UP = 16, 1
MODEL = "embedded:smollm2-135m-instruct"


def config_for(data: str, precision: str, chat_template: str | None, max_length: int) -> Any:
    from chatlora.config import Config

    return Config.model_validate(
        {
            "model": {"name_or_path": MODEL, "chat_template": chat_template},
            "data": {"train": data, "validation": 0, "max_length": max_length},
            "optim": {"global_batch_size": BATCH, "learning_rate": 2e-4, "schedule": "constant", "warmup_ratio": 0},
            "run": {"precision": precision},
        }
    )


def rendered(config: Any) -> Any:
    """The same examples for every contender."""
    from chatlora.cache import cache_root
    from chatlora.data.dataset import prepare_training_data
    from chatlora.model.loading import load_tokenizer, renderer_for

    tokenizer = load_tokenizer(config.model)
    return prepare_training_data(
        config.data,
        config.run.seed,
        lambda any_reasoning: renderer_for(tokenizer, config.model, config.data, any_reasoning=any_reasoning),
        cache=cache_root(),
        say=lambda line: None,
    ).train


def chatlora(config: Any, steps: int, rows_at_a_time: int) -> Iterator[tuple[int, float, float]]:
    """(tokens, seconds, loss) of each step of train.py itself, from its log."""
    import tempfile

    import train
    from chatlora.run_log import read_log

    with tempfile.TemporaryDirectory() as folder:
        run, settings = Path(folder) / "run", Path(folder) / "bench.yaml"
        config = config.with_values("run", output_dir=run).with_values("optim", max_steps=steps)
        settings.write_text(json.dumps(config.as_dict()), encoding="utf-8")  # JSON is YAML
        train.main([str(settings)])
        for line in read_log(run / "log.jsonl"):
            yield line["num_tokens"], line["seconds"], line["loss"]


def trainer(config: Any, steps: int, rows_at_a_time: int) -> Iterator[tuple[int, float, float]]:
    """(tokens, seconds, loss) of each step of transformers' Trainer on the same examples in the same steps."""
    import tempfile

    import torch
    from torch.utils.data import Dataset, Sampler, SequentialSampler
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    from chatlora.data.batches import GlobalBatches
    from chatlora.model.loading import load_base_model, load_tokenizer
    from chatlora.model.lora import add_lora

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    examples = rendered(config)
    batches = GlobalBatches(examples.lengths, examples.num_targets, BATCH, 1024, config.run.seed, 1)
    order = [index for step in range(steps) for index in sorted(batches[step].indices.tolist())]
    model = add_lora(load_base_model(config.model, dtype=torch.float32), config.lora, config.run.seed)
    model.config.use_cache = False
    ticks: list[float] = []

    class Rows(Dataset[Any]):
        def __len__(self) -> int:
            return len(order)

        def __getitem__(self, position: int) -> dict[str, list[int]]:
            (example,) = examples.fetch([order[position]])
            ids = example.input_ids
            return {"input_ids": ids, "labels": example.labels, "attention_mask": [1] * len(ids)}

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Sampler[int]:
            return SequentialSampler(range(len(order)))

    class Ticks(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ticks.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ticks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            use_cpu=True,
            bf16=config.run.precision == "bf16",
            per_device_train_batch_size=rows_at_a_time,
            gradient_accumulation_steps=BATCH // rows_at_a_time,
            max_steps=steps,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        tokenizer = load_tokenizer(config.model)
        runner = InOrder(
            model,
            arguments,
            train_dataset=Rows(),
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
            callbacks=[Ticks()],
        )
        runner.train()
        losses = [entry["loss"] for entry in runner.state.log_history if "loss" in entry]
    for step in range(steps):
        yield batches[step].num_tokens, ticks[step + 1] - ticks[step], losses[step]


CONTENDERS = {"chatlora": chatlora, "Trainer": trainer}


def measure(name: str, precision: str, arguments: argparse.Namespace) -> None:
    """One process's work: steps as JSON on the last line of standard output, with the peak memory."""
    import resource

    config = config_for(arguments.data, precision, arguments.chat_template, arguments.max_length)
    found = list(CONTENDERS[name](config, arguments.steps + WARM_UP, arguments.trainer_batch))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"steps": found, "peak_gib": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default="embedded:demo/train.jsonl", help="training rows, in any form that train.py takes"
    )
    parser.add_argument("--chat_template", help="a Jinja file, for rows that the model's own template cannot render")
    parser.add_argument("--max_length", type=int, default=512, help="tokens; whole turns are kept")
    parser.add_argument(
        "--trainer_batch",
        type=int,
        default=8,
        choices=[1, 2, 4, 8, 16],
        help="rows that the Trainer takes at a time; 4 where rows reach 1,024 tokens, or it outgrows 24 GB",
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps of one measurement")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each contender")
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], help="default: what this CPU multiplies")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, precision = arguments.measure
        measure(name, precision, arguments)
        return

    import torch

    from chatlora.distributed.precision import multiplies_bf16

    bf16 = multiplies_bf16(torch.device("cpu"))
    precisions = arguments.precision or (["fp32", "bf16"] if bf16 else ["fp32"])
    vectors = "AVX512-BF16" if torch.cpu.get_capabilities().get("avx512_bf16") else "AVX2 or other"
    print(f"{torch.cpu.get_capabilities().get('cpu_name')}, {os.cpu_count()} cores, {vectors}; {arguments.data}\n")
    print("| precision | contender | tokens/s (median step) | best step | peak GiB | loss of the last step |")
    print("|---|---|---|---|---|---|")
    for precision in precisions:
        speeds: dict[str, float] = {}
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
        for _ in range(arguments.rounds):
            for name in CONTENDERS:
                runs[name].append(in_a_process(name, precision, arguments))
        for name, measured in runs.items():
            each = [tokens / seconds for run in measured for tokens, seconds, _ in run["steps"][WARM_UP:]]
            speeds[name] = statistics.median(each)
            peak, loss = max(run["peak_gib"] for run in measured), measured[0]["steps"][-1][2]
            print(f"| {precision} | {name} | {speeds[name]:.0f} | {max(each):.0f} | {peak:.1f} | {loss:.4f} |")
        print(f"| {precision} | **ratio** | **{speeds['chatlora'] / speeds['Trainer']:.2f}** | | | |", flush=True)


def in_a_process(name: str, precision: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", name, precision]
    for option in ("data", "steps", "max_length", "trainer_batch"):
        command += [f"--{option}", str(getattr(arguments, option))]
    if arguments.chat_template:
        command += ["--chat_template", arguments.chat_template]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    told = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if told.returncode:
        sys.exit(f"{name} in {precision} failed:\n{told.stderr[-3000:]}")
    outcome: dict[str, Any] = json.loads(told.stdout.strip().splitlines()[-1])
    return outcome


if __name__ == "__main__":
    main()
