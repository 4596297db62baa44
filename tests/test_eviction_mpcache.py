"""MPCache, its published form and ``mpcache_spread``, against small references, position by position."""

import itertools

import pytest
from eviction_runs import HEADS, STEPS, attended, best, heads_of, kept, run

from eviction import mpcache


@pytest.mark.parametrize("heads, kv_heads", HEADS)
@pytest.mark.parametrize("summary, share", [("minmax", True), ("minmax", False), ("mean", True), ("bound", True)])
def test_mpcache(heads, kv_heads, summary, share):
    """5 layers: 2 and 3 are a pair, 4 is alone."""
    options = f"static=0.6,window=0.25,coarse=6,fine=3,second=0.2,least=0,summary={summary},share={share},alone=1"
    found = run(f"mpcache({options})", 80, STEPS, heads, kv_heads, 5)
    for layer in range(5):
        drawn = found.prompt_attention(layer)[:, -20:].mean(0).sum(0)
        rows = best(dict(enumerate(drawn[:74].tolist())), 42) + list(range(74, 80))
        assert kept(found, layer)[0] == [rows] * kv_heads
        for step in range(STEPS):
            rows.append(80 + step)
            assert kept(found, layer)[step + 1] == [rows] * kv_heads
            source = 2 if share and layer == 3 else layer
            for head in range(kv_heads):
                chosen = clusters(found, source, head, 80 + step, summary)
                closed = (len(rows) - 3 - 1) // 6
                expected = [rows[n] for n in [0, 1, 2, *chosen, *range(3 + 6 * closed, len(rows))]]
                assert attended(found, layer)[step][head] == expected


def test_mpcache_chooses_from_its_least_number_of_rows_on():
    """48 rows outlive the prompt; the second step has 50."""
    found = run("mpcache(static=0.6,coarse=6,fine=3,least=50)", 80, STEPS, *HEADS[0], 2)
    chosen = run("mpcache(static=0.6,coarse=6,fine=3,least=0)", 80, STEPS, *HEADS[0], 2)
    for layer in range(2):
        assert attended(found, layer)[0] == kept(found, layer)[1]
        assert len(attended(chosen, layer)[0][0]) < 49
        assert len(attended(found, layer)[1][0]) == len(attended(chosen, layer)[1][0]) < 50


def test_the_window_of_a_long_prompt(monkeypatch):
    def rows(window):
        found = run.__wrapped__(f"mpcache(static=0.3,{window},coarse=6,fine=3,least=0)", 80, 1)
        return [kept(found, layer) for layer in range(4)]

    text, wide, narrow = "window=0.5,long_window=0.05", rows("window=0.5"), rows("window=0.05")
    assert wide != narrow
    for longest, expected in ((80, wide), (79, narrow)):
        monkeypatch.setattr(mpcache, "LONG", longest)
        assert rows(text) == expected


