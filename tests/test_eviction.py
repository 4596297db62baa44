"""Policies as a whole: their text, settings and edges, and their place in the model and on the command line."""

import ast
import json
from pathlib import Path

import pytest
import torch
from eviction_runs import VOCAB, model, run, trained_data, weights
from hf_models import tiny
from policy_table import NETWORKS, ROWS, TRAINED
from safetensors.torch import load, save

import eviction
from crypten_llm.commands.cli import main
from crypten_llm.commands.trace import ENGINES, trace
from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.errors import UsageError
from crypten_llm.insecure.recorder import Recorder
from crypten_llm.session.generation import run as generate
from crypten_llm.session.party import Party
from crypten_llm.session.plan import Plan, parse_policy
from crypten_llm.session.prompted import Answer
from eviction.__main__ import main as tool
from eviction.full import Full
from eviction.operations import Layer


def test_every_policy_is_tested():
    assert ROWS.keys() == eviction.POLICIES.keys() - {"full"}


@pytest.mark.parametrize("name", eviction.POLICIES)
def test_text_of_a_policy(name):
    """Defaults go unsaid; what is said is read back; facts are there for the table."""
    assert str(eviction.policy(name)) == name
    kind = eviction.POLICIES[name]
    assert all((kind.when, kind.shared_over, kind.reveals, kind.cost))
    if name != "full":
        changed = eviction.parse(f"{name}({ROWS[name].small})")
        assert eviction.parse(str(changed)) == changed != eviction.policy(name)
        assert eviction.parse(name, *ROWS[name].small.split(",")) == changed


def test_one_text_for_one_policy():
    texts = ("mpcache(alpha=0.60, static=0.25)", " mpcache(static=.25)", "mpcache(static=0.25,summary=minmax)")
    assert {str(eviction.parse(text)) for text in texts} == {"mpcache(static=0.25)"}
    assert Plan(5, 1, policy="mpcache(static=0.5)").policy == "mpcache"
    assert eviction.policy("h2o", heavy=8, recent="0.5") == eviction.parse("h2o(heavy=8,recent=0.5)")


