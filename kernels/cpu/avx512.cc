// Kernels for processors with AVX-512 and its VBMI, VNNI, VPOPCNTDQ and GFNI parts (Ice Lake, Zen 4 and later).
//
// All of them go along a row of the weight in steps of 64 columns, whose codes become bytes in one register with two or
// three instructions; or, where that is faster, in larger blocks whose codes stay in the bytes that they share.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "weight.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512vpopcntdq,gfni,fma,popcnt,bmi2")

namespace qc {
namespace avx512 {

// Ask for what the next rows will read where these rows are now: each row is too short for processors to see it coming.
inline void prefetch(const uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }

#include "codes512.inc"

// The last, ragged step of a row, filled up with zeros.
template <int bits>
inline __m512i last_codes(const uint8_t* row, int64_t step, int64_t columns) {
  alignas(64) uint8_t bytes[64] = {};
  std::memcpy(bytes, row + step * step_bytes(bits), columns * bits / 8);
  return codes64<bits>(bytes);
}

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

// products[g] = scales[g] * sizes[g], and what zero points add to the whole, in parts: the sum of -scale * zero * sum.
inline __m512 scaled(const Weight& w, int64_t n, const float* sizes, const float* sums, float* products) {
  const float* scales = w.scales + n * w.groups;
  __m512 added = _mm512_setzero_ps();
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
    added = _mm512_fnmadd_ps(_mm512_mul_ps(scale, zero), _mm512_maskz_loadu_ps(part, sums + g), added);
  }
  return added;
}

// The sum of each of some registers.
template <int rows>
inline void sum_up(const __m512 totals[rows], float* sums) {
  if constexpr (rows == 4) {  // together: half as many instructions
    const __m512 one = _mm512_add_ps(_mm512_unpacklo_ps(totals[0], totals[1]), _mm512_unpackhi_ps(totals[0], totals[1]));
    const __m512 two = _mm512_add_ps(_mm512_unpacklo_ps(totals[2], totals[3]), _mm512_unpackhi_ps(totals[2], totals[3]));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(one), _mm512_castps_pd(two));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(one), _mm512_castps_pd(two));
    const __m512 four = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));  // in each lane of 128 bits
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  } else {
    for (int r = 0; r < rows; ++r) sums[r] = _mm512_reduce_add_ps(totals[r]);
  }
}

// Some rows of the weight, and rows of activations that meet their codes once these are decoded.
template <int bits, int rows, int count, bool inside>
inline void int8_rows(const Weight& w, const Activations& a, int64_t n, int64_t first, float* y, int64_t ldy,
                      float* products) {
  const int64_t stride = (w.groups + 31) / 16 * 16, ragged = w.padded() % 64, whole = w.padded() / 64;
  const int64_t inner = w.group_size >= 64 ? w.group_size / 64 : 1;
  const int64_t ahead = rows * row_bytes(w);
  const int8_t* x[count];
  const uint8_t* row[rows];
  __m512 totals[rows][count];
  for (int m = 0; m < count; ++m) x[m] = a.codes + (first + m) * a.padded;
  for (int r = 0; r < rows; ++r) {
    row[r] = row_codes(w, n + r);
    for (int m = 0; m < count; ++m) {
      const int64_t place = (first + m) * w.groups;
      totals[r][m] = scaled(w, n + r, a.scales + place, a.sums + place, products + (r * count + m) * stride);
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
        const uint8_t* from = row[r] + at * step_bytes(bits);
        prefetch(from + ahead);
        const __m512i codes = codes64<bits, inside>(from);
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
      const __m512i codes = last_codes<bits>(row[r], whole, ragged);
      for (int m = 0; m < count; ++m) {
        const __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, _mm512_loadu_si512(x[m] + whole * 64));
        totals[r][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums),
                                       lane_scales(products + (r * count + m) * stride, whole, w.group_size), totals[r][m]);
      }
    }
  for (int r = 0; r < rows; ++r)
    for (int m = 0; m < count; ++m)
      y[(first + m) * ldy + n + r] = _mm512_reduce_add_ps(totals[r][m]);
}

// Blocks of columns whose codes become registers for less, if activations are *dealt* in the order that they come in.
//
// Codes of 1, 2 and 4 bits: 64 bytes are a register as they are, and register p holds code p of each byte, that is column
// p, p + n, p + 2n ... of a block of 64 n columns, n codes being in a byte. Codes of 3 bits: 48 bytes are spread over
// eight words, 16 codes in each, and register p holds the lower or the upper eight of each word. A lane of 32 bits holds
// 4 columns of a run of 4 n, or of 16.
constexpr int dealt_parts(int bits) { return bits == 3 ? 2 : 8 / bits; }
constexpr int64_t dealt_columns(int bits) { return 64 * dealt_parts(bits); }

