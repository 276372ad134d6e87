// Y = A W^T + bias on the CPU: chooses kernels by what the processor has, makes activations ready, and splits the work.
#pragma once

#include <cstdint>
#include <functional>

#include "weight.h"

namespace qc {

// Instruction sets, each of which includes those before it.
enum class Isa { kGeneric, kAvx2, kAvx512, kAmx };

// The best one that the processor has, or a lower one that the environment variable QCOMPILER_CPU names: generic, avx2,
// avx512 or amx.
Isa isa();
const char* isa_name(Isa level);

// Calls work(0) ... work(count - 1), in any order and on any threads.
using Parallel = std::function<void(int64_t count, const std::function<void(int64_t)>& work)>;

// Multiply `count` rows of activations a [count, K] into y [count, N].
//
// `bias` is [N], or null. With `int8` activations may be rounded to 8 bits.
void matmul(const Weight& w, const float* a, int64_t count, const float* bias, bool int8, float* y,
            const Parallel& parallel);

}  // namespace qc
