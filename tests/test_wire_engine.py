"""Each operation of engine ``wire`` against ``plain``'s over its domain, and whole tiny Llamas."""

import math
from random import Random

import pytest
import torch
from hf_models import CASES, FAMILIES, tiny
from wire_parties import CLIENT, DEALER, OWNER, run

from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.engines.wire.engine import WireEngine
from crypten_llm.engines.wire.numbers import WireConfig
from crypten_llm.kernels import ring
from crypten_llm.models import checkpoint
from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.llama import Llama, prepare
from crypten_llm.protocols.activation import SILU
from crypten_llm.protocols.secret import Overflow

PLAIN = PlainEngine()
TWIN = PlainEngine(softmax_base=2.0)  # whose scores are exponents of 2, as those of the engine are
UNIT = 2.0**-14  # of an activation
IDS = torch.randint(3, 97, (14,), generator=torch.Generator().manual_seed(5))


def normal(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def opened(job, *arguments):
    """What the client sees of the handle that ``job(engine, secret, *arguments)`` makes; ``secret`` shares a tensor."""

    def play(engine, *arguments):
        def secret(value, source=OWNER):
            return engine.secret(value if engine.rank == source else None, value.shape, source)

        return engine.open_to(job(engine, secret, *arguments), CLIENT)

    outcome = run(play, *arguments, engine=True)
    assert outcome.results[OWNER] is None and outcome.results[DEALER] is None
    return outcome.results[CLIENT]


def close(value, expected, tolerance):
    torch.testing.assert_close(value, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("source", [OWNER, CLIENT])
def test_secrets_of_either_party(source):
    x = torch.tensor([0.0, -255.9, 255.9, 1 / 3])
    close(opened(lambda engine, secret: secret(x, source)), x, UNIT)


def test_add():
    x, y = 100 * normal(4, 5), 100 * normal(4, 5, seed=1)
    close(opened(lambda engine, secret: engine.add(secret(x), secret(y, CLIENT))), x + y, 2 * UNIT)


def test_add_of_different_scales():
    x, cosine = normal(2, 3, 4), torch.ones(3, 4)
    value = opened(lambda engine, secret: engine.add(secret(x), engine.rotate(secret(x), cosine, 0 * cosine)))
    close(value, 2 * x, 2 * UNIT)


@pytest.mark.parametrize("biased", [False, True])
def test_linear(biased):
    x, weight, bias = 5 * normal(3, 40), normal(7, 40, seed=1) / 6, normal(7, seed=2) if biased else None

    def job(engine, secret):
        held = None if bias is None else engine.parameter(bias, bias.shape)
        return engine.linear(secret(x), engine.parameter(weight, weight.shape), held)

    # Weights and inputs are rounded: 2^-17 of each factor.
    close(opened(job), PLAIN.linear(x, weight, bias), 40 * (15 * 2**-17 + 2**-15))


def test_embed():
    table, ids = normal(50, 8), torch.tensor([0, 49, 7, 7])

    def job(engine, secret):
        one_hot = engine.tokens(ids if engine.rank == CLIENT else None, 4, 50)
        return engine.embed(one_hot, engine.parameter(table, table.shape))

    close(opened(job), table[ids], 2**-17)


def norm(engine, secret, x, gamma, weight, bias=None):
    normed = engine.rms_norm(secret(x), engine.parameter(gamma, gamma.shape), 1e-5, 1.0)
    held = None if bias is None else engine.parameter(bias, bias.shape)
    return engine.linear(normed, engine.parameter(weight, weight.shape), held)


@pytest.mark.parametrize("outputs", [24, 300], ids=["layer", "vocabulary"])
@pytest.mark.parametrize("biased", [False, True])
def test_rms_norm_and_linear_over_row_sizes(outputs, biased):
    """Root mean squares from 0.02 to 200; a row of zeros; the two ways to a large and a small matrix."""
    sizes = torch.tensor([0.02, 0.1, 1.0, 7.0, 60.0, 200.0, 0.0])
    x = normal(len(sizes), 32) * sizes[:, None]
    x.clamp_(-255, 255)
    gamma, weight = 1 + 0.3 * normal(32, seed=1), normal(outputs, 32, seed=2) / 6
    bias = normal(outputs, seed=3) if biased else None
    value = opened(norm, x, gamma, weight, bias)
    expected = PLAIN.linear(PLAIN.rms_norm(x, gamma, 1e-5, 1.0), weight, bias)
    # The smallest row is 0.02 in steps of 2^-14.
    close(value[1:], expected[1:], 4e-3)
    close(value[:1], expected[:1], 2e-2)


@pytest.mark.parametrize("outputs", [97, 200])
def test_what_is_shown_has_no_factor_in_common(outputs):
    """Logits are products with the size of the last hidden state, which is not to be shown with them."""
    x, gamma, weight = 3 * normal(2, 32), torch.ones(32), normal(outputs, 32, seed=2)
    seen = []

    def job(engine):
        secret = engine.secret(x if engine.rank == OWNER else None, x.shape, OWNER)
        normed = engine.rms_norm(secret, engine.parameter(gamma, gamma.shape), 1e-5, 1.0)
        value = engine.linear(normed, engine.parameter(weight, weight.shape)).reshape(2, outputs)
        return engine.open_to(value, CLIENT)

    def shown(self, share, other, cut, width):
        seen.append((ring.low_bits(share + (other << cut), width), cut, width))
        return original(self, share, other, cut, width)

    original = WireEngine._shown
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WireEngine, "_shown", shown)
        value = run(job, engine=True).results[CLIENT]
    ((words, cut, width),) = seen
    assert [math.gcd(*row) for row in words.tolist()] == [1, 1]
    assert cut > 8
    close(value, PLAIN.linear(PLAIN.rms_norm(x, gamma, 1e-5, 1.0), weight), 3e-3)


def test_what_is_shown_is_rounded():
    """The sender's message is its share without the bits below the last that is shown."""
    x = normal(50, 8)

    def job(engine):
        secret = engine.multiply(*2 * [engine.secret(x if engine.rank == OWNER else None, x.shape, OWNER)])
        return secret.scale, secret.width, engine.open_to(secret, CLIENT)

    found = run(job, engine=True)
    scale, width, value = found.results[CLIENT]
    assert scale > WireConfig.shown and max(
        len(frame.payload) for frame in found.frames[OWNER][-1:]
    ) == ring.packed_size(400, width - scale + WireConfig.shown)
    close(value, x * x, 2 * x.abs().max() * UNIT)


def test_two_layers_share_a_norm_and_its_residual():
    x, gamma, first, second = normal(3, 32), torch.ones(32), normal(8, 32, seed=1) / 6, normal(9, 32, seed=2) / 6

    def job(engine, secret):
        x_handle = secret(x)
        normed = engine.rms_norm(x_handle, engine.parameter(gamma, gamma.shape), 1e-5, 1.0)
        outputs = [engine.linear(normed, engine.parameter(w, w.shape)) for w in (first, second)]
        opened = [engine.open_to(handle, CLIENT) for handle in (*outputs, x_handle)]
        return opened

    values = run(
        lambda engine: job(engine, lambda v: engine.secret(v if engine.rank == 0 else None, v.shape, 0)), engine=True
    )
    normed = PLAIN.rms_norm(x, gamma, 1e-5, 1.0)
    for value, expected in zip(values.results[CLIENT], (normed @ first.t(), normed @ second.t(), x), strict=True):
        close(value, expected, 3e-3)


def test_rotate_in_any_layout():
    x, angles = 3 * normal(2, 5, 8), torch.arange(5)[:, None] * torch.ones(8)
    tables = angles.cos(), angles.sin()
    close(opened(lambda engine, secret: engine.rotate(secret(x), *tables)), PLAIN.rotate(x, *tables), 6 * 2**-12)


def test_scores_over_a_growing_cache():
    query, first, second = normal(2, 3, 8), 4 * normal(2, 5, 8, seed=1), 4 * normal(2, 1, 8, seed=2)

    def job(engine, secret):
        older = engine.rows(secret(first))
        engine.scores(secret(query), older)  # opens the older rows
        return engine.scores(secret(query), engine.cat([older, engine.rows(secret(second))], 1))

    close(opened(job), PLAIN.scores(query, torch.cat([first, second], 1)), 8 * 4 * 2**-12)


def softmax_mix(engine, secret, scores, values, mask=None):
    rows = engine.rows(secret(values), values=True)
    return engine.mix(engine.softmax(secret(scores), mask), rows)


@pytest.mark.parametrize("keys", [1, 2, 17, 256, 1000])
def test_softmax_and_mix_over_lengths(keys):
    scores, values = 5 * normal(2, 4, keys), normal(2, keys, 8, seed=1)
    close(opened(softmax_mix, scores, values), TWIN.mix(TWIN.softmax(scores), values), 1e-3)


@pytest.mark.parametrize("seed", range(12))
def test_softmax_over_all_scores_that_are_declared(seed):
    """Rows of random lengths: the largest score anywhere in the domain of a row's sum, the others anywhere below."""
    draw = Random(seed)
    keys, generator = draw.choice([1, 2, 5, 33, 200]), torch.Generator().manual_seed(seed)
    exponents = WireConfig().exponents
    (least, most), (lowest, highest) = exponents.scores, exponents.sums
    top = draw.uniform(lowest + 0.1, min(most, highest) - math.log2(keys) - 0.1)
    scores = least + (top - least) * torch.rand(1, 6, keys, generator=generator)
    scores[:, :3] = top - 3 * torch.rand(1, 3, keys, generator=generator)  # many that weigh alike
    scores[..., draw.randrange(keys)] = top
    values = 4 * normal(1, keys, 8, seed=seed)
    close(opened(softmax_mix, scores, values), TWIN.mix(TWIN.softmax(scores), values), 2e-3)


def test_a_score_may_be_anything_that_the_mask_hides():
    scores, values = 3 * normal(2, 6, 6), normal(2, 6, 8, seed=1)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    scores[:, 0, 1:] = 70.0  # larger than all that the first row may see
    scores[:, 1, 3:] = 3000.0  # and beyond the range
    scores[:, 2, 4:] = -3000.0
    value = opened(softmax_mix, scores, values, mask)
    close(value, TWIN.mix(TWIN.softmax(scores, mask), values), 5e-4)


@pytest.mark.parametrize("size", [1.0, 40.0, 1000.0])
def test_swiglu_over_its_domain(size):
    """Gates from end to end, with what they are multiplied by of any size up to its limit."""
    end, declared = SILU.bound(WireConfig().gates), SILU.error + 2.0**-13
    gate = torch.cat([torch.linspace(-end, end, 397), torch.linspace(-14, 14, 300), torch.tensor([0.0])])
    up = size * (2 * torch.rand(len(gate), generator=torch.Generator().manual_seed(3)) - 1)
    value = opened(lambda engine, secret: engine.swiglu(secret(gate[None]), secret(up[None])))
    error = (value - PLAIN.swiglu(gate, up)[None]).abs()
    assert (error <= declared * (up.abs() + 1) + 2.0**-13 * gate.relu() + 2.0**-10).all()


def test_products_of_secrets_go_through_scores_and_mix():
    with pytest.raises(Overflow, match="through scores and mix"):
        opened(lambda engine, secret: engine.matmul(secret(normal(2, 2)), secret(normal(2, 2))))


# Whole models.


def load(engine, folder):
    config = LlamaConfig.from_folder(folder)
    weights = {}
    if engine.rank == 0:
        weights = {name: prepare(name, value, config) for name, value in checkpoint.load_weights(folder, config)}
    shapes = checkpoint.expected_shapes(config)
    return Llama(engine, config, {name: engine.parameter(weights.get(name), shapes[name]) for name in shapes})


@torch.inference_mode()
def logits(engine, folder, pieces, prompt=IDS):
    """At the client, logits [T, V] of ``prompt`` in chunks of these sizes, each in its own section."""
    model, rows, start = load(engine, folder), [], 0
    cache = model.new_cache()
    for size in pieces:
        with engine.section(f"chunk at {start}"):
            ids = prompt[start : start + size] if engine.rank == 1 or not engine.is_private else None
            one_hot = engine.tokens(ids, size, model.config.vocab_size)
            value = engine.open_to(model(one_hot, cache, last_only=False, seq_len=len(prompt)), CLIENT)
        rows.append(value)
        start += size
    return None if rows[0] is None else torch.cat(rows)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("fp16", "bf16", "sharded")])
def test_logits_of_a_whole_model_are_close_to_plain(tmp_path, case):
    """Prefill in two chunks, then two decoded tokens over the cache."""
    folder, _ = tiny(tmp_path, **CASES[case])
    pieces = [7, 5, 1, 1]
    expected = logits(PLAIN, folder, pieces)
    found = run(logits, folder, pieces, engine=True).results[CLIENT]
    assert expected.abs().max() > 3
    assert (found - expected).abs().max() < 0.004 * expected.abs().max()


@pytest.mark.parametrize("case", FAMILIES)
def test_logits_of_another_family_are_close_to_plain(tmp_path, case):
    """Norms on heads, whose output is rotated, not multiplied by a matrix."""
    folder, _ = tiny(tmp_path, **FAMILIES[case])
    pieces = [7, 5, 1, 1]
    expected = logits(PLAIN, folder, pieces)
    found = run(logits, folder, pieces, engine=True).results[CLIENT]
    assert expected.abs().max() > 3
    assert (found - expected).abs().max() < 0.004 * expected.abs().max()
