#include "allocator.h"

#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <tuple>

#include "graph.h"

namespace sim {
namespace {

constexpr size_t kGranularity = 512;
constexpr size_t kMapped = size_t(1) << 20;  // from here on segments are mapped, not malloc'ed
// Up to here memory is poisoned before its first use as well; beyond, the pages stay untouched.
constexpr size_t kPoisonFresh = size_t(16) << 20;
// More than this in cached blocks, and the next new segment tries to give them back first.
constexpr size_t kCacheLimit = size_t(256) << 20;

struct Block {
  void* data;
  size_t bytes;
  size_t requested;
  DeviceIndex device;
  Queue* home;
  std::vector<Queue*> users;  // other streams, by record_stream
  std::shared_ptr<Pool> pool;
  uint64_t freed_at = 0;  // sequence number: what was submitted later cannot know the block
  size_t holds = 0;       // by graphs whose captured work has the address
  bool retired = false;   // free, but for the holds
};

// Free blocks are found by owner, stream and size. `home` is nullptr in a pool at rest.
using FreeKey = std::tuple<Pool*, Queue*, size_t>;

struct Deferred {
  Block* block;
  std::vector<std::pair<Queue*, uint64_t>> waits;
};

struct DeviceMemory {
  size_t capacity = size_t(4) << 30;
  size_t reserved = 0;
  size_t cached = 0;
  std::map<FreeKey, std::vector<Block*>> free;
  std::vector<Deferred> deferred;
  uint64_t looked_at = 0;  // progress() when `deferred` was last searched
  c10::CachingDeviceAllocator::DeviceStats stats;
};

struct Memory {
  std::mutex mutex;  // taken before the state mutex of streams.cpp, never after
  std::array<DeviceMemory, kMaxDevices> devices;
  std::map<const char*, Block*> segments;  // every block there is, by address
};

Memory& memory() {
  static Memory* const instance = new Memory;
  return *instance;
}

using Lock = std::unique_lock<std::mutex>;

size_t rounded(size_t bytes) { return (bytes + kGranularity - 1) / kGranularity * kGranularity; }

void* take_segment(size_t bytes) {
  void* data = nullptr;
  if (bytes >= kMapped) {
    data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return nullptr;
  } else if (posix_memalign(&data, 64, bytes)) {
    return nullptr;
  }
  if (bytes <= kPoisonFresh) memset(data, 0xDD, bytes);
  return data;
}

void give_segment(void* data, size_t bytes) {
  if (bytes >= kMapped) {
    munmap(data, bytes);
  } else {
    free(data);
  }
}

void add(c10::CachingAllocator::StatArray& stat, int64_t amount) {
  auto& total = stat[0];
  if (amount >= 0) {
    total.increase(amount);
  } else {
    total.decrease(-amount);
  }
}

// Owns pool blocks that nobody may have before the capture is over.
Queue* nobody() {
  static Queue* const queue = new Queue(0, -1, 0);
  return queue;
}

// With the lock held: put a block where the next allocation finds it.
void put(Block* block, Queue* home) {
  DeviceMemory& device = memory().devices[block->device];
  block->freed_at = next_sequence();
  block->users.clear();
  device.cached += block->bytes;
  device.free[{block->pool.get(), home, block->bytes}].push_back(block);
}

void retire(Block* block) {
  if (block->home->stale) block->home = default_queue(block->device);
  submit_poison(block->home, block->data, block->bytes);
  block->pool = nullptr;
  block->retired = block->holds > 0;
  if (!block->retired) put(block, block->home);
}

void release_hold(Block* block) {
  if (in_bad_fork()) return;
  Lock lock(memory().mutex);
  if (--block->holds == 0 && std::exchange(block->retired, false)) retire(block);
}

void retire_deferred(DeviceMemory& device) {
  const uint64_t now = progress();
  if (device.deferred.empty() || device.looked_at == now) return;
  device.looked_at = now;
  std::vector<Deferred> still;
  for (auto& it : device.deferred) {
    bool waiting = false;
    for (auto& [queue, position] : it.waits) waiting |= queue->done < position;
    if (waiting) {
      still.push_back(std::move(it));
    } else {
      retire(it.block);
    }
  }
  device.deferred = std::move(still);
}

Block* take_free(DeviceMemory& device, Pool* pool, Queue* home, size_t bytes) {
  // A block somewhat too large will do: sizes that drift must not each have their own.
  auto found = device.free.lower_bound({pool, home, bytes});
  while (found != device.free.end() && found->second.empty()) found = device.free.erase(found);
  if (found == device.free.end()) return nullptr;
  const auto& [its_pool, its_home, its_bytes] = found->first;
  if (its_pool != pool || its_home != home || its_bytes > bytes + bytes / 4) return nullptr;
  Block* block = found->second.back();
  found->second.pop_back();
  device.cached -= block->bytes;
  return block;
}

void release_cached_locked(DeviceMemory& device) {
  const uint64_t oldest = oldest_pending();
  for (auto it = device.free.begin(); it != device.free.end();) {
    if (std::get<0>(it->first) != nullptr) {  // a graph's
      ++it;
      continue;
    }
    std::vector<Block*> kept;
    for (Block* block : it->second) {
      // Older work may hold the address, rightly or not: a missing record_stream must give a
      // wrong value, never a crash.
      if (block->freed_at > oldest) {
        kept.push_back(block);
        continue;
      }
      memory().segments.erase(static_cast<char*>(block->data));
      give_segment(block->data, block->bytes);
      device.cached -= block->bytes;
      device.reserved -= block->bytes;
      add(device.stats.reserved_bytes, -int64_t(block->bytes));
      add(device.stats.segment, -1);
      ++device.stats.num_device_free;
      delete block;
    }
    it->second = std::move(kept);
    it = it->second.empty() ? device.free.erase(it) : std::next(it);
  }
}

std::string human(size_t bytes) {
  char text[32];
  if (bytes >= size_t(1) << 30) {
    snprintf(text, sizeof text, "%.2f GiB", double(bytes) / (1 << 30));
  } else {
    snprintf(text, sizeof text, "%.2f MiB", double(bytes) / (1 << 20));
  }
  return text;
}

// With the lock held, which it gives up while queued work runs to make memory free.
Block* new_segment(Lock& lock, DeviceIndex index, size_t bytes) {
  DeviceMemory& device = memory().devices[index];
  const auto fits = [&] {
    return bytes <= device.capacity - std::min(device.capacity, device.reserved);
  };
  if (device.cached > kCacheLimit) release_cached_locked(device);
  if (!fits() && bytes <= device.capacity) {
    ++device.stats.num_alloc_retries;
    release_cached_locked(device);
    // Work that is queued cannot run within work, whose stream it may wait for.
    if (!fits() && !capturing_here() && !Execution::mine()) {
      lock.unlock();
      drain_all();
      lock.lock();
      retire_deferred(device);
      release_cached_locked(device);
    }
  }
  void* data = fits() ? take_segment(bytes) : nullptr;
  if (data == nullptr) {
    ++device.stats.num_ooms;
    const size_t used = device.reserved;
    const size_t capacity = device.capacity;
    lock.unlock();
    TORCH_CHECK_WITH(OutOfMemoryError, false, device_name(), " out of memory: allocate got ",
                     human(bytes), " on ", device_name(index), "; expected at most ",
                     human(capacity - std::min(capacity, used)), ", free of ", human(capacity),
                     ". Free tensors, or set HWCORE_SIM_MEMORY.");
  }
  auto* block = new Block{data, bytes, 0, index, nullptr, {}, nullptr, 0};
  memory().segments[static_cast<char*>(data)] = block;
  device.reserved += bytes;
  add(device.stats.reserved_bytes, int64_t(bytes));
  add(device.stats.segment, 1);
  ++device.stats.num_device_alloc;
  return block;
}

void free_block(void* context) {
  // In a forked child another thread may have held the lock for ever; leak instead.
  if (in_bad_fork()) return;
  auto* block = static_cast<Block*>(context);
  Lock lock(memory().mutex);
  DeviceMemory& device = memory().devices[block->device];
  add(device.stats.allocation, -1);
  add(device.stats.allocated_bytes, -int64_t(block->bytes));
  add(device.stats.active, -1);
  add(device.stats.active_bytes, -int64_t(block->bytes));
  add(device.stats.requested_bytes, -int64_t(block->requested));
  if (block->pool && !block->pool->closed) {
    const bool capturing =
        capture_poison(block->home, block->pool.get(), block->data, block->bytes);
    put(block, !capturing             ? nullptr
               : block->users.empty() ? block->home
                                      : nobody());  // another lane may read it until the end
    return;
  }
  Deferred it{block, {}};
  if (block->pool) {
    for (auto& [queue, position] : block->pool->replays) {
      if (queue->done < position) it.waits.emplace_back(queue, position);
    }
  }
  for (Queue* user : block->users) {
    if (user->done < user->pushed) it.waits.emplace_back(user, user->pushed);
  }
  if (it.waits.empty()) {
    retire(block);
  } else {
    device.deferred.push_back(std::move(it));
  }
}

void free_nothing(void*) {}

struct DeviceAllocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    use_device("allocate");
    const DeviceIndex index = current_device();
    const c10::Device where(kSim, index);
    if (bytes == 0) return {nullptr, nullptr, &free_nothing, where};
    Queue* home = current_queue(index);
    const std::shared_ptr<Pool> pool = capture_pool(home);
    Lock lock(memory().mutex);
    DeviceMemory& device = memory().devices[index];
    retire_deferred(device);
    const size_t size = bytes > (size_t(1) << 60) ? bytes : rounded(bytes);
    Block* block = take_free(device, pool.get(), home, size);
    if (!block && pool) block = take_free(device, pool.get(), nullptr, size);
    if (!block) block = new_segment(lock, index, size);
    block->home = home;
    block->requested = bytes;
    block->pool = pool;
    add(device.stats.allocation, 1);
    add(device.stats.allocated_bytes, int64_t(block->bytes));
    add(device.stats.active, 1);
    add(device.stats.active_bytes, int64_t(block->bytes));
    add(device.stats.requested_bytes, int64_t(bytes));
    return {block->data, block, &free_block, where};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    struct CopyBytes final : Work {
      void* to;
      const void* from;
      size_t bytes;
      void run() override { memcpy(to, from, bytes); }
      std::string name() const override { return "a copy of a storage"; }
    };
    auto work = std::make_shared<CopyBytes>();
    work->to = to;
    work->from = from;
    work->bytes = bytes;
    submit(current_queue(current_device()), std::move(work));
  }

