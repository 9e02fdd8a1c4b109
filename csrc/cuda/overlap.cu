// mask_overlap on the GPU: for every segment and every pair of tasks, how many entries both masks keep. The logits are
// read once; what is kept of a block's entries lies in shared memory as bits, and pairs of tasks are counted from
// these.
#include "../common/registration.h"
#include "device.h"
#include "launcher.h"

namespace hypermask {
namespace {

constexpr const char* kOp = "mask_overlap";
constexpr int kWords = kTileEntries / 32;    // of bits, in the tile of one task
constexpr int64_t kSharedBytes = 48 * 1024;  // what a block may have without asking

// Up to kMaxSegments segments of all tasks.
struct Overlap {
  BlockTable blocks;
  int64_t begin[kMaxSegments];
  int64_t size[kMaxSegments];
  const float* logits;         // [tasks, entries]
  const float* thresholds;     // [tasks, total]
  unsigned long long* counts;  // [total, tasks, tasks], the sums of all blocks
  int64_t entries, total, first;
  int tasks;
  int words;  // of bits that a task has in shared memory at a time
};

__global__ void __launch_bounds__(kThreads) overlap_kernel(const Overlap o) {
  uint32_t* bits = dynamic_shared<uint32_t>();  // [tasks, words]
  const int segment = BlockTable::find(o.blocks, blockIdx.x);
  const int64_t tile = (blockIdx.x - o.blocks.first_block[segment]) * kTileEntries;
  const int64_t begin = o.begin[segment] + tile, left = o.size[segment] - tile;
  const int entries = static_cast<int>(left < kTileEntries ? left : kTileEntries);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int start = 0; start < entries; start += 32 * o.words) {
    // A warp turns 32 neighbouring entries into a word. "Not smaller" instead of "at least" keeps NaN, as the mask
    // does.
    for (int w = warp; w < o.tasks * o.words; w += kThreads / 32) {
      const int task = w / o.words, i = start + w % o.words * 32 + lane;
      bool kept = false;
      if (i < entries) {
        const float limit = o.thresholds[task * o.total + o.first + segment];
        kept = !(fabsf(o.logits[task * o.entries + begin + i]) < limit);
      }
      const uint32_t word = __ballot_sync(0xffffffffu, kept);
      if (lane == 0) bits[w] = word;
    }
    __syncthreads();
    const int64_t counts = (o.first + segment) * o.tasks * o.tasks;
    for (int pair = threadIdx.x; pair < o.tasks * o.tasks; pair += kThreads) {
      const int i = pair / o.tasks, j = pair % o.tasks;
      if (j < i) continue;  // the same as (j, i)
      unsigned both = 0;
      for (int w = 0; w < o.words; ++w) both += __popc(bits[i * o.words + w] & bits[j * o.words + w]);
      if (both == 0) continue;
      atomicAdd(o.counts + counts + pair, static_cast<unsigned long long>(both));  // integers: any order, the same sum
      if (i != j) atomicAdd(o.counts + counts + j * o.tasks + i, static_cast<unsigned long long>(both));
    }
    __syncthreads();
  }
}

Tensor mask_overlap(const Tensor& logits, const Tensor& thresholds, const Offsets& offsets) {
  const Place place = Place::gpu_of(logits);
  check_float(kOp, "logits", logits, place);
  if (logits.dim() != 2) fail(kOp, "logits must have shape (T, N), not ", to_string(shape_of(logits)));
  check_offsets(kOp, offsets, logits.size(1));
  const int64_t tasks = logits.size(0), total = segments(offsets);
  check_float(kOp, "thresholds", thresholds, place, {tasks, total});
  if (tasks > kSharedBytes / 4) fail(kOp, tasks, " tasks are more than ", kSharedBytes / 4);
  Tensor counts = empty_of(logits, {total, tasks, tasks}, ScalarType::Long);
  if (counts.numel() == 0) return counts;
  const Launcher gpu(kOp, logits);
  Overlap o{};
  o.logits = data(logits);
  o.thresholds = data(thresholds);
  o.counts = reinterpret_cast<unsigned long long*>(counts.mutable_data_ptr<int64_t>());
  o.entries = logits.size(1);
  o.total = total;
  o.tasks = static_cast<int>(tasks);
  o.words = static_cast<int>(std::min<int64_t>(kWords, kSharedBytes / 4 / tasks));
  gpu.clear(o.counts, counts.numel() * 8);
  for (o.first = 0; o.first < total; o.first += kMaxSegments) {
    const int count = static_cast<int>(std::min<int64_t>(kMaxSegments, total - o.first));
    for (int i = 0; i < count; ++i) {
      o.begin[i] = offsets[o.first + i];
      o.size[i] = offsets[o.first + i + 1] - offsets[o.first + i];
    }
    fill_table(o.blocks, o.size, count);
    const int64_t blocks = o.blocks.first_block[count];
    if (blocks > 0) gpu.launch(overlap_kernel, dim3(blocks), kThreads, 4 * tasks * o.words, o);
  }
  return counts;
}

}  // namespace

HM_CUDA(m) { m.impl("mask_overlap", TORCH_BOX(&mask_overlap)); }

}  // namespace hypermask
