// Argument checks of mask_thresholds.
#pragma once

#include "checks.h"

namespace hypermask {

inline int64_t check_thresholds(const char* op, const Tensor& logits, const Offsets& offsets, const Tensor& ranks,
                                Place place) {
  check_float(op, "logits", logits, place);
  if (logits.dim() < 1) fail(op, "logits must have at least one dimension");
  const int64_t entries = logits.size(logits.dim() - 1);
  check_offsets(op, offsets, entries);
  check_tensor(op, "ranks", ranks, place, ScalarType::Long);
  if (ranks.dim() != 1 || ranks.numel() != segments(offsets)) {
    fail(op, "ranks must have shape (", segments(offsets), ",), not ", to_string(shape_of(ranks)));
  }
  for (size_t s = 1; s < offsets.size(); ++s) {  // entries are counted in 32 bits
    const int64_t size = offsets[s] - offsets[s - 1];
    if (size > UINT32_MAX) fail(op, "segment ", s - 1, " has ", size, " entries, more than 2^32 - 1");
  }
  return entries;
}

}  // namespace hypermask
