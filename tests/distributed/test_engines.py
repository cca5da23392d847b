"""One batch, one gradient: whatever the engine, the number of processes, the budget and the layout.

Real runs of train.py, forked with the variables that `accelerate launch` sets, against plain PyTorch. Every test
asserts which engine ran, on both ranks, from the parameters themselves.
"""

import json
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from chatlora.checkpoint_names import home_of
from chatlora.config import DataConfig
from chatlora.config_files import load_config
from chatlora.data.dataset import prepare_training_data
from chatlora.model.loading import load_tokenizer, renderer_for
from chatlora.rendering.examples import Example
from chatlora.run_directory import read_status
from chatlora.run_log import read_log
from chatlora.training.checkpoint import Checkpoint, read_checkpoint
from chatlora.training.schedule import Schedule
from tests.distributed.test_launch_checks import AUTO_JSON
from tests.engine_runs import ENGINES, assert_engine, environment_of
from tests.fork_server import ForkServer
from tests.reference import distance, reference

STEPS = 8  # the fifth has a single row: fewer rows than ranks, and a rank without a target
GRADIENT, WEIGHTS, LOSS = 5e-6, 2e-5, 5e-6  # relative
FLAGS = ["--lora.dropout", "0", "--optim.max_steps", str(STEPS), "--checkpoint.keep_last", str(STEPS)]
EACH_STEP = ["--checkpoint.every_steps", "1"]
UNCLIPPED = [*EACH_STEP, "--optim.max_grad_norm", "inf"]  # AdamW's first moment is then a tenth of the gradient
WORKED = "from tests.engine_runs import *; start_from_a_worked_adapter(); "
Train = Callable[..., Path]


@pytest.fixture(scope="session")
def examples(world: Path) -> list[Example]:
    config = load_config([str(world / "my.yaml")], default="demo").config
    tokenizer = load_tokenizer(config.model)
    data: DataConfig = config.data
    prepared = prepare_training_data(
        data,
        config.run.seed,
        lambda any_reasoning: renderer_for(tokenizer, config.model, config.data, any_reasoning=any_reasoning),
        cache=world / "cache" / "reference",
        say=lambda line: None,
    )
    return prepared.train.fetch(range(len(prepared.train)))


@pytest.fixture(scope="session")
def expected(world: Path, examples: list[Example]) -> list[dict[str, torch.Tensor]]:
    assert len(examples) % 16 == 1
    return reference(world, [*FLAGS, *UNCLIPPED], examples, STEPS)


@pytest.fixture
def train(server: ForkServer, world: Path, tmp_path: Path) -> Train:
    """`train("zero2", "--optim.epochs", "1", witness="...")` trains on two ranks and returns the run directory."""

    def run(
        config: str | None,
        *flags: str,
        witness: str = "",
        name: str = "",
        world: Path = world,
        environment: Mapping[str, str] | None = None,
        statuses: tuple[int, ...] = (0,),
    ) -> Path:
        folder = tmp_path / (name or config or "single")
        ranks = 1 if config is None else 2
        variables = {**environment_of(config), **(environment or {})}
        noting = f"from tests.engine_runs import *; note_engine({str(folder) + '-info'!r}); "
        found = server.run(
            [str(world / "my.yaml"), "--run.output_dir", str(folder), *flags],
            tmp_path,
            ranks=ranks,
            environment=variables,
            broken=noting + witness,
        )
        assert set(found) <= set(statuses), server.log.read_text()[-6000:]
        return folder

    return run


