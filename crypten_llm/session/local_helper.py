"""A helper with its owner and dealer on this machine, as child processes of one thin client.

Owns that child and its end. It starts the other two, and says on stderr where clients come in.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections import deque
from dataclasses import replace
from typing import Any

from crypten_llm.errors import CryptenLLMError, PartyError, UsageError
from crypten_llm.links import keyring
from crypten_llm.links.meeting import Place
from crypten_llm.session import launch as launching
from crypten_llm.session.settings import Child, LaunchConfig, ProtocolConfig

LOCAL = "local"
"""In the place of a helper's address: one that is started here."""
END_SECONDS = 15.0
_PLACES = re.compile(r"clients: --helper (\S+) --owner (\S+);")


def places_said(helper: Place, owner: Place) -> str:
    """Where clients come in, as a helper says it."""
    return f"clients: --helper {_text(helper)} --owner {_text(owner)}"


def _text(place: Place) -> str:
    host, port = place
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class LocalHelper:
    """helper_at, owner_at: where this client is taken, once ``meet`` has returned. secret: of all these links."""

    helper_at = owner_at = ""

    def __init__(self, protocol: ProtocolConfig, launch: LaunchConfig, model_folder: str) -> None:
        self.secret, self._timeout = keyring.fresh(), launch.timeout
        self._printed: deque[str] = deque(maxlen=20)
        self._met = threading.Event()
        told = Child(protocol, replace(launch, helper_at="", owner_at="", progress=False), model_folder)
        self._process = launching.start_party(["helper", "--child", told.to_json()], dict(os.environ))
        assert self._process.stdin is not None, "it was opened with the process"
        self._process.stdin.write(f"{self.secret}\n")
        self._process.stdin.flush()
        self._reader = threading.Thread(target=self._read, args=(self._process.stderr,), daemon=True)
        self._reader.start()

    def _read(self, stream: Any) -> None:
        for line in stream:
            self._printed.append(line.rstrip())
            if found := _PLACES.search(line):
                self.helper_at, self.owner_at = found.groups()
                self._met.set()
        self._met.set()

    def meet(self) -> None:
        """Waits until it takes clients. Raises what ended it, and PartyError when its time is over."""
        if not self._met.wait(self._timeout):
            raise PartyError(f"the helper did not take clients within {self._timeout:g} s; raise the timeout")
        if not self.helper_at:
            raise self._epitaph()

    def _epitaph(self) -> CryptenLLMError:
        code = self._process.wait()
        words = self._printed[-1].removeprefix("error: ") if self._printed else f"exit code {code}"
        return (UsageError if code == UsageError.exit_code else PartyError)(f"the helper stopped: {words}")

    def cause_of(self, error: BaseException) -> BaseException:
        """``error``, or what ended the helper where that is where it comes from."""
        if isinstance(error, PartyError):
            deadline = time.monotonic() + launching.FAILED_GRACE_SECONDS
            while self._process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            if self._process.poll():
                self._reader.join(timeout=1)
                return self._epitaph()
        return error

    def stop(self, failed: bool = False) -> None:
        """Ends it: its standard input closes, at which it ends, and the other two with it."""
        assert self._process.stdin is not None and self._process.stderr is not None, "both were opened with the process"
        self._process.stdin.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(timeout=1)
        self._process.stderr.close()
