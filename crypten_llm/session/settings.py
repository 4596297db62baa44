"""Settings of a run, in two kinds, so that nobody changes a result while tuning speed.

``ProtocolConfig`` changes results, security or what is revealed; all parties must agree on it. ``LaunchConfig``
changes none of that: where parties meet, how long they wait, how they show progress.

A new setting is one field here: its option on the command line is made from it, and local parties are started with it.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import crypten_llm
from crypten_llm import devices, program
from crypten_llm.engines import check_engine
from crypten_llm.errors import UsageError, did_you_mean
from crypten_llm.links.network import parse_network
from crypten_llm.precisions import DEFAULT, PRECISIONS
from crypten_llm.records import Malformed, Word, convert, plain
from crypten_llm.roles import CLIENT, role_names
from crypten_llm.session.mode import ALL, Mode

DEFAULT_ENGINE = "wire"
DEFAULT_PRECISION_BITS = 15  # CryptenConfig's
DEFAULT_TIMEOUT = 300.0


@dataclass(frozen=True)
class Agreement:
    """Public settings that every party must have alike; the owner's are compared with each other's.

    program: digest of the code. torch: its version, whatever device it was built for. What tapes are for is compared
    when they are opened (``Tape.compare``).
    precision_bits: None on an engine that has none. precision: of engine ``wire``. force: whether all take a model that
    leaves the engine's ranges.
    """

    version: Word
    program: Word
    torch: Word
    engine: Word
    compute_parties: int
    precision_bits: int | None
    precision: str
    force: bool
    reveal: str
    peer_memory: bool


def _setting(default: Any, help: str, metavar: str | None = None, option: str = "") -> Any:
    """A field and its option on the command line, ``--name`` if not ``option``; see ``commands.options``."""
    return field(default=default, metadata={"help": help, "metavar": metavar, "option": option})


@dataclass(frozen=True)
class ProtocolConfig:
    """engine: see ``engines``. compute_parties: how many hold shares; the dealer comes on top.
    precision_bits: fractional bits of a share on engine ``crypten``. precision: of the presets of engine ``wire``
    (docs/precision.md). tape: this party's file of a tape that was dealt
    for engine ``wire``, or the folder that holds it; there is no dealer then. force: share a model that leaves the
    engine's ranges by the owner's measurement; every answer is marked. reveal: what the client learns of each step
    (``mode.Mode``). peer_memory: messages of repeated steps go from the owner's card to the client's, of one host.
    insecure_links: leave links between hosts without TLS all the same.
    helper: the second compute party stands for thin clients, which are none (``thin``).
    """

    engine: str = _setting(DEFAULT_ENGINE, f"plain (no privacy), crypten or wire (default: {DEFAULT_ENGINE})")
    compute_parties: int = _setting(
        2, "compute parties; the dealer comes on top (default: 2)", metavar="N", option="--parties"
    )
    precision_bits: int = _setting(
        DEFAULT_PRECISION_BITS,
        f"fractional bits of a secret on engine crypten (default: {DEFAULT_PRECISION_BITS})",
        metavar="F",
    )
    precision: str = _setting(
        DEFAULT,
        "bits of engine wire's numbers: default, or quantised, which sends less and rounds more (default: default)",
        metavar="PRESET",
    )
    tape: str = _setting(
        "", "this party's file of a tape, or its folder: takes the dealer's place (see deal)", metavar="PATH"
    )

    force: bool = _setting(
        False, "share a model that leaves the engine's ranges all the same: every answer is marked as not to be trusted"
    )
    reveal: str = _setting(
        ALL, "what the client learns of each step: tokens, top-K or logits (default: logits)", metavar="MODE"
    )

    peer_memory: bool = _setting(
        False, "owner and client are on two GPUs of this host: what is repeated goes from card to card, past --tls"
    )
    insecure_links: bool = _setting(
        False, "leave links between hosts plain TCP: whoever is between reads everything (a tunnel must protect them)"
    )

    helper: bool = False  # no option: a command of its own

    def __post_init__(self) -> None:
        check_engine(self.engine)
        if self.helper and self.engine != "wire":
            raise UsageError(f"engine {self.engine!r} has no helper; use engine 'wire' (--engine wire)")
        Mode.parse(self.reveal)
        if self.force and self.engine == "plain":
            raise UsageError("engine 'plain' has no range that a model could leave; leave --force out (force=False)")
        if self.peer_memory and self.engine != "wire":
            raise UsageError(f"engine {self.engine!r} has no use for --peer-memory; leave it out (peer_memory=False)")
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision is {str(self.precision)[:40]!r}; it must be {' or '.join(PRECISIONS)}")
        if self.precision != DEFAULT and self.engine != "wire":
            raise UsageError(
                f"engine {self.engine!r} has no precision {self.precision!r}; use engine 'wire' (--engine wire), or "
                "leave --precision out"
            )
        if self.tape and self.engine != "wire":
            raise UsageError(f"engine {self.engine!r} reads no tape; use engine 'wire' (--engine wire), or no tape")
        if _not_integer(self.compute_parties) or self.compute_parties < 2:
            raise UsageError(f"{self.compute_parties!r} compute parties cannot keep a secret; use 2 or more")
        if self.engine == "wire" and self.compute_parties != 2:
            raise UsageError(
                f"engine 'wire' has 2 compute parties and a dealer, not {self.compute_parties}; for more parties use "
                "engine 'crypten'"
            )
        if _not_integer(self.precision_bits) or not 8 <= self.precision_bits <= 20:
            raise UsageError(
                f"precision_bits is {self.precision_bits!r}; it must be 8 to 20 (products overflow 64 bits above)"
            )

    @property
    def is_private(self) -> bool:
        return self.engine != "plain"

    @property
    def world(self) -> int:
        """Processes that take part: the compute parties and the dealer, or one on engine ``plain``."""
        return len(self.roles) if self.is_private else 1

    @property
    def roles(self) -> list[str]:
        """Names by rank; a tape takes the dealer's place."""
        names = role_names(self.compute_parties)
        if self.helper:
            names[CLIENT] = "helper"
        return names[: self.compute_parties] if self.tape else names

    @property
    def mode(self) -> Mode:
        return Mode.parse(self.reveal)

    def agreement(self) -> Agreement:
        bits = self.precision_bits if self.engine == "crypten" else None
        import torch  # not where a command line is read

        code, tensors = program.digest()[:16], str(torch.__version__).partition("+")[0]
        return Agreement(
            crypten_llm.__version__,
            code,
            tensors,
            self.engine,
            self.compute_parties,
            bits,
            self.precision,
            self.force,
            self.reveal,
            self.peer_memory,
        )


