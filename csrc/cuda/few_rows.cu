// masked_linear for 1 to 64 rows of x (16 in float32): W and the logits are read once and masked in registers.
//
// Where rows of W begin on 16 bytes, each warp copies segments of 128 bytes a row to shared memory of its own, two
// stages ahead of the one that it works on: 8 kB a warp and stage, so that on an H200 128 kB of a multiprocessor are
// under way. Otherwise entries are loaded one by one.
#include "../common/registration.h"
#include "few_rows_kernels.h"
#include "few_rows_launch.h"

namespace hypermask {
namespace {

constexpr int kSegmentBytes = 128, kStages = 3;

// Two tiles of outputs for tensor cores: half the reads of x. One for float32, whose sums take the registers.
template <class T>
constexpr int kOutputTiles = Element<T>::kTensorCores ? 2 : 1;
template <class T>
constexpr int kMaxWarps = Element<T>::kTensorCores ? 8 : 16;
template <class T>
constexpr int kSegmentSteps = kSegmentBytes / sizeof(T) / kStep;

// A warp's stages of W and of the logits in shared memory. A row is 8 pieces of 16 bytes, which every other row has in
// exchanged halves: lanes of two rows that read together then meet no bank twice.
template <class T>
struct Segments {
  static constexpr int kRows = kTileOutputs * kOutputTiles<T>;
  static constexpr int kPieces = kSegmentBytes / 16, kEntries = kSegmentBytes / sizeof(T),
                       kPieceEntries = 16 / sizeof(T);
  static constexpr int kBytes = kStages * 2 * kRows * kSegmentBytes;

  T* memory;

  __device__ __forceinline__ T* place(int stage, int which, int row, int piece) const {
    return memory + ((stage * 2 + which) * kRows + row) * kEntries + (piece ^ row % 2 * (kPieces / 2)) * kPieceEntries;
  }

  // Rows of W and of the logits from entry k on, of which `left` exist; the others become 0.
  __device__ __forceinline__ void copy(int stage, const T* weight, const T* logits, int64_t row_entries, int64_t rows,
                                       int64_t left) const {
    const int lane = threadIdx.x % 32, piece = lane % kPieces;
#pragma unroll
    for (int first = 0; first < kRows; first += 32 / kPieces) {
      const int row = first + lane / kPieces;
      const int64_t from = row * row_entries + piece * kPieceEntries;
      T *w = place(stage, 0, row, piece), *a = place(stage, 1, row, piece);
      if (row < rows && piece * kPieceEntries < left) {
        cp_async<16>(w, weight + from);
        cp_async<16>(a, logits + from);
      } else {
        *reinterpret_cast<uint4*>(w) = make_uint4(0, 0, 0, 0);
        *reinterpret_cast<uint4*>(a) = make_uint4(0, 0, 0, 0);
      }
    }
  }