// Whether groups and blocks fit each other.
bool deals(const Weight& w) {
  const int64_t block = dealt_columns(w.bits), run = w.bits == 3 ? 16 : 4 * dealt_parts(w.bits);
  return w.group_size >= block ? w.group_size % block == 0 : block % w.group_size == 0 && w.group_size % run == 0;
}

// Lay codes of a row of activations out as above; what is left of the last block is not touched.
void deal(const int8_t* codes, int64_t columns, int bits, int8_t* dealt) {
  const int parts = dealt_parts(bits);
  const int64_t block = dealt_columns(bits);
  for (int64_t begin = 0; begin + block <= columns; begin += block)
    for (int p = 0; p < parts; ++p)
      for (int j = 0; j < 64; ++j)
        dealt[begin + 64 * p + j] = codes[begin + (bits == 3 ? j / 8 * 16 + p * 8 + j % 8 : parts * j + p)];
}

// The bytes of a block.
template <int bits>
inline __m512i dealt_bytes(const uint8_t* from) {
  if constexpr (bits != 3) return _mm512_loadu_si512(from);
  const __m512i spread = _mm512_set_epi64(0x2f2e2d2c2b2a, 0x292827262524, 0x232221201f1e, 0x1d1c1b1a1918, 0x171615141312,
                                          0x11100f0e0d0c, 0x0b0a09080706, 0x050403020100);
  return _mm512_permutexvar_epi8(spread, _mm512_maskz_loadu_epi32(0x0fff, from));
}

// Codes of part p of a block: bits p * bits and up of each byte, which a product with a matrix of bits moves in one step.
template <int bits, int p>
inline __m512i dealt_codes(__m512i bytes) {
  const __m512i mask = _mm512_set1_epi8((1 << bits) - 1);
  if constexpr (bits == 3) {
    const __m512i places = _mm512_set1_epi64(p ? 0x2d2a2724211e1b18 : 0x15120f0c09060300);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(places, bytes), mask);
  }
  if constexpr (p == 0) return _mm512_and_si512(bytes, mask);
  uint64_t matrix = 0;  // its highest byte says what makes bit 0
  for (int bit = 0; bit < bits; ++bit) matrix |= uint64_t{1} << (p * bits + bit) << 8 * (7 - bit);
  return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64(static_cast<int64_t>(matrix)), 0);
}

template <int bits, int p>
inline __m512i dealt_products(__m512i sums, __m512i bytes, const __m512i* values) {
  if constexpr (p == dealt_parts(bits))
    return sums;
  else
    return dealt_products<bits, p + 1>(_mm512_dpbusd_epi32(sums, dealt_codes<bits, p>(bytes), values[p]), bytes, values);
}

// Scales of the lanes of a block that holds `per` groups, which `lanes` names for each lane. No more is read than there
// is: a processor waits where a load needs what two stores have just written.
inline __m512 block_scales(const float* scales, int64_t per, __m512i lanes) {
  double two;
  switch (per) {
    case 1: return _mm512_set1_ps(*scales);
    case 2:
      std::memcpy(&two, scales, sizeof two);
      return _mm512_permutexvar_ps(lanes, _mm512_castpd_ps(_mm512_set1_pd(two)));
    case 4: return _mm512_permutexvar_ps(lanes, _mm512_broadcast_f32x4(_mm_loadu_ps(scales)));
    default: return _mm512_permutexvar_ps(lanes, _mm512_loadu_ps(scales));
  }
}

