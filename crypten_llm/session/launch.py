"""Starting the parties: the other processes of a local run, or this one's place in a run that torchrun started.

Owns processes and their end. Without torchrun, the calling process is the client and the owner, the dealer and
any further compute party are started here, each with only what it may know: the owner gets the model's path, nobody
gets the prompt. With torchrun (or RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set by hand) nothing is started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from crypten_llm.errors import ENDED, INTERRUPTED, CryptenLLMError, PartyError, UsageError, public_words, shown, unheard
from crypten_llm.links import keyring, rendezvous, sockets
from crypten_llm.links.network import parse_network
from crypten_llm.links.transport import Transport
from crypten_llm.roles import CLIENT, OWNER
from crypten_llm.session import thin
from crypten_llm.session.admission import WARNING, Admission
from crypten_llm.session.agreeing import compare
from crypten_llm.session.notary import Notary
from crypten_llm.session.party import Party
from crypten_llm.session.quota import Quota
from crypten_llm.session.settings import Child, LaunchConfig, ProtocolConfig
from crypten_llm.session.stocked import Stocked
from crypten_llm.session.weights import know_weights

if TYPE_CHECKING:
    from crypten_llm.links.tls import Links
    from crypten_llm.protocols.dealer.tape import Tape

PACKAGE_HOME = str(Path(__file__).parents[2])
GRACE_SECONDS = 10.0  # for the other processes to end by themselves, once the links are closed
FAILED_GRACE_SECONDS = 2.0  # the same after an error: nothing is lost then


def is_distributed(env: Mapping[str, str] = os.environ) -> bool:
    """Whether somebody else (torchrun) started the parties."""
    return any(env.get(name) for name in ("RANK", "WORLD_SIZE"))


def is_local(env: Mapping[str, str] = os.environ) -> bool:
    """Whether all parties run on this machine: started here, or by torchrun on this host alone."""
    return not is_distributed(env) or env.get("LOCAL_WORLD_SIZE") == env.get("WORLD_SIZE")


def own_rank(protocol: ProtocolConfig, env: Mapping[str, str] = os.environ) -> int:
    """This process's rank in the run that ``env`` describes; raises UsageError when its size does not fit."""
    rank, world, _, _ = rendezvous.read_environment(env)
    if world != protocol.world:
        names = ", ".join(protocol.roles)
        raise UsageError(
            f"WORLD_SIZE is {world}, but engine {protocol.engine!r} runs in {protocol.world} processes ({names}); "
            f"start {protocol.world} in all (on one host: torchrun --nproc-per-node {protocol.world})"
        )
    return rank


