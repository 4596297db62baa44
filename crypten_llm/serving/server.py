"""The endpoint's socket and its life: where it listens, and how all ends.

Owns the address and the rule for it: beyond this machine, prompts travel under HTTPS and callers bring a key.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import ssl
import threading
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from crypten_llm.errors import UsageError, first_line
from crypten_llm.links.sockets import is_loopback, reason_of
from crypten_llm.serving.service import Service

STREAMS_SECONDS = 5  # for streams to end once the endpoint is stopped


def listen(address: str, port: int, is_encrypted: bool, has_keys: bool) -> socket.socket:
    """A socket at this address. Raises UsageError for a port in use, and where others could read or ask."""
    if not is_loopback(address) and not (is_encrypted and has_keys):
        raise UsageError(
            f"--listen {address} is beyond this machine, where prompts would be read on the way or anybody could ask; "
            "give --https CERTIFICATE KEY and an API key (--api-keys), or put a proxy with both before 127.0.0.1"
        )
    if not 0 <= port < 1 << 16:
        raise UsageError(f"--port is {port}; it must be 0, for any that is free, to 65535")
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family, backlog=128)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {address}, port {port} ({reason_of(error)}); choose another --port"
        ) from None


def check_https(certificate: str, key: str) -> None:
    """Raises UsageError for files that no server can use."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except OSError as error:  # ssl's own among them
        raise UsageError(
            f"--https: {certificate} and {key} are no certificate and its key ({first_line(error)})"
        ) from None


class Server(uvicorn.Server):
    """Ends the service as soon as it is told to end itself, so that what streams can end in time."""

    def __init__(self, app: Starlette, service: Service, https: tuple[str, str] | None = None) -> None:
        certificate, key = https or (None, None)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=STREAMS_SECONDS,
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.service.stop()
        super().handle_exit(sig, frame)

    def end(self) -> None:
        """From any thread: as if it had been told to end."""
        self.should_exit = True

    def serve_at(self, sock: socket.socket) -> None:
        """Until Ctrl-C, SIGTERM or ``end``; the parties have ended then. Raises what kept it from opening."""
        self.service.start()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # what uvicorn hands on when it has ended
        try:
            with contextlib.suppress(KeyboardInterrupt):
                self.run(sockets=[sock])
        finally:
            self.service.stop()
            self.service.join()
        if self.service.error is not None:
            raise self.service.error
