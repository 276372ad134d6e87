// Kernels for processors with AVX-512 and its VBMI, VNNI and VPOPCNTDQ parts (Ice Lake, Zen 4 and later).
//
// All of them go along a row of the weight in steps of 64 columns. A step of codes of w bits is 8 * w bytes in a row of
// a plane whatever the groups are, and becomes 64 bytes in one register in two or three instructions.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "weight.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512vpopcntdq,fma,popcnt,bmi2")

namespace qc {
namespace avx512 {

// A row's planes, which may end in the middle of a step of 64: the last step is read from copies.
struct Row {
  const uint8_t* low;
  const uint8_t* high;
};

template <int bits>
inline Row row_of(const Weight& w, int64_t n) {
  return {plane_row(w, 0, n), bits == 3 ? plane_row(w, 1, n) : nullptr};
}

// Ask for what the next rows will read where these rows are now: each row is too short for processors to see it coming.
inline void prefetch(const uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }

constexpr int low_bytes(int bits) { return 8 * plane_width(bits, 0); }

// The bytes of the last, ragged step of a row, filled up with zeros.
struct Ragged {
  alignas(64) uint8_t low[64] = {};
  alignas(64) uint8_t high[8] = {};
};

template <int bits>
inline Ragged ragged_step(const Row& row, int64_t step, int64_t columns) {
  Ragged found;
  std::memcpy(found.low, row.low + step * low_bytes(bits), columns * plane_width(bits, 0) / 8);
  if (bits == 3) std::memcpy(found.high, row.high + step * 8, columns / 8);
  return found;
}

#include "codes512.inc"

// Scales of the lanes of a step: a lane holds 4 columns, and a step may hold parts of 1, 2 or 4 groups.
inline __m512 lane_scales(const float* scales, int64_t step, int64_t group_size) {
  if (group_size >= 64) return _mm512_set1_ps(scales[step * 64 / group_size]);
  if (group_size == 32) {
    const __m512 first = _mm512_set1_ps(scales[2 * step]), second = _mm512_set1_ps(scales[2 * step + 1]);
    return _mm512_mask_blend_ps(0xff00, first, second);
  }
  const __m512 four = _mm512_broadcast_f32x4(_mm_loadu_ps(scales + 4 * step));
  return _mm512_permutexvar_ps(_mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0), four);
}

// products[g] = scales[g] * sizes[g], and what zero points take away from the whole: sum of scale * zero * sum.
inline float scaled(const Weight& w, int64_t n, const float* sizes, const float* sums, float* products) {
  const float* scales = w.scales + n * w.groups;
  __m512 taken = _mm512_setzero_ps();
  for (int64_t g = 0; g < w.groups; g += 16) {
    const __mmask16 part = w.groups - g >= 16 ? 0xffff : static_cast<__mmask16>((1u << (w.groups - g)) - 1);
    const __m512 scale = _mm512_maskz_loadu_ps(part, scales + g);
    if (sizes)
      _mm512_storeu_ps(products + g, _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(part, sizes + g)));
    else
      _mm512_storeu_ps(products + g, scale);
    __m512 zero;
    if (!w.zero_each)
      zero = _mm512_set1_ps(w.zero(0, 0));
    else if (w.zero_u8)
      zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(part, w.zero_u8 + n * w.groups + g)));
    else
      zero = _mm512_maskz_loadu_ps(part, w.zero_f32 + n * w.groups + g);
    taken = _mm512_fmadd_ps(_mm512_mul_ps(scale, zero), _mm512_maskz_loadu_ps(part, sums + g), taken);
  }
  return _mm512_reduce_add_ps(taken);
}

