#include "fallback.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/Resize.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <set>

#include "allocator.h"
#include "generator.h"
#include "graph.h"
#include "neutral.h"
#include "operator_info.h"
#include "shapes.h"
#include "tensors.h"

namespace sim {

using at::Tensor;
using c10::IValue;
using c10::OperatorHandle;

namespace {

// --- Denied operators ----------------------------------------------------------------------------

struct Denied {
  std::mutex mutex;
  std::set<std::string> names;
  std::map<std::string, std::vector<std::unique_ptr<torch::Library>>> composites;
  std::atomic<bool> any{false};
};

Denied& denied() {
  static Denied* const instance = new Denied;
  return *instance;
}

}  // namespace

void refuse_denied(const OperatorHandle& op, Stack*) {
  check_denied(op.schema().name(), op.schema().overload_name());
}

void deny(const std::string& op, const std::vector<std::string>& overloads) {
  std::lock_guard<std::mutex> lock(denied().mutex);
  denied().names.insert(op);
  denied().any = true;
  if (denied().composites.count(op)) return;
  auto& kernels = denied().composites[op];
  const bool dotted = op.find('.') != std::string::npos;
  Silent silent;  // of torch's warning that a kernel is replaced
  for (const auto& full : overloads) {
    const auto dot = full.find('.');
    const auto handle = c10::Dispatcher::singleton().findSchema(
        {full.substr(0, dot), dot == std::string::npos ? "" : full.substr(dot + 1)});
    // Made of other operators, or with a kernel of its own, such a one never comes to the
    // fallback: give it a kernel that does nothing else. torch's in-between kind gets there as
    // another overload of its name.
    if (!handle) continue;
    if (!handle->hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1) &&
        !handle->hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd) &&
        !handle->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd) &&
        !(dotted && handle->hasKernelForDispatchKey(
                        c10::DispatchKey::CompositeExplicitAutogradNonFunctional))) {
      continue;
    }
    kernels.push_back(
        std::make_unique<torch::Library>(torch::Library::IMPL, full.substr(0, full.find(':')),
                                         c10::DispatchKey::PrivateUse1, __FILE__, __LINE__));
    kernels.back()->impl(full.substr(full.find("::") + 2).c_str(),
                         torch::CppFunction::makeFromBoxedFunction<&refuse_denied>());
  }
}

void allow(const std::string& op) {
  std::lock_guard<std::mutex> lock(denied().mutex);
  denied().names.erase(op);
  denied().composites.erase(op);
  denied().any = !denied().names.empty();
}

std::vector<std::string> denied_ops() {
  std::lock_guard<std::mutex> lock(denied().mutex);
  return {denied().names.begin(), denied().names.end()};
}

void check_denied(const std::string& name, const std::string& overload) {
  if (!denied().any) return;
  const std::string full = overload.empty() ? name : name + "." + overload;
  {
    std::lock_guard<std::mutex> lock(denied().mutex);
    if (!denied().names.count(name) && !denied().names.count(full)) return;
  }
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, "Could not run '", full, "' with arguments from the '", device_name(),
      "' backend (simulated missing kernel). Run it on the CPU where needs_cpu_fallback says so, "
      "or call hwcore_sim.device.allow(\"",
      name, "\").");
}

void keep_for_graph(Queue* queue, const Tensor& tensor) {
  Graph* graph = queue->capture;
  if (graph && (on_sim(tensor) || is_pinned(tensor.storage().data()))) {
    graph->keep(tensor.storage());
  }
}

