// What the CPU kernels read: a weight in the layout that lies on disk, and activations made ready for it.
//
// The layouts are those of kernels/python/schemas.py and qcompiler/numerics/packing.py: a row of a weight is G groups of
// g columns; its codes lie in planes of 1, 2, 4 or 8 bits a code, low bits first. Columns past K count for nothing,
// since activations are filled up with zeros.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qc {

enum class Kind { kUniform, kCodebook, kSigns };

struct Weight {
  Kind kind;
  int bits;                  // of a code
  int64_t rows;              // N
  int64_t columns;           // K
  int64_t groups;            // G
  int64_t group_size;        // g
  int entry;                 // columns that a code stands for; 1 unless kind is kCodebook
  const uint8_t* planes[2];  // [N, G, g / entry * width / 8]; the second one for 3 bits alone
  const float* scales;       // [N, G]
  const uint8_t* zero_u8;    // [N, G] or [1], or null
  const float* zero_f32;     // the same, or null; both null where codes are no numbers
  bool zero_each;            // whether zero points are [N, G]
  const float* codebook;     // [C * 2^bits, entry]
  const int32_t* starts;     // [N] or [1]
  bool starts_each;          // whether starts are [N]

  int64_t padded() const { return groups * group_size; }
  float zero(int64_t row, int64_t group) const {
    const int64_t at = zero_each ? row * groups + group : 0;
    return zero_u8 ? static_cast<float>(zero_u8[at]) : zero_f32 ? zero_f32[at] : 0.0f;
  }
};

// Bits of a code that plane `plane` holds.
constexpr int plane_width(int bits, int plane) { return bits == 3 ? (plane == 0 ? 2 : 1) : bits; }
constexpr int plane_count(int bits) { return bits == 3 ? 2 : 1; }

// Where the codes of a row begin in a plane.
inline const uint8_t* plane_row(const Weight& w, int plane, int64_t row) {
  return w.planes[plane] + row * (w.padded() / w.entry) * plane_width(w.bits, plane) / 8;
}

struct Activations {
  int64_t count;          // M
  int64_t padded;         // columns a row takes: G * g, rounded up to 64
  const float* values;    // [M, padded]; null where only codes are needed
  const float* sums;      // [M, G], of each group's values; with codes, of the values that these stand for
  const int8_t* codes;    // [M, padded], or null
  const int8_t* dealt;    // [M, padded], the same in the order of avx512::deal, or null
  const float* scales;    // [M, G], of the codes
  const uint64_t* signs;  // [M, padded / 64], a set bit for a value of at least 0, or null
  const float* sizes;     // [M], mean magnitudes
};

// Compute columns [begin, end) of Y [M, ldy], without bias.
using Multiply = void (*)(const Weight& w, const Activations& a, int64_t begin, int64_t end, float* y, int64_t ldy);

}  // namespace qc
