"""One row for each eviction policy: what most tests of policies are made from, on every engine.

To test a new policy, add its row here; ``test_every_policy_is_tested`` fails until there is one.
"""

from dataclasses import dataclass

from safetensors.torch import save

import eviction

eviction.register("WEIGHTS", save({}))  # so that texts with the word can be read


@dataclass(frozen=True)
class Row:
    """Settings. small: under which it has work to do on a prompt of 40 tokens. everything: under which nothing is ever
    left out of 46 tokens. least: the smallest there are, one row, one page or one cluster. WEIGHTS stands for
    registered weights.

    wire_tolerance: of logits on shares against plaintext, a few units of 4.
    """

    small: str
    everything: str
    least: str
    wire_tolerance: float = 0.05


ROWS = {
    "streaming_llm": Row("start=1,recent=5", "recent=64", "start=0,recent=0.01"),
    "head_split": Row(
        "far=0.25,start=1,recent=5,reading=9,weights=WEIGHTS",
        "far=0.25,recent=64,weights=WEIGHTS",
        "far=0.01,start=0,recent=1,weights=WEIGHTS",
    ),
    "far_blocks": Row(
        "far=0.25,start=1,recent=5,budget=12,block=3,last=4,weights=WEIGHTS",
        "far=0.25,recent=64,budget=64,weights=WEIGHTS",
        "far=0.01,start=0,recent=1,budget=0.01,block=1,window=1,reach=0,last=1,weights=WEIGHTS",
    ),
    "h2o": Row("heavy=4,recent=4", "heavy=40,recent=40", "heavy=0.01,recent=0.01"),
    "tova": Row("size=6", "size=64", "size=0.01"),
    "snapkv": Row("budget=10,window=4", "budget=64", "budget=0.01"),
    "pyramidkv": Row("budget=14,window=4,beta=4", "budget=64", "budget=0.01"),
    "quest": Row("page=4,budget=9,dense=1", "page=4,budget=64", "page=2,budget=2,dense=0"),
    "infllm": Row(
        "block=4,blocks=2,representatives=2,initial=2,local=6",
        "block=4,blocks=20,local=6",
        "block=1,blocks=1,representatives=1,initial=0,local=1",
    ),
    "longcache": Row("span=2,top=1,sinks=2,local=4", "span=2,local=64", "span=1,top=1,sinks=0,local=1"),
    "mpcache": Row(
        "coarse=4,fine=2,least=0",
        "static=1,coarse=4,fine=2,second=1",
        "static=0.01,coarse=2,fine=2,second=0.01,least=0",
    ),
    "mpcache_spread": Row(
        "budget=10,block=3,ends=6",
        "budget=128,block=4",
        "budget=0.01,block=1,ends=1,lower=0,upper=0",
    ),
    "lazyeviction": Row("budget=12,window=3", "budget=64", "budget=0.01,window=1"),
    # Numbers next to a limit between two levels may take the other: a jump of 1/127 of a coordinate's range.
    "mikv": Row("important=8,recent=3,bits=8", "important=64", "important=0.01,recent=0,bits=8", wire_tolerance=0.4),
    "locret": Row(
        "budget=9,recent=2,weights=WEIGHTS", "budget=64,weights=WEIGHTS", "budget=0.01,recent=0,weights=WEIGHTS"
    ),
    "attention_gate": Row("budget=9,weights=WEIGHTS", "budget=64,weights=WEIGHTS", "budget=0.01,weights=WEIGHTS"),
    "expected_attention": Row(
        "budget=9,start=1,recent=3,future=3", "budget=64", "budget=0.01,start=0,recent=0,future=4"
    ),
    "qfilters": Row(
        "budget=10,start=2,recent=3,weights=WEIGHTS",
        "budget=64,weights=WEIGHTS",
        "budget=0.01,start=0,recent=0,weights=WEIGHTS",
    ),
    "triattention": Row(
        "budget=10,start=2,recent=3,weights=WEIGHTS",
        "budget=64,weights=WEIGHTS",
        "budget=0.01,start=0,recent=0,farthest=1,weights=WEIGHTS",
    ),
    "kvzap_linear": Row(
        "budget=10,start=2,recent=3,weights=WEIGHTS",
        "budget=64,weights=WEIGHTS",
        "budget=0.01,start=0,recent=0,weights=WEIGHTS",
    ),
    "random": Row("budget=9", "budget=64", "budget=0.01"),
}
NETWORKS = ("locret", "attention_gate", "kvzap_linear")
DIRECTIONS = ("qfilters", "triattention")
RANKED = ("head_split", "far_blocks")
TRAINED = (*NETWORKS, *DIRECTIONS, *RANKED)
