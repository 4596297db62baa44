"""Which kv heads of a model look far, learned: for the policies that split heads, in the clear and at the owner's.

Owns the training. Every kv head has a gate between what it sees of all tokens and what it sees of the first and the
last; gates are learned that are small where the model says the same without the rest, as DuoAttention does (Xiao et al.
2024, arXiv 2410.10819, section 2.2). The model's own weights stay as they are. ``far_heads`` measures instead, which is
quicker.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.models.cache import causal_mask
from crypten_llm.models.llama import Llama
from crypten_llm.session.far_heads import Needle, ranks

if TYPE_CHECKING:
    from crypten_llm.models.config import LlamaConfig

LENGTHS = (512, 1024, 2048)  # tokens of the prompts
PENALTY = 0.05  # of the gates' mean, beside the mean square by which the last norm's output is off
RATE = 0.05  # of Adam
START, RECENT = 16, 128  # tokens that a head sees which does not look far
PLAIN_TEXT = 4  # one step in so many reads a prompt's tokens as text, and not its answer


class _Gated(PlainEngine):
    """The plain engine, whose softmax is between that of all rows and that of the near ones, by each kv head's gate."""

    def __init__(self, device: torch.device | str, gates: torch.Tensor, start: int, recent: int) -> None:
        super().__init__(device)
        self.gates, self.start, self.recent = gates, start, recent
        self.seen = torch.empty(0)
        self.layer: int | None = None  # the next one; ``None`` where all heads see all rows

    def softmax(self, scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        everything = super().softmax(scores, mask)
        if self.layer is None:
            return everything
        size = scores.shape[-1]
        if self.seen.shape != scores.shape[-2:]:
            seen = causal_mask(size, size, self.recent, self.start).to(self.device)
            self.seen = seen.repeat(scores.shape[-2] // size, 1)
        near = super().softmax(scores, self.seen if mask is None else self.seen & mask.to(self.device))
        gate = self.gates[self.layer][:, None, None]
        self.layer += 1
        return near + gate * (everything - near)


def learn(
    config: LlamaConfig,
    weights: Mapping[str, torch.Tensor],
    prompts: Sequence[Needle],
    steps: int,
    device: torch.device | str = "cpu",
    start: int = START,
    recent: int = RECENT,
    beat: Callable[[int], None] = lambda done: None,
) -> torch.Tensor:
    """Gates [layers, kv_heads] in [0, 1] after so many steps of one prompt each: 1 for a head that must see all.

    The loss is taken where a prompt's needle is said, and in every fourth step at all its tokens. beat: called with how
    many steps are done.
    """
    gates = torch.ones(config.num_hidden_layers, config.num_key_value_heads, device=device, requires_grad=True)
    engine = _Gated(device, gates, start, recent)
    model = Llama(engine, config, {name: weight.to(device) for name, weight in weights.items()})
    optimizer, order = torch.optim.Adam([gates], RATE), random.Random(0)
    for step in range(steps):
        prompt = order.choice(prompts)
        ids = torch.tensor(prompt.ids[:-1])
        at = slice(None) if step % PLAIN_TEXT == PLAIN_TEXT - 1 else slice(len(ids) - prompt.asked, None)
        with torch.no_grad():
            wanted = _hidden(model, engine, ids, None)[at]
        off = _hidden(model, engine, ids, 0)[at] - wanted
        loss = off.square().mean() / wanted.square().mean() + PENALTY * gates.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            gates.clamp_(0, 1)
        beat(step + 1)
    return gates.detach().cpu()


def scores(gates: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """What ``far_heads.ranks`` and ``file`` take, [layers, kv_heads]: gates, and of equal ones the attention paid."""
    return gates.double() - 1e-6 * ranks(attention)


def _hidden(model: Llama, engine: _Gated, ids: torch.Tensor, layer: int | None) -> torch.Tensor:
    """The last norm's output [T, H]."""
    engine.layer = layer
    one_hot = engine.tokens(ids, len(ids), model.config.vocab_size)
    return model.norm(model.extend(one_hot, model.new_cache(), len(ids)))