template <int bits, int rows>
inline void dealt_rows(const Weight& w, const Activations& a, int64_t n, int64_t m, float* y, int64_t ldy,
                       float* products) {
  constexpr int parts = dealt_parts(bits);
  constexpr int64_t block = dealt_columns(bits), block_bytes = block * bits / 8;
  const int64_t stride = (w.groups + 31) / 16 * 16, blocks = w.padded() / block;
  const int64_t inner = w.group_size >= block ? w.group_size / block : 1, ahead = rows * row_bytes(w);
  const int64_t per = w.group_size >= block ? 1 : block / w.group_size;
  const int8_t* x = a.dealt + m * a.padded;
  alignas(64) int32_t lanes[16];
  for (int lane = 0; lane < 16; ++lane)
    lanes[lane] = per == 1 ? 0 : static_cast<int32_t>(lane * 4 * parts / w.group_size);
  const __m512i lane_groups = _mm512_load_si512(lanes);
  const uint8_t* row[rows];
  __m512 totals[rows];
  for (int r = 0; r < rows; ++r) {
    row[r] = row_codes(w, n + r);
    totals[r] = scaled(w, n + r, a.scales + m * w.groups, a.sums + m * w.groups, products + r * stride);
  }
  for (int64_t first = 0; first < blocks; first += inner) {
    __m512i sums[rows];
    for (int r = 0; r < rows; ++r) sums[r] = _mm512_setzero_si512();
    for (int64_t at = first; at < first + inner; ++at) {
      __m512i values[parts];
      for (int p = 0; p < parts; ++p) values[p] = _mm512_loadu_si512(x + at * block + 64 * p);
      for (int r = 0; r < rows; ++r) {
        const uint8_t* from = row[r] + block_bytes * at;
        prefetch(from + ahead);
        sums[r] = dealt_products<bits, 0>(sums[r], dealt_bytes<bits>(from), values);
      }
    }
    const int64_t group = first * block / w.group_size;
    for (int r = 0; r < rows; ++r) {
      const __m512 scales = block_scales(products + r * stride + group, per, lane_groups);
      totals[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r]), scales, totals[r]);
    }
  }
  // Columns behind the last whole block, in steps of 64 and in their own order.
  const int8_t* rest = a.codes + m * a.padded;
  for (int64_t k = blocks * block; k < w.padded(); k += 64) {
    const int64_t step = k / 64, left = std::min<int64_t>(64, w.padded() - k);
    const __m512i values = _mm512_loadu_si512(rest + k);
    for (int r = 0; r < rows; ++r) {
      const __m512i codes = left == 64 ? codes64<bits>(row[r] + step * step_bytes(bits)) : last_codes<bits>(row[r], step, left);
      const __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, values);
      totals[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), lane_scales(products + r * stride, step, w.group_size),
                                  totals[r]);
    }
  }
  sum_up<rows>(totals, y + m * ldy + n);
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
  switch (w.bits) {
    case 1: return dealt<1>(w, a, begin, end, y, ldy);
    case 2: return dealt<2>(w, a, begin, end, y, ldy);
    case 3: return dealt<3>(w, a, begin, end, y, ldy);
    default: return dealt<4>(w, a, begin, end, y, ldy);
  }
}

template <int bits>
void int8(const Weight& w, const Activations& a, int64_t begin, int64_t end, float* y, int64_t ldy) {
  std::vector<float> products(8 * ((w.groups + 31) / 16 * 16));
  // A few rows of the weight meet all rows of activations while they are in the nearest cache.
  int64_t n = begin;
  for (; n + 4 <= end && n + 4 < w.rows; n += 4) {  // so that there is something behind the last of four rows
    int64_t m = 0;
    for (; m + 2 <= a.count; m += 2) int8_rows<bits, 4, 2, true>(w, a, n, m, y, ldy, products.data());
    for (; m < a.count; ++m) int8_rows<bits, 4, 1, true>(w, a, n, m, y, ldy, products.data());
  }
  for (; n < end; ++n)
    for (int64_t m = 0; m < a.count; ++m) int8_rows<bits, 1, 1, false>(w, a, n, m, y, ldy, products.data());
}

void multiply_int8(const Weight& w, const Activations& a, int64_t begin, int64_t end, float* y, int64_t ldy) {
  switch (w.bits) {
    case 1: return int8<1>(w, a, begin, end, y, ldy);
    case 2: return int8<2>(w, a, begin, end, y, ldy);
    case 3: return int8<3>(w, a, begin, end, y, ldy);
    default: return int8<4>(w, a, begin, end, y, ldy);
  }
}

#include "lookup512.inc"

