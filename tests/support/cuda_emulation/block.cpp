#include "block.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

// All __shared__ variables lie in one section (cuda_runtime.h), so that they can be poisoned.
extern "C" char __start_cuda_shared[] __attribute__((weak)), __stop_cuda_shared[] __attribute__((weak));

namespace emulation {
namespace {

constexpr size_t kStack = 256 * 1024, kBeyond = 4096;
constexpr unsigned char kPoison = 0xff;  // NaN as a float and as a double, -1 as an integer

enum class State { kReady, kAtBarrier, kInWarp, kEnded };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  ucontext_t start;  // where it has not run yet; from then on `context`, which changes hands without a system call
  jmp_buf context;
  bool started;
  State state;
  Place place;
  unsigned mask;
  dim3 index;
  unsigned char brought[kExchanged];
  std::vector<std::vector<Copy>> groups;  // of copies; the last one is open
};

bool order_descending = false;
jmp_buf scheduler;
std::vector<Fiber> fibers;
unsigned current;  // fiber
const std::function<void()>* kernel;
std::string error;
std::vector<unsigned char> shared;
unsigned char* shared_begin;
size_t shared_bytes;
uint64_t next_block, block_count;
bool inserted;  // whether the block that runs does so while another one waits

void make_copies(const std::vector<Copy>& group) {
  for (const Copy& c : group) std::memcpy(c.to, c.from, c.bytes);
}

void to_scheduler() {
  if (_setjmp(fibers[current].context) == 0) _longjmp(scheduler, 1);
}

void to_fiber(unsigned t) {
  current = t;
  threadIdx = fibers[t].index;
  if (_setjmp(scheduler) != 0) return;
  if (fibers[t].started) _longjmp(fibers[t].context, 1);
  fibers[t].started = true;
  setcontext(&fibers[t].start);
}

void thread_main() {
  (*kernel)();
  finish_copies(0);
  fibers[current].state = State::kEnded;
  to_scheduler();
}

unsigned char* stacks(size_t count) {
  static unsigned char* memories[2];
  static size_t sizes[2];
  unsigned char*& memory = memories[inserted];
  size_t& there = sizes[inserted];
  if (count > there) {
    if (memory) munmap(memory, there * kStack);
    const int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    memory = static_cast<unsigned char*>(mmap(nullptr, count * kStack, PROT_READ | PROT_WRITE, kind, -1, 0));
    if (memory == MAP_FAILED) throw std::bad_alloc();
    there = count;
  }
  return memory;
}

void start_fibers(dim3 block) {
  const unsigned count = block.x * block.y * block.z;
  unsigned char* memory = stacks(count);
  if (fibers.size() != count) fibers = std::vector<Fiber>(count);
  for (unsigned t = 0; t < count; ++t) {
    Fiber& f = fibers[t];
    f.state = State::kReady;
    f.index = dim3(t % block.x, t / block.x % block.y, t / block.x / block.y);
    f.groups.assign(1, {});
    f.started = false;
    // Into the very place that it is taken up from: a context points into itself, at the state of the floating-point
    // unit. That of a copy would point at the original, and what lies there later decides which operations trap.
    getcontext(&f.start);
    f.start.uc_link = nullptr;
    f.start.uc_stack.ss_sp = memory + t * kStack;
    f.start.uc_stack.ss_size = kStack;
    makecontext(&f.start, thread_main, 0);
  }
}

// Zeros where start_fibers had its variables: what a thread begins with must not lie there.
__attribute__((noinline)) void clear_stack() {
  unsigned char memory[8192];
  std::memset(memory, 0, sizeof memory);
  asm volatile("" ::"r"(memory) : "memory");
}

std::string describe(unsigned t) {
  const Fiber& f = fibers[t];
  std::string text = "thread " + std::to_string(t) + " of block " + std::to_string(blockIdx.x);
  if (f.state == State::kEnded) return text + " has ended";
  return text + " waits at " + f.place.what + " (" + f.place.file + ":" + std::to_string(f.place.line) + ")";
}

bool same_wait(const Fiber& a, const Fiber& b) {
  return a.state == b.state && a.mask == b.mask && a.place.line == b.place.line && a.place.what == b.place.what &&
         std::strcmp(a.place.file, b.place.file) == 0;
}

// Lets the warp of thread t go on if all lanes of the mask it waits with wait with it.
bool release_warp(unsigned t) {
  const unsigned first = t / kWarp * kWarp;
  const auto count = static_cast<unsigned>(fibers.size());
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(fibers[t].mask >> lane & 1) || first + lane >= count) continue;
    if (!same_wait(fibers[first + lane], fibers[t])) return false;
  }
  const unsigned mask = fibers[t].mask;
  for (unsigned lane = 0; lane < kWarp && first + lane < count; ++lane) {
    if (mask >> lane & 1) fibers[first + lane].state = State::kReady;
  }
  return true;
}

void insert_block();

// Runs a warp on its own for as long as it can: until each of its threads has ended, waits for the block, or waits for
// a lane that will not come.
void run_warp(unsigned first) {
  const auto end = std::min(first + kWarp, static_cast<unsigned>(fibers.size()));
  bool going = true;
  while (going && error.empty()) {
    for (unsigned i = first; i < end && error.empty(); ++i) {
      const unsigned t = order_descending ? end - 1 - (i - first) : i;
      if (fibers[t].state != State::kReady) continue;
      to_fiber(t);
      const bool first_of_block = t == (order_descending ? fibers.size() - 1 : 0);
      if (first_of_block && fibers[t].state == State::kAtBarrier) insert_block();
    }
    going = false;
    for (unsigned t = first; t < end; ++t) going |= fibers[t].state == State::kInWarp && release_warp(t);
  }
}

