"""`arrowquant keys`, and the commands that send a key, as an operator and a user run them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import save_model
from tests.cli.test_cli import ARROWQUANT
from tests.server import Server

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model_root: Path) -> Iterator[Server]:
    """A server that asks for keys."""
    running = Server(tmp_path_factory.mktemp("cli-keys") / "data", [model_root], require_keys=True).start()
    yield running
    running.stop()


def run(*arguments: str | Path, **variables: str | Path) -> subprocess.CompletedProcess[str]:
    """A command to its end, with these variables."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ARROWQUANT_")}
    environment |= {f"ARROWQUANT_{name.upper()}": str(value) for name, value in variables.items()}
    return subprocess.run(
        [*ARROWQUANT, *map(str, arguments)], capture_output=True, text=True, check=False, env=environment
    )


def keys(data_dir: Path, *arguments: str) -> Any:
    """What `arrowquant keys … --json` prints."""
    done = run("keys", *arguments, "--json", "--data-dir", data_dir)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_key_is_shown_once_alone_on_stdout_and_listed_without_itself(tmp_path: Path) -> None:
    made = run("keys", "create", "--tenant", "acme", "--name", "ci of acme", data_dir=tmp_path)
    assert made.returncode == 0
    (text,) = made.stdout.splitlines()
    assert text.startswith("aq_key")
    assert text not in made.stderr
    listed = run("keys", "list", data_dir=tmp_path)
    assert "acme" in listed.stdout
    assert "ci of acme" in listed.stdout
    assert "read,submit" in listed.stdout
    assert "usable" in listed.stdout
    assert text.split("_", 2)[2] not in listed.stdout


def test_keys_are_made_listed_and_revoked_as_json(tmp_path: Path) -> None:
    made = keys(tmp_path, "create", "--scope", "admin", "--days", "1", "--requests-per-minute", "9")
    assert made["key"].startswith(f"aq_{made['id']}_")
    (listed,) = keys(tmp_path, "list")
    assert listed == {name: value for name, value in made.items() if name != "key"}
    assert (listed["tenant"], listed["scopes"], listed["requests_per_minute"]) == ("default", ["admin"], 9)
    assert "expires_at" in listed
    assert "revoked_at" in keys(tmp_path, "revoke", made["id"])
    assert keys(tmp_path, "list", "--tenant", "other") == []
    unknown = run("keys", "revoke", "key0", data_dir=tmp_path)
    assert (unknown.returncode, len(unknown.stderr.splitlines())) == (1, 1)
    assert "revoked" in run("keys", "list", data_dir=tmp_path).stdout


def test_limits_of_a_tenant_are_set_one_by_one_and_reset(tmp_path: Path) -> None:
    keys(tmp_path, "limits", "acme", "--max-open-jobs", "3")
    both = keys(tmp_path, "limits", "acme", "--requests-per-minute", "100")
    assert both == {"tenant": "acme", "max_open_jobs": 3, "requests_per_minute": 100}
    assert "as for all" in run("keys", "limits", "acme", data_dir=tmp_path).stdout
    assert keys(tmp_path, "limits", "acme", "--reset") == {"tenant": "acme"}


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("create", "--scope", "root"), 2),
        (("create", "--tenant", "../up"), 2),
        (("create", "--days", "0"), 2),
    ],
)
def test_what_cannot_be_done_is_one_line(tmp_path: Path, arguments: tuple[str, ...], status: int) -> None:
    done = run("keys", *arguments, data_dir=tmp_path)
    assert (done.returncode, done.stdout) == (status, "")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [("list",), ("revoke", "key0")])
def test_a_folder_of_no_server_is_not_made_one_by_looking(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = run("keys", *arguments, data_dir=tmp_path / "typo")
    assert done.returncode == 2
    assert str(tmp_path / "typo") in done.stderr
    assert not (tmp_path / "typo").exists()


def test_commands_send_the_key_that_they_are_given(server: Server, model_root: Path, tmp_path: Path) -> None:
    text = keys(server.data_dir, "create", "--tenant", "cli")["key"]
    url = ("--server", server.base_url)
    refused = run("jobs", *url)
    assert refused.returncode == 1
    assert "[unauthorized]" in refused.stderr
    assert run("jobs", *url, "--api-key", text).returncode == 0
    model = save_model(model_root / "cli-keys")
    made = run("quantize", model, "--out", tmp_path / "out", *url, "--json", api_key=text)
    assert made.returncode == 0, made.stderr
    assert text not in made.stdout + made.stderr
    job_id = json.loads(made.stdout)["id"]
    for command in (("watch", job_id), ("jobs",), ("cancel", job_id)):
        done = run(*command, *url, "--json", api_key=f" {text}\n")
        assert job_id in done.stdout, done.stderr
    original = run("validate", model, model, *url, api_key=text)
    assert original.returncode == 0, original.stderr


def test_a_key_of_odd_characters_is_refused_and_not_shown(server: Server) -> None:
    done = run("jobs", "--server", server.base_url, api_key="sec\nret")
    assert done.returncode == 2
    assert "sec" not in done.stdout + done.stderr


def test_the_commands_of_the_readme_work_when_pasted(server: Server, tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().split("\n## Keys and tenants\n")[1].split("\n## ")[0]
    (script,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    script = f'arrowquant() {{ {shlex.join(ARROWQUANT)} "$@"; }}\n{script}'
    variables = {"SERVER": server.base_url, "ARROWQUANT_DATA_DIR": str(server.data_dir)}
    environment = os.environ | variables | {"PYTHONPATH": str(ROOT)}
    command = ["bash", "-eu", "-o", "pipefail", "-c", script]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.isdecimal()] == ["200", "401"]
