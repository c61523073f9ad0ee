// Every operator that is not in tensors.cpp: the CPU's kernel on aliases of the same memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "streams.h"

namespace sim {

// --- Simulated missing kernels -------------------------------------------------------------------

// `op` is "namespace::name" for all overloads, or "namespace::name.overload"; `overloads` are the
// full names of those that it means.
void deny(const std::string& op, const std::vector<std::string>& overloads);
void allow(const std::string& op);
std::vector<std::string> denied_ops();
// Raise if the operator is denied, with a vendor's words.
void check_denied(const std::string& name, const std::string& overload);

// Where the queue is being captured, let its graph keep the tensor's memory mapped.
void keep_for_graph(Queue* queue, const at::Tensor& tensor);

}  // namespace sim
