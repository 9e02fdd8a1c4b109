// Vectors of HM_LANES floats: 16 with AVX-512, 8 with AVX2, else 4. The file that includes this one (kernels_*.cpp)
// says which, beside its target pragma: g++ does not define __AVX2__ and the like for a pragma. GCC's vector types
// carry the arithmetic; only loads of a part, square roots and sums over lanes need more.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../common/rounding.h"

namespace hypermask {

constexpr int kLanes = HM_LANES;

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UnsignedVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));
typedef float Quad __attribute__((vector_size(16)));

template <>
struct Lane<Vec> {
  using Int = IntVec;
  using Unsigned = UnsignedVec;
  using Mask = IntVec;
  HM_INLINE Vec select(IntVec condition, Vec yes, Vec no) { return condition ? yes : no; }
  HM_INLINE IntVec bits(Vec x) { return (IntVec)x; }
  HM_INLINE Vec from_bits(IntVec i) { return (Vec)i; }
  HM_INLINE Vec broadcast(float x) { return x - Vec{}; }
  HM_INLINE UnsignedVec both_halves(UnsignedVec x) {
#if HM_LANES == 16
    constexpr int kXorAnd = 0x28;
    return (UnsignedVec)_mm512_ternarylogic_epi32((__m512i)x, (__m512i)(x >> 16), _mm512_set1_epi32(0xffff), kXorAnd);
#else
    return (x ^ x >> 16) & 0xffffu;
#endif
  }
  HM_INLINE UnsignedVec add_below(UnsignedVec x, UnsignedVec y, UnsignedVec what, int32_t limit) {
#if HM_LANES == 16
    const __mmask16 below = _mm512_cmplt_epi32_mask((__m512i)what, _mm512_set1_epi32(limit));
    return (UnsignedVec)_mm512_mask_add_epi32((__m512i)x, below, (__m512i)x, (__m512i)y);
#else
    return x + (y & (UnsignedVec)((IntVec)what < limit));
#endif
  }
  HM_INLINE UnsignedVec at_least(UnsignedVec x, uint32_t least, UnsignedVec what) {
#if HM_LANES == 16
    const __mmask16 there = _mm512_test_epi32_mask((__m512i)what, (__m512i)what);
    return (UnsignedVec)_mm512_mask_max_epu32((__m512i)x, there, (__m512i)x,
                                              _mm512_set1_epi32(static_cast<int>(least)));
#else
    const UnsignedVec floor = (UnsignedVec)(what != 0u) & least;
    return x > floor ? x : floor;
#endif
  }
  HM_INLINE Vec divide(Vec x, Vec y) { return x / y; }
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

// A loop that the compiler writes out.
#define HM_EACH(i, count) _Pragma("GCC unroll 16") for (int i = 0; i < (count); ++i)

// A few vectors that are worked on side by side: each operation for all of them before the next one.
template <class V, int kCount>
struct Several {
  V part[kCount];
};

#define HM_OF_SEVERAL(op)                                                                              \
  template <class V, int kCount>                                                                       \
  HM_INLINE Several<V, kCount> operator op(const Several<V, kCount>& a, const Several<V, kCount>& b) { \
    Several<V, kCount> c;                                                                              \
    HM_EACH(i, kCount) c.part[i] = a.part[i] op b.part[i];                                             \
    return c;                                                                                          \
  }                                                                                                    \
  template <class V, int kCount>                                                                       \
  HM_INLINE Several<V, kCount> operator op(const Several<V, kCount>& a, float b) {                     \
    Several<V, kCount> c;                                                                              \
    HM_EACH(i, kCount) c.part[i] = a.part[i] op b;                                                     \
    return c;                                                                                          \
  }
HM_OF_SEVERAL(+)
HM_OF_SEVERAL(-)
HM_OF_SEVERAL(*)
#undef HM_OF_SEVERAL

template <class V, int kCount>
HM_INLINE Several<V, kCount> operator*(float a, const Several<V, kCount>& b) {
  return b * a;
}

template <class V, int kCount>
struct Lane<Several<V, kCount>> {
  using Vecs = Several<V, kCount>;
  HM_INLINE Vecs sqrt(const Vecs& x) {
    Vecs root;
    HM_EACH(i, kCount) root.part[i] = Lane<V>::sqrt(x.part[i]);
    return root;
  }
  // x / y within 1 ulp for finite x and normal y in the range of Adam's denominators (y and 1/y not denormal).
  HM_INLINE Vecs divide(const Vecs& x, const Vecs& y) {
    Vecs quotient;
#if HM_LANES == 16
    const __m512 two = _mm512_set1_ps(2.0f);
    __m512 r[kCount];
    __mmask16 odd = 0;
    HM_EACH(i, kCount) r[i] = _mm512_rcp14_ps((__m512)y.part[i]);
    HM_EACH(i, kCount) r[i] = _mm512_mul_ps(r[i], _mm512_fnmadd_ps((__m512)y.part[i], r[i], two));
    HM_EACH(i, kCount) odd |= _mm512_fpclass_ps_mask((__m512)y.part[i], 0x01 | 0x02 | 0x04 | 0x08 | 0x10 | 0x20 | 0x80);
    if (__builtin_expect(!odd, 1)) {
      HM_EACH(i, kCount) quotient.part[i] = (V)_mm512_mul_ps((__m512)x.part[i], r[i]);
      return quotient;
    }
#endif
    HM_EACH(i, kCount) quotient.part[i] = x.part[i] / y.part[i];
    return quotient;
  }
};

// 0, 1, 2, ...
#if HM_LANES == 16
constexpr UnsignedVec kLaneNumbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif HM_LANES == 8
constexpr UnsignedVec kLaneNumbers = {0, 1, 2, 3, 4, 5, 6, 7};
#else
constexpr UnsignedVec kLaneNumbers = {0, 1, 2, 3};
#endif

HM_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// x, held in a register: the compiler would otherwise read it from memory again for each of its uses.
HM_INLINE Vec in_register(Vec x) {
#if HM_LANES == 16
  __asm__("" : "+v"(x));
#elif HM_LANES == 8
  __asm__("" : "+x"(x));
#endif
  return x;
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

// The first count lanes, 0 < count < kLanes; the others are 0 and their memory is not touched.
HM_INLINE HalfVec load_part(const Bfloat16* p, int count) {
#if HM_LANES == 16
  return (HalfVec)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p);
#elif HM_LANES == 8
  uint64_t four = 0, rest = 0;
  if (count & 4) std::memcpy(&four, p, 8);
  p += count & 4;
  if (count & 2) std::memcpy(&rest, p, 4);
  if (count & 1) rest |= static_cast<uint64_t>(p[count & 2].bits) << (count & 2) * 16;
  return (HalfVec)(count & 4 ? _mm_set_epi64x(rest, four) : _mm_set_epi64x(0, rest));
#else
  HalfVec v{};
  for (int i = 0; i < count; ++i) v[i] = p[i].bits;
  return v;
#endif
}

HM_INLINE Vec load_up_to(const Bfloat16* p, int64_t count) {
  HalfVec v;
  if (count >= kLanes) {
    std::memcpy(&v, p, sizeof v);
  } else {
    v = load_part(p, static_cast<int>(count));
  }
#if HM_LANES == 16  // one instruction in place of two
  const __m512i words = _mm512_set_epi32(0xf0000, 0xe0000, 0xd0000, 0xc0000, 0xb0000, 0xa0000, 0x90000, 0x80000,
                                         0x70000, 0x60000, 0x50000, 0x40000, 0x30000, 0x20000, 0x10000, 0);
  return (Vec)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, words, _mm512_castsi256_si512((__m256i)v));
#else
  return (Vec)(__builtin_convertvector(v, UnsignedVec) << 16);
#endif
}

