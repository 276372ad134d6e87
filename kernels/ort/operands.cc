#include "operands.h"

namespace qc {
namespace {

constexpr int64_t kGroupBytes = int64_t{1} << 31;

std::vector<int64_t> shape_of(const Ort::ConstValue& value) { return value.GetTensorTypeAndShapeInfo().GetShape(); }
int64_t number(const Ort::ConstValue& value) {
  return static_cast<int64_t>(value.GetTensorTypeAndShapeInfo().GetElementCount());
}

std::string text(const std::vector<int64_t>& shape) {
  std::string found = "[";
  for (size_t i = 0; i < shape.size(); ++i) found += (i ? ", " : "") + std::to_string(shape[i]);
  return found + "]";
}

}  // namespace

void refuse(const Contract& contract, const std::string& node, const std::string& problem) {
  throw Ort::Exception(std::string(contract.name) + " '" + node + "': " + problem, ORT_INVALID_ARGUMENT);
}

int64_t accuracy_level(const Contract& contract, const Ort::ConstKernelInfo& info) {
  if (contract.kind != Kind::kUniform) return 0;
  int64_t level = 0;
  try {
    level = info.GetAttribute<int64_t>("accuracy_level");
  } catch (const Ort::Exception& error) {
    refuse(contract, info.GetNodeName(), "accuracy_level has to be an integer from 0 to 4: " + std::string(error.what()));
  }
  if (level < 0 || level > 4)
    refuse(contract, info.GetNodeName(), "accuracy_level is " + std::to_string(level) + ", and has to be 0 to 4");
  return level;
}

Operands::Operands(const Contract& contract, const std::string& node, const Ort::KernelContext& context)
    : activations(context.GetInput(0)),
      codes(context.GetInput(contract.codes())),
      scales(context.GetInput(contract.scales())),
      bias(context.GetInput(contract.bias())) {
  const auto check = [&](bool holds, const std::string& problem) {
    if (!holds) refuse(contract, node, problem);
  };
  shape = shape_of(activations);
  check(!shape.empty(), "A is a single number");
  half = activations.GetTensorTypeAndShapeInfo().GetElementType() == kHalf;
  columns = shape.back();
  count = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) count *= shape[i];

  const auto stored = shape_of(codes);
  check(stored.size() == 3, "codes " + text(stored) + " are not [N, G, bytes]");
  rows = stored[0];
  groups = stored[1];
  check(stored[2] <= kGroupBytes, std::to_string(stored[2]) + " bytes are too many for a group");
  check(stored[2] % contract.bits == 0, std::to_string(stored[2]) + " bytes are no whole group of " +
                                            std::to_string(contract.bits) + "-bit codes");
  if (contract.kind == Kind::kCodebook) {
    codebook = context.GetInput(contract.codebook());
    const auto table = shape_of(codebook);
    check(table.size() == 2 && (table[1] == 1 || table[1] == 2 || table[1] == 4),
          "codebook " + text(table) + " is not [entries, 1, 2 or 4 columns]");
    entries = table[0];
    entry = static_cast<int>(table[1]);
    starts = context.GetInput(contract.starts());
    check(number(starts) == 1 || number(starts) == rows, "starts are neither one nor one for each row");
    starts_each = number(starts) != 1;
  }
  group_size = stored[2] / contract.bits * 8 * entry;
  const int64_t needed = group_size ? columns / group_size + (columns % group_size != 0) : 0;
  check(needed == groups && (group_size || !columns), std::to_string(groups) + " groups of " + std::to_string(group_size) +
                                                          " columns do not make up K = " + std::to_string(columns));
  check(number(scales) == rows * groups, "scales are not one for each group");
  check(number(bias) == rows || number(bias) == 1, "bias is neither [N] nor [1]");
  bias_each = number(bias) != 1;
  if (contract.kind == Kind::kUniform) {
    zero_points = context.GetInput(contract.zero_points());
    check(number(zero_points) == 1 || number(zero_points) == rows * groups,
          "zero_points are neither one nor one for each group");
    zero_each = number(zero_points) != 1;
    zeros_are_codes = zero_points.GetTensorTypeAndShapeInfo().GetElementType() == kByte;
  }
  shape.back() = rows;
}

}  // namespace qc