// After all warps have run: lets the block go on if all its threads wait together. False when it is done.
bool release_block() {
  const auto count = static_cast<unsigned>(fibers.size());
  const auto ended = [](const Fiber& f) { return f.state == State::kEnded; };
  if (std::all_of(fibers.begin(), fibers.end(), ended)) return false;
  for (unsigned t = 0; t < count; ++t) {
    if (!same_wait(fibers[t], fibers[0]) || fibers[t].state != State::kAtBarrier) {
      error = "threads part ways: " + describe(0) + ", " + describe(t);
      return false;
    }
  }
  for (Fiber& f : fibers) f.state = State::kReady;
  return true;
}

void run_next_block() {
  const uint64_t b = order_descending ? block_count - 1 - next_block : next_block;
  ++next_block;
  blockIdx = dim3(b % gridDim.x, b / gridDim.x % gridDim.y, b / gridDim.x / gridDim.y);
  if (__start_cuda_shared) std::memset(__start_cuda_shared, kPoison, __stop_cuda_shared - __start_cuda_shared);
  shared.assign(16 + shared_bytes + kBeyond, kPoison);
  shared_begin = shared.data() + (16 - reinterpret_cast<uintptr_t>(shared.data()) % 16) % 16;
  start_fibers(blockDim);
  clear_stack();
  const auto warps = (static_cast<unsigned>(fibers.size()) + kWarp - 1) / kWarp;
  do {
    for (unsigned w = 0; w < warps && error.empty(); ++w) run_warp((order_descending ? warps - 1 - w : w) * kWarp);
  } while (error.empty() && release_block());
  const unsigned char* end = shared_begin + shared_bytes;
  if (error.empty() && !std::all_of(end, end + kBeyond - 16, [](unsigned char c) { return c == kPoison; })) {
    error = "block " + std::to_string(blockIdx.x) + " writes beyond its dynamic shared memory";
  }
  if (!error.empty()) throw std::runtime_error("emulation: " + error);
}

// Runs another block from beginning to end, while this one's first thread has come further than all others.
void insert_block() {
  if (inserted || next_block == block_count) return;
  inserted = true;
  std::vector<Fiber> my_fibers;
  std::vector<unsigned char> my_shared, my_section(__start_cuda_shared, __stop_cuda_shared);
  const auto mine = std::tuple(current, blockIdx, shared_begin);
  my_fibers.swap(fibers);
  my_shared.swap(shared);
  run_next_block();
  std::copy(my_section.begin(), my_section.end(), __start_cuda_shared);
  my_fibers.swap(fibers);
  my_shared.swap(shared);
  std::tie(current, blockIdx, shared_begin) = mine;
  inserted = false;
}

// While it lives, an access that the memory does not allow ends the block instead of the process.
class CatchAccesses {
 public:
  CatchAccesses() {
    struct sigaction mine{};
    mine.sa_sigaction = [](int, siginfo_t*, void*) {
      stop("thread " + std::to_string(current) + " of block " + std::to_string(blockIdx.x) +
           " accesses memory outside of all tensors, or not aligned to the access's size");
    };
    mine.sa_flags = SA_SIGINFO | SA_NODEFER;  // the handler is left for good by a jump
    sigaction(SIGSEGV, &mine, &before_);
  }
  ~CatchAccesses() { sigaction(SIGSEGV, &before_, nullptr); }

 private:
  struct sigaction before_{};
};

void wait(State state, unsigned mask, Place place) {
  Fiber& f = fibers[current];
  f.state = state;
  f.mask = mask;
  f.place = place;
  to_scheduler();
}

}  // namespace

void run_grid(dim3 blocks, dim3 block, size_t bytes, const std::function<void()>& run) {
  kernel = &run;
  error.clear();
  inserted = false;
  gridDim = blocks;
  blockDim = block;
  shared_bytes = bytes;
  block_count = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
  const CatchAccesses catching;
  for (next_block = 0; next_block < block_count;) run_next_block();
}

void* dynamic_memory() { return shared_begin; }
unsigned lane() { return current % kWarp; }

void wait_for_block(Place place) { wait(State::kAtBarrier, 0, place); }

void wait_for_warp(unsigned mask, Place place) {
  if (!(mask >> lane() & 1)) stop(std::string(place.what) + " with a mask without the lane itself");
  wait(State::kInWarp, mask, place);
}

void stop(const std::string& message) {
  error = message;
  to_scheduler();
  __builtin_unreachable();
}

void exchange(unsigned mask, Place place, const void* mine, size_t bytes, unsigned char (*all)[kExchanged]) {
  std::memcpy(fibers[current].brought, mine, bytes);
  wait_for_warp(mask, place);
  const size_t first = current / kWarp * kWarp;
  for (size_t l = 0; l < kWarp && first + l < fibers.size(); ++l) {
    std::memcpy(all[l], fibers[first + l].brought, bytes);
  }
  wait_for_warp(mask, place);  // until all have read
}

void copy_later(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) {
    stop("an asynchronous copy of " + std::to_string(bytes) + " bytes is not aligned to them");
  }
  fibers[current].groups.back().push_back({to, from, bytes});
  if (!order_descending) make_copies({fibers[current].groups.back().back()});
}

void close_copies() { fibers[current].groups.emplace_back(); }

void finish_copies(size_t pending) {
  auto& groups = fibers[current].groups;
  while (groups.size() > pending + 1) {
    if (order_descending) make_copies(groups.front());
    groups.erase(groups.begin());
  }
}

void set_descending(bool on) { order_descending = on; }

}  // namespace emulation
