"""Settings: read from YAML and flags, every mistake told at once, with place and remedy."""

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from yaml.composer import Composer

import train
from chatlora.config import Config, OptimConfig, changed_settings, trajectory_hash, with_absolute_paths
from chatlora.config_files import PRESETS, config_from_file, config_text, help_text, load_config
from chatlora.errors import ConfigError
from chatlora.training.schedule import Schedule

REPOSITORY = Path(__file__).resolve().parents[1]


def load(tmp_path: Path, yaml: str, *flags: str) -> Config:
    (tmp_path / "my.yaml").write_text(yaml, encoding="utf-8")
    return load_config([str(tmp_path / "my.yaml"), *flags], default="demo").config


def problems(tmp_path: Path, yaml: str, *flags: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, yaml, *flags)
    return str(caught.value)


def test_flags_go_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "optim: {learning_rate: 1e-4, epochs: 2}\ndata: {train: a.jsonl}",
        "--optim.learning_rate",
        "3e-4",
        "--data.train=[b.jsonl, {path: c.csv, repeat: 2}]",
        "--model.chat_template_kwargs",
        "{enable_thinking: false}",
        "--data.system",
        "[INST] {a",
    )
    assert config.data.system == "[INST] {a"
    assert config.optim.learning_rate == 3e-4
    assert config.optim.epochs == 2
    assert config.optim.global_batch_size == OptimConfig().global_batch_size
    assert [(source.path, source.repeat) for source in config.data.train] == [("b.jsonl", 1), ("c.csv", 2)]
    assert config.model.chat_template_kwargs == {"enable_thinking": False}


def test_all_mistakes_are_told_at_once_each_with_place_and_remedy(tmp_path: Path) -> None:
    told = problems(
        tmp_path,
        "modle: {name_or_path: x}\noptim: {learning_rat: 1e-4, epochs: many, schedule: cosin}\n"
        "data: {train: [{path: a.jsonl, colums: {}}], validation: 1.5}\nrank: 4\n",
        "--optim.schedul",
        "x",
        "--run.seed",
        "-3",
        "--lora.rank",
    )
    for sentence in (
        "my.yaml: modle is not a setting; did you mean 'model'?",
        "my.yaml: optim.learning_rat is not a setting; did you mean 'learning_rate'?",
        "my.yaml: optim.epochs is 'many'",
        "my.yaml: optim.schedule is 'cosin'",
        "my.yaml: data.train.0.colums is not a setting; did you mean 'columns'?",
        "my.yaml: data.validation is 1.5",
        "my.yaml: rank is not a setting; did you mean 'lora.rank'?",
        "--optim.schedul is not a setting; did you mean 'schedule'?",
        "--run.seed is '-3'",
        "--lora.rank needs a value",
    ):
        assert sentence in told


@pytest.mark.parametrize(
    ("yaml", "sentence"),
    [
        ("optim: {epochs: 1\n", "is not valid YAML"),
        ("optim: {epochs: 1}\noptim: {epochs: 2}\n", "'optim' stands twice"),
        ("- a\n- b\n", "holds a list"),
        ("optim: {max_tokens_per_micro_batch: 100}\n", "data.max_length = 2048"),
        ("optim: 3\n", "optim is 3"),
    ],
)
def test_broken_files_name_themselves(tmp_path: Path, yaml: str, sentence: str) -> None:
    told = problems(tmp_path, yaml)
    assert sentence in told
    assert "my.yaml" in told


def bomb(level: str) -> str:
    """Twelve lines that stand for 10 ** 11 values."""
    lines = ["a0: &a0 {k: v}"]
    for number in range(1, 12):
        aliases = ", ".join([f"*a{number - 1}"] * 10)
        lines.append(f"a{number}: &a{number} {level.format(aliases)}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("yaml", "sentence"),
    [
        (
            "model: {chat_template_date: 2026-13-45}",
            "line 1, column 29: '2026-13-45' looks like a value of type timest",
        ),
        (
            "lora: {rank: 0b_}",
            "line 1, column 14: '0b_' looks like a value of type int and is none: put text in quotes",
        ),
        ("lora: {rank: " + "9" * 5000 + "}", "line 1, column 14: '9999999"),
        ("lora: {rank: !!bool x}", "line 1, column 14: 'x' looks like a value of type bool"),
        ("{? [a] : b}", "line 1, column 4: a key is a list or a mapping"),
        ("data: {train: " + "[" * 5000 + "]" * 5000 + "}", "line 1, column 113: lists and mappings are nested more"),
        ("data:\n  train: " + "- " * 5000, "line 2, column"),
        (bomb("[{}]"), "line 5, column 20: aliases stand for more than 10,000 values"),
        (bomb("{{<<: [{}]}}"), "line 5, column 20: aliases stand for more than 10,000 values"),
        ("data: &a {train: [*a]}", "line 1, column 19: an alias stands within what it names"),
        ("optim: {<<: 3}", "expected a mapping or list of mappings for merging"),
        ("lora: !!python/name:os.system", "could not determine a constructor"),
    ],
    ids=lambda text: text[:30],
)
def test_odd_yaml_is_one_sentence(tmp_path: Path, yaml: str, sentence: str) -> None:
    told = problems(tmp_path, yaml)
    assert "my.yaml is not valid YAML at line " in told
    assert sentence in told
    assert len(told.splitlines()) == 2
    assert len(told) < 1000


