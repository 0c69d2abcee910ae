"""The images, as far as they can be tried without a container engine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import venv
from pathlib import Path

import httpx
import pytest
import yaml

from tests.packaging.dockerfile import Image, steps

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"
COMPOSE_FILE = ROOT / "docker-compose.yml"
COMPOSE = yaml.safe_load(COMPOSE_FILE.read_text())
TOOLS = Path(sys.executable).parent


def test_the_compose_file_fits_its_schema() -> None:
    command = [TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE_FILE]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_dockerfile_is_without_complaint() -> None:
    linted = subprocess.run([TOOLS / "hadolint", DOCKERFILE], capture_output=True, text=True, check=False)
    assert linted.returncode == 0, linted.stdout + linted.stderr


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_each_profile_builds_the_target_of_its_name(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["profiles"] == [name]
    assert service["build"]["target"] == name
    assert "BASE_IMAGE" in service["build"]["args"]
    assert "data:/data" in service["volumes"]
    assert [v for v in service["volumes"] if v.endswith(":/models:ro")], "models are mounted read-only"
    assert all(port.startswith("127.0.0.1:") for port in service["ports"]), "reachable from this machine only"


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_what_opens_stores_is_passed_on_and_never_written_down(name: str) -> None:
    given = COMPOSE["services"][name]["environment"]
    passed_on = {variable for variable, value in given.items() if value is None}
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "ARROWQUANT_REMOTE_ROOTS"} <= passed_on


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_no_image_runs_as_root(name: str) -> None:
    users = [text for keyword, text in steps(DOCKERFILE, name) if keyword == "USER"]
    assert users[-1] not in ("0", "root")


def test_the_steps_of_the_cpu_image_give_a_healthy_server(tmp_path: Path) -> None:
    image = build(tmp_path, target="cpu")
    assert len(image.skipped) == 1
    needed = "import huggingface_hub, obstore, opentelemetry.exporter.otlp.proto.http"
    subprocess.run([tmp_path / "python" / "bin" / "python", "-c", needed], env=image.environment, check=True)
    given = {name: value for name, value in COMPOSE["services"]["cpu"]["environment"].items() if value is not None}
    image.environment |= given | {"ARROWQUANT_PORT": free_port()}
    address = f"http://127.0.0.1:{image.environment['ARROWQUANT_PORT']}/healthz"
    with subprocess.Popen(image.command, cwd=image.workdir, env=image.environment) as process:
        try:
            assert answer(address, process) == 200
            check = subprocess.run(image.healthcheck, env=image.environment, check=False)
            assert check.returncode == 0, "the HEALTHCHECK of the image"
        finally:
            process.terminate()
    assert process.returncode == 0
    assert subprocess.run(image.healthcheck, env=image.environment, capture_output=True, check=False).returncode != 0


def build(root: Path, *, target: str) -> Image:
    """Carry out a stage's steps in a virtual environment that stands for the base image."""
    venv.create(root / "python", with_pip=True)
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("ARROWQUANT_", "VIRTUAL_ENV"))}
    image = Image(root, ours | {"PATH": f"{root / 'python' / 'bin'}:{os.environ['PATH']}"})
    for keyword, text in steps(DOCKERFILE, target):
        image.apply(keyword, text, ROOT)
    image.command[0] = str(root / "python" / "bin" / image.command[0])
    image.healthcheck[0] = str(root / "python" / "bin" / image.healthcheck[0])
    return image


def free_port() -> str:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return str(probe.getsockname()[1])


def answer(address: str, process: subprocess.Popen[bytes]) -> int:
    """The status of the first answer."""
    while process.poll() is None:
        try:
            return httpx.get(address).status_code
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError(f"the server ended with status {process.returncode}")
