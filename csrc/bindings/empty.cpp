// Fresh output tensors; the large ones live in blocks of the core's pool.
#include "bindings/common.h"

// Since PyTorch 2.11; with 2.10 the symbol is absent and the address null.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* tensor, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace foldscan::bindings {
namespace {

int32_t dtype_code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    default:
      return -1;  // indices: never large enough to matter
  }
}

}  // namespace

Tensor empty(const int64_t* sizes, size_t dims, ScalarType dtype) {
  constexpr size_t kMaxDims = 8;
  const int32_t code = dtype_code(dtype);
  int64_t strides[kMaxDims], elements = 1;
  if (code >= 0 && dims <= kMaxDims)
    for (size_t dim = dims; dim-- > 0; elements *= sizes[dim]) strides[dim] = elements;
  const int64_t bytes = elements * (dtype == ScalarType::Float ? 4 : 2);
  if (!torch_from_blob || code < 0 || dims > kMaxDims || bytes < kPooledBytes || block_limit() == 0) {
    Tensor t = torch::stable::empty({sizes, dims}, dtype);
    advise_large_pages(t.data_ptr(), bytes);
    return t;
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(
      take_block(bytes), static_cast<int64_t>(dims), sizes, strides, 0, code, aoti_torch_device_type_cpu(), -1, &handle,
      aoti_torch_layout_strided(), nullptr, 0, [](void* data, void*) { give_block(data); }, nullptr));
  return Tensor(handle);
}

}  // namespace foldscan::bindings
