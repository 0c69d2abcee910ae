"""A receiver of webhooks that misbehaves as it is told, and certificates for it."""

from __future__ import annotations

import json
import select
import socket
import ssl
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

#: Generous: it ends what hangs, and measures nothing.
WAIT_S = 60.0


@dataclass(frozen=True)
class Call:
    """What came in."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        """Of the message."""
        return self.headers["webhook-id"]

    @property
    def message(self) -> Any:
        """The body."""
        return json.loads(self.body)


Behaviour = Callable[["_Handler"], None]


def status(code: int, headers: dict[str, str] | None = None, body: bytes = b"") -> Behaviour:
    """Answers at once."""

    def behave(handler: _Handler) -> None:
        handler.send_response(code)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return behave


def stall(handler: _Handler) -> None:
    """Says nothing until the caller has gone or the receiver is closed."""
    handler.until_cut()


def drip_headers(handler: _Handler) -> None:
    """Answers a byte at a time, in headers that do not end."""
    handler.drip(b"HTTP/1.1 200 OK\r\nX-Long: ")


def drip_body(handler: _Handler) -> None:
    """Says 200, and then sends a body that does not end."""
    handler.drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFF\r\n")


def flood(handler: _Handler) -> None:
    """Says 200, and sends as fast as it can what nobody asked for."""
    handler.drip(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * (1 << 20), pause_s=0.0)


def hang_up(handler: _Handler) -> None:
    """Closes the connection without a word."""
    handler.close_connection = True


def garbage(handler: _Handler) -> None:
    """Answers in no HTTP."""
    handler.wfile.write(b"220 not-http <script>alert(1)</script>\r\n\x00\xff\r\n\r\n")


class Receiver:
    """An HTTP server in threads of its own. `paths` says what happens at each, call by call; the last for ever."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0, certificate: Path | None = None) -> None:
        self.paths: dict[str, list[Behaviour]] = {}
        self.calls: list[Call] = []
        self.connections = 0
        self.cut: dict[str, int] = defaultdict(int)
        self.most_at_once: dict[str, int] = defaultdict(int)
        self.server_names: list[str | None] = []
        self.closing = threading.Event()
        self._at_once: dict[str, int] = defaultdict(int)
        self._news = threading.Condition()
        self._server = _Server((host, port), self)
        if certificate is not None:
            self._server.socket = self._tls(certificate).wrap_socket(self._server.socket, server_side=True)
        self.scheme = "http" if certificate is None else "https"
        self.host, self.port = host, self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def url(self, path: str, *behaviours: Behaviour, host: str | None = None) -> str:
        """An address that behaves so; by default it answers 204."""
        self.paths[path.partition("?")[0]] = list(behaviours or (status(204),))
        return f"{self.scheme}://{host or self.host}:{self.port}{path}"

    def wait(self, path: str, count: int = 1) -> list[Call]:
        """The calls to a path, once there are so many."""
        return self.wait_until(path, lambda calls: len(calls) >= count)

    def wait_until(self, path: str, enough: Callable[[list[Call]], bool]) -> list[Call]:
        """The calls to a path, once they are enough."""
        with self._news:
            assert self._news.wait_for(lambda: enough(self.at(path)), WAIT_S), self.calls
            return self.at(path)

    def wait_for_cut(self, path: str, count: int = 1) -> None:
        """Wait until so many calls to this path were given up by their caller."""
        with self._news:
            assert self._news.wait_for(lambda: self.cut[path] >= count, WAIT_S), path

    def at(self, path: str) -> list[Call]:
        """The calls to a path so far."""
        return [call for call in self.calls if call.path.partition("?")[0] == path]

    def close(self) -> None:
        """Take no more calls and end those that stall."""
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def begin(self, call: Call) -> Behaviour:
        """Note a call; what to do with it."""
        path = call.path.partition("?")[0]
        with self._news:
            turn = len(self.at(path))
            self.calls.append(call)
            self._at_once[path] += 1
            self.most_at_once[path] = max(self.most_at_once[path], self._at_once[path])
            self._news.notify_all()
        behaviours = self.paths.get(path, [status(404)])
        return behaviours[min(turn, len(behaviours) - 1)]

    def end(self, call: Call, *, was_cut: bool) -> None:
        """Note that a call has ended."""
        path = call.path.partition("?")[0]
        with self._news:
            self._at_once[path] -= 1
            self.cut[path] += was_cut
            self._news.notify_all()

    def _tls(self, certificate: Path) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)

        def named(_socket: ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> None:
            self.server_names.append(name)

        context.sni_callback = named
        return context


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], receiver: Receiver) -> None:
        self.receiver = receiver
        super().__init__(address, _Handler)

    def get_request(self) -> Any:
        """Counts connections, also those that break in the handshake."""
        self.receiver.connections += 1
        return super().get_request()

    def handle_error(self, *_: object) -> None:
        """A caller that goes is no news here."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    was_cut = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        call = Call(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
        behave = self.server.receiver.begin(call)
        try:
            behave(self)
        except OSError:
            self.was_cut = True
        finally:
            self.server.receiver.end(call, was_cut=self.was_cut)

    do_GET = do_POST

    def until_cut(self) -> None:
        """Wait for the caller to go."""
        while not self.server.receiver.closing.is_set():
            if select.select([self.connection], [], [], 0.02)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                self.was_cut = True
                break
        self.close_connection = True

    def drip(self, begin: bytes, piece: bytes = b"x", pause_s: float = 0.02) -> None:
        """Send without end, until the caller goes."""
        self.close_connection = True
        self.wfile.write(begin)
        while not self.server.receiver.closing.wait(pause_s):
            self.wfile.write(piece)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


class Authority:
    """Makes certificates that only whoever has `path` trusts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
        certificate = (
            self._builder(self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.path = folder / "authority.pem"
        self.path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def certificate(self, name: str) -> Path:
        """A file with a certificate for this host, and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            self._builder(subject, key)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
        path = self._folder / f"{name}.pem"
        secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
        path.write_bytes(certificate.public_bytes(pem) + secret)
        return path

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
        )
