"""llama.cpp in a process of its own, with an interpreter that has llama-cpp-python: JSON lines in, JSON lines out.

    {"load": FILE, "threads": 2, "context": 4096}      {"ready": ...}
    {"prompt": [ids], "new": n, "logits": FILE}        {"prefill_s": ..., "decode_s": ..., "tokens": [n ids]}

Between lines the process sleeps: two thread pools never run at once.
"""

import ctypes
import json
import sys
import time

import llama_cpp as lc
import numpy as np


QUIET = lc.llama_log_callback(lambda *_: None)  # llama.cpp keeps the pointer, so Python must keep the object


def main() -> None:
    lc.llama_log_set(QUIET, None)
    lc.llama_backend_init()
    model = context = None
    for line in sys.stdin:
        ask = json.loads(line)
        if "load" in ask:
            model = lc.llama_model_load_from_file(ask["load"].encode(), lc.llama_model_default_params())
            if not model:
                raise SystemExit(f"llama.cpp cannot load {ask['load']}")
            params = lc.llama_context_default_params()
            params.n_ctx = ask["context"]
            params.n_batch = ask["context"]
            params.n_threads = params.n_threads_batch = ask["threads"]
            context = lc.llama_init_from_model(model, params)
            vocab = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(model))
            answer = {"ready": lc.llama_print_system_info().decode(), "version": lc.__version__}
        else:
            answer = generate(context, vocab, ask)
        print(json.dumps(answer), flush=True)


def step(context, ids):
    array = (lc.llama_token * len(ids))(*ids)
    if lc.llama_decode(context, lc.llama_batch_get_one(array, len(ids))) != 0:
        raise SystemExit("llama_decode failed")


def logits(context, vocab):
    pointer = lc.llama_get_logits_ith(context, -1)
    return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), shape=(vocab,))


def generate(context, vocab, ask):
    lc.llama_memory_clear(lc.llama_get_memory(context), True)
    began = time.perf_counter()
    step(context, ask["prompt"])
    last = logits(context, vocab)
    token = int(last.argmax())
    prefilled = time.perf_counter()
    if ask.get("logits"):
        np.save(ask["logits"], last)
    tokens, started = [token], time.perf_counter()
    for _ in range(ask["new"] - 1):
        step(context, [token])
        token = int(logits(context, vocab).argmax())
        tokens.append(token)
    return {"prefill_s": prefilled - began, "decode_s": time.perf_counter() - started, "tokens": tokens}


main()
