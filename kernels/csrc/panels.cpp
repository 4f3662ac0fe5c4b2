#include "panels.hpp"

#include <algorithm>
#include <stdexcept>

#if defined(__x86_64__) && (defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 10))
#define MACPO_AVX512 __attribute__((target("avx512f")))
#include <immintrin.h>
#endif

namespace macpo {

int64_t panel_floats(int64_t outputs, int64_t width) {
    return (outputs + kPanelOutputs - 1) / kPanelOutputs * kPanelOutputs * width;
}

void pack_panels(const float* weight, int64_t stride, int64_t outputs, int64_t width, float* panels,
                 [[maybe_unused]] int threads) {
    const int64_t count = (outputs + kPanelOutputs - 1) / kPanelOutputs;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t panel = 0; panel < count; ++panel) {
        float* to = panels + panel * width * kPanelOutputs;
        for (int64_t j = 0; j < kPanelOutputs; ++j) {
            const int64_t output = panel * kPanelOutputs + j;
            for (int64_t i = 0; i < width; ++i)
                to[i * kPanelOutputs + j] = output < outputs ? weight[output * stride + i] : 0.0f;
        }
    }
}

#ifdef MACPO_AVX512
namespace {

constexpr int64_t kRows = 12;    // rows at a time: with a panel's 32 outputs 24 of the 32 vector registers hold sums
constexpr int64_t kDepth = 128;  // terms that a sum in registers runs over: longer sums err more
constexpr int64_t kAhead = 16;   // lines of a panel that are fetched ahead: 2 KB

__mmask16 first_lanes(int64_t count) {
    return static_cast<__mmask16>(count >= 16 ? 0xFFFF : count <= 0 ? 0 : (1 << count) - 1);
}

// y [Rows, 32 outputs under the masks] = start + x [Rows, depth] panel [depth, 32]; start is y or the bias.
template <int Rows>
MACPO_AVX512 void tile(const float* x, int64_t stride, const float* panel, int64_t depth, const float* bias, bool first,
                       float* y, int64_t pitch, __mmask16 left, __mmask16 right) {
    __m512 sum[Rows][2];
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int64_t i = 0; i < depth; ++i) {
        const __m512 b0 = _mm512_loadu_ps(panel + i * kPanelOutputs);
        const __m512 b1 = _mm512_loadu_ps(panel + i * kPanelOutputs + 16);
        _mm_prefetch(reinterpret_cast<const char*>(panel + (i + kAhead) * kPanelOutputs), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(panel + (i + kAhead) * kPanelOutputs + 16), _MM_HINT_T0);
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r) {
            const __m512 value = _mm512_set1_ps(x[r * stride + i]);
            sum[r][0] = _mm512_fmadd_ps(value, b0, sum[r][0]);
            sum[r][1] = _mm512_fmadd_ps(value, b1, sum[r][1]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
        float* out = y + r * pitch;
        const float* start = first ? bias : out;
        if (start != nullptr) {
            sum[r][0] = _mm512_add_ps(sum[r][0], _mm512_maskz_loadu_ps(left, start));
            sum[r][1] = _mm512_add_ps(sum[r][1], _mm512_maskz_loadu_ps(right, start + 16));
        }
        _mm512_mask_storeu_ps(out, left, sum[r][0]);
        _mm512_mask_storeu_ps(out + 16, right, sum[r][1]);
    }
}

using Tile = void (*)(const float*, int64_t, const float*, int64_t, const float*, bool, float*, int64_t, __mmask16,
                      __mmask16);
constexpr Tile kTiles[kRows + 1] = {nullptr, tile<1>, tile<2>, tile<3>,  tile<4>,  tile<5>, tile<6>,
                                    tile<7>, tile<8>, tile<9>, tile<10>, tile<11>, tile<12>};

}  // namespace

bool has_panels() { return __builtin_cpu_supports("avx512f"); }

void panel_product(const float* x, int64_t stride, int64_t rows, const float* panels, const float* bias,
                   int64_t outputs, int64_t width, float* y, [[maybe_unused]] int threads) {
    if (rows == 0) return;
    const int64_t count = (outputs + kPanelOutputs - 1) / kPanelOutputs;
    const int64_t blocks = (rows + kRows - 1) / kRows;  // of nearly equal numbers of rows
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t p = 0; p < count; ++p) {
        const int64_t column = p * kPanelOutputs;
        const __mmask16 left = first_lanes(outputs - column), right = first_lanes(outputs - column - 16);
        const float* panel = panels + column * width;
        const float* start = bias == nullptr ? nullptr : bias + column;
        for (int64_t from = 0; from < std::max<int64_t>(width, 1); from += kDepth)
            for (int64_t b = 0; b < blocks; ++b) {
                const int64_t row = rows * b / blocks, held = rows * (b + 1) / blocks - row;
                kTiles[held](x + row * stride + from, stride, panel + from * kPanelOutputs,
                             std::min(kDepth, width - from), start, from == 0, y + row * outputs + column, outputs,
                             left, right);
            }
    }
}

#else

bool has_panels() { return false; }

void panel_product(const float*, int64_t, int64_t, const float*, const float*, int64_t, int64_t, float*, int) {
    throw std::runtime_error("panel_product needs a CPU with AVX-512");
}

#endif

}  // namespace macpo
