"""What attention costs a token under an eviction policy, against the full cache: bytes, rounds, memory, time.

    python -m experiments.measure.eviction_cost --json                counts: the shipped model, two Llama shapes
    python -m experiments.measure.eviction_cost --measure --json      seconds a token on engine wire, this machine
    python -m experiments.measure.eviction_cost --measure --engine crypten --json

Counts come from engine ``cost``, which runs the dealer's program without parties, so bytes and rounds are those of a
real run. A figure is that of one decode step after a prompt of that length, the mean over as many steps as it takes to
fill a cluster of the cache (``eviction_counts``). Attention is scores, softmax, values with the output projection, the
choice of rows and the eviction of rows; bytes are those on all links, between the parties and from the dealer to both.
Seconds are predicted for the layers of a token, for parties with a core each whose dealer is ahead.

``--measure`` runs ``bench`` of the shipped model's shape, policies in turn, ``--repeats`` times; ``times faster`` is
the median of the pairs' ratios. The dealer runs ahead, so that its bytes are those of whole steps. In no step that is
measured does a cluster fill.

With ``--json`` rows are written when they are done, and a run that is started again goes on from there (remove the file
after a change of the protocols); Markdown tables of the same name follow, and a chart of the counts.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from crypten_llm.commands.cost import predict
from crypten_llm.models.checkpoint import SHIPPED
from crypten_llm.models.config import LlamaConfig
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.bench import Shape
from crypten_llm.session.plan import Plan
from crypten_llm.session.settings import split
from experiments.measure.eviction_counts import ATTENTION, CHOICE, NUMBER, count, fills, layers, seconds
from experiments.measure.eviction_time import measured_step, measured_table
from experiments.tools import kept
from experiments.tools.command import command
from experiments.tools.provenance import sign
from experiments.tools.tables import markdown_of

RESULTS = Path(__file__).parents[1] / "results"
MODELS = {
    "shipped": Shape(hidden=256, heads=8, kv_heads=4, ffn=704, layers=6),
    "Llama-2-7B": Shape(hidden=4096, heads=32, kv_heads=32, ffn=11008, layers=32),
    "Llama-3-8B": Shape(hidden=4096, heads=32, kv_heads=8, ffn=14336, layers=32),
}
LENGTHS = {"shipped": (512, 1024, 2048), "Llama-2-7B": (2048, 8192, 32768), "Llama-3-8B": (2048, 8192, 32768)}
CURVE = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
FULL, STATIC, DYNAMIC, ONE_LEVEL = "full", "mpcache(second=1)", "mpcache", "mpcache(coarse=32,fine=32)"
DYNAMICS = (
    *(DYNAMIC, "mpcache(summary=mean)", ONE_LEVEL),
    *("mpcache(coarse=32,fine=16)", "mpcache(coarse=128,fine=64)"),
)
OTHERS = (
    *("streaming_llm(recent=0.5)", "random", "snapkv(budget=0.5)", "pyramidkv(budget=0.5)", "h2o", "tova(size=0.5)"),
    *("mpcache_spread", "lazyeviction", "mikv", "quest(budget=0.1)"),
    "infllm(block=32,blocks=4,initial=32,local=128)",
    "longcache(top=1,local=128)",
)
TRAINED = ("locret(budget=0.5)", "attention_gate")  # for the shipped model alone
MPCACHE = (FULL, STATIC, *DYNAMICS)
SIDES = {"online": "online_bytes", "dealer": "dealer_bytes"}


def key(model: str, length: int, policy: str) -> str:
    return f"{model}/{length}/{policy}"


def others(model: str) -> tuple[str, ...]:
    """Policies beside MPCache's that can run on a model."""
    return OTHERS + TRAINED if model == "shipped" else OTHERS


