"""What a stock saves: a request whose material was dealt before it, beside one that a dealer follows, in one session.

    python -m experiments.measure.from_stock --json
    python -m experiments.measure.from_stock --model shipped --prompt-tokens 200 --new-tokens 16 --repeats 5

A pair is a block that is dealt, a request that takes it, and the same request again, for which no block is left, so
that the dealer follows it; all in one session of engine ``wire``, whose parties and dealer are on this machine.
``first``: seconds until the first token; ``token``: of one after it, the median; ``waited``: seconds for which the
client waited for material. ``dealing``: seconds in which the block was dealt, while nobody asked. The prompt is
``--pads`` tokens shorter than what the block is dealt for. Ratios are the pairs'.

With ``--json`` a pair is written when it is done, and a run that is started again goes on from there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

from tqdm import tqdm

from crypten_llm.protocols.dealer.layout import path_in
from crypten_llm.protocols.dealer.manifest import PARTIES
from crypten_llm.protocols.dealer.stock import Stock
from crypten_llm.session import series
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.calibration import PROSE
from crypten_llm.session.delivery import Level
from crypten_llm.session.producing import Producer
from crypten_llm.session.request import Result
from experiments.tools import kept, real_model
from experiments.tools.command import command
from experiments.tools.provenance import sign
from experiments.tools.tables import print_table

RESULTS = Path(__file__).parents[1] / "results" / "from_stock.json"
PARTS = "first", "token", "waited"


def dealt(producer: Producer, level: Level, folder: Path) -> float:
    """Puts a block into both parties' halves of the stock; seconds that it took."""
    started, out = perf_counter(), folder / "block"
    block = producer.prepare(level.plan(), out)
    producer.deal(level.plan(), block)
    for party in PARTIES:
        stock = Stock(folder / "stock", party, is_local=True)
        path_in(out, party).rename(stock.arriving(block.manifest.id))
        stock.settle(block.manifest.id)
        path_in(out, party).parent.joinpath("manifest.json").unlink()
        path_in(out, party).parent.rmdir()
    out.rmdir()
    return perf_counter() - started


def figures(result: Result) -> dict[str, float | None]:
    seconds = result.seconds
    waited = result.cost.dealer_wait_seconds()
    return {"first": seconds["prefill"], "token": seconds["per_token"], "waited": waited}


def pair(llama: PrivateLlama, producer: Producer, level: Level, ids: list[int], folder: Path) -> dict:
    dealing = dealt(producer, level, folder)
    request = {"input_ids": ids, "max_new_tokens": level.max_new_tokens, "eos_token_id": [], "hide_length": True}
    stocked, followed = llama.generate(**request), llama.generate(**request)
    assert stocked.block and not followed.block, "one block was there, for the first"
    same = stocked.token_ids == followed.token_ids
    return {"same_tokens": same, "stock": figures(stocked), "dealer": figures(followed), "dealing": dealing}


def tables(pairs: list[dict]) -> list[dict]:
    rows = []
    for part in PARTS:
        sides = {side: [each[side][part] for each in pairs] for side in ("stock", "dealer")}
        both = zip(sides["stock"], sides["dealer"], strict=True)
        ratio = median(stock / dealer if dealer else 1.0 for stock, dealer in both)
        rows.append({"seconds": part, **{side: median(values) for side, values in sides.items()}, "ratio": ratio})
    return rows


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=real_model.NAME, help=f"(default: {real_model.NAME})")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="T", help="of the block (default: 128)")
    parser.add_argument("--pads", type=int, default=8, metavar="P", help="by which the prompt is shorter (default: 8)")
    parser.add_argument("--new-tokens", type=int, default=8, metavar="T", help="of the answer (default: 8)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="pairs (default: 3)")
    parser.add_argument("--device", default="cpu", metavar="D", help="of all parties and the producer (default: cpu)")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="of every wait (default: 600)")
    parser.add_argument("--json", nargs="?", type=Path, const=RESULTS, metavar="F", help=f"write to F ({RESULTS.name})")
    arguments = parser.parse_args()
    result = kept.load(arguments.json)
    pairs = result.setdefault("pairs", [])
    level = Level(arguments.prompt_tokens, arguments.new_tokens, 1)
    result |= {"model": arguments.model, "shape": [level.prompt_tokens, level.max_new_tokens], "pads": arguments.pads}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        settings = {"engine": "wire", "stock": str(folder / "stock"), "timeout": arguments.timeout, "progress": False}
        model = real_model.resolved(arguments.model)
        with PrivateLlama.from_pretrained(model, device=arguments.device, **settings) as llama:
            found = series.read(folder / "stock" / "owner")
            assert found is not None, "the owner has shared its model"
            producer = Producer(found, device=arguments.device)
            prose = llama.tokenizer(PROSE.read_text("utf-8"), add_special_tokens=False)["input_ids"]
            ids = list(prose[: level.prompt_tokens - arguments.pads])
            if len(pairs) < arguments.repeats:
                pair(llama, producer, level, ids, folder)  # compiles kernels
            for _ in tqdm(range(len(pairs), arguments.repeats), unit="pair", disable=not sys.stderr.isatty()):
                pairs.append(pair(llama, producer, level, ids, folder))
                sign(result)
                kept.save(arguments.json, result)
    print_table(tables(pairs))


if __name__ == "__main__":
    sys.exit(main())
