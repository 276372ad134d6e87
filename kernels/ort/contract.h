// The operators of kernels/python/schemas.py: where their inputs are, and what types these may have.
#pragma once

#include <onnxruntime_cxx_api.h>

#include "../cpu/weight.h"

namespace qc {

using Element = ONNXTensorElementDataType;
constexpr Element kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr Element kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
constexpr Element kByte = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
constexpr Element kInt = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;

inline const char* type_name(Element type) {
  return type == kFloat ? "float32" : type == kHalf ? "float16" : type == kByte ? "uint8" : "int32";
}

struct Contract {
  const char* name;
  Kind kind;
  int bits;

  int codes() const { return 1; }
  int codebook() const { return 2; }
  int starts() const { return 3; }
  int scales() const { return kind == Kind::kCodebook ? 4 : 2; }
  int zero_points() const { return 3; }
  int bias() const { return scales() + (kind == Kind::kUniform ? 2 : 1); }
  int inputs() const { return bias() + 1; }
  Element input_type(int at, Element floats, Element zeros) const {
    if (at == codes()) return kByte;
    if (kind == Kind::kCodebook && at == starts()) return kInt;
    if (kind == Kind::kUniform && at == zero_points()) return zeros;
    return floats;
  }
};

constexpr Contract kContracts[] = {
    {"MatMul1Bit", Kind::kUniform, 1},         {"MatMul2Bits", Kind::kUniform, 2},
    {"MatMul3Bits", Kind::kUniform, 3},        {"MatMul4Bits", Kind::kUniform, 4},
    {"MatMulCodebook8", Kind::kCodebook, 3},   {"MatMulCodebook16", Kind::kCodebook, 4},
    {"MatMulCodebook256", Kind::kCodebook, 8}, {"MatMulSigns", Kind::kSigns, 1},
};

}  // namespace qc
