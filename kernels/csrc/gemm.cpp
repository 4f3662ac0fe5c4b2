#include "gemm.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace macpo {

int64_t packed_pairs(int64_t k, int64_t n) { return (k + 1) / 2 * ((n + kPanel - 1) / kPanel) * kPanel; }

void pack_pairs(const uint16_t* b, int64_t k, int64_t n, int64_t k_stride, int64_t column_stride, uint32_t* packed,
                [[maybe_unused]] int threads) {
    const int64_t pairs = (k + 1) / 2, panels = (n + kPanel - 1) / kPanel;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t panel = 0; panel < panels; ++panel) {
        const uint16_t* from = b + panel * kPanel * column_stride;
        uint32_t* to = packed + panel * pairs * kPanel;
        const int64_t columns = std::min(kPanel, n - panel * kPanel);
        for (int64_t i = 0; i < pairs; ++i) {
            const uint16_t* low = from + 2 * i * k_stride;
            const bool paired = 2 * i + 1 < k;
            for (int64_t j = 0; j < columns; ++j) {
                const uint32_t high = paired ? low[k_stride + j * column_stride] : 0;
                to[i * kPanel + j] = low[j * column_stride] | high << 16;
            }
            for (int64_t j = columns; j < kPanel; ++j) to[i * kPanel + j] = 0;
        }
    }
}

#ifdef MACPO_BF16
namespace {

constexpr int64_t kRows = 12;      // rows of c at a time: with its 32 columns 24 of the 32 vector registers hold sums
constexpr int64_t kPairs = 64;     // pairs of k that a sum in registers runs over: longer sums err more than float32's
constexpr int64_t kCopied = 1024;  // pairs of k of a's rows in a copy that is contiguous, aligned and zero-filled
constexpr int64_t kPitch = kCopied + 16;  // of that copy: its rows must not fall into the same cache sets
static_assert(kTileRows % kRows == 0);  // parts below each other that read a panel of b while it is in cache

__mmask16 first_lanes(int64_t count) {
    return static_cast<__mmask16>(count >= 16 ? 0xFFFF : count <= 0 ? 0 : (1 << count) - 1);
}

// c [rows, 32 columns under the masks] = or += a [kRows, pairs] b [pairs, 32]
MACPO_BF16 void multiply_tile(const uint32_t* a, const uint32_t* b, int64_t pairs, float* c, int64_t ldc, int64_t rows,
                              __mmask16 left, __mmask16 right, bool accumulate) {
    __m512 sum[kRows][2];
#pragma GCC unroll 12
    for (int64_t r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int64_t i = 0; i < pairs; ++i) {
        const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + i * kPanel);
        const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + i * kPanel + 16);
#pragma GCC unroll 12
        for (int64_t r = 0; r < kRows; ++r) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r * kPitch + i]));
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], b0, pair);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], b1, pair);
        }
    }
#pragma GCC unroll 12
    for (int64_t r = 0; r < kRows; ++r) {
        if (r >= rows) break;
        float* out = c + r * ldc;
        if (accumulate) {
            sum[r][0] = _mm512_add_ps(sum[r][0], _mm512_maskz_loadu_ps(left, out));
            sum[r][1] = _mm512_add_ps(sum[r][1], _mm512_maskz_loadu_ps(right, out + 16));
        }
        _mm512_mask_storeu_ps(out, left, sum[r][0]);
        _mm512_mask_storeu_ps(out + 16, right, sum[r][1]);
    }
}

