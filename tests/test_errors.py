"""What the other parties hear of an error, and what stays with the party that has it."""

import errno
from contextlib import ExitStack

import pytest
from hf_models import tiny
from programs import GENERATE, Program, by_hand, error_line, free_port

from crypten_llm.errors import ENDED, CryptenLLMError, PartyError, UsageError, public_words, unheard

SECRET = "patient-4711"


@pytest.mark.parametrize(
    "error",
    [
        UsageError(SECRET),
        CryptenLLMError(SECRET),
        OSError(errno.ENOENT, "No such file or directory", SECRET),
        KeyError(SECRET),
        RuntimeError(SECRET),
    ],
)
def test_what_is_unheard_stays_here(error):
    with pytest.raises(type(error), match=SECRET), unheard():
        raise error
    assert public_words(error) == ENDED


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PartyError("rank 0 (owner) stopped"), "rank 0 (owner) stopped"),
        (KeyboardInterrupt(), "interrupted"),
        (MemoryError(SECRET), "not enough memory"),
        (RuntimeError(f"DefaultCPUAllocator: not enough memory: {SECRET}"), "not enough memory"),
        (
            RuntimeError(f"CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of {SECRET}"),
            "not enough memory on the GPU for 2.50 GiB more; give parties a card each, or use a shorter prompt",
        ),
        (RuntimeError(f"Triton Error [CUDA]: out of memory {SECRET}"), "not enough memory; use a shorter prompt"),
        (ModuleNotFoundError(SECRET, name="tqdm"), "the package 'tqdm' is not installed; install this project again"),
        (
            ModuleNotFoundError(SECRET, name="crypten.mpc"),
            "the package 'crypten.mpc' is not installed; run 'python -m pip",
        ),
    ],
)
def test_what_holds_no_secret_is_heard_from_anywhere(error, words):
    with pytest.raises(type(error)), unheard():
        raise error
    assert public_words(error).startswith(words) and SECRET not in public_words(error)


def test_what_others_hear_of_what_was_foreseen_and_what_was_not():
    assert public_words(UsageError("the parties disagree")) == "the parties disagree"
    assert public_words(KeyError(SECRET)).startswith("internal error, KeyError; ")
    full = public_words(OSError(errno.ENOSPC, SECRET, SECRET))
    assert full.startswith("No space left on device") and SECRET not in full


def test_a_wrong_token_id_is_the_clients_alone(tmp_path):
    model, _ = tiny(tmp_path, num_hidden_layers=1)
    with Program(*GENERATE, "--model", model, "--prompt-ids", "5,994711", "--verbose") as program:
        code, _, err = program.finish()
    lines = err.splitlines()
    assert code == 2 and any(line.startswith("error: token id 994711") for line in lines)
    for role in ("owner", "dealer"):
        heard = [line for line in lines if line.startswith(f"[{role}]")]
        assert f"[{role}] error: rank 1 (client) stopped: {ENDED}" in heard
        assert "994711" not in "\n".join(heard)


def test_where_the_owners_model_lies_is_the_owners_alone(tmp_path):
    model, _ = tiny(tmp_path / SECRET)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    port, told = free_port(), []
    with ExitStack() as running:
        for rank, given in ((0, ["--model", model]), (1, ["--prompt-ids", "5"]), (2, [])):
            (program,) = by_hand(3, *GENERATE, *given, "--timeout", 30, port=port, ranks=[rank])
            told.append(running.enter_context(program))
        owner, client, dealer = (error_line(program.finish()[2]) for program in told)
    assert SECRET in owner and "only pickle checkpoints" in owner
    for heard in (client, dealer):
        assert heard == f"rank 0 (owner) stopped: {ENDED}"
