"""For policies that split heads: a model with ranks of its own, and what engines answer under such a policy."""

from pathlib import Path

import torch
from hf_models import tiny
from safetensors.torch import save

from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.request import Result


def ranked_model(folder: Path) -> tuple[Path, Path]:
    """A model of three layers and two kv heads, and a file of ranks for it, which a policy names ``heads-mine``."""
    model, _ = tiny(folder, num_hidden_layers=3, max_position_embeddings=96)
    path = model.parent / "heads-mine.safetensors"
    path.write_bytes(save({"ranks": torch.tensor([[0, 5], [4, 1], [2, 3]])}))
    return model, path


def side_by_side_and_alone(
    given: tuple[Path, Path], engine: str, lengths, **asked
) -> tuple[list[Result], list[Result]]:
    """Answers to prompts of these lengths, asked for together and one by one, whose tokens are the same."""
    folder, path = given
    prompts = [list(range(3, 3 + length)) for length in lengths]
    settings = {"engine": engine, "policy_weights": str(path), "timeout": 60, "threads": 1}
    with PrivateLlama.from_pretrained(str(folder), **settings) as llama:
        together = llama.generate(input_ids=prompts, prefill_chunk=9, **asked)
        alone = [llama.generate(input_ids=prompt, prefill_chunk=9, **asked) for prompt in prompts]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    return together, alone
