#include "operator_info.h"

#include <ATen/core/enum_tag.h>

#include <memory>
#include <set>
#include <unordered_map>

namespace sim {
namespace {

// Numbers that change what is computed, never what shape it has.
const std::set<std::string> kValueNames = {"alpha", "beta",  "eps", "fill_value", "max",
                                           "min",   "other", "p",   "value"};

}  // namespace

OperatorInfo::OperatorInfo(const c10::OperatorHandle& op)
    : name(op.schema().name()), overload(op.schema().overload_name()) {
  const auto& schema = op.schema();
  permanent = name.rfind("aten::", 0) == 0;
  random = op.hasTag(at::Tag::nondeterministic_seeded);
  is_view = op.hasTag(at::Tag::inplace_view);
  bool takes_indices = false;
  for (const auto& argument : schema.arguments()) {
    Argument it;
    const auto* alias = argument.alias_info();
    it.written = alias && alias->isWrite();
    it.is_out = argument.is_out();
    it.is_index = argument.type()->str() == "Tensor?[]";
    it.value_only = kValueNames.count(argument.name()) > 0;
    has_out |= it.is_out;
    takes_indices |= it.is_index;
    if (argument.type()->str().find("Generator") == 0) generator = int(arguments.size());
    arguments.push_back(it);
  }
  // Whether an index is a mask is seen from its type at the call.
  dynamic = op.hasTag(at::Tag::dynamic_output_shape) && !takes_indices;
  for (const auto& result : schema.returns()) {
    const auto* alias = result.alias_info();
    if (alias && !alias->isWrite()) is_view = true;
    int source = -1;
    for (size_t i = 0; alias && i < arguments.size(); ++i) {
      const auto* its = schema.arguments()[i].alias_info();
      if (arguments[i].written && its->beforeSets() == alias->beforeSets()) source = int(i);
    }
    returns.push_back(source);
    const auto kind = result.type()->kind();
    reads_host |= kind != c10::TypeKind::TensorType && kind != c10::TypeKind::ListType;
  }
  if (name == "aten::equal") reads_host = true;
}

std::shared_ptr<const OperatorInfo> info_of(const c10::OperatorHandle& op) {
  thread_local std::unordered_map<const void*, std::shared_ptr<const OperatorInfo>> known;
  const void* key = &op.schema();
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  auto info = std::make_shared<const OperatorInfo>(op);
  if (info->permanent) known[key] = info;
  return info;
}

}  // namespace sim
