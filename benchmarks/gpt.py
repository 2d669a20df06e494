"""A small language model and its text: what language_model.py trains, beside which it trains the same network by hand.

The text is the docstrings of modules of the standard library, so that every machine with Python has it; it differs a
little between versions of Python, therefore `text_of` says which and gives its hash.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import revdistill as rd

MODULES = (
    *("argparse", "ast", "asyncio.base_events", "calendar", "collections", "configparser", "contextlib", "difflib"),
    *("doctest", "email.message", "enum", "fractions", "functools", "heapq", "http.client", "http.cookiejar"),
    *("http.server", "imaplib", "inspect", "json.decoder", "logging", "logging.handlers", "mailbox"),
)
CHARACTERS = 128  # ASCII; what is not becomes a question mark
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(module: str) -> list[str]:
    """Every docstring of a module, from its source: nothing is imported but its package."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"{module}: this Python has no source file of it")
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, DOCUMENTED))
    return [text for text in found if text]


@functools.cache
def text_of(modules: tuple[str, ...] = MODULES) -> tuple[str, dict[str, Any]]:
    """The text, and what must be said of it: whose docstrings, of which Python, how long, its SHA-256."""
    text = "\n\n".join(doc for module in modules for doc in docstrings(module))
    text = text.encode("ascii", "replace").decode("ascii")
    said = {
        "what": f"the docstrings of {len(modules)} modules of Python {platform.python_version()}'s standard library",
        "modules": list(modules),
        "characters": len(text),
        "sha256": hashlib.sha256(text.encode("ascii")).hexdigest(),
    }
    return text, said


@dataclass(frozen=True)
class Size:
    """Of the network, the text and the training."""

    width: int = 160
    layers: int = 3
    heads: int = 5
    length: int = 64
    train: int = 2_000
    held_out: int = 200
    batch: int = 4
    steps: int = 1_000
    rate: float = 1e-3
    eps: float = 1e-3
    warm_up: int = 100
    seed: int = 0

    @property
    def examples(self) -> int:
        return self.train + self.held_out


class Block(nn.Module):
    """Attention to what came before, then a two-layer network, each added to what it read (pre-norm)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.queries_keys_values = nn.Linear(size.width, 3 * size.width)
        self.attention_out = nn.Linear(size.width, size.width)
        self.up, self.down = nn.Linear(size.width, 4 * size.width), nn.Linear(4 * size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, width] -> the same."""
        batch, length, width = x.shape
        parts = self.queries_keys_values(self.attention_norm(x)).reshape(batch, length, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        # written out: torch's fused attention has no second derivative on a CPU
        scores = q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(later, -math.inf).softmax(-1) @ v
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """A decoder with the embedding tied to the output, in the manner of GPT-2; no dropout."""

    def __init__(self, size: Size, vocabulary: int = CHARACTERS) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, size.width), nn.Embedding(size.length, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Characters [B, L] -> logits of the next ones [B, L, vocabulary]."""
        # of size about 1 at the start: as small as the weights are, they are moved far by each step, and training leaps
        hidden = (self.tokens(x) + self.places.weight[: x.shape[1]]) * math.sqrt(self.tokens.embedding_dim)
        for block in self.blocks:
            hidden = block(hidden)
        return F.linear(self.norm(hidden), self.tokens.weight)


@dataclass(frozen=True)
class Run:
    """One training run: chunks [n, L + 1] int64 and held-out ones, the order [T, B] in which they are taken."""

    size: Size
    net: GPT
    train: Tensor
    held_out: Tensor
    order: Tensor
    said: dict[str, Any]

    @property
    def params(self) -> dict[str, Tensor]:
        """The start; the same for every training."""
        return {name: p.detach().clone() for name, p in self.net.named_parameters()}

    def losses(self, params: dict[str, Tensor], chunks: Tensor) -> Tensor:
        """Cross entropy of each chunk in nats per character [B]."""
        logits = torch.func.functional_call(self.net, params, (chunks[:, :-1],))
        return F.cross_entropy(logits.transpose(1, 2), chunks[:, 1:], reduction="none").mean(1)

    def weighted(self, params: dict[str, Tensor], batch: Any) -> Tensor:
        """A step's loss: sum_i w_i loss_i / B."""
        weights, chunks = batch
        return (weights * self.losses(params, chunks)).mean()

    def rates(self, steps: int) -> Tensor:
        """The step sizes [T]: a linear rise, then half a cosine down to a tenth."""
        k = torch.arange(steps, dtype=torch.float64)
        rise = ((k + 1) / self.size.warm_up).clamp(max=1)
        fall = 0.55 + 0.45 * torch.cos(math.pi * k / max(1, steps))
        return self.size.rate * rise * fall

    def optimizer(self, steps: int) -> rd.AdamW:
        return rd.AdamW(self.rates(steps), eps=self.size.eps)


def network(size: Size) -> GPT:
    """The network at its start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(size.seed)
        return GPT(size)


def prepare(size: Size) -> Run:
    """Network, chunks and order, from the size's seed."""
    text, said = text_of()
    rows = torch.frombuffer(bytearray(text.encode("ascii")), dtype=torch.uint8).long()
    rows = rows[: len(rows) // (size.length + 1) * (size.length + 1)].reshape(-1, size.length + 1)
    if len(rows) < size.examples:
        raise ValueError(f"the text has {len(rows)} chunks of {size.length + 1} characters, {size.examples} are needed")
    generator = torch.Generator().manual_seed(size.seed)
    rows = rows[torch.randperm(len(rows), generator=generator)[: size.examples]]
    per_epoch = size.train // size.batch
    epochs = -(-size.steps // per_epoch)
    order = torch.cat([torch.randperm(size.train, generator=generator) for _ in range(epochs)])
    order = order[: size.steps * size.batch].reshape(size.steps, size.batch)
    return Run(size, network(size), rows[: size.train], rows[size.train :], order, said)


def train_by_hand(
    run: Run, weights: Tensor, steps: int, watch: Callable[[int, float], None] | None = None
) -> dict[str, Tensor]:
    """The parameters after `steps` steps of torch.optim.AdamW in a plain loop, with every chunk's weight [n].

    watch: called with k and the loss of step k.
    """
    params = {name: p.requires_grad_() for name, p in run.params.items()}
    optimizer = torch.optim.AdamW(params.values(), eps=run.size.eps)
    for k, rate in enumerate(run.rates(steps).tolist()):
        rows = run.order[k]
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = run.weighted(params, (weights[rows], run.train[rows]))
        loss.backward()
        optimizer.step()
        if watch is not None:
            watch(k, float(loss.detach()))
    return {name: p.detach() for name, p in params.items()}


def text(chunk: Tensor) -> str:
    """A chunk in print: what is no printable character, and a newline, becomes a space."""
    return "".join(c if c.isprintable() else " " for c in map(chr, chunk.tolist()))
