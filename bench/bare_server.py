"""A server of uvicorn's that only takes a body and answers as many bytes as it is told: what HTTP alone costs."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

PIECE_BYTES = 1 << 20


@contextmanager
def bare_server(answer: int) -> Iterator[str]:
    """Its host and port, in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        command = [sys.executable, "-m", "bench.bare_server", str(listening.fileno()), str(answer)]
        process = subprocess.Popen(command, pass_fds=[listening.fileno()])
        host, port = listening.getsockname()
    # Who connects before it runs waits in the queue of the socket.
    try:
        yield f"{host}:{port}"
    finally:
        process.terminate()
        process.wait()


class Answering:
    """Joins the pieces of a body, and answers with zeros."""

    def __init__(self, answer: int) -> None:
        """`answer` is in bytes."""
        self.content = memoryview(bytes(answer))

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:  # noqa: ARG002
        """See the ASGI specification."""
        body, is_over = bytearray(), False
        while not is_over:
            message = await receive()
            body += message["body"]
            is_over = not message["more_body"]
        headers = [(b"content-length", str(len(self.content)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for start in range(0, len(self.content), PIECE_BYTES):
            piece = self.content[start : start + PIECE_BYTES]
            more = start + PIECE_BYTES < len(self.content)
            await send({"type": "http.response.body", "body": piece, "more_body": more})


def main() -> None:
    """Serve on the socket that the first argument names, until a signal comes."""
    listening = socket.socket(fileno=int(sys.argv[1]))
    config = uvicorn.Config(Answering(int(sys.argv[2])), lifespan="off", log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
