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

// How the dense kernel lays out a block's work. A tile of the layer is kDensePacks packs of columns per thread: `lanes`
// rows side by side, kDensePacks times. Where rows begin on 16 bytes a pack is 4 floats, which a thread also copies;
// otherwise it is a single float, and a tile, whose rows follow each other without a gap, is copied as one piece.
constexpr int kDensePacks = 4;

struct DenseLayout {
  int pack;           // floats
  int copied;         // floats copied at once
  int packs;          // of a row
  int lanes;          // rows side by side
  int rows;           // of a tile, at most kThreads
  int stride;         // floats between rows in shared memory
  int chunk;          // tasks whose sums a thread holds at once
  int slots;          // tasks, rounded up to whole chunks, at least one
  int hidden_stride;  // floats between hidden vectors in shared memory
  int factor_floats;  // of the factors of a tile
  // By tensor cores only: columns in groups of 16, tasks in blocks of 16, floats between tasks of the factors.
  int groups, blocks, factor_stride;
};

static inline DenseLayout dense_layout(int64_t tasks, int64_t width, bool aligned) {
  DenseLayout l{};
  l.copied = aligned ? 4 : 1;
  l.pack = aligned && width % 4 == 0 ? 4 : 1;
  l.packs = static_cast<int>(width / l.pack);
  l.lanes = l.packs < kThreads ? kThreads / l.packs : 1;
  if (l.lanes > kThreads / 4) l.lanes = kThreads / 4;
  l.rows = l.lanes * kDensePacks;
  l.stride = l.pack == 4 ? (l.packs | 1) * 4 : l.packs;  // an odd number of packs: a column's rows meet no bank twice
  l.chunk = tasks > (l.pack == 4 ? 16 : 4) ? 8 : 4;
  l.slots = static_cast<int>(ceil_div(tasks > 0 ? tasks : 1, l.chunk)) * l.chunk;
  l.hidden_stride = l.stride;
  l.factor_floats = l.rows * l.slots;
  return l;
}

// From so many tasks on, and where rows begin on 16 bytes, the two gradients are made by tensor cores: by count
// multiply-adds outlast the layer's bytes from 23 tasks on (docs/design/gpu-dense-pass.md).
constexpr int kTensorTasks = 24;
constexpr int kTensorRows = 32, kTensorSide = 16;  // rows of a unit of the weight's gradient, its columns

static inline bool on_tensor_cores(int64_t tasks, int64_t width, bool aligned, int64_t from = kTensorTasks) {
  return aligned && width % 4 == 0 && tasks >= from;
}

// A unit of the weight's gradient, kTensorRows x kTensorSide, is a warp's; a tile has about one for each warp. Strides
// of 8 or 24 banks beyond a multiple of 32: four tasks by eight neighbours, as fragments are read, meet no bank twice.
static inline DenseLayout tensor_layout(int64_t tasks, int64_t width) {
  DenseLayout l = dense_layout(tasks, width, true);
  l.groups = static_cast<int>(ceil_div(width, kTensorSide));
  l.blocks = static_cast<int>(ceil_div(tasks, kTensorSide));
  const int side_by_side = kThreads / 32 / l.groups;
  l.rows = kTensorRows * (side_by_side > 1 ? side_by_side : 1);
  l.chunk = 8;
  l.slots = static_cast<int>(ceil_div(tasks, l.chunk)) * l.chunk;
  l.hidden_stride = static_cast<int>(ceil_div(width, 8)) * 8;
  if (l.hidden_stride % 16 == 0) l.hidden_stride += 8;
  l.factor_stride = l.rows + 8;
  l.factor_floats = l.blocks * kTensorSide * l.factor_stride;
  return l;
}

// Tiles of the layer in shared memory: two of W, where it is stepped one of m and of v, and where its gradient is made
// by single floats one of that.
static inline int dense_tiles(const DenseLayout& l, bool makes_weights, bool steps_weights) {
  return 2 + (steps_weights ? 2 : 0) + (makes_weights && l.pack == 1 ? 1 : 0);
}

constexpr int kStaticShared = 256;  // bytes that a kernel over the dense layer has besides, at most

// Shared memory: the tiles; the hidden vectors; the factors g of one tile.
static inline int64_t dense_shared_floats(const DenseLayout& l, int tiles) {
  return static_cast<int64_t>(tiles) * l.rows * l.stride + static_cast<int64_t>(l.slots) * l.hidden_stride +
         l.factor_floats;
}

}  // namespace hypermask
