"""A GPT and its training loop in plain PyTorch, as nanoGPT has them: three imports are changed, nothing else.

    python examples/nanogpt_loop.py

It learns the bytes of one file of the Python standard library and then writes a line of its own.
"""

import argparse
import inspect

import torch
from torch import nn

from fastlm_kernels import cross_entropy, scaled_dot_product_attention  # was: from torch.nn.functional import ...
from fastlm_kernels.nn import GELU, LayerNorm  # was: from torch.nn import ...
from fastlm_kernels.optim import AdamW  # was: from torch.optim import ...


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to its input."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = LayerNorm(width), LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, width) in and out."""
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm_1(x)).chunk(3, -1))
        attended = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, context: int, width: int = 64, heads: int = 2, layers: int = 2):
        super().__init__()
        self.context = context
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) ids; (B, T, 256) logits."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


def main(steps: int = 300, batch_size: int = 16, context: int = 64) -> list[float]:
    """Train on argparse's source and print a sample; the losses, in nats a byte."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    data = torch.tensor(list(inspect.getsource(argparse).encode()))
    model = GPT(context).to(device)
    optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(data) - context - 1, (batch_size, 1))
        window = data[starts + torch.arange(context + 1)].to(device)
        loss = cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    ids = torch.tensor([list(b"    def ")], device=device)
    with torch.no_grad():
        for _ in range(60):
            ids = torch.cat([ids, model(ids[:, -context:])[:, -1].softmax(-1).multinomial(1)], 1)
    print(bytes(ids[0].tolist()).decode(errors="replace"))  # noqa: T201
    return torch.stack(losses).tolist()


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")  # noqa: T201
