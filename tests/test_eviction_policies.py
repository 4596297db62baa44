"""Each policy, but for MPCache, against a small reference that computes the same another way, position by position."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from eviction_runs import HEADS, STEPS, attended, best, heads_of, kept, model, run, trained_data
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

import eviction
from crypten_llm.engines.plain.engine import PlainEngine
from eviction.longcache import APART, _apart
from eviction.look_once import for_heads
from eviction.operations import Layer
from eviction.quest import page_bound


def test_streaming_llm():
    """The first 2 and the last 3 of 8 rows; then the window moves on."""
    found = run("streaming_llm(start=2,recent=3)", 8, 2)
    expected = [[0, 1, 5, 6, 7], [0, 1, 6, 7, 8], [0, 1, 7, 8, 9]]
    for layer in range(4):
        assert kept(found, layer) == [[rows] * 2 for rows in expected]


@pytest.mark.parametrize("heads, kv_heads", HEADS)
@pytest.mark.parametrize("heavy, recent", [(5, 4), (1, 2)])
def test_h2o(heads, kv_heads, heavy, recent):
    found = run(
        f"h2o(heavy={heavy},recent={recent})" if heavy > 1 else "h2o(heavy=0.02,recent=2)", 40, STEPS, heads, kv_heads
    )
    for layer, head in itertools.product(range(4), range(kv_heads)):
        weights = found.prompt_attention(layer)[list(heads_of(found, head))].mean(0)
        total = dict(enumerate(weights.sum(0).tolist()))
        rows = best({n: total[n] for n in range(40 - recent)}, heavy) + list(range(40 - recent, 40))
        assert kept(found, layer)[0][head] == rows
        for step in range(STEPS):
            rows.append(40 + step)
            for at, n in enumerate(rows):
                drawn = [found.step_attention(layer, 40 + step, rows, one)[at].item() for one in heads_of(found, head)]
                total[n] = total.get(n, 0) + sum(drawn) / len(drawn)
            rows.remove(min(rows[:-recent], key=lambda n: (total[n], n)))
            assert kept(found, layer)[step + 1][head] == rows


@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_tova(heads, kv_heads):
    found = run("tova(size=9)", 33, STEPS, heads, kv_heads)
    for layer in range(4):
        rows = best(dict(enumerate(found.prompt_attention(layer)[:, -1].mean(0).tolist())), 9)
        assert kept(found, layer)[0] == [rows] * kv_heads
        for step in range(STEPS):
            rows.append(33 + step)
            drawn = sum(found.step_attention(layer, 33 + step, rows, head) for head in range(heads))
            rows.pop(int(drawn.argmin()))
            assert kept(found, layer)[step + 1] == [rows] * kv_heads


def pyramid(budget, window, beta, prompt, layers):
    """Budgets of kvpress's schedule, for those prompts that need none of its corrections but the first."""
    last, first = budget // beta, 2 * budget - budget // beta
    if first > prompt - window:
        first, last = prompt - window, 2 * budget - (prompt - window)
    return [round(first - (first - last) * i / (layers - 1)) for i in range(layers)]


