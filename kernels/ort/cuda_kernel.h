// The operators for ONNX Runtime's CUDA provider: all that they read and write is on the device.
#pragma once

#include <string>

#include "operands.h"

namespace qc {

// Computes exactly, whatever the accuracy level; a start that is out of its tables is moved into them.
class CudaKernel {
 public:
  static constexpr const char* kProvider = "CUDAExecutionProvider";

  CudaKernel(const Contract& contract, const OrtKernelInfo* info);
  void compute(const Ort::KernelContext& context) const;

 private:
  const Contract& contract_;
  std::string name_;
};

}  // namespace qc