  bool initialized() override { return true; }

  void emptyCache(c10::MempoolId_t) override {
    for (DeviceIndex d = 0; d < device_count(); ++d) release_cached(d);
  }

  void recordStream(const c10::DataPtr& data, c10::Stream stream) override {
    if (data.get_deleter() != &free_block) return;
    Queue* user = find_queue(stream.device_index(), stream.id());
    auto* block = static_cast<Block*>(data.get_context());
    Lock lock(memory().mutex);
    if (user == block->home) return;
    for (Queue* known : block->users) {
      if (known == user) return;
    }
    block->users.push_back(user);
  }

  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex index) override {
    index = checked(index, "memory_stats");
    Lock lock(memory().mutex);
    return memory().devices[index].stats;
  }

  void resetAccumulatedStats(DeviceIndex index) override {
    index = checked(index, "reset_accumulated_memory_stats");
    Lock lock(memory().mutex);
    auto& stats = memory().devices[index].stats;
    for (auto* array : arrays(stats)) (*array)[0].reset_accumulated();
    stats.num_alloc_retries = stats.num_ooms = 0;
  }

  void resetPeakStats(DeviceIndex index) override {
    index = checked(index, "reset_peak_memory_stats");
    Lock lock(memory().mutex);
    for (auto* array : arrays(memory().devices[index].stats)) (*array)[0].reset_peak();
  }

  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex index) override {
    index = checked(index, "mem_get_info");
    Lock lock(memory().mutex);
    const DeviceMemory& device = memory().devices[index];
    return {device.capacity - std::min(device.capacity, device.reserved), device.capacity};
  }

 private:
  static std::array<c10::CachingAllocator::StatArray*, 7> arrays(
      c10::CachingDeviceAllocator::DeviceStats& s) {
    return {&s.allocation,     &s.segment,      &s.active,         &s.allocated_bytes,
            &s.reserved_bytes, &s.active_bytes, &s.requested_bytes};
  }
};

}  // namespace

