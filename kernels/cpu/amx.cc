// Products of 8-bit activations and codes with AMX, for many rows of activations.
//
// C = A B with tiles: A has 16 rows of the weight, 64 codes each, as they come out of a plane; B has 64 columns of 16
// rows of activations, in fours; C [16, 16] is int32. Codes of a group are summed up exactly, then scales follow in
// float: totals [16 rows of the weight, rows of activations].
#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "weight.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,fma,amx-tile,amx-int8,popcnt,bmi2")

namespace qc {
namespace amx {

constexpr int kTile = 16;   // rows of a tile
constexpr int kBytes = 64;  // bytes of a row of a tile

struct alignas(64) Config {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Ask the kernel for the tile registers' state; false where it is refused.
bool allowed() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

#include "codes512.inc"

int64_t tiled_bytes(int64_t count, int64_t padded) { return (count + kTile - 1) / kTile * kTile * padded; }

// Lay codes of activations [M, padded] out as tiles: [M / 16, padded / 64, 16 fours of columns, 16 rows, 4].
void tile(const int8_t* codes, int64_t count, int64_t padded, int8_t* tiles) {
  const int64_t blocks = (count + kTile - 1) / kTile, steps = padded / kBytes;
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t step = 0; step < steps; ++step) {
      int8_t* to = tiles + (block * steps + step) * kTile * kBytes;
      for (int row = 0; row < kTile; ++row) {
        const int64_t m = block * kTile + row;
        for (int four = 0; four < 16; ++four) {
          int32_t word = 0;
          if (m < count) std::memcpy(&word, codes + m * padded + step * kBytes + 4 * four, 4);
          std::memcpy(to + four * kBytes + 4 * row, &word, 4);
        }
      }
    }
  }
}

// What the rows of activations are scaled by, laid out along them: [G, M rounded up to 16].
void turn(const float* values, int64_t count, int64_t groups, float* turned) {
  const int64_t width = (count + kTile - 1) / kTile * kTile;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t m = 0; m < width; ++m) turned[g * width + m] = m < count ? values[m * groups + g] : 0.0f;
}

template <int bits>
void decode_tile(const Weight& w, int64_t first, int64_t count, int64_t step, uint8_t* out) {
  constexpr int width = plane_width(bits, 0);
  for (int64_t r = 0; r < count; ++r) {
    const uint8_t* low = plane_row(w, 0, first + r) + step * 8 * width;
    const uint8_t* high = bits == 3 ? plane_row(w, 1, first + r) + step * 8 : nullptr;
    _mm512_store_si512(out + r * kBytes, codes64<bits>(low, high));
  }
}

// Add C, scaled, to totals: 16 rows of the weight, 16 rows of activations.
inline void add_scaled(const int32_t* sums, const Weight& w, int64_t first, int64_t count, int64_t group,
                       const float* scales, const float* wholes, float* totals, int64_t width) {
  const __m512 size = _mm512_loadu_ps(scales), whole = _mm512_loadu_ps(wholes);
  for (int64_t r = 0; r < count; ++r) {
    const float scale = w.scales[(first + r) * w.groups + group];
    const __m512 products = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums + r * kTile)), size);
    const __m512 centred = _mm512_fnmadd_ps(_mm512_set1_ps(w.zero(first + r, group)), whole, products);
    float* total = totals + r * width;
    _mm512_storeu_ps(total, _mm512_fmadd_ps(_mm512_set1_ps(scale), centred, _mm512_loadu_ps(total)));
  }
}

