"""One query's scores on a tiny GPT-2 of transformers, by MAGIC of the bergson package or by ours, in a process of its
own.

language_model.py starts it with the Python of an environment that has bergson, transformers and revdistill: same
module, same start, same chunks, same order, same torch, one thread. bergson is used as its `run_magic` does: Trainer,
DataStream, its weighted loss, checkpoints as its save_mode says.

    FILE-OF-THAT-PYTHON benchmarks/bergson_magic.py --who bergson|ours --data data.npz --out scores.npz
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import PeakMemory
from torch import Tensor
from torch.nn import functional as F

import revdistill as rd

WARM_UP = 3


@dataclass(frozen=True)
class Setting:
    """AdamW with a constant rate; eps_root is bergson's default: without it a parameter that no gradient reaches has
    an infinite derivative.
    """

    width: int = 64
    layers: int = 2
    heads: int = 2
    rate: float = 1e-3
    eps: float = 1e-3
    eps_root: float = 1e-17
    weight_decay: float = 0.01
    seed: int = 0


def module(setting: Setting, vocabulary: int, length: int) -> Any:
    """GPT-2 from a configuration: no dropout, attention written out, the embedding not tied to the output."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(setting.seed)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=length,
        n_embd=setting.width,
        n_layer=setting.layers,
        n_head=setting.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        attn_implementation="eager",
        use_cache=False,
    )
    return GPT2LMHeadModel(config).eval()


def by_bergson(net: Any, setting: Setting, data: Any, save_mode: str, report: dict[str, Any]) -> np.ndarray:
    """dL_q/dw [K, n] for each query, as run_magic computes it: a training with checkpoints, then a way back a query."""
    import torchopt
    from bergson.magic.cli import compute_query_gradients
    from bergson.magic.data_stream import DataStream
    from bergson.magic.trainer import BackwardState, Trainer
    from bergson.utils import weighted_causal_lm_ce
    from datasets import Dataset
    from torchopt.pytree import tree_iter

    order, chunks = data["order"], data["chunks"]
    net.loss_function = partial(weighted_causal_lm_ce, reduction="mean")
    rows, length = order.reshape(-1), chunks.shape[1]
    dataset = Dataset.from_dict(
        {"input_ids": chunks[rows].tolist(), "doc_ids": np.repeat(rows[:, None], length, 1).tolist()}
    )
    stream = DataStream(dataset, order.shape[1], weight_shape=(len(chunks),))
    optimizer = torchopt.adamw(
        setting.rate,
        betas=(0.9, 0.999),
        eps=setting.eps,
        eps_root=setting.eps_root,
        weight_decay=setting.weight_decay,
    )
    trainer, state = Trainer.initialize(net, optimizer)
    scores = []
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        state = trainer.train(state, stream, inplace=True, save_dir=folder, save_mode=save_mode)
        report["training_seconds"] = time.perf_counter() - started
        report["disk_bytes"] = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
        final = state.to("cpu").detach_()
        for query in data["queries"]:
            state.detach_()
            state.copy_(final)
            asked = DataStream(Dataset.from_dict({"input_ids": [query.tolist()]}), 1, weight_shape=(1,))
            gradients, loss = compute_query_gradients(state, net, asked, "mean")
            state.detach_()
            stream.requires_grad = True
            zeros = [
                torch.zeros_like(t)
                for t in tree_iter(state.opt_state)
                if isinstance(t, torch.Tensor) and t.is_floating_point()
            ]
            bars = BackwardState(gradients, zeros, torch.zeros_like(stream.weights))
            bars = trainer.backward(folder, stream, bars, state, cleanup=False, inplace=True, save_mode=save_mode)
            scores.append(bars.weight_grads.detach().numpy())
            report.setdefault("losses", []).append(loss)
    return np.stack(scores)


def by_ours(net: Any, setting: Setting, data: Any, save_mode: str, report: dict[str, Any]) -> np.ndarray:
    """The same by rd.attribute."""
    chunks, queries = torch.from_numpy(data["chunks"]), torch.from_numpy(data["queries"])

    def losses(params: dict[str, Tensor], examples: tuple[Tensor, ...]) -> Tensor:
        (rows,) = examples
        logits = torch.func.functional_call(net, params, (rows,)).logits[:, :-1]
        return F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(1)

    params = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = rd.AdamW(setting.rate, eps=setting.eps, eps_root=setting.eps_root, weight_decay=setting.weight_decay)
    found = rd.attribute(
        losses,
        params,
        (chunks,),
        optimizer,
        order=torch.from_numpy(data["order"]),
        queries=(queries,),
        adjoint=rd.Reversible(graph_bytes=0),  # keep no graphs, as bergson keeps none
    )
    report["losses"] = found.losses.tolist()
    return found.scores.numpy()


WHO = {"bergson": by_bergson, "ours": by_ours}


def main() -> None:
    """One measurement: scores to a file, the figures as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--who", required=True, choices=list(WHO))
    parser.add_argument("--data", type=Path, required=True, help="npz of chunks, queries [., L + 1] and order [T, B]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--queries", type=int, default=1)
    parser.add_argument("--save-mode", default="sqrt", choices=["sqrt", "log", "all"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    setting, data = Setting(), dict(np.load(options.data))
    data["queries"] = data["queries"][: options.queries]
    vocabulary, length = 128, data["chunks"].shape[1]
    WHO[options.who](module(setting, vocabulary, length), setting, data | _first(data), options.save_mode, {})
    net, report = module(setting, vocabulary, length), {}
    with PeakMemory("cpu") as peak:
        started = time.perf_counter()
        scores = WHO[options.who](net, setting, data, options.save_mode, report)
        report["seconds"] = time.perf_counter() - started
    np.savez(options.out, scores=scores)
    report |= {
        "who": options.who,
        "queries": options.queries,
        "bytes": peak.nbytes,
        "parameters": sum(p.numel() for p in net.parameters()),
        "setting": asdict(setting),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "bergson", "revdistill")},
        },
    }
    print(json.dumps(report))


def _first(data: dict[str, Any]) -> dict[str, Any]:
    """Three steps and one query: imports, caches and compiled functions are there before the clock starts."""
    return {"order": data["order"][:WARM_UP], "queries": data["queries"][:1]}


if __name__ == "__main__":
    main()
