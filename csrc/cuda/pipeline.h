#pragma once
// Tiles on their way into shared memory, by cp.async, while those before them are multiplied.
#include "cuda/mma.h"

namespace llmfast::cuda {

// One turn of a loop over `step` from 1 - kStages to `steps`: load(step + kStages - 1) begins, and the tile of `step`
// has landed for all threads; false in the first kStages - 1 turns, which only load.
template <int kStages, class Load>
__device__ inline bool next_stage(int step, int steps, const Load& load) {
  if (step >= 0) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this step has landed for all, and all are done with the one whose place the next load takes
  }
  if (step + kStages - 1 < steps) load(step + kStages - 1);
  cp_async_commit();
  return step >= 0;
}

}  // namespace llmfast::cuda
