// The operators for ONNX Runtime's CPU provider: converts what kernels do not read in place, and splits the work.
#pragma once

#include <string>

#include "operands.h"

namespace qc {

class CpuKernel {
 public:
  static constexpr const char* kProvider = "CPUExecutionProvider";

  CpuKernel(const Contract& contract, const OrtKernelInfo* info);
  void compute(const Ort::KernelContext& context) const;

 private:
  const Contract& contract_;
  std::string name_;
  int64_t level_;
};

}  // namespace qc