// Two tiles of activations at a time for each tile of codes.
template <int bits>
void run(const Weight& w, const int8_t* tiles, const float* scales, const float* sums, int64_t count, int64_t begin,
         int64_t end, float* y, int64_t ldy) {
  const int64_t width = (count + kTile - 1) / kTile * kTile, blocks = width / kTile, steps = w.padded() / kBytes;
  const int64_t inner = w.group_size / kBytes;
  std::vector<float> totals(kTile * width);
  std::vector<uint8_t> decoded((inner * kTile + 1) * kBytes);
  uint8_t* codes = decoded.data() + (kBytes - reinterpret_cast<uintptr_t>(decoded.data()) % kBytes) % kBytes;
  alignas(64) int32_t found[4][kTile * kTile];
  Config config;
  for (int i = 0; i < 8; ++i) config.row_bytes[i] = kBytes, config.rows[i] = kTile;
  _tile_loadconfig(&config);
  for (int64_t n = begin; n < end; n += kTile) {
    const int64_t rows = std::min<int64_t>(kTile, end - n);
    std::fill(totals.begin(), totals.end(), 0.0f);
    for (int64_t group = 0; group < w.groups; ++group) {
      for (int64_t at = 0; at < inner; ++at)
        decode_tile<bits>(w, n, rows, group * inner + at, codes + at * kTile * kBytes);
      const float* scale = scales + group * width;
      const float* sum = sums + group * width;
      const int8_t* x = tiles + group * inner * kTile * kBytes;
      int64_t block = 0;
      for (; block + 4 <= blocks; block += 4) {
        const int8_t* b[4];
        for (int i = 0; i < 4; ++i) b[i] = x + (block + i) * steps * kTile * kBytes;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t at = 0; at < inner; ++at) {
          const int64_t place = at * kTile * kBytes;
          _tile_loadd(4, codes + place, kBytes);
          _tile_loadd(5, b[0] + place, kBytes);
          _tile_dpbusd(0, 4, 5);
          _tile_loadd(6, b[1] + place, kBytes);
          _tile_dpbusd(1, 4, 6);
          _tile_loadd(7, b[2] + place, kBytes);
          _tile_dpbusd(2, 4, 7);
          _tile_loadd(5, b[3] + place, kBytes);
          _tile_dpbusd(3, 4, 5);
        }
        _tile_stored(0, found[0], kBytes);
        _tile_stored(1, found[1], kBytes);
        _tile_stored(2, found[2], kBytes);
        _tile_stored(3, found[3], kBytes);
        for (int i = 0; i < 4; ++i) {
          const int64_t m = (block + i) * kTile;
          add_scaled(found[i], w, n, rows, group, scale + m, sum + m, totals.data() + m, width);
        }
      }
      for (; block < blocks; ++block) {
        _tile_zero(0);
        for (int64_t at = 0; at < inner; ++at) {
          _tile_loadd(4, codes + at * kTile * kBytes, kBytes);
          _tile_loadd(5, x + (block * steps + at) * kTile * kBytes, kBytes);
          _tile_dpbusd(0, 4, 5);
        }
        _tile_stored(0, found[0], kBytes);
        const int64_t m = block * kTile;
        add_scaled(found[0], w, n, rows, group, scale + m, sum + m, totals.data() + m, width);
      }
    }
    for (int64_t m = 0; m < count; ++m)
      for (int64_t r = 0; r < rows; ++r) y[m * ldy + n + r] = totals[r * width + m];
  }
  _tile_release();
}

// Whether these kernels run a weight.
bool runs(const Weight& w) { return w.kind == Kind::kUniform && w.group_size % kBytes == 0 && w.bits <= 4; }

void multiply(const Weight& w, const int8_t* tiles, const float* scales, const float* sums, int64_t count,
              int64_t begin, int64_t end, float* y, int64_t ldy) {
  switch (w.bits) {
    case 1: return run<1>(w, tiles, scales, sums, count, begin, end, y, ldy);
    case 2: return run<2>(w, tiles, scales, sums, count, begin, end, y, ldy);
    case 3: return run<3>(w, tiles, scales, sums, count, begin, end, y, ldy);
    default: return run<4>(w, tiles, scales, sums, count, begin, end, y, ldy);
  }
}

}  // namespace amx
}  // namespace qc
#pragma GCC pop_options
#endif
