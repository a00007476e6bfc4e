#pragma once
// A CUDA block on one CPU thread: every CUDA thread is a fiber; barriers and warp collectives are the points where fibers
// meet. Blocks run one after another. A run is deterministic for a given emu::config, and a correct kernel gives
// bitwise equal results under all of them.
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>
#if !defined(__x86_64__) || defined(LLMFAST_EMULATE_UCONTEXT)
#define LLMFAST_UCONTEXT
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emu {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Config {
  unsigned seed = 0;       // 0: warps and lanes ascending, 1: descending, else: random order with this seed
  int64_t only_block = -1; // run just this block of the grid: offsets beyond 2^31 in milliseconds
  bool late_copies = true; // asynchronous copies land at the last moment they may, else at once
};
inline Config config;

// Where a fiber waits. Fibers meet if `address`, the return address of the call, agrees: two calls on one line, or one
// function inlined in two places, are different barriers.
struct Site {
  const void* address;
  const char* file;
  int line;
  std::string str() const {
    const char* slash = strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
  }
};

// What the race detector (race.cpp, linked into race builds only) listens to.
struct Hooks {
  void (*block_begin)(int threads) = nullptr;
  void (*sync)(const int* threads, int n) = nullptr;  // all-to-all ordering among these threads
  void (*release)(const void* object) = nullptr;  // by the running thread, at a barrier in shared memory
  void (*acquire)(const void* object) = nullptr;
  void (*access)(const void* p, size_t bytes, bool write, const void* pc) = nullptr;  // by the emulator for a thread
};
inline Hooks hooks;
inline bool user_code = false;  // kernel code runs, not the emulator

// The emulator at work. The asm keeps the stores to user_code: gcc instruments after it has dropped dead stores.
struct Quiet {
  bool was = user_code;
  Quiet() {
    user_code = false;
    asm volatile("" ::: "memory");
  }
  ~Quiet() {
    asm volatile("" ::: "memory");
    user_code = was;
  }
};

// One cp.async under way; zeros without a source.
struct Copy {
  void* to;
  const void* from;
  int bytes;
  Site site;
};

enum class State { ready, at_block, at_warp, at_named, until, done };

#ifdef LLMFAST_UCONTEXT
using Context = ucontext_t;
#else
using Context = void*;  // the stack pointer; the registers are on the stack
#endif

struct Thread {
  Context context;
  char* stack;
  void* fake_stack = nullptr;  // ASan's
  uint3 index;
  int linear;
  State state;
  const char* what;  // the meeting point it waits at
  Site site;
  unsigned mask;
  void* argument;
  bool (*condition)(void*);               // of the argument: what a thread in State::until waits for
  std::vector<Copy> copies;               // issued,
  std::vector<std::vector<Copy>> groups;  // and committed
};

struct SharedArray {
  const char* name;
  void* data;
  size_t bytes;
};

struct Machine {
  std::vector<Thread> threads;  // grows; the first `n` make the block
  int n = 0, at_block = 0, done = 0;
  std::vector<int> warp_waiting;
  std::vector<int> at_named[16];                  // threads at each named barrier
  std::vector<std::function<void()>> landings;    // asynchronous copies of the block under way
  Thread* current = nullptr;
  Context main;
  void* main_fake_stack = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
  void (*body)(void*) = nullptr;
  void* body_argument = nullptr;
  std::string kernel, error;
  std::vector<SharedArray> shared;  // of every LLMFAST_SHARED seen so far
  unsigned char* dynamic = nullptr;
  size_t dynamic_bytes = 0;
  std::map<const void*, size_t> dynamic_limit;  // by kernel, set by cudaFuncSetAttribute
  std::mt19937 random;
  int64_t launches = 0;
};
inline Machine machine;
inline constexpr size_t kStackBytes = 256 << 10, kPage = 4096;
inline constexpr size_t kDynamicAlignment = 1024;

// ---- fibers ---------------------------------------------------------------------------------------------------------

#ifdef LLMFAST_UCONTEXT
inline void switch_context(Context& save, Context& load) { swapcontext(&save, &load); }
#else
inline __attribute__((naked, noinline)) void switch_context(Context& /*rdi*/, Context& /*rsi*/) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15; mov %rsp, (%rdi); mov (%rsi), %rsp;"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}
#endif

inline std::string str(uint3 v) {
  return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

inline void leave_fiber([[maybe_unused]] bool for_good = false) {
  Thread* self = machine.current;
  Quiet quiet;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &self->fake_stack, machine.main_stack, machine.main_stack_bytes);
#endif
  switch_context(self->context, machine.main);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
#endif
}

// Ends the launch with an emu::Error; for use in a fiber.
[[noreturn]] inline void fail(const std::string& message) {
  machine.error = machine.kernel + " block " + str(blockIdx) + " thread " + str(machine.current->index) + ": " + message;
  leave_fiber();
  abort();
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.main_stack, &machine.main_stack_bytes);
#endif
  user_code = true;
  machine.body(machine.body_argument);
  Quiet quiet;
  const auto waited_for = [](const auto& copies) { return copies.empty(); };
  const Thread& self = *machine.current;
  if (!waited_for(self.copies) || !std::all_of(self.groups.begin(), self.groups.end(), waited_for))
    fail("a thread ends while its copies are under way");
  machine.current->state = State::done;
  ++machine.done;
  leave_fiber(true);
  abort();
}

