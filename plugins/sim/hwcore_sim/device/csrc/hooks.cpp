#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/Storage.h>
#include <c10/util/Exception.h>

#include <array>
#include <cstring>
#include <mutex>

#include "allocator.h"
#include "generator.h"
#include "graph.h"

namespace sim {

Generator::Generator(DeviceIndex device)
    : c10::GeneratorImpl(c10::Device(kSim, device),
                         c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
      engine(at::detail::createCPUGenerator()) {}

void Generator::set_current_seed(uint64_t seed) { engine.set_current_seed(seed); }

uint64_t Generator::current_seed() const { return engine.current_seed(); }

uint64_t Generator::seed() { return engine.seed(); }

// The engine has a state rather than an offset, but pickling asks for one.
void Generator::set_offset(uint64_t offset) {
  if (offset == 0) return;
  fail(ErrorKind::Capability,
       c10::str("Generator.set_offset: offset got ", offset,
                "; expected 0, for this generator has a state instead. Call set_state."));
}

uint64_t Generator::get_offset() const { return 0; }

void Generator::set_state(const c10::TensorImpl& state) {
  engine.unsafeGetGeneratorImpl()->set_state(state);
}

c10::intrusive_ptr<c10::TensorImpl> Generator::get_state() const {
  return engine.unsafeGetGeneratorImpl()->get_state();
}

Generator* Generator::clone_impl() const {
  auto* copy = new Generator(device_.index());
  copy->engine = engine.clone();
  return copy;
}

const at::Generator& default_generator(int64_t index) {
  const DeviceIndex device = checked(index, "default_generator");
  static std::mutex mutex;
  static auto* const generators = new std::array<at::Generator, kMaxDevices>;
  std::lock_guard<std::mutex> lock(mutex);
  auto& generator = (*generators)[device];
  if (!generator.defined()) {
    generator = at::make_generator<Generator>(device);
    generator.seed();
  }
  return generator;
}

Generator* as_ours(const at::Generator& generator) {
  TORCH_CHECK(generator.device().type() == kSim, "Expected a '", device_name(),
              "' device type for generator but found '", generator.device().type(), "'");
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl());
}

namespace {

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return is_live(); }
  void init() const override { use_device("init"); }

  DeviceIndex deviceCount() const override { return device_count(); }
  DeviceIndex getCurrentDevice() const override { return current_device(); }
  void setCurrentDevice(DeviceIndex index) const override {
    set_current_device(checked(index, "set_device"));
  }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    return exchange_device(checked(index, "set_device"));
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override {
    return index < 0 ? current_device() : exchangeDevice(index);
  }
  c10::Device getDeviceFromPtr(void* data) const override {
    const DeviceIndex index = device_of(data);
    return {kSim, index < 0 ? current_device() : index};
  }

  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }

  const at::Generator& getDefaultGenerator(DeviceIndex index) const override {
    return default_generator(index);
  }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<Generator>(checked(index, "Generator"));
  }

  // A new block, into which the old bytes are copied in the order of the current stream.
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    const DeviceIndex before = exchange_device(storage.device().index());
    try {
      auto data = device_allocator()->allocate(bytes);
      auto kept = std::min(bytes, storage.nbytes());
      if (Graph* graph = current_queue(current_device())->capture) graph->keep(storage);
      if (kept) device_allocator()->copy_data(data.get(), storage.data(), kept);
      // The old block goes back to its own stream, which may be another than that of the copy.
      device_allocator()->recordStream(storage.data_ptr(),
                                       c10::Stream(c10::Stream::UNSAFE, storage.device(),
                                                   current_queue_id(storage.device().index())));
      storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
      storage.unsafeGetStorageImpl()->set_nbytes(bytes);
    } catch (...) {
      set_current_device(before);
      throw;
    }
    set_current_device(before);
  }
};

}  // namespace

void register_hooks() {
  static auto* const hooks = new Hooks;
  at::RegisterPrivateUse1HooksInterface(hooks);
  c10::SetAllocator(kSim, device_allocator());
  at::setHostAllocator(kSim, pinned_allocator());
}

}  // namespace sim
