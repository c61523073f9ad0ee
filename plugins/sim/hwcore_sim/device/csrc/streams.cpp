#include "streams.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <random>
#include <thread>

#include "graph.h"
#include "neutral.h"

namespace sim {
namespace {

// A program that polls an event would wait for ever on a device that does nothing by itself. So
// many unsuccessful queries in succession are taken for waiting.
constexpr uint64_t kQueriesThatWait = 100;

struct Device {
  std::vector<std::unique_ptr<Queue>> queues;  // by id; the one at 0 is replaced at a reset
  std::vector<std::unique_ptr<Queue>> retired;
  std::atomic<uint64_t> generation{0};
};

struct State {
  std::mutex mutex;  // guards queues' items and the tables; never held while work runs or dies
  std::array<Device, kMaxDevices> devices;
  Drain policy = Drain::Lazy;
  std::mt19937_64 random;
  uint64_t sequence = 1;
};

// Never destroyed: threads may still submit while the process ends.
State& state() {
  static State* const instance = new State;
  return *instance;
}

std::atomic<uint64_t> g_progress{0};
std::mutex g_execution;
std::atomic<std::thread::id> g_runner{};
int g_execution_depth = 0;  // of the runner

struct CurrentQueues {
  std::array<Queue*, kMaxDevices> queues{};
};
thread_local CurrentQueues t_current;

using Lock = std::unique_lock<std::mutex>;

Queue* default_queue_locked(DeviceIndex device) {
  auto& queues = state().devices[device].queues;
  if (queues.empty()) queues.push_back(std::make_unique<Queue>(device, 0, 0));
  return queues[0].get();
}

void check_stale(const Queue* queue) {
  if (!queue->stale) return;
  fail(ErrorKind::Capability,
       c10::str("stream ", name_of(*queue), " was created before reset(", int(queue->device),
                "); expected a stream of the device as it is now. Create a new stream after the "
                "reset."));
}

void run_item(Queue* queue, Item& item) {
  if (item.data) {
    memset(item.data, 0xDD, item.bytes);
  } else if (item.work) {
    std::exception_ptr error;
    try {
      item.work->run();
    } catch (c10::Error& e) {
      e.add_context(c10::str("raised by ", item.work->name(), ", queued on stream ",
                             name_of(*queue), " and run when something waited for it"));
      error = std::current_exception();
    } catch (...) {
      error = std::current_exception();
    }
    if (error) {
      Lock lock(state().mutex);
      if (!queue->error) queue->error = std::move(error);
    }
  }
}

[[noreturn]] void fail_circular(const Queue* queue) {
  fail(ErrorKind::Capability,
       c10::str("stream ", name_of(*queue),
                " waits for itself; expected waits without a circle. "
                "Do not synchronise, inside queued work, a stream that this work belongs to or is "
                "waited for by."));
}

// Run items until `queue` has reached `until`. Waits are followed with a stack of our own rather
// than by recursion: a queue is on it at most once, or it waits for itself.
void run_until(Queue* queue, uint64_t until) {
  std::vector<std::pair<Queue*, uint64_t>> stack{{queue, until}};
  while (!stack.empty()) {
    auto [top, target] = stack.back();
    if (top->done >= target) {
      stack.pop_back();
      continue;
    }
    if (top->running) fail_circular(top);
    Item item;
    {
      Lock lock(state().mutex);
      if (top->items.empty()) {  // dropped by a reset
        stack.pop_back();
        continue;
      }
      Item& front = top->items.front();
      if (front.source && front.source->done < front.position && !front.source->stale) {
        for (auto& waiting : stack) {
          if (waiting.first == front.source) fail_circular(top);
        }
        stack.emplace_back(front.source, front.position);
        continue;
      }
      item = std::move(front);
      top->items.pop_front();
      top->running_sequence = item.sequence;
      top->running = true;
    }
    run_item(top, item);
    {
      Lock lock(state().mutex);
      top->running = false;
      top->queries = 0;
      ++top->done;
      ++g_progress;
    }
    // `item` dies here, without the lock: what it holds may end in the allocator, or in Python.
  }
}

// After a submission under "random": perhaps run some items of some stream.
void random_step() {
  Execution execution;
  std::vector<Queue*> busy;
  Queue* chosen = nullptr;
  uint64_t until = 0;
  {
    Lock lock(state().mutex);
    if (state().random() % 2) return;
    for (DeviceIndex d = 0; d < device_count(); ++d) {
      for (auto& queue : state().devices[d].queues) {
        if (queue->policy) continue;
        if (!queue->items.empty() && !queue->running) busy.push_back(queue.get());
      }
    }
    if (busy.empty()) return;
    chosen = busy[state().random() % busy.size()];
    until = chosen->done + 1 + state().random() % chosen->items.size();
  }
  drain(chosen, until);
}

void follow_policy(Queue* queue) {
  // Work that submits work: the outer loop, or whoever waits, gets to it.
  if (Execution::mine()) return;
  switch (policy_of(queue)) {
    case Drain::Lazy:
      break;
    case Drain::Eager:
      drain(queue, queue->pushed);
      break;
    case Drain::Random:
      random_step();
      break;
  }
}

void push_locked(Queue* queue, Item item) {
  item.sequence = state().sequence++;
  queue->items.push_back(std::move(item));
  ++queue->pushed;
}

void push(Queue* queue, Item item) {
  {
    Lock lock(state().mutex);
    check_stale(queue);
    if (Graph* graph = queue->capture) {
      graph->add(queue, std::move(item));
      return;
    }
    push_locked(queue, std::move(item));
  }
  follow_policy(queue);
}

void check_event(const Event& event) {
  if (event.source && event.generation != state().devices[event.device].generation) {
    fail(ErrorKind::Capability,
         c10::str("event of device ", device_name(event.device), " was recorded before reset(",
                  int(event.device), "); expected one recorded after it. Record it again."));
  }
}

void refuse_captured_event(const Event& event, const char* what) {
  if (!event.captured) return;
  const auto problem = c10::str(what, " an event that was recorded inside a capture");
  refuse_while_capturing(nullptr, problem);
  fail(ErrorKind::Capture, c10::str("Event: the host ", problem,
                                    "; expected one recorded outside. Record it again after the "
                                    "capture."));
}

}  // namespace

std::string name_of(const Queue& queue) {
  return c10::str(device_name(queue.device), " stream ", queue.id);
}

Lock lock_streams() { return Lock(state().mutex); }

// --- Finding queues ------------------------------------------------------------------------------

Queue* default_queue(DeviceIndex device) {
  Lock lock(state().mutex);
  return default_queue_locked(device);
}

Queue* new_queue(DeviceIndex device, int priority) {
  use_device("Stream");
  Lock lock(state().mutex);
  default_queue_locked(device);
  auto& queues = state().devices[device].queues;
  queues.push_back(std::make_unique<Queue>(device, int64_t(queues.size()), priority));
  return queues.back().get();
}

Queue* find_queue(int64_t index, int64_t id) {
  use_device("Stream");
  const DeviceIndex device = checked(index, "Stream");
  Lock lock(state().mutex);
  default_queue_locked(device);
  auto& queues = state().devices[device].queues;
  if (id < 0 || id >= int64_t(queues.size())) {
    fail(ErrorKind::Capability,
         c10::str("Stream: stream_id got ", id, "; expected a stream of ", device_name(device),
                  ". Create it with torch.Stream(\"", device_name(device), "\")."));
  }
  check_stale(queues[id].get());
  return queues[id].get();
}

Queue* current_queue(DeviceIndex device) {
  use_device("a stream");
  Queue*& current = t_current.queues[device];
  if (current == nullptr || (current->stale && current->id == 0)) current = default_queue(device);
  check_stale(current);
  return current;
}

int64_t current_queue_id(DeviceIndex device) {
  const Queue* current = t_current.queues[device];
  return current ? current->id : 0;
}

int64_t exchange_current_queue(DeviceIndex device, int64_t id) {
  Queue* next;
  {
    // A stale stream may be made current, for leaving a context must not fail; using it does.
    Lock lock(state().mutex);
    default_queue_locked(device);
    auto& queues = state().devices[device].queues;
    if (id < 0 || id >= int64_t(queues.size())) {
      lock.unlock();
      find_queue(device, id);  // raises
    }
    next = queues[id].get();
  }
  const int64_t before = current_queue_id(device);
  t_current.queues[device] = next;
  return before;
}

// --- Work ----------------------------------------------------------------------------------------

void submit(Queue* queue, std::shared_ptr<Work> work) {
  Item item;
  item.work = std::move(work);
  push(queue, std::move(item));
}

void submit_wait(Queue* queue, Queue* source, uint64_t position) {
  if (source == queue || source->done >= position) return;
  Item item;
  item.source = source;
  item.position = position;
  push(queue, std::move(item));
}

void submit_poison(Queue* queue, void* data, size_t bytes) {
  Item item;
  item.data = data;
  item.bytes = bytes;
  {
    Lock lock(state().mutex);
    if (!queue->items.empty() || queue->running) {
      // No policy here: freeing memory is no occasion to run work, for it happens anywhere.
      push_locked(queue, std::move(item));
      return;
    }
  }
  memset(data, 0xDD, bytes);  // nothing before it in the queue
}

bool capture_poison(Queue* queue, const Pool* pool, void* data, size_t bytes) {
  Lock lock(state().mutex);
  Graph* graph = queue->capture;
  if (!graph || graph->pool.get() != pool) return false;
  Item item;
  item.data = data;
  item.bytes = bytes;
  graph->add(queue, std::move(item));
  return true;
}

std::shared_ptr<Pool> capture_pool(Queue* queue) {
  Lock lock(state().mutex);
  Graph* graph = queue->capture;
  return graph ? graph->pool : nullptr;
}

bool runs_at_once(Queue* queue) {
  return policy_of(queue) == Drain::Eager && queue->done == queue->pushed && !queue->capture &&
         !Execution::mine();
}

void drain(Queue* queue, uint64_t position) {
  if (queue->done >= position) return;
  GilRelease release;
  Execution execution;
  Neutral neutral;
  run_until(queue, position);
}

void raise_pending(Queue* queue) {
  std::exception_ptr error;
  {
    Lock lock(state().mutex);
    error = std::exchange(queue->error, nullptr);
  }
  if (error) std::rethrow_exception(std::move(error));
}

namespace {

struct WaitWatch {
  std::mutex mutex;
  std::atomic<int> watchers{0};
  std::vector<std::string> log;
};

WaitWatch& wait_watch() {
  static WaitWatch* const instance = new WaitWatch;
  return *instance;
}

void note_wait(const char* what) {
  auto& watch = wait_watch();
  if (watch.watchers == 0) return;
  std::lock_guard lock(watch.mutex);
  watch.log.emplace_back(what);
}

}  // namespace

size_t begin_wait_watch() {
  auto& watch = wait_watch();
  std::lock_guard lock(watch.mutex);
  ++watch.watchers;
  return watch.log.size();
}

std::vector<std::string> end_wait_watch(size_t start) {
  auto& watch = wait_watch();
  std::lock_guard lock(watch.mutex);
  std::vector<std::string> seen(watch.log.begin() + start, watch.log.end());
  if (--watch.watchers == 0) watch.log.clear();
  return seen;
}

void synchronize(Queue* queue, const char* what) {
  use_device(what);
  note_wait(what);
  refuse_while_capturing(queue, c10::str(what, ", which waits for the device"));
  check_stale(queue);
  drain(queue, queue->pushed);
  raise_pending(queue);
}

namespace {

std::vector<Queue*> queues_of(DeviceIndex device) {
  std::vector<Queue*> queues;
  Lock lock(state().mutex);
  for (auto& queue : state().devices[device].queues) queues.push_back(queue.get());
  std::stable_sort(queues.begin(), queues.end(),
                   [](Queue* a, Queue* b) { return a->priority < b->priority; });
  return queues;
}

}  // namespace

void synchronize_device(DeviceIndex device, const char* what) {
  use_device(what);
  note_wait(what);
  refuse_while_capturing(nullptr, c10::str(what, ", which waits for the device"));
  const auto queues = queues_of(device);
  for (Queue* queue : queues) drain(queue, queue->pushed);
  for (Queue* queue : queues) raise_pending(queue);
}

void drain_all() {
  for (DeviceIndex d = 0; d < device_count(); ++d) {
    for (Queue* queue : queues_of(d)) drain(queue, queue->pushed);
  }
}

bool query(Queue* queue) {
  refuse_while_capturing(queue, "called Stream.query");
  check_stale(queue);
  if (queue->done >= queue->pushed) return true;
  {
    Lock lock(state().mutex);
    if (++queue->queries < kQueriesThatWait) return false;
  }
  drain(queue, queue->pushed);
  return true;
}

uint64_t oldest_pending() {
  Lock lock(state().mutex);
  uint64_t oldest = state().sequence;
  for (auto& device : state().devices) {
    for (auto& queue : device.queues) {
      if (queue->running) oldest = std::min(oldest, queue->running_sequence);
      if (!queue->items.empty()) oldest = std::min(oldest, queue->items.front().sequence);
    }
    for (auto& queue : device.retired) {
      if (queue->running) oldest = std::min(oldest, queue->running_sequence);
    }
  }
  return oldest;
}

uint64_t next_sequence() {
  Lock lock(state().mutex);
  return state().sequence;
}

size_t pending(Queue* queue) {
  const auto count = [](const Queue& one) {
    return std::count_if(one.items.begin(), one.items.end(), [](const Item& i) { return !i.data; });
  };
  Lock lock(state().mutex);
  if (queue) return count(*queue);
  size_t total = 0;
  for (auto& device : state().devices) {
    for (auto& one : device.queues) total += count(*one);
  }
  return total;
}

uint64_t progress() { return g_progress; }

void reset_device(DeviceIndex device) {
  use_device("reset");
  refuse_while_capturing(nullptr, "called reset");
  if (Execution::mine()) {
    fail(ErrorKind::Capability,
         "reset: was called by queued work; expected a call from outside. "
         "Call it when the work has run.");
  }
  GilRelease release;
  Execution execution;  // wait for the item that another thread may be running
  // These die without the lock, as in run_until: a Python error takes the GIL to die.
  std::vector<std::deque<Item>> dropped;
  std::vector<std::exception_ptr> errors;
  {
    Lock lock(state().mutex);
    Device& it = state().devices[device];
    for (auto& queue : it.queues) {
      dropped.push_back(std::exchange(queue->items, {}));
      errors.push_back(std::exchange(queue->error, nullptr));
      queue->done = queue->pushed.load();
      queue->stale = true;
    }
    ++it.generation;
    ++g_progress;
    if (!it.queues.empty()) {
      it.retired.push_back(std::move(it.queues[0]));
      it.queues[0] = std::make_unique<Queue>(device, 0, 0);
    }
  }
  t_current.queues[device] = nullptr;
}

uint64_t generation(DeviceIndex device) { return state().devices[device].generation; }

Execution::Execution() {
  if (!mine()) {
    if (!g_execution.try_lock()) {
      GilRelease release;  // whoever runs work may need the GIL for it
      g_execution.lock();
    }
    g_runner = std::this_thread::get_id();
  }
  ++g_execution_depth;
}

Execution::~Execution() {
  if (--g_execution_depth == 0) {
    g_runner = std::thread::id();
    g_execution.unlock();
  }
}

bool Execution::mine() { return g_runner == std::this_thread::get_id(); }

// --- Drain policy --------------------------------------------------------------------------------

void set_policy(Drain policy, uint64_t seed) {
  Lock lock(state().mutex);
  state().policy = policy;
  state().random.seed(seed);
}

void set_queue_policy(Queue* queue, std::optional<Drain> policy) {
  Lock lock(state().mutex);
  queue->policy = policy;
}

Drain policy_of(Queue* queue) {
  Lock lock(state().mutex);
  return queue->policy.value_or(state().policy);
}

// --- Events --------------------------------------------------------------------------------------

namespace {

struct StampWork final : Work {
  std::shared_ptr<Stamp> stamp = std::make_shared<Stamp>(0);
  void run() override { *stamp = std::chrono::steady_clock::now().time_since_epoch().count(); }
  std::string name() const override { return "a timed event"; }
};

}  // namespace

void record(Event& event, Queue* queue, bool timed) {
  use_device("Event.record");
  std::shared_ptr<StampWork> stamp;
  if (timed) {
    stamp = std::make_shared<StampWork>();
    submit(queue, stamp);
  }
  Lock lock(state().mutex);
  check_stale(queue);
  Graph* graph = queue->capture;
  event.device = queue->device;
  event.source = queue;
  event.position = graph ? graph->position_of(queue) : queue->pushed.load();
  event.captured = graph != nullptr;
  event.graph = graph ? graph->weak_from_this() : std::weak_ptr<Graph>();
  event.generation = state().devices[queue->device].generation;
  event.queries = 0;
  event.timed = timed;
  event.stamp = stamp ? stamp->stamp : nullptr;
}

void wait(Event& event, Queue* queue) {
  use_device("Event.wait");
  if (!event.source) return;
  check_event(event);
  check_stale(queue);
  if (event.captured) {
    auto graph = event.graph.lock();  // outlives the lock: to die, it takes it
    Lock lock(state().mutex);
    if (!graph || graph->state != Graph::State::Capturing) {
      refuse_while_capturing(queue, "waited for an event that another capture recorded");
      fail(ErrorKind::Capture,
           "Event.wait: the event was recorded inside a capture that has ended; expected one "
           "recorded outside. Record it again after the capture.");
    }
    if (queue->capture && queue->capture != graph.get()) {
      queue->capture.load()->refuse("waited for an event that another capture recorded");
    }
    if (!queue->capture) graph->join(queue);
    Item item;
    item.source = event.source;
    item.position = event.position;
    graph->add(queue, std::move(item));
    return;
  }
  if (Graph* graph = queue->capture) {
    graph->refuse("waited for an event that was recorded outside the capture");
  }
  submit_wait(queue, event.source, event.position);
}

bool query(Event& event) {
  use_device("Event.query");
  if (!event.source) return true;
  refuse_captured_event(event, "queried");
  refuse_while_capturing(nullptr, "called Event.query");
  check_event(event);
  if (event.source->done >= event.position) return true;
  if (++event.queries < kQueriesThatWait) return false;
  drain(event.source, event.position);
  return true;
}

void synchronize(Event& event) {
  use_device("Event.synchronize");
  if (!event.source) return;
  refuse_captured_event(event, "waited for");
  refuse_while_capturing(nullptr, "called Event.synchronize, which waits for the device");
  note_wait("called Event.synchronize");
  check_event(event);
  drain(event.source, event.position);
  raise_pending(event.source);
}

double elapsed_ms(Event& start, Event& end) {
  use_device("Event.elapsed_time");
  for (Event* event : {&start, &end}) {
    const char* which = event == &start ? "the start event" : "the end event";
    refuse_captured_event(*event, "called elapsed_time of");
    check_event(*event);
    const char* problem = !event->source              ? "was never recorded"
                          : !event->timed             ? "was made without enable_timing"
                          : event->stamp->load() == 0 ? "has not been reached"
                                                      : nullptr;
    if (problem) {
      fail(ErrorKind::Capability,
           c10::str("Event.elapsed_time: ", which, " ", problem,
                    "; expected one made with enable_timing=True, recorded and reached. Make it "
                    "so, record it and synchronise before asking."));
    }
  }
  return double(*end.stamp - *start.stamp) / 1e6;
}

}  // namespace sim
