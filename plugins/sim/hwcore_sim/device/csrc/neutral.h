// A thread's dispatch state with everything off that the user may have switched on.
#pragma once

#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>

namespace sim {

// Queued work must not see what the thread that happens to run it has switched on: autograd,
// autocast, dispatch modes. Nor may metadata functions at submission.
struct Neutral {
  c10::InferenceMode inference;
  c10::impl::ForceDispatchKeyGuard keys{without_modes()};

  static c10::impl::LocalDispatchKeySet without_modes() {
    auto local = c10::impl::tls_local_dispatch_key_set();
    static const c10::DispatchKeySet kModes =
        c10::autocast_dispatch_keyset |
        c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot,
                             c10::DispatchKey::PythonDispatcher, c10::DispatchKey::Functionalize,
                             c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
                             c10::DispatchKey::FuncTorchDynamicLayerBackMode,
                             c10::DispatchKey::FuncTorchBatched});
    local.included_ = local.included_ - kModes;
    local.excluded_ = local.excluded_ | kModes;
    return local;
  }
};

// Drops warnings: of metadata functions, for they come once, when the operator runs.
struct Silent {
  struct Handler : c10::WarningHandler {
    void process(const c10::Warning&) override {}
  };
  Handler handler;
  c10::WarningUtils::WarningHandlerGuard guard{&handler};
};

}  // namespace sim