// Some rows of the weight, and rows of activations that meet their codes once these are decoded.
template <int bits, int rows, int count>
inline void int8_rows(const Weight& w, const Activations& a, int64_t n, int64_t first, float* y, int64_t ldy,
                      float* products) {
  const int64_t stride = (w.groups + 31) / 16 * 16, ragged = w.padded() % 64, whole = w.padded() / 64;
  const int64_t inner = w.group_size >= 64 ? w.group_size / 64 : 1;
  const int64_t ahead = rows * w.padded() * plane_width(bits, 0) / 8;
  const int8_t* x[count];
  Row row[rows];
  float taken[rows][count];
  __m512 totals[rows][count];
  for (int m = 0; m < count; ++m) x[m] = a.codes + (first + m) * a.padded;
  for (int r = 0; r < rows; ++r) {
    row[r] = row_of<bits>(w, n + r);
    for (int m = 0; m < count; ++m) {
      const int64_t place = (first + m) * w.groups;
      taken[r][m] = scaled(w, n + r, a.scales + place, a.sums + place, products + (r * count + m) * stride);
      totals[r][m] = _mm512_setzero_ps();
    }
  }
  for (int64_t step = 0; step < whole; step += inner) {
    __m512i sums[rows][count];
    for (int r = 0; r < rows; ++r)
      for (int m = 0; m < count; ++m) sums[r][m] = _mm512_setzero_si512();
    for (int64_t at = step; at < step + inner; ++at) {
      __m512i values[count];
      for (int m = 0; m < count; ++m) values[m] = _mm512_loadu_si512(x[m] + at * 64);
      for (int r = 0; r < rows; ++r) {
        const uint8_t* high = bits == 3 ? row[r].high + at * 8 : nullptr;
        if (at % (64 / low_bytes(bits)) == 0) prefetch(row[r].low + at * low_bytes(bits) + ahead);
        if (bits == 3 && at % 8 == 0) prefetch(high + ahead / 2);
        const __m512i codes = codes64<bits>(row[r].low + at * low_bytes(bits), high);
        for (int m = 0; m < count; ++m) sums[r][m] = _mm512_dpbusd_epi32(sums[r][m], codes, values[m]);
      }
    }
    for (int r = 0; r < rows; ++r)
      for (int m = 0; m < count; ++m)
        totals[r][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][m]),
                                       lane_scales(products + (r * count + m) * stride, step, w.group_size), totals[r][m]);
  }
  if (ragged)
    for (int r = 0; r < rows; ++r) {
      const Ragged last = ragged_step<bits>(row[r], whole, ragged);
      const __m512i codes = codes64<bits>(last.low, last.high);
      for (int m = 0; m < count; ++m) {
        const __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, _mm512_loadu_si512(x[m] + whole * 64));
        totals[r][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums),
                                       lane_scales(products + (r * count + m) * stride, whole, w.group_size), totals[r][m]);
      }
    }
  for (int r = 0; r < rows; ++r)
    for (int m = 0; m < count; ++m)
      y[(first + m) * ldy + n + r] = _mm512_reduce_add_ps(totals[r][m]) - taken[r][m];
}

// Codes of 2 and 4 bits are decoded for less where 64 bytes of a plane become registers as they are: register p holds
// code p of each byte, so that activations have to be *dealt* like that, column p, p + n, p + 2n ... of a block of 64 n
// columns, n codes being in a byte. A lane then holds 4 n neighbouring columns of the block.
constexpr int dealt_planes(int bits) { return 8 / bits; }
constexpr int64_t dealt_columns(int bits) { return 64 * dealt_planes(bits); }

// Whether groups and blocks fit each other.
bool deals(const Weight& w) {
  if (w.bits != 2 && w.bits != 4) return false;
  const int64_t block = dealt_columns(w.bits), lane = 4 * dealt_planes(w.bits);
  return w.group_size >= block ? w.group_size % block == 0 : block % w.group_size == 0 && w.group_size % lane == 0;
}

// Lay codes of a row of activations out as above; what is left of the last block is not touched.
void deal(const int8_t* codes, int64_t columns, int bits, int8_t* dealt) {
  const int planes = dealt_planes(bits);
  const int64_t block = dealt_columns(bits);
  for (int64_t begin = 0; begin + block <= columns; begin += block)
    for (int p = 0; p < planes; ++p)
      for (int j = 0; j < 64; ++j) dealt[begin + 64 * p + j] = codes[begin + planes * j + p];
}