@dataclass(frozen=True)
class LaunchConfig:
    """device: torch's, where this party computes; or one for each party of a run, by rank, with commas between
    (``device_of``).
    timeout: seconds any wait may last. network: "lan", "wan" or "RTTms,Mbit" to emulate between local parties.
    threads: of torch in each process; 0 divides this machine's cores among the local parties.
    host, link_port: address and port at which the others reach this process (found by itself when empty, 0). The
    owner's port is that of the meeting.
    tls: folder of keys and certificates that put the links under TLS (see ``tls``); plain TCP when empty.
    calibration_text: a file that the owner measures its model on, in the clear and alone, before it shares it.
    policy_weights: a file of a policy's trained weights, which requests name and no other party's words can open.
    session_tokens, day_tokens: most tokens that the owner answers with (see ``quota``); 0 for no limit.
    stock: folder of blocks that were dealt ahead of requests (``protocols.dealer.stock``); none when empty.
    offline: never ask a hub. verbose: tracebacks, and what the other parties print. progress: show progress bars.
    shielded: local parties do not hear Ctrl-C, which reaches every process of a terminal; they end with the client.
    helper_at, owner_at: where these take this client, as HOST:PORT, which then is a thin one (see ``thin_client``);
    or helper_at is "local", for parties that this client starts.
    """

    device: str = _setting(
        "cpu",
        "where this party computes: cpu, cuda or cuda:N; or owner's,client's,dealer's (default: cpu)",
        metavar="DEVICE",
    )
    timeout: float = _setting(
        DEFAULT_TIMEOUT, f"seconds any wait may last (default: {DEFAULT_TIMEOUT:.0f})", metavar="S"
    )
    network: str = _setting("", "emulate a network between local parties", metavar="lan|wan|RTTms,Mbit")
    threads: int = _setting(0, "torch threads (default: cores / local processes)", metavar="N")
    host: str = _setting("", "address at which the other parties reach this process", metavar="ADDRESS")
    link_port: int = _setting(
        0, "port at which the dealer reaches the client (default: any that is free); the owner's is MASTER_PORT", "P"
    )
    tls: str = _setting("", "this party's key and all certificates (see keys): encrypted links", metavar="DIR")
    calibration_text: str = _setting(
        "", "text like what clients ask, on which the owner measures its model (default: some prose)", metavar="FILE"
    )
    session_tokens: int = _setting(0, "most tokens that the owner answers with in a session", metavar="N")
    day_tokens: int = _setting(0, "most tokens that the owner answers with in a day, over all sessions", metavar="N")
    stock: str = _setting(
        "", "this party's folder of material that was dealt ahead of requests (see stock, produce)", metavar="DIR"
    )
    offline: bool = _setting(False, "never ask a model hub")
    verbose: bool = _setting(False, "show tracebacks and what the other parties print")
    progress: bool = False  # no option: bars are for a terminal
    policy_weights: str = _setting(
        "",
        "trained weights of a policy, the same file at every party; --set weights=NAME takes them by the file's name",
        metavar="FILE",
    )
    shielded: bool = False  # no option: for a client that has another use for Ctrl-C than to end all
    helper_at: str = ""  # no options: of the commands that can be asked by a thin client
    owner_at: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.timeout, int | float) or not 0 < self.timeout < math.inf:
            raise UsageError(f"timeout is {self.timeout!r}; it must be a number of seconds above 0")
        if _not_integer(self.threads) or self.threads < 0:
            raise UsageError(f"threads is {self.threads!r}; give 1 or more, or 0 to divide the cores")
        if _not_integer(self.link_port) or not 0 <= self.link_port < 1 << 16:
            raise UsageError(f"link_port is {self.link_port!r}; it must be 0, for any that is free, to 65535")
        for name in ("session_tokens", "day_tokens"):
            value = getattr(self, name)
            if _not_integer(value) or value < 0:
                raise UsageError(f"{name} is {value!r}; give 1 or more, or 0 for no limit")
        if not isinstance(self.device, str) or not all(map(devices.is_name, self.device.split(","))):
            raise UsageError(f"device is {self.device!r}; it must be cpu, cuda, or one of several by cuda:N")
        if self.network:
            parse_network(self.network)
        if bool(self.owner_at) != (self.helper_at not in ("", "local")):
            raise UsageError(
                "a thin client is told both --helper HOST:PORT and --owner HOST:PORT, or --helper local alone"
            )

    @property
    def is_thin(self) -> bool:
        """Whether this process is a thin client."""
        return bool(self.helper_at)

    def device_of(self, rank: int) -> str:
        """Where the party of that rank computes."""
        named = self.device.split(",")
        return named[rank] if len(named) > 1 else self.device

    def of_all(self, world: int) -> str:
        """The device of each party, by rank, where one is a GPU: who shares it shares its memory."""
        return ",".join(map(self.device_of, range(world))) if "cuda" in self.device else self.device

    def beside(self, rank: int, world: int, is_starter: bool) -> tuple[int, ...]:
        """The ranks that are known to compute on the device of ``rank``, itself among them.

        is_starter: whether this process starts the others. One that does not, and is told its own device alone, knows
        of none.
        """
        if "," not in self.device and not is_starter:
            return ()
        mine = devices.numbered(self.device_of(rank))
        return tuple(other for other in range(world) if devices.numbered(self.device_of(other)) == mine)

    def thread_count(self, local_processes: int) -> int:
        return self.threads or max(1, cores() // local_processes)


def cores() -> int:
    """Processor cores that this process may use: fewer than the machine's in a container or under ``taskset``."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def split(settings: dict) -> tuple[ProtocolConfig, LaunchConfig]:
    """The two kinds from one set of keyword arguments.

    Raises UsageError for a name that neither has, and for a device on which the engine cannot do what is asked.
    """
    kinds = (ProtocolConfig, LaunchConfig)
    check_names("setting", settings, [field.name for kind in kinds for field in fields(kind)])
    protocol, launch = ({f.name: settings[f.name] for f in fields(kind) if f.name in settings} for kind in kinds)
    launched = LaunchConfig(**launch)
    asked = ProtocolConfig(**protocol | ({"helper": True} if launched.is_thin else {}))
    if asked.engine == "crypten" and "cuda" in launched.device and asked.reveal != ALL:
        raise UsageError(
            f"device is {launched.device!r}, and engine 'crypten' chooses tokens on the processor alone; leave "
            "--device or --reveal out, or use engine 'wire'"
        )
    if launched.stock and (asked.tape or asked.engine != "wire" or asked.helper):
        raise UsageError(
            "a stock is of engine 'wire' with its dealer; leave --stock out, or --tape, --engine and --helper"
        )
    if launched.device.count(",") + 1 not in (1, asked.world):
        raise UsageError(
            f"device is {launched.device!r}, and this run has {asked.world} processes; name one device, or one each"
        )
    return asked, launched


@dataclass(frozen=True)
class Child:
    """All that a party which the client starts is told: its settings, and the owner's which model to open."""

    protocol: ProtocolConfig
    launch: LaunchConfig
    model: str = ""

    def to_json(self) -> str:
        """ASCII: a path may hold what is no UTF-8."""
        return json.dumps(plain(self))

    @classmethod
    def from_json(cls, text: str) -> "Child":
        try:
            return convert(json.loads(text), cls)
        except (Malformed, ValueError) as error:
            raise UsageError(f"--child is {error}; it is for parties that a client starts") from None


def check_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises UsageError, with the nearest known name, for the first given name that is not known."""
    for name in given:
        if name not in known:
            raise UsageError(f"unknown {what} {name!r}; {did_you_mean(name, known)}there are {', '.join(known)}")


def _not_integer(value: object) -> bool:
    return not isinstance(value, int) or isinstance(value, bool)
