"""Every engine computes what Hugging Face's Llama computes, and each operation of ``crypten`` what ``plain``'s does."""

from dataclasses import dataclass, replace

import party_jobs
import pytest
import torch
from hf_models import EVERY_CASE, FAMILIES, options, reference_logits, tiny
from parties import run
from safetensors.torch import load_file, save_file

from crypten_llm.commands import cli
from crypten_llm.commands.options import settings
from crypten_llm.engines import check_engine
from crypten_llm.engines.crypten.domain import CryptenConfig, norm_scales
from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.errors import UsageError
from crypten_llm.links.frames import HEADER
from crypten_llm.models import checkpoint
from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.llama import Llama, prepare
from crypten_llm.session import generation, prompted
from crypten_llm.session.calibration import measure
from crypten_llm.session.party import Party
from crypten_llm.session.plan import Plan
from crypten_llm.session.settings import LaunchConfig, ProtocolConfig, split

IDS = torch.randint(3, 97, (30,), generator=torch.Generator().manual_seed(5))


def load_plain(folder):
    config = LlamaConfig.from_folder(folder)
    weights = {name: prepare(name, value, config) for name, value in checkpoint.load_weights(folder, config)}
    return Llama(PlainEngine(), config, weights)


@torch.no_grad()
def logits_in_pieces(model, ids, pieces, seq_len):
    """Logits [T, V] of ``ids`` passed in chunks of these sizes, each told the length of the whole prompt."""
    cache, start, rows = model.new_cache(), 0, []
    for size in pieces:
        one_hot = model.engine.tokens(ids[start : start + size], size, model.config.vocab_size)
        rows.append(model(one_hot, cache, last_only=False, seq_len=seq_len))
        start += size
    return torch.cat(rows)


@pytest.mark.parametrize("case", EVERY_CASE)
def test_plain_equals_hugging_face(tmp_path, case):
    folder, reference = tiny(tmp_path, **EVERY_CASE[case])
    model = load_plain(folder)
    expected = reference_logits(reference, IDS)
    for pieces in ([30], [7, 1, 13, 9]):
        torch.testing.assert_close(logits_in_pieces(model, IDS, pieces, 30), expected, atol=1e-4, rtol=0)
    # Decoding: from token 20 on one at a time, where dynamic RoPE grows with the length reached.
    expected = reference_logits(reference, IDS, prefill=20)
    decoded = logits_in_pieces(model, IDS, [20] + [1] * 10, 0)
    torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=0)


class Watched(PlainEngine):
    """Notes of each product which norm's output it was announced to take and which bias to add, and what it took and
    added; and the names."""

    def __init__(self):
        super().__init__()
        self.announced, self.names, self.taken, self.normed = [], [], [], []

    def prepare(self, weight, norm=None, name="", bias=None):
        self.announced.append((id(weight), norm if norm is None else id(norm), bias if bias is None else id(bias)))
        self.names.append(name)

    def rms_norm(self, x, weight, eps, scale):
        out = super().rms_norm(x, weight, eps, scale)
        self.normed.append((out, weight))
        return out

    def linear(self, x, weight, bias=None):
        before = [id(norm) for out, norm in self.normed if out is x]
        self.taken.append((id(weight), *(before or [None]), bias if bias is None else id(bias)))
        return super().linear(x, weight, bias)


@pytest.mark.parametrize("case", ["gqa", "tied", "mlp_bias", *FAMILIES])
def test_products_are_announced_with_the_norm_before_them(tmp_path, case):
    folder, _ = tiny(tmp_path, **EVERY_CASE[case])
    config, engine = LlamaConfig.from_folder(folder), Watched()
    weights = {name: prepare(name, value, config) for name, value in checkpoint.load_weights(folder, config)}
    model = Llama(engine, config, weights)
    assert engine.announced.pop(0) == (id(weights["model.embed_tokens.weight"]), None, None)  # as a table
    of_layer = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert engine.names == ["embed_tokens", *of_layer * config.num_hidden_layers, "lm_head"]
    logits_in_pieces(model, IDS, [30], 30)
    assert engine.announced == engine.taken and len(engine.taken) == 7 * config.num_hidden_layers + 1


