// What an operator will return, known before it runs: torch's metadata functions, remembered.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <memory>
#include <vector>

#include "common.h"

namespace sim {

using torch::jit::Stack;

struct Shapes {
  // A tensor argument that the operator gives other sizes or strides.
  struct Reshaped {
    size_t argument;
    size_t element;  // in a list
    std::vector<int64_t> sizes, strides;
  };

  bool known = false;    // false: only running the operator tells
  std::string why;       // if not known
  bool passing = false;  // not known for what may be bad values: not to be remembered
  bool overlap = false;  // an argument that is written overlaps with another
  Stack returns;         // with tensors on `meta`
  std::vector<Reshaped> reshaped;
};

// `arguments` are those of a call, with tensors on the device.
std::shared_ptr<const Shapes> shapes_of(const c10::OperatorHandle& op, const Stack& arguments);

}  // namespace sim
