"""What the repository promises about itself: versions, licence, targets."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK_LINES = (ROOT / "requirements.lock").read_text().splitlines()
LOCK = {name: Version(version) for name, version in (line.split("==") for line in LOCK_LINES)}


def direct_requirements() -> list[Requirement]:
    """Of the project and all its extras."""
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(text) for group in (PROJECT["dependencies"], *extras) for text in group]


def test_the_lock_holds_exact_versions_and_nothing_else() -> None:
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in LOCK_LINES)
    assert sorted(set(LOCK_LINES)) == LOCK_LINES


def test_the_lock_satisfies_each_direct_requirement() -> None:
    for requirement in direct_requirements():
        assert LOCK[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_the_lock_covers_what_is_installed_for_the_requirements() -> None:
    waiting, seen = direct_requirements(), set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        assert name in LOCK, f"{requirement} is in no line of requirements.lock"
        if str(requirement) not in seen:
            seen.add(str(requirement))
            waiting += needs(name, requirement.extras)


def needs(name: str, extras: set[str]) -> list[Requirement]:
    """What an installed package needs here; nothing is known of one that is not installed."""
    try:
        found = [Requirement(text) for text in requires(name) or ()]
    except PackageNotFoundError:
        return []
    wanted = [{"extra": extra} for extra in ("", *extras)]
    return [r for r in found if r.marker is None or any(r.marker.evaluate(environment) for environment in wanted)]


def test_the_licence_is_apache_2() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize("target", ["demo", "serve", "test", "lint", "bench", "openapi", "golden"])
def test_each_target_makes_the_environment_that_it_needs(target: str, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    asked = subprocess.run(["make", "-n", target], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "-m venv .venv" in asked.stdout
    assert "pip install" in asked.stdout


def test_an_environment_that_is_up_to_date_is_not_touched(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for name in (".venv", ".venv-dev"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".installed").touch()
    asked = subprocess.run(["make", "-n", "demo", "test"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "pip install" not in asked.stdout


def test_every_command_of_ci_is_a_target() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert re.search(r"^exec make .*\btest$", script.read_text(), re.MULTILINE)
