"""Engine ``plain``: torch floats, one process, no privacy. The reference that every other engine is held against."""

import torch
import torch.nn.functional as F

from crypten_llm.engines.base import Engine
from crypten_llm.engines.plain.selection import PlainSelection
from crypten_llm.links.meter import Meter


class PlainEngine(PlainSelection, Engine):
    """Float32 on ``device``; logits equal Hugging Face's to 1e-4."""

    name = "plain"
    is_private = False
    layer_error = 1e-4

    def __init__(self, device="cpu", meter: Meter | None = None):
        self.device = torch.device(device)
        self.meter = meter or Meter()
        self.rank = 0

    def parameter(self, value, shape):
        return value.to(self.device, torch.float32)

    def secret(self, value, shape, source):
        return value.to(self.device, torch.float32)

    def tokens(self, ids, count, vocab_size):
        return F.one_hot(torch.as_tensor(ids, device=self.device), vocab_size).float()

    def embed(self, one_hot, weight):
        return weight[one_hot.argmax(-1)]  # the same rows as one_hot @ weight, without V multiplications each

    def linear(self, x, weight, bias=None):
        return F.linear(x, weight, bias)

    def matmul(self, x, y):
        return x @ y

    def rms_norm(self, x, weight, eps, scale):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    def rotate(self, x, cos, sin):
        cos, sin = cos.to(self.device), sin.to(self.device)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def softmax(self, scores, mask=None):
        if mask is not None:
            scores = scores.masked_fill(~mask.to(self.device), -torch.inf)
        return scores.softmax(-1)

    def swiglu(self, gate, up):
        return F.silu(gate) * up

    def add(self, x, y):
        return x + y

    def cat(self, handles, dim):
        return torch.cat(handles, dim)

    def open_to(self, x, rank):
        return x.cpu()
