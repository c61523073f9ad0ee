// The kernels that cannot come from the CPU: allocation, copies, reads, changes of storage.
#include "tensors.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_copy_from.h>
#include <ATen/ops/bernoulli.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <cstring>

#include "allocator.h"
#include "fallback.h"
#include "graph.h"

namespace sim {

using at::IntArrayRef;
using at::Tensor;

Tensor make_tensor(IntArrayRef sizes, IntArrayRef strides, c10::ScalarType dtype,
                   DeviceIndex device) {
  const DeviceIndex before = exchange_device(device);
  try {
    auto made = at::detail::empty_strided_generic(
        sizes, strides, device_allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
        dtype);
    set_current_device(before);
    return made;
  } catch (...) {
    set_current_device(before);
    throw;
  }
}

namespace {

// A storage can have been shrunk under its tensors (storage.resize_(0)): that must not crash.
void check_in_bounds(const Tensor& tensor) {
  int64_t last = tensor.storage_offset();
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return;
    last += (sizes[i] - 1) * strides[i];
  }
  const size_t bytes = (last + 1) * tensor.itemsize();
  TORCH_CHECK(bytes <= tensor.storage().nbytes(), device_name(), ": storage got ",
              tensor.storage().nbytes(), " bytes; expected at least ", bytes,
              ", which its tensor needs. Enlarge it again before the tensor is used.");
}

}  // namespace

Tensor alias_on_cpu(const Tensor& tensor) { return Aliases().of(tensor); }

Tensor Aliases::of(const Tensor& tensor) {
  check_in_bounds(tensor);
  const auto& storage = tensor.storage();
  c10::Storage bytes;
  for (const auto& [of, its] : made_) {
    if (of == storage.unsafeGetStorageImpl()) bytes = its;
  }
  if (!bytes) {
    bytes = c10::Storage(c10::Storage::use_byte_size_t{}, storage.nbytes(),
                         c10::DataPtr(storage.mutable_data(), c10::Device(c10::DeviceType::CPU)),
                         /*allocator=*/nullptr, /*resizable=*/false);
    made_.emplace_back(storage.unsafeGetStorageImpl(), bytes);
  }
  auto alias = at::detail::make_tensor<c10::TensorImpl>(
      std::move(bytes), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  auto* impl = alias.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.is_conj()) impl->_set_conj(true);
  if (tensor.is_neg()) impl->_set_neg(true);
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return alias;
}

void resize_out(const Tensor& tensor, IntArrayRef sizes) {
  c10::InferenceMode mode(tensor.is_inference());
  at::native::resize_output(tensor, sizes);
}

void copy_result(const Tensor& to, const Tensor& from) {
  if (from.numel() == 0 && to.numel() == 0) return;
  if (from._is_zerotensor()) {
    to.zero_();
    return;
  }
  if (to.sizes() == from.sizes() && to.strides() == from.strides() && to.dtype() == from.dtype() &&
      from.is_non_overlapping_and_dense() && !from.is_conj() && !from.is_neg()) {
    memcpy(to.mutable_data_ptr(), from.const_data_ptr(), from.numel() * from.itemsize());
  } else {
    to.copy_(from);
  }
}

Tensor peek(const Tensor& tensor) {
  c10::InferenceMode no_grad(false);
  return alias_on_cpu(tensor).clone();
}

