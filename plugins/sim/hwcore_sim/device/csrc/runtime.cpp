#include "runtime.h"

#include <c10/core/DeviceType.h>
#include <c10/util/Exception.h>
#include <pthread.h>
#include <torch/csrc/Exceptions.h>

namespace sim {
namespace {

std::atomic<int> g_device_count{2};
std::atomic<bool> g_live{false};
std::atomic<bool> g_bad_fork{false};
thread_local DeviceIndex t_device = 0;

// Python's classes by ErrorKind; never released, for errors outlive the module.
PyObject* g_classes[4] = {nullptr, nullptr, nullptr, nullptr};

// torch turns this into the Python class wherever one of its own functions raises it.
struct NamedError : torch::PyTorchError {
  NamedError(ErrorKind kind, const std::string& message)
      : torch::PyTorchError(message), kind(kind) {}

  PyObject* python_type() override {
    PyObject* found = g_classes[static_cast<int>(kind)];
    return found ? found : PyExc_RuntimeError;
  }

  ErrorKind kind;
};

const bool g_fork_handler = [] {
  pthread_atfork(nullptr, nullptr, [] { g_bad_fork = g_live.load(); });
  return true;
}();

}  // namespace

void fail(ErrorKind kind, const std::string& message) { throw NamedError(kind, message); }

void set_error_class(int kind, PyObject* type) {
  Py_INCREF(type);
  g_classes[kind] = type;
}

std::string device_name() { return c10::get_privateuse1_backend(); }

std::string device_name(DeviceIndex index) { return c10::str(device_name(), ":", int(index)); }

DeviceIndex device_count() { return static_cast<DeviceIndex>(g_device_count.load()); }

void set_device_count(int count) { g_device_count = count; }

DeviceIndex current_device() { return t_device; }

void set_current_device(DeviceIndex index) { t_device = index; }

DeviceIndex exchange_device(DeviceIndex index) { return std::exchange(t_device, index); }

DeviceIndex checked(int64_t index, const char* where) {
  if (index == -1) return t_device;
  if (index < 0 || index >= device_count()) {
    fail(ErrorKind::Capability,
         c10::str(where, ": device index got ", index, "; expected 0 to ",
                  int(device_count()) - 1, ", for there are ", int(device_count()),
                  " simulated devices. Name one of them, or set HWCORE_SIM_DEVICES before the "
                  "process starts."));
  }
  return static_cast<DeviceIndex>(index);
}

bool in_bad_fork() { return g_bad_fork; }

bool is_live() { return g_live; }

void use_device(const char* where) {
  if (g_bad_fork) {
    fail(ErrorKind::Fork,
         c10::str(where, ": this process was forked from one that had used the device `",
                  device_name(),
                  "`; expected a process of its own. Start it with the multiprocessing start "
                  "method `spawn`."));
  }
  if (!g_live) g_live = true;
}

GilRelease::GilRelease() : state_(nullptr) {
  if (Py_IsInitialized() && PyGILState_Check()) state_ = PyEval_SaveThread();
}

GilRelease::~GilRelease() {
  if (state_) PyEval_RestoreThread(state_);
}

}  // namespace sim