namespace {

// --- Which device a call is for ------------------------------------------------------------------

[[noreturn]] void fail_mixed(c10::Device one, c10::Device other, const OperatorInfo& info) {
  TORCH_CHECK(false,
              "Expected all tensors to be on the same device, but found at least two devices, ",
              one, " and ", other, "! (when running ", info.name, " on ", device_name(), ")");
}

DeviceIndex device_of_call(const OperatorInfo& info, const Stack& arguments) {
  c10::Device device(kSim, -1);
  for (const auto& value : arguments) {
    for_each_tensor(value, [&](const Tensor& t) {
      if (!on_sim(t)) return;
      if (device.index() == -1) device = t.device();
      if (device != t.device()) fail_mixed(device, t.device(), info);
    });
    if (value.isDevice() && device.index() == -1) device.set_index(value.toDevice().index());
  }
  for (size_t i = 0; i < arguments.size(); ++i) {
    for_each_tensor(arguments[i], [&](const Tensor& t) {
      if (on_sim(t)) return;
      const bool index = info.arguments[i].is_index && t.is_cpu() && !t.is_floating_point();
      const bool number = t.is_cpu() && t.dim() == 0 && !info.arguments[i].written;
      if (!index && !number) fail_mixed(device, t.device(), info);
    });
  }
  return checked(device.index(), "device");
}

// --- Arguments as the CPU's kernel gets them -----------------------------------------------------

Tensor as_it_is(const Tensor& tensor) { return tensor; }

// What is queued must not change with a host tensor that the caller goes on writing to.
Tensor as_it_is_now(const Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->is_wrapped_number() ? tensor : tensor.clone();
}

// `of_host` maps the tensors that are on the CPU already.
Stack cpu_arguments(const Stack& arguments, Tensor (*of_host)(const Tensor&)) {
  Aliases aliases;
  const auto map = [&](const Tensor& t) { return on_sim(t) ? aliases.of(t) : of_host(t); };
  Stack mapped;
  mapped.reserve(arguments.size());
  for (const auto& value : arguments) {
    if (value.isDevice()) {
      mapped.emplace_back(c10::Device(c10::DeviceType::CPU));
    } else {
      mapped.push_back(map_tensors(value, map));
    }
  }
  return mapped;
}

void check_plain(const Tensor& result, const OperatorInfo& info) {
  const bool quantized = c10::isQIntType(result.scalar_type());  // said by metadata alone as well
  TORCH_CHECK_NOT_IMPLEMENTED(
      result.layout() == c10::kStrided && !quantized, info.name, " on ", device_name(),
      ": the result is ", quantized ? "quantized" : "of a sparse or other layout",
      "; expected a plain strided tensor. Move the arguments to the CPU first.");
}

// A CPU result as a tensor of the device.
Tensor to_device(const Tensor& result, DeviceIndex device, const OperatorInfo& info) {
  check_plain(result, info);
  const Tensor made =
      result.is_non_overlapping_and_dense()
          ? make_tensor(result.sizes(), result.strides(), result.scalar_type(), device)
          : make_tensor(result.sizes(), c10::contiguous_strides(result.sizes()),
                        result.scalar_type(), device);
  copy_result(alias_on_cpu(made), result);
  return made;
}

// Put a call's returns on the stack: written arguments as they came, the others through `map`.
template <class F>
void push_returns(const OperatorInfo& info, const Stack& arguments, const Stack& results,
                  Stack* stack, F&& map) {
  torch::jit::drop(*stack, arguments.size());
  for (size_t i = 0; i < results.size(); ++i) {
    const int source = info.returns[i];
    stack->push_back(source >= 0 ? arguments[source] : map_tensors(results[i], map));
  }
}

// --- Random numbers ------------------------------------------------------------------------------

at::Generator generator_of(const OperatorInfo& info, const Stack& arguments, DeviceIndex device) {
  const IValue& value = arguments[info.generator];
  return value.isNone() ? default_generator(device) : value.toGenerator();
}

// Operators that draw more or fewer numbers for other values.
bool draws_by_value(const OperatorInfo& info) {
  static const std::set<std::string> kNames = {
      "aten::_sample_dirichlet",   "aten::_standard_gamma",
      "aten::binomial",            "aten::poisson",
      "aten::rrelu_with_noise",    "aten::rrelu_with_noise_",
      "aten::rrelu_with_noise_functional",
  };
  return kNames.count(info.name) > 0;
}

// Take from `ours` what the call will draw: its state now, advanced past it by a trial run on
// inputs of the same shape. That holds where the count of draws depends on shapes alone, which
// is what `draws_by_value` is for. Returns nothing if the trial fails.
std::optional<at::Generator> reserve(const OperatorHandle& op, const OperatorInfo& info,
                                     Stack arguments, Generator* ours) {
  std::lock_guard<std::mutex> lock(ours->mutex_);
  at::Generator reserved = ours->engine.clone();
  for (auto& value : arguments) {
    value = map_tensors(value, [](const Tensor& t) {
      auto trial = at::detail::empty_strided_cpu(t.sizes(), t.strides(), t.scalar_type());
      return trial.fill_(1);
    });
  }
  arguments[info.generator] = ours->engine;
  try {
    op.callBoxed(&arguments);
  } catch (const c10::Error&) {
    ours->engine = reserved;
    return std::nullopt;
  }
  return reserved;
}

// --- Queued calls --------------------------------------------------------------------------------

struct Call : Work {
  Call(const OperatorHandle& op, Stack arguments) : op(op), arguments(std::move(arguments)) {}

