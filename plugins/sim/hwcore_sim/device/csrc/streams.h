// Streams as lazy queues, events as positions in them, and the one loop that runs queued work.
//
// Nothing submitted runs before something synchronises (or the drain policy says otherwise). That
// is what makes a missing wait visible: the work it should have waited for has not run.
#pragma once

#include <atomic>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "common.h"

namespace sim {

struct Graph;
struct Pool;
struct Queue;

// One piece of device work. It may be run several times: by each replay of a graph that holds it.
struct Work {
  virtual ~Work() = default;
  virtual void run() = 0;
  virtual std::string name() const = 0;
  // What a replay submits. Random work overrides it, to draw anew.
  virtual std::shared_ptr<Work> for_replay(const std::shared_ptr<Work>& self) { return self; }
};

// What a queue holds: work, or a wait for a position of another queue, or the poisoning of freed
// memory.
struct Item {
  std::shared_ptr<Work> work;
  Queue* source = nullptr;  // wait: until `source->done` has reached `position`
  uint64_t position = 0;
  void* data = nullptr;  // poison: these bytes
  size_t bytes = 0;
  uint64_t sequence = 0;  // order of submission over all queues
};

enum class Drain { Lazy, Eager, Random };

// A stream. Never destroyed: torch's streams are plain values, so nobody says when one is dropped.
struct Queue {
  Queue(DeviceIndex device, int64_t id, int priority)
      : device(device), id(id), priority(priority) {}

  const DeviceIndex device;
  const int64_t id;
  const int priority;  // lower runs first where the device as a whole is synchronised

  std::atomic<uint64_t> pushed{0};
  std::atomic<uint64_t> done{0};
  std::atomic<bool> stale{false};    // created before its device was reset
  std::atomic<bool> running{false};  // one of its items is being run
  std::atomic<Graph*> capture{nullptr};

  // Guarded by the state mutex of streams.cpp:
  std::deque<Item> items;
  uint64_t running_sequence = 0;
  uint64_t queries = 0;  // unsuccessful ones in succession
  std::exception_ptr error;
  std::optional<Drain> policy;
};

std::string name_of(const Queue& queue);

// Held while a queue starts or stops being captured, so that whoever submits sees either.
std::unique_lock<std::mutex> lock_streams();

// --- Finding queues ------------------------------------------------------------------------------

Queue* default_queue(DeviceIndex device);
Queue* new_queue(DeviceIndex device, int priority);
Queue* find_queue(int64_t device, int64_t id);  // raises if there is none, or it is stale
Queue* current_queue(DeviceIndex device);           // the calling thread's
int64_t current_queue_id(DeviceIndex device);
int64_t exchange_current_queue(DeviceIndex device, int64_t id);

// --- Work ----------------------------------------------------------------------------------------

void submit(Queue* queue, std::shared_ptr<Work> work);
// Submit without regard to the policy or to captures: what a replay does.
void submit_wait(Queue* queue, Queue* source, uint64_t position);
// Overwrite freed memory once the queue gets there. Never part of a graph, whose replays would
// overwrite it again when it is somebody else's.
void submit_poison(Queue* queue, void* data, size_t bytes);
// Let the graph that captures the queue overwrite memory of its own pool. False, and nothing done,
// if none does or its pool is another.
bool capture_poison(Queue* queue, const Pool* pool, void* data, size_t bytes);
// The pool that allocations on the queue are captured into, or nullptr.
std::shared_ptr<Pool> capture_pool(Queue* queue);

// Whether work on this queue runs within the call that submits it, with nothing before it.
bool runs_at_once(Queue* queue);

// Run what is queued up to a position. Errors of the work are kept for `raise_pending`.
void drain(Queue* queue, uint64_t position);
void raise_pending(Queue* queue);

// The host waits; raises what the work raised. Refused while capturing.
void synchronize(Queue* queue, const char* what);
void synchronize_device(DeviceIndex device, const char* what);
// What the host waited for, in words, while somebody watches. Beginning returns the place in the
// log; ending returns what came after it.
size_t begin_wait_watch();
std::vector<std::string> end_wait_watch(size_t start);
// Run everything that is queued anywhere, keeping errors for later.
void drain_all();
bool query(Queue* queue);

// Sequence number of the oldest item that has not run, or the next one if there is none.
uint64_t oldest_pending();
uint64_t next_sequence();
size_t pending(Queue* queue);  // nullptr: of all queues; poisoning does not count
// Grows with every item run: tells the allocators that a look at deferred blocks may pay.
uint64_t progress();

// Drop the queues and pending errors of a device; its streams and events become stale.
void reset_device(DeviceIndex device);
uint64_t generation(DeviceIndex device);  // number of resets

// Held by the one thread that runs work. Recursive; gives the GIL back while waiting.
class Execution {
 public:
  Execution();
  ~Execution();
  Execution(const Execution&) = delete;
  Execution& operator=(const Execution&) = delete;
  static bool mine();
};

// --- Drain policy --------------------------------------------------------------------------------

void set_policy(Drain policy, uint64_t seed);
void set_queue_policy(Queue* queue, std::optional<Drain> policy);
Drain policy_of(Queue* queue);

// --- Events --------------------------------------------------------------------------------------

// When a timed event was reached, in nanoseconds; 0 before.
using Stamp = std::atomic<int64_t>;

struct Event {
  DeviceIndex device = -1;
  Queue* source = nullptr;  // nullptr: never recorded
  uint64_t position = 0;
  uint64_t generation = 0;
  uint64_t queries = 0;  // unsuccessful ones in succession
  bool timed = false;
  std::shared_ptr<Stamp> stamp;
  std::weak_ptr<Graph> graph;  // where it was recorded inside a capture
  bool captured = false;
};

void record(Event& event, Queue* queue, bool timed);
void wait(Event& event, Queue* queue);
bool query(Event& event);
void synchronize(Event& event);
double elapsed_ms(Event& start, Event& end);

}  // namespace sim
