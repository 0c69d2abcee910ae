"""`arrowquant webhooks secret`, as an operator runs it, and `quantize --webhook`, as a user does."""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook

from service.jobs.store import DATABASE
from service.jobs.webhooks.secrets import MAX_USABLE
from tests.api.conftest import save_model
from tests.cli.test_cli import ARROWQUANT
from tests.cli.test_keys import ROOT, run
from tests.conftest import StartServer
from tests.receiver import Receiver


def secret(data_dir: Path, *arguments: str) -> Any:
    """What `arrowquant webhooks secret … --json` prints."""
    done = run("webhooks", "secret", *arguments, "--json", "--data-dir", data_dir)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_secret_is_shown_once_and_kept_from_others(tmp_path: Path) -> None:
    made = run("webhooks", "secret", "create", "--tenant", "acme", data_dir=tmp_path)
    (text,) = made.stdout.splitlines()
    assert text.startswith("whsec_")
    assert text not in made.stderr
    listed = run("webhooks", "secret", "list", data_dir=tmp_path).stdout
    assert "acme" in listed
    assert "signs" in listed
    assert text.removeprefix("whsec_") not in listed
    assert stat.S_IMODE((tmp_path / DATABASE).stat().st_mode) == 0o600


def test_a_database_that_others_could_read_is_theirs_no_more(tmp_path: Path) -> None:
    secret(tmp_path, "create")
    (tmp_path / DATABASE).chmod(0o664)
    secret(tmp_path, "list")
    assert stat.S_IMODE((tmp_path / DATABASE).stat().st_mode) == 0o660, "what a group may do is the operator's choice"


def test_rotation_gives_the_others_an_end_and_revoking_ends_at_once(tmp_path: Path) -> None:
    old = secret(tmp_path, "create")
    new = secret(tmp_path, "create", "--others-expire-in-hours", "24")
    other = secret(tmp_path, "create", "--tenant", "other")
    listed = {one["id"]: one for one in secret(tmp_path, "list", "--tenant", "default")}
    assert list(listed) == [old["id"], new["id"]]
    end = datetime.fromisoformat(listed[old["id"]]["expires_at"]) - datetime.now(UTC)
    assert timedelta(hours=23) < end < timedelta(hours=25)
    assert "expires_at" not in listed[new["id"]]
    assert "revoked_at" in secret(tmp_path, "revoke", new["id"])
    shown = run("webhooks", "secret", "list", data_dir=tmp_path).stdout.splitlines()
    assert [line.split()[2] for line in shown] == ["signs", "revoked", "signs"]
    assert shown[2].split()[0] == other["id"]


def test_there_is_an_end_to_secrets_that_sign_at_once(tmp_path: Path) -> None:
    for _ in range(MAX_USABLE):
        secret(tmp_path, "create")
    refused = run("webhooks", "secret", "create", data_dir=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "revoke one" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(("create", "--tenant", "../up"), 2), (("revoke", "sec0"), 2), (("list",), 2)],
)
def test_what_cannot_be_done_is_one_line(tmp_path: Path, arguments: tuple[str, ...], status: int) -> None:
    done = run("webhooks", "secret", *arguments, data_dir=tmp_path / "none")
    assert (done.returncode, done.stdout) == (status, "")
    assert len(done.stderr.splitlines()) == 1


def test_the_commands_of_the_readme_and_of_a_user_tell_a_receiver(
    start_server: StartServer, model_root: Path, tmp_path: Path
) -> None:
    server = start_server(webhook_allow_http="true", webhook_allowed_networks="127.0.0.0/8, ::1/128")
    text = secret(server.data_dir, "create")["secret"]
    model = save_model(model_root / "cli-webhook", layers=1)
    with Receiver() as receiver:
        done = run(
            "quantize", model, "--out", tmp_path / "out", "--server", server.base_url, "--webhook", receiver.url("/cli")
        )
        assert done.returncode == 0, done.stderr
        (call,) = receiver.wait("/cli")
        assert Webhook(text).verify(call.body, call.headers)["type"] == "job.succeeded"
        section = (ROOT / "README.md").read_text().split("\n## Webhooks\n")[1].split("\n## ")[0]
        (script,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
        script = f'arrowquant() {{ {shlex.join(ARROWQUANT)} "$@"; }}\n{script}'
        variables = {"SERVER": server.base_url, "ARROWQUANT_DATA_DIR": str(server.data_dir), "MODEL": model.as_uri()}
        environment = os.environ | variables | {"HOOK": receiver.url("/readme"), "PYTHONPATH": str(ROOT)}
        command = ["bash", "-eu", "-o", "pipefail", "-c", script]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (call,) = receiver.wait("/readme")
        made = done.stdout.splitlines()[0]
        assert Webhook(made).verify(call.body, call.headers) == Webhook(text).verify(call.body, call.headers)
    alone = run("quantize", model, "--out", tmp_path / "out-2", "--webhook", "https://example.org/")
    assert (alone.returncode, "--webhook needs --server" in alone.stderr) == (2, True)
