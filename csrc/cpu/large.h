// Large results, which PyTorch's allocator takes from the system each time anew.
#pragma once

#include "../common/checks.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hypermask {

// empty_float, of a large one in huge pages where the system has them: of 4 kB pages each is a fault of its own when it
// is first written, and these take as long as the writing.
inline Tensor large_float(const Tensor& like, const Shape& shape) {
  Tensor result = empty_float(like, shape);
#if defined(__linux__)
  constexpr uintptr_t kHuge = 1 << 21, kLarge = 1 << 25;  // below 32 MiB memory is mostly kept for the next call
  const auto begin = reinterpret_cast<uintptr_t>(mutable_data(result));
  const uintptr_t bytes = sizeof(float) * static_cast<uintptr_t>(result.numel());
  if (bytes >= kLarge) {
    const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = (begin + bytes) / kHuge * kHuge;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return result;
}

}  // namespace hypermask
