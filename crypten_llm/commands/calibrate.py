"""The owner's measurement without any other party, as a run of ``generate`` makes it before the weights are shared."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from crypten_llm import devices
from crypten_llm.commands.show import say
from crypten_llm.engines.domain import Calibration
from crypten_llm.errors import UsageError
from crypten_llm.models import checkpoint, tokenizer
from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.llama import prepare
from crypten_llm.session import far_gates, far_heads, query_statistics, retention
from crypten_llm.session.admission import Admission
from crypten_llm.session.calibration import Ranges
from crypten_llm.session.settings import ProtocolConfig


@dataclass(frozen=True)
class Outputs:
    """Files for policies, "" for none: which heads look far, where the queries of each kv head point, and what says
    whether a token will be looked at."""

    heads: str = ""
    filters: str = ""
    centers: str = ""
    scores: str = ""

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """The options that were given, with their files."""
        return ((f"--{name}-out", path) for name, path in asdict(self).items() if path)


@dataclass(frozen=True)
class Learning:
    """How the order of heads is learned. steps: 0 where it is measured; device: as ``--device``."""

    steps: int = 0
    device: str = "cpu"


def calibrate(
    folder: Path,
    protocol: ProtocolConfig,
    text: str,
    as_json: bool,
    outputs: Outputs = Outputs(),
    learning: Learning = Learning(),
) -> None:
    """Prints the table, and writes what ``outputs`` names.

    Raises UsageError, after it, for a model that the engine would refuse.
    """
    for option, path in outputs:
        if not Path(path).absolute().parent.is_dir():
            raise UsageError(f"{option}: there is no folder {Path(path).parent}; make it first")
    devices.usable(learning.device)
    config = LlamaConfig.from_folder(folder)
    weights = {name: prepare(name, value, config) for name, value in checkpoint.load_weights(folder, config)}
    admission = Admission(text, say=say)
    ranges = admission.measure(folder, config, weights, progress=sys.stderr.isatty())
    found = of_engine(protocol, ranges)
    say(found.table(ranges.tokens))
    if as_json:
        rows = [{**asdict(r), "limit": r.limit._asdict(), "is_inside": r.is_inside} for r in found.reached]
        print(json.dumps({"engine": found.engine, "tokens": ranges.tokens, "reached": rows}), flush=True)
    if list(outputs):
        for_policies(outputs, learning, folder, config, weights, admission.prose())
    admission.judge(found)


def for_policies(
    outputs: Outputs, learning: Learning, folder: Path, config: LlamaConfig, weights: dict, prose: str
) -> None:
    """Writes the files that policies name. Raises UsageError where one cannot be made or written."""
    loaded = tokenizer.load(folder)

    def encode(text: str) -> list[int]:
        return loaded(text, add_special_tokens=False)["input_ids"]

    begin = tokenizer.encode(loaded, "")
    read = far_heads.needles(encode, prose, min(far_heads.LONGEST, config.context), begin=begin)
    if outputs.heads:
        with _bar("looking for needles", len(read)) as beat:
            scores = far_heads.attention_to(config, weights, read, beat)
        if learning.steps:
            prompts = [
                prompt
                for seed, length in enumerate(sorted({min(length, config.context) for length in far_gates.LENGTHS}))
                for prompt in far_heads.needles(encode, prose, length, begin=begin, seed=seed)
            ]
            with _bar("learning which heads look far", learning.steps) as beat:
                gates = far_gates.learn(config, weights, prompts, learning.steps, learning.device, beat=beat)
            closed, opened = ((gates < 0.1).sum().item(), (gates > 0.5).sum().item())
            say(f"of {gates.numel()} gates {closed} are below 0.1 and {opened} above 0.5")
            scores = far_gates.scores(gates, scores)
        _write("--heads-out", outputs.heads, far_heads.file(scores))
        first = far_heads.ranks(scores).flatten().argsort()[:5].tolist()
        best = ", ".join(f"layer {i // scores.shape[1]} head {i % scores.shape[1]}" for i in first)
        say(f"the {scores.numel()} kv heads by how far they look, from {best} on: {outputs.heads}")
    if outputs.filters or outputs.centers:
        with _bar("looking at queries", len(read)) as beat:
            found = query_statistics.measure(config, weights, [prompt.ids for prompt in read], beat)
        made = {"filters": query_statistics.filters(found), "centers": query_statistics.centers(found)}
        for name, vectors in made.items():
            if path := getattr(outputs, name):
                _write(f"--{name}-out", path, query_statistics.file(name, vectors))
                say(f"{found.longest.numel()} {name} of {config.head_dim} numbers: {path}")
    if outputs.scores:
        again = encode(retention.AGAIN)
        length = min(retention.LONGEST, (config.context - len(again)) // 2)
        texts = [prompt.ids for prompt in far_heads.needles(encode, prose, length, retention.TEXTS, begin)]
        with _bar("reading twice", len(texts)) as beat:
            fit = retention.fit(config, weights, texts, again, beat)
        _write("--scores-out", outputs.scores, fit.file())
        share = fit.explained.mean().item()
        say(f"linear scores, which explain {share:.0%} of what a repetition looks at: {outputs.scores}")


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how many of ``total`` are done, as it is called with that."""
    with tqdm(desc=what, total=total, disable=not sys.stderr.isatty(), leave=False) as bar:
        yield lambda done: bar.update(done - bar.n)


def _write(option: str, path: str, data: bytes) -> None:
    try:
        Path(path).write_bytes(data)
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror}; give a file that can be written") from None


def of_engine(protocol: ProtocolConfig, ranges: Ranges) -> Calibration:
    """What an engine makes of the ranges, without the parties that it takes to run it."""
    if protocol.engine == "wire":
        from crypten_llm.engines.wire import domain
        from crypten_llm.engines.wire.numbers import WireConfig

        return domain.calibrate(WireConfig(), ranges)
    from crypten_llm.engines.crypten.domain import CryptenConfig
    from crypten_llm.engines.crypten.domain import calibrate as of_crypten

    return of_crypten(CryptenConfig(precision_bits=protocol.precision_bits), ranges)
