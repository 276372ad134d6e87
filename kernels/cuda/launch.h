// Y = A W^T + bias on a GPU: chooses one of the kernels of kernels/triton that were compiled into the library, and
// launches it through the CUDA driver.
#pragma once

#include <cstdint>
#include <string>

#include "../cpu/weight.h"

namespace qc::cuda {

// What is multiplied. Pointers are those of the device; the layouts are those of kernels/python/schemas.py.
struct Product {
  Kind kind;
  int bits;                // of a code
  int entry;               // columns that a code stands for
  bool half;               // whether floats are of 16 bits
  int64_t count;           // M, rows of activations
  int64_t rows;            // N
  int64_t columns;         // K
  int64_t groups;          // of a row
  int64_t group_size;      // in columns
  int64_t entries;         // of all tables
  bool zeros_are_codes;    // whether zero points are bytes
  bool zero_each;          // whether there is one for each group
  bool starts_each;        // whether there is a start for each row
  bool bias_each;          // whether there is a bias for each row
  const void* a;           // [M, K]
  const void* codes;       // [N, groups, bytes]
  const void* scales;      // [N, groups]
  const void* values;      // tables, or zero points that are floats
  const void* zero_codes;  // zero points that are bytes
  const void* starts;      // [N] or [1]
  const void* bias;        // [N] or [1]
  void* y;                 // [M, N]
};

// Whether kernels for CUDA were compiled into the library.
bool built();

// The processors that there are kernels for, as the compiler names them, and PTX for later ones.
std::string targets();

// Why no kernel can be launched in this process, or nothing.
std::string problem();

// Enqueue the product on a stream of the current context. Throws std::runtime_error that says what is wrong.
void launch(const Product& product, void* stream);

}  // namespace qc::cuda
