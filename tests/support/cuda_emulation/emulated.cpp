// What the ops of csrc/cuda see of torch's devices, and what the tests set: the CPU's memory is the GPU's.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "block.h"
#include "cuda_runtime.h"
#include "memory.h"

// This library's own answers to what csrc/ asks torch about devices.
extern "C" {
int32_t aoti_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

// The tensor that begins here is on GPU 1, all others are on GPU 0.
static const void* on_another_gpu = nullptr;
AOTI_TORCH_EXPORT void emulation_set_on_another_gpu(const void* data) { on_another_gpu = data; }

AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* index) {
  void* data = nullptr;
  const AOTITorchError error = aoti_torch_get_data_ptr(tensor, &data);
  *index = data && data == on_another_gpu;
  return error;
}

// An op's call begins, in one of the two orders and with tensors guarded on one of their sides, and ends: "" or what it
// damaged.
AOTI_TORCH_EXPORT void emulation_begin(int descending) {
  emulation::damage();
  emulation::set_descending(descending);
  emulation::set_guard(descending ? emulation::Guard::kBefore : emulation::Guard::kBehind);
}
AOTI_TORCH_EXPORT const char* emulation_end() {
  emulation::set_guard(emulation::Guard::kOff);
  return emulation::damage();
}

AOTI_TORCH_EXPORT void emulation_set_capturing(int capturing) { emulation::capturing = capturing; }
AOTI_TORCH_EXPORT int emulation_launches() { return emulation::launches; }

AOTI_TORCH_EXPORT void emulation_set_error_direction(int direction) { emulation::error_direction = direction; }
}