  void run() override {
    Stack stack = arguments;
    op.callBoxed(&stack);
    const auto info = info_of(op);
    const auto& returns = info->returns;
    size_t next = 0;
    for (size_t i = 0; i < returns.size(); ++i) {
      if (returns[i] >= 0) continue;
      for_each_tensor(stack[i], [&](const Tensor& result) {
        const Tensor& to = results.at(next++);
        TORCH_CHECK(to.sizes() == result.sizes(), name(), ": the CPU's kernel returned sizes ",
                    result.sizes(), "; expected ", to.sizes(),
                    ", as its metadata function says. "
                    "Report the operator: it belongs into kDisagreeing of shapes.cpp.");
        copy_result(to, result);
      });
    }
  }

  std::string name() const override { return toString(op.operator_name()); }

  OperatorHandle op;
  Stack arguments;
  std::vector<Tensor> results;  // aliases of what the caller got
};

// A call that draws random numbers; each replay of a graph draws anew.
struct RandomCall final : Call {
  using Call::Call;

  std::shared_ptr<Work> for_replay(const std::shared_ptr<Work>&) override {
    const auto known = info_of(op);
    const OperatorInfo& info = *known;
    auto again = std::make_shared<RandomCall>(op, arguments);
    again->results = results;
    again->ours = ours;
    Neutral neutral;
    auto reserved = reserve(op, info, arguments, as_ours(ours));
    TORCH_CHECK(reserved, name(), ": drawing for a replay failed");
    again->arguments[info.generator] = *reserved;
    return again;
  }