def cell(model: str, length: int, policy: str) -> dict:
    """Figures of one decode step, as JSON."""
    step = count(replace(MODELS[model], kv_len=length, policy=policy))
    return {
        **{name: float(step.total(side)) for side, name in SIDES.items()},
        "choice_bytes": float(sum(step.total(side, CHOICE) for side in SIDES)),
        "rounds": float(step.total("rounds")),
        "cache_bytes": NUMBER * step.cached,
        "summary_bytes": NUMBER * step.summaries,
        "work": step.work(),
    }


def both(found: dict) -> float:
    return found["online_bytes"] + found["dealer_bytes"]


def step_table(model: str, length: int, policies, cells: dict) -> list[dict]:
    """A row for each policy that has been counted, against the full cache."""
    full, rows = cells.get(key(model, length, FULL)), []
    for policy in policies:
        found = cells.get(key(model, length, policy))
        if found is None or full is None:
            continue
        rows.append(
            {
                "tokens": length,
                "policy": policy,
                "online_bytes": found["online_bytes"],
                "dealer_bytes": found["dealer_bytes"],
                "times_fewer,_both": round(both(full) / both(found), 2),
                "online": round(full["online_bytes"] / found["online_bytes"], 2),
                "rounds": round(found["rounds"], 1),
                "choice's_share": f"{found['choice_bytes'] / both(found):.0%}",
                "cache_bytes": found["cache_bytes"],
                "summary_bytes": found["summary_bytes"],
                "LAN_s": round(seconds(found["work"], "lan"), 2),
                "WAN_s": round(seconds(found["work"], "wan"), 2),
            }
        )
    return rows


def pays(model: str, cells: dict) -> list[dict]:
    """Where dynamic selection costs less than static eviction alone: of the lengths in ``CURVE``, which."""
    measures = {
        "bytes_online": lambda found: found["online_bytes"],
        "bytes,_both": both,
        "time,_LAN": lambda found: seconds(found["work"], "lan"),
        "time,_WAN": lambda found: seconds(found["work"], "wan"),
    }
    rows = []
    for policy in DYNAMICS:
        row = {"model": model, "policy": policy}
        for name, measure in measures.items():
            less = [
                length
                for length in CURVE
                if {key(model, length, p) for p in (STATIC, policy)} <= cells.keys()
                and measure(cells[key(model, length, policy)]) < measure(cells[key(model, length, STATIC)])
            ]
            row[name.replace("bytes", "traffic")] = _ranges(less)
        rows.append(row)
    return rows


def _ranges(lengths: list[int]) -> str:
    """Neighbours of ``CURVE`` as ranges."""
    runs: list[list[int]] = []
    for length in lengths:
        if runs and CURVE.index(length) == CURVE.index(runs[-1][-1]) + 1:
            runs[-1].append(length)
        else:
            runs.append([length])
    return ", ".join(f"{run[0]:,}" if len(run) == 1 else f"{run[0]:,} to {run[-1]:,}" for run in runs) or "nowhere"


def parts(model: str, length: int, policies) -> list[dict]:
    """One layer that chooses for itself: which part of its attention costs what, where no cluster fills; then the
    step at which one does."""
    rows = []
    for policy in policies:
        _, plain, filling = fills(policy, length)
        shape = replace(MODELS[model], layers=1, policy=policy)
        step = layers(replace(shape, kv_len=plain))
        for kind in ATTENTION:
            found = {side: int(step.total(side, (kind,))) for side in ("rounds", *SIDES)}
            if any(found.values()):
                traffic = {f"{side}_bytes": found[side] for side in SIDES}
                rows.append({"policy": policy, "part": kind, "rounds": found["rounds"], **traffic})
        for name, shown in (("all", step), ("all, where a cluster fills", layers(replace(shape, kv_len=filling)))):
            if name == "all" or filling != plain:
                traffic = {f"{side}_bytes": int(shown.total(side)) for side in SIDES}
                rows.append({"policy": policy, "part": name, "rounds": int(shown.total("rounds")), **traffic})
    return rows


