// The read bandwidth of this moment: two or more threads walk over one buffer, as wide and as simple as a CPU can.
//   cc -O3 -march=native -shared -fPIC -pthread read_memory.c
#include <pthread.h>
#include <stdint.h>

enum { kMaxThreads = 256 };

typedef uint64_t Line __attribute__((vector_size(64)));
typedef struct {
  const Line* begin;
  int64_t lines;
  uint64_t sum;
} Part;

static void* walk(void* argument) {
  Part* part = argument;
  Line sum[8] = {{0}};
  for (int64_t i = 0; i + 8 <= part->lines; i += 8)
    for (int j = 0; j < 8; ++j) sum[j] += part->begin[i + j];
  for (int j = 0; j < 8; ++j)
    for (int l = 0; l < 8; ++l) part->sum += sum[j][l];
  return 0;
}

// Reads `bytes` bytes from the 64-byte aligned `data`, each thread a part of them; returns a sum, so that nothing is left out.
uint64_t read_memory(const void* data, int64_t bytes, int threads) {
  pthread_t handles[kMaxThreads];
  Part parts[kMaxThreads];
  const int64_t lines = bytes / 64;
  uint64_t sum = 0;
  for (int t = 0; t < threads; ++t) {
    const int64_t first = lines * t / threads;
    parts[t] = (Part){(const Line*)data + first, lines * (t + 1) / threads - first, 0};
    if (t + 1 < threads) pthread_create(&handles[t], 0, walk, &parts[t]);
  }
  walk(&parts[threads - 1]);
  for (int t = 0; t < threads; ++t) {
    if (t + 1 < threads) pthread_join(handles[t], 0);
    sum += parts[t].sum;
  }
  return sum;
}