  // This lane's entries of a row and a step of the segment.
  __device__ __forceinline__ void load(Entries<T>& to, int stage, int which, int row, int step) const {
    constexpr int kOfLane = kLaneEntries / kPieceEntries;  // pieces
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const int piece = step * kStep / kPieceEntries + threadIdx.x % 4 * kOfLane + i;
      const uint4 v = *reinterpret_cast<const uint4*>(place(stage, which, row, piece));
      to.words[4 * i] = v.x;
      to.words[4 * i + 1] = v.y;
      to.words[4 * i + 2] = v.z;
      to.words[4 * i + 3] = v.w;
    }
  }
};

template <class T, class Sums, int kRowTiles>
__device__ __forceinline__ void add_masked(const FewRows& s, Sums& sums, int m, int64_t k, float threshold,
                                           const Entries<T> (&w)[2], const Entries<T> (&a)[2],
                                           const Entries<T> (&x)[kRowTiles]) {
  Entries<T> masked[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    masked[i].make([&](int e) { return w[i].entry(e) * Element<T>::mask(a[i].entry(e), threshold); });
  }
  sums.add(s, m, k, masked[0], masked[1], x);
}

// One block: left to itself the compiler spills to make room for three, on sm_100.
template <class T, int kRowTiles, bool kAligned>
__global__ void __launch_bounds__(32 * kMaxWarps<T>, kAligned ? 0 : 1)
    masked_linear_kernel(FewRows s, const void* logits) {
  using Sums = Product<T, kOutputTiles<T>, kRowTiles, kAligned>;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, group = threadIdx.x % 32 / 4;
  const int64_t first_output = static_cast<int64_t>(blockIdx.x) * Sums::kOutputs;
  const auto* weight = static_cast<const T*>(s.weight) + first_output * s.inputs;
  const auto* a = static_cast<const T*>(logits) + first_output * s.inputs;
  const float threshold = threshold_of(s, static_cast<T*>(nullptr));
  const int64_t begin = blockIdx.y * s.steps, end = min(begin + s.steps, ceil_div(s.inputs, kStep));
  Sums sums;
  sums.clear();
  if constexpr (kAligned) {
    constexpr int kSteps = kSegmentSteps<T>;
    const Segments<T> segments{dynamic_shared<T>() + warp * (Segments<T>::kBytes / static_cast<int>(sizeof(T)))};
    const int64_t rows = s.outputs - first_output;
    const auto copy = [&](int64_t step, int stage) {  // the segment that begins with this step
      const int64_t k = step * kStep;
      if (step < end) segments.copy(stage, weight + k, a + k, s.inputs, rows, s.inputs - k);
      cp_async_commit();
    };
    const int64_t first = begin + warp * kSteps, stride = static_cast<int64_t>(warps) * kSteps;
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) copy(first + i * stride, i);
    int stage = 0;
    for (int64_t at = first; at < end; at += stride) {
      cp_async_wait<kStages - 2>();
      __syncwarp();  // the segment is here, and all lanes are done with the one before
      copy(at + (kStages - 1) * stride, (stage + kStages - 1) % kStages);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int64_t k = (at + step) * kStep + kLaneEntries * (threadIdx.x % 4);
        Entries<T> x[kRowTiles];
        if constexpr (Sums::kTensorCores) load_x<T, kRowTiles, true>(s, k, x);
#pragma unroll
        for (int m = 0; m < kOutputTiles<T>; ++m) {
          Entries<T> w_part[2], a_part[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            segments.load(w_part[i], stage, 0, m * kTileOutputs + 8 * i + group, step);
            segments.load(a_part[i], stage, 1, m * kTileOutputs + 8 * i + group, step);
          }
          add_masked<T>(s, sums, m, k, threshold, w_part, a_part, x);
        }
      }
      stage = (stage + 1) % kStages;
    }
    cp_async_wait<0>();  // none may land in what becomes the sums' memory
  } else {
    for (int64_t step = begin + warp; step < end; step += warps) {
      const int64_t k = step * kStep + kLaneEntries * (threadIdx.x % 4);
      Entries<T> x[kRowTiles];
      if constexpr (Sums::kTensorCores) load_x<T, kRowTiles, false>(s, k, x);
#pragma unroll
      for (int m = 0; m < kOutputTiles<T>; ++m) {
        Entries<T> w_part[2], a_part[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int64_t row = m * kTileOutputs + 8 * i + group,
                        left = row < s.outputs - first_output ? s.inputs - k : 0;
          w_part[i].template load<false, true>(weight + row * s.inputs + k, left);
          a_part[i].template load<false, true>(a + row * s.inputs + k, left);
        }
        add_masked<T>(s, sums, m, k, threshold, w_part, a_part, x);
      }
    }
  }
  finish<T>(s, sums, dynamic_shared<float>(), first_output, 1);
}

template <class T, int kRowTiles, bool kAligned>
void run(const Launcher& gpu, FewRows& s, const Tensor& x, const Tensor& logits) {
  using Sums = Product<T, kOutputTiles<T>, kRowTiles, kAligned>;
  constexpr int64_t kSums = Sums::kSharedFloats * sizeof(float);
  constexpr int64_t kWarp = kAligned ? std::max<int64_t>(Segments<T>::kBytes, kSums) : kSums;
  const int64_t limit = gpu.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int warps = static_cast<int>(std::min<int64_t>(kMaxWarps<T>, limit / kWarp));
  const auto kernel = masked_linear_kernel<T, kRowTiles, kAligned>;
  gpu.allow_shared(kernel, warps * kWarp);
  launch_splits<T>(gpu, s, x, ceil_div(s.outputs, Sums::kOutputs), warps, kAligned ? kSegmentSteps<T> : 1,
                   [&](dim3 grid) { gpu.launch(kernel, grid, 32 * warps, warps * kWarp, s, logits.const_data_ptr()); });
}

Tensor masked_linear(const Tensor& x, const Tensor& weight, const Tensor& logits, const Tensor& threshold,
                     const std::optional<Tensor>& bias) {
  const char* op = "masked_linear";
  check_few_rows(op, x, weight, threshold, bias, Place::gpu_of(x), x.scalar_type() == ScalarType::Float ? 16 : 64);
  check_like(op, "logits", logits, weight, Place::gpu_of(x), shape_of(weight));
  Tensor y = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  if (y.numel() == 0) return y;
  const Launcher gpu(op, x);
  FewRows s = few_rows(x, weight, threshold, bias, y);
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kMostTiles = Element<T>::kTensorCores ? 8 : 2;
    with_shape<kMostTiles>(s, vectors_fit({&x, &weight, &logits}, s.inputs),
                           [&](auto row_tiles, auto aligned) { run<T, row_tiles(), aligned()>(gpu, s, x, logits); });
  });
  return y;
}

}  // namespace

HM_CUDA(m) { m.impl("masked_linear", TORCH_BOX(&masked_linear)); }

}  // namespace hypermask
