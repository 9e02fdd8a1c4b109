// How the products of a dense layer are cut into tiles of sizes that the compiler knows, and how the memory of later
// rows is asked for meanwhile.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace hypermask {
namespace {

// For lambdas in the inner loops: as calls they would cost as much as a narrow layer's whole product.
#define HM_LAMBDA __attribute__((always_inline))

constexpr int kLine = 16;      // floats in a cache line
constexpr int kAdamWork = 12;  // Adam on an entry takes about as long as this many multiply-adds

template <int kN>
struct Size {
  static constexpr int value = kN;
};

// Calls f(Size<n>) for kMin <= n <= kMax.
template <int kMax, int kMin = 1, class F>
HM_INLINE void with_size(int n, const F& f) {
  if constexpr (kMax == kMin) {
    f(Size<kMin>{});
  } else {
    if (n == kMax) {
      f(Size<kMax>{});
    } else {
      with_size<kMax - 1, kMin>(n, f);
    }
  }
}

// A total split into the fewest tiles of at most kMax, of nearly equal size. Made once, or once a block: it takes a
// division.
template <int kMax>
struct Tiles {
  int64_t count, size, larger;  // the first `larger` tiles have one more

  static Tiles of(int64_t total) {
    const int64_t count = (total + kMax - 1) / kMax;
    return {count, count ? total / count : 0, count ? total % count : 0};
  }
};

// f(Size, start) for every tile, where none is of less than kMin.
template <int kMin = 1, int kMax, class F>
HM_INLINE void for_tiles(const Tiles<kMax>& tiles, const F& f) {
  int64_t begin = 0;
  for (int64_t k = 0; k < tiles.count; ++k) {
    const int64_t size = tiles.size + (k < tiles.larger);
    with_size<kMax, kMin>(static_cast<int>(size), [&](auto n) HM_LAMBDA { f(n, begin); });
    begin += size;
  }
}

// Asks for a later block of W, m and v a few cache lines at a time, in step with the work on this one: so the memory is
// busy all through the block, not only where the block itself reads and writes. Narrow layers' next block comes into
// the L1 cache; where that can't hold it beside this one, the block after the next comes into L2, as more lines can be
// under way there.
class Ahead {
 public:
  // Of `rows` rows from `row` on. hidden: whether the hidden vectors' gradient is part of the work.
  HM_INLINE Ahead of_block(const DenseLayer& d, int64_t row, int rows, bool hidden) {
    Ahead a;
    a.arrays_ = d.weight_out ? 3 : 1;
    a.halves_ = d.rounded_m != nullptr;
    const int64_t bytes = d.weight_out ? (a.halves_ ? 8 : 12) : 4;  // of an entry
    a.near_ = 2 * bytes * rows * d.width <= (a.halves_ ? kNearHalves : kNear);
    const int64_t later = (row + (a.near_ ? 1 : 2) * rows) * d.width;
    a.array_[0] = reinterpret_cast<const char*>(d.weight + later);
    a.array_[1] =
        reinterpret_cast<const char*>(a.halves_ ? static_cast<const void*>(d.rounded_m + later) : d.weight_m + later);
    a.array_[2] =
        reinterpret_cast<const char*>(a.halves_ ? static_cast<const void*>(d.rounded_v + later) : d.weight_v + later);
    a.lines_ = rows * d.width / kLine;
    const int64_t products = (d.factors ? 0 : d.drift_tasks) + (hidden ? d.tasks : 0);
    const int64_t weights = d.weight_out ? d.tasks + kAdamWork : d.grad_weight ? d.tasks : 0;
    a.work_ = rows * d.width * (products + weights);
    if (a.work_ == 0) a.work_ = 1;  // no tasks: there is nothing to do in the meantime
    return a;
  }

  // `work` more multiply-adds are done.
  HM_INLINE void advance(Ahead& a, int64_t work) {
    a.done_ += work * a.lines_;
    for (; a.asked_ < a.lines_ && a.asked_ * a.work_ < a.done_; ++a.asked_) {
      const int arrays = a.halves_ && a.asked_ % 2 ? 1 : a.arrays_;  // with half as many lines of the others
      for (int i = 0; i < arrays; ++i) {
        const char* line = a.array_[i] + (i && a.halves_ ? a.asked_ / 2 : a.asked_) * 64;
        a.near_ ? __builtin_prefetch(line, 0, 3) : __builtin_prefetch(line, 0, 2);
      }
    }
  }

 private:
  // Bytes; the L1 cache has 32768 and holds other things as well. With moments in bfloat16 more of it pays, as less is
  // waited for: the arithmetic is the same for fewer bytes.
  static constexpr int64_t kNear = 20480, kNearHalves = 25600;
  const char* array_[3];
  int arrays_;
  bool near_, halves_;  // halves_: the moments are in bfloat16
  int64_t lines_, work_, done_ = 0, asked_ = 0;
};

}  // namespace
}  // namespace hypermask
