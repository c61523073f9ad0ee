// What the fallback wants to know about an operator, worked out once.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>

#include <memory>
#include <string>
#include <vector>

namespace sim {

struct OperatorInfo {
  explicit OperatorInfo(const c10::OperatorHandle& op);

  struct Argument {
    bool written = false;     // (a!)
    bool is_out = false;      // an out= argument
    bool is_index = false;    // indices may be on the CPU
    bool value_only = false;  // a number that no shape depends on
  };

  std::string name, overload;
  // Operators of torch itself never change; others may be registered anew under the same name.
  bool permanent = false;
  bool is_view = false;     // returns or makes a view: metadata alone
  bool reads_host = false;  // returns a number: the host waits for it
  bool random = false;
  bool has_out = false;
  bool dynamic = false;  // the shape of its result depends on values
  int generator = -1;    // which argument it is
  std::vector<Argument> arguments;
  std::vector<int> returns;  // the written argument that is returned, or -1 for a new value
};

std::shared_ptr<const OperatorInfo> info_of(const c10::OperatorHandle& op);

// Call `each` for every defined tensor in a value.
template <class F>
void for_each_tensor(const c10::IValue& value, F&& each) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) each(value.toTensor());
  } else if (value.isTensorList()) {
    for (const at::Tensor& t : value.toTensorList()) {
      if (t.defined()) each(t);
    }
  } else if (value.isOptionalTensorList()) {
    for (const auto& it : value.toListRef()) {
      if (it.isTensor() && it.toTensor().defined()) each(it.toTensor());
    }
  }
}

// Return a value with every defined tensor in it replaced by `map` of it.
template <class F>
c10::IValue map_tensors(const c10::IValue& value, F&& map) {
  if (value.isTensor()) {
    return value.toTensor().defined() ? c10::IValue(map(value.toTensor())) : value;
  }
  if (value.isTensorList()) {
    c10::List<at::Tensor> mapped;
    for (const at::Tensor& t : value.toTensorList()) {
      mapped.push_back(t.defined() ? at::Tensor(map(t)) : t);
    }
    return mapped;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> mapped;
    for (const auto& it : value.toListRef()) {
      if (it.isTensor() && it.toTensor().defined()) {
        mapped.push_back(map(it.toTensor()));
      } else {
        mapped.push_back(std::nullopt);
      }
    }
    return mapped;
  }
  return value;
}

}  // namespace sim