c10::DeviceAllocator* device_allocator() {
  static auto* const instance = new DeviceAllocator;
  return instance;
}

void set_capacity(DeviceIndex device, size_t bytes) {
  Lock lock(memory().mutex);
  memory().devices[device].capacity = bytes;
}

void release_cached(DeviceIndex device) {
  Lock lock(memory().mutex);
  retire_deferred(memory().devices[device]);
  release_cached_locked(memory().devices[device]);
}

DeviceIndex device_of(const void* data) {
  const auto* address = static_cast<const char*>(data);
  Lock lock(memory().mutex);
  auto& segments = memory().segments;
  auto after = segments.upper_bound(address);
  if (after == segments.begin()) return -1;
  const Block* block = std::prev(after)->second;
  return address < std::prev(after)->first + block->bytes ? block->device : DeviceIndex(-1);
}

// --- Pools of graphs -----------------------------------------------------------------------------

void open_pool(const std::shared_ptr<Pool>& pool) {
  Lock lock(memory().mutex);
  ++pool->graphs;
  pool->closed = false;
}

void note_replay(const std::shared_ptr<Pool>& pool, Queue* queue) {
  Lock lock(memory().mutex);
  pool->replays[queue] = queue->pushed;
}

void settle_pool(const std::shared_ptr<Pool>& pool) {
  if (in_bad_fork()) return;
  Lock lock(memory().mutex);
  for (auto& device : memory().devices) {
    std::vector<Block*> blocks;
    for (auto it = device.free.begin(); it != device.free.end();) {
      const auto& [owner, home, bytes] = it->first;
      if (owner != pool.get() || home == nullptr) {
        ++it;
        continue;
      }
      blocks.insert(blocks.end(), it->second.begin(), it->second.end());
      it = device.free.erase(it);
    }
    for (Block* block : blocks) device.free[{pool.get(), nullptr, block->bytes}].push_back(block);
  }
}

