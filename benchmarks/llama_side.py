"""Run one pass of llama.cpp over a GGUF file: a program for an interpreter that has llama-cpp-python, and needs nothing else.

    LLAMA_PYTHON benchmarks/llama_side.py '{"file": "model.gguf", "ids": [5, 6], "threads": 2, "logits": ""}'

The file is mapped, and its weights are not repacked into memory of their own, as it must be where they are larger than the memory.
Opening a file reads it ahead, so that opening and the pass are timed both. The logits (vocabulary,) of the last token are written to
the file `logits`, float32, if one is named. The last line of stdout is one JSON document.
"""

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp as llama


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Open the file, pass the tokens, and return the seconds of both and the likeliest next token."""
    ids = task["ids"]
    silent = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    llama.llama_backend_init()
    started = time.perf_counter()
    options = llama.llama_model_default_params()
    options.n_gpu_layers, options.use_extra_bufts = 0, False
    if hasattr(options, "use_mmap"):
        options.use_mmap = True
    else:
        options.load_mode = llama.LLAMA_LOAD_MODE_MMAP
    model = llama.llama_model_load_from_file(task["file"].encode(), options)
    if not model:
        sys.exit(f"llama.cpp does not open {task['file']}")
    settings = llama.llama_context_default_params()
    settings.n_ctx = settings.n_batch = 2048
    settings.n_ubatch = max(512, len(ids))  # every weight is read once a pass
    settings.n_threads = settings.n_threads_batch = task["threads"]
    context = llama.llama_init_from_model(model, settings)
    opened = time.perf_counter()
    tokens = (llama.llama_token * len(ids))(*ids)  # a batch only points to them
    if llama.llama_decode(context, llama.llama_batch_get_one(tokens, len(ids))):
        sys.exit("llama.cpp does not decode the tokens")
    size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    logits = llama.llama_get_logits_ith(context, -1)[:size]
    ended = time.perf_counter()
    if task["logits"]:
        with open(task["logits"], "wb") as file:
            file.write((ctypes.c_float * size)(*logits))
    with open("/proc/self/status", encoding="utf-8") as file:
        peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    return {
        "open_s": opened - started, "pass_s": ended - opened, "wall_s": ended - started, "top": [logits.index(max(logits))],
        "peak_rss_bytes": peak,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
