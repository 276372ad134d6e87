// What the CPU kernels read: a weight in the layout that lies on disk, and activations made ready for it.
//
// The layouts are those of kernels/python/schemas.py and qcompiler/numerics/packing.py: a row of a weight is G groups of
// g columns; its codes are a stream of bits, low bits first. Since eight codes are whole bytes and groups are multiples
// of eight, the groups of a row make one stream. Columns past K count for nothing: activations are filled up with zeros.
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
  const uint8_t* codes;      // [N, G, g / entry * bits / 8]
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

// Bytes of a row of codes, and where one begins.
inline int64_t row_bytes(const Weight& w) { return w.padded() / w.entry * w.bits / 8; }
inline const uint8_t* row_codes(const Weight& w, int64_t row) { return w.codes + row * row_bytes(w); }

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
