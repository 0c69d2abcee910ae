"""Carries out the steps of a Dockerfile below a folder, without a container engine."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

#: Paths of the image that are laid below the folder.
MOVED = re.compile(r"(?<![\w.])(/app|/data|/models|/var/cache/numba)\b")


@dataclass
class Image:
    """What the steps made of the folder: environment, working folder and what is to be started."""

    root: Path
    environment: dict[str, str]
    workdir: Path = field(init=False)
    skipped: list[str] = field(default_factory=list)
    user: str = ""
    healthcheck: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.workdir = self.root

    def apply(self, keyword: str, text: str, context: Path) -> None:
        """Carry out one instruction; one that this class does not know is a KeyError."""
        {
            "RUN": self._run,
            "COPY": lambda t: self._copy(t, context),
            "ENV": self._env,
            "WORKDIR": self._workdir,
            "USER": lambda t: setattr(self, "user", t),
            "HEALTHCHECK": lambda t: setattr(self, "healthcheck", json.loads(t[t.index("[") :])),
            "ENTRYPOINT": lambda t: setattr(self, "command", json.loads(t)),
            "CMD": lambda t: self.command.extend(json.loads(t)),
            "VOLUME": lambda t: Path(self._moved(t)).mkdir(parents=True, exist_ok=True),
            "EXPOSE": lambda _: None,
        }[keyword](text)

    def _run(self, text: str) -> None:
        if text.startswith("useradd"):
            # Users of the image are not to be made on this machine; their folders are.
            self.skipped.append(text)
            for path in MOVED.findall(text):
                Path(self._moved(path)).mkdir(parents=True, exist_ok=True)
            return
        subprocess.run(["sh", "-ec", self._moved(text)], cwd=self.workdir, env=self.environment, check=True)

    def _copy(self, text: str, context: Path) -> None:
        *sources, target = text.split()
        for source in sources:
            destination = self.workdir / target / (source if target == "./" else "")
            if (context / source).is_dir():
                shutil.copytree(context / source, destination, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(context / source, destination)

    def _env(self, text: str) -> None:
        for pair in shlex.split(text):
            name, _, value = pair.partition("=")
            self.environment[name] = self._moved(value)

    def _workdir(self, text: str) -> None:
        self.workdir = Path(self._moved(text))
        self.workdir.mkdir(parents=True, exist_ok=True)

    def _moved(self, text: str) -> str:
        return MOVED.sub(lambda found: f"{self.root}{found[0]}", text)


def steps(dockerfile: Path, target: str) -> list[tuple[str, str]]:
    """The instructions of a stage as keyword and text."""
    text = re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    stages: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        keyword, _, rest = line.partition(" ")
        if keyword == "FROM":
            current = stages.setdefault(rest.rpartition(" ")[2], [])
        else:
            current.append((keyword, re.sub(r"\s+", " ", rest.strip())))
    return stages[target]