@pytest.mark.parametrize(
    "text, words",
    [
        ("mpcash", "unknown policy 'mpcash'; did you mean 'mpcache'?"),
        ("mpcache(statik=1)", "policy mpcache has no setting 'statik'; did you mean 'static'?"),
        ("full(size=1)", "policy full has no setting 'size'; it has none"),
        ("mpcache(static=0.5", "no closing bracket"),
        ("mpcache(static)", "'static' is no setting; write setting=value"),
        ("tova(size=0)", "policy tova: size is '0'; it must be tokens"),
        ("tova(size=1.5)", "size is '1.5'"),
        ("tova(size=-3)", "size is '-3'"),
        ("tova(size=nan)", "size is 'nan'"),
        ("tova(size=inf)", "size is 'inf'"),
        ("tova(size=many)", "size is 'many'"),
        ("quest(page=0)", "page is '0'; it must be a whole number, 1 or more"),
        ("quest(page=2.5)", "page is '2.5'"),
        ("mpcache(alpha=1.1)", "alpha is '1.1'; it must be a number from 0 to 1"),
        ("mpcache(first=0)", "first is '0'; it must be a number above 0, at most 1"),
        ("mpcache(summary=max)", "summary is 'max'; it must be minmax or mean or bound"),
        ("mpcache(share=perhaps)", "share is 'perhaps'; it must be true or false"),
        ("mpcache(coarse=32,fine=12)", "coarse is 32; it must be a multiple of fine, which is 12"),
        ("mikv(bits=9)", "bits is '9'; it must be a whole number, 2 or more, 8 at most"),
        ("snapkv(kernel=4)", "kernel is 4; it must be odd"),
        ("infllm(block=2)", "representatives is 4; a block has 2 rows"),
    ],
)
def test_mistakes(text, words):
    with pytest.raises(UsageError) as caught:
        parse_policy(text)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("heads, kv_heads, layers", [(4, 2, 3), (4, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("name", ROWS)
def test_what_leaves_nothing_out_is_full(name, heads, kv_heads, layers):
    sizes = {"heads": heads, "kv_heads": kv_heads, "layers": layers}
    expected = run("full", 40, 6, **sizes).logits
    found = run(f"{name}({ROWS[name].everything})", 40, 6, **sizes).logits
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prompt, heads, kv_heads, layers", [(1, 4, 2, 1), (2, 2, 2, 2), (41, 4, 1, 5), (41, 4, 2, 1)])
@pytest.mark.parametrize("settings", ["", "small", "least"])
@pytest.mark.parametrize("name", ROWS)
def test_edges(name, settings, prompt, heads, kv_heads, layers):
    """Prompts of one token, prompts that no page divides, budgets of one row, one layer, MQA."""
    chosen = {"": "weights=WEIGHTS" if name in TRAINED else "", "small": ROWS[name].small, "least": ROWS[name].least}[
        settings
    ]
    sizes = {"heads": heads, "kv_heads": kv_heads, "layers": layers}
    found = run(f"{name}({chosen})", prompt, 6, **sizes)
    assert all(logits.isfinite().all() for logits in found.logits)
    for record in found.layers:
        assert len(record.attended) == 6
        if name == "mikv":  # keeps all rows, at these settings too coarse to tell apart
            continue
        assert all(0 < mass <= 1 + 1e-5 for mass in record.mass)
        for rows in record.kept:
            assert (rows.diff() > 0).all()
        for step, rows in enumerate(record.attended):
            assert all(len(set(head)) == len(head) for head in rows.tolist())
            assert ((rows == prompt + step).any(1)).all(), "the newest row is attended to"


@pytest.mark.parametrize("name", sorted(ROWS.keys() - {"locret"}))  # which evicts between them
def test_chunks_change_nothing(name):
    text = f"{name}({ROWS[name].small})"
    for one, other in zip(run(text, 40, 6).logits, run(text, 40, 6, chunk=40).logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


class Noting:
    """An engine that writes down which of its methods are asked for."""

    def __init__(self, engine, asked: set):
        self._engine, self._asked = engine, asked

    def __getattr__(self, name):
        self._asked.add(name)
        return getattr(self._engine, name)


@pytest.mark.parametrize("name", ROWS)
def test_operations_are_declared(name):
    """``uses`` is what ``check_policy`` goes by."""
    llama, asked = model(4, 2, 4), set()
    text = ROWS[name].small.replace("WEIGHTS", weights(name, 4, 2, 4))
    policy = eviction.parse(f"{name}({text})")
    cache = llama.new_cache()
    cache.follow(policy, 41)
    for part in (part for layer in cache.layers for part in layer.parts):
        part.engine = Noting(llama.engine, asked)
    llama.engine, engine = Noting(llama.engine, asked), llama.engine
    for block in llama.blocks:
        block.self_attn.engine = llama.engine
    try:
        ids = torch.arange(47) % VOCAB
        llama(engine.tokens(ids[:41], 41, VOCAB), cache)
        cache.end_prompt()
        for token in ids[41:]:
            llama(engine.tokens(token[None], 1, VOCAB), cache)
    finally:
        llama.engine = engine
        for block in llama.blocks:
            block.self_attn.engine = engine
    everybody_has = {
        "add",
        "cat",
        "scores",
        "rotate",
        "rows",
        "softmax",
        "mix",
        "embed",
        "linear",
        "meter",
        "side_by_side",
    }
    assert asked - everybody_has - {"is_private", "softmax_base"} == set(policy.uses) - everybody_has


def test_an_engine_without_the_operations_refuses():
    class Bare(PlainEngine):
        name = "bare"
        top = property()  # as if it were not there

    llama = model(4, 2, 4)
    cache = llama.new_cache()
    for layer in cache.layers:
        layer.engine = Bare()
    words = "engine 'bare' cannot run policy h2o: it lacks top; choose another engine (--engine) or another policy"
    with pytest.raises(UsageError) as caught:
        cache.follow(eviction.policy("h2o"), 8)
    assert words in str(caught.value)
    cache.follow(eviction.policy("streaming_llm"), 8)


@pytest.mark.parametrize("name", ["locret", "attention_gate"])
def test_parties_with_other_weights_notice(name):
    """The text that they compare says what the weights are, whatever a party calls them."""
    data = trained_data(name, 4, 2, 4)
    mine = eviction.register("mine", data)
    policy = eviction.parse(f"{name}(weights=mine)")
    assert eviction.parse(str(policy)) == policy and f"weights={mine}" in str(policy)
    other = eviction.register("mine", save({**load(data), "more": torch.zeros(1)}))
    assert other != mine and str(eviction.parse(f"{name}(weights=mine)")) == str(policy).replace(mine, other)
    assert eviction.register("another name", data).partition("#")[2] == mine.partition("#")[2]


def test_reference_needs_plaintext():
    class Private(PlainEngine):
        is_private = True

    cache = model(4, 2, 4).new_cache()
    for layer in cache.layers:
        layer.engine = Private()
    with pytest.raises(UsageError, match="depends on the data; run it on engine 'plain'"):
        cache.follow(eviction.parse("mpcache(reference=true)"), 8)


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_must_fit(name):
    cache = model(4, 2, 4).new_cache()
    for text, words in [
        (name, "its weights are for another model: layers.0."),
        (f"{name}(weights=absent#0123456789abcdef)", "no weights absent#0123456789abcdef are known here"),
        (f"{name}(weights={weights(name, 4, 2, 2)})", "layers.2."),
    ]:
        with pytest.raises(UsageError) as caught:
            cache.follow(eviction.parse(text), 8)
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_shipped_weights_fit_the_shipped_model():
    party = Party(PlainEngine())
    party.load(str(Path(eviction.__file__).parents[1] / "crypten_llm" / "shipped"))
    for name in TRAINED:
        party.model.new_cache().follow(eviction.policy(name), 8)


def test_memory_shrinks_by_the_ratio():
    full, half = (run(policy, 40, 0).layers for policy in ("snapkv(budget=64)", "snapkv(budget=0.5,window=4)"))
    assert [record.kept[0].shape[1] for record in half] == [20] * 4
    assert [record.kept[0].shape[1] for record in full] == [40] * 4


def test_policies_import_no_engine():
    """A policy is handed its operations, and its package can be read and used alone."""
    for path in Path(eviction.__file__).parent.glob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                names.add(node.module)
        assert not any(name.startswith("crypten_llm") for name in names), path.name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny(tmp_path_factory.mktemp("gqa"))[0])


def test_generate_with_a_policy(folder, capsys):
    ids = ",".join(str(3 + i % 90) for i in range(40))
    arguments = ["--model", folder, "--prompt-ids", ids, "--max-new-tokens", "3", "--engine", "plain", "--json"]
    assert main(["generate", *arguments, "--policy", "snapkv", "--set", "budget=8", "--set", "window=4"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["policy"] == "snapkv(budget=8,window=4)"
    assert any(row["kind"] == "eviction" for row in result["table"])
    assert any("policy snapkv(budget=8,window=4)" in entry["what"] for entry in result["revealed"])
    assert main(["generate", *arguments, "--policy", "snapkv", "--set", "windows=4"]) == 2
    assert "did you mean 'window'?" in capsys.readouterr().err


def test_greedy_tokens_follow_the_policy(folder):
    """Through ``generation``: prefill by chunks, eviction at the end of the prompt, then steps."""
    party = Party(PlainEngine())
    party.load(folder)
    ids = [3 + (7 * i) % 90 for i in range(40)]

    def tokens(policy):
        party.start_request()
        answer = Answer(ids, lambda logits: int(logits.argmax()))
        events = generate(party, Plan(40, 8, chunk=16, policy=policy), answer)
        return [event.token_id for event in events if hasattr(event, "token_id")]

    assert tokens("snapkv(budget=64)") == tokens("full")
    assert tokens("streaming_llm(start=0,recent=2)") != tokens("full")


def test_what_does_not_act_is_shown_nothing(folder, monkeypatch):
    """Nor does it stand in the table of costs, or is anything kept for it to see."""

    class Deaf(Full):
        def choose(self, *shown):
            raise AssertionError

        watch = evict = after_step = choose

    monkeypatch.setattr("crypten_llm.models.cache.Seen", None)
    party = Party(PlainEngine(), make_policy=lambda text: Deaf())
    party.load(folder)
    party.start_request()
    list(generate(party, Plan(40, 4, chunk=16), Answer(list(range(3, 43)), lambda logits: int(logits.argmax()))))
    kinds = {row["kind"] for row in party.engine.meter.table()}
    assert "scores" in kinds and not kinds & {"selection", "eviction"}


def test_a_party_makes_its_policy_from_the_text_of_a_request(folder):
    asked, recorder = [], Recorder(eviction.policy("tova", size=9), lambda handle: handle)
    party = Party(PlainEngine(), make_policy=lambda text: asked.append(text) or recorder)
    party.load(folder)
    party.start_request()
    plan, answer = Plan(40, 2, policy="tova(size=9)"), Answer(list(range(3, 43)), lambda logits: int(logits.argmax()))
    list(generate(party, plan, answer))
    assert asked == ["tova(size=9)"] and all(record.kept[1].shape[1] == 9 for record in recorder.layers.values())


def test_the_scale_of_keys_gives_back_the_models_keys():
    """What the cache holds times the scale is what came in, to within what ``mikv`` rounds off; others have none."""
    keys = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
    layer = Layer(0, 1, 12, 4, 2, 4, keys.clone(), keys.clone(), torch.arange(12), {"mass": torch.rand(2, 12)})
    policy = eviction.parse("mikv(important=3,recent=3,bits=8)")
    assert policy.key_scale(layer) is None
    policy.evict(PlainEngine(), layer)
    scale = policy.key_scale(layer)
    found, step = layer.keys * scale, scale / (2**7 - 1)
    assert not torch.allclose(layer.keys[:, -3:], keys[:, -3:])
    torch.testing.assert_close(found[:, -3:], keys[:, -3:])
    distance = (found[:, :, None] - keys[:, None]).abs().div(step[:, :, None]).amax(-1).amin(-1)
    assert distance.max() <= 0.5 + 1e-4


def test_list(capsys):
    assert tool(["list"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == "| policy | paper | when | shared over | reveals | cost per step | settings |"
    assert [line.split("`")[1] for line in lines[2:]] == list(eviction.POLICIES)
    assert len({line.count("|") for line in lines}) == 1
    assert "`alpha=0.6`" in next(line for line in lines if "`mpcache`" in line)
    page = Path(__file__).parents[1] / "docs" / "policies.md"
    assert "\n".join(lines) in page.read_text("utf-8"), "docs/policies.md: paste what `python -m eviction list` prints"


def test_trace(folder, tmp_path, capsys):
    prompt = tmp_path / "ids.txt"
    prompt.write_text(" ".join(str(3 + i % 90) for i in range(40)))
    settings = ("coarse=4", "fine=2", "least=0")
    arguments = ["trace", "--policy", "mpcache", "--model", folder]
    arguments += [word for setting in settings for word in ("--set", setting)]
    plot = tmp_path / "trace.png"
    assert main([*arguments, "--prompt-ids", str(prompt), "--steps", "3", "--json", "--plot", str(plot)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert found["policy"] == f"mpcache({','.join(settings)})" and found["insecure"] == ""
    assert [len(head) for layer in found["kept"] for head in layer] == [20] * 4
    assert len(found["steps"]) == 3 and len(found["token_ids"]) == 4
    for number, step in enumerate(found["steps"]):
        for layer, mass in enumerate(step["mass"]):
            assert 0 < mass <= 1
            for head, rows in enumerate(step["attended"][layer]):
                assert rows[-1] == 40 + number
                assert set(rows) <= set(step["kept"][layer][head])
    assert main([*arguments, "--prompt-ids", str(prompt), "--steps", "3"]) == 0
    assert "mass recovered" in capsys.readouterr().out


def test_a_trace_on_wire_sees_every_role_follow_the_recorder(folder):
    ids = [3 + i % 90 for i in range(40)]
    clear, private = (trace(folder, eviction.policy("streaming_llm", recent=5), ids, 2, name) for name in ENGINES)
    assert private.shown and not clear.shown and private.to_dict()["insecure"]
    for one, other in zip(clear.layers, private.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.kept, other.kept, strict=True))
        assert one.mass == pytest.approx(other.mass, abs=1e-2)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"--policy": "full"}, "policy 'full' keeps and attends to everything"),
        ({"--policy": "nope"}, "unknown policy 'nope'"),
        ({"--engine": "crypten"}, "engine is 'crypten'; trace runs on plain or wire"),
        ({"--steps": "0"}, "--steps is 0; it must be 1 or more"),
        ({"--prompt-ids": "absent.txt"}, "cannot read absent.txt"),
        ({"--prompt-ids": __file__}, "takes whole numbers"),
        ({"--steps": "100"}, "shorten the prompt"),
    ],
)
def test_mistakes_of_trace(folder, tmp_path, capsys, change, words):
    prompt = tmp_path / "ids.txt"
    prompt.write_text("3 4 5")
    options = {"--policy": "h2o", "--prompt-ids": str(prompt), "--model": folder} | change
    assert main(["trace", *(word for option in options.items() for word in option)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
