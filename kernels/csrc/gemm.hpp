// Products of bf16 matrices with float32 sums and a float32 result, by the CPU's bf16 dot-product instruction.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && (defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 10))
// Marks functions that only run where has_bf16_gemm().
#define MACPO_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#include <immintrin.h>
#endif

namespace macpo {

// Whether this CPU has the instruction (AVX512-BF16); the functions below need it.
bool has_bf16_gemm();

// b's pairs of k values, as bf16_gemm reads them: panels of kPanel columns, each [ceil(k / 2)][kPanel] pairs.
// b(k, column) is b[k * k_stride + column * column_stride]; odd k and ragged columns are filled with zeros.
constexpr int64_t kPanel = 32;
int64_t packed_pairs(int64_t k, int64_t n);
void pack_pairs(const uint16_t* b, int64_t k, int64_t n, int64_t k_stride, int64_t column_stride, uint32_t* packed,
                int threads);

// c [m, n] = a [m, k] b, or += where `accumulate`; rows of a and c are `lda` and `ldc` elements apart.
// Every element is summed in an order that depends on k alone.
void bf16_gemm(const uint16_t* a, int64_t lda, const uint32_t* packed, float* c, int64_t ldc, int64_t m, int64_t n,
               int64_t k, bool accumulate, int threads);

// Receives a product tile by tile, so that it is never in memory as a whole.
struct Tiles {
    virtual ~Tiles() = default;
    // c [rows <= kTileRows, columns <= kPanel], `ldc` apart, is the product's part from (row, column) on. It is the
    // taker's to change, and another tile's when the call returns. Tiles come from several threads at once.
    virtual void take(float* c, int64_t ldc, int64_t row, int64_t rows, int64_t column, int64_t columns) = 0;
};
constexpr int64_t kTileRows = 48;

// Makes the same sums and hands them to `tiles`.
void bf16_gemm(const uint16_t* a, int64_t lda, const uint32_t* packed, Tiles& tiles, int64_t m, int64_t n, int64_t k,
               int threads);

}  // namespace macpo
