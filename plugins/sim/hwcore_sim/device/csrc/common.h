// What every part of the simulated device shares: its errors, its devices, forks and the GIL.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/DeviceType.h>
#include <c10/util/StringUtil.h>

#include <atomic>
#include <cstdint>
#include <string>

struct _ts;  // PyThreadState, so that only runtime.cpp needs Python's headers

namespace sim {

using c10::DeviceIndex;

constexpr auto kSim = c10::DeviceType::PrivateUse1;
constexpr int kMaxDevices = 64;

// --- Errors: raised in Python as hwcore's own classes --------------------------------------------

enum class ErrorKind { Argument, Capability, Capture, Fork };

[[noreturn]] void fail(ErrorKind kind, const std::string& message);

// The name under which torch knows the device: "sim", or what HWCORE_SIM_NAME says.
std::string device_name();
std::string device_name(DeviceIndex index);

// --- Devices -------------------------------------------------------------------------------------

DeviceIndex device_count();
void set_device_count(int count);

// The calling thread's current device; a new thread starts with 0.
DeviceIndex current_device();
void set_current_device(DeviceIndex index);
DeviceIndex exchange_device(DeviceIndex index);

// Return `index`, or the current device for -1; raise for one that does not exist.
DeviceIndex checked(int64_t index, const char* where);

// --- Life of the process -------------------------------------------------------------------------

// Whether this process was forked from one that had used the device. Its queues and locks are
// copies that no thread will ever work on again.
bool in_bad_fork();

// Whether the device was used: from then on a fork cannot use it.
bool is_live();

// Raise in a bad fork; note that the device is in use.
void use_device(const char* where);

// Gives the GIL back for as long as this object lives, if the calling thread holds it. Queued work
// may run Python kernels, so a thread that runs it, or waits for one that does, must not hold it.
class GilRelease {
 public:
  GilRelease();
  ~GilRelease();
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

 private:
  struct _ts* state_;
};

}  // namespace sim
