// mask_thresholds on the GPU: radix selection over all rows and segments, no host sync. Four launches: a start, and
// three passes that count the entries by digit; the block that is the last to count a selection finds its digit.
#include "../common/mask_math.h"
#include "../common/registration.h"
#include "../common/thresholds.h"
#include "launcher.h"
#include "quads.h"

namespace hypermask {
namespace {

constexpr const char* kOp = "mask_thresholds";

// Up to kMaxSegments segments of all rows; a selection (row, segment) has the number row * total + first + segment.
struct Selections {
  BlockTable blocks;
  int64_t begin[kMaxSegments];
  int64_t size[kMaxSegments];
  const float* logits;  // [rows, entries]
  int64_t entries;
  int64_t first, total;  // of the segments in this launch, of all segments

  __device__ __forceinline__ int64_t item(int segment) const {
    return static_cast<int64_t>(blockIdx.y) * total + first + segment;
  }
};

struct State {
  int64_t left;      // the wanted rank among the entries that share the digits found so far; -1: nothing to select
  uint32_t prefix;   // these digits
  uint32_t counted;  // blocks that are done in this pass
};

__global__ void start_kernel(Selections s, const int64_t* ranks, State* states, uint32_t* counts, float* thresholds) {
  const int64_t item = s.item(blockIdx.x);
  for (int bin = threadIdx.x; bin < kRadixBins; bin += kThreads) counts[item * kRadixBins + bin] = 0;
  if (threadIdx.x == 0) {
    const int64_t rank = ranks[s.first + blockIdx.x];
    const bool exists = rank >= 0 && rank < max(s.size[blockIdx.x], int64_t{1});
    states[item] = {rank > 0 ? rank : -1, 0, 0};
    thresholds[item] = exists ? 0.0f : magnitude_from_key(kMagnitudeBits);  // NaN stays: nobody waits for an error
  }
}

// The sum over the threads before this one. For one call in a kernel.
__device__ __forceinline__ int64_t sum_before(int64_t x) {
  __shared__ int64_t warps[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t sum = x;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int64_t other = __shfl_up_sync(0xffffffffu, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) sum += warps[w];
  return sum - x;
}

// By one block, when all have counted: finds the bin that holds the rank, and clears the counts for the next pass.
__device__ __forceinline__ void descend(int pass, const State& before, State& state, uint32_t* counts,
                                        float& threshold) {
  constexpr int kBins = kRadixBins / kThreads;  // consecutive bins of a thread
  uint32_t bins[kBins];
  int64_t sum = 0;
  for (int b = 0; b < kBins; ++b) {
    uint32_t* bin = counts + threadIdx.x * kBins + b;
    bins[b] = __ldcg(bin);  // where the atomics were made
    *bin = 0;
    sum += bins[b];
  }
  int64_t smaller = sum_before(sum);
  for (int b = 0; b < kBins; ++b) {
    const int64_t next = smaller + bins[b];
    if (smaller <= before.left && before.left < next) {  // true for one bin of one thread
      const uint32_t digit = threadIdx.x * kBins + b;
      const uint32_t found = pass == 0 ? digit : before.prefix << 10 | digit;
      state = {before.left - smaller, found, 0};
      if (pass == kRadixPasses - 1) threshold = magnitude_from_key(found);
    }
    smaller = next;
  }
}

__global__ void count_kernel(Selections s, int pass, State* states, uint32_t* counts, float* thresholds) {
  __shared__ uint32_t bins[kRadixBins];
  __shared__ bool last;
  const int segment = BlockTable::find(s.blocks, blockIdx.x);
  const int64_t item = s.item(segment);
  const State state = states[item];
  if (state.left < 0) return;  // the whole block
  for (int bin = threadIdx.x; bin < kRadixBins; bin += kThreads) bins[bin] = 0;
  __syncthreads();
  const int64_t first = s.blocks.first_block[segment], begin = (blockIdx.x - first) * kTileEntries;
  const float* logits = s.logits + blockIdx.y * s.entries + s.begin[segment] + begin;
  const int entries = static_cast<int>(min(kTileEntries, s.size[segment] - begin));
  for_quads(entries, on_16_bytes(logits), [&](const auto& quad) {
    const Pack<4> logit = quad.load(logits);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const uint32_t key = magnitude_key(logit.x[n]);
      if (quad.has(n) && radix_prefix(key, pass) == state.prefix) atomicAdd(&bins[radix_digit(key, pass)], 1u);
    }
  });
  __syncthreads();
  counts += item * kRadixBins;
  for (int bin = threadIdx.x; bin < kRadixBins; bin += kThreads) {
    if (bins[bin]) atomicAdd(&counts[bin], bins[bin]);  // integers: any order, the same sum
  }
  __threadfence();  // this thread's counts are there before its block is counted as done
  __syncthreads();
  const int64_t blocks = s.blocks.first_block[segment + 1] - first;
  if (threadIdx.x == 0) last = atomicAdd(&states[item].counted, 1u) + 1 == blocks;
  __syncthreads();
  if (last) descend(pass, state, states[item], counts, thresholds[item]);
}

Tensor mask_thresholds(const Tensor& logits, const Offsets& offsets, const Tensor& ranks) {
  const int64_t entries = check_thresholds(kOp, logits, offsets, ranks, Place::gpu_of(logits));
  const int64_t total = segments(offsets);
  int64_t rows = 1;  // also of logits without entries, whose thresholds are 0
  for (int64_t d = 0; d < logits.dim() - 1; ++d) rows *= logits.size(d);
  if (rows > 65535) fail(kOp, rows, " rows are more than the 65535 of one launch");
  Shape shape = shape_of(logits);
  shape.back() = total;
  Tensor thresholds = empty_float(logits, shape);
  if (thresholds.numel() == 0) return thresholds;
  const Launcher gpu(kOp, logits);
  Tensor states = empty_of(logits, {rows * total * static_cast<int64_t>(sizeof(State) / 8)}, ScalarType::Long);
  Tensor counts = empty_of(logits, {rows * total * kRadixBins}, ScalarType::Int);
  auto* states_data = reinterpret_cast<State*>(states.mutable_data_ptr<int64_t>());
  auto* counts_data = reinterpret_cast<uint32_t*>(counts.mutable_data_ptr<int32_t>());
  for (int64_t first = 0; first < total; first += kMaxSegments) {
    const int count = static_cast<int>(std::min<int64_t>(kMaxSegments, total - first));
    Selections s{};
    for (int i = 0; i < count; ++i) {
      s.begin[i] = offsets[first + i];
      s.size[i] = offsets[first + i + 1] - offsets[first + i];
    }
    fill_table(s.blocks, s.size, count);
    s.logits = data(logits);
    s.entries = entries;
    s.first = first;
    s.total = total;
    const dim3 each(count, rows), tiles(s.blocks.first_block[count], rows);
    gpu.launch(start_kernel, each, kThreads, 0, s, ranks.const_data_ptr<int64_t>(), states_data, counts_data,
               mutable_data(thresholds));
    for (int pass = 0; pass < kRadixPasses && tiles.x > 0; ++pass) {
      gpu.launch(count_kernel, tiles, kThreads, 0, s, pass, states_data, counts_data, mutable_data(thresholds));
    }
  }
  return thresholds;
}

}  // namespace

HM_CUDA(m) { m.impl("mask_thresholds", TORCH_BOX(&mask_thresholds)); }

}  // namespace hypermask
