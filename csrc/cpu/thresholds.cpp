// mask_thresholds: exact selection by radix, three passes over the order-preserving key of |a|.
#include <algorithm>
#include <memory>
#include <vector>

#include "../common/mask_math.h"
#include "../common/registration.h"
#include "../common/thresholds.h"
#include "isa.h"
#include "parts.h"

namespace hypermask {
namespace {

constexpr const char* kOp = "mask_thresholds";
constexpr int64_t kRadixEntries = 32768;  // below 2^16: the kernels count in 16 bits
constexpr int64_t kFewEntries = 256;      // below, sorting partly is quicker than clearing the tables

// One segment of one row of logits, its wanted rank, and the digits of the answer found so far.
struct Selection {
  const float* logits;
  int64_t size;
  int64_t rank;
  float* result;
  uint32_t prefix = 0;

  // Goes down into the bin that holds the rank.
  void descend(const uint32_t* counts, int pass) {
    uint32_t bin = 0;
    while (rank >= counts[bin]) rank -= counts[bin++];
    prefix = pass == 0 ? bin : prefix << 10 | bin;
    if (pass == kRadixPasses - 1) *result = magnitude_from_key(prefix);
  }
};

void select_few(Selection& s) {
  uint32_t keys[kFewEntries];
  for (int64_t i = 0; i < s.size; ++i) keys[i] = magnitude_key(s.logits[i]);
  std::nth_element(keys, keys + s.rank, keys + s.size);
  *s.result = magnitude_from_key(keys[s.rank]);
}

void select_alone(Selection& s, const Kernels& k) {
  if (s.size <= kFewEntries) return select_few(s);
  uint32_t counts[kRadixBins];
  for (int pass = 0; pass < kRadixPasses; ++pass) {
    k.radix_count(s.logits, s.size, pass, s.prefix, counts);
    s.descend(counts, pass);
  }
}

// Selections too large for one part: every pass counts all parts in parallel, then adds the counts of each selection.
void select_together(std::vector<Selection>& large, const Kernels& k) {
  std::vector<int64_t> sizes;
  for (const Selection& s : large) sizes.push_back(s.size);
  const std::vector<Part> parts = cut(sizes, kRadixEntries);
  std::vector<size_t> first(large.size() + 1, parts.size());
  for (size_t i = parts.size(); i-- > 0;) first[parts[i].item] = i;
  const std::unique_ptr<uint32_t[]> counts(new uint32_t[parts.size() * kRadixBins]);
  for (int pass = 0; pass < kRadixPasses; ++pass) {
    for_parts(parts, [&](const Part& part, int64_t i) {
      const Selection& s = large[part.item];
      k.radix_count(s.logits + part.begin, part.end - part.begin, pass, s.prefix, &counts[i * kRadixBins]);
    });
    // Few selections are quicker summed here than by waking the threads.
    torch::stable::parallel_for(0, static_cast<int64_t>(large.size()), 8, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        Selection& s = large[item];
        uint32_t* total = &counts[first[item] * kRadixBins];
        const int bins = pass == 0 ? kRadixBins : kRadixBins / 2;
        // Bins of all parts together stay below 2^32: a segment of more entries than that is refused.
        for (size_t i = first[item] + 1; i < first[item + 1]; ++i) {
          for (int b = 0; b < bins; ++b) total[b] += counts[i * kRadixBins + b];
        }
        s.descend(total, pass);
      }
    });
  }
}

Tensor mask_thresholds(const Tensor& logits, const Offsets& offsets, const Tensor& ranks) {
  const int64_t entries = check_thresholds(kOp, logits, offsets, ranks, Place::kCpu);
  const int64_t count = segments(offsets), rows = entries ? logits.numel() / entries : 0;
  const int64_t* rank = ranks.const_data_ptr<int64_t>();
  for (int64_t s = 0; s < count; ++s) {
    const int64_t size = offsets[s + 1] - offsets[s];
    if (rank[s] < 0 || rank[s] >= std::max<int64_t>(size, 1)) {
      fail(kOp, "rank ", rank[s], " is outside segment ", s, " of ", size, " entries");
    }
  }
  Shape shape = shape_of(logits);
  shape.back() = count;
  Tensor result = empty_float(logits, shape);
  float* out = mutable_data(result);
  std::fill(out, out + result.numel(), 0.0f);
  std::vector<Selection> small, large;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t s = 0; s < count; ++s) {
      const int64_t size = offsets[s + 1] - offsets[s];
      if (rank[s] == 0 || size == 0) continue;
      (size <= kRadixEntries ? small : large)
          .push_back({data(logits) + row * entries + offsets[s], size, rank[s], out + row * count + s});
    }
  }
  const Kernels& k = kernels();
  std::vector<int64_t> sizes;
  for (const Selection& s : small) sizes.push_back(s.size);
  for_parts(cut(sizes, kRadixEntries), [&](const Part& part, int64_t) { select_alone(small[part.item], k); });
  if (!large.empty()) select_together(large, k);
  return result;
}

}  // namespace

HM_SCHEMAS(m) { m.def("mask_thresholds(Tensor logits, int[] offsets, Tensor ranks) -> Tensor"); }

HM_CPU(m) { m.impl("mask_thresholds", TORCH_BOX(&mask_thresholds)); }

}  // namespace hypermask
