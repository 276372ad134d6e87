// Registers the operators of kernels/python/schemas.py with ONNX Runtime, for its CPU provider and, where kernels for CUDA
// were built, for its CUDA provider.
//
// An operator is registered once for each combination of element types that its contract allows. Kernels take anything
// that the contract allows; what else arrives is an error that says which number is wrong.
#include <deque>
#include <string>

#include "../cpu/matmul.h"
#include "../cuda/launch.h"
#include "cpu_kernel.h"
#include "cuda_kernel.h"

namespace {

using qc::Contract;
using qc::Element;

// What a kernel throws, as ONNX Runtime's status.
template <typename Work>
OrtStatusPtr caught(const Work& work) {
  try {
    work();
    return nullptr;
  } catch (const Ort::Exception& error) {
    return Ort::GetApi().CreateStatus(error.GetOrtErrorCode(), error.what());
  } catch (const std::exception& error) {
    return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
  }
}

template <typename K>
struct Kernel {
  OrtStatusPtr ComputeV2(OrtKernelContext* context) {
    return caught([&] { kernel.compute(Ort::KernelContext(context)); });
  }
  K kernel;
};

// One operator for one provider and combination of types.
template <typename K>
struct Operator : Ort::CustomOpBase<Operator<K>, Kernel<K>, true> {
  Operator(const Contract& contract, Element floats, Element zeros) : contract(contract), floats(floats), zeros(zeros) {}

  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return caught([&] { *kernel = new Kernel<K>{K(contract, info)}; });
  }
  const char* GetName() const { return contract.name; }
  const char* GetExecutionProviderType() const { return K::kProvider; }
  size_t GetInputTypeCount() const { return contract.inputs(); }
  Element GetInputType(size_t at) const { return contract.input_type(static_cast<int>(at), floats, zeros); }
  size_t GetOutputTypeCount() const { return 1; }
  Element GetOutputType(size_t) const { return floats; }

  const Contract& contract;
  Element floats, zeros;
};

// All combinations for a provider.
template <typename K>
std::deque<Operator<K>>& operators() {
  static std::deque<Operator<K>> all;
  if (all.empty()) {
    for (const Contract& contract : qc::kContracts)
      for (const Element floats : {qc::kFloat, qc::kHalf})
        for (const Element zeros : {qc::kByte, floats})
          if (zeros == qc::kByte || contract.kind == qc::Kind::kUniform) all.emplace_back(contract, floats, zeros);
  }
  return all;
}

}  // namespace

extern "C" {

// A line for each operator and combination of types: NAME(type, ...) -> type.
__attribute__((visibility("default"))) const char* QcompilerSignatures() {
  static const std::string lines = [] {
    std::string found;
    for (const auto& each : operators<qc::CpuKernel>()) {
      found += std::string(each.GetName()) + "(";
      for (size_t i = 0; i < each.GetInputTypeCount(); ++i) found += (i ? ", " : "") + std::string(qc::type_name(each.GetInputType(i)));
      found += ") -> " + std::string(qc::type_name(each.GetOutputType(0))) + "\n";
    }
    return found;
  }();
  return lines.c_str();
}

// Which instruction set the kernels use.
__attribute__((visibility("default"))) const char* QcompilerIsa() { return qc::isa_name(qc::isa()); }

// The processors that there are kernels for CUDA for, and why none can be launched, or nothing.
__attribute__((visibility("default"))) const char* QcompilerCudaTargets() {
  static const std::string found = qc::cuda::targets();
  return found.c_str();
}
__attribute__((visibility("default"))) const char* QcompilerCudaProblem() {
  static thread_local std::string found;
  found = qc::cuda::problem();
  return found.c_str();
}

// Enqueue a product whose operands are on the device, without ONNX Runtime; an error's text, or null.
__attribute__((visibility("default"))) const char* QcompilerCudaLaunch(const qc::cuda::Product* product, void* stream) {
  static thread_local std::string problem;
  try {
    qc::cuda::launch(*product, stream);
    return nullptr;
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
}

// The version of ONNX Runtime's API that this library was built for.
__attribute__((visibility("default"))) int QcompilerApiVersion() { return ORT_API_VERSION; }

__attribute__((visibility("default"))) OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                                                const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr)
    return base->GetApi(1)->CreateStatus(ORT_FAIL, "libqcompiler_ops was built for a newer ONNX Runtime than this one");
  Ort::InitApi(api);
  static Ort::CustomOpDomain domain{"ai.qcompiler"};
  static bool filled = false;
  try {
    if (!filled) {
      for (auto& each : operators<qc::CpuKernel>()) domain.Add(&each);
      if (qc::cuda::built())
        for (auto& each : operators<qc::CudaKernel>()) domain.Add(&each);
    }
    filled = true;
    Ort::UnownedSessionOptions(options).Add(domain);
  } catch (const std::exception& error) {
    return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
  }
  return nullptr;
}
}
