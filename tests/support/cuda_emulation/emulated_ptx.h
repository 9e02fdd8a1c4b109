// csrc/cuda/ptx.h for the CPU, after the PTX ISA's description of each instruction.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/adam.h"

namespace hypermask {

template <class T>
inline T* dynamic_shared() {
  return static_cast<T*>(emulation::dynamic_memory());
}

template <int kBytes>
inline void cp_async(void* shared, const void* global) {
  emulation::copy_later(shared, global, kBytes);
}
inline void cp_async_commit() { emulation::close_copies(); }
template <int kPending>
inline void cp_async_wait() {
  emulation::finish_copies(kPending);
}

// PTX ISA, tanh.approx.f32: relative error 2^-11.
inline float tanh_approx(float x) { return std::tanh(x) * (1 + emulation::error_direction / 2048.0f); }

// Adam's arithmetic of csrc/common with the GPU's square root and quotient, which portable.h has for device code only.
struct Approximate {
  float x;
};
inline Approximate operator+(Approximate a, Approximate b) { return {a.x + b.x}; }
inline Approximate operator-(Approximate a, Approximate b) { return {a.x - b.x}; }
inline Approximate operator*(Approximate a, Approximate b) { return {a.x * b.x}; }
inline Approximate operator+(Approximate a, float b) { return {a.x + b}; }
inline Approximate operator*(Approximate a, float b) { return {a.x * b}; }
inline Approximate operator*(float a, Approximate b) { return {a * b.x}; }

template <>
struct Lane<Approximate> {
  // PTX ISA, sqrt.approx.f32: relative error 2^-23.
  static Approximate sqrt(Approximate a) {
    return {static_cast<float>(std::sqrt(static_cast<double>(a.x)) * (1 - emulation::error_direction * 0x1p-23))};
  }
  static Approximate divide(Approximate a, Approximate b) { return {__fdividef(a.x, b.x)}; }
};

// Preferred to the template: a step that is as much too long as it can be, or too short.
inline void adam_update(float grad, float& weight, float& first, float& second, const AdamStep& s) {
  Approximate w{weight}, m{first}, v{second};
  adam_update(Approximate{grad}, w, m, v, s);
  weight = w.x;
  first = m.x;
  second = v.x;
}

// Each lane reads its row when it comes: meeting the others does not order their writes before that.
inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared, int line = __builtin_LINE()) {
  if (reinterpret_cast<uintptr_t>(shared) % 16) emulation::stop("ldmatrix of a row that is not aligned to 16 bytes");
  uint16_t mine[8];
  std::memcpy(mine, shared, sizeof mine);
  unsigned char all[emulation::kWarp][emulation::kExchanged];
  emulation::exchange(emulation::kEveryLane, {"ldmatrix", "", line}, mine, sizeof mine, all);
  const unsigned row = emulation::lane() / 4, column = emulation::lane() % 4 * 2;
  const auto entry = [&](int matrix, unsigned at) -> uint32_t {
    uint16_t value;
    std::memcpy(&value, all[matrix * 8 + row] + sizeof value * at, sizeof value);
    return value;
  };
  for (int i = 0; i < 4; ++i) r[i] = entry(i, column) | entry(i, column + 1) << 16;
}

// value(bits) is the 16-bit number as a float. Products are exact in float32; the order of the sum is not specified.
template <class Value>
inline void emulated_mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], emulation::Place place,
                         Value value) {
  struct Operands {
    uint32_t a[4], b[2];
  } mine;
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  unsigned char all[emulation::kWarp][emulation::kExchanged];
  emulation::exchange(emulation::kEveryLane, place, &mine, sizeof mine, all);
  const auto half = [&](uint32_t pair, int which) { return value(static_cast<uint16_t>(pair >> 16 * which)); };
  const auto a_entry = [&](int row, int k) {
    Operands o;
    std::memcpy(&o, all[row % 8 * 4 + k % 8 / 2], sizeof o);
    return half(o.a[row / 8 + 2 * (k / 8)], k % 2);
  };
  const auto b_entry = [&](int k, int column) {
    Operands o;
    std::memcpy(&o, all[column * 4 + k % 8 / 2], sizeof o);
    return half(o.b[k / 8], k % 2);
  };
  const int group = emulation::lane() / 4, pair = emulation::lane() % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    double sum = d[i];
    for (int k = 0; k < 16; ++k) sum += static_cast<double>(a_entry(group + i / 2 * 8, k)) * b_entry(k, pair + i % 2);
    d[i] = static_cast<float>(sum);
  }
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  emulated_mma(d, a, b, {"mma bf16", "", line}, [](uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); });
}
inline void mma_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  emulated_mma(d, a, b, {"mma fp16", "", line}, [](uint16_t bits) { return __half2float(__half{bits}); });
}

// PTX ISA, mma.m16n8k8 with .tf32: the lower 13 bits of an operand are ignored; products are exact; what the sum is
// rounded by is not specified, and GPUs cut it off.
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  struct Operands {
    uint32_t a[4], b[2];
  } mine;
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  unsigned char all[emulation::kWarp][emulation::kExchanged];
  emulation::exchange(emulation::kEveryLane, {"mma tf32", "", line}, &mine, sizeof mine, all);
  const auto of_lane = [&](int lane) {
    Operands o;
    std::memcpy(&o, all[lane], sizeof o);
    return o;
  };
  const auto value = [](uint32_t bits) { return static_cast<double>(__uint_as_float(bits & 0xffffe000u)); };
  const auto a_entry = [&](int row, int k) { return value(of_lane(row % 8 * 4 + k % 4).a[row / 8 + 2 * (k / 4)]); };
  const auto b_entry = [&](int k, int column) { return value(of_lane(column * 4 + k % 4).b[k / 4]); };
  const int row = emulation::lane() / 4, column = emulation::lane() % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    double sum = d[i];
    for (int k = 0; k < 8; ++k) sum += a_entry(row + i / 2 * 8, k) * b_entry(k, column + i % 2);
    d[i] = static_cast<float>(sum);
    if (std::fabs(static_cast<double>(d[i])) > std::fabs(sum)) d[i] = std::nextafterf(d[i], 0.0f);
  }
}

}  // namespace hypermask