@pytest.mark.parametrize("heads, kv_heads", HEADS)
@pytest.mark.parametrize("per_head, width", [(False, True), (True, True), (False, False)])
def test_mpcache_spread(heads, kv_heads, per_head, width):
    """5 layers: 2 and 3 search and have 21 rows, the others keep the first 2 and the last 4; 12 is the mean."""
    found = run(
        f"mpcache_spread(budget=12,ends=6,block=3,per_head={per_head},width={width})", 50, STEPS, heads, kv_heads, 5
    )
    for layer, step in itertools.product((0, 1, 4), range(STEPS)):
        assert kept(found, layer)[step] == [[0, 1, *range(46 + step, 50 + step)]] * kv_heads
        assert attended(found, layer)[step] == [[0, 1, *range(46 + step, 51 + step)]] * kv_heads
    for layer, step in itertools.product((2, 3), range(STEPS)):
        newest, sums = 50 + step, []
        starts = range(3, newest // 3 * 3, 3)
        for one in range(heads):
            query = found.queries(layer)[one, newest]
            boxes = {start: found.keys(layer)[one, start : start + 3].aminmax(dim=0) for start in starts}
            spread = {start: (box.max - box.min) / 2 for start, box in boxes.items()}
            likely = {start: query @ (box.max + box.min) / 2 for start, box in boxes.items()}
            sums.append({start: (likely[start] + width * query**2 @ spread[start] ** 2 / 6).item() for start in starts})
        for head in range(kv_heads):
            choosing = heads_of(found, head) if per_head else range(heads)
            chosen = best({start: sum(sums[one][start] for one in choosing) for start in starts}, 21 // 3 - 1)
            blocks = [n for start in chosen for n in range(start, start + 3)]
            expected = [0, 1, 2, *blocks, *range(newest // 3 * 3, newest + 1)]
            assert attended(found, layer)[step][head] == expected


def test_mpcache_spread_searches_everywhere_on_a_budget_too_small_for_ends():
    """12 rows: the first block, the newest of 1 to 3 rows, and three between, in each layer."""
    found = run("mpcache_spread(budget=12,ends=25,block=3)", 50, STEPS, 4, 2, 5)
    for layer, step in itertools.product(range(5), range(STEPS)):
        newest = 50 + step
        assert kept(found, layer)[step] == [list(range(newest))] * 2
        rows = attended(found, layer)[step][0]
        assert rows[:3] == [0, 1, 2] and rows[12:] == list(range(newest // 3 * 3, newest + 1))
        assert len(rows) == 12 + newest % 3 + 1 and all(row % 3 == 0 for row in rows[3:12:3])


@pytest.mark.parametrize("ends, first", [(48, 16), (54, 16), (45, 15)])
def test_mpcache_spread_keeps_a_third_of_its_ends_at_the_beginning_but_no_more_than_16(ends, first):
    found = run(f"mpcache_spread(budget={ends},ends={ends},block=3)", 120, 1, 4, 2, 5)
    assert kept(found, 0)[0] == [[*range(first), *range(120 - ends + first, 120)]] * 2


def clusters(found, layer, head, newest, summary):
    """Indices of the cache's rows in the fine clusters that a step chooses between the first and the newest."""
    rows = kept(found, layer)[0][head] + list(range(80, newest + 1))
    keys, group = found.keys(layer), heads_of(found, head)

    def likeness(start, stop):
        part = keys[group[0], rows[start:stop]]
        if summary == "bound":
            return sum((part * found.queries(layer)[one, newest]).amax(0).sum().item() for one in group)
        key = part.mean(0) if summary == "mean" else 0.6 * part.amax(0) + 0.4 * part.amin(0)
        return sum((found.queries(layer)[one, newest] @ key).item() for one in group)

    closed = (len(rows) - 3 - 1) // 6
    coarse = best({c: likeness(3 + 6 * c, 9 + 6 * c) for c in range(closed)}, max(1, int(closed * 0.5)))
    starts = [3 + 6 * c + 3 * part for c in coarse for part in (0, 1)]
    fine = best({start: likeness(start, start + 3) for start in starts}, int(len(rows) / 3 * 0.2))
    return [n for start in fine for n in range(start, start + 3)]


@pytest.mark.parametrize("threshold", [1e-3, 3e-2])
def test_mpcache_reference_is_the_published_choice(threshold):
    found = run(f"mpcache(reference=true,threshold={threshold})", 60, 2, 2, 2)
    counts = set()
    for layer in range(4):
        important = set()
        scores = found.queries(layer)[:, 48:60] @ found.keys(layer)[:, :60].mT * 16**0.5  # neither scaled nor masked
        weights = scores.softmax(-1).mean(0)
        for query, n in itertools.product(range(12), range(60)):
            if weights[query, n] >= threshold:
                important.add(n)
        counts.add(len(important))
        assert kept(found, layer)[0] == [sorted(important)] * 2
    assert len(counts) > 1, "the count depends on the data"


def test_mpcache_reference_shares_no_choice():
    """Layers keep different counts of rows, so each finds its own clusters."""
    found = run("mpcache(reference=true,threshold=0.03,coarse=6,fine=3,least=10,share_from=0,alone=0)", 60, 2, 2, 2)
    sizes = [len(kept(found, layer)[0][0]) for layer in range(4)]
    assert len(set(sizes)) > 1 and min(sizes) >= 10
    assert all(len(attended(found, layer)[1][0]) < sizes[layer] for layer in range(4))
