// foldscan._native: what is not a tensor operator. The capability report of this build on this machine, and NumPy-level
// entry points that need no PyTorch. They run on the calling thread: PyTorch's pool belongs to the operators.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/isa.h"
#include "core/parallel.h"
#include "core/peak.h"

namespace py = pybind11;

namespace {

using Array = py::array_t<float, py::array::c_style | py::array::forcecast>;

foldscan::DType parse_dtype(const std::string& dtype) {
  if (dtype == "float32") return foldscan::DType::kF32;
  if (dtype == "bfloat16") return foldscan::DType::kBF16;
  throw std::invalid_argument("dtype: got '" + dtype + "', want 'float32' or 'bfloat16'");
}

py::dict capabilities() {
  std::vector<std::string> available;
  py::dict missing;
  for (foldscan::Isa isa : foldscan::kIsas) {
    if (const char* what = foldscan::isa_missing(isa)) {
      missing[foldscan::isa_name(isa)] = what;
    } else {
      available.emplace_back(foldscan::isa_name(isa));
    }
  }
  py::dict d;
  d["isa"] = foldscan::isa_name(foldscan::current_isa());
  d["isa_available"] = available;
  d["isa_missing"] = missing;
#ifdef FOLDSCAN_SOFTWARE_TILES
  d["software_tiles"] = true;
#else
  d["software_tiles"] = false;
#endif
  d["compiler"] = __VERSION__;
  d["cuda"] = false;
  return d;
}

double peak_flops(const std::string& dtype, double seconds) {
  const foldscan::DType type = parse_dtype(dtype);
  if (!(seconds > 0 && seconds <= 60)) throw std::invalid_argument("seconds: want more than 0 and at most 60");
  py::gil_scoped_release release;
  double best = 0, flops = 0;
  const auto start = std::chrono::steady_clock::now();
  do {
    const auto t = std::chrono::steady_clock::now();
    foldscan::probe::cpu::peak({.type = type, .iterations = 100000, .flops = &flops});
    const double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - t).count();
    best = flops / s > best ? flops / s : best;
  } while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds);
  return best;
}

Array gemm(const Array& a, const Array& b, const std::string& dtype) {
  const foldscan::DType type = parse_dtype(dtype);
  if (a.ndim() != 2 || b.ndim() != 2 || a.shape(1) != b.shape(0))
    throw std::invalid_argument("gemm: want matrices (M, K) and (K, N)");
  Array c({a.shape(0), b.shape(1)});
  const foldscan::probe::Gemm p{.a = a.data(),
                                .b = b.data(),
                                .c = c.mutable_data(),
                                .M = a.shape(0),
                                .N = b.shape(1),
                                .K = a.shape(1),
                                .type = type};
  {
    py::gil_scoped_release release;
    foldscan::probe::cpu::gemm(p);
  }
  return c;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Capabilities of the compiled foldscan core, and entry points on NumPy arrays.";
  foldscan::set_pool_threads(1);
  m.def(
      "capabilities", &capabilities,
      "dict: isa (in use), isa_available, isa_missing (what each of the others lacks here), software_tiles (avx512_amx "
      "on a tile unit in software), compiler, cuda (built with CUDA kernels)");
  m.def("peak_flops", &peak_flops, py::arg("dtype") = "float32", py::arg("seconds") = 0.1,
        "Multiply-add rate of one thread in FLOP/s (best of many rounds): the bound of every kernel of that dtype.");
  m.def(
      "gemm", &gemm, py::arg("a"), py::arg("b"), py::arg("dtype") = "float32",
      "a (M, K) times b (K, N), float32 arrays; 'bfloat16' rounds the operands first. fp32 accumulation, one thread.");
}
