"""One rank of a mapping: trains as the config says, and writes down what it sent and how its tokens were routed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from foldscan.data import TokenFile, Tokenizer
from foldscan.models.files import write_json
from foldscan.nn.moe import Router
from foldscan.parallel.collectives import count_traffic
from foldscan.training import PreparedData, TrainConfig, train
from foldscan.training.evaluate import evaluate


class Routing:
    """Counts the router's choices by the rank of the ep group on which the expert lives, before anything is sent.

    Attributes:
        rows: (token, expert) choices. pairs: (token, rank) pairs, a token once for each rank.
    """

    def __init__(self, experts: int, ep: int) -> None:
        self.local, self.ep = experts // ep, ep
        self.rows, self.pairs = torch.zeros(ep, dtype=torch.int64), torch.zeros(ep, dtype=torch.int64)

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        if isinstance(module, Router):
            ranks = output[2].long() // self.local
            wanted = torch.nn.functional.one_hot(ranks, self.ep).sum(1)
            self.rows += wanted.sum(0)
            self.pairs += (wanted > 0).sum(0)


def main(folder: Path, node: int) -> None:
    config = TrainConfig.load(folder / "train.yaml")
    assert config.tokenizer is not None and config.train_data is not None and config.valid_data is not None
    rank, tokenizer = int(os.environ.get("RANK", "0")), Tokenizer.load(config.tokenizer)
    routing = Routing(config.model.num_experts, config.parallel.ep)
    # Held-out text is read after training, by one process: evaluations would send bytes as well.
    data = PreparedData(tokenizer, TokenFile(config.train_data), None)
    hook = torch.nn.modules.module.register_module_forward_hook(routing)
    with count_traffic() as traffic:
        result = train(config, data=data)
    hook.remove()
    sent = {"sent": traffic.records(rank, node), "rows": routing.rows.tolist(), "pairs": routing.pairs.tolist()}
    write_json(folder / f"rank{rank}.json", sent)
    if rank == 0:
        held_out = evaluate(
            result.model,
            TokenFile(config.valid_data),
            batch_tokens=config.batch_tokens,
            seq_length=config.seq_length,
        )
        record = {
            "seconds": result.progress.seconds,
            "tokens": result.progress.tokens,
            "parameters": result.model.num_parameters(),
            "bits_per_byte": held_out.bits_per_byte,
        }
        write_json(folder / "result.json", record)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