  at::Generator ours;
};

// --- The two ways to run a call ------------------------------------------------------------------

// Give written arguments the shape that the call gives them, which an alias cannot change.
void reshape(const OperatorInfo& info, const Stack& arguments, const Shapes& shapes) {
  for (const auto& it : shapes.reshaped) {
    size_t element = 0;
    for_each_tensor(arguments[it.argument], [&](const Tensor& t) {
      if (element++ != it.element) return;
      if (info.arguments[it.argument].is_out) resize_out(t, it.sizes);
      set_shape(t, it.sizes, it.strides);
    });
  }
}

// Run now, on results of the host's; what a call with unknown shapes does, and the eager policy.
void run_now(const OperatorHandle& op, const OperatorInfo& info, DeviceIndex device,
             const Stack& arguments, Stack* stack) {
  Stack cpu;
  std::vector<std::pair<Tensor, Tensor>> outs;
  {
    c10::InferenceMode no_grad(false);
    const auto shapes = info.has_out ? shapes_of(op, arguments) : nullptr;
    if (shapes && shapes->known) reshape(info, arguments, *shapes);
    cpu = cpu_arguments(arguments, as_it_is);
    const bool apart = shapes && !shapes->known && !shapes->overlap;
    for (size_t i = 0; apart && i < arguments.size(); ++i) {
      // Who knows what shape it will get: the kernel writes into another tensor.
      if (!info.arguments[i].is_out) continue;
      cpu[i] = map_tensors(arguments[i], [&](const Tensor& t) {
        outs.emplace_back(t, at::detail::empty_cpu({0}, t.scalar_type()));
        return outs.back().second;
      });
    }
  }
  if (info.generator >= 0) {
    cpu[info.generator] = as_ours(generator_of(info, arguments, device))->engine;
  }
  {
    GilRelease release;
    Execution execution;
    Neutral neutral;
    op.callBoxed(&cpu);
  }
  for (auto& [to, from] : outs) {
    if (to.sizes() != from.sizes()) resize_out(to, from.sizes());
    copy_result(alias_on_cpu(to), from);
  }
  push_returns(info, arguments, cpu, stack,
               [&](const Tensor& t) { return to_device(t, device, info); });
}

// Queue the call; false if it has to run now for its shapes or its random numbers.
bool run_later(const OperatorHandle& op, const OperatorInfo& info, DeviceIndex device, Queue* queue,
               const Stack& arguments, const Shapes& shapes, Stack* stack) {
  if (info.generator >= 0 && draws_by_value(info)) return false;
  c10::InferenceMode no_grad(false);
  reshape(info, arguments, shapes);
  Stack cpu = cpu_arguments(arguments, as_it_is_now);
  std::shared_ptr<Call> call;
  if (info.generator >= 0) {
    const at::Generator ours = generator_of(info, arguments, device);
    std::optional<at::Generator> reserved;
    {
      Neutral neutral;
      reserved = reserve(op, info, cpu, as_ours(ours));
    }
    if (!reserved) return false;
    auto random = std::make_shared<RandomCall>(op, std::move(cpu));
    random->arguments[info.generator] = *reserved;
    random->ours = ours;
    call = std::move(random);
  } else {
    call = std::make_shared<Call>(op, std::move(cpu));
  }
  for (const auto& value : arguments) {
    for_each_tensor(value, [&](const Tensor& t) { keep_for_graph(queue, t); });
  }
  push_returns(info, arguments, shapes.returns, stack, [&](const Tensor& meta) {
    check_plain(meta, info);
    auto made = make_tensor(meta.sizes(), meta.strides(), meta.scalar_type(), device);
    call->results.push_back(alias_on_cpu(made));
    return made;
  });
  submit(queue, std::move(call));
  return true;
}

void run(const OperatorHandle& op, Stack* stack) {
  const auto known = info_of(op);
  const OperatorInfo& info = *known;
  check_denied(info.name, info.overload);
  if (info.is_view) {
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
    return;
  }
  const size_t count = info.arguments.size();
  const Stack arguments(stack->end() - count, stack->end());
  const DeviceIndex device = device_of_call(info, arguments);
  Queue* queue = current_queue(device);
  if (runs_at_once(queue)) {
    run_now(op, info, device, arguments, stack);
    return;
  }
  const auto shapes = shapes_of(op, arguments);
  if (shapes->known && run_later(op, info, device, queue, arguments, *shapes, stack)) return;
  const std::string why =
      shapes->known ? "draws random numbers that depend on values" : shapes->why;
  const std::string problem = c10::str("called ", toString(op.operator_name()), ", which ", why);
  refuse_while_capturing(queue, problem);
  synchronize(queue, problem.c_str());
  run_now(op, info, device, arguments, stack);
}

// torch routes convolutions of unknown devices here; the CPU has them under their usual names.
void convolution(const OperatorHandle&, Stack* stack) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution", "");
  run(op, stack);
}

void convolution_backward(const OperatorHandle&, Stack* stack) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution_backward", "");
  // The same arguments, but for the bias' size after the weight.
  constexpr size_t kArguments = 10, kWeight = 2;
  const size_t base = stack->size() - kArguments;
  const Tensor weight = (*stack)[base + kWeight].toTensor();
  const bool transposed = (*stack)[base + 6].toBool();
  const int64_t groups = (*stack)[base + 8].toInt();
  const std::vector<int64_t> bias{transposed ? weight.size(1) * groups : weight.size(0)};
  stack->insert(stack->begin() + base + kWeight + 1, IValue(bias));
  run(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution>());
  m.impl("convolution_backward_overrideable",
         torch::CppFunction::makeFromBoxedFunction<&convolution_backward>());
  // These torch composes of others for devices without a kernel, with other strides or waits.
  for (const char* name : {"native_channel_shuffle", "native_group_norm", "native_layer_norm",
                           "pixel_shuffle", "pixel_unshuffle"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run>());
  }
}

}  // namespace sim
