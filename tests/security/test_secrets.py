"""Attack the secrets of the environment: they reach no message, no folder name and no server but the chosen one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from cogflow import cli
from cogflow.config.compose import compose
from cogflow.errors import ConfigError
from cogflow.tracking.wandb_mode import SERVER, choose_mode, foreign_settings, server_address

SECRET = "0123456789abcdef-the-key"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("word", ["run.name=${oc.env:WANDB_API_KEY}", "tracking.entity=x-${oc.env:WANDB_API_KEY}"])
def test_a_setting_that_contains_a_secret_is_refused(
    word: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="it contains the value of WANDB_API_KEY"):
        compose(["stage=train", word])
    assert cli.main(["stage=train", word]) == 2
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err and "WANDB_API_KEY" in printed.err
    assert not [path for path in tmp_path.rglob("*") if SECRET in str(path)]


def test_a_strangers_import_resolves_no_variable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sft.yaml").write_text("args: {train_iters: 10, train_data: ['${oc.env:WANDB_API_KEY}']}\n")
    assert cli.main(["stage=train", "import=sft.yaml"]) == 2
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err and "nothing is resolved" in printed.err


def test_a_traceback_shows_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError(f"connection to https://user:{SECRET}@host failed")

    monkeypatch.setattr(cli, "_run_stage", fail)
    assert cli.main(["stage=train", f"run.root={tmp_path}", "run.name=a"]) == 1
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err + (tmp_path / "a" / "cogflow.log").read_text()
    assert "RuntimeError" in printed.err


@pytest.mark.parametrize(
    "text",
    [
        "[default]\nbase_url = http://attacker.example\n",
        "[default]\nhttps_proxy = http://attacker.example\n",
        "[default]\ninsecure_disable_ssl = true\n",
        "[other]\napi_key = x\n",
        "base_url = http://attacker.example\n",
    ],
)
@pytest.mark.parametrize("folder", ["wandb", ".wandb"])
def test_wandb_settings_in_the_working_folder_keep_it_offline(
    tmp_path: Path, text: str, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "settings").write_text(text)
    assert choose_mode("online") == "offline" and "remove it to go online" in capsys.readouterr().out
    assert server_address() == SERVER


def test_the_address_of_wandb_is_that_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = online\nproject = a\n")
    assert foreign_settings(tmp_path) == "" and choose_mode("online") == "online" and server_address() == SERVER
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "settings").write_text("[default]\nbase_url = https://wandb.example\n")
    assert server_address() == "https://wandb.example"
    monkeypatch.setenv("WANDB_BASE_URL", "https://other.example")
    assert server_address() == "https://other.example"


def test_resolvers_of_strangers_are_not_known() -> None:
    """OmegaConf resolves variables and other keys in the user's own words, and runs nothing."""
    with pytest.raises(ConfigError):
        compose(["stage=train", "run.name=${python:1}"])
    assert not OmegaConf.has_resolver("python")
