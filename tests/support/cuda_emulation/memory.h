// Torch's memory for the emulation: every tensor between two protected pages.
#pragma once

#include <cstddef>
#include <memory>

namespace emulation {

// While on, a new CPU tensor ends at a protected page, or begins behind one; the rest of its own pages is full of NaN.
enum class Guard { kOff, kBehind, kBefore };
void set_guard(Guard where);
std::shared_ptr<void> allocate(size_t bytes);  // as for a tensor

// "" or what was written beside a tensor since the last call, on the pages that are its own.
const char* damage();

}  // namespace emulation
