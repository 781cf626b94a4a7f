"""Test that built commands run as printed: through a shell and Hydra's grammar every value arrives unchanged."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from cogflow.config.command import (
    SettingValue,
    command,
    command_again,
    options,
    repeated,
    running,
    same_settings,
    typed_command,
)
from cogflow.config.compose import compose
from cogflow.config.run_section import RunConfig, run_at
from tests.shell_words import words_of

ODD = [
    "a b",
    " a ",
    "it's",
    'say "hi"',
    "a=b",
    "a,b",
    "[a]",
    "{a: b}",
    "(a)",
    "$HOME",
    "${x}",
    "a\\${x}",
    "`ls`",
    "a;b&c|d>e",
    "~/a",
    "*?",
    "!x",
    "#x",
    "a\\",
    "\\",
    "a\\'b",
    "ü/漢字/é",
    "true",
    "null",
    "1e5",
    "007",
    "-1",
    ".5",
    "line\nbreak",
    "tab\tstop",
    "%s",
    "@a",
    ":",
    "a:b",
]
ALPHABET = [*"ab/ '\"\\$,=[](){}:;#@!&|<>*?~`%^+-._0127é漢\t\n", "${", "${a}", "\\'", "true", "\\${"]


@pytest.mark.parametrize("text", ODD)
def test_a_value_arrives_unchanged(text: str) -> None:
    config = compose(words_of(command("export", {"stage.source": Path("/x") / text, "stage.output": text})))
    assert (config.stage.source, config.stage.output) == (str(Path("/x") / text), text)


def test_random_texts_arrive_unchanged() -> None:
    chance = random.Random(1)
    texts = ["".join(chance.choices(ALPHABET, k=chance.randint(1, 8))) for _ in range(100)]
    for first, second in zip(texts[::2], texts[1::2], strict=True):
        words = words_of(command("export", {"stage.source": first, "stage.output": second}))
        config = compose(words)
        assert (config.stage.source, config.stage.output) == (first, second)


def test_values_of_other_types_arrive_unchanged() -> None:
    settings: dict[str, SettingValue | None] = {
        "stage.components": ["transformer", "vae"],
        "stage.dry_run": True,
        "stage.facts.scaling_factor": 0.7,
    }
    config = compose(words_of(command("export", settings)))
    assert config.stage.components == ["transformer", "vae"]
    assert config.stage.dry_run is True and config.stage.facts.scaling_factor == 0.7
    assert compose(words_of(command("export", {"stage.config": ["a, b", "c'd"]}))).stage.config == ["a, b", "c'd"]


@pytest.mark.parametrize("folder", ["runs/mine", "/data/my runs/it's mine", "elsewhere/tiny-shapes", "ü=1/[a], b"])
def test_the_run_is_named_where_it_is_not_the_default(folder: str) -> None:
    config = compose(words_of(command("train", {}, run_at(Path(folder)))))
    assert config.run == run_at(Path(folder))


def test_the_default_run_is_named_where_a_path_would_choose_another() -> None:
    assert command("train", {}) == "python -m cogflow stage=train"
    assert command("export", {"stage.source": "x"}).endswith("stage.source=x run.name=tiny-shapes")
    assert command("export", {"stage.source": None}) == "python -m cogflow stage=export"


def test_the_run_of_the_running_command_is_taken() -> None:
    with running(["stage=train"], RunConfig("elsewhere", "mine")):
        assert command("export", {}) == "python -m cogflow stage=export run.root=elsewhere run.name=mine"
    assert command("export", {}) == "python -m cogflow stage=export"


@pytest.fixture
def words() -> Iterator[list[str]]:
    """Yield the words of the running command."""
    given = ["stage=train", "data.path='a b'", "run.name=mine", "stage.resume=never", "stage.on_blur=stop"]
    with running(given, RunConfig(name="mine")):
        yield given


def test_the_running_command_is_repeated_with_other_settings(words: list[str]) -> None:
    again = words_of(repeated({"stage.on_blur": "rollback", "stage.rollback.learning_rate_ratio": 0.3}))
    settings = ["stage.on_blur=rollback", "stage.rollback.learning_rate_ratio=0.3"]
    assert again == ["stage=train", "data.path='a b'", "run.name=mine", *settings]


def test_another_stage_gets_the_settings_of_the_running_command(words: list[str]) -> None:
    assert words_of(same_settings("prepare")) == ["stage=prepare", "data.path='a b'", "run.name=mine"]
    with running(["stage=train", 'run.name="it\'s"', "model=tiny"], RunConfig("elsewhere", "it's")):
        expected = ["stage=prepare", "model=tiny", "run.root=elsewhere", 'run.name="it\'s"']
        assert words_of(same_settings("prepare")) == expected


def test_settings_of_training_are_named_as_the_flow_names_them() -> None:
    with running(["stage=flow", "stage.train.on_blur=stop"], RunConfig()):
        assert words_of(repeated({"stage.on_blur": "warn"})) == ["stage=flow", "stage.train.on_blur=warn"]


def test_torchrun_is_repeated(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    assert repeated({}).startswith("torchrun --nproc-per-node 2 -m cogflow stage=train ")


def test_a_recorded_command_runs_again_in_another_run() -> None:
    recorded = "python -m cogflow stage=export 'stage.source=a b' model=tiny run.root=x"
    run = RunConfig("runs", "it's mine")
    assert words_of(command_again(recorded, run, ["stage.source"])) == [
        "stage=export",
        "model=tiny",
        'run.name="it\'s mine"',
    ]
    assert command_again("pytest tests", run) == "" and command_again("python -m 'cogflow", run) == ""


def test_options_are_quoted_for_the_shell() -> None:
    shown = options({"stage.vae": "/a b/vae", "stage.verify": False})
    assert shown == """'stage.vae="/a b/vae"' stage.verify=false"""


def test_the_typed_command_is_shown_with_its_program() -> None:
    assert typed_command(["/x/cogflow/__main__.py", "stage=train", "data.path=a b"]) == (
        "python -m cogflow stage=train 'data.path=a b'"
    )
    assert typed_command(["other.py", "a b"]) == "other.py 'a b'"