inline void enter_fiber(Thread& thread) {
  machine.current = &thread;
  threadIdx = thread.index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.main_fake_stack, thread.stack, kStackBytes);
#endif
  user_code = true;
  switch_context(machine.main, thread.context);
  user_code = false;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.main_fake_stack, nullptr, nullptr);
#endif
}

inline void prepare_block(int n, dim3 block) {
  while (int(machine.threads.size()) < n) {
    void* stack = mmap(nullptr, kStackBytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                       -1, 0);
    if (stack == MAP_FAILED) throw Error("no memory for the stacks of a block");
    mprotect(stack, kPage, PROT_NONE);  // a kernel with a huge frame faults instead of corrupting its neighbour
    machine.threads.emplace_back().stack = static_cast<char*>(stack) + kPage;
  }
  machine.n = n;
  machine.at_block = machine.done = 0;
  machine.warp_waiting.assign((n + 31) / 32, 0);
  for (auto& threads : machine.at_named) threads.clear();
  machine.landings.clear();
  for (int i = 0; i < n; ++i) {
    Thread& thread = machine.threads[i];
    thread.linear = i;
    thread.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    thread.state = State::ready;
    thread.copies.clear();
    thread.groups.clear();
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(thread.stack, kStackBytes);
#endif
#ifdef LLMFAST_UCONTEXT
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack;
    thread.context.uc_stack.ss_size = kStackBytes;
    makecontext(&thread.context, fiber_main, 0);
#else
    void** top = reinterpret_cast<void**>(thread.stack + kStackBytes) - 1;  // rsp % 16 == 8 on entry, as after a call
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int r = 0; r < 6; ++r) *--top = nullptr;
    thread.context = top;
#endif
  }
}

// ---- meeting points -------------------------------------------------------------------------------------------------

inline void block_barrier(Site site) {
  Quiet quiet;
  Thread& self = *machine.current;
  self.state = State::at_block;
  self.what = "__syncthreads";
  self.site = site;
  if (++machine.at_block < machine.n) return leave_fiber();
  std::vector<int> all(machine.n);
  for (int i = 0; i < machine.n; ++i) {
    Thread& other = machine.threads[i];
    if (other.site.address != site.address)
      fail("threads meet at different __syncthreads: " + site.str() + " and " + other.site.str());
    other.state = State::ready;
    all[i] = i;
  }
  machine.at_block = 0;
  if (hooks.sync) hooks.sync(all.data(), machine.n);
}

