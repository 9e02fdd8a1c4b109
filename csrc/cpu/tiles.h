// How the products of a dense layer are cut into tiles of sizes that the compiler knows, and how the memory of later
// rows is asked for meanwhile.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace hypermask {
namespace {

// For lambdas in the inner loops: as calls they would cost as much as a narrow layer's whole product.
#define HM_LAMBDA __attribute__((always_inline))

constexpr int kLine = 16;  // floats in a cache line

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

// A later block of rows is asked for while this one is worked on, so that the memory is busy all the time: its weights
// a few cache lines at a time in step with the products (AheadOfProducts), its moments by each vector of Adam's that
// steps this one's (AheadOfStep).
//
// Narrow layers' next block comes into the L1 cache; where that can't hold it beside this one, a later block comes into
// L2, as more lines can be under way there. The L1 cache has 32768 bytes and holds other things as well.
constexpr int64_t kNear = 20480;               // bytes of two blocks
constexpr int kFarProducts = 2, kFarStep = 3;  // blocks

HM_INLINE bool next_block_in_l1(const DenseLayer& d, int rows) {
  const int64_t bytes = d.weight_out ? (d.rounded_m ? 8 : 12) : 4;  // of an entry
  return 2 * bytes * rows * d.width <= kNear;
}

template <bool kL1>
HM_INLINE void ask(const void* p) {
  __builtin_prefetch(p, 0, kL1 ? 3 : 2);
}

HM_INLINE int64_t products_of_pass(const DenseLayer& d, bool hidden) {
  return (d.factors ? 0 : d.drift_tasks) + (hidden ? d.tasks : 0);
}

// Whether the products ask for the weights, or Adam does. One task's hidden gradient alone is over too soon.
HM_INLINE bool products_ask(const DenseLayer& d, bool hidden) {
  return !d.weight_out || products_of_pass(d, hidden) > 1;
}

class AheadOfProducts {
 public:
  // Of `rows` rows from `row` on. hidden: whether the hidden vectors' gradient is part of the work.
  HM_INLINE AheadOfProducts of_block(const DenseLayer& d, int64_t row, int rows, bool hidden) {
    AheadOfProducts a;
    a.near_ = next_block_in_l1(d, rows);
    a.next_ = d.weight + (row + (a.near_ ? 1 : kFarProducts) * rows) * d.width;
    a.lines_ = products_ask(d, hidden) ? rows * d.width / kLine : 0;
    a.work_ = rows * d.width * products_of_pass(d, hidden);
    return a;
  }

  // `work` more multiply-adds are done.
  HM_INLINE void advance(AheadOfProducts& a, int64_t work) {
    a.done_ += work * a.lines_;
    for (; a.asked_ < a.lines_ && a.asked_ * a.work_ < a.done_; ++a.asked_) {
      const float* line = a.next_ + a.asked_ * kLine;
      a.near_ ? ask<true>(line) : ask<false>(line);
    }
  }

 private:
  const float* next_;
  bool near_;
  int64_t lines_, work_, done_ = 0, asked_ = 0;
};

// How many entries beyond those that Adam steps the layer's memory is asked for.
struct AheadOfStep {
  int64_t weight, moments;  // 0: not asked for here

  HM_INLINE AheadOfStep of_block(const DenseLayer& d, int rows, bool hidden) {
    const int64_t entries = (next_block_in_l1(d, rows) ? 1 : kFarStep) * rows * d.width;
    return {products_ask(d, hidden) ? 0 : entries, entries};
  }
};

}  // namespace
}  // namespace hypermask
