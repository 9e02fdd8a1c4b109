// A block of CUDA threads on the CPU: each thread is a fiber that runs until it waits for others, and each warp runs
// until it waits for the block. So of two accesses that no barrier orders, either comes first: one in ascending, the
// other in descending order of threads and warps, and a barrier that is missing gives a wrong result in one of the two.
// Blocks run one after another, but whenever the first thread of one reaches a barrier, another block runs in between.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr unsigned kWarp = 32;
constexpr unsigned kEveryLane = 0xffffffffu;

// A place in the source at which threads wait: barriers of two places never meet.
struct Place {
  const char* what;
  const char* file;
  int line;
};

// Runs a grid's blocks, their shared memory full of NaN each time. Throws std::runtime_error where threads wait for one
// that has ended or waits elsewhere, where shared memory is written beyond its end, and where memory is touched that is
// protected (memory.h).
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// For threads of a running block.
void* dynamic_memory();
unsigned lane();
void wait_for_block(Place place);
void wait_for_warp(unsigned mask, Place place);
[[noreturn]] void stop(const std::string& error);  // ends the block

// What every lane of the mask brings, by lane; all of them call it at the same place.
constexpr size_t kExchanged = 32;  // bytes
void exchange(unsigned mask, Place place, const void* mine, size_t bytes, unsigned char (*all)[kExchanged]);

// Asynchronous copies of this thread, made at once in ascending order and as late as allowed in descending.
void copy_later(void* to, const void* from, size_t bytes);
void close_copies();
void finish_copies(size_t pending);

void set_descending(bool on);

}  // namespace emulation
