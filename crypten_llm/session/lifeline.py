"""A local party's tie to the client that started it: a pipe, over which comes the secret of their links.

Owns standard input and one thread, and imports nothing slow, so that it holds from the first moment.
"""

import os
import sys
import threading

from crypten_llm.errors import PartyError


def end_with_parent() -> str:
    """Ends this process when the client's is gone, however that died; returns the line that the client has written.

    The client holds the other end of standard input and writes nothing more; the pipe closes with it.
    """
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := os.read(sys.stdin.fileno(), 1)):
            os._exit(PartyError.exit_code)
        line += byte

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)
        os._exit(PartyError.exit_code)

    threading.Thread(target=wait, daemon=True).start()
    return line.decode().strip()
