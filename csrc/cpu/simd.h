// Vectors of HM_LANES floats: 16 with AVX-512, 8 with AVX2, else 4. The file that includes this one (kernels_*.cpp)
// says which, beside its target pragma: g++ does not define __AVX2__ and the like for a pragma. GCC's vector types
// carry the arithmetic; only loads of a part, square roots and sums over lanes need more.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../common/portable.h"

namespace hypermask {

constexpr int kLanes = HM_LANES;

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef float Quad __attribute__((vector_size(16)));

template <>
struct Lane<Vec> {
  using Int = IntVec;
  using Mask = IntVec;
  HM_INLINE Vec select(IntVec condition, Vec yes, Vec no) { return condition ? yes : no; }
  HM_INLINE IntVec bits(Vec x) { return (IntVec)x; }
  HM_INLINE Vec from_bits(IntVec i) { return (Vec)i; }
  HM_INLINE Vec broadcast(float x) { return x - Vec{}; }
  // x / y within 1 ulp for finite x and normal y in the range of Adam's denominators (y and 1/y not denormal).
  HM_INLINE Vec divide(Vec x, Vec y) {
#if HM_LANES == 16
    const __m512 n = (__m512)x, d = (__m512)y, two = _mm512_set1_ps(2.0f);
    __m512 r = _mm512_rcp14_ps(d);
    r = _mm512_mul_ps(r, _mm512_fnmadd_ps(d, r, two));
    const __mmask16 odd = _mm512_fpclass_ps_mask(d, 0x01 | 0x02 | 0x04 | 0x08 | 0x10 | 0x20 | 0x80);
    if (__builtin_expect(odd, 0)) return x / y;
    return (Vec)_mm512_mul_ps(n, r);
#else
    return x / y;
#endif
  }
  HM_INLINE Vec sqrt(Vec x) {
#if HM_LANES == 16
    return (Vec)_mm512_sqrt_ps((__m512)x);
#elif HM_LANES == 8
    return (Vec)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
    return (Vec)_mm_sqrt_ps((__m128)x);
#else
    for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
  }
};

HM_INLINE Vec broadcast(float x) { return Lane<Vec>::broadcast(x); }

HM_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

HM_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// The first count lanes, 0 < count < kLanes; the others are 0 and their memory is not touched.
HM_INLINE Vec load_part(const float* p, int count) {
#if HM_LANES == 16
  return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#elif HM_LANES == 8
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return (Vec)_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane));
#else
  Vec v{};
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return v;
#endif
}

HM_INLINE void store_part(float* p, Vec v, int count) {
#if HM_LANES >= 8
  // By halves: with a masked store AMD lets the loads of what lies behind it wait, the next row's first vector.
#if HM_LANES == 16
  __m256 eight = _mm512_castps512_ps256((__m512)v);
  if (count & 8) {
    _mm256_storeu_ps(p, eight);
    eight = _mm512_extractf32x8_ps((__m512)v, 1);
    p += 8;
  }
#else
  const __m256 eight = (__m256)v;
#endif
  __m128 four = _mm256_castps256_ps128(eight);
  if (count & 4) {
    _mm_storeu_ps(p, four);
    four = _mm256_extractf128_ps(eight, 1);
    p += 4;
  }
  if (count & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), four);
    four = _mm_movehl_ps(four, four);
    p += 2;
  }
  if (count & 1) _mm_store_ss(p, four);
#else
  for (int i = 0; i < count; ++i) p[i] = v[i];
#endif
}

HM_INLINE Vec load_up_to(const float* p, int64_t count) {
  return count >= kLanes ? load(p) : load_part(p, static_cast<int>(count));
}

HM_INLINE void store_up_to(float* p, Vec v, int64_t count) {
  if (count >= kLanes) {
    store(p, v);
  } else {
    store_part(p, v, static_cast<int>(count));
  }
}

