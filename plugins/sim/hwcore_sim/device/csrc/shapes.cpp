#include "shapes.h"

#include <ATen/EmptyTensor.h>
#include <ATen/MemoryOverlap.h>
#include <c10/core/DefaultDtype.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>
#include <mutex>
#include <set>
#include <unordered_map>

#include "neutral.h"
#include "operator_info.h"
#include "tensors.h"

namespace sim {
namespace {

// Operators whose metadata function and CPU kernel disagree about the shape, strides or type of a
// result, where none of these depends on values: the kernel itself says them, run once on zeros.
const std::set<std::string> kAsOnCpu = {
    "aten::_batch_norm_impl_index",
    "aten::_batch_norm_no_update",
    "aten::_batch_norm_with_update",
    "aten::_native_batch_norm_legit",
    "aten::_native_batch_norm_legit_no_training",
    "aten::_fft_r2c",
    "aten::batch_norm_backward",
    "aten::convolution",
    "aten::convolution_backward",
    "aten::linalg_eig",
    "aten::native_batch_norm",
    "aten::native_batch_norm_backward",
    "aten::native_channel_shuffle",
    "aten::native_group_norm",
    "aten::native_group_norm_backward",
    "aten::native_layer_norm",
    "aten::native_layer_norm_backward",
    "aten::pixel_shuffle",
    "aten::pixel_unshuffle",
    "aten::roll",
};

// Operators whose metadata function is wrong, and whose results the values have a say in.
const std::set<std::string> kDisagreeing = {
    "aten::_embedding_bag",
    "aten::_embedding_bag_forward_only",
    "aten::quantize_per_channel",
    "aten::quantize_per_tensor",
    "aten::quantize_per_tensor_dynamic",
};

constexpr size_t kRemembered = 1 << 14;

struct Memo {
  std::mutex mutex;
  std::unordered_map<std::string, std::shared_ptr<const Shapes>> entries;
};

Memo& memo() {
  static Memo* const instance = new Memo;
  return *instance;
}

template <class T>
void put(std::string& key, const T& value) {
  key.append(reinterpret_cast<const char*>(&value), sizeof value);
}

void put_list(std::string& key, c10::IntArrayRef values) {
  put(key, values.size());
  key.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(int64_t));
}

void put_tensor(std::string& key, const at::Tensor& tensor) {
  auto* impl = tensor.unsafeGetTensorImpl();
  key.push_back('T');
  key.push_back(char((on_sim(tensor) ? 1 : 0) | (impl->is_wrapped_number() ? 2 : 0) |
                     (tensor.is_conj() ? 4 : 0) | (tensor.is_neg() ? 8 : 0)));
  key.push_back(char(tensor.scalar_type()));
  put_list(key, impl->sizes());
  put_list(key, impl->strides());
}

// Append what the result's shape may depend on; false if that cannot be told.
bool put_value(std::string& key, const c10::IValue& value, bool value_only) {
  if (value.isTensor()) {
    if (!value.toTensor().defined()) {
      key.push_back('u');
    } else {
      put_tensor(key, value.toTensor());
    }
  } else if (value.isNone()) {
    key.push_back('n');
  } else if (value.isInt()) {
    key.push_back('i');
    if (!value_only) put(key, value.toInt());
  } else if (value.isBool()) {
    key.push_back(value.toBool() ? 't' : 'f');
  } else if (value.isDouble()) {
    key.push_back('d');
    if (!value_only) put(key, value.toDouble());
  } else if (value.isComplexDouble()) {
    key.push_back('c');
    if (!value_only) put(key, value.toComplexDouble());
  } else if (value.isIntList()) {
    key.push_back('I');
    put(key, value.toListRef().size());
    for (const auto& it : value.toListRef()) put(key, it.toInt());
  } else if (value.isString()) {
    key.push_back('s');
    put(key, value.toStringRef().size());
    key += value.toStringRef();
  } else if (value.isDevice()) {
    key.push_back('v');
  } else if (value.isGenerator()) {
    key.push_back('g');
  } else if (value.isList()) {
    key.push_back('[');
    const auto items = value.toListRef();
    put(key, items.size());
    for (const auto& it : items) {
      if (!put_value(key, it, value_only)) return false;
    }
  } else {
    return false;
  }
  return true;
}

int64_t first_byte(const at::Tensor& tensor) {
  return tensor.storage_offset() * int64_t(tensor.itemsize());
}

// Note which arguments share memory, and where.
void put_sharing(std::string& key, const Stack& arguments) {
  std::unordered_map<const c10::StorageImpl*, std::pair<size_t, int64_t>> seen;
  size_t count = 0;
  for (const auto& value : arguments) {
    for_each_tensor(value, [&](const at::Tensor& t) {
      const std::pair<size_t, int64_t> place{count++, first_byte(t)};
      const auto& [first, byte] =
          seen.emplace(t.storage().unsafeGetStorageImpl(), place).first->second;
      put(key, first);
      put(key, place.second - byte);
    });
  }
}

// Whether an argument that is written overlaps with itself or another: most kernels refuse some
// of that, and metadata functions do not look.
bool overlapping(const OperatorInfo& info, const Stack& arguments) {
  std::vector<at::Tensor> written, all;
  for (size_t i = 0; i < arguments.size(); ++i) {
    for_each_tensor(arguments[i], [&](const at::Tensor& t) {
      all.push_back(t);
      if (info.arguments[i].written) written.push_back(t);
    });
  }
  for (const auto& one : written) {
    if (at::has_internal_overlap(one) == at::MemOverlap::Yes) return true;
    size_t overlaps = 0;  // one of them with itself
    for (const auto& other : all) {
      overlaps += other.storage().is_alias_of(one.storage()) &&
                  at::get_overlap_status(one, other) != at::MemOverlapStatus::No;
    }
    if (overlaps > 1) return true;
  }
  return false;
}

at::Tensor with_bits(at::Tensor made, const at::Tensor& of) {
  auto* impl = made.unsafeGetTensorImpl();
  if (of.is_conj()) impl->_set_conj(true);
  if (of.is_neg()) impl->_set_neg(true);
  return made;
}

at::Tensor to_meta(const at::Tensor& tensor) {
  // Python's numbers stay as they are: metadata functions in Python cannot take them on `meta`.
  if (tensor.is_cpu() && tensor.unsafeGetTensorImpl()->is_wrapped_number()) return tensor;
  return with_bits(
      at::detail::empty_strided_meta(tensor.sizes(), tensor.strides(), tensor.scalar_type()),
      tensor);
}

// CPU tensors of zeros in the place of a call's, that overlap as those do.
class Zeros {
 public:
  explicit Zeros(const Stack& arguments) {
    for (const auto& value : arguments) {
      for_each_tensor(value, [&](const at::Tensor& t) {
        auto& block = blocks_[t.storage().unsafeGetStorageImpl()];
        const int64_t begin = first_byte(t) / kAlignment * kAlignment;
        const int64_t end = int64_t(at::detail::computeStorageNbytes(
            t.sizes(), t.strides(), t.itemsize(), t.storage_offset()));
        block.begin = std::min(block.begin, begin);
        block.end = std::max(block.end, end);
      });
    }
  }

