// Products of 8-bit activations and codes with AMX, for many rows of activations.
//
// C = A B with tiles: A has 16 rows of the weight, 64 codes each, less their zero points; B has 64 columns of 16 rows of
// activations, in fours; C [16, 16] is int32. Codes of a group are summed up exactly; then scales follow in float, in
// registers that hold 16 rows of the weight times 16 rows of activations for all groups.
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

// 16 rows of codes less their zero points, as tiles: [K / 64, 16, 64].
template <int bits>
void decode_rows(const Weight& w, int64_t first, int64_t count, int8_t* out) {
  const int64_t steps = w.padded() / kBytes, inner = w.group_size / kBytes;
  for (int64_t r = 0; r < count; ++r) {
    const uint8_t* row = row_codes(w, first + r);
    for (int64_t step = 0; step < steps; ++step) {
      const __m512i zero = _mm512_set1_epi8(static_cast<int8_t>(w.zero(first + r, step / inner)));
      const __m512i codes = _mm512_sub_epi8(codes64<bits>(row + step * step_bytes(bits)), zero);
      _mm512_store_si512(out + (step * kTile + r) * kBytes, codes);
    }
  }
}

// The transpose of 16 registers of 16 floats, into rows of y.
inline void store_turned(__m512 r[16], int64_t count, float* y, int64_t ldy, __mmask16 part) {
  alignas(64) float found[kTile * kTile];
  for (int i = 0; i < kTile; ++i) _mm512_store_ps(found + i * kTile, r[i]);
  const __m512i column = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                            _mm512_set1_epi32(kTile));
  for (int64_t m = 0; m < count; ++m)
    _mm512_mask_storeu_ps(y + m * ldy, part, _mm512_i32gather_ps(column, found + m, 4));
}

// Some groups' tiles of sums are made one after the other before any is read: that hides how long each takes.
constexpr int kAhead = 4;

template <int bits>
void run(const Weight& w, const int8_t* tiles, const float* scales, int64_t count, int64_t begin, int64_t end, float* y,
         int64_t ldy) {
  const int64_t width = (count + kTile - 1) / kTile * kTile, steps = w.padded() / kBytes, inner = w.group_size / kBytes;
  std::vector<int8_t> space(steps * kTile * kBytes + kBytes);
  int8_t* codes = space.data() + (kBytes - reinterpret_cast<uintptr_t>(space.data()) % kBytes) % kBytes;
  std::vector<float> turned(w.groups * kTile);  // scales of 16 rows of the weight, [G, 16]
  alignas(64) int32_t found[kAhead][kTile * kTile];
  Config config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = kBytes;
    config.rows[i] = kTile;
  }
  _tile_loadconfig(&config);
  for (int64_t n = begin; n < end; n += kTile) {
    const int64_t rows = std::min<int64_t>(kTile, end - n);
    decode_rows<bits>(w, n, rows, codes);
    for (int64_t g = 0; g < w.groups; ++g)
      for (int64_t r = 0; r < kTile; ++r) turned[g * kTile + r] = r < rows ? w.scales[(n + r) * w.groups + g] : 0.0f;
    for (int64_t m = 0; m < count; m += kTile) {
      const int8_t* x = tiles + m * steps * kBytes;
      __m512 totals[kTile];
      for (int r = 0; r < kTile; ++r) totals[r] = _mm512_setzero_ps();
      for (int64_t group = 0; group < w.groups; group += kAhead) {
        const int64_t ahead = std::min<int64_t>(kAhead, w.groups - group);
        for (int64_t i = 0; i < ahead; ++i) {
          _tile_zero(0);
          for (int64_t at = (group + i) * inner; at < (group + i + 1) * inner; ++at) {
            _tile_loadd(4, codes + at * kTile * kBytes, kBytes);
            _tile_loadd(5, x + at * kTile * kBytes, kBytes);
            _tile_dpbssd(0, 4, 5);
          }
          _tile_stored(0, found[i], kBytes);
        }
        for (int64_t i = 0; i < ahead; ++i) {
          const __m512 size = _mm512_loadu_ps(scales + (group + i) * width + m);
          const float* scale = turned.data() + (group + i) * kTile;
          for (int r = 0; r < kTile; ++r) {
            const __m512 sums = _mm512_cvtepi32_ps(_mm512_load_si512(found[i] + r * kTile));
            totals[r] = _mm512_fmadd_ps(_mm512_mul_ps(sums, size), _mm512_set1_ps(scale[r]), totals[r]);
          }
        }
      }
      store_turned(totals, std::min<int64_t>(kTile, count - m), y + m * ldy + n, ldy,
                   static_cast<__mmask16>((1u << rows) - 1));
    }
  }
  _tile_release();
}

// Whether these kernels run a weight: zero points that are no codes are left to others.
bool runs(const Weight& w) {
  return w.kind == Kind::kUniform && w.group_size % kBytes == 0 && w.bits <= 4 && w.zero_u8 != nullptr;
}

void multiply(const Weight& w, const int8_t* tiles, const float* scales, int64_t count, int64_t begin, int64_t end,
              float* y, int64_t ldy) {
  switch (w.bits) {
    case 1: return run<1>(w, tiles, scales, count, begin, end, y, ldy);
    case 2: return run<2>(w, tiles, scales, count, begin, end, y, ldy);
    case 3: return run<3>(w, tiles, scales, count, begin, end, y, ldy);
    default: return run<4>(w, tiles, scales, count, begin, end, y, ldy);
  }
}

}  // namespace amx
}  // namespace qc
#pragma GCC pop_options
#endif