// Exact products of one row of activations with `rows` rows of the weight.
template <int bits, int d, int rows>
inline void exact_rows(const Weight& w, const Activations& a, int64_t n, int64_t m, float* y, int64_t ldy,
                       float* products) {
  const int64_t stride = (w.groups + 31) / 16 * 16;
  const float* x = a.values + m * a.padded;
  const uint8_t* row[rows];
  __m512 totals[rows];
  typename Lookup<bits, d>::Table table[rows];
  for (int r = 0; r < rows; ++r) {
    row[r] = row_codes(w, n + r);
    totals[r] = scaled(w, n + r, nullptr, a.sums + m * w.groups, products + r * stride);
    table[r] = Lookup<bits, d>::table(w, n + r);
  }
  const int64_t ahead = rows * row_bytes(w);
  for (int64_t group = 0; group < w.groups; ++group) {
    const int64_t begin = group * w.group_size;
    for (int r = 0; r < rows; ++r)
      for (int64_t at = 0; at < w.group_size / d * bits / 8; at += 64)
        prefetch(row[r] + begin / d * bits / 8 + at + ahead);
    __m512 sums[rows];
    for (int r = 0; r < rows; ++r) sums[r] = _mm512_setzero_ps();
    for (int64_t k = begin; k < begin + w.group_size; k += 16) {
      const __m512 values = _mm512_loadu_ps(x + k);
      for (int r = 0; r < rows; ++r) sums[r] = Lookup<bits, d>::add(row[r], k, table[r], values, sums[r]);
    }
    for (int r = 0; r < rows; ++r)
      totals[r] = _mm512_fmadd_ps(sums[r], _mm512_set1_ps(products[r * stride + group]), totals[r]);
  }
  sum_up<rows>(totals, y + m * ldy + n);
}

template <int bits, int d>
void exact(const Weight& w, const Activations& a, int64_t begin, int64_t end, float* y, int64_t ldy) {
  std::vector<float> products(4 * ((w.groups + 31) / 16 * 16));
  int64_t n = begin;
  for (; n + 4 <= end; n += 4)
    for (int64_t m = 0; m < a.count; ++m) exact_rows<bits, d, 4>(w, a, n, m, y, ldy, products.data());
  for (; n < end; ++n)
    for (int64_t m = 0; m < a.count; ++m) exact_rows<bits, d, 1>(w, a, n, m, y, ldy, products.data());
}

// Calls what is made for the codes of a weight: `call(bits, d)` with both as types.
template <int value>
using Number = std::integral_constant<int, value>;
template <int bits, typename Call>
void with_entry(const Weight& w, const Call& call) {
  if (w.entry == 2) return call(Number<bits>(), Number<2>());
  if (w.entry == 4) return call(Number<bits>(), Number<4>());
  call(Number<bits>(), Number<1>());
}
template <typename Call>
void with_codes(const Weight& w, const Call& call) {
  switch (w.bits) {
    case 1: return call(Number<1>(), Number<1>());
    case 2: return call(Number<2>(), Number<1>());
    case 3: return with_entry<3>(w, call);
    case 4: return with_entry<4>(w, call);
    default: return with_entry<8>(w, call);
  }
}

