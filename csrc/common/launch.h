// How flat work over segments is dealt to blocks; plain arithmetic, so that it is tested without a GPU.
#pragma once

#include "portable.h"

namespace hypermask {

// Segments that one launch serves: what is passed by value must fit 4 KiB of kernel arguments.
constexpr int kMaxSegments = 64;
constexpr int64_t kTileEntries = 4096;  // entries of one segment that one block handles

HM_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Segment s owns blocks first_block[s] to first_block[s + 1]; empty segments own none.
struct BlockTable {
  int count;
  int64_t first_block[kMaxSegments + 1];

  // The segment of a block: the last one whose first block is not beyond it.
  HM_INLINE int find(const BlockTable& table, int64_t block) {
    int low = 0, high = table.count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (table.first_block[middle] <= block) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

static inline void fill_table(BlockTable& table, const int64_t* sizes, int count) {
  table.count = count;
  table.first_block[0] = 0;
  for (int s = 0; s < count; ++s) table.first_block[s + 1] = table.first_block[s] + ceil_div(sizes[s], kTileEntries);
}

// Shared memory of the dense kernel, in floats: the tile of W with rows at an odd distance (no bank conflicts), the
// hidden vectors, their gradient, and the factors g of the tile.
constexpr int kDenseRows = 32;

HM_INLINE int64_t dense_stride(int64_t width) { return width | 1; }
HM_INLINE int64_t dense_shared_floats(int64_t tasks, int64_t width) {
  return kDenseRows * dense_stride(width) + 2 * tasks * width + tasks * (kDenseRows + 1);
}

}  // namespace hypermask
