// What the operator bindings share: from stable-ABI tensors to the raw pointers and strides of the parameter structs.
// The Python layer validates arguments with named messages; the checks here keep a direct call from touching memory
// that is not there.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/memory.h"
#include "core/types.h"

namespace foldscan::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

inline void check(bool ok, const char* message) {
  if (!ok) throw std::runtime_error(std::string("foldscan: ") + message);
}

inline DType dtype_of(const Tensor& t) {
  if (t.scalar_type() == ScalarType::Float) return DType::kF32;
  check(t.scalar_type() == ScalarType::BFloat16, "kernels take float32 and bfloat16 tensors");
  return DType::kBF16;
}

inline ScalarType scalar_of(DType t) { return t == DType::kF32 ? ScalarType::Float : ScalarType::BFloat16; }

Tensor empty(const int64_t* sizes, size_t dims, ScalarType dtype);
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty(sizes.begin(), sizes.size(), dtype);
}
inline Tensor empty(std::initializer_list<int64_t> sizes, DType dtype) { return empty(sizes, scalar_of(dtype)); }

// A dense tensor of the expected type.
template <class T>
const T* in(const Tensor& t, ScalarType type) {
  check(t.scalar_type() == type && t.is_contiguous(), "an argument has the wrong dtype or is not contiguous");
  return static_cast<const T*>(t.data_ptr());
}
template <class T>
const T* in(const OptTensor& t, ScalarType type) {
  return t.has_value() ? in<T>(*t, type) : nullptr;
}
inline const float* in_f32(const Tensor& t) { return in<float>(t, ScalarType::Float); }
inline const float* in_f32(const OptTensor& t) { return in<float>(t, ScalarType::Float); }
inline const int32_t* in_i32(const Tensor& t) { return in<int32_t>(t, ScalarType::Int); }
inline const int32_t* in_i32(const OptTensor& t) { return in<int32_t>(t, ScalarType::Int); }
inline const int64_t* in_i64(const Tensor& t) { return in<int64_t>(t, ScalarType::Long); }

inline void* data(const Tensor& t) { return t.data_ptr(); }
inline void* data(const OptTensor& t) { return t.has_value() ? t->data_ptr() : nullptr; }
inline float* f32(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }
inline float* f32(const OptTensor& t) { return t.has_value() ? f32(*t) : nullptr; }

}  // namespace foldscan::bindings
