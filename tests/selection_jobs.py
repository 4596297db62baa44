"""Small programs over ``eviction.operations``, the same for every engine, and a model under a policy.

Owns what tests of selection have parties do (see ``parties``), and imports no more than a party does.
"""

import torch
from eviction_runs import peaked_weights

import eviction
from crypten_llm.engines.crypten import engine as crypten_engine  # noqa: F401  (imported once in the server)
from crypten_llm.models.checkpoint import expected_shapes
from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.llama import Llama
from crypten_llm.session.reveal import RevealLog
from eviction.operations import Choice


def top_picks(ops, x, count):
    bits = ops.top(x, count)
    return [bits, ops.picks(bits, count)]


def chosen(ops, x, count):
    """What ``best`` takes, in whatever order."""
    return [ops.total(ops.best(x, count), 1)]


def attend(ops, likeness, scores, values, size, first, rows, count):
    """Scores gathered by the ``count`` likeliest blocks, and what attention over them gives."""
    picks = ops.picks(ops.top(likeness, count), count) if count else None
    choice = Choice(torch.tensor(rows), picks, first, size)
    gathered = ops.gather_scores(choice, scores)
    weights = ops.scatter_weights(choice, ops.softmax(gathered), scores.shape[-1])
    return [gathered, ops.mix(weights, values)]


def evicted(ops, rows, likeness, count, index):
    """Rows kept by a secret choice, some taken at public places, joined, all but the worst of the first, and blocks of
    two rows kept."""
    keep = ops.keep(rows, ops.picks(ops.top(likeness, count), count))
    worst, half = ops.top(ops.scale(likeness, -1), 1), rows.shape[1] // 2
    blocks = ops.picks(ops.top(likeness[..., :half], (count + 1) // 2), (count + 1) // 2)
    return [
        ops.cat([ops.take(rows, torch.tensor(index)), keep], 1),
        ops.drop(rows, worst),
        ops.keep(rows, blocks, 2),
    ]


def composed(ops, x, first, second):
    bits = ops.top(first, 6)
    both = ops.gather(ops.best(second, 2), ops.picks(bits, 6))
    sums = ops.gather(bits.reshape(first.shape[0], 1, first.shape[1]), x)
    return [ops.total(ops.gather(both, x), 1), sums]


def mixed_precision(ops, x, threshold):
    """Bits and numbers with fractions, added and joined; the bits stay what they were."""
    bits = ops.above(x, threshold)
    both = ops.cat([ops.add(bits, x), bits, ops.scale(bits, 1 / 3), ops.scale(x, 0.3)], 0)
    return [both, ops.transform(bits, torch.full((x.shape[-1], 1), 0.7)), ops.multiply(bits, bits)]


def compute(ops, name, secrets, public):
    """The program, or the operation, of this name: a list of handles."""
    program = globals().get(name)
    made = program(ops, *secrets, *public) if program else getattr(ops, name)(*secrets, *public)
    return made if isinstance(made, list) else [made]


@torch.inference_mode()
def cases(engine, cases):
    """Each case (name, secrets, public): what the client sees of it, and the online rounds and bytes it took there."""
    outcomes, log = [], RevealLog()
    for name, secrets, public in cases:
        handles = [engine.parameter(x if engine.rank == 0 else None, x.shape) for x in secrets]
        before = engine.meter.snapshot()
        made = compute(engine, name, handles, public)
        online = (engine.meter.snapshot() - before).online
        values = [log.open_to_client(engine, x, 1, "a test's result", "to compare") for x in made]
        outcomes.append((values, online.rounds, online.bytes_sent))
    return outcomes


@torch.inference_mode()
def logits(engine, policy, layers, prompt, steps):
    """At the client, logits [1 + steps, V] under a policy: a prompt, then single tokens."""
    sizes = {"hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "layers": layers}
    config = LlamaConfig.from_sizes(**sizes, vocab=64, context=256, tied=True)
    shapes, held = expected_shapes(config), peaked_weights(config, 0.6, seed=3)
    llama = Llama(engine, config, {n: engine.parameter(held[n] if engine.rank == 0 else None, shapes[n]) for n in held})
    ids = torch.randint(0, 64, (prompt + steps,), generator=torch.Generator().manual_seed(prompt))
    told, rows, cache = engine.rank == 1 or not engine.is_private, [], llama.new_cache()
    cache.follow(eviction.parse(policy), prompt)
    for piece in (ids[:prompt], *ids[prompt:, None]):
        out = llama(engine.tokens(piece if told else None, len(piece), 64), cache, seq_len=prompt)
        if not rows:
            cache.end_prompt()
        rows.append(RevealLog().open_to_client(engine, out, 1, "logits of a test", "to compare"))
    return torch.cat(rows) if told else None
