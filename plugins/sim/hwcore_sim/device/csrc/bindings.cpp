// What Python sees: the functions behind hwcore_sim.device and the torch.<name> module.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "allocator.h"
#include "fallback.h"
#include "generator.h"
#include "graph.h"
#include "runtime.h"
#include "streams.h"
#include "tensors.h"

namespace py = pybind11;

namespace sim {
namespace {

Drain drain_of(const std::string& policy) {
  return policy == "eager" ? Drain::Eager : policy == "random" ? Drain::Random : Drain::Lazy;
}

void bind_device(py::module_& m) {
  m.def("set_error_class", [](int kind, py::object type) { set_error_class(kind, type.ptr()); });
  m.def("set_device_count", &set_device_count);
  m.def("device_count", [] { return int(device_count()); });
  m.def("current_device", [] { return int(current_device()); });
  m.def("set_device", [](int index) { set_current_device(checked(index, "set_device")); });
  m.def("is_live", &is_live);
  m.def("in_bad_fork", &in_bad_fork);
  m.def("reset", [](int index) { reset_device(checked(index, "reset")); });
  m.def("default_generator", &default_generator);
}

void bind_streams(py::module_& m) {
  m.def("set_policy", [](const std::string& policy, uint64_t seed) {
    set_policy(drain_of(policy), seed);
    if (policy == "eager") drain_all();
  });
  m.def("set_stream_policy", [](int device, int64_t stream, std::optional<std::string> policy) {
    Queue* queue = find_queue(device, stream);
    set_queue_policy(queue, policy ? std::optional(drain_of(*policy)) : std::nullopt);
    if (policy == "eager") drain(queue, queue->pushed);
  });
  m.def("stream_policy", [](int device, int64_t stream) {
    switch (policy_of(find_queue(device, stream))) {
      case Drain::Eager:
        return "eager";
      case Drain::Random:
        return "random";
      default:
        return "lazy";
    }
  });
  m.def("begin_wait_watch", &begin_wait_watch);
  m.def("end_wait_watch", &end_wait_watch);
  m.def("pending", [] { return pending(nullptr); });
  m.def("stream_pending", [](int device, int64_t stream) {
    return pending(find_queue(device, stream));
  });
  m.def("stream_priority", [](int device, int64_t stream) {
    return find_queue(device, stream)->priority;
  });
  m.def("launch", [](int device, int64_t stream, py::function fn) {
    struct HostFunction final : Work {
      py::function fn;
      void run() override {
        py::gil_scoped_acquire gil;
        c10::InferenceMode as_the_host(false);
        fn();
      }
      ~HostFunction() override {
        py::gil_scoped_acquire gil;
        fn = py::function();
      }
      std::string name() const override { return "a host function"; }
    };
    auto work = std::make_shared<HostFunction>();
    work->fn = std::move(fn);
    submit(find_queue(device, stream), std::move(work));
  });
}

void bind_memory(py::module_& m) {
  m.def("set_capacity", [](int device, size_t bytes) {
    set_capacity(checked(device, "set_memory_capacity"), bytes);
  });
  m.def("memory_info", [](int device) {
    return device_allocator()->getMemoryInfo(checked(device, "mem_get_info"));
  });
  m.def("set_pinned_reuse",
        [](bool early) { set_pinned_reuse(early ? PinnedReuse::Early : PinnedReuse::Safe); });
  m.def("pinned_reuse_is_early", [] { return pinned_reuse() == PinnedReuse::Early; });
  m.def("peek", &peek);
}

void bind_operators(py::module_& m) {
  m.def("deny", &deny);
  m.def("allow", &allow);
  m.def("denied_ops", &denied_ops);
}

void bind_graphs(py::module_& m) {
  py::class_<Pool, std::shared_ptr<Pool>>(m, "Pool").def(py::init<>());
  py::class_<Graph, std::shared_ptr<Graph>>(m, "Graph")
      .def(py::init<std::shared_ptr<Pool>>())
      .def("begin", [](Graph& graph, int device,
                       int64_t stream) { graph.begin(find_queue(device, stream)); })
      .def("end", &Graph::end)
      .def("abort", &Graph::abort)
      .def("replay",
           [](Graph& graph) {
             GilRelease release;
             graph.replay(current_queue(current_device()));
           })
      .def("close", &Graph::close)
      .def_readonly("fault", &Graph::fault);
  // A device that nobody has used captures nothing, and asking must not bring it to life.
  m.def("is_capturing", [] { return is_live() && is_capturing(current_queue(current_device())); });
  m.def("capture_stream_limit", &capture_stream_limit);
  m.def("set_capture_stream_limit", &set_capture_stream_limit);
  m.def("capture_streams_left", &capture_streams_left);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  // torch's own translation is not for extensions to call.
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (torch::PyTorchError& e) {
      PyErr_SetString(e.python_type(), e.what());
    } catch (const c10::OutOfMemoryError& e) {
      py::set_error(py::module_::import("torch").attr("OutOfMemoryError"),
                    e.what_without_backtrace());
    } catch (const c10::Error& e) {
      PyErr_SetString(PyExc_RuntimeError, e.what_without_backtrace());
    }
  });
  register_hooks();
  bind_device(m);
  bind_streams(m);
  bind_memory(m);
  bind_operators(m);
  bind_graphs(m);
}

}  // namespace sim
