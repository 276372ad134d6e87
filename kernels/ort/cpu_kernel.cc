#include "cpu_kernel.h"

#include <cstring>

#include "../cpu/matmul.h"

namespace qc {
namespace {

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

Parallel parallel(const Ort::KernelContext& context) {
  return [&context](int64_t count, const std::function<void(int64_t)>& work) {
    if (count == 1) return work(0);
    context.ParallelFor([](void* user, size_t at) { (*static_cast<const std::function<void(int64_t)>*>(user))(at); },
                        static_cast<size_t>(count), 0, const_cast<void*>(static_cast<const void*>(&work)));
  };
}

}  // namespace

CpuKernel::CpuKernel(const Contract& contract, const OrtKernelInfo* info) : contract_(contract) {
  const Ort::ConstKernelInfo known(info);
  name_ = known.GetNodeName();
  level_ = accuracy_level(contract, known);
}

void CpuKernel::compute(const Ort::KernelContext& context) const {
  const Operands o(contract_, name_, context);
  const Floats a(o.activations), scales(o.scales), bias(o.bias);
  Floats codebook, zeros;
  Weight w{};
  w.kind = contract_.kind;
  w.bits = contract_.bits;
  w.rows = o.rows;
  w.columns = o.columns;
  w.groups = o.groups;
  w.group_size = o.group_size;
  w.entry = o.entry;
  w.codes = o.codes.GetTensorData<uint8_t>();
  w.scales = scales.data;
  w.zero_each = o.zero_each;
  w.starts_each = o.starts_each;
  if (contract_.kind == Kind::kCodebook) {
    codebook = Floats(o.codebook);
    w.codebook = codebook.data;
    w.starts = o.starts.GetTensorData<int32_t>();
    for (int64_t i = 0; i < (o.starts_each ? o.rows : 1); ++i)
      if (w.starts[i] < 0 || w.starts[i] + (int64_t{1} << w.bits) > o.entries)
        refuse(contract_, name_, "a table begins at entry " + std::to_string(w.starts[i]) + " of " + std::to_string(o.entries));
  } else if (contract_.kind == Kind::kUniform) {
    if (o.zeros_are_codes) {
      w.zero_u8 = o.zero_points.GetTensorData<uint8_t>();
    } else {
      zeros = Floats(o.zero_points);
      w.zero_f32 = zeros.data;
    }
  }
  auto output = context.GetOutput(0, o.shape);
  if (o.count == 0 || o.rows == 0) return;
  std::vector<float> wide(o.half ? o.count * o.rows : 0), spread;
  float* y = o.half ? wide.data() : output.GetTensorMutableData<float>();
  const float* added = bias.data;
  if (!o.bias_each && o.rows != 1) {
    added = nullptr;
    if (bias.data[0] != 0.0f) {
      spread.assign(o.rows, bias.data[0]);
      added = spread.data();
    }
  }
  matmul(w, a.data, o.count, added, level_ == 4, y, parallel(context));
  if (o.half) {
    auto* halves = static_cast<uint16_t*>(output.GetTensorMutableRawData());
    for (size_t i = 0; i < wide.size(); ++i) halves[i] = to_half(wide[i]);
  }
}

}  // namespace qc
