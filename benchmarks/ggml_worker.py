"""Single ops of ggml, llama.cpp's tensor library, in a process of its own: JSON lines in, JSON lines out.

    {"op": "ssm_scan" | "flash_attn", "shape": {...}, "dtype": "f32", "inputs": FILE.npz, "threads": 2, "out": FILE.npy}
                                    {"ready": version}     builds a graph of that one op, computes it once, saves it
    {"seconds": 0.1}                {"times_s": [...]}     computes it again and again for that long

Runs on an interpreter that has llama-cpp-python, whose shared libraries are called through ctypes. Between lines the
process sleeps and its thread pool is paused: two pools never run at once.
"""

import ctypes
import json
import sys
import time
from ctypes import POINTER, byref, c_bool, c_float, c_int, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import ClassVar

import llama_cpp
import numpy as np

LIBRARIES = Path(llama_cpp.__file__).parent / "lib"
base = ctypes.CDLL(str(LIBRARIES / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
cpu = ctypes.CDLL(str(LIBRARIES / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)

TYPES = {"f32": 0, "f16": 1, "i32": 26, "bf16": 30}  # GGML_TYPE_*


class InitParams(ctypes.Structure):
    _fields_: ClassVar = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class ThreadpoolParams(ctypes.Structure):
    _fields_: ClassVar = [
        ("cpumask", c_bool * 512),
        ("n_threads", c_int),
        ("prio", c_int),
        ("poll", c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
    ]


class Plan(ctypes.Structure):
    _fields_: ClassVar = [
        ("work_size", c_size_t),
        ("work_data", c_void_p),
        ("n_threads", c_int),
        ("threadpool", c_void_p),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("use_ref", c_bool),
    ]


def declare(library, name, result, *arguments):
    function = getattr(library, name)
    function.restype, function.argtypes = result, list(arguments)


declare(base, "ggml_init", c_void_p, InitParams)
declare(base, "ggml_free", None, c_void_p)
declare(base, "ggml_version", ctypes.c_char_p)
declare(base, "ggml_new_tensor", c_void_p, c_void_p, c_int, c_int, POINTER(c_int64))
declare(base, "ggml_get_data", c_void_p, c_void_p)
declare(base, "ggml_nbytes", c_size_t, c_void_p)
declare(base, "ggml_new_graph", c_void_p, c_void_p)
declare(base, "ggml_build_forward_expand", None, c_void_p, c_void_p)
declare(base, "ggml_ssm_scan", c_void_p, *[c_void_p] * 8, c_int64)
declare(base, "ggml_flash_attn_ext", c_void_p, *[c_void_p] * 5, c_float, c_float, c_float)
declare(base, "ggml_threadpool_params_default", ThreadpoolParams, c_int)
declare(cpu, "ggml_cpu_init", None)
declare(cpu, "ggml_threadpool_new", c_void_p, POINTER(ThreadpoolParams))
declare(cpu, "ggml_threadpool_free", None, c_void_p)
declare(cpu, "ggml_threadpool_pause", None, c_void_p)
declare(cpu, "ggml_threadpool_resume", None, c_void_p)
declare(cpu, "ggml_graph_plan", Plan, c_void_p, c_int, c_void_p)
declare(cpu, "ggml_graph_compute", c_int, c_void_p, POINTER(Plan))


class Graph:
    """One op on given inputs, with a thread pool of its own."""

    def __init__(self, ask):
        arrays = dict(np.load(ask["inputs"]))
        room = 2 * sum(a.nbytes for a in arrays.values()) + 2**26
        self.context = base.ggml_init(InitParams(room, None, False))
        tensors = {name: self.tensor(array, ask["dtype"] if name in "kv" else None) for name, array in arrays.items()}
        self.result = getattr(self, ask["op"])(ask["shape"], tensors)
        self.graph = base.ggml_new_graph(self.context)
        base.ggml_build_forward_expand(self.graph, self.result)
        params = base.ggml_threadpool_params_default(ask["threads"])
        self.pool = cpu.ggml_threadpool_new(byref(params))
        self.plan = cpu.ggml_graph_plan(self.graph, ask["threads"], self.pool)
        self.work = ctypes.create_string_buffer(self.plan.work_size + 64)
        self.plan.work_data = ctypes.addressof(self.work)
        self.compute()
        np.save(ask["out"], self.values())
        cpu.ggml_threadpool_pause(self.pool)

    def tensor(self, array, dtype):
        """A tensor whose dimensions, innermost first as ggml counts them, are the array's from the last to the first;
        uint16 arrays are the bits of `dtype`."""
        kind = TYPES[dtype] if array.dtype == np.uint16 else TYPES["i32" if array.dtype == np.int32 else "f32"]
        sizes = (c_int64 * array.ndim)(*reversed(array.shape))
        tensor = base.ggml_new_tensor(self.context, kind, array.ndim, sizes)
        array = np.ascontiguousarray(array)
        ctypes.memmove(base.ggml_get_data(tensor), array.ctypes.data, array.nbytes)
        return tensor

    def ssm_scan(self, shape, t):
        return base.ggml_ssm_scan(self.context, *(t[name] for name in ("s", "x", "dt", "A", "B", "C", "ids")), 1)

    def flash_attn(self, shape, t):
        return base.ggml_flash_attn_ext(self.context, t["q"], t["k"], t["v"], None, shape["D"] ** -0.5, 0.0, 0.0)

    def compute(self):
        if cpu.ggml_graph_compute(self.graph, byref(self.plan)) != 0:
            raise SystemExit("ggml_graph_compute failed")

    def values(self):
        count = base.ggml_nbytes(self.result) // 4
        data = ctypes.cast(base.ggml_get_data(self.result), POINTER(c_float))
        return np.ctypeslib.as_array(data, shape=(count,)).copy()

    def time(self, seconds):
        cpu.ggml_threadpool_resume(self.pool)
        self.compute()  # wakes the threads
        times, end = [], time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            began = time.perf_counter()
            self.compute()
            times.append(time.perf_counter() - began)
        cpu.ggml_threadpool_pause(self.pool)
        return times

    def close(self):
        cpu.ggml_threadpool_free(self.pool)
        base.ggml_free(self.context)


def main():
    cpu.ggml_cpu_init()
    graph = None
    for line in sys.stdin:
        ask = json.loads(line)
        if "op" in ask:
            if graph:
                graph.close()
            graph = Graph(ask)
            answer = {"ready": base.ggml_version().decode()}
        else:
            answer = {"times_s": graph.time(ask["seconds"])}
        print(json.dumps(answer), flush=True)


main()
