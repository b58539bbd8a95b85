"""Our `Engine` beside llama.cpp on the same weights: prefill and decoding tokens a second.

    python -m venv llama-env
    CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_OPENMP=OFF" llama-env/bin/pip install llama-cpp-python==0.3.36
    python benchmarks/llamacpp.py --python llama-env/bin/python

llama.cpp runs in a process of its own (llamacpp_worker.py), which sleeps while we run, and we while it does. The
weights are SmolLM2-135M's (from the package that the tests use), or random ones of a Qwen3-MoE or Mamba-2 shape, as
GGUF. Its cache of keys and values is F16, its default, and once more of the weights' dtype, as ours is. Not part of CI:
building llama.cpp takes minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import models
import numpy as np
import torch
import transformers
from foldscan.data import fetch
from foldscan.generation import Engine
from foldscan.models import load_pretrained, save_pretrained
from gguf_files import write_gguf


class Worker:
    """A script of this folder in another environment, behind a pipe."""

    def __init__(self, python: str, script: str) -> None:
        command = [python, str(Path(__file__).parent / script)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the worker died; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def load(name: str, dtype: torch.dtype, folder: Path) -> Any:
    """A transformers model with the weights to compare."""
    if name != "smollm2":
        return models.random_model({"qwen3_moe": models.qwen3_moe, "mamba2": models.mamba2}[name](), dtype)
    save_pretrained(load_pretrained(fetch("smollm2"), dtype=dtype), folder / "smollm2")
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "smollm2", dtype=dtype).eval()


def compare(name: str, dtype: str, options: argparse.Namespace, worker: Worker) -> None:
    """One model in one dtype."""
    with tempfile.TemporaryDirectory() as scratch:
        theirs = load(name, models.DTYPES[dtype], Path(scratch))
        file = Path(scratch) / "model.gguf"
        write_gguf(theirs, file, models.DTYPES[dtype])
        engine = Engine(load_pretrained(theirs, dtype=models.DTYPES[dtype]))
        threads = torch.get_num_threads()
        worker.ask(load=str(file), threads=threads, context=options.prompt + options.new + 64)
        torch.manual_seed(0)
        prompt = torch.randint(0, engine.model.config.vocab_size, (options.prompt,)).tolist()
        logits = Path(scratch) / "logits.npy"
        # Both are held against fp32 arithmetic on the same weights: ours may be off twice as much as llama.cpp's.
        truth = engine if dtype == "float32" else Engine(load_pretrained(theirs))
        want = models.engine_logits(truth, prompt)
        worker.ask(prompt=prompt, new=2, kv="f16", logits=str(logits))
        errors = {
            "llama.cpp": models.error(torch.from_numpy(np.load(logits)), want),
            "foldscan": models.error(models.engine_logits(engine, prompt), want),
        }
        del theirs, truth
    if errors["foldscan"] > 2 * errors["llama.cpp"] or (dtype == "float32" and errors["llama.cpp"] > 1e-2):
        raise RuntimeError(f"{name} {dtype}: logits disagree with llama.cpp's: {errors}")

    def peer(kv: str) -> models.Timed:
        answer = worker.ask(prompt=prompt, new=options.new, kv=kv)
        return answer["prefill_s"], answer["decode_s"] / (options.new - 1)

    ways = {"llama.cpp": lambda: peer("f16"), "foldscan": lambda: models.run_engine(engine, prompt, options.new)}
    if name != "mamba2":
        same = {"float32": "f32", "bfloat16": "bf16"}[dtype]
        ways["llama.cpp, cache in the same dtype"] = lambda: peer(same)
    found = models.interleave(ways, options.rounds)
    models.report(name, dtype, options.prompt, options.new, found, errors, options.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="interpreter of an environment with llama-cpp-python")
    parser.add_argument("--model", choices=["smollm2", "qwen3_moe", "mamba2"], action="append")
    parser.add_argument("--dtype", choices=list(models.DTYPES), action="append")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=models.RESULTS.with_name("llamacpp.jsonl"))
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    worker = Worker(options.python, "llamacpp_worker.py")
    for name in options.model or ["smollm2", "qwen3_moe", "mamba2"]:
        for dtype in options.dtype or list(models.DTYPES):
            compare(name, dtype, options, worker)
    worker.close()


if __name__ == "__main__":
    main()