LONG = torch.randint(3, 97, (100,), generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_beyond_the_length_before_the_stretch(tmp_path, kind):
    """As Vicuna-16k and LongChat-32k are configured; 100 tokens, of which 64 would fit without the factor."""
    rope = dict(rope_type=kind, rope_theta=10000.0, factor=4.0)
    folder, reference = tiny(tmp_path, max_position_embeddings=64, rope_parameters=rope)
    model = load_plain(folder)
    logits = logits_in_pieces(model, LONG, [60, 30, 10], 100)
    torch.testing.assert_close(logits, reference_logits(reference, LONG), atol=1e-4, rtol=0)
    logits = logits_in_pieces(model, LONG, [50] + [1] * 50, 0)
    torch.testing.assert_close(logits, reference_logits(reference, LONG, prefill=50), atol=1e-4, rtol=0)

    party, found = Party(model.engine), []
    party.model = model
    plan = Plan(90, 8, chunk=40).check(model.config)
    for event in generation.run(party, plan, prompted.Answer(LONG[:90].tolist(), lambda row: int(row.argmax()))):
        found += [event.token_id] if isinstance(event, prompted.Step) else []
    ids = torch.tensor([*LONG[:90], *found])
    expected = reference_logits(reference, ids, prefill=90)
    assert found == expected[89:-1].argmax(-1).tolist()
    with pytest.raises(UsageError, match="the model's context is 256; shorten the prompt by 2 tokens"):
        Plan(250, 8).check(model.config)


@pytest.mark.parametrize("case", FAMILIES)
def test_the_attention_scale_is_folded_into_one_parameter_a_layer(tmp_path, case):
    folder, _ = tiny(tmp_path, **FAMILIES[case])
    config = LlamaConfig.from_folder(folder)
    changed = {
        name.partition("self_attn.")[2].removesuffix(".weight")
        for name, value in checkpoint.load_weights(folder, config)
        if not torch.equal(prepare(name, value, config), value)
    }
    assert changed - {"q_proj.bias"} == {"q_norm" if "qwen3" in case else "q_proj"}
    assert ("q_proj.bias" in changed) == ("qwen2" in case)


def normal(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    """One operation of engine ``crypten`` on secrets. tolerance, relative: of its result. cost: its (rounds, bytes
    sent), or its rounds, where they are checked.
    """

    method: str
    secrets: list
    public: tuple = ()
    tolerance: float = 1e-3
    relative: float = 0.0
    cost: tuple | int | None = None


def of_mean_square(size):
    x = normal(4, 64)
    return x * (size / x.square().mean(-1, keepdim=True)).sqrt()


def rms_norm(x, scale=1.0, **declared):
    return Case("rms_norm", [x, 1 + 0.3 * normal(64, seed=1)], (1e-6, scale), **declared)


def softmax(scores, **declared):
    return Case("softmax", [scores], tolerance=2e-3, relative=2.5e-2, **declared)


def swiglu(gate, **declared):
    return Case("swiglu", [gate, torch.ones_like(gate)], **declared)


ROWS, OUT, BIAS = normal(3, 16), normal(5, 16, seed=1), normal(5, seed=2)
LEFT, RIGHT, ANGLES = normal(2, 5, 33), normal(2, 33, 7, seed=1), torch.arange(5)[:, None] * torch.ones(8)
IDS_OF_1001 = torch.nn.functional.one_hot(torch.tensor([0, 1000, 499]), 1001).float()
GATES = torch.cat([torch.linspace(-60, 60, 121), torch.linspace(-2, 2, 81), torch.tensor([0.0])])
UNEVEN = torch.tensor([[100.0, 0.0, -20.0, 99.0], [0.0, 0.0, 0.0, 0.0], [-60.0, -60.0, 40.0, -60.0]])
MATMUL = Case("matmul", [LEFT, RIGHT], cost=(1, 8 * (LEFT.numel() + RIGHT.numel()) + HEADER.size))
OPERATIONS = {
    "matmul": MATMUL,
    "linear": Case("linear", [ROWS, OUT, None]),
    "linear with a bias": Case("linear", [ROWS, OUT, BIAS]),
    "embed": Case("embed", [IDS_OF_1001, normal(1001, 6)], tolerance=1e-4),
    "rotate": Case("rotate", [3 * normal(2, 5, 8)], (ANGLES.cos(), ANGLES.sin()), cost=(0, 0)),
    **{
        f"rms_norm of mean square {size}": rms_norm(of_mean_square(size), tolerance=6e-3, cost=26)
        for size in (0.05, 0.1, 1.0, 2.7, 30.0, 170.0)
    },
    **{  # any size is brought into the domain
        f"rms_norm of numbers near {size}": rms_norm(size * normal(8, 64), scale, tolerance=4e-3)
        for size, scale in ((3e-2, 4.0**6), (1.0, 1.0), (300.0, 4.0**-7))
    },
    "rms_norm of heads": Case("rms_norm", [normal(4, 5, 16), 1 + 0.3 * normal(16, seed=1)], (1e-6, 1.0), 6e-3, cost=26),
    **{
        f"softmax over {keys}": softmax(3 * normal(2, 4, keys), cost=37 + 9 * (keys - 1).bit_length())
        for keys in (1, 2, 3, 17, 256, 1000)
    },
    "softmax of one key among large scores": softmax(UNEVEN),
    "swiglu": swiglu(GATES, tolerance=2e-2, cost=24),
    "swiglu where CrypTen's own sigmoid is off by 4e-3": swiglu(torch.linspace(-1, 1, 41), tolerance=1.5e-3),
}


def outcomes(cases, **options):
    """What the client saw of each case, all in one run of real parties: value, rounds, bytes sent."""
    return run(party_jobs.operations, [(case.method, case.secrets, case.public) for case in cases], **options)[1]


def check(case, outcome):
    """Against ``plain``, and the declared cost."""
    value, *cost = outcome
    expected = getattr(PlainEngine(), case.method)(*case.secrets, *case.public)
    torch.testing.assert_close(value, expected, atol=case.tolerance, rtol=case.relative)
    assert case.cost in (None, cost[0], tuple(cost))


@pytest.fixture(scope="module")
def of_two_parties():
    return dict(zip(OPERATIONS, outcomes(OPERATIONS.values()), strict=True))


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(of_two_parties, name):
    check(OPERATIONS[name], of_two_parties[name])


def test_three_parties_multiply():
    (outcome,) = outcomes([MATMUL], parties=3)
    check(replace(MATMUL, cost=None), outcome)


def test_matmul_at_the_edge_of_its_domain():
    x = torch.full((1, 4), 2.0**7)
    case = Case("matmul", [x, torch.ones(4, 1) * 2.0**4], tolerance=2**-9, cost=(1, 64 + HEADER.size))
    check(case, *outcomes([case], precision_bits=12))


def test_softmax_never_weighs_what_may_not_be_seen():
    scores = 3 * normal(2, 6, 6)
    scores[:, 0, 1:] = 50.0  # larger than all that the first row may see
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    case = replace(softmax(scores), public=(mask,))
    (outcome,) = outcomes([case])
    assert (outcome[0].masked_select(~mask) == 0).all()
    check(case, outcome)


def test_one_hot_tokens_are_exact():
    def expected(ids):
        return torch.nn.functional.one_hot(torch.tensor(ids), 11).float()

    assert torch.equal(run(party_jobs.tokens, [3, 0, 10], 11)[1], expected([3, 0, 10]))


def test_large_values_open_exactly():
    x = torch.tensor([-300.5, -1.0, 0.0, 1 / 256, 1000.25])
    ((value, *_),) = outcomes([Case("add", [x, torch.zeros(5)])], precision_bits=8)
    assert torch.equal(value, x)


@pytest.mark.parametrize(
    "model", [options("mha", "tied", "attention_bias"), options("mqa", "wide_heads", "rope_llama3", "mlp_bias")]
)
def test_crypten_logits_are_close_to_plain(tmp_path, model):
    folder, _ = tiny(tmp_path, **model)
    plain = load_plain(folder)
    expected = logits_in_pieces(plain, IDS[:6], [4, 2], 6)
    value = run(party_jobs.logits, str(folder), IDS[:6], [4, 2])[1]
    assert (value - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize(
    "model", [options("qwen3"), options("qwen3_options"), options("qwen2_window"), options("mistral_window_of_two")]
)
def test_crypten_logits_of_another_family_are_close_to_plain(tmp_path, model):
    folder, _ = tiny(tmp_path, **model)
    expected = logits_in_pieces(load_plain(folder), IDS[:6], [4, 2], 6)
    value = run(party_jobs.logits, str(folder), IDS[:6], [4, 2])[1]
    assert (value - expected).abs().max() < 0.05 * expected.abs().max()


def test_norms_on_heads_are_brought_into_their_domain(tmp_path):
    """Queries 32 times as large leave it and keys a 32nd, unless each norm is given its own power of four."""
    folder, _ = tiny(tmp_path, **FAMILIES["qwen3"])
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        tensors[name] = tensors[name] * (32 if ".q_proj." in name else 1 / 32 if ".k_proj." in name else 1)
    save_file(tensors, folder / "model.safetensors")
    expected = logits_in_pieces(load_plain(folder), IDS[:6], [4, 2], 6)
    value = run(party_jobs.logits, str(folder), IDS[:6], [4, 2])[1]
    assert (value - expected).abs().max() < 0.05 * expected.abs().max()


def test_every_norm_is_measured_for_its_scale(tmp_path):
    """Also those on heads: queries of one layer are 2^10 times, keys 2^-10 times as large as they were."""
    folder, _ = tiny(tmp_path, **FAMILIES["qwen3"])
    config = LlamaConfig.from_folder(folder)
    weights = {name: prepare(name, value, config) for name, value in checkpoint.load_weights(folder, config)}
    before = norm_scales(measure(config, weights))
    assert before.keys() == {name for name in weights if "norm" in name}
    query, key = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qk")
    weights[query], weights[key] = weights[query] * 2**10, weights[key] / 2**10
    after = norm_scales(measure(config, weights))
    changed = {name: after[name] / before[name] for name in before if after[name] != before[name]}
    assert changed == {
        "model.layers.1.self_attn.q_norm.weight": 4.0**-10,
        "model.layers.1.self_attn.k_norm.weight": 4.0**10,
    }


def test_defaults_are_the_declared_ones():
    assert CryptenConfig() == CryptenConfig(15, 0, 5, 10)


@pytest.mark.parametrize("command", ["generate", "bench", "party"])
def test_the_command_line_and_a_program_have_the_same_defaults(command):
    """A client that is a program meets parties that commands started."""
    given = settings(cli._parser().parse_args([command]))
    assert split(given) == (ProtocolConfig(), LaunchConfig(progress=given["progress"]))
    assert ProtocolConfig().precision_bits == CryptenConfig().precision_bits


def test_precision_is_agreed_on_where_it_is_used():
    agreed = {
        engine: {ProtocolConfig(engine, precision_bits=bits).agreement().precision_bits for bits in (14, 15)}
        for engine in ("crypten", "wire")
    }
    assert agreed == {"crypten": {14, 15}, "wire": {None}}


def test_unknown_engine_suggests_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'crypten'"):
        check_engine("cripten")