template <int bits, int rows>
inline void dealt_rows(const Weight& w, const Activations& a, int64_t n, int64_t m, float* y, int64_t ldy,
                       float* products) {
  constexpr int planes = dealt_planes(bits);
  constexpr int64_t block = dealt_columns(bits);
  const int64_t stride = (w.groups + 31) / 16 * 16, blocks = w.padded() / block;
  const int64_t inner = w.group_size >= block ? w.group_size / block : 1, ahead = rows * w.padded() * bits / 8;
  const int8_t* x = a.dealt + m * a.padded;
  const __m512i mask = _mm512_set1_epi8((1 << bits) - 1);
  alignas(64) int32_t lanes[16];
  for (int lane = 0; lane < 16; ++lane)
    lanes[lane] = w.group_size >= block ? 0 : static_cast<int32_t>(lane * 4 * planes / w.group_size);
  const __m512i groups = _mm512_load_si512(lanes);
  Row row[rows];
  float taken[rows];
  __m512 totals[rows];
  for (int r = 0; r < rows; ++r) {
    row[r] = row_of<bits>(w, n + r);
    taken[r] = scaled(w, n + r, a.scales + m * w.groups, a.sums + m * w.groups, products + r * stride);
    totals[r] = _mm512_setzero_ps();
  }
  for (int64_t first = 0; first < blocks; first += inner) {
    __m512i sums[rows];
    for (int r = 0; r < rows; ++r) sums[r] = _mm512_setzero_si512();
    for (int64_t at = first; at < first + inner; ++at) {
      __m512i values[planes];
      for (int p = 0; p < planes; ++p) values[p] = _mm512_loadu_si512(x + at * block + 64 * p);
      for (int r = 0; r < rows; ++r) {
        const __m512i bytes = _mm512_loadu_si512(row[r].low + 64 * at);
        prefetch(row[r].low + 64 * at + ahead);
        sums[r] = _mm512_dpbusd_epi32(sums[r], _mm512_and_si512(bytes, mask), values[0]);
        for (int p = 1; p < planes; ++p)
          sums[r] = _mm512_dpbusd_epi32(sums[r], _mm512_and_si512(_mm512_srli_epi16(bytes, bits * p), mask), values[p]);
      }
    }
    const int64_t group = first * block / w.group_size;
    for (int r = 0; r < rows; ++r) {
      const __m512 scales = _mm512_permutexvar_ps(groups, _mm512_loadu_ps(products + r * stride + group));
      totals[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r]), scales, totals[r]);
    }
  }
  // Columns behind the last whole block, in steps of 64 and in their own order.
  const int8_t* rest = a.codes + m * a.padded;
  for (int64_t k = blocks * block; k < w.padded(); k += 64) {
    const int64_t step = k / 64, left = std::min<int64_t>(64, w.padded() - k);
    const __m512i values = _mm512_loadu_si512(rest + k);
    for (int r = 0; r < rows; ++r) {
      const Ragged last = ragged_step<bits>(row[r], step, left);
      const __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes64<bits>(last.low, last.high), values);
      totals[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), lane_scales(products + r * stride, step, w.group_size),
                                  totals[r]);
    }
  }
  for (int r = 0; r < rows; ++r) y[m * ldy + n + r] = _mm512_reduce_add_ps(totals[r]) - taken[r];
}

template <int bits>
void dealt(const Weight& w, const Activations& a, int64_t begin, int64_t end, float* y, int64_t ldy) {
  std::vector<float> products(4 * ((w.groups + 31) / 16 * 16));
  int64_t n = begin;
  for (; n + 4 <= end; n += 4)
    for (int64_t m = 0; m < a.count; ++m) dealt_rows<bits, 4>(w, a, n, m, y, ldy, products.data());
  for (; n < end; ++n)
    for (int64_t m = 0; m < a.count; ++m) dealt_rows<bits, 1>(w, a, n, m, y, ldy, products.data());
}

void multiply_dealt(const Weight& w, const Activations& a, int64_t begin, int64_t end, float* y, int64_t ldy) {
  return w.bits == 2 ? dealt<2>(w, a, begin, end, y, ldy) : dealt<4>(w, a, begin, end, y, ldy);
}

template <int bits>
void int8(const Weight& w, const Activations& a, int64_t begin, int64_t end, float* y, int64_t ldy) {
  std::vector<float> products(8 * ((w.groups + 31) / 16 * 16));
  // A few rows of the weight meet all rows of activations while they are in the nearest cache.
  int64_t n = begin;
  for (; n + 4 <= end; n += 4) {
    int64_t m = 0;
    for (; m + 2 <= a.count; m += 2) int8_rows<bits, 4, 2>(w, a, n, m, y, ldy, products.data());
    for (; m < a.count; ++m) int8_rows<bits, 4, 1>(w, a, n, m, y, ldy, products.data());
  }
  for (; n < end; ++n)
    for (int64_t m = 0; m < a.count; ++m) int8_rows<bits, 1, 1>(w, a, n, m, y, ldy, products.data());
}

