#undef TORCH_TARGET_VERSION  // allocators are no part of the stable ABI
#include "memory.h"

#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <new>
#include <set>
#include <string>

namespace emulation {
namespace {

constexpr size_t kPage = 4096, kAlignment = 16;
constexpr unsigned char kPoison = 0xff;

struct Block {
  unsigned char *pages, *data;  // between two more pages, which are protected
  size_t page_bytes, bytes;

  bool whole() const {
    const auto poisoned = [](const unsigned char* from, const unsigned char* to) {
      return std::all_of(from, to, [](unsigned char c) { return c == kPoison; });
    };
    return poisoned(pages, data) && poisoned(data + bytes, pages + page_bytes);
  }
};

std::mutex mutex;  // autograd frees in threads of its own
std::set<Block*> blocks;
Guard guard = Guard::kOff;
bool damaged = false;

void free_block(void* memory) {
  auto* block = static_cast<Block*>(memory);
  const std::lock_guard<std::mutex> lock(mutex);
  damaged |= !block->whole();
  munmap(block->pages - kPage, block->page_bytes + 2 * kPage);
  blocks.erase(block);
  delete block;
}

class Guarded : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return c10::GetDefaultCPUAllocator()->allocate(bytes);
    const size_t aligned = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    const size_t page_bytes = (bytes + kPage - 1) / kPage * kPage;
    void* memory = mmap(nullptr, page_bytes + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    auto* pages = static_cast<unsigned char*>(memory) + kPage;
    mprotect(pages, page_bytes, PROT_READ | PROT_WRITE);
    std::memset(pages, kPoison, page_bytes);
    auto* data = guard == Guard::kBehind ? pages + page_bytes - aligned : pages;
    auto* block = new Block{pages, data, page_bytes, bytes};
    const std::lock_guard<std::mutex> lock(mutex);
    blocks.insert(block);
    return {data, block, free_block, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

}  // namespace

void set_guard(Guard where) {
  static Guarded allocator;
  guard = where;
  c10::SetCPUAllocator(where == Guard::kOff ? c10::GetDefaultCPUAllocator() : &allocator, 1);
}

std::shared_ptr<void> allocate(size_t bytes) {
  auto memory = std::make_shared<c10::DataPtr>(c10::GetCPUAllocator()->allocate(bytes));
  return {memory, memory->get()};
}

const char* damage() {
  const std::lock_guard<std::mutex> lock(mutex);
  const bool before = damaged;
  damaged = false;
  const bool whole = std::all_of(blocks.begin(), blocks.end(), [](const Block* b) { return b->whole(); });
  return before || !whole ? "memory beside a tensor was written" : "";
}

}  // namespace emulation
