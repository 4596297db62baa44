"""Where queries point, and what a repetition looks at: the owner's measurements and their files."""

import pytest
import torch
from eviction_runs import VOCAB, model, peaked_weights, run
from safetensors.torch import load

import eviction
from crypten_llm.commands.cli import main
from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.session import far_heads, query_statistics, retention
from crypten_llm.session.query_statistics import LARGEST
from eviction.operations import Layer
from eviction.trained import FOLDER
from experiments.tools import real_model


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (2, 2)])
def test_filters_are_the_first_singular_vectors(heads, kv_heads):
    config = model(heads, kv_heads, 2).config
    weights = peaked_weights(config, 1.8, heads + 10 * kv_heads + 200)
    sizes = (150, 33)
    prompts = [torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in sizes]
    done = []
    found = query_statistics.measure(config, weights, prompts, done.append)
    filters, centers = query_statistics.filters(found), query_statistics.centers(found)
    seen = [run("full", n, 0, heads=heads, kv_heads=kv_heads, layers=2) for n in sizes]
    assert done == [1, 2] and filters.shape == (2, kv_heads, 32 // heads)
    for layer in range(2):
        queries = torch.cat([one.queries(layer) for one in seen], 1)
        keys = torch.cat([one.keys(layer) for one in seen], 1)
        for head in range(kv_heads):
            own = range(head * heads // kv_heads, (head + 1) * heads // kv_heads)
            first = [torch.linalg.svd(queries[one], full_matrices=False)[2][0] for one in own]
            first = torch.stack([v if queries[one].mean(0) @ v > 0 else -v for one, v in zip(own, first, strict=True)])
            mean = first.mean(0)
            expected = mean * LARGEST / mean.norm() / keys[own[0]].norm(dim=1).max()
            torch.testing.assert_close(filters[layer, head].float(), expected, atol=1e-3, rtol=1e-4)
            assert (keys[own[0]] @ filters[layer, head].float()).abs().max() <= LARGEST
            mean = torch.cat([one.queries(layer, before=True)[list(own)] for one in seen], 1).mean((0, 1))
            expected = mean * LARGEST / mean.norm() / keys[own[0]].norm(dim=1).max()
            torch.testing.assert_close(centers[layer, head].float(), expected, atol=1e-3, rtol=1e-4)


def test_labels_are_what_the_repetition_looks_at():
    """Against the attention of one run over all tokens; what is repeated does not matter to the arithmetic."""
    config = model(4, 2, 2).config
    weights = peaked_weights(config, 1.8, 4 + 20 + 200)
    ids = torch.randint(0, VOCAB, (83,), generator=torch.Generator().manual_seed(83)).tolist()
    seen = run("full", 83, 0, layers=2)
    policy = retention._Reading(40, tuple(weights[f"model.layers.{i}.self_attn.o_proj.weight"] for i in range(2)))
    llama = model(4, 2, 2)
    cache = llama.new_cache()
    cache.follow(policy, 83)
    with torch.inference_mode():
        for part in (ids[:40], ids[40:]):
            llama.extend(llama.engine.tokens(torch.tensor(part), len(part), VOCAB), cache, 83)
    for layer, one in enumerate(cache.layers):
        attention = seen.prompt_attention(layer)[:, 40:, :40]
        value = torch.cat([part.value for part in seen.layers[layer].seen], 1)[:, :40]
        output = policy.outputs[layer].reshape(32, 4, 8)
        for head in range(2):
            drawn = [
                (attention[h] * (value[head] @ output[:, h].T).norm(dim=1)).amax(0) for h in (2 * head, 2 * head + 1)
            ]
            torch.testing.assert_close(
                one.layer.notes["label"][head], torch.maximum(*drawn).log(), atol=1e-4, rtol=1e-4
            )


def test_a_fit_finds_a_linear_rule_and_not_noise():
    draw = torch.Generator().manual_seed(0)
    x, rule = torch.randn(400, 12, generator=draw), torch.randn(12, 2, generator=draw)
    y = x @ rule
    y[:, 1] = torch.randn(400, generator=draw)
    seen, held_out = (retention._Sums.of(x[part] + 5, y[part] - 3) for part in (slice(300), slice(300, 400)))
    left = held_out.unexplained(seen.fit(1e-5))
    assert left[0] < 1e-3 and left[1] > 0.8
    both = seen + held_out
    scaled = retention._scaled(both.fit(1e-5), both)
    torch.testing.assert_close((x @ scaled).std(0), torch.full((2,), retention.LARGEST / 6), atol=0.02, rtol=0)
    torch.testing.assert_close(scaled[:, 0] / scaled[:, 0].norm(), rule[:, 0] / rule[:, 0].norm(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["qfilters", "triattention", "kvzap_linear"])
def test_files_that_come_with_the_project_fit_their_models(name):
    for weights, sizes in {real_model.NAME: (30, 9, 9, 3, 64), "shipped": (6, 9, 8, 4, 32)}.items():
        layers, *rest = sizes
        for index in range(layers):
            eviction.policy(name, weights=weights).begin(PlainEngine(), Layer(index, layers, *rest))
        path = FOLDER / f"{name}-{weights}.safetensors"
        assert path.stat().st_size < 200_000 and all(
            value.isfinite().all() for value in load(path.read_bytes()).values()
        )


def test_the_command_writes_what_the_policies_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(far_heads, "LONGEST", 180)
    monkeypatch.setattr(retention, "LONGEST", 180)
    monkeypatch.setattr(retention, "TEXTS", 4)
    paths = {name: tmp_path / name for name in ("filters", "centers", "scores")}
    assert main(["calibrate", *(word for name, path in paths.items() for word in (f"--{name}-out", str(path)))]) == 0
    said = capsys.readouterr().err
    assert "24 filters of 32 numbers: " in said and "24 centers of 32 numbers: " in said
    assert "of what a repetition looks at: " in said
    assert load(paths["filters"].read_bytes())["filters"].shape == (6, 4, 32)
    llama = model(4, 2, 2)
    for policy, name in {"qfilters": "filters", "triattention": "centers", "kvzap_linear": "scores"}.items():
        weights = eviction.register(f"{name}-of-shipped", paths[name].read_bytes())
        with pytest.raises(eviction.PolicyError, match=f"another model: .*calibrate --{name}-out FILE"):
            for cache in llama.new_cache().layers:
                cache.follow(eviction.policy(policy, weights=weights), 8)
    assert main(["calibrate", "--scores-out", str(tmp_path / "none" / "scores")]) == 2
    assert "--scores-out: there is no folder" in capsys.readouterr().err