def prefill_cell(length: int, policy: str) -> dict:
    """What the policy adds to the shipped model's prefill: its eviction, and the attention beside it."""
    found = predict(LlamaConfig.from_folder(SHIPPED), Plan(length, 1, policy=policy)).cost.table()
    rows = [row for row in found if row["phase"] == "prefill" and row["kind"] in ATTENTION]
    added = [row for row in rows if row["kind"] == "eviction"]
    return {
        f"{name}{what}": sum(row[what] for row in chosen)
        for name, chosen in (("attention_", rows), ("eviction_", added))
        for what in ("rounds", "bytes_sent", "dealer_bytes")
    }


def prefill_table(cells: dict, prefills: dict) -> list[dict]:
    """Eviction after the prompt, and after how many tokens it has been saved again."""
    rows = []
    for length in LENGTHS["shipped"]:
        for policy in (STATIC, *DYNAMICS):
            found, mine = prefills.get(f"{length}/{policy}"), cells.get(key("shipped", length, policy))
            if found is None or mine is None:
                continue
            once = 2 * found["eviction_bytes_sent"] + found["eviction_dealer_bytes"]
            attention = 2 * found["attention_bytes_sent"] + found["attention_dealer_bytes"]
            saved = both(cells[key("shipped", length, FULL)]) - both(mine)
            rows.append(
                {
                    "tokens": length,
                    "policy": policy,
                    "rounds": found["eviction_rounds"],
                    "online_bytes": 2 * found["eviction_bytes_sent"],
                    "dealer_bytes": found["eviction_dealer_bytes"],
                    "of_attention": f"{once / attention:.1%}",
                    "saved_after_tokens": f"{once / saved:.1f}" if saved > 0 else "never",
                }
            )
    return rows


def counted_tables(result: dict) -> dict[str, list[dict]]:
    """Headings and tables of the counts."""
    cells, tables = result["cells"], {}
    for model, lengths in LENGTHS.items():
        policies = (FULL, *others(model), STATIC, *DYNAMICS)
        tables[f"{model}: attention of one token"] = [
            row for length in lengths for row in step_table(model, length, policies, cells)
        ]
    tables["Where dynamic selection costs less than static eviction alone"] = [
        row for model in MODELS for row in pays(model, cells)
    ]
    tables["shipped, 2,048 tokens: one layer that chooses"] = result.get("parts", [])
    tables["shipped: eviction after the prompt"] = prefill_table(cells, result.get("prefills", {}))
    return {heading: rows for heading, rows in tables.items() if rows}


def measure(arguments, result: dict, save) -> None:
    """Fills ``result["runs"]``: seconds of a step, rounds and bytes, in pairs."""
    runs = result.setdefault("runs", {})
    todo = [
        (f"{arguments.engine}/{arguments.steps}/{key('shipped', length, policy)}/{repeat}", length, policy)
        for repeat in range(arguments.repeats)
        for length in arguments.lengths
        for policy in arguments.policies
    ]
    todo = [entry for entry in todo if entry[0] not in runs]
    if not todo:
        return
    with PrivateLlama(*split({"engine": arguments.engine, "timeout": arguments.timeout})) as llama:
        for name, length, policy in tqdm(todo, unit="run", disable=not sys.stderr.isatty()):
            plain = fills(policy, length)[1]  # bench repeats one step: that which fills a cluster is once in many
            shape = replace(MODELS["shipped"], kv_len=plain, policy=policy, steps=arguments.steps)
            runs[name] = {"engine": arguments.engine, "tokens": length, "policy": policy, **measured_step(llama, shape)}
            sign(result, "crypten")
            save()


def markdown(tables: dict[str, list[dict]]) -> str:
    """Headings and Markdown tables."""
    return "\n".join(line for heading, rows in tables.items() for line in (f"## {heading}", "", *markdown_of(rows), ""))