def test_no_more_is_composed_than_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: after the sentence is due, nothing more of the text is looked at."""
    composed = 0
    compose = Composer.compose_node

    def counted(self: Composer, parent: Any, index: Any) -> Any:
        nonlocal composed
        composed += 1
        return compose(self, parent, index)

    monkeypatch.setattr(Composer, "compose_node", counted)
    for yaml in ("[" * 5000, bomb("[{}]"), bomb("{{<<: [{}]}}")):
        problems(tmp_path, yaml)
    assert composed < 500


def test_merge_keys_bring_what_a_mapping_does_not_say_itself(tmp_path: Path) -> None:
    text = """
    model: {chat_template_kwargs: {first: &a {x: 1, y: 2}, second: {<<: *a, y: 3}, third: {<<: [*a, {z: 4}]}}}
    data: &base {train: a.jsonl, max_length: 64}
    """
    given = load(tmp_path, text).model.chat_template_kwargs
    assert given["second"] == {"x": 1, "y": 3}
    assert given["third"] == {"x": 1, "y": 2, "z": 4}
    twice = "model: {chat_template_kwargs: {b: &b {x: 1}, a: &a {<<: *b, x: 2}, c: {<<: *a, x: 3}}}"
    assert load(tmp_path, twice).model.chat_template_kwargs["c"] == {"x": 3}
    assert "'x' stands twice" in problems(tmp_path, "lora: {<<: {rank: 2}, x: 1, x: 2}")


def test_settings_alone_go_over_the_defaults_and_the_demo_is_an_empty_command_line() -> None:
    words = ["--model.name_or_path", "m", "--data.train", "d/my rows.jsonl"]
    loaded = load_config(words, default="demo")
    assert loaded.config == Config.model_validate(
        {"model": {"name_or_path": "m"}, "data": {"train": "d/my rows.jsonl"}}
    )
    assert (loaded.name, loaded.origin) == ("my-rows", "defaults")
    demo = load_config([], default="demo")
    assert demo.config == config_from_file(PRESETS / "demo.yaml")
    assert (demo.name, demo.origin, demo.given) == ("demo", "preset demo", "")
    assert load_config(["demo", *words], default="demo").config.optim == demo.config.optim
    with pytest.raises(ConfigError, match=r"--data\.train is not given.* as in `demo --optim\.epochs 2`"):
        load_config(["--optim.epochs", "2"], default="demo")


def test_the_start_says_what_runs(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("optim: {epochs: 0.5, max_steps: 2000, schedule: linear, warmup_ratio: 0}")
    words = [str(tmp_path / "my.yaml"), "--data.train", "a b.jsonl", "--optim.learning_rate=1e-4"]
    assert load_config(words, default="demo").lines() == [
        f"{tmp_path}/my.yaml: epochs 0.5, max_steps 2,000, 16 examples a step, learning rate 0.0001 (linear, 0% "
        "warm-up), max_length 2,048",
        "on the command line: --data.train 'a b.jsonl' --optim.learning_rate 1e-4",
    ]
    assert load_config([], default="demo").lines() == [
        "preset demo: epochs 1, 8 examples a step, learning rate 0.002 (cosine, 3% warm-up), max_length 512"
    ]


def test_a_run_of_settings_alone_begins_with_what_it_goes_by(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CHATLORA_CACHE", str(world / "cache"))
    monkeypatch.chdir(tmp_path)
    words = ["--model.name_or_path", str(world / "model"), "--data.train", str(world / "rows.jsonl")]
    words += ["--data.max_length", "256", "--optim.max_steps", "1", "--run.precision", "fp32"]
    train.main(words)
    told = capsys.readouterr().err.splitlines()
    assert told[:2] == [
        "defaults: epochs 3, max_steps 1, 16 examples a step, learning rate 0.0002 (cosine, 3% warm-up), "
        "max_length 256",
        f"on the command line: {shlex.join(words)}",
    ]
    assert any(line.startswith("1 steps of 16 examples") for line in told)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("rows-")
    assert config_from_file(run_dir / "config.yaml").optim.learning_rate == 2e-4


def test_what_lies_beside_the_file_and_not_here_is_told_with_the_path_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home / "parts", home / "model", here):
        folder.mkdir(parents=True)
    (home / "rows.jsonl").touch()
    (home / "parts" / "1.jsonl").touch()
    monkeypatch.chdir(here)
    text = "model: {name_or_path: model}\ndata: {train: [rows.jsonl, parts/*.jsonl, owner/name], test: rows.jsonl}"
    (home / "my.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(["../home/my.yaml", "--data.test", "rows.jsonl"], default="demo")
    place = "../home/my.yaml:"
    assert caught.value.problems == (
        f"{place} model.name_or_path is model, which is not under {here}: write {home / 'model'}; if one of the hub is "
        "meant, give it as --model.name_or_path model",
        f"{place} data.train is rows.jsonl, which is not under {here}: write {home / 'rows.jsonl'}",
        f"{place} data.train is parts/*.jsonl, which is not under {here}: write {home / 'parts/*.jsonl'}",
    )
    monkeypatch.chdir(home)
    assert load_config(["my.yaml"], default="demo").config.data.train[0].path == "rows.jsonl"


def test_a_flag_does_not_hide_that_the_file_has_no_section_there(tmp_path: Path) -> None:
    assert "my.yaml: optim is 3" in problems(tmp_path, "optim: 3", "--optim.epochs", "1")


def test_a_missing_file_and_an_unknown_preset(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config([str(tmp_path / "none.yaml")], default="demo")
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        load_config(["demmo"], default="demo")


def test_what_is_written_is_read_back_equal(tmp_path: Path) -> None:
    config = load(tmp_path, "data: {train: 数据.jsonl, validation: [{path: v.jsonl}]}", "--run.output_dir", "runs/x")
    (tmp_path / "config.yaml").write_text(config_text(config), encoding="utf-8")
    assert config_from_file(tmp_path / "config.yaml") == config


def test_the_hash_follows_the_trajectory_alone() -> None:
    config = Config()
    same = config.with_values("run", cpu_threads=1).with_values("optim", max_tokens_per_micro_batch=9999)
    other = config.with_values("optim", learning_rate=1e-3)
    assert trajectory_hash(same) == trajectory_hash(config) != trajectory_hash(other)
    assert changed_settings(config, other) == {"optim.learning_rate": (2e-4, 1e-3)}


def test_a_mapping_is_one_source_or_names_sets_of_validation_rows(tmp_path: Path) -> None:
    def sets(validation: str) -> dict[str, list[str]]:
        data = load(tmp_path, "", "--data.validation", validation).data
        return {name: [source.path for source in sources] for name, sources in data.validation_sets.items()}

    assert sets("{path: a.jsonl}") == sets("[a.jsonl]") == sets("a.jsonl") == {"validation": ["a.jsonl"]}
    assert sets("{path: a.jsonl, split: dev, columns: {}}") == {"validation": ["a.jsonl"]}
    assert sets("{chat: a.jsonl, tools: [b.jsonl, {path: c.jsonl}]}") == {
        "chat": ["a.jsonl"],
        "tools": ["b.jsonl", "c.jsonl"],
    }
    assert sets("0.1") == sets("0") == {}
    named = load(tmp_path, "data: {validation: {chat: a.jsonl, tools: b.jsonl}}")
    (tmp_path / "config.yaml").write_text(config_text(named), encoding="utf-8")
    assert config_from_file(tmp_path / "config.yaml") == named
    (tmp_path / "b.jsonl").touch()
    with pytest.MonkeyPatch.context() as context:
        context.chdir(tmp_path)
        absolute = with_absolute_paths(named)
        assert changed_settings(named, absolute) == {}
    assert isinstance(absolute.data.validation, dict)
    assert absolute.data.validation["tools"][0].path == str(tmp_path / "b.jsonl")


def test_a_test_share_alters_the_trajectory_and_test_rows_do_not() -> None:
    config = Config()
    share = config.with_values("data", test=0.1)
    assert changed_settings(config, share) == {"data.test": ([], 0.1)}
    assert changed_settings(share, config) == {"data.test": (0.1, [])}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--", "3"], "-- is not a setting"),
        (["-e", "3"], "-e is not a setting: they are written --section.field VALUE"),
        (["--optim", "3"], "--optim is a section, not a setting"),
        (["--optim"], "--optim is a section, not a setting"),
        (["--lr"], "--lr is not a setting; did you mean 'optim.learning_rate'?"),
        (
            ["--run.seed", "9" * 23],
            "--run.seed is '99999999999999999999999': input should be less",
        ),
        (["--optim.lr", "3"], "--optim.lr is not a setting; did you mean 'optim.learning_rate'?"),
        (["--lr", "3"], "--lr is not a setting; did you mean 'optim.learning_rate'?"),
        (["--rank", "3"], "--rank is not a setting; did you mean 'lora.rank'?"),
        (["--data.train", "{path: x"], "--data.train '{path: x' is not valid YAML at line 1, column 9"),
        (
            ["--data.train", "[" * 5000 + "]"],
            "not valid YAML at line 1, column 101: lists and mappings are nested more",
        ),
        (["--data.train", f"[&a [x], {'*a, ' * 9000}*a]"], "aliases stand for more than 10,000 values"),
        (["--data.train", "[2026-13-45]"], "'2026-13-45' looks like a value of type timestamp and is none"),
        (["--style", "chatglm3"], "--style is not a setting; did you mean 'evaluation.style'?"),
        (["--data.train", ""], "--data.train.0.path is ''"),
        (["--data.validation", "null"], "--data.validation is None: a share of the training rows is expected"),
        (["--data.validation", "true"], "--data.validation is 'true': a share of the training rows is expected"),
        (["--data.validation", "{path: a, tools: b}"], "with path it is one source, which has no tools; sets of rows"),
        (["--data.validation", "{path: a, colums: {}}"], "colums is not a setting; did you mean 'columns'?"),
        (["--data.validation", "{chat: []}"], "--data.validation.chat is []"),
        (["--data.validation", "{}"], "--data.validation is {}"),
        (["--data.test", "null"], "--data.test is None: a share of the training rows is expected"),
        (["--data.test", "1"], "--data.test is 1.0"),
        (["--data.test", "0.98"], "validation (0.02) and test (0.98) are shares of the training rows that leave none"),
        (["--optim.epochs", "inf"], "--optim.epochs is 'inf'"),
        (["--optim.learning_rate", "nan"], "--optim.learning_rate is 'nan'"),
        (["--optim.weight_decay", "inf"], "--optim.weight_decay is 'inf'"),
        (["--optim.max_grad_norm", "nan"], "--optim.max_grad_norm is 'nan'"),
        (["--lora.alpha", "inf"], "--lora.alpha is 'inf'"),
        (["--model.name_or_path", ""], "--model.name_or_path is ''"),
    ],
)
def test_odd_flags_are_told_in_a_sentence(tmp_path: Path, words: list[str], sentence: str) -> None:
    told = problems(tmp_path, "optim: {max_steps: 1}", *words)
    assert sentence in told
    assert len(told.splitlines()) == 2


def test_the_gradient_may_go_unclipped_and_is_so_when_read_back(tmp_path: Path) -> None:
    config = load(tmp_path, "", "--optim.max_grad_norm", "inf")
    assert config.optim.max_grad_norm == math.inf
    (tmp_path / "config.yaml").write_text(config_text(config))
    assert config_from_file(tmp_path / "config.yaml") == config
    assert Config.model_validate(json.loads(json.dumps(config.as_dict()))) == config


def test_paths_become_absolute_where_they_exist_and_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("gpt2").touch()
    Path("rows.jsonl").touch()
    flags = ("--data.train", "[rows.jsonl, parts/*.jsonl, owner/name, 'embedded:x.jsonl']")
    given = load(tmp_path, "", "--model.name_or_path", "model", *flags)
    config = with_absolute_paths(given)
    assert config.model.name_or_path == str(tmp_path / "model")
    wanted = [str(tmp_path / "rows.jsonl"), str(tmp_path / "parts/*.jsonl"), "owner/name", "embedded:x.jsonl"]
    assert [source.path for source in config.data.train] == wanted
    assert not changed_settings(config, given)
    assert changed_settings(config, given.with_values("model", name_or_path="elsewhere")).keys() == {
        "model.name_or_path"
    }
    hub = given.with_values("model", name_or_path="gpt2")  # a file of that name is no model
    assert with_absolute_paths(hub).model.name_or_path == "gpt2"


def test_help_shows_choices_and_defaults_as_yaml_has_them_in_one_column() -> None:
    lines = {line.split()[0]: line for line in help_text("").splitlines() if line.startswith("  --")}
    assert lines["--data.over_length"].endswith("(fit | cut | drop | error) [fit]")
    assert lines["--lora.variant"].endswith("(rslora | dora | null) [null]")
    assert lines["--checkpoint.keep_best"].endswith("[true]")
    assert lines["--data.train"].endswith("[]]")
    assert "(" not in lines["--optim.max_tokens_per_micro_batch"].replace("max(", "")
    assert all(line[38] == " " != line[39] for line in lines.values())


def test_every_preset_is_valid() -> None:
    presets = sorted(PRESETS.glob("*.yaml"))
    assert {"demo", "qwen3", "8b-24gb", "chatglm3"} <= {path.stem for path in presets}
    for path in presets:
        config_from_file(path)


def test_no_more_than_sixty_settings_each_described() -> None:
    lines = [line for line in help_text("").splitlines() if line.startswith("  --")]
    assert len(lines) <= 60
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_help_needs_no_heavy_import(script: str) -> None:
    code = (
        f"import runpy, sys; sys.argv = ['{script}', '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'a heavy import'"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert "usage:" in told.stdout


class TestTimetable:
    optim = OptimConfig(epochs=2, learning_rate=1.0, warmup_ratio=0.1)

    def rates(self, name: str) -> list[float]:
        schedule = Schedule(self.optim.model_copy(update={"schedule": name}), steps_per_epoch=10, every_steps=3)
        return [schedule.learning_rate(step) for step in range(schedule.num_steps)]

    def test_closed_forms(self) -> None:
        assert self.rates("constant") == [0.5, *[1.0] * 19]
        assert self.rates("linear")[:4] == [0.5, 1.0, 1.0, 1 - 1 / 18]
        assert self.rates("cosine")[11] == (1 + math.cos(math.pi * 9 / 18)) / 2
        assert len(self.rates("cosine")) == 20

    def test_half_an_epoch_and_a_limit(self) -> None:
        assert Schedule(OptimConfig(epochs=0.5), 7, 3).num_steps == 4
        assert Schedule(OptimConfig(max_steps=3), 7, 3).num_steps == 3

    def test_checkpoints(self) -> None:
        schedule = Schedule(OptimConfig(epochs=2), 4, every_steps=3)
        assert [done for done in range(9) if schedule.is_checkpoint_step(done)] == [3, 6, 8]


@pytest.mark.parametrize("number", ["0x" + "f" * 9000, ":".join("1" * 5000)])
def test_a_number_that_python_does_not_spell_is_one_sentence(tmp_path: Path, number: str) -> None:
    (tmp_path / "my.yaml").write_text(f"optim: {{epochs: {number}}}\n")
    with pytest.raises(ConfigError, match=r"my\.yaml.*looks like a value of type int and is none"):
        load_config([str(tmp_path / "my.yaml")], default="demo")


def test_shares_that_leave_nothing_are_told_by_flag() -> None:
    flags = ["--data.train", "rows.jsonl", "--data.test", "0.6", "--data.validation", "0.5"]
    with pytest.raises(ConfigError, match="leave") as refused:
        load_config(flags, default="demo")
    assert "None" not in str(refused.value)


def test_a_runs_config_in_the_folder_one_stands_in_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("data: {train: rows.jsonl}\n")
    assert load_config(["config.yaml"], default="demo").name == tmp_path.name


def test_patterns_that_begin_with_a_bracket_are_text() -> None:
    flags = ["--data.train", "[a-z]*.jsonl", "--lora.target_modules", "[qv]_proj"]
    config = load_config(flags, default="demo").config
    assert (config.data.train[0].path, config.lora.target_modules) == ("[a-z]*.jsonl", "[qv]_proj")
    config = load_config(["--data.train", "[a.jsonl, b.jsonl]"], default="demo").config
    assert [source.path for source in config.data.train] == ["a.jsonl", "b.jsonl"]


def test_the_order_of_validation_sets_matters_where_the_first_decides() -> None:
    sets = {name: [{"path": f"{name}.jsonl"}] for name in ("chat", "tools")}
    one, other = (
        Config.model_validate({"data": {"validation": each}}) for each in (sets, dict(reversed(sets.items())))
    )
    assert trajectory_hash(one) == trajectory_hash(other)
    assert changed_settings(one, other) == {}
    one, other = (each.with_values("checkpoint", best_by="first") for each in (one, other))
    assert trajectory_hash(one) != trajectory_hash(other)
    assert changed_settings(one, other) == {"checkpoint.best_by": ("first (chat)", "first (tools)")}
