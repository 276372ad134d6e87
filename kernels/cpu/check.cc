// Runs every kernel of the processor on weights of all formats, in memory that is not a byte larger than it has to be, on
// several threads, and compares it with plain loops. Built with a sanitizer by tests/kernels/test_sanitizers.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "matmul.h"

namespace {

struct Case {
  qc::Kind kind;
  int bits, entry;
  int64_t rows, columns, group, count;
  bool int8, zero_each, zero_float;
};

// Work on as many threads as there are tasks, up to four.
void threads(int64_t count, const std::function<void(int64_t)>& work) {
  const int64_t workers = std::min<int64_t>(4, count);
  std::vector<std::thread> running;
  for (int64_t worker = 0; worker < workers; ++worker)
    running.emplace_back([&, worker] {
      for (int64_t at = worker; at < count; at += workers) work(at);
    });
  for (auto& each : running) each.join();
}

// The largest difference from a plain loop, as a share of the largest result.
double difference(const Case& c, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  const int64_t groups = (c.columns + c.group - 1) / c.group, padded = groups * c.group;
  std::vector<uint8_t> codes(c.rows * padded / c.entry * c.bits / 8);
  for (auto& byte : codes) byte = static_cast<uint8_t>(random());
  std::vector<float> scales(c.rows * groups), codebook(static_cast<size_t>(2 * c.entry) << c.bits), a(c.count * c.columns);
  for (auto* values : {&scales, &codebook, &a})
    for (float& value : *values) value = normal(random);
  std::vector<uint8_t> zeros(c.zero_each ? c.rows * groups : 1);
  for (auto& zero : zeros) zero = static_cast<uint8_t>(random() % (1u << std::min(c.bits, 4)));
  const std::vector<float> half(1, 0.5f);
  std::vector<int32_t> starts(c.rows);
  for (auto& start : starts) start = static_cast<int32_t>(random() % 2 << c.bits);

  qc::Weight w{};
  w.kind = c.kind;
  w.bits = c.bits;
  w.rows = c.rows;
  w.columns = c.columns;
  w.groups = groups;
  w.group_size = c.group;
  w.entry = c.entry;
  w.codes = codes.data();
  w.scales = scales.data();
  if (c.kind == qc::Kind::kUniform) {
    w.zero_each = c.zero_each;
    w.zero_u8 = c.zero_float ? nullptr : zeros.data();
    w.zero_f32 = c.zero_float ? half.data() : nullptr;
  }
  if (c.kind == qc::Kind::kCodebook) {
    w.codebook = codebook.data();
    w.starts = starts.data();
    w.starts_each = true;
  }
  std::vector<float> y(c.count * c.rows), bias(c.rows);
  for (float& value : bias) value = normal(random);
  qc::matmul(w, a.data(), c.count, bias.data(), c.int8, y.data(), threads);

  const auto code = [&](int64_t n, int64_t k) {
    const int64_t bit = (n * padded / c.entry + k / c.entry) * c.bits;
    unsigned found = 0;
    for (int b = 0; b < c.bits; ++b) found |= (codes[(bit + b) / 8] >> ((bit + b) % 8) & 1u) << b;
    return found;
  };
  double worst = 0, largest = 0;
  for (int64_t m = 0; m < c.count; ++m) {
    const float* x = a.data() + m * c.columns;
    double size = 0;
    for (int64_t k = 0; k < c.columns; ++k) size += std::fabs(x[k]);
    size /= static_cast<double>(c.columns);
    for (int64_t n = 0; n < c.rows; ++n) {
      double total = bias[n];
      for (int64_t k = 0; k < c.columns; ++k) {
        const int64_t group = k / c.group;
        const double scale = scales[n * groups + group];
        double value = 0, factor = x[k];
        if (c.kind == qc::Kind::kUniform) value = code(n, k) - static_cast<double>(w.zero(n, group));
        if (c.kind == qc::Kind::kCodebook) value = codebook[(starts[n] + code(n, k)) * c.entry + k % c.entry];
        if (c.kind == qc::Kind::kSigns) {
          value = code(n, k) ? 1 : -1;
          factor = x[k] >= 0 ? size : -size;
        }
        total += value * scale * factor;
      }
      worst = std::max(worst, std::fabs(total - y[m * c.rows + n]));
      largest = std::max(largest, std::fabs(total));
    }
  }
  return worst / largest;
}

}  // namespace

int main() {
  int failures = 0, runs = 0;
  for (const int64_t group : {16, 32, 128, 576}) {
    for (const int64_t columns : {7, 136, 1000}) {
      for (const int64_t count : {1, 13, 33}) {
        std::vector<Case> cases;
        for (const int bits : {1, 2, 3, 4})
          for (const bool int8 : {false, true}) {
            cases.push_back({qc::Kind::kUniform, bits, 1, 37, columns, group, count, int8, true, false});
            cases.push_back({qc::Kind::kUniform, bits, 1, 5, columns, group, count, int8, false, bits == 1});
          }
        for (const int bits : {3, 4, 8})
          for (const int entry : {1, 2, 4})
            if (group % (8 * entry) == 0)
              cases.push_back({qc::Kind::kCodebook, bits, entry, 9, columns, group, count, false, false, false});
        cases.push_back({qc::Kind::kSigns, 1, 1, 21, columns, group, count, false, false, false});
        for (const Case& each : cases) {
          const double found = difference(each, static_cast<unsigned>(++runs));
          if (found <= (each.int8 ? 6e-2 : 1e-5)) continue;
          ++failures;
          std::printf("kind %d, %d bits, entries of %d, %lld x %lld, groups of %lld, %lld rows, int8 %d: %g\n",
                      static_cast<int>(each.kind), each.bits, each.entry, static_cast<long long>(each.rows),
                      static_cast<long long>(columns), static_cast<long long>(group), static_cast<long long>(count),
                      each.int8, found);
        }
      }
    }
  }
  std::printf("%s kernels: %d of %d cases failed\n", qc::isa_name(qc::isa()), failures, runs);
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
