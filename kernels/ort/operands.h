// The inputs of a node, checked against the contract of its operator: what every provider's kernel begins with.
#pragma once

#include <string>
#include <vector>

#include "contract.h"

namespace qc {

// An error that names the operator, the node and what is wrong.
[[noreturn]] void refuse(const Contract& contract, const std::string& node, const std::string& problem);

// The attribute accuracy_level of a node, which has to be between 0 and 4; 0 for operators that have none.
int64_t accuracy_level(const Contract& contract, const Ort::ConstKernelInfo& info);

// Sizes and places. Nothing is read but shapes and types: contents may be on another device.
struct Operands {
  Operands(const Contract& contract, const std::string& node, const Ort::KernelContext& context);

  std::vector<int64_t> shape;  // of the result
  int64_t count;               // M, rows of activations
  int64_t rows;                // N
  int64_t columns;             // K
  int64_t groups;              // G
  int64_t group_size;          // g
  int64_t entries = 0;         // of all tables
  int entry = 1;               // columns that a code stands for
  bool half;                   // whether floats are of 16 bits
  bool zeros_are_codes = false;
  bool zero_each = false, starts_each = false, bias_each = false;  // one for each group, or row
  Ort::ConstValue activations, codes, scales, bias, codebook, starts, zero_points;
};

}  // namespace qc