// Sum of the vector's groups of four lanes.
HM_INLINE Quad fold(Vec v) {
#if HM_LANES == 16
  const __m512 x = (__m512)v;
  return ((Quad)_mm512_castps512_ps128(x) + (Quad)_mm512_extractf32x4_ps(x, 1)) +
         ((Quad)_mm512_extractf32x4_ps(x, 2) + (Quad)_mm512_extractf32x4_ps(x, 3));
#elif HM_LANES == 8
  return (Quad)_mm256_castps256_ps128((__m256)v) + (Quad)_mm256_extractf128_ps((__m256)v, 1);
#else
  return v;
#endif
}

HM_INLINE float sum_lanes(Vec v) {
  const Quad q = fold(v);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

// The sums over the lanes of four vectors.
HM_INLINE Quad sum_lanes(Vec a, Vec b, Vec c, Vec d) {
  typedef int32_t Pick __attribute__((vector_size(16)));
  const Quad qa = fold(a), qb = fold(b), qc = fold(c), qd = fold(d);
  const Quad ab = __builtin_shuffle(qa, qb, (Pick){0, 1, 4, 5}) + __builtin_shuffle(qa, qb, (Pick){2, 3, 6, 7});
  const Quad cd = __builtin_shuffle(qc, qd, (Pick){0, 1, 4, 5}) + __builtin_shuffle(qc, qd, (Pick){2, 3, 6, 7});
  return __builtin_shuffle(ab, cd, (Pick){0, 2, 4, 6}) + __builtin_shuffle(ab, cd, (Pick){1, 3, 5, 7});
}

// sums[j] = sum_lanes(v[j][0], ..., v[j][3]), the same bits: with AVX-512 the lanes of many vectors are added at once.
template <int kCount>
HM_INLINE void sum_lanes(const Vec (&v)[kCount][4], Quad (&sums)[kCount]) {
#if HM_LANES == 16
  // Each of four rows' vector folded to a quad, side by side in one vector.
  const auto fold_four = [](const Vec(&r)[4]) __attribute__((always_inline)) {
    const auto pair = [](__m512 a, __m512 b) __attribute__((always_inline)) {
      return (Vec)_mm512_shuffle_f32x4(a, b, 0x88) + (Vec)_mm512_shuffle_f32x4(a, b, 0xdd);
    };
    return pair((__m512)pair((__m512)r[0], (__m512)r[1]), (__m512)pair((__m512)r[2], (__m512)r[3]));
  };
  const auto halves = [](Vec a, Vec b) __attribute__((always_inline)) {  // lanes 0 + 2 and 1 + 3 of each quad of a, b
    const __m512 x = (__m512)a, y = (__m512)b;
    return (Vec)_mm512_shuffle_ps(x, y, 0x44) + (Vec)_mm512_shuffle_ps(x, y, 0xee);
  };
  const __m512i by_task = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  int j = 0;
#pragma GCC unroll 8
  for (; j < kCount; j += 4) {
    const int last = kCount - 1;
    const Vec a = fold_four(v[j]), b = j + 1 <= last ? fold_four(v[j + 1]) : a;
    const Vec c = j + 2 <= last ? fold_four(v[j + 2]) : a, d = j + 3 <= last ? fold_four(v[j + 3]) : c;
    const __m512 ab = (__m512)halves(a, b), cd = j + 2 <= last ? (__m512)halves(c, d) : ab;
    const Vec all = (Vec)_mm512_shuffle_ps(ab, cd, 0x88) + (Vec)_mm512_shuffle_ps(ab, cd, 0xdd);
    const __m512 rows = _mm512_permutexvar_ps(by_task, (__m512)all);
    sums[j] = (Quad)_mm512_castps512_ps128(rows);
    if (j + 1 <= last) sums[j + 1] = (Quad)_mm512_extractf32x4_ps(rows, 1);
    if (j + 2 <= last) sums[j + 2] = (Quad)_mm512_extractf32x4_ps(rows, 2);
    if (j + 3 <= last) sums[j + 3] = (Quad)_mm512_extractf32x4_ps(rows, 3);
  }
#else
#pragma GCC unroll 8
  for (int j = 0; j < kCount; ++j) sums[j] = sum_lanes(v[j][0], v[j][1], v[j][2], v[j][3]);
#endif
}

}  // namespace hypermask
