"""The owner's measurement without any other party, as a run of ``generate`` makes it before the weights are shared."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from crypten_llm.commands.show import say
from crypten_llm.engines.domain import Calibration
from crypten_llm.errors import UsageError
from crypten_llm.models import checkpoint, tokenizer
from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.llama import prepare
from crypten_llm.session import far_heads
from crypten_llm.session.admission import Admission
from crypten_llm.session.calibration import Ranges
from crypten_llm.session.settings import ProtocolConfig


def calibrate(folder: Path, protocol: ProtocolConfig, text: str, as_json: bool, heads_out: str = "") -> None:
    """Prints the table. heads_out: where the order of the heads that look far is written, "" for nowhere.

    Raises UsageError, after it, for a model that the engine would refuse.
    """
    if heads_out and not Path(heads_out).absolute().parent.is_dir():
        raise UsageError(f"--heads-out: there is no folder {Path(heads_out).parent}; make it first")
    config = LlamaConfig.from_folder(folder)
    weights = {name: prepare(name, value, config) for name, value in checkpoint.load_weights(folder, config)}
    admission = Admission(text, say=say)
    ranges = admission.measure(folder, config, weights, progress=sys.stderr.isatty())
    found = of_engine(protocol, ranges)
    say(found.table(ranges.tokens))
    if as_json:
        rows = [{**asdict(r), "limit": r.limit._asdict(), "is_inside": r.is_inside} for r in found.reached]
        print(json.dumps({"engine": found.engine, "tokens": ranges.tokens, "reached": rows}), flush=True)
    if heads_out:
        rank_heads(folder, config, weights, admission.prose(), Path(heads_out))
    admission.judge(found)


def rank_heads(folder: Path, config: LlamaConfig, weights: dict, prose: str, path: Path) -> None:
    """Writes the file that the policy ``head_split`` names. Raises UsageError where it cannot be made or written."""
    loaded = tokenizer.load(folder)

    def encode(text: str) -> list[int]:
        return loaded(text, add_special_tokens=False)["input_ids"]

    length = min(far_heads.LONGEST, config.context)
    prompts = far_heads.needles(encode, prose, length, begin=tokenizer.encode(loaded, ""))
    with tqdm(desc="looking for needles", total=len(prompts), disable=not sys.stderr.isatty(), leave=False) as bar:
        scores = far_heads.attention_to(config, weights, prompts, lambda done: bar.update(done - bar.n))
    try:
        path.write_bytes(far_heads.file(scores))
    except OSError as error:
        raise UsageError(f"--heads-out {path}: {error.strerror}; give a file that can be written") from None
    first = far_heads.ranks(scores).flatten().argsort()[:5].tolist()
    best = ", ".join(f"layer {i // scores.shape[1]} head {i % scores.shape[1]}" for i in first)
    say(f"the {scores.numel()} kv heads by how far they look, from {best} on: {path}")


def of_engine(protocol: ProtocolConfig, ranges: Ranges) -> Calibration:
    """What an engine makes of the ranges, without the parties that it takes to run it."""
    if protocol.engine == "wire":
        from crypten_llm.engines.wire import domain
        from crypten_llm.engines.wire.numbers import WireConfig

        return domain.calibrate(WireConfig(), ranges)
    from crypten_llm.engines.crypten.domain import CryptenConfig
    from crypten_llm.engines.crypten.domain import calibrate as of_crypten

    return of_crypten(CryptenConfig(precision_bits=protocol.precision_bits), ranges)