def draw(cells: dict, path: Path) -> None:
    """Bytes of attention a token by context length, a panel for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.4), layout="constrained")
    styles = {
        FULL: ("full cache", "black", "-"),
        STATIC: ("static eviction alone", "tab:blue", "-"),
        DYNAMIC: ("mpcache (clusters of 32 and 64 rows)", "tab:red", "-"),
        "mpcache(coarse=32,fine=16)": ("mpcache, 16 and 32 rows, as published", "tab:purple", "--"),
        ONE_LEVEL: ("mpcache, 32 rows, one level", "tab:orange", "--"),
        "mpcache(coarse=128,fine=64)": ("mpcache, 64 and 128 rows", "tab:green", "--"),
    }
    for panel, model in zip(figure.subplots(1, len(MODELS)), MODELS, strict=True):
        for policy, (label, color, line) in styles.items():
            points = [(n, both(cells[key(model, n, policy)]) / 1e6) for n in CURVE if key(model, n, policy) in cells]
            if points:
                panel.plot(*zip(*points, strict=True), line, marker="o", markersize=3, color=color, label=label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(CURVE, [f"{n:,}" for n in CURVE], rotation=45)
        panel.set_title(model)
        panel.set_xlabel("tokens of context")
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel("attention, MB a token (online and dealer)")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def count_all(arguments, result: dict, save) -> None:
    """Fills ``result`` with what has not been counted."""
    cells, prefills = result.setdefault("cells", {}), result.setdefault("prefills", {})
    models = ["shipped"] if arguments.quick else list(MODELS)
    todo = [(model, length, policy) for model in models for length in CURVE for policy in MPCACHE]
    if arguments.quick:
        todo = [entry for entry in todo if entry[1] in LENGTHS["shipped"]]
    todo += [(model, length, policy) for model in models for length in LENGTHS[model] for policy in others(model)]
    todo = [entry for entry in todo if key(*entry) not in cells]
    for entry in tqdm(todo, unit="step", disable=not sys.stderr.isatty()):
        cells[key(*entry)] = cell(*entry)
        sign(result)
        save()
    for length in LENGTHS["shipped"]:
        for policy in (STATIC, *DYNAMICS):
            if f"{length}/{policy}" not in prefills:
                prefills[f"{length}/{policy}"] = prefill_cell(length, policy)
                sign(result)
                save()
    if "parts" not in result:
        result["parts"] = parts("shipped", 2048, (FULL, STATIC, DYNAMIC, ONE_LEVEL))
        sign(result)
        save()


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the shipped model alone; measured: 512 tokens, two steps")
    parser.add_argument("--measure", action="store_true", help="run decode steps instead of counting them")
    parser.add_argument("--engine", default="wire", help="with --measure: wire or crypten (default: wire)")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS["shipped"]), metavar="T")
    parser.add_argument("--policies", nargs="+", default=[FULL, STATIC, DYNAMIC, ONE_LEVEL], metavar="POLICY")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="pairs of each length (default: 3)")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="counted steps of a run (default: 5)")
    parser.add_argument("--timeout", type=float, default=900.0, metavar="S")
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS, metavar="F", help="keep the figures (default: results/)"
    )
    arguments = parser.parse_args()
    if arguments.quick and arguments.measure:
        arguments.lengths, arguments.repeats, arguments.steps = [512], 1, 2
    path = arguments.json
    if path == RESULTS:
        path = RESULTS / ("eviction_time.json" if arguments.measure else "eviction_cost.json")
    result = kept.load(path)

    def tables() -> str:
        if arguments.measure:
            return markdown({"One decode step, measured": measured_table(result["runs"], FULL)})
        return markdown(counted_tables(result))

    def save() -> None:
        kept.save(path, result)
        if path:
            path.with_suffix(".md").write_text(tables(), "utf-8")

    (measure if arguments.measure else count_all)(arguments, result, save)
    save()
    if path and not arguments.measure:
        draw(result["cells"], path.with_suffix(".png"))
    print(tables(), end="")


if __name__ == "__main__":
    sys.exit(main())
