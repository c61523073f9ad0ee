// Page-locked host memory: ordinary memory that torch is told is pinned, so that copies from and
// to it are left in the queue and touch it only when they run.
#include <ATen/core/CachingHostAllocator.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "allocator.h"

namespace sim {
namespace {

constexpr size_t kSmallest = 512;

struct PinnedBlock {
  void* data;
  size_t bytes;
  bool live = true;
  std::vector<std::pair<Queue*, uint64_t>> uses;  // copies: where they are queued
};

struct Pinned {
  std::mutex mutex;
  PinnedReuse reuse = PinnedReuse::Safe;
  // Given back to the system on request alone, and not while a queued copy needs the memory.
  std::map<const char*, PinnedBlock*> blocks;
  std::map<size_t, std::vector<PinnedBlock*>> free;
};

Pinned& pinned() {
  static Pinned* const instance = new Pinned;
  return *instance;
}

using Lock = std::unique_lock<std::mutex>;

bool in_use(PinnedBlock& block) {
  auto& uses = block.uses;
  uses.erase(std::remove_if(uses.begin(), uses.end(),
                            [](const auto& use) { return use.first->done >= use.second; }),
             uses.end());
  return !uses.empty();
}

void free_pinned(void* context) {
  if (in_bad_fork()) return;
  auto* block = static_cast<PinnedBlock*>(context);
  Lock lock(pinned().mutex);
  block->live = false;
  pinned().free[block->bytes].push_back(block);
}

// A new owner's memory: a copy to the host that nobody waits for leaves it as it is here, not as
// the same copy left it before.
c10::DataPtr handed_out(PinnedBlock* block) {
  memset(block->data, 0xDD, block->bytes);
  return {block->data, block, &free_pinned, c10::Device(c10::DeviceType::CPU)};
}

void free_no_pin(void*) {}

struct PinnedAllocator final : at::HostAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    use_device("pin_memory");
    const c10::Device host(c10::DeviceType::CPU);
    if (bytes == 0) return {nullptr, nullptr, &free_no_pin, host};
    size_t size = kSmallest;  // powers of two, as device runtimes have it
    while (size < bytes && size < (size_t(1) << 62)) size *= 2;
    Lock lock(pinned().mutex);
    auto& candidates = pinned().free[size];
    for (size_t i = candidates.size(); i-- > 0;) {
      PinnedBlock* block = candidates[i];
      if (pinned().reuse == PinnedReuse::Safe && in_use(*block)) continue;
      candidates.erase(candidates.begin() + i);
      block->live = true;
      return handed_out(block);
    }
    void* data = nullptr;
    TORCH_CHECK_WITH(OutOfMemoryError, posix_memalign(&data, 64, size) == 0,
                     "pin_memory: allocate got ", bytes,
                     " bytes; expected as much as the host has. Pin less.");
    auto* block = new PinnedBlock{data, size};
    pinned().blocks[static_cast<char*>(data)] = block;
    return handed_out(block);
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    memcpy(to, from, bytes);
  }

  bool record_event(void* data, void*, c10::Stream stream) override {
    use_pinned(data, find_queue(stream.device_index(), stream.id()));
    return true;
  }

  void empty_cache() override {
    Lock lock(pinned().mutex);
    for (auto& [bytes, candidates] : pinned().free) {
      std::vector<PinnedBlock*> kept;
      for (PinnedBlock* block : candidates) {
        if (in_use(*block)) {
          kept.push_back(block);
          continue;
        }
        pinned().blocks.erase(static_cast<char*>(block->data));
        free(block->data);
        delete block;
      }
      candidates = std::move(kept);
    }
  }

  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};

// With the lock held.
PinnedBlock* find(const void* data) {
  const auto* address = static_cast<const char*>(data);
  auto after = pinned().blocks.upper_bound(address);
  if (after == pinned().blocks.begin()) return nullptr;
  auto [start, block] = *std::prev(after);
  return block->live && address < start + block->bytes ? block : nullptr;
}

}  // namespace

at::HostAllocator* pinned_allocator() {
  static auto* const instance = new PinnedAllocator;
  return instance;
}

void set_pinned_reuse(PinnedReuse reuse) {
  Lock lock(pinned().mutex);
  pinned().reuse = reuse;
}

PinnedReuse pinned_reuse() {
  Lock lock(pinned().mutex);
  return pinned().reuse;
}

bool is_pinned(const void* data) {
  if (in_bad_fork()) return false;
  Lock lock(pinned().mutex);
  return find(data) != nullptr;
}

void use_pinned(const void* data, Queue* queue) {
  Lock lock(pinned().mutex);
  PinnedBlock* block = find(data);
  if (!block) return;
  for (auto& use : block->uses) {
    if (use.first == queue) {
      use.second = queue->pushed;
      return;
    }
  }
  block->uses.emplace_back(queue, queue->pushed);
}

}  // namespace sim
