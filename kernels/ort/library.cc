// The operators of kernels/python/schemas.py for ONNX Runtime's CPU provider: what is checked, allocated and converted.
//
// An operator is registered once for each combination of element types that its contract allows. Kernels take anything
// that the contract allows; what else arrives is an error that says which number is wrong.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <cstring>
#include <deque>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/matmul.h"

namespace {

using Element = ONNXTensorElementDataType;
constexpr Element kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr Element kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
constexpr Element kByte = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
constexpr Element kInt = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;

// Where an operator's inputs are.
struct Contract {
  const char* name;
  qc::Kind kind;
  int bits;

  int codebook() const { return 2; }
  int starts() const { return 3; }
  int scales() const { return kind == qc::Kind::kCodebook ? 4 : 2; }
  int zero_points() const { return 3; }
  int bias() const { return scales() + (kind == qc::Kind::kUniform ? 2 : 1); }
  int inputs() const { return bias() + 1; }
};

const Contract kContracts[] = {
    {"MatMul1Bit", qc::Kind::kUniform, 1},        {"MatMul2Bits", qc::Kind::kUniform, 2},
    {"MatMul3Bits", qc::Kind::kUniform, 3},       {"MatMul4Bits", qc::Kind::kUniform, 4},
    {"MatMulCodebook8", qc::Kind::kCodebook, 3},  {"MatMulCodebook16", qc::Kind::kCodebook, 4},
    {"MatMulCodebook256", qc::Kind::kCodebook, 8}, {"MatMulSigns", qc::Kind::kSigns, 1},
};

float from_half(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = bits >> 10 & 0x1f, rest = bits & 0x3ff;
  uint32_t word;
  if (exponent == 0x1f) {
    word = sign | 0x7f800000 | rest << 13;
  } else if (exponent != 0) {
    word = sign | (exponent + 112) << 23 | rest << 13;
  } else {
    const float small = static_cast<float>(rest) * 5.9604644775390625e-08f;  // 2^-24
    return sign ? -small : small;
  }
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// Round to nearest, ties to even.
uint16_t to_half(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  const uint16_t sign = static_cast<uint16_t>(word >> 16 & 0x8000);
  word &= 0x7fffffff;
  if (word >= 0x47800000) return sign | (word > 0x7f800000 ? 0x7e00 : 0x7c00);  // 65536 and more
  if (word < 0x38800000) {                                                      // below 2^-14: multiples of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &word, sizeof magnitude);
    const float shifted = magnitude + 0.5f;  // 0.5 has a last place of 2^-24
    uint32_t rounded;
    std::memcpy(&rounded, &shifted, sizeof rounded);
    return static_cast<uint16_t>(sign | (rounded - 0x3f000000));
  }
  const uint32_t odd = word >> 13 & 1;
  return static_cast<uint16_t>(sign | ((word + 0xfff + odd - 0x38000000) >> 13));
}

// A float tensor as float32: in place, or converted.
class Floats {
 public:
  Floats() = default;
  explicit Floats(const Ort::ConstValue& value) {
    const auto info = value.GetTensorTypeAndShapeInfo();
    count = info.GetElementCount();
    if (info.GetElementType() == kFloat) {
      data = value.GetTensorData<float>();
      return;
    }
    const auto* halves = static_cast<const uint16_t*>(value.GetTensorRawData());
    copy_.resize(count);
    for (size_t i = 0; i < count; ++i) copy_[i] = from_half(halves[i]);
    data = copy_.data();
  }

  const float* data = nullptr;
  size_t count = 0;

 private:
  std::vector<float> copy_;
};

std::vector<int64_t> shape_of(const Ort::ConstValue& value) { return value.GetTensorTypeAndShapeInfo().GetShape(); }

std::string text(const std::vector<int64_t>& shape) {
  std::string found = "[";
  for (size_t i = 0; i < shape.size(); ++i) found += (i ? ", " : "") + std::to_string(shape[i]);
  return found + "]";
}

const char* type_name(Element type) {
  return type == kFloat ? "float32" : type == kHalf ? "float16" : type == kByte ? "uint8" : "int32";
}

class Kernel {
 public:
  Kernel(const Contract& contract, const OrtKernelInfo* info) : contract_(contract) {
    Ort::ConstKernelInfo known(info);
    if (contract.kind == qc::Kind::kUniform) level_ = known.GetAttribute<int64_t>("accuracy_level");
    name_ = known.GetNodeName();
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    try {
      compute(raw);
      return nullptr;
    } catch (const Ort::Exception& error) {
      return Ort::GetApi().CreateStatus(error.GetOrtErrorCode(), error.what());
    } catch (const std::exception& error) {
      return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
    }
  }

 private:
  void compute(OrtKernelContext* raw) {
    Ort::KernelContext context(raw);
    const auto activations = context.GetInput(0);
    std::vector<int64_t> shape = shape_of(activations);
    require(!shape.empty(), "A is a single number");
    qc::Weight w = weight(context, shape.back());
    int64_t count = 1;
    for (size_t i = 0; i + 1 < shape.size(); ++i) count *= shape[i];
    const Floats a(activations), scales(context.GetInput(contract_.scales()));
    const Floats bias(context.GetInput(contract_.bias()));
    require(static_cast<int64_t>(scales.count) == w.rows * w.groups, "scales are not one for each group");
    require(static_cast<int64_t>(bias.count) == w.rows || bias.count == 1, "bias is neither [N] nor [1]");
    w.scales = scales.data;
    Floats codebook, zeros;
    if (contract_.kind == qc::Kind::kCodebook) {
      codebook = Floats(context.GetInput(contract_.codebook()));
      w.codebook = codebook.data;
      check_starts(context, w, static_cast<int64_t>(codebook.count) / w.entry);
    } else if (contract_.kind == qc::Kind::kUniform) {
      const auto value = context.GetInput(contract_.zero_points());
      const auto info = value.GetTensorTypeAndShapeInfo();
      const auto number = static_cast<int64_t>(info.GetElementCount());
      require(number == 1 || number == w.rows * w.groups, "zero_points are neither one nor one for each group");
      w.zero_each = number != 1;
      if (info.GetElementType() == kByte) {
        w.zero_u8 = value.GetTensorData<uint8_t>();
      } else {
        zeros = Floats(value);
        w.zero_f32 = zeros.data;
      }
    }
    shape.back() = w.rows;
    auto output = context.GetOutput(0, shape);
    const bool half = activations.GetTensorTypeAndShapeInfo().GetElementType() == kHalf;
    std::vector<float> wide(half ? count * w.rows : 0), spread;
    float* y = half ? wide.data() : output.GetTensorMutableData<float>();
    const float* added = bias.data;
    if (bias.count == 1 && w.rows != 1) {
      added = nullptr;
      if (bias.data[0] != 0.0f) {
        spread.assign(w.rows, bias.data[0]);
        added = spread.data();
      }
    }
    qc::matmul(w, a.data, count, added, level_ == 4, y, parallel(context));
    if (half) {
      auto* halves = static_cast<uint16_t*>(output.GetTensorMutableRawData());
      for (size_t i = 0; i < wide.size(); ++i) halves[i] = to_half(wide[i]);
    }
  }

  // The weight's sizes and codes.
  qc::Weight weight(const Ort::KernelContext& context, int64_t columns) const {
    const auto codes = context.GetInput(1);
    const auto shape = shape_of(codes);
    require(shape.size() == 3, "codes " + text(shape) + " are not [N, G, bytes]");
    require(shape[2] % contract_.bits == 0, std::to_string(shape[2]) + " bytes are no whole group of " +
                                                std::to_string(contract_.bits) + "-bit codes");
    qc::Weight w{};
    w.kind = contract_.kind;
    w.bits = contract_.bits;
    w.rows = shape[0];
    w.groups = shape[1];
    w.columns = columns;
    w.entry = 1;
    if (contract_.kind == qc::Kind::kCodebook) {
      const auto table = shape_of(context.GetInput(contract_.codebook()));
      require(table.size() == 2 && table[1] >= 1, "codebook " + text(table) + " is not [entries, columns]");
      w.entry = static_cast<int>(table[1]);
    }
    w.group_size = shape[2] / w.bits * 8 * w.entry;
    const int64_t groups = w.group_size ? (columns + w.group_size - 1) / w.group_size : 0;
    require(groups == w.groups, std::to_string(w.groups) + " groups of " + std::to_string(w.group_size) +
                                    " columns do not make up K = " + std::to_string(columns));
    w.codes = codes.GetTensorData<uint8_t>();
    return w;
  }

  // The first entries of tables, each of which has to be there.
  void check_starts(const Ort::KernelContext& context, qc::Weight& w, int64_t entries) const {
    const auto value = context.GetInput(contract_.starts());
    const auto number = static_cast<int64_t>(value.GetTensorTypeAndShapeInfo().GetElementCount());
    require(number == 1 || number == w.rows, "starts are neither one nor one for each row");
    w.starts = value.GetTensorData<int32_t>();
    w.starts_each = number != 1;
    for (int64_t i = 0; i < number; ++i)
      require(w.starts[i] >= 0 && w.starts[i] + (int64_t{1} << w.bits) <= entries,
              "a table begins at entry " + std::to_string(w.starts[i]) + " of " + std::to_string(entries));
  }

  static qc::Parallel parallel(const Ort::KernelContext& context) {
    return [&context](int64_t count, const std::function<void(int64_t)>& work) {
      if (count == 1) return work(0);
      context.ParallelFor([](void* user, size_t at) { (*static_cast<const std::function<void(int64_t)>*>(user))(at); },
                          static_cast<size_t>(count), 0,
                          const_cast<void*>(static_cast<const void*>(&work)));
    };
  }

  void require(bool holds, const std::string& problem) const {
    if (!holds) throw Ort::Exception(std::string(contract_.name) + " '" + name_ + "': " + problem, ORT_INVALID_ARGUMENT);
  }

  const Contract& contract_;
  int64_t level_ = 0;
  std::string name_;
};

// One operator for one combination of types.
struct Operator : Ort::CustomOpBase<Operator, Kernel, true> {
  Operator(const Contract& contract, Element floats, Element zeros) : contract_(contract), floats_(floats), zeros_(zeros) {}

  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    try {
      *kernel = new Kernel(contract_, info);
      return nullptr;
    } catch (const std::exception& error) {
      return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
    }
  }
  const char* GetName() const { return contract_.name; }
  const char* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
  size_t GetInputTypeCount() const { return contract_.inputs(); }
  Element GetInputType(size_t index) const {
    const int at = static_cast<int>(index);
    if (at == 1) return kByte;
    if (contract_.kind == qc::Kind::kCodebook && at == contract_.starts()) return kInt;
    if (contract_.kind == qc::Kind::kUniform && at == contract_.zero_points()) return zeros_;
    return floats_;
  }
  size_t GetOutputTypeCount() const { return 1; }
  Element GetOutputType(size_t) const { return floats_; }

 private:
  const Contract& contract_;
  Element floats_, zeros_;
};

// All combinations that are registered.
std::deque<Operator>& operators() {
  static std::deque<Operator> all;
  if (all.empty()) {
    for (const Contract& contract : kContracts)
      for (const Element floats : {kFloat, kHalf})
        for (const Element zeros : {kByte, floats})
          if (zeros == kByte || contract.kind == qc::Kind::kUniform) all.emplace_back(contract, floats, zeros);
  }
  return all;
}

}  // namespace

extern "C" {

// A line for each operator and combination of types: NAME(type, ...) -> type.
__attribute__((visibility("default"))) const char* QcompilerSignatures() {
  static const std::string lines = [] {
    std::string found;
    for (const Operator& each : operators()) {
      found += std::string(each.GetName()) + "(";
      for (size_t i = 0; i < each.GetInputTypeCount(); ++i) found += (i ? ", " : "") + std::string(type_name(each.GetInputType(i)));
      found += ") -> " + std::string(type_name(each.GetOutputType(0))) + "\n";
    }
    return found;
  }();
  return lines.c_str();
}

// Which instruction set the kernels use.
__attribute__((visibility("default"))) const char* QcompilerIsa() { return qc::isa_name(qc::isa()); }

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
    if (!filled)
      for (Operator& each : operators()) domain.Add(&each);
    filled = true;
    Ort::UnownedSessionOptions(options).Add(domain);
  } catch (const std::exception& error) {
    return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
  }
  return nullptr;
}
}
