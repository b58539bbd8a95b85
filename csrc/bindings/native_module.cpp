// foldscan._native: what is not a tensor operator. Capability report of this build on this machine.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "core/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "Capabilities of the compiled foldscan core.";
  m.def(
      "capabilities",
      [] {
        using foldscan::Isa;
        std::vector<std::string> available;
        for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16})
          if (foldscan::isa_available(isa)) available.emplace_back(foldscan::isa_name(isa));
        py::dict d;
        d["isa"] = foldscan::isa_name(foldscan::current_isa());
        d["isa_available"] = available;
        d["compiler"] = __VERSION__;
        d["cuda"] = false;
        return d;
      },
      "dict: isa (in use), isa_available (list), compiler, cuda (built with CUDA kernels).");
}
