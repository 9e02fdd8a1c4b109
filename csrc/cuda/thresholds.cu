// mask_thresholds on the GPU: radix selection over all rows and segments, three counting passes, no host sync.
#include "../common/mask_math.h"
#include "cuda_ops.h"
#include "device.h"
#include "launcher.h"

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
};

// State of a selection: its wanted rank among the entries that share the digits found so far (-1: nothing to select).
__global__ void start_kernel(Selections s, const int64_t* ranks, int64_t* left, uint32_t* prefix, uint32_t* counts,
                             float* thresholds) {
  const int64_t item = static_cast<int64_t>(blockIdx.y) * s.total + s.first + blockIdx.x;
  for (int bin = threadIdx.x; bin < kRadixBins; bin += kThreads) counts[item * kRadixBins + bin] = 0;
  if (threadIdx.x == 0) {
    const int64_t size = s.size[blockIdx.x], rank = ranks[s.first + blockIdx.x];
    left[item] = size == 0 || rank <= 0 ? -1 : rank < size ? rank : size - 1;
    prefix[item] = 0;
    thresholds[item] = 0.0f;
  }
}

__global__ void count_kernel(Selections s, int pass, const int64_t* left, const uint32_t* prefix, uint32_t* counts) {
  __shared__ uint32_t bins[kRadixBins];
  const int segment = BlockTable::find(s.blocks, blockIdx.x);
  const int64_t item = static_cast<int64_t>(blockIdx.y) * s.total + s.first + segment;
  if (left[item] < 0) return;  // the whole block
  for (int bin = threadIdx.x; bin < kRadixBins; bin += kThreads) bins[bin] = 0;
  __syncthreads();
  const int64_t begin = (blockIdx.x - s.blocks.first_block[segment]) * kTileEntries;
  const int64_t end = min(begin + kTileEntries, s.size[segment]);
  const float* logits = s.logits + blockIdx.y * s.entries + s.begin[segment];
  const uint32_t wanted = prefix[item];
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const uint32_t key = magnitude_key(logits[i]);
    if (radix_prefix(key, pass) == wanted) atomicAdd(&bins[radix_digit(key, pass)], 1u);
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < kRadixBins; bin += kThreads) {
    if (bins[bin]) atomicAdd(&counts[item * kRadixBins + bin], bins[bin]);  // integers: any order, the same sum
  }
}

// One block per selection: finds the bin that holds the rank, and clears the counts for the next pass.
__global__ void descend_kernel(Selections s, int pass, int64_t* left, uint32_t* prefix, uint32_t* counts,
                               float* thresholds) {
  constexpr int kBins = kRadixBins / kThreads;  // consecutive bins of a thread
  __shared__ int64_t below[kThreads];
  const int64_t item = static_cast<int64_t>(blockIdx.y) * s.total + s.first + blockIdx.x;
  const int64_t rank = left[item];
  if (rank < 0) return;
  uint32_t* mine = counts + item * kRadixBins + threadIdx.x * kBins;
  int64_t sum = 0;
  for (int b = 0; b < kBins; ++b) sum += mine[b];
  below[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    int64_t running = 0;
    for (int t = 0; t < kThreads; ++t) {
      const int64_t here = below[t];
      below[t] = running;
      running += here;
    }
  }
  __syncthreads();
  int64_t before = below[threadIdx.x];
  for (int b = 0; b < kBins; ++b) {
    const int64_t next = before + mine[b];
    if (before <= rank && rank < next) {  // true for one bin of one thread
      const uint32_t digit = threadIdx.x * kBins + b;
      const uint32_t found = pass == 0 ? digit : prefix[item] << 10 | digit;
      prefix[item] = found;
      left[item] = rank - before;
      if (pass == kRadixPasses - 1) thresholds[item] = magnitude_from_key(found);
    }
    before = next;
    mine[b] = 0;
  }
}

}  // namespace

Tensor mask_thresholds_cuda(const Tensor& logits, const Offsets& offsets, const Tensor& ranks) {
  const int64_t entries = check_thresholds(kOp, logits, offsets, ranks, Place::kCuda);
  const int64_t total = segments(offsets), rows = entries ? logits.numel() / entries : 0;
  if (rows > 65535) fail(kOp, rows, " rows are more than the 65535 of one launch");
  Shape shape = shape_of(logits);
  shape.back() = total;
  Tensor thresholds = empty_float(logits, shape);
  if (thresholds.numel() == 0) return thresholds;
  if (rows == 0) fail(kOp, "logits without entries but thresholds asked for");
  const Launcher gpu(kOp, logits);
  Tensor left = empty_of(logits, {rows * total}, ScalarType::Long);
  Tensor prefix = empty_of(logits, {rows * total}, ScalarType::Int);
  Tensor counts = empty_of(logits, {rows * total * kRadixBins}, ScalarType::Int);
  auto* left_data = left.mutable_data_ptr<int64_t>();
  auto* prefix_data = reinterpret_cast<uint32_t*>(prefix.mutable_data_ptr<int32_t>());
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
    gpu.launch(start_kernel, each, kThreads, 0, s, ranks.const_data_ptr<int64_t>(), left_data, prefix_data, counts_data,
               mutable_data(thresholds));
    for (int pass = 0; pass < kRadixPasses && tiles.x > 0; ++pass) {
      gpu.launch(count_kernel, tiles, kThreads, 0, s, pass, left_data, prefix_data, counts_data);
      gpu.launch(descend_kernel, each, kThreads, 0, s, pass, left_data, prefix_data, counts_data,
                 mutable_data(thresholds));
    }
  }
  return thresholds;
}

}  // namespace hypermask
