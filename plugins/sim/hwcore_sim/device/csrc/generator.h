// The device's random number generator: a generator of its own type around the CPU's engine.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Generator.h>

#include "common.h"

namespace sim {

// Numbers are drawn in order of submission, not of execution: whoever submits random work takes
// the state it will draw from with it. Equal seeds give the CPU's numbers.
struct Generator final : c10::GeneratorImpl {
  explicit Generator(DeviceIndex device);

  void set_current_seed(uint64_t seed) override;
  uint64_t current_seed() const override;
  uint64_t seed() override;
  void set_offset(uint64_t offset) override;
  uint64_t get_offset() const override;
  void set_state(const c10::TensorImpl& state) override;
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override;

  at::Generator engine;  // a CPU generator

 private:
  Generator* clone_impl() const override;
};

const at::Generator& default_generator(int64_t index);

// Return `generator` as ours; raise torch's usual error for one of another device type.
Generator* as_ours(const at::Generator& generator);

void register_hooks();

}  // namespace sim
