#pragma once
// One new token of one head, for decode.cpp.
#include <cstdint>

#include "cpu/isa.h"

namespace llmfast::cpu {

// Appends key and value (D,) to the head's keys and values (slots, D), which hold `length` of them, and lets the query (D,)
// see all length + 1:  out = sum_j P_j v_j,  P = softmax(scale k_j . q).  scores: length + 1 floats of scratch.
template <typename T>
using DecodeHead = void (*)(const float* q, const float* k, const float* v, T* keys, T* values, int64_t length, int64_t D,
                            float scale, float* scores, float* out);

struct DecodeTable {
  DecodeHead<float> f32;
  DecodeHead<uint16_t> bf16;
};

}  // namespace llmfast::cpu

LLMFAST_DECLARE_SIMD(DecodeTable, decode_head)