  at::Tensor of(const at::Tensor& tensor) {
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) return tensor;
    auto& block = blocks_.at(tensor.storage().unsafeGetStorageImpl());
    if (!block.bytes.defined()) {
      const int64_t size = std::max<int64_t>(block.end - block.begin, 0);
      block.bytes = at::detail::empty_cpu({size}, at::kByte);
      block.bytes.zero_();
    }
    auto zeros = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(block.bytes.storage()), c10::DispatchKeySet(c10::DispatchKey::CPU),
        tensor.dtype());
    zeros.unsafeGetTensorImpl()->set_sizes_and_strides(
        tensor.sizes(), tensor.strides(),
        (first_byte(tensor) - block.begin) / int64_t(tensor.itemsize()));
    return with_bits(zeros, tensor);
  }

 private:
  static constexpr int64_t kAlignment = 64;  // of every type
  struct Block {
    int64_t begin = std::numeric_limits<int64_t>::max(), end = 0;
    at::Tensor bytes;
  };
  std::unordered_map<const c10::StorageImpl*, Block> blocks_;
};

std::vector<at::Tensor> tensors_in(const c10::IValue& value) {
  std::vector<at::Tensor> found;
  for_each_tensor(value, [&](const at::Tensor& t) { found.push_back(t); });
  return found;
}