namespace {

struct OnDevice {
  explicit OnDevice(c10::Device device)
      : before(exchange_device(checked(device.index(), "device"))) {}
  ~OnDevice() { set_current_device(before); }
  DeviceIndex before;
};

void check_options(std::optional<c10::Layout> layout, std::optional<bool> pinned) {
  TORCH_CHECK_NOT_IMPLEMENTED(layout.value_or(c10::kStrided) == c10::kStrided, device_name(),
                              ": layout got ", layout.value_or(c10::kStrided),
                              "; expected torch.strided. Keep such tensors on the CPU.");
  TORCH_CHECK(!pinned.value_or(false), device_name(),
              ": pin_memory got True; expected a CPU tensor, for only those can be pinned. "
              "Drop pin_memory.");
}

Tensor empty(IntArrayRef sizes, std::optional<c10::ScalarType> dtype,
             std::optional<c10::Layout> layout, std::optional<c10::Device> device,
             std::optional<bool> pinned, std::optional<c10::MemoryFormat> format) {
  check_options(layout, pinned);
  OnDevice guard(device.value_or(c10::Device(kSim)));
  return at::detail::empty_generic(sizes, device_allocator(),
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef sizes, IntArrayRef strides, std::optional<c10::ScalarType> dtype,
                     std::optional<c10::Layout> layout, std::optional<c10::Device> device,
                     std::optional<bool> pinned) {
  check_options(layout, pinned);
  OnDevice guard(device.value_or(c10::Device(kSim)));
  return at::detail::empty_strided_generic(sizes, strides, device_allocator(),
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

struct CopyWork final : Work {
  Tensor to, from;
  void run() override { to.copy_(from); }
  std::string name() const override { return "aten::copy_"; }
};

std::shared_ptr<CopyWork> copy_work(Tensor to, Tensor from) {
  auto work = std::make_shared<CopyWork>();
  work->to = std::move(to);
  work->from = std::move(from);
  return work;
}

void host_to_device(const Tensor& from, const Tensor& to, bool non_blocking) {
  Queue* queue = current_queue(to.device().index());
  if (non_blocking && is_pinned(from.storage().data())) {
    // Aliases of the host's memory too: work on a pinned block must not keep it from being freed
    // and handed out again, or its early reuse could not be seen.
    submit(queue, copy_work(alias_on_cpu(to), alias_on_cpu(from)));
    use_pinned(from.storage().data(), queue);
    keep_for_graph(queue, from);
    keep_for_graph(queue, to);
    return;
  }
  refuse_while_capturing(queue, "copied from host memory that is not pinned, or while blocking");
  {
    c10::InferenceMode no_grad(false);
    submit(queue, copy_work(alias_on_cpu(to), from.clone()));
  }
  if (!non_blocking) synchronize(queue, "copied from the host while blocking");
}

void device_to_host(const Tensor& from, const Tensor& to, bool non_blocking) {
  Queue* queue = current_queue(from.device().index());
  if (non_blocking && is_pinned(to.storage().data())) {
    submit(queue, copy_work(alias_on_cpu(to), alias_on_cpu(from)));
    use_pinned(to.storage().data(), queue);
    keep_for_graph(queue, from);
    keep_for_graph(queue, to);
    return;
  }
  refuse_while_capturing(queue, "copied to the host, which waits for the device");
  synchronize(queue, "copied to the host");
  to.copy_(alias_on_cpu(from));
}

void device_to_device(const Tensor& from, const Tensor& to) {
  Queue* reader = current_queue(from.device().index());
  Queue* writer = current_queue(to.device().index());
  if (reader != writer) {
    refuse_while_capturing(reader, "copied between two devices");
    refuse_while_capturing(writer, "copied between two devices");
    submit_wait(writer, reader, reader->pushed);
  }
  submit(writer, copy_work(alias_on_cpu(to), alias_on_cpu(from)));
  if (reader != writer) submit_wait(reader, writer, writer->pushed);
  keep_for_graph(writer, from);
  keep_for_graph(writer, to);
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  check_denied("aten::copy_", "");
  TORCH_CHECK(at::is_expandable_to(from.sizes(), to.sizes()), "output with shape ", to.sizes(),
              " doesn't match the broadcast shape ", from.sizes());
  if (to.numel() == 0) return to;
  at::assert_no_internal_overlap(to);
  at::assert_no_partial_overlap(to, from);
  if (!on_sim(from)) {
    TORCH_CHECK_NOT_IMPLEMENTED(from.layout() == c10::kStrided && !from.is_quantized(),
                                device_name(), ": copy got a tensor of layout ", from.layout(),
                                (from.is_quantized() ? ", quantized" : ""),
                                "; expected a plain strided one. Convert it on the CPU first.");
    host_to_device(from, to, non_blocking);
  } else if (!on_sim(to)) {
    device_to_host(from, to, non_blocking);
  } else {
    device_to_device(from, to);
  }
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

c10::Scalar local_scalar_dense(const Tensor& tensor) {
  Queue* queue = current_queue(tensor.device().index());
  refuse_while_capturing(queue,
                         "called aten::_local_scalar_dense (item), which reads a value on "
                         "the host");
  synchronize(queue, "read a value on the host");
  return alias_on_cpu(tensor).item();
}

const Tensor& resize(const Tensor& tensor, IntArrayRef sizes,
                     std::optional<c10::MemoryFormat> format) {
  TORCH_CHECK(format != c10::MemoryFormat::Preserve, "Unsupported memory format ",
              c10::MemoryFormat::Preserve);
  set_shape(tensor, sizes, {});
  if (format) {
    tensor.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  }
  return tensor;
}

Tensor& set_storage_offset(Tensor& tensor, c10::Storage storage, int64_t offset, IntArrayRef sizes,
                           IntArrayRef strides) {
  at::native::checkSetStorage(tensor, storage, offset, sizes, strides);
  tensor.unsafeGetTensorImpl()->set_storage_offset(offset);
  set_shape(tensor, sizes, strides);
  return tensor;
}

Tensor& set_storage(Tensor& tensor, c10::Storage storage) {
  const auto size = int64_t(storage.nbytes() / tensor.itemsize());
  return set_storage_offset(tensor, std::move(storage), 0, {size}, {});
}

Tensor& set_tensor(Tensor& tensor, const Tensor& source) {
  if (tensor.unsafeGetTensorImpl() == source.unsafeGetTensorImpl()) return tensor;
  return set_storage_offset(tensor, source.storage(), source.storage_offset(), source.sizes(),
                            source.strides());
}

Tensor& set_nothing(Tensor& tensor) {
  c10::Storage storage(c10::Storage::use_byte_size_t{}, 0, device_allocator(), true);
  storage.set_data_ptr_noswap({nullptr, tensor.device()});
  return set_storage_offset(tensor, std::move(storage), 0, {0}, {});
}

void record_stream(Tensor& tensor, c10::Stream stream) {
  device_allocator()->recordStream(tensor.storage().data_ptr(), stream);
}

// The CPU's kernel draws from the CPU's generator without being passed one.
std::tuple<Tensor, Tensor> native_dropout(const Tensor& input, double p,
                                          std::optional<bool> train) {
  if (!train.value_or(true)) {
    return {input.clone(), at::ones_like(input, input.options().dtype(at::kBool))};
  }
  const double scale = p == 1 ? 0 : 1 / (1 - p);
  auto mask = at::empty(input.sizes(), input.options().dtype(at::kBool)).bernoulli_(1 - p);
  return {input.mul(mask).mul_(scale), mask};
}

// Zeros with memory: those without are torch's private business with its own devices.
Tensor efficientzerotensor(IntArrayRef sizes, std::optional<c10::ScalarType> dtype,
                           std::optional<c10::Layout> layout, std::optional<c10::Device> device,
                           std::optional<bool> pinned) {
  return empty(sizes, dtype, layout, device, pinned, std::nullopt).zero_();
}

}  // namespace

void set_shape(const Tensor& tensor, IntArrayRef sizes, IntArrayRef strides) {
  auto* impl = tensor.unsafeGetTensorImpl();
  if (strides.data() ? impl->sizes() == sizes && impl->strides() == strides
                     : impl->sizes() == sizes) {
    return;
  }
  const auto offset = impl->storage_offset();
  const size_t bytes =
      strides.data() ? at::detail::computeStorageNbytes(sizes, strides, tensor.itemsize(), offset)
                     : at::detail::computeStorageNbytesContiguous(sizes, tensor.itemsize(), offset);
  if (c10::multiply_integers(sizes) > 0 && bytes > tensor.storage().nbytes()) {
    at::native::resize_bytes_nocuda(tensor.storage(), bytes);
  }
  if (strides.data()) {
    impl->set_sizes_and_strides(sizes, strides);
  } else {
    impl->set_sizes_contiguous(sizes);
  }
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage_storage_offset", &set_storage_offset);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("set_", &set_nothing);
  m.impl("record_stream", &record_stream);
  m.impl("_efficientzerotensor", &efficientzerotensor);
  m.impl("native_dropout", &native_dropout);
}

// Copies see conjugated and negated tensors as they are: materialising one would copy it first.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

}  // namespace sim