def is_client(protocol: ProtocolConfig, env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process asks. On engine ``plain`` it is the only one with something to do, in a job of any size."""
    if not is_distributed(env):
        return True
    if protocol.is_private:
        return own_rank(protocol, env) == CLIENT
    return env.get("WORLD_SIZE") == "1" or env.get("RANK") == str(CLIENT)


def join(
    protocol: ProtocolConfig,
    launch: LaunchConfig,
    env: Mapping[str, str] = os.environ,
    parties: LocalParties | None = None,
) -> Transport:
    """This process's transport in the run that ``env`` describes, once all parties have come and agree.

    parties: the children this process started, whose early end stops the wait.
    """
    own_rank(protocol, env)
    rank, world, host, port = rendezvous.read_environment(env)
    links = _links(launch, protocol, rank)
    hosts = host, launch.host or host
    secret = parties.secret.encode() if parties else keyring.find(hosts, launch.tls, protocol.insecure_links, env)
    torch.set_num_threads(launch.thread_count(int(env.get("LOCAL_WORLD_SIZE", world))))
    transport = rendezvous.connect(
        rank,
        world,
        protocol.roles,
        host,
        port,
        launch.timeout,
        launch.host or None,
        own_port=launch.link_port,
        hub=int(env.get(rendezvous.HUB, OWNER)),
        listener=parties.listener if parties else None,
        run=rendezvous.run_of(env),
        secret=secret,
        links=links,
        network=parse_network(launch.network) if launch.network else None,
        while_waiting=parties.check if parties else None,
    )
    if parties:
        parties.met()
    with guarded(transport):
        compare(transport, protocol.agreement())
    transport.beat(_followers(protocol, rank))
    return transport


def _followers(protocol: ProtocolConfig, rank: int) -> list[int]:
    """Who waits without end for what this party wants next."""
    asks_dealer = protocol.engine == "crypten"  # the owner, for all
    if rank == CLIENT:
        return [peer for peer in range(protocol.compute_parties if asks_dealer else protocol.world) if peer != CLIENT]
    return [protocol.compute_parties] if rank == OWNER and asks_dealer else []


def _links(launch: LaunchConfig, protocol: ProtocolConfig, rank: int) -> Links | None:
    """This party's keys and certificates; None on plain TCP, which needs no X.509."""
    if not launch.tls:
        return None
    from crypten_llm.links import tls

    return tls.Links(launch.tls, protocol.roles, rank)


def _tape(protocol: ProtocolConfig, launch: LaunchConfig, transport: Transport) -> Tape | None:
    """This party's file, if there is a tape; signed by the dealer's key, where certificates say which that is."""
    if not protocol.tape:
        return None
    from crypten_llm.links.signatures import public_keys
    from crypten_llm.protocols.dealer.tape import Tape

    signers = public_keys(launch.tls, "dealer") if launch.tls else []
    return Tape(protocol.tape, transport.rank, transport, is_local(), signers)


def _bridge() -> Any:
    """The module that keeps CrypTen's state; None in a process where nothing has needed it yet."""
    return sys.modules.get("crypten_llm.engines.crypten.bridge")


def check_ready(protocol: ProtocolConfig, launch: LaunchConfig) -> None:
    """Before a client meets anybody. Raises UsageError when this process is a party already, as CrypTen keeps its state
    in module globals, and for a device of its own that it cannot use.
    """
    if (bridge := _bridge()) and bridge.is_started():
        raise UsageError("this process already has a private session; close it first, or use another process")
    if launch.device_of(CLIENT) != "cpu":
        _device(CLIENT, protocol, launch)


def forget(transport: Transport) -> None:
    """Makes this process free for another session, if CrypTen runs over ``transport``."""
    if (bridge := _bridge()) and bridge.is_started(transport):
        bridge.stop()


def make_party(transport: Transport, protocol: ProtocolConfig, launch: LaunchConfig) -> Party:
    """A compute party over ``transport``. What the owner has to be shown goes to stderr."""
    parties = protocol.compute_parties
    own: dict[str, Any] = {
        "admission": Admission(launch.calibration_text, protocol.force, _show),
        "mode": protocol.mode,
        "quota": Quota(launch.session_tokens, launch.day_tokens),
        "sharing": launch.beside(transport.rank, protocol.world, not is_distributed()),
    }
    with unheard():
        device, tape = _device(transport.rank, protocol, launch), _tape(protocol, launch, transport)
    if protocol.engine == "wire":
        from crypten_llm.engines.wire.engine import WireEngine

        config = protocol.mode.wire(protocol.precision)
        if tape:
            tape.compare(asdict(config))
        own["notary"] = Notary.of(transport, protocol, launch.tls, tape.manifest.id if tape else "")
        own["side"] = thin.side_of(protocol, launch, transport.rank)
        own["stocked"] = Stocked.of(protocol, launch, transport, is_local())
        engine = WireEngine(transport, config, tape, device=device, peer_memory=protocol.peer_memory)
        return Party(engine, transport, parties, **own)
    from crypten_llm.engines.crypten.domain import CryptenConfig
    from crypten_llm.engines.crypten.engine import CryptenEngine

    own["notary"] = Notary.of(transport, protocol, launch.tls)
    settings = CryptenConfig(precision_bits=protocol.precision_bits)
    return Party(CryptenEngine(transport, parties, settings, device=device), transport, parties, **own)


def _device(rank: int, protocol: ProtocolConfig, launch: LaunchConfig) -> torch.device:
    """Where that party computes, which is this one. Raises UsageError for a device that it cannot use."""
    from crypten_llm.engines.wire import computing

    return computing.usable(launch.device_of(rank), protocol.engine)


def _show(text: str) -> None:
    print(shown(text), file=sys.stderr, flush=True)


def serve(protocol: ProtocolConfig, launch: LaunchConfig, model_folder: str | Path | None = None) -> None:
    """Any party but the client: follows the client until it closes."""
    know_weights(launch.policy_weights)
    transport = join(protocol, launch)
    with guarded(transport):
        if transport.rank == protocol.compute_parties and protocol.engine == "crypten":
            from crypten_llm.engines.crypten import bridge

            device = _device(transport.rank, protocol, launch)
            bridge.start_dealer(transport, protocol.compute_parties, device).serve()
        else:
            party = make_party(transport, protocol, launch)
            party.serve(model_folder, launch.progress and transport.rank == OWNER)
            if transport.rank == OWNER and protocol.engine == "crypten":
                party.engine.dealer.ask_stop()
    transport.close()


@contextlib.contextmanager
def guarded(transport: Transport) -> Any:
    """Tells the other parties why this one stops, when the block raises."""
    try:
        yield
    except BaseException as error:
        transport.abort(public_words(error))
        raise


def start_party(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen:
    """The command ``party`` with ``arguments``, as a child that reads its standard input; stderr is read.

    Tests put a fork in its place, which imports nothing again.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "crypten_llm", *arguments],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


class LocalParties:
    """The other parties of a local run, as child processes of the client."""

    def __init__(self, protocol: ProtocolConfig, launch: LaunchConfig, model_folder: str = "") -> None:
        self.protocol, self.launch = protocol, launch
        self.names = protocol.roles
        self.processes: dict[int, subprocess.Popen] = {}
        self._printed: dict[int, deque] = {}
        self._readers: dict[int, threading.Thread] = {}
        shared = protocol.helper and keyring.find((rendezvous.LOOPBACK,), "", False).decode()  # with thin clients
        self.secret, self._run = shared or keyring.fresh(), keyring.fresh()
        self._tapes = self._find_tapes()
        self.listener = sockets.listen(rendezvous.LOOPBACK)
        self._met = False
        try:
            for rank in range(protocol.world):
                if rank != CLIENT:
                    self._start(rank, model_folder if rank == OWNER else "")
        except BaseException:
            self.stop()
            raise

    def _find_tapes(self) -> dict[int, str]:
        """By rank, the party's own file of the tape; raises UsageError when one is missing or used."""
        if not self.protocol.tape:
            return {}
        from crypten_llm.protocols.dealer.tape import locate

        if os.path.isfile(self.protocol.tape):
            raise UsageError(
                f"{self.protocol.tape} is one party's file, and a local run starts both; give --tape the folder"
            )
        return {rank: str(locate(self.protocol.tape, rank, is_local=True)) for rank in (OWNER, CLIENT)}

    def environment(self, rank: int) -> dict[str, str]:
        """What torchrun would have set for ``rank``, and that the client hosts the meeting.

        The child imports this very package: a notebook may have found it through ``sys.path`` alone.
        """
        world = str(self.protocol.world)
        threads = str(self.launch.thread_count(self.protocol.world))
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [PACKAGE_HOME, os.environ.get("PYTHONPATH", "")])),
            **{"RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "OMP_NUM_THREADS": threads},
            **{"MASTER_ADDR": rendezvous.LOOPBACK, "MASTER_PORT": str(self.listener.getsockname()[1])},
            **{"TORCHELASTIC_USE_AGENT_STORE": "False", "TORCHELASTIC_RUN_ID": self._run, rendezvous.HUB: str(CLIENT)},
        }

    def _start(self, rank: int, model_folder: str) -> None:
        # Of the client's own are the address that it gave, and the bars: the others' would be drawn over its own.
        text = self.launch.calibration_text if rank == OWNER else ""
        device = self.launch.of_all(self.protocol.world)
        launch = replace(self.launch, host="", link_port=0, progress=False, calibration_text=text, device=device)
        told = Child(replace(self.protocol, tape=self._tapes.get(rank, "")), launch, model_folder)
        process = self.processes[rank] = start_party(["party", "--child", told.to_json()], self.environment(rank))
        assert process.stdin is not None, "it was opened with the process"
        with contextlib.suppress(BrokenPipeError):  # it has ended: ``check`` says so
            os.write(process.stdin.fileno(), f"{self.secret}\n".encode())
        self._printed[rank] = deque(maxlen=20)
        self._readers[rank] = threading.Thread(target=self._read, args=(rank, process.stderr), daemon=True)
        self._readers[rank].start()

    def _read(self, rank: int, stream: Any) -> None:
        for line in stream:
            self._printed[rank].append(line.rstrip())
            if self.launch.verbose or line.startswith(WARNING):
                print(f"[{self.names[rank]}] {shown(line)}", end="", file=sys.stderr, flush=True)

    def check(self) -> None:
        """Raises with a party's own last words if one has ended early."""
        for rank, process in self.processes.items():
            if process.poll() is not None:
                raise self._epitaph(rank)

    def cause_of(self, error: BaseException) -> BaseException:
        """``error``, or what ended another party when that is where it comes from.

        A party that a signal ended leaves no words; all that the others see is a closed connection. Ctrl-C reaches
        every process of the terminal, whichever of them acts on it first. And what a party keeps to itself (``ENDED``)
        is no secret here, where its output is at hand.
        """
        if not isinstance(error, PartyError):
            return error
        kept = str(error).endswith(ENDED)
        deadline = time.monotonic() + (GRACE_SECONDS if kept else FAILED_GRACE_SECONDS)
        while time.monotonic() < deadline:
            all_ended = all(process.poll() is not None for process in self.processes.values())
            for rank, process in self.processes.items():
                code = process.poll() or 0
                if code in (INTERRUPTED, -signal.SIGINT):
                    return KeyboardInterrupt()
                if code < 0:
                    return self._epitaph(rank)
                if kept and code and not str(words := self._epitaph(rank)).endswith(ENDED):
                    return words
            if all_ended:
                break
            time.sleep(0.02)
        return error

    def _epitaph(self, rank: int) -> CryptenLLMError:
        code, name = self.processes[rank].returncode, f"rank {rank} ({self.names[rank]})"
        if code < 0:
            reason = f"was ended by {signal.Signals(-code).name}"
            hint = ", which the system sends when memory runs out" if -code == signal.SIGKILL else ""
            return PartyError(f"{name} {reason}{hint}; run again, with a smaller model or prompt if memory is short")
        self._readers[rank].join(timeout=1)
        words = self._printed[rank][-1].removeprefix("error: ") if self._printed[rank] else f"exit code {code}"
        kind = UsageError if code == UsageError.exit_code else PartyError
        return kind(f"{name} stopped: {words}")

    def met(self) -> None:
        """From now on the parties are connected, and hear over their links when the run ends."""
        self._met = True

    def stop(self, failed: bool = False) -> None:
        """Waits for the other processes to end, and ends those that do not."""
        self.listener.close()
        grace = FAILED_GRACE_SECONDS if failed else GRACE_SECONDS
        deadline = time.monotonic() + (grace if self._met else 0.0)
        try:
            for process in self.processes.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
        finally:
            for process in self.processes.values():
                process.kill()
                process.wait()
        for reader in self._readers.values():
            reader.join(timeout=1)
        for process in self.processes.values():
            for pipe in (process.stdin, process.stderr):
                assert pipe is not None, "both ends were opened with the process"
                pipe.close()