void multiply(const Weight& w, const Activations& a, int64_t begin, int64_t end, float* y, int64_t ldy) {
  with_codes(w, [&](auto bits, auto d) { exact<bits.value, d.value>(w, a, begin, end, y, ldy); });
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
template <int bits, int d>
inline void decode_panel(const Weight& w, int64_t first, int64_t count, float* out) {
  const uint8_t* row[16];
  typename Lookup<bits, d>::Table table[16];
  for (int64_t r = 0; r < count; ++r) {
    row[r] = row_codes(w, first + r);
    table[r] = Lookup<bits, d>::table(w, first + r);
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
      const __m512 codes = Lookup<bits, d>::add(row[r], k, table[r], one, _mm512_setzero_ps());
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
template <int bits, int d>
void panels(const Weight& w, const Activations& a, int64_t begin, int64_t end, float* y, int64_t ldy) {
  constexpr int64_t kColumns = 192;
  const int64_t size = 16 * w.padded();
  std::vector<float> panel(2 * size);
  for (int64_t n = begin; n < end; n += 32) {
    const __mmask16 low = first_lanes(end - n), high = first_lanes(end - n - 16);
    decode_panel<bits, d>(w, n, std::min<int64_t>(16, end - n), panel.data());
    if (high) decode_panel<bits, d>(w, n + 16, std::min<int64_t>(16, end - n - 16), panel.data() + size);
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
  with_codes(w, [&](auto bits, auto d) { panels<bits.value, d.value>(w, a, begin, end, y, ldy); });
}

// Whether these kernels run a weight: whole registers in a group, or whole groups in a register.
bool runs(const Weight& w) {
  const bool grouped = w.group_size % 64 == 0 || w.group_size == 32 || w.group_size == 16;
  return grouped && w.kind != Kind::kSigns;
}

bool runs_signs(const Weight& w) { return w.group_size % 64 == 0; }

// How many of the first `columns` bits differ; what is stored behind them may be anything.
inline __m512i different(const uint8_t* row, const uint64_t* x, int64_t columns) {
  __m512i counts = _mm512_setzero_si512();
  const int64_t whole = columns / 512, rest = columns % 512;
  for (int64_t at = 0; at < whole; ++at) {
    const __m512i differ = _mm512_xor_si512(_mm512_loadu_si512(row + 64 * at), _mm512_loadu_si512(x + 8 * at));
    counts = _mm512_add_epi64(counts, _mm512_popcnt_epi64(differ));
  }
  if (rest) {
    const int64_t words = (rest + 63) / 64;
    const __mmask8 part = static_cast<__mmask8>((1u << words) - 1), last = static_cast<__mmask8>(1u << (words - 1));
    const uint64_t bits = rest % 64 ? (uint64_t{1} << rest % 64) - 1 : ~uint64_t{0};
    const __m512i kept = _mm512_mask_set1_epi64(_mm512_set1_epi64(-1), last, static_cast<int64_t>(bits));
    const __m512i differ = _mm512_xor_si512(_mm512_maskz_loadu_epi64(part, row + 64 * whole),
                                            _mm512_maskz_loadu_epi64(part, x + 8 * whole));
    counts = _mm512_add_epi64(counts, _mm512_popcnt_epi64(_mm512_and_si512(differ, kept)));
  }
  return counts;
}

// Eight rows of one group each at a time: their counts are summed up together.
inline void signs_rows(const Weight& w, const uint64_t* x, float size, int64_t n, float* y) {
  const int64_t bytes = row_bytes(w);
  const uint8_t* row = row_codes(w, n);
  __m512i c[8], t[8];
  for (int r = 0; r < 8; ++r) {
    for (int64_t at = 0; at < bytes; at += 64) prefetch(row + (r + 16) * bytes + at);
    c[r] = different(row + r * bytes, x, w.columns);
  }
  for (int r = 0; r < 8; r += 2) {
    t[r] = _mm512_unpacklo_epi64(c[r], c[r + 1]);
    t[r + 1] = _mm512_unpackhi_epi64(c[r], c[r + 1]);
  }
  for (int r = 0; r < 4; ++r) c[r] = _mm512_add_epi64(t[2 * r], t[2 * r + 1]);  // two rows in turns, four times
  const __m512i low = _mm512_add_epi64(_mm512_shuffle_i64x2(c[0], c[1], 0x88), _mm512_shuffle_i64x2(c[0], c[1], 0xdd));
  const __m512i high = _mm512_add_epi64(_mm512_shuffle_i64x2(c[2], c[3], 0x88), _mm512_shuffle_i64x2(c[2], c[3], 0xdd));
  const __m512i sums = _mm512_add_epi64(_mm512_shuffle_i64x2(low, high, 0x88), _mm512_shuffle_i64x2(low, high, 0xdd));
  const __m256 counts = _mm256_cvtepi32_ps(_mm512_cvtepi64_epi32(sums));
  const __m256 dot = _mm256_fnmadd_ps(_mm256_set1_ps(2.0f), counts, _mm256_set1_ps(static_cast<float>(w.columns)));
  _mm256_storeu_ps(y, _mm256_mul_ps(_mm256_mul_ps(dot, _mm256_loadu_ps(w.scales + n)), _mm256_set1_ps(size)));
}

// Rows of many groups, which are whole words: what differs in a word counts by the word's scale.
void grouped_signs(const Weight& w, const Activations& a, int64_t begin, int64_t end, float* y, int64_t ldy) {
  const int64_t words = (w.columns + 63) / 64, steps = (words + 7) / 8, inner = w.group_size / 64;
  const uint64_t last = w.columns % 64 ? (uint64_t{1} << w.columns % 64) - 1 : ~uint64_t{0};
  std::vector<float> scales(steps * 8, 0.0f);
  std::vector<uint64_t> bits(steps * 8, 0);
  for (int64_t n = begin; n < end; ++n) {
    std::memcpy(bits.data(), row_codes(w, n), words * 8);
    float all = 0;
    for (int64_t word = 0; word < words; ++word) {
      scales[word] = w.scales[n * w.groups + word / inner];
      all += scales[word] * static_cast<float>(word + 1 < words ? 64 : w.columns - 64 * word);
    }
    for (int64_t m = 0; m < a.count; ++m) {
      const uint64_t* x = a.signs + m * (a.padded / 64);
      __m256 total = _mm256_setzero_ps();
      for (int64_t step = 0; step < steps; ++step) {
        const __mmask8 part = words - 8 * step >= 8 ? 0xff : static_cast<__mmask8>((1u << (words - 8 * step)) - 1);
        __m512i differ = _mm512_xor_si512(_mm512_loadu_si512(bits.data() + 8 * step),
                                          _mm512_maskz_loadu_epi64(part, x + 8 * step));
        if (step + 1 == steps) {
          const __mmask8 at = static_cast<__mmask8>(1u << (words - 1) % 8);
          differ = _mm512_mask_and_epi64(differ, at, differ, _mm512_set1_epi64(static_cast<int64_t>(last)));
        }
        const __m256 counts = _mm512_cvtepi64_ps(_mm512_popcnt_epi64(differ));
        total = _mm256_fmadd_ps(counts, _mm256_loadu_ps(scales.data() + 8 * step), total);
      }
      const __m128 four = _mm_add_ps(_mm256_castps256_ps128(total), _mm256_extractf128_ps(total, 1));
      const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
      const float sum = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
      y[m * ldy + n] = (all - 2 * sum) * a.sizes[m];
    }
  }
}

void multiply_signs(const Weight& w, const Activations& a, int64_t begin, int64_t end, float* y, int64_t ldy) {
  if (w.groups > 1) return grouped_signs(w, a, begin, end, y, ldy);
  int64_t n = begin;
  for (; n + 8 <= end; n += 8)
    for (int64_t m = 0; m < a.count; ++m)
      signs_rows(w, a.signs + m * (a.padded / 64), a.sizes[m], n, y + m * ldy + n);
  for (; n < end; ++n)
    for (int64_t m = 0; m < a.count; ++m) {
      const __m512i counts = different(row_codes(w, n), a.signs + m * (a.padded / 64), w.columns);
      y[m * ldy + n] = w.scales[n] * static_cast<float>(w.columns - 2 * _mm512_reduce_add_epi64(counts)) * a.sizes[m];
    }
}

// The signs of a row of activations, a bit for each, and their mean magnitude.
void read_signs(const float* x, int64_t columns, uint64_t* signs, float* size) {
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
  uint16_t* words = reinterpret_cast<uint16_t*>(signs);
  for (int64_t k = 0; k < columns; k += 16) {
    const __mmask16 part = columns - k >= 16 ? 0xffff : static_cast<__mmask16>((1u << (columns - k)) - 1);
    const __m512 values = _mm512_maskz_loadu_ps(part, x + k), sizes = _mm512_abs_ps(values);
    words[k / 16] = _mm512_mask_cmp_ps_mask(part, values, _mm512_setzero_ps(), _CMP_GE_OQ);
    low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(sizes)));
    high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(sizes, 1)));
  }
  *size = static_cast<float>(_mm512_reduce_add_pd(_mm512_add_pd(low, high)) / static_cast<double>(columns));
}

