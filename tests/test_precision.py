"""The presets of engine ``wire``: rings of either, what the quantised one computes and sends, and what it refuses."""

import pytest
import torch
from hf_models import tiny
from wire_parties import OWNER, joined, play, run, share

from crypten_llm.commands.cost import predict
from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.engines.wire.engine import WireEngine
from crypten_llm.engines.wire.numbers import WireConfig
from crypten_llm.errors import UsageError
from crypten_llm.kernels import cpu, cuda, reference, ring
from crypten_llm.models import checkpoint
from crypten_llm.models.balance import REACH, balance
from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.llama import Llama, prepare
from crypten_llm.precisions import PRECISIONS
from crypten_llm.protocols.activation import SILU_SHORT, activate
from crypten_llm.session.calibration import proofs
from crypten_llm.session.mode import Mode
from crypten_llm.session.plan import Plan
from crypten_llm.session.settings import ProtocolConfig

WIDTHS = "hidden attended product gated divided key rotated mlp logits mixed".split()
QUANTISED = WireConfig.quantised()


def widths(config):
    return {name: getattr(config, f"{name}_width") for name in WIDTHS}


def test_the_defaults_rings_are_what_they_were():
    due = [35, 49, 47, 59, 64, 33, 64, 45, 48, 40]
    assert list(widths(WireConfig.of("default")).values()) == due and WireConfig.of("default") == WireConfig()
    assert (WireConfig().exponents.opened, WireConfig().gate.ring, WireConfig().gate.opened) == (22, 28, 19)


def test_rings_of_large_products_take_int32():
    found = widths(QUANTISED)
    assert max(found[name] for name in ("mlp", "product", "key", "mixed")) <= 32
    assert all(found[name] < width for name, width in widths(WireConfig()).items())
    assert WireConfig.choosing("quantised").logit_room == 1 and Mode.parse("tokens").wire("quantised").balanced


def test_products_of_int32():
    for rows, depth, columns in ((1, 9, 5), (3, 40, 21), (8, 17, 4), (9, 6, 7)):
        draw = torch.Generator().manual_seed(rows)
        x, w = (torch.randint(-(2**31), 2**31, (n, depth), generator=draw).int() for n in (rows, columns))
        for name, right in (("matmul_nt", w), ("matmul_nn", w.T)):
            found = [ring.low_bits(getattr(each, name)(x, right), 32) for each in (cpu, cuda, reference)]
            assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[2])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_balanced_weights_are_the_same_model(family, tmp_path):
    """With biases and groups of heads; afterwards no value and nothing that a gate is multiplied with passes REACH."""
    folder, _ = tiny(tmp_path, model_type=family)
    config = LlamaConfig.from_folder(folder)
    weights = {name: prepare(name, value, config) for name, value in checkpoint.load_weights(folder, config)}
    ids, engine = torch.arange(3, 12), PlainEngine()

    def logits():
        model = Llama(engine, config, {name: engine.parameter(value, value.shape) for name, value in weights.items()})
        return model(engine.tokens(ids, len(ids), config.vocab_size), model.new_cache(), last_only=False)

    before = logits()
    balance(weights, config)
    torch.testing.assert_close(logits(), before, atol=1e-4, rtol=0)
    for name, most in proofs(config, weights):
        if name in ("v_proj", "up_proj"):
            assert most == pytest.approx(REACH, rel=1e-5)


def test_gates_in_few_bits():
    one, end = 1 << SILU_SHORT.fraction, SILU_SHORT.bound() / SILU_SHORT.unit
    integers = torch.cat([torch.arange(-16 * one, 16 * one, 7), torch.arange(round(-end * one), round(end * one), 31)])

    def job(runtime):
        x = share(runtime, integers, SILU_SHORT.fraction, width=SILU_SHORT.ring, bits=8)
        return play(runtime, activate(runtime, x, SILU_SHORT))

    owner, client, _ = run(job).results
    (value, flag), made = (joined(*pair) for pair in zip(owner, client, strict=True)), owner[0]
    x = integers.double() / one * SILU_SHORT.unit
    error = value.double() / 2.0**made.scale - SILU_SHORT.function(x)
    assert error.abs().max() <= SILU_SHORT.error < 0.006 and not (flag & 1).any()


def test_fewer_bytes_in_as_many_rounds():
    """At the sizes of SmolLM2-135M, two layers for thirty."""
    config = LlamaConfig.from_sizes(hidden=576, heads=9, kv_heads=3, ffn=1536, layers=2, vocab=3000, context=600)
    found = [predict(config, Plan(256, 2, 256), precision=name) for name in PRECISIONS]
    for phase in ("prefill", "decode"):
        default, quantised = (each.phase(phase) for each in found)
        assert quantised["rounds"] == default["rounds"]
        assert max(quantised["bytes_sent"]) < 0.7 * max(default["bytes_sent"])
        assert quantised["dealer_bytes"] < default["dealer_bytes"] and quantised["seconds"] < default["seconds"]
    assert found[1].memory["client"]["weights"] < found[0].memory["client"]["weights"]
    with pytest.raises(UsageError, match="policy mpcache computes with scores and values of the default precision"):
        predict(config, Plan(256, 2, policy="mpcache"), precision="quantised")


def test_what_is_no_precision_is_refused():
    with pytest.raises(UsageError, match="precision is 'int8'; it must be default or quantised"):
        ProtocolConfig(precision="int8")
    with pytest.raises(UsageError, match="engine 'plain' has no precision 'quantised'"):
        ProtocolConfig(engine="plain", precision="quantised")
    assert ProtocolConfig(precision="quantised").agreement() != ProtocolConfig().agreement()


def test_weights_that_are_not_balanced_are_refused():
    """Values above 1 would leave their ring."""

    def job(engine):
        is_owner = engine.rank == OWNER
        value = engine.parameter(torch.full((4, 8), 3.0) if is_owner else None, (4, 8))
        norm = engine.parameter(torch.ones(8) if is_owner else None, (8,))
        if is_owner:
            with pytest.raises(UsageError, match="values of this model may leave the range of engine 'wire', 1"):
                engine.prepare(value, norm, "v_proj")

    run(lambda runtime: job(WireEngine(runtime.transport, QUANTISED, runtime=runtime)))