// The same for at most kTileRows rows of a and all of b, whose tiles `tiles` is given where there is one, as those of
// row `row` on; `copy` holds kTileRows * kPitch pairs.
void multiply_rows(const uint16_t* a, int64_t lda, const uint32_t* packed, float* c, int64_t ldc, int64_t m, int64_t n,
                   int64_t k, bool accumulate, uint32_t* copy, Tiles* tiles, int64_t row) {
    const int64_t pairs = (k + 1) / 2;
    for (int64_t first = 0; first < pairs; first += kCopied) {
        const int64_t held = std::min(kCopied, pairs - first), values = std::min(2 * held, k - 2 * first);
        for (int64_t r = 0; r < m; ++r) {
            uint32_t* row = copy + r * kPitch;
            row[held - 1] = 0;  // the second half of an odd k's last pair
            std::memcpy(row, a + r * lda + 2 * first, static_cast<size_t>(values) * sizeof *a);
        }
        for (int64_t column = 0; column < n; column += kPanel) {
            const uint32_t* panel = packed + column * pairs + first * kPanel;
            const __mmask16 left = first_lanes(n - column), right = first_lanes(n - column - 16);
            float* to = tiles != nullptr && held == pairs ? c : c + column;  // a tile that is done at once needs no more
            for (int64_t from = 0; from < held; from += kPairs)
                for (int64_t r = 0; r < m; r += kRows)
                    multiply_tile(copy + r * kPitch + from, panel + from * kPanel, std::min(kPairs, held - from),
                                  to + r * ldc, ldc, m - r, left, right, accumulate || first + from > 0);
            if (tiles != nullptr && first + held == pairs)
                tiles->take(to, ldc, row, m, column, std::min(kPanel, n - column));
        }
    }
}

// All of a, in parts for the threads: `c`, or without it `tiles` from memory for one row of tiles a thread.
void multiply(const uint16_t* a, int64_t lda, const uint32_t* packed, float* c, int64_t ldc, int64_t m, int64_t n,
              int64_t k, bool accumulate, Tiles* tiles, int threads) {
    const int64_t blocks = (m + kTileRows - 1) / kTileRows;
    // columns in a thread's own memory; rows of many must not fall into the same cache sets
    const int64_t wide = (k + 1) / 2 <= kCopied ? kPanel : (n + kPanel - 1) / kPanel * kPanel + 16;
    std::vector<uint32_t> copies(static_cast<size_t>(threads) * kTileRows * kPitch);
    std::vector<float> parts(tiles == nullptr ? 0 : static_cast<size_t>(threads * kTileRows * wide));
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int64_t part = 0; part < threads; ++part) {
        uint32_t* copy = copies.data() + part * kTileRows * kPitch;
        for (int64_t b = blocks * part / threads; b < blocks * (part + 1) / threads; ++b) {
            const int64_t row = b * kTileRows, rows = std::min(kTileRows, m - row);
            float* to = tiles == nullptr ? c + row * ldc : parts.data() + part * kTileRows * wide;
            multiply_rows(a + row * lda, lda, packed, to, tiles == nullptr ? ldc : wide, rows, n, k, accumulate, copy,
                          tiles, row);
        }
    }
}

}  // namespace

bool has_bf16_gemm() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
}

void bf16_gemm(const uint16_t* a, int64_t lda, const uint32_t* packed, float* c, int64_t ldc, int64_t m, int64_t n,
               int64_t k, bool accumulate, int threads) {
    if (!accumulate && k == 0)
        for (int64_t r = 0; r < m; ++r) std::fill(c + r * ldc, c + r * ldc + n, 0.0f);
    multiply(a, lda, packed, c, ldc, m, n, k, accumulate, nullptr, threads);
}

void bf16_gemm(const uint16_t* a, int64_t lda, const uint32_t* packed, Tiles& tiles, int64_t m, int64_t n, int64_t k,
               int threads) {
    multiply(a, lda, packed, nullptr, 0, m, n, k, false, &tiles, threads);
}

#else

bool has_bf16_gemm() { return false; }

void bf16_gemm(const uint16_t*, int64_t, const uint32_t*, float*, int64_t, int64_t, int64_t, int64_t, bool, int) {
    throw std::runtime_error("bf16_gemm needs a CPU with AVX512-BF16");
}

void bf16_gemm(const uint16_t*, int64_t, const uint32_t*, Tiles&, int64_t, int64_t, int64_t, int) {
    throw std::runtime_error("bf16_gemm needs a CPU with AVX512-BF16");
}

#endif

}  // namespace macpo