void close_pool(const std::shared_ptr<Pool>& pool) noexcept {
  if (in_bad_fork()) return;
  Lock lock(memory().mutex);
  if (--pool->graphs > 0) return;
  pool->closed = true;
  for (auto& device : memory().devices) {
    for (auto it = device.free.begin(); it != device.free.end();) {
      if (std::get<0>(it->first) != pool.get()) {
        ++it;
        continue;
      }
      // As when a tensor is freed: nobody gets the memory before the last replay has run.
      for (Block* block : it->second) {
        device.cached -= block->bytes;
        Deferred one{block, {}};
        for (auto& [queue, position] : pool->replays) one.waits.emplace_back(queue, position);
        device.deferred.push_back(std::move(one));
      }
      it = device.free.erase(it);
    }
    device.looked_at = 0;
  }
}

std::shared_ptr<void> hold_memory(const c10::Storage& storage) {
  const auto& data = storage.data_ptr();
  if (data.get_deleter() != &free_block) return nullptr;
  auto* block = static_cast<Block*>(data.get_context());
  Lock lock(memory().mutex);
  ++block->holds;
  return {block, [](void* held) { release_hold(static_cast<Block*>(held)); }};
}

bool in_pool(const c10::Storage& storage, const Pool* pool) {
  const auto& data = storage.data_ptr();
  if (data.get_deleter() != &free_block) return false;
  Lock lock(memory().mutex);
  return static_cast<Block*>(data.get_context())->pool.get() == pool;
}

}  // namespace sim
