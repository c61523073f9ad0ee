// What torch's generic streams, events and device contexts call.
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "allocator.h"
#include "graph.h"
#include "streams.h"

namespace sim {
namespace {

struct Guard final : c10::impl::DeviceGuardImplInterface {
  using Device = c10::Device;
  using Stream = c10::Stream;

  c10::DeviceType type() const override { return kSim; }

  Device exchangeDevice(Device device) const override {
    return {kSim, exchange_device(checked(device.index(), "device"))};
  }
  Device getDevice() const override { return {kSim, current_device()}; }
  void setDevice(Device device) const override {
    set_current_device(checked(device.index(), "device"));
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0 && device.index() < device_count()) set_current_device(device.index());
  }
  c10::DeviceCapability getDeviceCapability(Device) const override { return {}; }
  DeviceIndex deviceCount() const noexcept override { return device_count(); }

  Stream getStream(Device device) const override {
    const DeviceIndex index = checked(device.index(), "current_stream");
    return stream(index, current_queue_id(index));
  }
  Stream getDefaultStream(Device device) const override {
    return stream(checked(device.index(), "default_stream"), 0);
  }
  Stream getStreamFromGlobalPool(Device device, bool high_priority) const override {
    return getNewStream(device, high_priority ? -1 : 0);
  }
  Stream getNewStream(Device device, int priority) const override {
    const DeviceIndex index = checked(device.index(), "Stream");
    return stream(index, new_queue(index, priority)->id);
  }
  Stream exchangeStream(Stream next) const override {
    const DeviceIndex index = checked(next.device_index(), "set_stream");
    return stream(index, exchange_current_queue(index, next.id()));
  }
  void* getStreamNativeHandle(const Stream one) const override { return queue_of(one); }

  bool queryStream(const Stream& one) const override { return query(queue_of(one)); }
  void synchronizeStream(const Stream& one) const override {
    synchronize(queue_of(one), "called Stream.synchronize");
  }
  void synchronizeDevice(const DeviceIndex index) const override {
    synchronize_device(checked(index, "synchronize"), "called synchronize");
  }
  bool isStreamCapturing(const Stream& one) const override { return is_capturing(queue_of(one)); }

  void destroyEvent(void* event, const DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  void record(void** event, const Stream& one, const DeviceIndex device,
              const c10::EventFlag flag) const override {
    Queue* queue = queue_of(one);
    if (device >= 0 && device != queue->device) {
      fail(ErrorKind::Capability,
           c10::str("Event.record: stream got ", name_of(*queue), "; expected one of ",
                    device_name(device),
                    ", the event's device. Create the event for the stream's "
                    "device."));
    }
    if (!*event) *event = new Event;
    sim::record(*static_cast<Event*>(*event), queue, flag == c10::EventFlag::BACKEND_DEFAULT);
  }
  void block(void* event, const Stream& one) const override {
    if (event) wait(*static_cast<Event*>(event), queue_of(one));
  }
  bool queryEvent(void* event) const override {
    return !event || query(*static_cast<Event*>(event));
  }
  void synchronizeEvent(void* event) const override {
    if (event) synchronize(*static_cast<Event*>(event));
  }
  double elapsedTime(void* start, void* end, const DeviceIndex) const override {
    Event never;
    return elapsed_ms(start ? *static_cast<Event*>(start) : never,
                      end ? *static_cast<Event*>(end) : never);
  }

  void recordDataPtrOnStream(const c10::DataPtr& data, const Stream& one) const override {
    device_allocator()->recordStream(data, one);
  }

 private:
  static Stream stream(DeviceIndex device, int64_t id) {
    return Stream(Stream::UNSAFE, Device(kSim, device), id);
  }
  static Queue* queue_of(const Stream& one) { return find_queue(one.device_index(), one.id()); }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

}  // namespace
}  // namespace sim
