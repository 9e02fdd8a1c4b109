#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <string>

#include "../common/checks.h"
#include "../common/registration.h"

namespace hypermask {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

bool machine_has(int64_t isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == 2) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  }
  if (isa == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == 0;
}

int first_choice() {
  int best = machine_has(2) ? 2 : machine_has(1) ? 1 : 0;
  if (const char* wanted = std::getenv("HYPERMASK_CPU_ISA")) {
    for (int isa = 0; isa <= best; ++isa) {
      if (std::string(wanted) == kNames[isa] && machine_has(isa)) return isa;
    }
  }
  return best;
}

std::atomic<int>& choice() {
  static std::atomic<int> isa{first_choice()};
  return isa;
}

// 0 baseline, 1 AVX2, 2 AVX-512; other numbers only ask. Returns the choice in force. A set that the machine or the
// build lacks is an error.
int64_t cpu_isa(int64_t isa) {
  if (isa >= 0 && isa <= 2) {
    if (!machine_has(isa)) fail("cpu_isa", kNames[isa], " is not to be had on this machine");
    choice() = static_cast<int>(isa);
  }
  return choice();
}

}  // namespace

const Kernels& kernels() {
#if defined(__x86_64__)
  const int isa = choice().load(std::memory_order_relaxed);
  if (isa == 2) return kernels_avx512();
  if (isa == 1) return kernels_avx2();
#endif
  return kernels_baseline();
}

HM_SCHEMAS(m) { m.def("cpu_isa(int isa) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(hypermask_native, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

}  // namespace hypermask
