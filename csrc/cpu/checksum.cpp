// checksum: a 64-bit number of a tensor's bytes, by which one sees that they are still the same.
#include <cstring>
#include <vector>

#include "../common/checks.h"
#include "../common/registration.h"
#include "parts.h"

namespace hypermask {
namespace {

constexpr const char* kOp = "checksum";
constexpr int64_t kLanes = 64;
constexpr int64_t kRowBytes = 4 * kLanes;
constexpr int64_t kBlockBytes = 64 * 1024;
constexpr uint32_t kLane = 0x9E3779B1u, kBlock = 0x85EBCA77u, kMix = 0xC2B2AE3Du;
constexpr uint64_t kFold = 0x9E3779B185EBCA87u;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HM_FOR_MACHINES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define HM_FOR_MACHINES
#endif

// One row of 4 kLanes bytes into the lanes, each by steps that lose nothing: a change of one word always shows. A turn
// before the product lets the highest bits, such as signs, reach all others.
inline void take(uint32_t* lanes, const uint8_t* row) {
  for (int64_t l = 0; l < kLanes; ++l) {
    uint32_t word;
    std::memcpy(&word, row + 4 * l, 4);
    const uint32_t mixed = lanes[l] ^ word;
    lanes[l] = ((mixed << 13) | (mixed >> 19)) * kMix;
  }
}

// What a block of bytes adds to the sum; its last row is padded by zeros.
HM_FOR_MACHINES
uint64_t block_sum(const uint8_t* bytes, int64_t count, uint32_t block) {
  uint32_t lanes[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) lanes[l] = static_cast<uint32_t>(l) * kLane + block * kBlock;
  int64_t begin = 0;
  for (; count - begin >= kRowBytes; begin += kRowBytes) take(lanes, bytes + begin);
  if (begin < count) {
    uint8_t last[kRowBytes] = {};
    std::memcpy(last, bytes + begin, count - begin);
    take(lanes, last);
  }
  uint64_t sum = block;
  for (int64_t l = 0; l < kLanes; ++l) {
    sum = (sum ^ lanes[l]) * kFold;
    sum ^= sum >> 29;
  }
  return sum;
}

Tensor checksum(const Tensor& bytes) {
  if (bytes.scalar_type() != ScalarType::Byte) fail(kOp, "bytes must be uint8");
  check_tensor(kOp, "bytes", bytes, Place::kCpu, ScalarType::Byte);
  if (bytes.dim() != 1) fail(kOp, "bytes must have shape (n,), not ", to_string(shape_of(bytes)));
  const int64_t count = bytes.numel();
  const auto* data = count ? bytes.const_data_ptr<uint8_t>() : nullptr;
  const std::vector<Part> blocks = cut({count}, kBlockBytes);
  std::vector<uint64_t> sums(blocks.size());
  for_parts(blocks, [&](const Part& part, int64_t i) {
    sums[i] = block_sum(data + part.begin, part.end - part.begin, static_cast<uint32_t>(i));
  });
  uint64_t total = static_cast<uint64_t>(count);
  for (const uint64_t sum : sums) total += sum;
  Tensor result = torch::stable::new_empty(bytes, Shape{}, ScalarType::Long);
  *result.mutable_data_ptr<int64_t>() = static_cast<int64_t>(total);
  return result;
}

}  // namespace

HM_SCHEMAS(m) { m.def("checksum(Tensor bytes) -> Tensor"); }

HM_CPU(m) { m.impl("checksum", TORCH_BOX(&checksum)); }

}  // namespace hypermask
