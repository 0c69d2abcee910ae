"""Answers look-ups of names out of a file, in a process that has this folder on its path: DNS as a test wants it.

NAMES is a folder: `zone.json` has for each name its answers in turn, each a list of addresses, the last one for ever;
null comes when there is a file `answered`, and then is the answer before it. `asked` gets a line for each look-up. What
the file does not name does not exist.
"""

import json
import os
import socket
import threading
import time
from ipaddress import ip_address
from pathlib import Path

FOLDER = Path(os.environ["NAMES"])
# A proxy that nobody runs: whatever heeds the environment goes nowhere.
os.environ |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy"), "http://127.0.0.1:9")
_real = socket.getaddrinfo
_lock = threading.Lock()


def _is_address(host):
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def getaddrinfo(host, port, *arguments, **options):
    name = host.decode() if isinstance(host, bytes) else host
    if name is None or _is_address(name):
        return _real(host, port, *arguments, **options)
    zone = json.loads((FOLDER / "zone.json").read_text())
    if name not in zone:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    with _lock, (FOLDER / "asked").open("a+") as asked:
        asked.seek(0)
        before = asked.read().split().count(name)
        asked.write(f"{name}\n")
    answers = zone[name]
    answer = answers[min(before, len(answers) - 1)]
    while answer is None and not (FOLDER / "answered").exists():
        time.sleep(0.02)
    return [entry for address in answer or answers[0] for entry in _real(address, port, *arguments, **options)]


socket.getaddrinfo = getaddrinfo