// The last of the lanes in `mask` to arrive runs op on the arguments of all lanes, then all go on.
inline void warp_collective(const char* what, unsigned mask, void* argument, void (*op)(void**, unsigned), Site site,
                            bool orders_memory) {
  Quiet quiet;
  Thread& self = *machine.current;
  const int warp = self.linear / 32, lane = self.linear % 32;
  if (!(mask >> lane & 1)) fail(std::string(what) + " " + site.str() + ": the calling lane is not in its mask");
  const int lanes = std::min(32, machine.n - warp * 32);
  if (lanes < 32 && mask >> lanes) fail(std::string(what) + " " + site.str() + ": the mask names lanes beyond the block");
  self.state = State::at_warp;
  self.what = what;
  self.site = site;
  self.mask = mask;
  self.argument = argument;
  void* arguments[32] = {};
  int threads[32], n = 0;
  bool all = ++machine.warp_waiting[warp] >= __builtin_popcount(mask);
  for (int l = 0; all && l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    Thread& other = machine.threads[warp * 32 + l];
    all = other.state == State::at_warp && other.mask == mask && other.site.address == site.address;
    arguments[l] = other.argument;
    threads[n++] = other.linear;
  }
  if (!all) return leave_fiber();
  if (op) op(arguments, mask);
  if (orders_memory && hooks.sync) hooks.sync(threads, n);
  for (int i = 0; i < n; ++i) machine.threads[threads[i]].state = State::ready;
  machine.warp_waiting[warp] -= n;
}

// Waits, however long, until condition(argument).
inline void wait_until(const char* what, bool (*condition)(void*), void* argument, Site site) {
  if (condition(argument)) return;
  Thread& self = *machine.current;
  self.state = State::until;
  self.what = what;
  self.site = site;
  self.argument = argument;
  self.condition = condition;
  leave_fiber();
}

inline void named_barrier(int id, int threads, Site site) {
  Quiet quiet;
  if (id < 1 || id > 15 || threads % 32) fail("named_barrier " + site.str() + ": no such barrier");
  Thread& self = *machine.current;
  self.state = State::at_named;
  self.what = "named_barrier";
  self.site = site;
  auto& waiting = machine.at_named[id];
  waiting.push_back(self.linear);
  if (int(waiting.size()) < threads) return leave_fiber();
  for (int i : waiting) machine.threads[i].state = State::ready;
  if (hooks.sync) hooks.sync(waiting.data(), threads);
  waiting.clear();
}

// ---- accesses that the compiler does not see -------------------------------------------------------------------------

inline void note(const void* p, size_t bytes, bool write, const Site& site) {
  if (hooks.access) hooks.access(p, bytes, write, site.address);
}

inline void land(const Copy& copy) {
  note(copy.to, copy.bytes, true, copy.site);
  if (copy.from)
    memcpy(copy.to, copy.from, copy.bytes);
  else
    memset(copy.to, 0, copy.bytes);
}

// ---- a launch -------------------------------------------------------------------------------------------------------

[[noreturn]] inline void report_deadlock() {
  std::map<std::string, std::vector<int>> groups;
  for (int i = 0; i < machine.n; ++i) {
    const Thread& thread = machine.threads[i];
    groups[thread.state == State::done ? "have exited" : std::string("wait at ") + thread.what + " " + thread.site.str()]
        .push_back(i);
  }
  std::string message = machine.kernel + " block " + str(blockIdx) + ": deadlock:";
  for (auto& [where, who] : groups)
    message += " " + std::to_string(who.size()) + " threads (first " + std::to_string(who[0]) + ") " + where + ";";
  throw Error(message);
}

inline void run_block() {
  std::vector<int> warps((machine.n + 31) / 32), lanes(32);
  for (size_t i = 0; i < warps.size(); ++i) warps[i] = int(config.seed == 1 ? warps.size() - 1 - i : i);
  for (int i = 0; i < 32; ++i) lanes[i] = config.seed == 1 ? 31 - i : i;
  while (machine.done < machine.n) {
    bool progress = false;
    if (config.seed > 1) {
      std::shuffle(warps.begin(), warps.end(), machine.random);
      std::shuffle(lanes.begin(), lanes.end(), machine.random);
    }
    for (int warp : warps)  // each warp runs as far as it gets: the largest skew between warps
      for (bool more = true; more;) {
        more = false;
        for (int lane : lanes) {
          const int i = warp * 32 + lane;
          if (i >= machine.n) continue;
          Thread& thread = machine.threads[i];
          if (thread.state == State::until && thread.condition(thread.argument)) thread.state = State::ready;
          if (thread.state != State::ready) continue;
          enter_fiber(thread);
          if (!machine.error.empty()) throw Error(machine.error);
          more = progress = true;
        }
      }
    if (progress) continue;
    if (machine.landings.empty()) report_deadlock();
    const size_t next = config.seed > 1 ? machine.random() % machine.landings.size() : 0;  // in any order
    const auto land = machine.landings[next];
    machine.landings.erase(machine.landings.begin() + int64_t(next));
    land();
  }
  if (!machine.landings.empty()) throw Error(machine.kernel + ": a block ends while copies to it are under way");
}

