"""Engine ``plain``: torch floats, one process, no privacy. The reference that every other engine is held against."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from crypten_llm import devices
from crypten_llm.engines.base import Engine, Held
from crypten_llm.engines.plain.selection import PlainSelection
from crypten_llm.links.meter import Meter
from crypten_llm.protocols.dealer.randomness import Stream, fresh_key
from crypten_llm.protocols.gumbel import noise


class PlainEngine(PlainSelection, Engine):
    """Float32 on ``device``; logits equal Hugging Face's to 1e-4."""

    name = "plain"
    is_private = False
    layer_error = 1e-4
    meter: Meter

    def __init__(
        self, device: torch.device | str = "cpu", meter: Meter | None = None, softmax_base: float = math.e
    ) -> None:
        self.softmax_base = softmax_base
        self.device = torch.device(device)
        self.meter = meter or Meter()
        self.rank = 0

    @classmethod
    def on(cls, device: str) -> "PlainEngine":
        """An engine on a device of this machine; raises UsageError where torch cannot compute there."""
        return cls(devices.usable(device))

    def holds(self, rank: int) -> Held:
        return Held(4, 4)

    @cached_property
    def _stream(self) -> Stream:
        """Of noise; its kernels are compiled where some is drawn."""
        return Stream(fresh_key())

    def parameter(self, value: torch.Tensor | None, shape: Sequence[int]) -> torch.Tensor:
        assert value is not None, "one process plays every party"
        return value.to(self.device, torch.float32)

    def secret(self, value: torch.Tensor | None, shape: Sequence[int], source: int) -> torch.Tensor:
        assert value is not None, "one process plays every party"
        return value.to(self.device, torch.float32)

    def known_rows(self, value: torch.Tensor | None, shape: Sequence[int], values: bool = False) -> torch.Tensor:
        return self.secret(value, shape, self.rank)

    def tokens(self, ids: torch.Tensor | None, count: int, vocab_size: int) -> torch.Tensor:
        return F.one_hot(torch.as_tensor(ids, device=self.device), vocab_size).float()

    def embed(self, one_hot: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight[one_hot.argmax(-1)]  # the same rows as one_hot @ weight, without V multiplications each

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, weight, bias)

    def matmul(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x @ y

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, scale: float) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        cos, sin = cos.to(self.device), sin.to(self.device)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def softmax(self, scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if mask is not None:
            scores = scores.masked_fill(~mask.to(self.device), -torch.inf)
        if self.softmax_base != math.e:
            scores = scores * math.log(self.softmax_base)
        return scores.softmax(-1)

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.silu(gate) * up

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y

    def cat(self, handles: list[torch.Tensor], dim: int) -> torch.Tensor:
        return torch.cat(handles, dim)

    def sample(self, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        if temperature:
            uniform = self._stream.words(logits.numel()).view(logits.shape)
            logits = logits.double() + temperature * noise(uniform).to(self.device)
        return logits.argmax(-1)

    def top_k(self, logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        best, index = logits[0].sort(descending=True, stable=True)
        return index[:count], best[:count]

    def open_to(self, x: torch.Tensor | tuple[torch.Tensor, ...], rank: int) -> Any:
        return tuple(part.cpu() for part in x) if isinstance(x, tuple) else x.cpu()
