// How flat work over segments is dealt to blocks; plain arithmetic, so that it is tested without a GPU.
#pragma once

#include "portable.h"

namespace hypermask {

constexpr int kThreads = 256;  // of a block

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

// How the dense kernel lays out a block's work. Threads hold packs of 4 floats where every row begins on 16 bytes, else
// single floats; a tile of the layer is kDensePacks packs per thread: `lanes` rows side by side, kDensePacks times.
constexpr int kDensePacks = 4;

struct DenseLayout {
  int pack;    // floats
  int packs;   // of a row
  int lanes;   // rows side by side
  int rows;    // of a tile
  int stride;  // floats between rows in shared memory: an odd number of packs, so that a column meets no bank twice
  int chunk;   // tasks whose sums a thread holds at once
  int slots;   // tasks, rounded up to whole chunks, at least one
};

static inline DenseLayout dense_layout(int64_t tasks, int64_t width, bool aligned) {
  DenseLayout l;
  l.pack = aligned && width % 4 == 0 ? 4 : 1;
  l.packs = static_cast<int>(width / l.pack);
  l.lanes = l.packs < kThreads ? kThreads / l.packs : 1;
  if (l.lanes > kThreads / 4) l.lanes = kThreads / 4;
  l.rows = l.lanes * kDensePacks;
  l.stride = (l.packs | 1) * l.pack;
  l.chunk = l.pack == 4 && tasks > 16 ? 8 : 4;
  l.slots = static_cast<int>(ceil_div(tasks > 0 ? tasks : 1, l.chunk)) * l.chunk;
  return l;
}

// Shared memory: two tiles of W, one of m and of v, the hidden vectors, and the factors g of the tile.
static inline int64_t dense_shared_floats(const DenseLayout& l) {
  return int64_t{4} * l.rows * l.stride + static_cast<int64_t>(l.slots) * (l.stride + l.rows);
}

}  // namespace hypermask
