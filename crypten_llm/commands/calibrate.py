"""The owner's measurement without any other party, as a run of ``generate`` makes it before the weights are shared."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from crypten_llm.commands.show import say
from crypten_llm.engines.domain import Calibration
from crypten_llm.models import checkpoint
from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.llama import prepare
from crypten_llm.session.admission import Admission
from crypten_llm.session.calibration import Ranges
from crypten_llm.session.settings import ProtocolConfig


def calibrate(folder: Path, protocol: ProtocolConfig, text: str, as_json: bool) -> None:
    """Prints the table. Raises UsageError, after it, for a model that the engine would refuse."""
    config = LlamaConfig.from_folder(folder)
    weights = {name: prepare(name, value, config) for name, value in checkpoint.load_weights(folder, config)}
    admission = Admission(text, say=say)
    ranges = admission.measure(folder, config, weights, progress=sys.stderr.isatty())
    found = of_engine(protocol, ranges)
    say(found.table(ranges.tokens))
    if as_json:
        rows = [{**asdict(r), "limit": r.limit._asdict(), "is_inside": r.is_inside} for r in found.reached]
        print(json.dumps({"engine": found.engine, "tokens": ranges.tokens, "reached": rows}), flush=True)
    admission.judge(found)


def of_engine(protocol: ProtocolConfig, ranges: Ranges) -> Calibration:
    """What an engine makes of the ranges, without the parties that it takes to run it."""
    if protocol.engine == "wire":
        from crypten_llm.engines.wire import domain
        from crypten_llm.engines.wire.numbers import WireConfig

        return domain.calibrate(WireConfig(), ranges)
    from crypten_llm.engines.crypten.domain import CryptenConfig
    from crypten_llm.engines.crypten.domain import calibrate as of_crypten

    return of_crypten(CryptenConfig(precision_bits=protocol.precision_bits), ranges)
