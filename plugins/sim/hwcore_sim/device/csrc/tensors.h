// Tensors of the device: how they are made, and how the CPU's kernels get to see them.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>
#include <vector>

#include "streams.h"

namespace sim {

inline bool on_sim(const at::Tensor& tensor) { return tensor.device().type() == kSim; }

at::Tensor make_tensor(c10::IntArrayRef sizes, c10::IntArrayRef strides, c10::ScalarType dtype,
                       DeviceIndex device);

// A CPU tensor over the same bytes, which it does not own: what queued work holds. It keeps the
// memory's address, not the memory; a program that frees it too early gets wrong values.
at::Tensor alias_on_cpu(const at::Tensor& tensor);

// Such tensors for one call: those of one storage share one, as kernels that look for arguments
// that overlap need it.
class Aliases {
 public:
  at::Tensor of(const at::Tensor& tensor);

 private:
  std::vector<std::pair<const c10::StorageImpl*, c10::Storage>> made_;
};

// Give an out= argument other sizes, in the inference mode that it was made in.
void resize_out(const at::Tensor& tensor, c10::IntArrayRef sizes);

// Give a tensor new sizes (and strides: contiguous if empty), with more memory if need be.
void set_shape(const at::Tensor& tensor, c10::IntArrayRef sizes, c10::IntArrayRef strides);

// Copy a kernel's result into memory of the same shape: in one go where the layouts agree.
void copy_result(const at::Tensor& to, const at::Tensor& from);

// The values now in a tensor's memory, whatever is queued.
at::Tensor peek(const at::Tensor& tensor);

}  // namespace sim
