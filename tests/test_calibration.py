"""What the owner measures and proves of its model, what it is shown of that, and what becomes of a model outside."""

import json
import math
import re
import shutil

import pytest
import torch
from hf_models import EVERY_CASE, tiny, with_tokenizer
from ranged_models import scaled

from crypten_llm.commands.cli import main
from crypten_llm.engines.crypten import domain as crypten_domain
from crypten_llm.engines.crypten.domain import CryptenConfig
from crypten_llm.engines.domain import CHECKED, MEASURED, PROVED, Calibration, Limit, Reached
from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.engines.wire import domain as wire_domain
from crypten_llm.engines.wire.numbers import WireConfig
from crypten_llm.errors import UsageError, public_words
from crypten_llm.models import checkpoint
from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.llama import Llama, prepare
from crypten_llm.session import calibration
from crypten_llm.session.admission import WARNING, Admission

SHIPPED = checkpoint.SHIPPED


def loaded(folder):
    config = LlamaConfig.from_folder(folder)
    return config, {name: prepare(name, value, config) for name, value in checkpoint.load_weights(folder, config)}


def measured(folder, text=()):
    return calibration.measure(*loaded(folder), text)


# What is measured.


@pytest.mark.parametrize("case", ["gqa", "tied", "mqa", "mistral_window"])
def test_hidden_states_are_those_of_transformers(case, tmp_path):
    """Over all tokens of a text in pieces of the context, and random ones; whatever chunks they are run in."""
    folder, model = tiny(tmp_path, **EVERY_CASE[case])
    config = LlamaConfig.from_folder(folder)
    text = torch.randint(config.vocab_size, (150,), generator=torch.Generator().manual_seed(5)).tolist()
    random = torch.randint(config.vocab_size, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    assert config.context == 64
    states = []
    with torch.no_grad():
        for ids in (text[:64], text[64:128], text[128:], random):
            out = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
            states += [state[0] for state in out.hidden_states[:-1]]  # of the last, transformers shows the norm
    found = measured(folder, text)
    assert found.tokens == {"tokens of text": 150, "random tokens": 64}
    first = config.family.norm_before("model.layers.0.self_attn.q_proj")
    sizes = torch.cat([s.square().mean(-1) for s in states[:: config.num_hidden_layers]])
    low, high = found.mean_square[f"{first}.weight"]
    assert low == pytest.approx(sizes.min().item() + config.rms_norm_eps, rel=1e-4)
    assert high == pytest.approx(sizes.max().item() + config.rms_norm_eps, rel=1e-4)
    inner = torch.cat([s for i, s in enumerate(states) if i % config.num_hidden_layers])
    low, high = found.limited["residual"]
    assert low <= inner.min().item() + 1e-4 and high >= inner.max().item() - 1e-4


def test_a_text_reaches_what_it_alone_reaches(tmp_path):
    """One token, that random ones do not hold, has an embedding ten times the others'."""
    folder, _ = tiny(tmp_path, vocab_size=512)
    config, weights = loaded(folder)
    before = calibration.measure(config, weights)
    weights["model.embed_tokens.weight"][5] *= 10
    assert calibration.measure(config, weights).limited == before.limited
    after = calibration.measure(config, weights, [7, 9, 5, 11])
    first = "model.layers.0.input_layernorm.weight"
    assert after.mean_square[first][1] > 20 * before.mean_square[first][1]
    assert all(after.mean_square[norm][0] <= low for norm, (low, _) in before.mean_square.items())


def test_what_is_no_number_stays(tmp_path):
    """Wherever in the run it is, it is found, shown, and refused by both engines."""
    folder, _ = tiny(tmp_path)
    config, weights = loaded(folder)
    weights["model.layers.0.mlp.down_proj.weight"][3, 3] = math.nan
    ranges = calibration.measure(config, weights)
    assert all(math.isnan(end) for end in ranges.limited["residual"])
    wire, crypten = wire_domain.calibrate(WireConfig(), ranges), crypten_domain.calibrate(CryptenConfig(), ranges)
    assert "hidden states leave the range" in wire.refusal() and "nan" in wire.table(ranges.tokens)
    assert "hidden states leave the range" in crypten.refusal()
    weights["model.layers.1.self_attn.v_proj.weight"][0, 0] = math.nan
    assert math.isnan(calibration.measure(config, weights).proved["v_proj"])


def test_the_owner_shows_that_it_lives(tmp_path):
    folder, _ = tiny(tmp_path, max_position_embeddings=512)
    config, weights = loaded(folder)
    told = []
    calibration.measure(config, weights, list(range(90)) * 4, told.append)
    norms = 2 * config.num_hidden_layers + 1
    assert told == [done for done in (0, 128, 256, 360) for _ in range(norms)]  # 360 of text, then random ones


# What is proved.


@pytest.mark.parametrize("case", ["gqa", "attention_bias", "tied", "qwen2", "qwen3"])
def test_no_input_goes_beyond_what_is_proved_and_one_reaches_it(case, tmp_path):
    config, weights = loaded(tiny(tmp_path, **EVERY_CASE[case])[0])
    proved = calibration._largest(calibration.proofs(config, weights))
    engine, generator = PlainEngine(), torch.Generator().manual_seed(1)
    most = dict.fromkeys(proved, 0.0)
    for name, norm in [(n, config.family.norm_before(n)) for n in layers(weights)] + [("lm_head", "model.norm")]:
        if norm is None:
            continue
        tied = name == "lm_head" and config.tie_word_embeddings
        weight = weights["model.embed_tokens.weight" if tied else f"{name}.weight"]
        gamma, bias = weights[f"{norm}.weight"], weights.get(f"{name}.bias")
        folded = weight * gamma
        worst = folded[(folded.norm(dim=1) + (0 if bias is None else bias.abs() / folded.shape[1] ** 0.5)).argmax()]
        x = torch.cat([torch.randn(200, len(gamma), generator=generator), worst[None], -worst[None]]) * 1e3
        out = engine.linear(engine.rms_norm(x, gamma, config.rms_norm_eps, 1.0), weight, bias).abs().max().item()
        last = name.rpartition(".")[2]
        most[last] = max(most[last], out)
    most["embed_tokens"] = weights["model.embed_tokens.weight"].abs().max().item()
    assert most.keys() >= {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head", "embed_tokens"}
    for name, out in most.items():
        assert 0.99 * proved[name] <= out <= 1.0001 * proved[name], name


def layers(weights):
    names = (name.removesuffix(".weight") for name, weight in weights.items() if weight.dim() == 2)
    return [name for name in names if name not in ("model.embed_tokens", "lm_head")]


def test_mixed_values_are_measured_where_weights_do_not_prove_them(tmp_path):
    """A row of W_v may be long and never met."""
    folder, _ = tiny(tmp_path)
    ranges = measured(folder)
    (mixed,) = [r for r in wire_domain.calibrate(WireConfig(), ranges).reached if r.limit.what.startswith("mixed")]
    assert mixed.how == PROVED
    ranges.proved["v_proj"] = 257.0
    (mixed,) = [r for r in wire_domain.calibrate(WireConfig(), ranges).reached if r.limit.what.startswith("mixed")]
    assert mixed.how == MEASURED and (mixed.lowest, mixed.highest) == ranges.limited["mix"]
    ranges.proved["gate_proj"] = 257.0
    assert "gates may leave the range" in wire_domain.calibrate(WireConfig(), ranges).refusal()


# What is said of it.


@pytest.mark.parametrize(
    ("limit", "reached", "headroom"),
    [
        ((-8, 4), (-1, 1), 4),
        ((-8, 4), (-4, 1), 2),
        ((0.5, 8), (1, 2), 2),
        ((0.5, 8), (4, 4), 2),
        ((-8, 0), (-2, 0), 4),
        ((-math.inf, 64), (-70, 16), 4),
        ((-math.inf, 64), (-70, -1), math.inf),
        ((0, 8), (0, 16), 0.5),
    ],
)
def test_headroom_is_a_factor(limit, reached, headroom):
    found = Reached(Limit("x", *limit), *reached)
    assert found.headroom == headroom
    assert found.is_inside == (headroom >= 1)
    assert found.is_tight == (1 <= headroom < 2)
    low, high = (end * 0.999 * headroom for end in reached) if headroom < math.inf and limit[0] <= 0 else reached
    assert Reached(Limit("x", *limit), low, high).is_inside


@pytest.mark.parametrize("reached", [(math.nan, 1.0), (0.0, math.nan), (-math.inf, 0.0), (0.0, math.inf)])
def test_what_is_no_number_is_outside(reached):
    found = Reached(Limit("x", -8, 8), *reached)
    assert not found.is_inside and not found.is_tight
    assert "<-- outside" in found.row()


def test_the_other_parties_hear_no_number_of_the_model():
    found = Calibration(
        "wire",
        reached=[
            Reached(Limit("a", -8, 8), -123.25, 0.5, MEASURED),
            Reached(Limit("b", 0, 16), 0.125, 456.5, PROVED),
            Reached(Limit("c", 0, 16), 0.125, 9.5, CHECKED),
        ],
    )
    said = found.refusal()
    assert "a leave the range -8 to 8" in said and "b may leave the range 0 to 16" in said and "\n" not in said
    assert not re.search("123|456|125|0.5", said)
    assert not found.can_be_forced
    assert found.warning().endswith("c (0.8 bits)")
    table = found.table({"tokens of text": 1234, "random tokens": 5})
    assert all(
        word in table for word in ("-123", "456", "proved from the weights", "1,234 tokens of text and 5 random")
    )
    assert table.count("<-- outside") == 2 and table.count("<-- less than 1 bit") == 1


def test_the_least_headroom_that_is_quiet():
    assert not Reached(Limit("x", -8, 8), -4, 4).is_tight
    assert Reached(Limit("x", -8, 8), -4.01, 4).is_tight
    assert not Reached(Limit("x", -8, 8), -8, 8, PROVED).is_tight


# The engines.


def test_the_shipped_model_is_inside_on_both_engines(capsys):
    for engine in ("wire", "crypten"):
        assert main(["calibrate", "--model", "shipped", "--engine", engine, "--json"]) == 0
        out, err = capsys.readouterr()
        found = json.loads(out)
        assert found["engine"] == engine and all(row["is_inside"] for row in found["reached"])
        assert found["tokens"] == {"tokens of text": 512, "random tokens": 128}
        assert "measured on 512 tokens of text and 128 random tokens" in err and WARNING not in err


@pytest.mark.parametrize(
    ("factors", "engine", "said"),
    [
        ({"q_proj": 30}, "crypten", "attention scores less the largest of their row leave the range -128 to 0"),
        ({"gate_proj": 100}, "crypten", "gates leave the range -128 to 128"),
        (
            {"up_proj": 1e9},
            "crypten",
            "gates times what they are multiplied with leave the range -4.29e+09 to 4.29e+09",
        ),
        ({"layers.0.mlp.down_proj": 1e5}, "crypten", ""),
        ({"lm_head": 1e3}, "wire", ""),
        ({"lm_head": 1e6}, "wire", "logits may leave the range -6.55e+04 to 6.55e+04"),
        ({"embed_tokens": 8}, "wire", "entries of the embedding may leave the range -16 to 16"),
        ({"down_proj": 1e5}, "wire", "hidden states leave the range"),
    ],
    ids=str,
)
def test_which_range_is_left(factors, engine, said, tmp_path):
    """And never advice to take the other engine: nothing says that this one would be right."""
    ranges = measured(scaled(tmp_path, factors))
    found = (
        wire_domain.calibrate(WireConfig(), ranges)
        if engine == "wire"
        else crypten_domain.calibrate(CryptenConfig(), ranges)
    )
    refusal = found.refusal()
    assert (said in refusal and refusal.startswith(f"engine {engine!r} would be wrong")) if said else refusal == ""
    assert {"wire": "crypten", "crypten": "wire"}[engine] not in refusal


def test_one_scale_a_norm_does_not_fit_hidden_states_of_all_sizes(tmp_path):
    """As in a real Llama, whose first token has a massive hidden state: inside on engine wire, outside on crypten."""
    folder, _ = tiny(tmp_path)
    config, weights = loaded(folder)
    weights["model.embed_tokens.weight"] *= 0.005
    weights["model.embed_tokens.weight"][::3] *= 1000
    ranges = calibration.measure(config, weights)
    refused = crypten_domain.calibrate(CryptenConfig(), ranges)
    assert "scaled mean squares of hidden states leave the range 0.043 to 173" in refused.refusal()
    assert refused.can_be_forced
    assert wire_domain.calibrate(WireConfig(), ranges).refusal() == ""


def test_the_domains_of_crypten_follow_its_settings():
    few, many = (crypten_domain.domains(CryptenConfig(precision_bits=bits)) for bits in (12, 18))
    assert few["swiglu gates"].high == 2**6 and many["swiglu gates"].high == 2**9
    assert few["linear"].high == 2.0**38 and many["linear"].high == 2.0**26
    assert crypten_domain.domains(CryptenConfig(exp_iterations=8))["softmax below"].low == -256


def test_masked_scores_are_part_of_cryptens_maximum():
    """It subtracts 64 from them; one that is larger still would be taken for the row's largest."""
    recorder = calibration._Recorder()
    scores = torch.tensor([[[1.0, 70.0], [3.0, 2.0]]])
    recorder.softmax(scores, torch.ones(2, 2, dtype=torch.bool).tril())
    assert recorder.limited["softmax hidden"] == (69.0, 69.0)
    assert recorder.limited["softmax below"] == (-1.0, 0.0)
    ranges = calibration.Ranges({"norm.weight": (1.0, 1.0)}, recorder.limited)
    assert "masked attention scores" in crypten_domain.calibrate(CryptenConfig(), ranges).refusal()


# The owner's text.


@pytest.fixture(scope="module")
def worded(tmp_path_factory):
    return with_tokenizer(tmp_path_factory.mktemp("worded"))


def test_prose_is_long_enough_and_plain():
    text = calibration.PROSE.read_text("utf-8")
    assert text.isascii() and len(text.split()) > 2000
    assert len(checkpoint.load_tokenizer(SHIPPED)(text)["input_ids"]) > 2500


@pytest.mark.parametrize(
    ("context", "parameters", "tokens"),
    [(4096, 5e6, 512), (4096, 135e6, 512), (4096, 7e9, 128), (100, 5e6, 100), (4096, 3.5e8, 200)],
)
def test_how_much_of_the_prose_is_measured(context, parameters, tokens):
    config = LlamaConfig.from_sizes(64, 4, 4, 128, 1, 97, context)
    assert len(calibration.enough_of(range(5000), config, int(parameters))) == tokens


def test_a_text_of_the_owners_choice_is_measured_to_its_end(worded, tmp_path, capsys):
    chosen = tmp_path / "asked.txt"
    chosen.write_text("What is the capital of France? " * 300)
    count = len(checkpoint.load_tokenizer(worded)(chosen.read_text())["input_ids"])
    assert count > 600
    assert main(["calibrate", "--model", str(worded), "--calibration-text", str(chosen), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == {"tokens of text": count, "random tokens": 64}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, ": cannot be read"),
        (b" \n", "is empty; give a text like what clients will ask"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_a_text_that_cannot_be_measured(worded, tmp_path, text, message):
    path = tmp_path / "asked.txt"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(UsageError) as refused:
        Admission(str(path)).measure(worded, *loaded(worded))
    assert message in str(refused.value)
    assert str(path) not in public_words(refused.value), "the path stays with the owner"


def test_a_model_without_tokenizer_is_measured_on_random_tokens_alone(tmp_path):
    folder, _ = tiny(tmp_path)
    config, weights = loaded(folder)
    assert Admission().measure(folder, config, weights).tokens == {"random tokens": 64}
    (tmp_path / "asked.txt").write_text("some text")
    with pytest.raises(UsageError, match="no tokenizer"):
        Admission(str(tmp_path / "asked.txt")).measure(folder, config, weights)


def test_a_tokenizer_of_another_model(worded, tmp_path):
    """Its ids would leave the table: no prose, and an error where a text was asked for."""
    folder, _ = tiny(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(worded / name, folder)
    assert Admission().measure(folder, *loaded(folder)).tokens == {"random tokens": 64}
    (tmp_path / "asked.txt").write_text("some text that has tokens with large ids")
    with pytest.raises(UsageError, match="put the model's own tokenizer there"):
        Admission(str(tmp_path / "asked.txt")).measure(folder, *loaded(folder))


# The decision.

OUTSIDE = Calibration("crypten", reached=[Reached(Limit("gates", -8, 8), -9, 9)])
UNPROVED = Calibration("wire", reached=[Reached(Limit("gates", -8, 8), -9, 9, PROVED)])
TIGHT = Calibration("wire", reached=[Reached(Limit("gates", -8, 8), -5, 5)])


def test_decisions():
    said = []
    assert Admission(say=said.append).judge(TIGHT) == "" and len(said) == 1 and said[0].startswith(WARNING)
    with pytest.raises(UsageError, match="gates leave the range -8 to 8; --force shares it all the same"):
        Admission().judge(OUTSIDE)
    assert Admission(force=True).judge(OUTSIDE) == OUTSIDE.refusal()
    for force in (False, True):
        with pytest.raises(UsageError, match="gates may leave the range -8 to 8") as refused:
            Admission(force=force).judge(UNPROVED)
        assert ("--force is for what was measured alone" in str(refused.value)) == force


def test_the_command_refuses_as_a_run_does(tmp_path, capsys):
    folder = scaled(tmp_path, {"gate_proj": 100})
    assert main(["calibrate", "--model", str(folder), "--engine", "crypten"]) == UsageError.exit_code
    err = capsys.readouterr().err
    assert "<-- outside" in err and "gates leave the range -128 to 128; --force" in err.splitlines()[-1]
    assert main(["calibrate", "--model", str(folder), "--engine", "plain"]) == UsageError.exit_code
    assert "engine 'plain' has no range" in capsys.readouterr().err


def test_engine_plain_measures_nothing():
    assert PlainEngine().calibrate(lambda: pytest.fail("measured")) == Calibration("plain")


def test_a_real_models_logits_times_a_thousand(tmp_path):
    """They are plain's on engine wire as they are here: proved, and far from their limit."""
    config, weights = loaded(scaled(tmp_path, {"lm_head": 1e3}))
    ranges = calibration.measure(config, weights)
    (logits,) = [r for r in wire_domain.calibrate(WireConfig(), ranges).reached if r.limit.what == "logits"]
    engine = PlainEngine()
    model = Llama(engine, config, weights)
    out = model(engine.tokens(torch.arange(20), 20, config.vocab_size), model.new_cache(), last_only=False)
    assert out.abs().max().item() <= logits.highest < logits.limit.high