// Shared memory of `bytes`; what lies between its end and the next multiple of the alignment is off limits to ASan.
inline void poison_tail([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes, [[maybe_unused]] size_t alignment) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(static_cast<char*>(data) + bytes, (alignment - bytes % alignment) % alignment);
#endif
}
inline void* allocate(size_t bytes, size_t alignment) {
  return aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
}

// One LLMFAST_SHARED: blocks run one after another, so that one array serves them all.
template <typename T, int N>
struct StaticShared {
  T* data;
  explicit StaticShared(const char* name) {
    Quiet quiet;
    constexpr size_t kBytes = sizeof(T) * N;
    data = static_cast<T*>(allocate(kBytes, 16));
    poison_tail(data, kBytes, 16);
    machine.shared.push_back({name, data, kBytes});
    memset(static_cast<void*>(data), 0xFF, kBytes);
  }
  T (&get())[N] { return *reinterpret_cast<T(*)[N]>(data); }
};

// The launch's dynamic shared memory, at an address that promises no more than the alignment asked for.
template <typename T>
T* dynamic_shared(size_t alignment) {
  if (alignment > kDynamicAlignment) fail("dynamic shared memory of an alignment above 1024");
  return reinterpret_cast<T*>(machine.dynamic);
}

template <typename T>
struct Same {
  using type = T;
};

template <typename... P>
void launch(const char* name, dim3 grid, dim3 block, size_t dynamic_bytes, void (*kernel)(P...),
            typename Same<P>::type... arguments) {
  const size_t n = size_t(block.x) * block.y * block.z;
  if (!n || n > 1024 || block.z > 64 || !grid.x || !grid.y || !grid.z || grid.x > 0x7FFFFFFF || grid.y > 65535 ||
      grid.z > 65535)
    throw Error(std::string(name) + ": invalid launch configuration");
  const auto limit = machine.dynamic_limit.find(reinterpret_cast<const void*>(kernel));
  if (dynamic_bytes > (limit == machine.dynamic_limit.end() ? 48 << 10 : limit->second))
    throw Error(std::string(name) + ": dynamic shared memory over the limit (48 KiB without cudaFuncSetAttribute)");
  std::tuple<P...> copies(arguments...);
  auto body = [&] { std::apply([&](auto&... v) { kernel(v...); }, copies); };
  machine.body = [](void* b) { (*static_cast<decltype(body)*>(b))(); };
  machine.body_argument = &body;
  machine.kernel = name;
  machine.error.clear();
  machine.random.seed(config.seed);
  ++machine.launches;
  gridDim = grid;
  blockDim = block;

  struct Dynamic {
    ~Dynamic() {
      free(machine.dynamic);
      machine.dynamic = nullptr;
      machine.dynamic_bytes = 0;
    }
  } dynamic;
  machine.dynamic_bytes = dynamic_bytes;
  if (dynamic_bytes) {
    machine.dynamic = static_cast<unsigned char*>(allocate(dynamic_bytes, kDynamicAlignment));
    poison_tail(machine.dynamic, dynamic_bytes, kDynamicAlignment);
  }
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t b = config.only_block >= 0 ? config.only_block : config.seed == 1 ? blocks - 1 - i : i;
    blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
    // A new block finds NaNs in its shared memory.
    if (dynamic_bytes) memset(machine.dynamic, 0xFF, dynamic_bytes);
    for (auto& array : machine.shared) memset(array.data, 0xFF, array.bytes);
    prepare_block(int(n), block);
    if (hooks.block_begin) hooks.block_begin(int(n));
    run_block();
    if (config.only_block >= 0) break;
  }
}

}  // namespace emu