void multiply_int8(const Weight& w, const Activations& a, int64_t begin, int64_t end, float* y, int64_t ldy) {
  switch (w.bits) {
    case 1: return int8<1>(w, a, begin, end, y, ldy);
    case 2: return int8<2>(w, a, begin, end, y, ldy);
    case 3: return int8<3>(w, a, begin, end, y, ldy);
    default: return int8<4>(w, a, begin, end, y, ldy);
  }
}

// 16 values of a row of codes for exact products, looked up in a table of 16 floats. `low` and `high` point at the step.
template <int bits>
struct Lookup;

template <>
struct Lookup<1> {
  static inline __m512 add(const uint8_t* low, const uint8_t*, __m512, __m512 x, __m512 total) {
    uint16_t set;
    std::memcpy(&set, low, 2);
    return _mm512_mask_add_ps(total, set, total, x);
  }
};

template <>
struct Lookup<2> {
  static inline __m512 add(const uint8_t* low, const uint8_t*, __m512 table, __m512 x, __m512 total) {
    int32_t word;
    std::memcpy(&word, low, 4);
    const __m512i places = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    // The two bits above a code belong to the next one: the table repeats its 4 values.
    const __m512 values = _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi32(word), places), table);
    return _mm512_fmadd_ps(values, x, total);
  }
};

template <>
struct Lookup<3> {
  static inline __m512 add(const uint8_t* low, const uint8_t* high, __m512 table, __m512 x, __m512 total) {
    int32_t word;
    uint16_t set;
    std::memcpy(&word, low, 4);
    std::memcpy(&set, high, 2);
    const __m512i places = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i two = _mm512_and_si512(_mm512_srlv_epi32(_mm512_set1_epi32(word), places), _mm512_set1_epi32(3));
    const __m512i codes = _mm512_mask_or_epi32(two, set, two, _mm512_set1_epi32(4));
    return _mm512_fmadd_ps(_mm512_permutexvar_ps(codes, table), x, total);
  }
};

template <>
struct Lookup<4> {
  static inline __m512 add(const uint8_t* low, const uint8_t*, __m512 table, __m512 x, __m512 total) {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(low));
    const __m512i halves = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i words = _mm512_permutexvar_epi32(halves, _mm512_castsi128_si512(eight));
    const __m512i places = _mm512_set_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0);
    return _mm512_fmadd_ps(_mm512_permutexvar_ps(_mm512_srlv_epi32(words, places), table), x, total);
  }
};

// The table of a row: the numbers of codes, or the entries of its codebook.
template <int bits>
inline __m512 table_of(const Weight& w, int64_t n) {
  alignas(64) float table[16];
  const float* entries = w.codebook ? w.codebook + w.starts[w.starts_each ? n : 0] : nullptr;
  for (int i = 0; i < 16; ++i) table[i] = entries ? entries[i & ((1 << bits) - 1)] : static_cast<float>(i & ((1 << bits) - 1));
  return _mm512_load_ps(table);
}

// Exact products of one row of activations with `rows` rows of the weight.
template <int bits, int rows>
inline void exact_rows(const Weight& w, const Activations& a, int64_t n, int64_t m, float* y, int64_t ldy,
                       float* products) {
  const int64_t stride = (w.groups + 31) / 16 * 16;
  const float* x = a.values + m * a.padded;
  Row row[rows];
  float taken[rows];
  __m512 totals[rows], table[rows];
  for (int r = 0; r < rows; ++r) {
    row[r] = row_of<bits>(w, n + r);
    taken[r] = scaled(w, n + r, nullptr, a.sums + m * w.groups, products + r * stride);
    totals[r] = _mm512_setzero_ps();
    table[r] = table_of<bits>(w, n + r);
  }
  const int width = plane_width(bits, 0);
  const int64_t ahead = rows * w.padded() * width / 8;
  for (int64_t group = 0; group < w.groups; ++group) {
    const int64_t begin = group * w.group_size;
    for (int r = 0; r < rows; ++r) {
      for (int64_t at = 0; at < w.group_size * width / 8; at += 64) prefetch(row[r].low + begin * width / 8 + at + ahead);
      if (bits == 3) prefetch(row[r].high + begin / 8 + ahead / 2);
    }
    __m512 sums[rows];
    for (int r = 0; r < rows; ++r) sums[r] = _mm512_setzero_ps();
    for (int64_t k = begin; k < begin + w.group_size; k += 16) {
      const __m512 values = _mm512_loadu_ps(x + k);
      for (int r = 0; r < rows; ++r)
        sums[r] = Lookup<bits>::add(row[r].low + k * width / 8, bits == 3 ? row[r].high + k / 8 : nullptr, table[r], values,
                                    sums[r]);
    }
    for (int r = 0; r < rows; ++r)
      totals[r] = _mm512_fmadd_ps(sums[r], _mm512_set1_ps(products[r * stride + group]), totals[r]);
  }
  for (int r = 0; r < rows; ++r) y[m * ldy + n + r] = _mm512_reduce_add_ps(totals[r]) - taken[r];
}