@pytest.mark.parametrize("heads, kv_heads", HEADS)
@pytest.mark.parametrize(
    "policy, window, kernel, budgets",
    [
        ("snapkv(budget=20,window=6,kernel=3)", 6, 3, [20] * 4),
        ("snapkv(budget=0.5,window=6)", 6, 5, [24] * 4),
        ("snapkv(budget=5,window=6,kernel=1)", 6, 1, [5] * 4),
        ("pyramidkv(budget=20,window=4,beta=2)", 4, 5, pyramid(20, 4, 2, 48, 4)),
    ],
)
def test_snapkv_and_pyramidkv(policy, window, kernel, budgets, heads, kv_heads):
    found = run(policy, 48, 1, heads, kv_heads)
    for layer, head in itertools.product(range(4), range(kv_heads)):
        ours = min(window, budgets[layer])
        drawn = found.prompt_attention(layer)[list(heads_of(found, head)), -window:].mean(0).sum(0)[: 48 - ours]
        pooled = F.avg_pool1d(drawn[None, None], kernel, 1, kernel // 2)[0, 0]
        rows = best(dict(enumerate(pooled.tolist())), budgets[layer] - ours) + list(range(48 - ours, 48))
        assert kept(found, layer)[0][head] == rows
        assert kept(found, layer)[1][head] == [*rows, 48]


def test_budgets_of_the_pyramid():
    policy = eviction.parse("pyramidkv(budget=0.5,window=8)")
    layers = [Layer(i, 4, 96, 4, 2, 8) for i in range(4)]
    assert [policy.kept(layer) for layer in layers] == [88, 61, 35, 8]
    assert eviction.parse("pyramidkv(budget=200)").kept(layers[0]) == 96
    assert eviction.parse("pyramidkv(budget=0.5)").kept(Layer(0, 1, 96, 4, 2, 8)) == 48


@given(st.integers(2, 200), st.integers(1, 200), st.integers(1, 20), st.integers(1, 30))
def test_no_pyramid_stands_on_its_head(budget, prompt, window, beta):
    policy = eviction.parse(f"pyramidkv(budget={budget},window={window},beta={beta})")
    sizes = [policy.kept(Layer(i, 5, prompt, 4, 2, 8)) for i in range(5)]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) <= prompt and sum(sizes) == pytest.approx(5 * min(budget, prompt), abs=5)


def test_page_bound_is_quests():
    query = torch.tensor([[[2.0, -3.0]]])
    high, low = torch.tensor([[[4.0, 1.0], [3.0, 6.0]]]), torch.tensor([[[0.0, -5.0], [2.0, -1.0]]])
    assert page_bound(PlainEngine(), query, high, low).tolist() == [[[23.0, 9.0]]]