HM_INLINE void store_part(Bfloat16* p, HalfVec v, int count) {
#if HM_LANES >= 8
#if HM_LANES == 16
  __m128i eight = _mm256_castsi256_si128((__m256i)v);
  if (count & 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), eight);
    eight = _mm256_extracti128_si256((__m256i)v, 1);
    p += 8;
  }
#else
  __m128i eight = (__m128i)v;
#endif
  if (count & 4) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), eight);
    eight = _mm_srli_si128(eight, 8);
    p += 4;
  }
  const auto two = static_cast<uint32_t>(_mm_cvtsi128_si32(eight));
  if (count & 2) std::memcpy(p, &two, 4);
  if (count & 1) p[count & 2].bits = static_cast<uint16_t>(count & 2 ? _mm_extract_epi16(eight, 2) : two);
#else
  for (int i = 0; i < count; ++i) p[i].bits = v[i];
#endif
}

// Stores the upper halves of the first lanes of x at p, and of y at q.
HM_INLINE void store_up_to(Bfloat16* p, Bfloat16* q, UnsignedVec x, UnsignedVec y, int64_t count) {
#if HM_LANES == 16
  const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                       23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  const __m512i words = _mm512_permutex2var_epi16((__m512i)x, odd, (__m512i)y);
  const auto a = (HalfVec)_mm512_castsi512_si256(words), b = (HalfVec)_mm512_extracti64x4_epi64(words, 1);
#elif HM_LANES == 8
  const __m256i pairs = _mm256_packus_epi32((__m256i)(x >> 16), (__m256i)(y >> 16));
  const __m256i words = _mm256_permute4x64_epi64(pairs, 0xd8);
  const auto a = (HalfVec)_mm256_castsi256_si128(words), b = (HalfVec)_mm256_extracti128_si256(words, 1);
#else
  const HalfVec a = __builtin_convertvector(x >> 16, HalfVec), b = __builtin_convertvector(y >> 16, HalfVec);
#endif
  if (count >= kLanes) {
    std::memcpy(p, &a, sizeof a);
    std::memcpy(q, &b, sizeof b);
  } else {
    store_part(p, a, static_cast<int>(count));
    store_part(q, b, static_cast<int>(count));
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