template <int bits>
void exact(const Weight& w, const Activations& a, int64_t begin, int64_t end, float* y, int64_t ldy) {
  std::vector<float> products(4 * ((w.groups + 31) / 16 * 16));
  int64_t n = begin;
  for (; n + 4 <= end; n += 4)
    for (int64_t m = 0; m < a.count; ++m) exact_rows<bits, 4>(w, a, n, m, y, ldy, products.data());
  for (; n < end; ++n)
    for (int64_t m = 0; m < a.count; ++m) exact_rows<bits, 1>(w, a, n, m, y, ldy, products.data());
}

void multiply(const Weight& w, const Activations& a, int64_t begin, int64_t end, float* y, int64_t ldy) {
  switch (w.bits) {
    case 1: return exact<1>(w, a, begin, end, y, ldy);
    case 2: return exact<2>(w, a, begin, end, y, ldy);
    case 3: return exact<3>(w, a, begin, end, y, ldy);
    default: return exact<4>(w, a, begin, end, y, ldy);
  }
}

// The transpose of 16 registers of 16 floats.
inline void transpose(__m512 r[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(t[i + j]), high = _mm512_castps_pd(t[i + j + 2]);
      r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0xdd);
    }
  }
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0xdd);
  }
}

// 16 rows of the weight as floats, scales included: out [padded, 16]; rows past `count` are zeros.
template <int bits>
inline void decode_panel(const Weight& w, int64_t first, int64_t count, float* out) {
  Row row[16];
  __m512 table[16];
  const int width = plane_width(bits, 0);
  for (int64_t r = 0; r < count; ++r) {
    row[r] = row_of<bits>(w, first + r);
    table[r] = table_of<bits>(w, first + r);
  }
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int64_t k = 0; k < w.padded(); k += 16) {
    const int64_t group = k / w.group_size;
    __m512 values[16];
    for (int64_t r = 0; r < 16; ++r) {
      values[r] = _mm512_setzero_ps();
      if (r >= count) continue;
      const int64_t n = first + r;
      const __m512 scale = _mm512_set1_ps(w.scales[n * w.groups + group]), zero = _mm512_set1_ps(w.zero(n, group));
      const __m512 codes = Lookup<bits>::add(row[r].low + k * width / 8, bits == 3 ? row[r].high + k / 8 : nullptr,
                                             table[r], one, _mm512_setzero_ps());
      values[r] = _mm512_mul_ps(_mm512_sub_ps(codes, zero), scale);
    }
    transpose(values);
    for (int c = 0; c < 16; ++c) _mm512_storeu_ps(out + (k + c) * 16, values[c]);
  }
}

// Add rows of activations times columns [first, last) of two panels to Y [rows, 32].
template <int rows>
inline void panel_rows(const Activations& a, int64_t m, int64_t first, int64_t last, const float* panel,
                       int64_t panel_size, float* y, int64_t ldy, __mmask16 low, __mmask16 high) {
  __m512 totals[rows][2];
  const float* x[rows];
  for (int r = 0; r < rows; ++r) {
    totals[r][0] = first ? _mm512_maskz_loadu_ps(low, y + (m + r) * ldy) : _mm512_setzero_ps();
    totals[r][1] = first ? _mm512_maskz_loadu_ps(high, y + (m + r) * ldy + 16) : _mm512_setzero_ps();
    x[r] = a.values + (m + r) * a.padded;
  }
  for (int64_t k = first; k < last; ++k) {
    const __m512 one = _mm512_loadu_ps(panel + 16 * k), other = _mm512_loadu_ps(panel + panel_size + 16 * k);
    for (int r = 0; r < rows; ++r) {
      const __m512 value = _mm512_set1_ps(x[r][k]);
      totals[r][0] = _mm512_fmadd_ps(value, one, totals[r][0]);
      totals[r][1] = _mm512_fmadd_ps(value, other, totals[r][1]);
    }
  }
  for (int r = 0; r < rows; ++r) {
    _mm512_mask_storeu_ps(y + (m + r) * ldy, low, totals[r][0]);
    _mm512_mask_storeu_ps(y + (m + r) * ldy + 16, high, totals[r][1]);
  }
}

inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// 32 rows of the weight at a time, and so many columns that two panels of them stay in the nearest cache.
template <int bits>
void panels(const Weight& w, const Activations& a, int64_t begin, int64_t end, float* y, int64_t ldy) {
  constexpr int64_t kColumns = 192;
  const int64_t size = 16 * w.padded();
  std::vector<float> panel(2 * size);
  for (int64_t n = begin; n < end; n += 32) {
    const __mmask16 low = first_lanes(end - n), high = first_lanes(end - n - 16);
    decode_panel<bits>(w, n, std::min<int64_t>(16, end - n), panel.data());
    if (high) decode_panel<bits>(w, n + 16, std::min<int64_t>(16, end - n - 16), panel.data() + size);
    for (int64_t k = 0; k < w.columns; k += kColumns) {
      const int64_t last = std::min(k + kColumns, w.columns);
      int64_t m = 0;
      for (; m + 12 <= a.count; m += 12) panel_rows<12>(a, m, k, last, panel.data(), size, y + n, ldy, low, high);
      for (; m + 4 <= a.count; m += 4) panel_rows<4>(a, m, k, last, panel.data(), size, y + n, ldy, low, high);
      for (; m < a.count; ++m) panel_rows<1>(a, m, k, last, panel.data(), size, y + n, ldy, low, high);
    }
  }
}

// Exact products with many rows of activations: decoded once for all of them.
void multiply_many(const Weight& w, const Activations& a, int64_t begin, int64_t end, float* y, int64_t ldy) {
  switch (w.bits) {
    case 1: return panels<1>(w, a, begin, end, y, ldy);
    case 2: return panels<2>(w, a, begin, end, y, ldy);
    case 3: return panels<3>(w, a, begin, end, y, ldy);
    default: return panels<4>(w, a, begin, end, y, ldy);
  }
}

// Whether these kernels run a weight: whole registers in a group, or whole groups in a register.
bool runs(const Weight& w) {
  const bool grouped = w.group_size % 64 == 0 || w.group_size == 32 || w.group_size == 16;
  return grouped && w.bits <= 4 && w.entry == 1 && w.kind != Kind::kSigns;
}

bool runs_signs(const Weight& w) { return w.group_size % 64 == 0; }

void multiply_signs(const Weight& w, const Activations& a, int64_t begin, int64_t end, float* y, int64_t ldy) {
  const int64_t words = w.padded() / 64, inner = w.group_size / 64;
  const int64_t filled = w.padded() - w.columns;  // columns past K: both sides hold zeros there, which count as equal
  for (int64_t n = begin; n < end; ++n) {
    const uint8_t* row = plane_row(w, 0, n);
    const float* scales = w.scales + n * w.groups;
    for (int64_t m = 0; m < a.count; ++m) {
      const uint64_t* x = a.signs + m * (a.padded / 64);
      float total = 0;
      for (int64_t group = 0; group < w.groups; ++group) {
        const int64_t begin_word = group * inner, end_word = std::min(begin_word + inner, words);
        __m512i counts = _mm512_setzero_si512();
        for (int64_t at = begin_word; at < end_word; at += 8) {
          const __mmask8 part = end_word - at >= 8 ? 0xff : static_cast<__mmask8>((1u << (end_word - at)) - 1);
          prefetch(row + 8 * at + 4 * 8 * words);
          const __m512i differ = _mm512_xor_si512(_mm512_maskz_loadu_epi64(part, row + 8 * at),
                                                  _mm512_maskz_loadu_epi64(part, x + at));
          counts = _mm512_add_epi64(counts, _mm512_popcnt_epi64(differ));
        }
        const int64_t different = _mm512_reduce_add_epi64(counts);
        const int64_t valid = w.group_size - (group + 1 == w.groups ? filled : 0);
        total += scales[group] * static_cast<float>(valid - 2 * different);
      }
      y[m * ldy + n] = total * a.sizes[m];
    }
  }
}

}  // namespace avx512
}  // namespace qc
#pragma GCC pop_options
#endif
