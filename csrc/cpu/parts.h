// Work cut into parts that depend on the sizes alone, never on the number of threads: so sums are the same bits for
// any.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace hypermask {

struct Part {
  int64_t item;        // which segment
  int64_t begin, end;  // entries within it
};

constexpr int64_t kPartEntries = 16384;

// Cuts item i, of sizes[i] entries, into runs of at most `entries`.
inline std::vector<Part> cut(const std::vector<int64_t>& sizes, int64_t entries = kPartEntries) {
  std::vector<Part> parts;
  parts.reserve(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) {
    for (int64_t begin = 0; begin < sizes[i]; begin += entries) {
      parts.push_back({static_cast<int64_t>(i), begin, std::min(begin + entries, sizes[i])});
    }
  }
  return parts;
}

// f(part, index) for all parts, on torch's threads; small work stays on the caller's.
template <class F>
void for_parts(const std::vector<Part>& parts, const F& f) {
  int64_t entries = 0;
  for (const Part& part : parts) entries += part.end - part.begin;
  const auto count = static_cast<int64_t>(parts.size());
  const int64_t grain = entries < kPartEntries ? count : 1;
  torch::stable::parallel_for(0, count, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(parts[i], i);
  });
}

inline std::vector<int64_t> segment_sizes(const std::vector<int64_t>& offsets, size_t count) {
  std::vector<int64_t> sizes(count);
  for (size_t s = 0; s < count; ++s) sizes[s] = offsets[s + 1] - offsets[s];
  return sizes;
}

}  // namespace hypermask
