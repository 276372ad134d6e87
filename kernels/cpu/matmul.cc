#include "matmul.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace qc {

// What each instruction set has.
#define QC_KERNELS(name)                                                                      \
  namespace name {                                                                            \
  void multiply(const Weight&, const Activations&, int64_t, int64_t, float*, int64_t);        \
  void multiply_int8(const Weight&, const Activations&, int64_t, int64_t, float*, int64_t);   \
  void multiply_signs(const Weight&, const Activations&, int64_t, int64_t, float*, int64_t);  \
  void quantize_group(const float*, int64_t, int8_t*, float*, float*);                        \
  void read_signs(const float*, int64_t, uint64_t*, float*);                                  \
  }
QC_KERNELS(generic)
#if defined(__x86_64__)
QC_KERNELS(generic_avx2)
QC_KERNELS(avx512)
namespace avx512 {
bool runs(const Weight&);
bool runs_signs(const Weight&);
bool deals(const Weight&);
void deal(const int8_t*, int64_t, int, int8_t*);
void multiply_dealt(const Weight&, const Activations&, int64_t, int64_t, float*, int64_t);
void multiply_many(const Weight&, const Activations&, int64_t, int64_t, float*, int64_t);
}  // namespace avx512
namespace amx {
bool allowed();
bool runs(const Weight&);
int64_t tiled_bytes(int64_t, int64_t);
void tile(const int8_t*, int64_t, int64_t, int8_t*);
void turn(const float*, int64_t, int64_t, float*);
void multiply(const Weight&, const int8_t*, const float*, int64_t, int64_t, int64_t, float*, int64_t);
}  // namespace amx
#endif

namespace {

constexpr int64_t kRows = 64;    // of the weight in a task
constexpr int64_t kSmall = 150000;  // products of 8 bits, or a quarter as many exact ones, that threads are not worth
constexpr int64_t kMany = 8;     // rows of activations from which on decoding once for all of them pays
constexpr int64_t kTiles = 16;   // rows of activations from which on AMX pays

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kGeneric;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
                    __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("gfni");
  if (!wide) return Isa::kAvx2;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
  const bool tiles = (edx >> 24 & 1) && (edx >> 25 & 1);  // AMX-TILE, AMX-INT8
  return tiles && amx::allowed() ? Isa::kAmx : Isa::kAvx512;
#else
  return Isa::kGeneric;
#endif
}

Isa chosen() {
  const Isa best = detect();
  const char* asked = std::getenv("QCOMPILER_CPU");
  if (asked == nullptr) return best;
  for (const Isa level : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512, Isa::kAmx})
    if (std::strcmp(asked, isa_name(level)) == 0) return std::min(level, best);
  return best;
}

// The function of that name for the instruction set in use.
#if defined(__x86_64__)
#define QC_BEST(name) \
  (isa() >= Isa::kAvx512 ? avx512::name : isa() >= Isa::kAvx2 ? generic_avx2::name : generic::name)
#else
#define QC_BEST(name) generic::name
#endif

// What activations become, and the memory that it lies in.
struct Prepared {
  Activations view{};
  std::vector<float> values, sums, scales, sizes, turned_scales;
  std::vector<int8_t> codes, dealt, tiles;
  std::vector<uint64_t> signs;
};

int64_t rounded_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

void prepare_values(const Weight& w, const float* a, int64_t count, const Parallel& parallel, Prepared& out) {
  Activations& view = out.view;
  out.values.assign(count * view.padded, 0.0f);
  out.sums.resize(count * w.groups);
  parallel(count, [&](int64_t m) {
    float* row = out.values.data() + m * view.padded;
    std::memcpy(row, a + m * w.columns, w.columns * sizeof(float));
    for (int64_t g = 0; g < w.groups; ++g) {
      double total = 0;
      for (int64_t k = g * w.group_size; k < (g + 1) * w.group_size; ++k) total += row[k];
      out.sums[m * w.groups + g] = static_cast<float>(total);
    }
  });
  view.values = out.values.data();
  view.sums = out.sums.data();
}

void prepare_codes(const Weight& w, const float* a, int64_t count, const Parallel& parallel, Prepared& out) {
  Activations& view = out.view;
  out.codes.assign(count * view.padded, 0);
  out.scales.resize(count * w.groups);
  out.sums.resize(count * w.groups);
  const auto quantize = QC_BEST(quantize_group);
  parallel(count, [&](int64_t m) {
    for (int64_t g = 0; g < w.groups; ++g) {
      const int64_t first = g * w.group_size, size = std::min(w.group_size, w.columns - first), place = m * w.groups + g;
      quantize(a + m * w.columns + first, size, out.codes.data() + m * view.padded + first, &out.scales[place],
               &out.sums[place]);
    }
  });
  view.codes = out.codes.data();
  view.scales = out.scales.data();
  view.sums = out.sums.data();
}

