#include "cuda_kernel.h"

#include "../cuda/launch.h"

namespace qc {

CudaKernel::CudaKernel(const Contract& contract, const OrtKernelInfo* info) : contract_(contract) {
  const Ort::ConstKernelInfo known(info);
  name_ = known.GetNodeName();
  accuracy_level(contract, known);
}

void CudaKernel::compute(const Ort::KernelContext& context) const {
  const Operands o(contract_, name_, context);
  cuda::Product p{};
  p.kind = contract_.kind;
  p.bits = contract_.bits;
  p.entry = o.entry;
  p.half = o.half;
  p.count = o.count;
  p.rows = o.rows;
  p.columns = o.columns;
  p.groups = o.groups;
  p.group_size = o.group_size;
  p.entries = o.entries;
  p.zeros_are_codes = o.zeros_are_codes;
  p.zero_each = o.zero_each;
  p.starts_each = o.starts_each;
  p.bias_each = o.bias_each;
  p.a = o.activations.GetTensorRawData();
  p.codes = o.codes.GetTensorRawData();
  p.scales = o.scales.GetTensorRawData();
  p.bias = o.bias.GetTensorRawData();
  if (contract_.kind == Kind::kCodebook) {
    if (o.entries < int64_t{1} << p.bits) refuse(contract_, name_, "the codebook has " + std::to_string(o.entries) + " entries");
    p.values = o.codebook.GetTensorRawData();
    p.starts = o.starts.GetTensorRawData();
  } else if (contract_.kind == Kind::kUniform) {
    (o.zeros_are_codes ? p.zero_codes : p.values) = o.zero_points.GetTensorRawData();
  }
  p.y = context.GetOutput(0, o.shape).GetTensorMutableRawData();
  try {
    cuda::launch(p, context.GetGPUComputeStream());
  } catch (const std::exception& error) {
    refuse(contract_, name_, error.what());
  }
}

}  // namespace qc
