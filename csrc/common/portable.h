// What lets one piece of arithmetic compile for the host, for every vector width of the host, and for CUDA.
#pragma once

#include <cstdint>
#include <cstring>

// Internal linkage and forced inlining: the same header is compiled with different instruction sets, and the
// linker must never merge a copy made for AVX-512 with one that has to run without it.
#if defined(__CUDACC__)
#define HM_INLINE __host__ __device__ static __forceinline__
#else
#define HM_INLINE static inline __attribute__((always_inline))
#endif

namespace hypermask {

// The few operations that differ between a float and a vector of floats.
template <class F>
struct Lane;

template <>
struct Lane<float> {
  using Int = int32_t;
  using Unsigned = uint32_t;
  using Mask = bool;
  HM_INLINE float select(bool condition, float yes, float no) { return condition ? yes : no; }
  HM_INLINE Int bits(float x) {
    Int i;
    std::memcpy(&i, &x, sizeof i);
    return i;
  }
  HM_INLINE float from_bits(Int i) {
    float x;
    std::memcpy(&x, &i, sizeof x);
    return x;
  }
  // On the GPU within 2 ulp, denormals included, and without the branches that exact rounding takes; x / y for y of
  // 2^-126 to 2^126, 0, Inf and NaN.
#if defined(__CUDA_ARCH__)
  HM_INLINE float sqrt(float x) {
    float root;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
    return root;
  }
  HM_INLINE float divide(float x, float y) { return __fdividef(x, y); }
#else
  HM_INLINE float sqrt(float x) { return __builtin_sqrtf(x); }
  HM_INLINE float divide(float x, float y) { return x / y; }
#endif
  HM_INLINE float broadcast(float x) { return x; }
  // The lower half of x, made of both of its halves.
  HM_INLINE uint32_t both_halves(uint32_t x) { return (x ^ x >> 16) & 0xffffu; }
  // x + y where `what`, at most 2^31 - 1, is below a limit, otherwise x.
  HM_INLINE uint32_t add_below(uint32_t x, uint32_t y, uint32_t what, int32_t limit) {
    return static_cast<int32_t>(what) < limit ? x + y : x;
  }
  // x, or `least` where that is more and `what` is not 0.
  HM_INLINE uint32_t at_least(uint32_t x, uint32_t least, uint32_t what) { return what && x < least ? least : x; }
};

constexpr int32_t kMagnitudeBits = 0x7fffffff;

// |x|; the sign bit of a NaN goes too.
template <class F>
HM_INLINE F magnitude(F x) {
  return Lane<F>::from_bits(Lane<F>::bits(x) & kMagnitudeBits);
}

}  // namespace hypermask
