// The ops of csrc/cuda as the library hypermask_emulated; csrc/cpu is compiled for its schemas alone.
//
// One implementation serves tensors on every device. One tensor on "meta" suffices for it to be called: it stands for
// one that is not on the GPU.
#pragma once

#define HM_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(hypermask_emulated, m)
#define HM_CUDA(m) STABLE_TORCH_LIBRARY_IMPL(hypermask_emulated, CompositeExplicitAutograd, m)
// Never called, so that the compiler drops it and all that is called there.
#define HM_CPU(m) \
  [[maybe_unused]] static void C10_CONCATENATE(left_out_, C10_UID)(torch::stable::detail::StableLibrary & m)
