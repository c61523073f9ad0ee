// The part of common.h that only the bindings need, for it drags Python's headers along.
#pragma once

#include <torch/csrc/python_headers.h>

#include "common.h"

namespace sim {

// Say which Python class an ErrorKind is raised as.
void set_error_class(int kind, PyObject* type);

}  // namespace sim
