// Autocast, with torch's own lists of which operators run in which precision. One boxed kernel a
// policy: torch's templates, one instance an operator, would take longer to build than all else.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <string>

#include "operator_info.h"

namespace sim {
namespace {

constexpr auto kKey = c10::DispatchKey::AutocastPrivateUse1;
constexpr auto kDevice = c10::DeviceType::PrivateUse1;

enum class Policy { Lower, Full, Widest };

// The widest of the arguments' types, for operators that need them to agree.
at::ScalarType widest(const torch::jit::Stack& arguments) {
  auto type = at::autocast::get_autocast_dtype(kDevice);
  for (const auto& value : arguments) {
    for_each_tensor(value, [&](const at::Tensor& t) {
      if (at::autocast::is_eligible(t, kDevice) && t.scalar_type() == at::kFloat) type = at::kFloat;
    });
  }
  return type;
}

template <Policy policy>
void cast_arguments(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
  const size_t count = op.schema().arguments().size();
  torch::jit::Stack arguments(stack->end() - count, stack->end());
  const auto type = policy == Policy::Lower  ? at::autocast::get_autocast_dtype(kDevice)
                    : policy == Policy::Full ? at::kFloat
                                             : widest(arguments);
  torch::jit::drop(*stack, count);
  for (const auto& value : arguments) {
    stack->push_back(map_tensors(
        value, [&](const at::Tensor& t) { return at::autocast::cached_cast(type, t, kDevice); }));
  }
  op.callBoxed(stack);
}

template <Policy policy>
void add(torch::Library& m, std::string name) {
  const auto comma = name.find(", ");  // "op, overload" as the lists have it
  if (comma != std::string::npos) name.replace(comma, 2, ".");
  m.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&cast_arguments<policy>>());
}

}  // namespace

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOWER(...) add<Policy::Lower>(m, #__VA_ARGS__);
#define FULL(...) add<Policy::Full>(m, #__VA_ARGS__);
#define WIDEST(...) add<Policy::Widest>(m, #__VA_ARGS__);
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FULL)
  AT_FORALL_FP32_SET_OPT_DTYPE(FULL)
  AT_FORALL_PROMOTE(WIDEST)
#undef LOWER
#undef FULL
#undef WIDEST
}

}  // namespace sim