def slow(values: tuple[Any, ...]) -> Any:
    """A row of parameters for `-m slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)


def state(folder: Path, step: int) -> Checkpoint:
    return read_checkpoint(home_of(folder / "checkpoints", step))


def gradient(folder: Path) -> dict[str, torch.Tensor]:
    return {name: moment / (1 - 0.9) for name, moment in state(folder, 1).optimizer["exp_avg"].items()}


def launch_info_of(folder: Path) -> Path:
    return folder.with_name(folder.name + "-info")


# ---- against plain PyTorch


WAYS = list(product([None, "multi_gpu"], ["256", "700", "100000"], ["packed", "padded"], ["false", "true"]))
FIRST = [way for way in WAYS if (way[1] == "700") == (way[2] == "padded") and (way[1] == "256") == (way[3] == "false")]


@pytest.mark.parametrize(
    ("config", "budget", "layout", "checkpointing"), [*FIRST, *(slow(w) for w in WAYS if w not in FIRST)]
)
def test_plain_pytorch_over_the_whole_batch(
    train: Train,
    expected: list[dict[str, torch.Tensor]],
    config: str | None,
    budget: str,
    layout: str,
    checkpointing: str,
) -> None:
    flags = ["--optim.max_tokens_per_micro_batch", budget, "--model.gradient_checkpointing", checkpointing]
    witness = WORKED + ("pad_instead_of_pack()" if layout == "padded" else "")
    folder = train(config, *FLAGS, *UNCLIPPED, *flags, witness=witness)
    ran = json.loads((folder / "environment.json").read_text())
    assert ran["padded"] == (layout == "padded")
    assert ran["num_processes"] == (1 if config is None else 2)
    if config is not None:
        assert_engine("ddp", launch_info_of(folder))
    off = distance(gradient(folder), expected[0]), distance(state(folder, STEPS).adapter, expected[1])
    what = f"{ran['engine']}, budget {budget}, {layout}, checkpointing {checkpointing}"
    print(f"{what}: gradient {off[0]:.1e}, weights {off[1]:.1e}")
    assert off[0] <= GRADIENT
    assert off[1] <= WEIGHTS


def test_a_mean_of_means_misses_by_far(train: Train, expected: list[dict[str, torch.Tensor]]) -> None:
    flags = ["--optim.max_tokens_per_micro_batch", "256"]
    folder = train("multi_gpu", *FLAGS, *UNCLIPPED, *flags, witness=WORKED + "mean_of_means()")
    off = distance(gradient(folder), expected[0]), distance(state(folder, STEPS).adapter, expected[1])
    print(f"mean of means: gradient {off[0]:.1e}, weights {off[1]:.1e}")
    assert off[0] > 100 * GRADIENT
    assert off[1] > 100 * WEIGHTS


# ---- engine against engine


def everything_partitioned(tmp_path: Path) -> dict[str, str]:
    """ZeRO-3 that leaves no small parameter whole."""
    settings = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (tmp_path / "all.json").write_text(json.dumps(settings))
    return {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "all.json")}


@pytest.fixture(scope="module")
def alone(server: ForkServer, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert server.run([str(world / "my.yaml"), "--run.output_dir", str(folder), *FLAGS], world, broken=WORKED) == [0]
    return folder


@pytest.mark.parametrize(("config", "whole"), [*((config, False) for config in ENGINES), ("zero3", True)])
def test_every_engine_computes_what_one_process_computes(
    train: Train, alone: Path, world: Path, tmp_path: Path, config: str, whole: bool
) -> None:
    folder = train(config, *FLAGS, witness=WORKED, environment=everything_partitioned(tmp_path) if whole else None)
    info = assert_engine(ENGINES[config], launch_info_of(folder), everything_partitioned=whole)
    assert info["offload"] == ("cpu" if config == "zero3_offload" else None)
    ours, theirs = read_log(folder / "log.jsonl"), read_log(alone / "log.jsonl")
    losses = max(abs(one["loss"] / other["loss"] - 1) for one, other in zip(ours, theirs, strict=True))
    norms = max(abs(one["grad_norm"] / other["grad_norm"] - 1) for one, other in zip(ours, theirs, strict=True))
    weights = distance(state(folder, STEPS).adapter, state(alone, STEPS).adapter)
    print(f"{config} {whole}: loss {losses:.1e}, gradient norm {norms:.1e}, adapter {weights:.1e}")
    assert max(losses, norms) <= LOSS
    assert weights <= WEIGHTS
    validation = [line["loss"] for line in read_log(folder / "validation.jsonl")]
    assert validation == pytest.approx([line["loss"] for line in read_log(alone / "validation.jsonl")], rel=LOSS)
    optim = load_config([str(world / "my.yaml"), *FLAGS], default="demo").config.optim
    schedule = Schedule(optim, 5, 1)
    assert [line["learning_rate"] for line in ours] == [schedule.learning_rate(step) for step in range(STEPS)]
    assert_exported(folder, world, state(folder, STEPS).adapter, alone)


def assert_exported(folder: Path, world: Path, weights: dict[str, torch.Tensor], like: Path) -> None:
    """The adapter is what was trained, under the names and shapes of one process, and plain PEFT loads it."""
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    other = load_file(like / "adapter" / "adapter_model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in saved.items()} == {n: (t.shape, t.dtype) for n, t in other.items()}
    assert len(saved) == len(weights)
    assert all(torch.equal(saved[name.replace(".default", "")], tensor) for name, tensor in weights.items())
    settings = "adapter/adapter_config.json"
    assert json.loads((folder / settings).read_text()) == json.loads((like / settings).read_text())
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "model"), folder / "adapter")
    loaded = dict(model.named_parameters())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


@pytest.fixture(scope="module")
def alone_in_bf16(server: ForkServer, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    flags = [*FLAGS, "--run.precision", "bf16", "--run.output_dir", str(folder)]
    assert server.run([str(world / "my.yaml"), *flags], world, broken=WORKED) == [0]
    return folder


@pytest.mark.parametrize("config", ["zero2", "zero3", "fsdp2"])
def test_a_bf16_base_stays_bf16_and_the_adapter_fp32(train: Train, alone_in_bf16: Path, config: str) -> None:
    folder = train(config, *FLAGS, "--run.precision", "bf16", witness=WORKED)
    info = assert_engine(ENGINES[config], launch_info_of(folder))
    assert info["base"] == ["torch.bfloat16"]
    if config == "zero3":
        assert info["base_parts"] == ["torch.bfloat16"]  # loaded spread, and not in fp32
    pairs = zip(read_log(folder / "log.jsonl"), read_log(alone_in_bf16 / "log.jsonl"), strict=True)
    off = max(abs(ours["loss"] / theirs["loss"] - 1) for ours, theirs in pairs)
    print(f"{config}, bf16: loss {off:.1e}")
    assert off <= 1e-2


# ---- one infinite gradient


INFINITE = [("multi_gpu", "gradient"), ("zero2", "gradient"), ("zero3", "gradient"), ("fsdp2", "gradient")]
INFINITE += [("zero2", "loss")]
INFINITE_TOO = [("zero1", "gradient"), *((config, "loss") for config in ("multi_gpu", "zero1", "zero3", "fsdp2"))]


@pytest.mark.parametrize(("config", "how"), [*INFINITE, *map(slow, INFINITE_TOO)])
def test_an_infinite_gradient_on_one_rank_moves_nothing_on_any(
    train: Train, tmp_path: Path, config: str, how: str
) -> None:
    small = ["--optim.max_tokens_per_micro_batch", "100000"]  # one micro-batch a step: the third is the third step's
    planted = f"poison(1, 3, {how!r}, {str(tmp_path / 'left')!r})"
    folder = train(config, *FLAGS, *EACH_STEP, *small, witness=WORKED + planted, statuses=(1,))
    assert_engine(ENGINES[config], launch_info_of(folder))
    status = read_status(folder)
    assert status["state"] == "failed"
    assert "rows.jsonl:" in status["message"]
    assert [line["step"] for line in read_log(folder / "log.jsonl")] == [1, 2]
    before = state(folder, 2)
    for rank in (0, 1):
        left = torch.load(tmp_path / f"left-{rank}.pt", weights_only=True)
        assert all(torch.equal(tensor, before.adapter[name]) for name, tensor in left["adapter"].items())
        assert left["optimizer"].keys() == before.optimizer.keys()
        for kind, kept in left["optimizer"].items():
            assert all(torch.equal(tensor, before.optimizer[kind][name]) for name, tensor in kept.items())


# ---- tied embeddings


@pytest.fixture(scope="session")
def tied(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows and a model whose head is its embedding."""
    folder = tmp_path_factory.mktemp("tied")
    for path in (world / "model").iterdir():
        if "safetensors" not in path.name:
            (folder / "model").mkdir(exist_ok=True)
            (folder / "model" / path.name).write_bytes(path.read_bytes())
    config = LlamaConfig.from_pretrained(world / "model")
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    text = (world / "my.yaml").read_text(encoding="utf-8").replace(f"{world}/model", f"{folder}/model")
    (folder / "my.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("config", ["zero3", "fsdp2"])
def test_tied_embeddings_train_and_save_as_under_one_process(
    train: Train, tied: Path, tmp_path: Path, config: str
) -> None:
    one = train(None, *FLAGS, world=tied, witness=WORKED)
    everything = everything_partitioned(tmp_path) if config == "zero3" else None
    folder = train(config, *FLAGS, world=tied, witness=WORKED, environment=everything)
    assert_engine(ENGINES[config], launch_info_of(folder), everything_partitioned=config == "zero3")
    off = distance(state(folder, STEPS).adapter, state(one, STEPS).adapter)
    print(f"{config}, tied: {off:.1e}")
    assert off <= WEIGHTS
    assert_exported(folder, tied, state(folder, STEPS).adapter, one)


# ---- from engine to engine

LONG = ["--lora.dropout", "0", "--optim.schedule", "constant", "--optim.warmup_ratio", "0"]
MOVES: list[tuple[str | None, str | None]] = [("zero3", None), (None, "multi_gpu"), ("fsdp2", "zero2")]
OTHERS = [(a, b) for a in (None, *ENGINES) for b in (None, *ENGINES) if (a, b) not in MOVES]


def go_on(train: Train, alone: Path, first: str | None, second: str | None) -> None:
    """Stopped after 4 steps under one engine, 8 more under another: against 12 of one process."""
    folder = train(first, *LONG, "--optim.max_steps", "4", name="moved")
    if first is not None:
        assert_engine(ENGINES[first], launch_info_of(folder))
    assert train(second, *LONG, "--optim.max_steps", "12", name="moved") == folder
    if second is not None:
        assert_engine(ENGINES[second], launch_info_of(folder))
    moved, stayed = state(folder, 12), state(alone, 12)
    off = {"weights": distance(moved.adapter, stayed.adapter)}
    off |= {kind: distance(kept, stayed.optimizer[kind]) for kind, kept in moved.optimizer.items()}
    print(f"{first} -> {second}: " + ", ".join(f"{what} {value:.1e}" for what, value in off.items()))
    assert max(off.values()) <= 1e-5
    losses = [line["loss"] for line in read_log(folder / "log.jsonl")]
    assert losses == pytest.approx([line["loss"] for line in read_log(alone / "log.jsonl")], rel=1e-5)


@pytest.fixture(scope="module")
def twelve(server: ForkServer, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twelve") / "run"
    flags = [*LONG, "--optim.max_steps", "12", "--run.output_dir", str(folder)]
    assert server.run([str(world / "my.yaml"), *flags], world) == [0]
    return folder


@pytest.mark.parametrize(("first", "second"), [*MOVES, *map(slow, OTHERS)])
def test_a_run_goes_on_under_another_engine(train: Train, twelve: Path, first: str | None, second: str | None) -> None:
    go_on(train, twelve, first, second)


def bits(folder: Path, step: int) -> dict[str, Any]:
    found = state(folder, step)
    return {"adapter": found.adapter, **found.optimizer}


@pytest.mark.parametrize("config", ["zero3", *map(slow, [("zero2",), ("fsdp2",)])])
def test_under_the_same_engine_a_resumed_run_is_the_same_to_the_bit(train: Train, config: str) -> None:
    flags = [*LONG, "--lora.dropout", "0.1"]
    whole = train(config, *flags, "--optim.max_steps", "4", name="whole")
    train(config, *flags, "--optim.max_steps", "2", name="parts")
    parts = train(config, *flags, "--optim.max_steps", "4", name="parts")
    assert_engine(ENGINES[config], launch_info_of(parts))
    one, other = bits(whole, 4), bits(parts, 4)
    for kind, tensors in one.items():
        assert all(torch.equal(tensor, other[kind][name]) for name, tensor in tensors.items()), kind


# ---- evaluation


ANSWERED = [("zero3", 1), ("fsdp2", 7)]
ANSWERED_TOO = [(config, rows) for config in ENGINES for rows in (1, 7) if (config, rows) not in ANSWERED]


@pytest.mark.parametrize(("config", "rows"), [*ANSWERED, *map(slow, ANSWERED_TOO)])
def test_evaluation_answers_every_sample_once_as_one_process_does(
    server: ForkServer, alone: Path, world: Path, tmp_path: Path, config: str, rows: int
) -> None:
    """More ranks than samples, numbers that do not divide, answers of different lengths, unequal shares."""
    lines = (world / "rows.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
    (tmp_path / "held_out.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = [str(alone), "--data", "held_out.jsonl", "--compare", "base", "--evaluation.max_new_tokens", "12"]
    flags += ["--evaluation.max_tokens_per_batch", "400", "--run.precision", "fp32"]
    noting = f"from tests.engine_runs import note_generation; note_generation({str(tmp_path / 'info')!r})"
    assert server.run([*flags, "--output_dir", "one"], tmp_path, script="evaluate") == [0]
    environment = environment_of(config)
    options = {"ranks": 2, "script": "evaluate", "environment": environment, "broken": noting}
    found = server.run([*flags, "--output_dir", "two"], tmp_path, **options)
    assert found == [0, 0], server.log.read_text()[-6000:]
    for rank in (0, 1):
        info = json.loads((tmp_path / f"info-{rank}.json").read_text())
        assert info["engine"] == ENGINES[config]
        assert info["spread"] == (info["base"] if ENGINES[config] in ("zero3", "fsdp2") else 0)
    for folder in ("{}", "{}-base"):
        one, two = (tmp_path / folder.format(name) / "predictions.jsonl" for name in ("one", "two"))
        assert two.read_text(encoding="utf-8") == one.read_text(encoding="utf-8")
    ids = [(line["id"], line["turn"]) for line in map(json.loads, two.read_text(encoding="utf-8").splitlines())]
    assert len(ids) == len(set(ids)) >= rows


# ---- settings of the user's, and patience


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [True, False])
def test_a_json_full_of_auto_is_the_right_run(train: Train, alone: Path, tmp_path: Path, blocks: bool) -> None:
    settings = {name: value for name, value in AUTO_JSON.items() if blocks or name not in ("optimizer", "scheduler")}
    (tmp_path / "auto.json").write_text(json.dumps(settings))
    chosen = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "auto.json")}
    folder = train("zero3", *FLAGS, witness=WORKED, environment=chosen)
    assert_engine("zero3", launch_info_of(folder))
    assert distance(state(folder, STEPS).adapter, state(alone, STEPS).adapter) <= WEIGHTS


SLOW_DATA = """
import time, datetime
from chatlora.distributed import engines
from chatlora.training import setup
engines.TIMEOUT = datetime.timedelta(seconds=10)
prepare = setup.prepare_training_data
def slowly(*given, **named):
    prepared = prepare(*given, **named)
    time.sleep(20 if os.environ["RANK"] == "1" else 0)
    return prepared
setup.prepare_training_data = slowly
"""
IMPATIENT = "from chatlora.distributed.runtime import Runtime; Runtime.barrier = lambda runtime: None\n"


@pytest.mark.slow
@pytest.mark.parametrize(("broken", "statuses"), [("", (0,)), (IMPATIENT, (1,))])
def test_data_may_take_longer_than_a_collective(train: Train, broken: str, statuses: tuple[int, ...]) -> None:
    train("multi_gpu", "--optim.max_steps", "1", witness=SLOW_DATA + broken, statuses=statuses)


OTHER_ROWS = """
import dataclasses
from chatlora.training import setup
prepare = setup.prepare_training_data
def elsewhere(*given, **named):
    prepared = prepare(*given, **named)
    return prepared if os.environ["RANK"] == "0" else dataclasses.replace(prepared, fingerprint="other")
setup.prepare_training_data = elsewhere
"""


def test_a_machine_with_other_rows_is_refused(train: Train, server: ForkServer) -> None:
    train("multi_gpu", "--optim.max_steps", "1", witness=OTHER_ROWS, statuses=(1, 2))
    assert "the contents of data.train or data.validation is not what rank 0 has" in server.log.read_text()


@pytest.mark.parametrize("config", ["zero3", "fsdp2"])
def test_experts_train_under_fsdp2_and_are_refused_in_a_sentence_under_zero3(
    train: Train, world: Path, tmp_path: Path, server: ForkServer, config: str
) -> None:
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=len(tokenizer), **shape, **experts)).save_pretrained(
        tmp_path / "model"
    )
    flags = [*FLAGS, "--model.name_or_path", str(tmp_path / "model"), "--optim.max_steps", "2"]
    if config == "zero3":
        folder = train(config, *flags, statuses=(2,))
        assert "accelerate_configs/fsdp2.yaml" in read_status(folder)["message"]
        return
    one, folder = train(None, *flags), train(config, *flags)
    assert_engine("fsdp2", launch_info_of(folder))
    assert distance(state(folder, 2).adapter, state(one, 2).adapter) <= WEIGHTS