Shapes infer(const c10::OperatorHandle& op, const OperatorInfo& info, const Stack& arguments,
             bool overlap) {
  Shapes shapes;
  const bool on_cpu = overlap || kAsOnCpu.count(info.name) > 0;
  Zeros zeros(on_cpu ? arguments : Stack());
  shapes.overlap = overlap;
  Neutral neutral;
  Silent silent;
  Stack stack;
  for (const auto& value : arguments) {
    if (value.isDevice()) {
      stack.emplace_back(c10::Device(on_cpu ? c10::DeviceType::CPU : c10::DeviceType::Meta));
    } else if (value.isGenerator()) {
      stack.emplace_back();
    } else {
      stack.push_back(map_tensors(
          value, [&](const at::Tensor& t) { return on_cpu ? zeros.of(t) : to_meta(t); }));
    }
  }
  const Stack inputs = stack;
  try {
    op.callBoxed(&stack);
  } catch (const c10::NotImplementedError&) {
    shapes.why = "has no metadata function for these arguments";
    return shapes;
  } catch (const std::exception&) {
    // Bad arguments, for which the CPU's kernel has the better words, or a function that needs
    // values.
    shapes.why = "has no metadata function for these arguments";
    shapes.passing = true;
    return shapes;
  }
  for (auto& it : stack) {
    shapes.returns.push_back(on_cpu ? map_tensors(it, to_meta) : std::move(it));
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!info.arguments[i].written) continue;
    const auto before = tensors_in(arguments[i]);
    const auto after = tensors_in(inputs[i]);
    for (size_t k = 0; k < before.size(); ++k) {
      if (before[k].sizes() == after[k].sizes() &&
          (after[k].numel() == 0 || before[k].strides() == after[k].strides())) {
        continue;
      }
      shapes.reshaped.push_back({i, k, after[k].sizes().vec(), after[k].strides().vec()});
    }
  }
  shapes.known = true;
  return shapes;
}

Shapes unknown(const char* why) {
  Shapes shapes;
  shapes.why = why;
  return shapes;
}

bool has_mask(const OperatorInfo& info, const Stack& arguments) {
  bool found = false;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (!info.arguments[i].is_index) continue;
    for_each_tensor(arguments[i], [&](const at::Tensor& t) {
      found |= t.scalar_type() == at::kBool || t.scalar_type() == at::kByte;
    });
  }
  return found;
}

}  // namespace

std::shared_ptr<const Shapes> shapes_of(const c10::OperatorHandle& op, const Stack& arguments) {
  const auto known = info_of(op);
  const OperatorInfo& info = *known;
  if (info.reads_host) {
    static const auto value = std::make_shared<const Shapes>(unknown("reads a value on the host"));
    return value;
  }
  if (info.dynamic || has_mask(info, arguments)) {
    static const auto value =
        std::make_shared<const Shapes>(unknown("makes a shape that depends on values"));
    return value;
  }
  if (kDisagreeing.count(info.name)) {
    static const auto value =
        std::make_shared<const Shapes>(unknown("makes a shape that only running it tells"));
    return value;
  }
  thread_local std::string key;
  key.clear();
  put(key, &op.schema());
  key.push_back(char(c10::get_default_dtype_as_scalartype()));
  bool told = info.permanent;
  for (size_t i = 0; i < arguments.size() && told; ++i) {
    told = put_value(key, arguments[i], info.arguments[i].value_only);
  }
  const bool overlap = info.generator < 0 && overlapping(info, arguments);
  if (overlap) {
    key.push_back('o');
    put_sharing(key, arguments);
  }
  if (!told) return std::make_shared<const Shapes>(infer(op, info, arguments, overlap));
  {
    std::lock_guard<std::mutex> lock(memo().mutex);
    auto found = memo().entries.find(key);
    if (found != memo().entries.end()) return found->second;
  }
  const std::string mine = key;  // inference may come here again
  auto shapes = std::make_shared<const Shapes>(infer(op, info, arguments, overlap));
  if (shapes->passing) return shapes;
  std::lock_guard<std::mutex> lock(memo().mutex);
  if (memo().entries.size() >= kRemembered) memo().entries.clear();
  memo().entries[mine] = shapes;
  return shapes;
}

}  // namespace sim