// Codes of 8 bits for a group of activations, their scale, and the sum of what they stand for; rounds half to even.
void quantize_group(const float* x, int64_t size, int8_t* codes, float* scale, float* sum) {
  __m512 largest = _mm512_setzero_ps();
  for (int64_t k = 0; k < size; k += 16) {
    const __mmask16 part = size - k >= 16 ? 0xffff : static_cast<__mmask16>((1u << (size - k)) - 1);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_maskz_loadu_ps(part, x + k)));
  }
  const float reach = _mm512_reduce_max_ps(largest), step = reach > 0 ? reach / 127.0f : 1.0f;
  const __m512 inverse = _mm512_set1_ps(1.0f / step);
  __m512i total = _mm512_setzero_si512();
  for (int64_t k = 0; k < size; k += 16) {
    const __mmask16 part = size - k >= 16 ? 0xffff : static_cast<__mmask16>((1u << (size - k)) - 1);
    __m512i found = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(part, x + k), inverse));
    found = _mm512_max_epi32(_mm512_min_epi32(found, _mm512_set1_epi32(127)), _mm512_set1_epi32(-127));
    total = _mm512_add_epi32(total, found);
    _mm512_mask_cvtepi32_storeu_epi8(codes + k, part, found);
  }
  *scale = step;
  *sum = step * static_cast<float>(_mm512_reduce_add_epi32(total));
}

}  // namespace avx512
}  // namespace qc
#pragma GCC pop_options
#endif
