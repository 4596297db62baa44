"""A local party's tie to the client that started it.

Owns one thread and imports nothing slow, so that it holds from the first moment.
"""

import os
import sys
import threading

from crypten_llm.errors import PartyError


def end_with_parent() -> None:
    """Ends this process when the client's is gone, however that died.

    The client holds the other end of standard input and never writes; the pipe closes with it.
    """

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)
        os._exit(PartyError.exit_code)

    threading.Thread(target=wait, daemon=True).start()