#if defined(__x86_64__)
void prepare_dealt(const Weight& w, int64_t count, const Parallel& parallel, Prepared& out) {
  out.dealt.resize(count * out.view.padded);
  parallel(count, [&](int64_t m) {
    const int64_t place = m * out.view.padded;
    avx512::deal(out.view.codes + place, w.padded(), w.bits, out.dealt.data() + place);
  });
  out.view.dealt = out.dealt.data();
}
#endif

void prepare_signs(const Weight& w, const float* a, int64_t count, const Parallel& parallel, Prepared& out) {
  const int64_t words = out.view.padded / 64;
  out.signs.assign(count * words, 0);
  out.sizes.resize(count);
  const auto read = QC_BEST(read_signs);
  parallel(count, [&](int64_t m) { read(a + m * w.columns, w.columns, out.signs.data() + m * words, &out.sizes[m]); });
  out.view.signs = out.signs.data();
  out.view.sizes = out.sizes.data();
}

Multiply choose(const Weight& w, const Activations& a, bool int8) {
  const int64_t count = a.count;
#if defined(__x86_64__)
  const bool wide = isa() >= Isa::kAvx512;
  if (w.kind == Kind::kSigns && wide && avx512::runs_signs(w)) return avx512::multiply_signs;
  if (w.kind != Kind::kSigns && wide && avx512::runs(w))
    return int8 ? (a.dealt ? avx512::multiply_dealt : avx512::multiply_int8)
           : count >= kMany ? avx512::multiply_many : avx512::multiply;
  if (isa() >= Isa::kAvx2) {
    if (w.kind == Kind::kSigns) return generic_avx2::multiply_signs;
    return int8 ? generic_avx2::multiply_int8 : generic_avx2::multiply;
  }
#endif
  (void)count;
  if (w.kind == Kind::kSigns) return generic::multiply_signs;
  return int8 ? generic::multiply_int8 : generic::multiply;
}

}  // namespace

Isa isa() {
  static const Isa level = chosen();
  return level;
}

const char* isa_name(Isa level) {
  switch (level) {
    case Isa::kGeneric: return "generic";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    default: return "amx";
  }
}

void matmul(const Weight& w, const float* a, int64_t count, const float* bias, bool int8, float* y,
            const Parallel& threads) {
  if (count == 0 || w.rows == 0) return;
  int8 = int8 && w.kind == Kind::kUniform;
  const int64_t work = w.rows * w.padded() * count * (int8 || w.kind == Kind::kSigns ? 1 : 4);
  const Parallel alone = [](int64_t tasks, const std::function<void(int64_t)>& task) {
    for (int64_t at = 0; at < tasks; ++at) task(at);
  };
  const Parallel& parallel = work < kSmall ? alone : threads;
  Prepared prepared;
  prepared.view.count = count;
  prepared.view.padded = rounded_up(w.padded(), 64);
  if (w.kind == Kind::kSigns)
    prepare_signs(w, a, count, parallel, prepared);
  else if (int8)
    prepare_codes(w, a, count, parallel, prepared);
  else
    prepare_values(w, a, count, parallel, prepared);

  bool tiled = false;
#if defined(__x86_64__)
  tiled = int8 && isa() >= Isa::kAmx && count >= kTiles && amx::runs(w);
  if (tiled) {
    const Activations& view = prepared.view;
    const int64_t width = rounded_up(count, 16), blocks = width / 16;
    prepared.tiles.resize(amx::tiled_bytes(count, view.padded));
    prepared.turned_scales.resize(w.groups * width);
    parallel(blocks, [&](int64_t block) {
      amx::tile(view.codes + block * 16 * view.padded, std::min<int64_t>(16, count - block * 16), view.padded,
                prepared.tiles.data() + block * 16 * view.padded);
    });
    amx::turn(view.scales, count, w.groups, prepared.turned_scales.data());
  } else if (int8 && isa() >= Isa::kAvx512 && avx512::runs(w) && avx512::deals(w) && (w.bits != 3 || count == 1)) {
    // At 3 bits two rows of activations that share what is decoded are faster.
    prepare_dealt(w, count, parallel, prepared);
  }
#endif
  const Multiply multiply = choose(w, prepared.view, int8);
  parallel((w.rows + kRows - 1) / kRows, [&](int64_t task) {
    const int64_t begin = task * kRows, end = std::min(begin + kRows, w.rows);
#if defined(__x86_64__)
    if (tiled)
      amx::multiply(w, prepared.tiles.data(), prepared.turned_scales.data(), count, begin, end, y, w.rows);
    else
#endif
      multiply(w, prepared.view, begin, end, y, w.rows);
    if (bias != nullptr)
      for (int64_t m = 0; m < count; ++m)
        for (int64_t n = begin; n < end; ++n) y[m * w.rows + n] += bias[n];
  });
}

}  // namespace qc
