// mask_overlap: for every segment and every pair of tasks, how many entries both masks keep.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../common/checks.h"
#include "../common/registration.h"
#include "parts.h"

namespace hypermask {
namespace {

constexpr const char* kOp = "mask_overlap";
constexpr int64_t kBits = 64;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HM_FOR_MACHINES __attribute__((target_clones("avx2", "popcnt", "default")))
#else
#define HM_FOR_MACHINES
#endif

// Writes words of 64 bits for n entries, bit i 1 where the mask keeps entry i. "Not smaller" instead of "at least"
// keeps NaN, as the mask does. A byte for each entry first, since compilers make vectors of that; then eight bytes to
// eight bits.
HM_FOR_MACHINES
void kept_bits(const float* a, float threshold, int64_t n, uint64_t* bits) {
  for (int64_t begin = 0; begin < n; begin += kBits) {
    alignas(64) uint8_t kept[kBits] = {};
    if (n - begin >= kBits) {
      for (int64_t i = 0; i < kBits; ++i) kept[i] = !(std::fabs(a[begin + i]) < threshold);
    } else {
      for (int64_t i = 0; i < n - begin; ++i) kept[i] = !(std::fabs(a[begin + i]) < threshold);
    }
    uint64_t word = 0;
    for (int byte = 0; byte < 8; ++byte) {
      uint64_t eight;
      std::memcpy(&eight, kept + 8 * byte, 8);
      word |= (eight * 0x0102040810204080u) >> 56 << (8 * byte);
    }
    bits[begin / kBits] = word;
  }
}

HM_FOR_MACHINES
int64_t count_both(const uint64_t* x, const uint64_t* y, int64_t words) {
  int64_t count = 0;
  for (int64_t w = 0; w < words; ++w) count += __builtin_popcountll(x[w] & y[w]);
  return count;
}

// Every task's masks as bits [tasks, words], each segment from a word of its own: 1/32 of the logits' bytes.
std::vector<uint64_t> all_bits(const Tensor& logits, const Tensor& thresholds, const Offsets& offsets,
                               const std::vector<int64_t>& first_word) {
  const int64_t tasks = logits.size(0), entries = logits.size(1), count = segments(offsets);
  const float *a = data(logits), *limit = data(thresholds);
  std::vector<uint64_t> bits(tasks * first_word.back());
  std::vector<int64_t> sizes;
  for (int64_t item = 0; item < tasks * count; ++item) {
    sizes.push_back(offsets[item % count + 1] - offsets[item % count]);
  }
  static_assert(kPartEntries % kBits == 0, "parts begin at whole words");
  for_parts(cut(sizes), [&](const Part& part, int64_t) {
    const int64_t task = part.item / count, s = part.item % count;
    const float* from = a + task * entries + offsets[s];
    uint64_t* to = &bits[task * first_word.back() + first_word[s]];
    kept_bits(from + part.begin, limit[part.item], part.end - part.begin, to + part.begin / kBits);
  });
  return bits;
}

Tensor mask_overlap(const Tensor& logits, const Tensor& thresholds, const Offsets& offsets) {
  check_float(kOp, "logits", logits, Place::kCpu);
  if (logits.dim() != 2) fail(kOp, "logits must have shape (T, N), not ", to_string(shape_of(logits)));
  check_offsets(kOp, offsets, logits.size(1));
  const int64_t tasks = logits.size(0), count = segments(offsets);
  check_float(kOp, "thresholds", thresholds, Place::kCpu, {tasks, count});
  Tensor result = torch::stable::new_empty(logits, Shape{count, tasks, tasks}, ScalarType::Long);
  int64_t* out = result.mutable_data_ptr<int64_t>();
  std::vector<int64_t> first_word{0};
  for (int64_t s = 0; s < count; ++s) {
    first_word.push_back(first_word[s] + (offsets[s + 1] - offsets[s] + kBits - 1) / kBits);
  }
  const std::vector<uint64_t> bits = all_bits(logits, thresholds, offsets, first_word);
  torch::stable::parallel_for(0, count * tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t s = row / tasks, i = row % tasks, words = first_word[s + 1] - first_word[s];
      const uint64_t* first = bits.data() + first_word[s];
      for (int64_t j = i; j < tasks; ++j) {
        const int64_t both = count_both(first + i * first_word.back(), first + j * first_word.back(), words);
        out[row * tasks + j] = out[(s * tasks + j) * tasks + i] = both;
      }
    }
  });
  return result;
}

}  // namespace

HM_SCHEMAS(m) { m.def("mask_overlap(Tensor logits, Tensor thresholds, int[] offsets) -> Tensor"); }

HM_CPU(m) { m.impl("mask_overlap", TORCH_BOX(&mask_overlap)); }

}  // namespace hypermask
