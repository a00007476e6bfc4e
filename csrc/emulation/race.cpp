// Race detector of the emulator. Kernels compiled with -fsanitize=thread call __tsan_readN and __tsan_writeN; this file
// answers them instead of libtsan. Happens-before by one vector clock a CUDA thread; a shadow cell for each 2 bytes of
// shared memory and, with LLMFAST_RACE_GLOBAL=1, of all other memory that is not a fiber's stack.
#include <dlfcn.h>

#include <unordered_map>

#include "emulation/machine.h"

namespace {

struct Access {
  int64_t block = -1;
  int thread = -1;
  uint32_t clock = 0;
  const void* pc = nullptr;
};
struct Cell {
  Access write, reads[4];
  bool written = false;
};
using Clock = std::vector<uint32_t>;

std::vector<Clock> clocks;
std::unordered_map<const void*, Clock> objects;  // barriers in shared memory
std::unordered_map<uintptr_t, Cell> shared_cells, global_cells;
int64_t block_number = -1, launch_number = -1;
const bool watch_global = getenv("LLMFAST_RACE_GLOBAL") != nullptr;
extern "C" char __data_start, _end;  // the emulator's own variables lie between them

bool within(uintptr_t p, const void* base, size_t bytes) { return p - reinterpret_cast<uintptr_t>(base) < bytes; }

bool happened_before(const Access& a, int thread) {
  return a.thread < 0 || (a.block == block_number && (a.thread == thread || a.clock <= clocks[thread][a.thread]));
}

// The array that holds p, or "".
std::string shared_name(uintptr_t p) {
  using emu::machine;
  if (within(p, machine.dynamic, machine.dynamic_bytes))
    return "dynamic shared memory +" + std::to_string(p - reinterpret_cast<uintptr_t>(machine.dynamic));
  for (auto& array : machine.shared)
    if (within(p, array.data, array.bytes))
      return std::string(array.name) + " +" + std::to_string(p - reinterpret_cast<uintptr_t>(array.data));
  return "";
}

// "pc+0x..", which `addr2line -e the-test` turns into file and line.
std::string place(const Access& a) {
  Dl_info info{};
  if (!dladdr(a.pc, &info)) return "an unknown place";
  char text[32];
  snprintf(text, sizeof text, "pc+0x%zx", size_t(static_cast<const char*>(a.pc) - static_cast<char*>(info.dli_fbase)) - 1);
  return text;
}

[[noreturn]] void report(const char* kind, const Access& before, const Access& now, uintptr_t p) {
  const std::string name = shared_name(p);
  emu::fail(std::string("RACE ") + kind + " at " + (name.empty() ? "global memory" : name) + ": thread " +
            std::to_string(now.thread) + " at " + place(now) + " and block " + std::to_string(before.block) + " thread " +
            std::to_string(before.thread) + " at " + place(before));
}

void check(uintptr_t p, size_t bytes, bool write, const void* pc) {
  const bool shared = !shared_name(p).empty();
  if (!shared) {
    if (!watch_global || within(p, &__data_start, size_t(&_end - &__data_start))) return;
    for (auto& thread : emu::machine.threads)
      if (within(p, thread.stack, emu::kStackBytes)) return;
    if (launch_number != emu::machine.launches) {  // a launch is ordered after the one before it
      launch_number = emu::machine.launches;
      global_cells.clear();
    }
  }
  const int thread = emu::machine.current->linear;
  const Access now{block_number, thread, clocks[thread][thread], pc};
  for (uintptr_t a = p & ~uintptr_t(1); a < p + bytes; a += 2) {
    Cell& cell = (shared ? shared_cells : global_cells)[a];
    if (shared && !write && !cell.written) emu::fail("read of uninitialised shared memory, " + shared_name(a) + " at " + place(now));
    if (!happened_before(cell.write, thread)) report(write ? "write after write" : "read after write", cell.write, now, a);
    if (write) {
      for (Access& read : cell.reads) {
        if (!happened_before(read, thread)) report("write after read", read, now, a);
        read = {};
      }
      cell.write = now;
      cell.written = true;
    } else {
      Access* slot = &cell.reads[thread & 3];
      for (Access& read : cell.reads)
        if (happened_before(read, thread)) {
          slot = &read;
          break;
        }
      *slot = now;
    }
  }
}

struct Install {
  Install() {
    emu::hooks.block_begin = [](int n) {
      clocks.assign(n, Clock(n, 0));
      for (int i = 0; i < n; ++i) clocks[i][i] = 1;
      shared_cells.clear();
      objects.clear();
      ++block_number;
    };
    emu::hooks.sync = [](const int* threads, int n) {
      Clock latest = clocks[threads[0]];
      for (int i = 1; i < n; ++i)
        for (size_t t = 0; t < latest.size(); ++t) latest[t] = std::max(latest[t], clocks[threads[i]][t]);
      for (int i = 0; i < n; ++i) {
        clocks[threads[i]] = latest;
        ++clocks[threads[i]][threads[i]];
      }
    };
    emu::hooks.release = [](const void* object) {
      const int thread = emu::machine.current->linear;
      Clock& clock = objects[object];
      clock.resize(clocks.size());
      for (size_t t = 0; t < clock.size(); ++t) clock[t] = std::max(clock[t], clocks[thread][t]);
      ++clocks[thread][thread];
    };
    emu::hooks.acquire = [](const void* object) {
      Clock& own = clocks[emu::machine.current->linear];
      Clock& clock = objects[object];
      clock.resize(clocks.size());
      for (size_t t = 0; t < clock.size(); ++t) own[t] = std::max(own[t], clock[t]);
    };
    emu::hooks.access = [](const void* p, size_t bytes, bool write, const void* pc) {
      check(reinterpret_cast<uintptr_t>(p), bytes, write, pc);
    };
  }
} install;

void on_access(void* p, size_t bytes, bool write, const void* pc) {
  if (!emu::user_code) return;
  emu::Quiet quiet;
  check(reinterpret_cast<uintptr_t>(p), bytes, write, pc);
}

}  // namespace

#define LLMFAST_ENTRY(bytes)                                                                                  \
  extern "C" void __tsan_read##bytes(void* p) { on_access(p, bytes, false, __builtin_return_address(0)); }    \
  extern "C" void __tsan_write##bytes(void* p) { on_access(p, bytes, true, __builtin_return_address(0)); }    \
  extern "C" void __tsan_unaligned_read##bytes(void* p) { on_access(p, bytes, false, __builtin_return_address(0)); } \
  extern "C" void __tsan_unaligned_write##bytes(void* p) { on_access(p, bytes, true, __builtin_return_address(0)); }
LLMFAST_ENTRY(1)
LLMFAST_ENTRY(2)
LLMFAST_ENTRY(4)
LLMFAST_ENTRY(8)
LLMFAST_ENTRY(16)
extern "C" void __tsan_read_range(void* p, size_t n) { on_access(p, n, false, __builtin_return_address(0)); }
extern "C" void __tsan_write_range(void* p, size_t n) { on_access(p, n, true, __builtin_return_address(0)); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