@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_quest(heads, kv_heads):
    found = run("quest(page=4,budget=17,dense=1)", 45, STEPS, heads, kv_heads)
    assert [len(rows[0]) for rows in attended(found, 0)] == [46 + step for step in range(STEPS)]
    for layer, head, step in itertools.product(range(1, 4), range(kv_heads), range(STEPS)):
        newest = 45 + step
        pages = {page: range(4 * page, 4 * page + 4) for page in range(newest // 4)}
        keys, bounds = found.keys(layer), {}
        for page, rows in pages.items():
            total = 0.0
            for one in heads_of(found, head):
                query = found.queries(layer)[one, newest]
                total += (keys[one, list(rows)] * query).max(0).values.sum().item()
            bounds[page] = total
        expected = [n for page in best(bounds, 3) for n in pages[page]] + list(range(newest // 4 * 4, newest + 1))
        assert attended(found, layer)[step][head] == expected


@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_infllm(heads, kv_heads):
    found = run("infllm(block=4,blocks=2,representatives=2,initial=3,local=10)", 44, STEPS, heads, kv_heads)
    for layer, step in itertools.product(range(4), range(STEPS)):
        newest = 44 + step
        keys, queries = found.keys(layer), found.queries(layer)
        count, likeness = (newest + 1 - 10 - 3) // 4, {}
        for block in range(count):
            total = 0.0
            for head in range(kv_heads):
                group, rows = heads_of(found, head), range(3 + 4 * block, 7 + 4 * block)
                until = max(44, 4 * block + 16)  # it left the window before this position's scores were known
                looked = {
                    n: sum(
                        (queries[one, m] @ keys[one, n]).item()
                        for one in group
                        for m in range(n + 1, n + 11)
                        if m < until
                    )
                    for n in rows
                }
                mean = sum(keys[group[0], n] for n in best(looked, 2)) / 2
                total += sum((queries[one, newest] @ mean).item() for one in group)
            likeness[block] = total
        chosen = [n for block in best(likeness, 2) for n in range(3 + 4 * block, 7 + 4 * block)]
        expected = [0, 1, 2, *chosen, *range(3 + 4 * count, newest + 1)]
        assert attended(found, layer)[step] == [expected] * kv_heads


@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_longcache(heads, kv_heads):
    found = run("longcache(top=1,span=3,sinks=2,local=9)", 50, STEPS, heads, kv_heads)
    for layer, step in itertools.product(range(4), range(STEPS)):
        newest = 50 + step
        spans = (newest + 1 - 9 - 2) // 3
        products = found.keys(layer, before=True) @ found.queries(layer, before=True)[:, newest, :, None]
        top = products[..., 0].max(0).values
        score = {span: top[2 + 3 * span : 5 + 3 * span].max().item() - span / 1024 for span in range(spans)}
        chosen = best(score, heads)
        expected = [0, 1, *(n for span in chosen for n in range(2 + 3 * span, 5 + 3 * span))]
        assert attended(found, layer)[step] == [[*expected, *range(2 + 3 * spans, newest + 1)]] * kv_heads


@pytest.mark.parametrize("spans, apart", [(1, APART), (255, APART), (256, APART / 2), (5000, APART / 32)])
def test_what_longcache_tells_alike_spans_apart_by_stays_small(spans, apart):
    assert _apart(spans) == apart and spans * apart <= 1 / 4


@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_lazyeviction(heads, kv_heads):
    window, alpha, budget = 3, 0.03, 20
    found = run(f"lazyeviction(budget={budget},window={window},alpha={alpha})", 40, 7, heads, kv_heads)
    for layer, head in itertools.product(range(4), range(kv_heads)):
        group = heads_of(found, head)
        last, idle = {n: n for n in range(40)}, dict.fromkeys(range(40), 1)

        def note(weights, now, last=last, idle=idle):
            for n, weight in weights.items():
                if weight > alpha:
                    idle[n], last[n] = max(idle[n], now - last[n]), now

        def shrink(rows, now, last=last, idle=idle):
            def score(n):
                overdue = (now - last[n]) / idle[n]
                terms = torch.tensor([-min(overdue, 12.0), -1 / idle[n]])
                return 2 * terms.sigmoid().sum().item() - 2**-14 * overdue

            older = rows[:-window]
            return best({n: score(n) for n in older}, budget - window) + rows[-window:]

        note(dict(enumerate(found.prompt_attention(layer)[list(group), -1].mean(0).tolist())), 39)
        rows = shrink(list(range(40)), 39)
        assert kept(found, layer)[0][head] == rows
        for step in range(7):
            now = 40 + step
            rows.append(now)
            last[now], idle[now] = now, 1
            weights = sum(found.step_attention(layer, now, rows, one) for one in group) / len(group)
            note(dict(zip(rows, weights.tolist(), strict=True)), now)
            if (step + 1) % window == 0 and len(rows) > budget:
                rows = shrink(rows, now)
            assert kept(found, layer)[step + 1][head] == rows


def test_random_is_a_public_choice():
    found = run("random(budget=10,seed=3)", 30, 1)
    rows = [kept(found, layer)[0] for layer in range(4)]
    assert all(len(head) == 10 and head[-1] == 29 and head == sorted(head) for layer in rows for head in layer)
    assert all(layer[0] == layer[1] for layer in rows)
    assert rows[0] != rows[1]
    assert run("random(budget=10,seed=4)", 30, 1).layers[0].kept[0].tolist() != rows[0]


@given(st.lists(st.integers(0, 3), min_size=12, max_size=12), st.integers(1, 11), st.integers(0, 5))
def test_mikv_keeps_each_row_once_whatever_ties_there_are(mass, important, recent):
    rows = torch.arange(1.0, 13.0).reshape(1, 12, 1)
    layer = Layer(0, 1, 12, 1, 1, 1, rows.clone(), rows.clone(), torch.arange(12), {"mass": torch.tensor([mass]) / 4})
    eviction.parse(f"mikv(important={important},recent={recent},bits=8)").evict(PlainEngine(), layer)
    if "coarse" in layer.notes:
        held = (layer.keys * layer.notes["key range"])[0, :, 0]
        assert sorted(held.round().tolist()) == rows[0, :, 0].tolist()
        assert len(layer.notes["mass"][0]) == 12 - layer.notes["coarse"]


@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_mikv_rounds_what_h2o_would_drop(heads, kv_heads):
    """The order of rows: rounded ones in order of eviction, the others by position; nothing is lost."""
    found = run("mikv(important=8,recent=3,bits=8)", 30, STEPS, heads, kv_heads)
    for layer, head in itertools.product(range(4), range(kv_heads)):
        weights = found.prompt_attention(layer)[list(heads_of(found, head))].mean(0)
        total = dict(enumerate(weights.sum(0).tolist()))
        fine = best({n: total[n] for n in range(27)}, 5) + [27, 28, 29]
        assert kept(found, layer)[0][head] == [n for n in range(30) if n not in fine] + fine
        for step in range(STEPS):
            assert sorted(kept(found, layer)[step + 1][head]) == list(range(31 + step))
    exact = run("full", 30, STEPS, heads, kv_heads).logits
    errors = []
    for bits in (2, 4, 8):
        logits = run(f"mikv(important=8,recent=3,bits={bits})", 30, STEPS, heads, kv_heads).logits
        errors.append(max((a - b).abs().max().item() for a, b in zip(logits, exact, strict=True)))
    assert errors[0] > errors[1] > errors[2] > 0


def looked_once(scores, start, count, recent, prompt=41):
    """By position, the rows that stay of a prompt when these are the scores."""
    middle = best({n: scores[n].item() for n in range(start, prompt - recent)}, count - start - recent)
    return [*range(start), *middle, *range(prompt - recent, prompt)]


@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_qfilters(heads, kv_heads):
    found = run("qfilters(budget=12,start=2,recent=3,weights=WEIGHTS)", 41, STEPS, heads, kv_heads)
    filters = load(trained_data("qfilters", heads, kv_heads, 4))["filters"]
    for layer, head in itertools.product(range(4), range(kv_heads)):
        scores = found.keys(layer)[heads_of(found, head)[0], :41] @ filters[layer, head]
        rows = looked_once(scores, 2, 12, 3)
        for step in range(STEPS + 1):
            assert kept(found, layer)[step][head] == rows + list(range(41, 41 + step))


def test_filters_are_those_of_the_heads():
    """Also where a layer's heads are split; and those of another model are refused."""
    filters = torch.arange(24.0).reshape(2, 3, 4)
    policy = eviction.policy("qfilters", weights=eviction.register("of-three-heads", save({"filters": filters})))

    def found(kv_heads, which=(), layers=2, dim=4):
        layer = Layer(1, layers, 9, 2 * kv_heads, kv_heads, dim, which=which)
        return for_heads(policy, policy.weights, "filters", layer, "--filters-out")

    assert torch.equal(found(3), filters[1]) and torch.equal(found(2, (0, 2)), filters[1, [0, 2]])
    for sizes in ((2,), (4,), (1, (3,)), (3, (), 3), (3, (), 2, 8), (1, (2,), 3)):
        with pytest.raises(eviction.PolicyError, match=r"another model: filters is \(2, 3, 4\), not \("):
            found(*sizes)


@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_expected_attention(heads, kv_heads):
    """The mean query in each of the 5 places to come, one after the other, and the mean of the scores there."""
    found = run("expected_attention(budget=12,start=2,recent=3,future=5)", 41, STEPS, heads, kv_heads)
    llama = model(heads, kv_heads, 4)
    for layer, head in itertools.product(range(4), range(kv_heads)):
        drawn = torch.zeros(36)
        for one in heads_of(found, head):
            query = found.queries(layer, before=True)[one, 2:41].mean(0)
            places = [llama.rotary(torch.tensor([place]), 41).query for place in range(41, 46)]
            turned = [llama.engine.rotate(query[None, None], *tables)[0, 0] for tables in places]
            scores = torch.stack([found.keys(layer)[one, 2:38] @ place for place in turned]).mean(0)
            drawn += scores.softmax(0)
        rows = looked_once(torch.cat([torch.zeros(2), drawn, torch.zeros(3)]), 2, 12, 3)
        for step in range(STEPS + 1):
            assert kept(found, layer)[step][head] == rows + list(range(41, 41 + step))


def trained(name, found, layer):
    """Features [P, F] of each token, and a layer's matrices."""
    seen = found.layers[layer].seen
    keys, values = (
        torch.cat([getattr(part, what) for part in seen], 1).transpose(0, 1).flatten(1)
        for what in ("key_before", "value")
    )
    features = torch.cat([found.queries(layer, before=True).transpose(0, 1).flatten(1), keys, values], 1)
    file = load(trained_data(name, found.heads, found.kv_heads, 4))
    return features, {key.split(".")[2]: value for key, value in file.items() if key.startswith(f"layers.{layer}.")}


@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_triattention(heads, kv_heads):
    """The center in each of the places 1, 2, 4 and 8 behind the prompt's last token."""
    found = run("triattention(budget=12,start=2,recent=3,farthest=8,weights=WEIGHTS)", 41, STEPS, heads, kv_heads)
    centers, llama = load(trained_data("triattention", heads, kv_heads, 4))["centers"], model(heads, kv_heads, 4)
    for layer, head in itertools.product(range(4), range(kv_heads)):
        scores = torch.zeros(41)
        for place in (41, 42, 44, 48):
            tables = llama.rotary(torch.tensor([place]), 41).query
            turned = llama.engine.rotate(centers[layer, head][None, None], *tables)[0, 0]
            scores += found.keys(layer)[heads_of(found, head)[0], :41] @ turned / 4
        rows = looked_once(scores, 2, 12, 3)
        for step in range(STEPS + 1):
            assert kept(found, layer)[step][head] == rows + list(range(41, 41 + step))


@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_kvzap_linear(heads, kv_heads):
    found = run("kvzap_linear(budget=12,start=2,recent=3,weights=WEIGHTS)", 41, STEPS, heads, kv_heads)
    for layer, head in itertools.product(range(4), range(kv_heads)):
        features, maps = trained("kvzap_linear", found, layer)
        rows = looked_once((features[:41] @ maps["scores"])[:, head], 2, 12, 3)
        for step in range(STEPS + 1):
            assert kept(found, layer)[step][head] == rows + list(range(41, 41 + step))


@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_locret(heads, kv_heads):
    """41 tokens in pieces of 17, 17 and 7; the last 3 rows are safe until the last piece."""
    found = run("locret(budget=9,recent=3,weights=WEIGHTS)", 41, STEPS, heads, kv_heads)
    for layer, head in itertools.product(range(4), range(kv_heads)):
        features, maps = trained("locret", found, layer)
        scores = (F.silu(features @ maps["w1"]) @ maps["w2"])[:, head].tolist()
        rows = []
        for piece, recent in ((range(17), 3), (range(17, 34), 3), (range(34, 41), 0)):
            rows += piece
            older, newest = rows[: len(rows) - recent], rows[len(rows) - recent :]
            rows = best({n: scores[n] for n in older}, 9 - recent) + newest
        for step in range(STEPS + 1):
            assert kept(found, layer)[step][head] == rows + list(range(41, 41 + step))


@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_attention_gate(heads, kv_heads):
    found = run("attention_gate(budget=0.5,weights=WEIGHTS)", 40, STEPS, heads, kv_heads)
    for layer in range(4):
        features, maps = trained("attention_gate", found, layer)
        query, key, value = ((features[:40] @ maps[name]) for name in ("query", "key", "value"))
        gates = [(key[: n + 1] @ query[n]).softmax(0) @ value[: n + 1] @ maps["gate"] for n in range(40)]
        for head, step in itertools.product(range(kv_heads), range(STEPS + 1)):
            rows = best({n: gates[n][head].item() for n in range(39)}, 19) + list(range(39, 40 + step))
            assert kept(found, layer)[step][head] == rows
