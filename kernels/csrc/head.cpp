#include "head.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "gemm.hpp"
#include "vecmath.hpp"

namespace macpo {

#ifdef MACPO_BF16
// e^x of 16 floats by the polynomial of vecmath.hpp, with fused multiply-adds: 0 below -87.3, finite from 88 on, NaN
// stays NaN.
MACPO_BF16 MACPO_INLINE __m512 exp_lanes(__m512 x) {
    const __mmask16 tiny = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.3f), _CMP_LT_OQ);
    x = _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, _mm512_set1_ps(88.0f), _CMP_GT_OQ), _mm512_set1_ps(88.0f));
    const __m512 magic = _mm512_set1_ps(12582912.0f);  // 1.5 * 2^23, as in vecmath.hpp
    const __m512 shifted = _mm512_fmadd_ps(x, _mm512_set1_ps(1.44269504088896341f), magic);
    const __m512 n = _mm512_sub_ps(shifted, magic);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
    const __m512i power = _mm512_add_epi32(_mm512_maskz_slli_epi32(0xFFFF, (__m512i)shifted, 23), _mm512_set1_epi32(127 << 23));
    return _mm512_mask_mov_ps(_mm512_mul_ps(p, (__m512)power), tiny, _mm512_setzero_ps());
}

// Logits y [depth, width <= kPanel] to e^(y - base) in bfloat16 (d may be null); sum [width] is that of the tile.
// y, base and sum may be read and written up to kPanel.
MACPO_BF16 void exponentials(const float* y, int64_t ldy, int64_t depth, int64_t width, const float* base, float* sum,
                             uint16_t* d, int64_t ldd) {
    const __m512 base0 = _mm512_loadu_ps(base), base1 = _mm512_loadu_ps(base + 16);
    const auto mask = static_cast<__mmask32>(width == kPanel ? ~0u : (1u << width) - 1);
    __m512 sum0 = _mm512_setzero_ps(), sum1 = sum0;
    for (int64_t t = 0; t < depth; ++t) {
        const __m512 e0 = exp_lanes(_mm512_sub_ps(_mm512_loadu_ps(y + t * ldy), base0));
        const __m512 e1 = exp_lanes(_mm512_sub_ps(_mm512_loadu_ps(y + t * ldy + 16), base1));
        sum0 = _mm512_add_ps(sum0, e0);
        sum1 = _mm512_add_ps(sum1, e1);
        if (d != nullptr) _mm512_mask_storeu_epi16(d + t * ldd, mask, (__m512i)_mm512_cvtne2ps_pbh(e1, e0));
    }
    _mm512_storeu_ps(sum, sum0);
    _mm512_storeu_ps(sum + 16, sum1);
}
#else
void exponentials(const float*, int64_t, int64_t, int64_t, const float*, float*, uint16_t*, int64_t) {}
#endif

// Clones are separate functions: see rows.cpp.
MACPO_CLONES float dot(const float* x, const float* y, int64_t count) {
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int j = 0; j < kLanes; ++j) lanes[j] += x[i + j] * y[i + j];
    float sum = 0.0f;
    for (; i < count; ++i) sum += x[i] * y[i];
    for (int j = 0; j < kLanes; ++j) sum += lanes[j];
    return sum;
}

namespace {

// A sum above this, or none at all: the target is about 70 nats below the best token, and e may not be finite.
constexpr double kMost = 1e30;

float widened(uint16_t bits) { return bits_float(static_cast<int32_t>(static_cast<uint32_t>(bits) << 16)); }

// Approximates the target's logit of one row.
float near_target(const Bf16Head& head, int64_t row) {
    std::vector<float> x(static_cast<size_t>(head.width)), w(x.size());
    for (int64_t i = 0; i < head.width; ++i) {
        x[i] = widened(head.hidden[row * head.hidden_stride + i]);
        w[i] = widened(head.weight[head.target[row] * head.weight_stride + i]);
    }
    const float bias = head.bias == nullptr ? 0.0f : head.bias[head.target[row]];
    return head.scale * (dot(x.data(), w.data(), head.width) + bias);
}

struct Exponentials final : Tiles {
    const Bf16Head& head;
    const HeadResults& to;
    const int64_t wide;            // rows and as many as fill a panel
    std::vector<float> base, hit;  // [wide]: what e is relative to, and the target's logit
    std::vector<float> sums;       // [blocks of kTileRows tokens, wide]

    Exponentials(const Bf16Head& head, const HeadResults& to)
        : head(head), to(to), wide((head.rows + kPanel - 1) / kPanel * kPanel), base(wide), hit(wide),
          sums((head.vocab + kTileRows - 1) / kTileRows * wide) {}

    void take(float* c, int64_t ldc, int64_t token, int64_t depth, int64_t row, int64_t width) override {
        if (head.bias != nullptr || head.scale != 1.0f)
            for (int64_t t = 0; t < depth; ++t) {
                const float bias = head.bias == nullptr ? 0.0f : head.bias[token + t];
                for (int64_t i = 0; i < width; ++i) c[t * ldc + i] = head.scale * (c[t * ldc + i] + bias);
            }
        for (int64_t i = 0; i < width; ++i) {
            const int64_t t = head.target[row + i] - token;
            if (t < 0 || t >= depth) continue;
            hit[row + i] = c[t * ldc + i];
            c[t * ldc + i] = -kInf;
        }
        uint16_t* d = to.d == nullptr ? nullptr : to.d + token * to.stride + row;
        exponentials(c, ldc, depth, width, &base[row], &sums[token / kTileRows * wide + row], d, to.stride);
    }

    // Sums of e over all tokens but the target [wide], always in the same order.
    std::vector<double> rests() const {
        std::vector<double> rest(static_cast<size_t>(wide));
        for (size_t at = 0; at < sums.size();)
            for (int64_t row = 0; row < wide; ++row) rest[row] += sums[at++];
        return rest;
    }
};

void finish(const Bf16Head& head, const HeadResults& to, int64_t row, double base, double rest, double hit) {
    const double own = std::exp(hit - base), total = own + rest;
    // The first form keeps the digits of a confident row; the second an `own` that has none.
    const double logp = own > 1e-12 ? -std::log1p(rest / own) : hit - base - std::log(total);
    to.logp[row] = static_cast<float>(logp);
    to.lse[row] = static_cast<float>(base + std::log(total));
    to.factor[row] = static_cast<float>(-head.scale / total);
    if (to.d != nullptr) to.d[head.target[row] * to.stride + row] = bfloat16_bits(static_cast<float>(-rest));
}

// Recomputes at most kPanel rows with their largest logit as the base; such rows are rare, so speed does not matter.
void repair(const Bf16Head& head, const HeadResults& to, const std::vector<int64_t>& rows, int threads) {
    const int64_t n = static_cast<int64_t>(rows.size());
    std::vector<uint32_t> packed(static_cast<size_t>(packed_pairs(head.width, n)));
    std::vector<uint16_t> hidden;
    for (int64_t row : rows) {
        const uint16_t* from = head.hidden + row * head.hidden_stride;
        hidden.insert(hidden.end(), from, from + head.width);
    }
    pack_pairs(hidden.data(), head.width, n, 1, head.width, packed.data(), 1);
    std::vector<float> y(static_cast<size_t>(head.vocab * n));
    bf16_gemm(head.weight, head.weight_stride, packed.data(), y.data(), n, head.vocab, n, head.width, false, threads);
    for (int64_t i = 0; i < n; ++i) {
        float top = -kInf;
        for (int64_t t = 0; t < head.vocab; ++t) {
            float& value = y[t * n + i];
            value = head.scale * (value + (head.bias == nullptr ? 0.0f : head.bias[t]));
            top = value > top ? value : top;
        }
        double rest = 0.0;
        for (int64_t t = 0; t < head.vocab; ++t) {
            const float e = exp_float(y[t * n + i] - top);
            if (t != head.target[rows[i]]) rest += e;
            if (to.d != nullptr) to.d[t * to.stride + rows[i]] = bfloat16_bits(e);
        }
        finish(head, to, rows[i], top, rest, y[head.target[rows[i]] * n + i]);
    }
}

}  // namespace

void head_logp(const Bf16Head& head, const HeadResults& to, int threads) {
    Exponentials tiles(head, to);
    for (int64_t row = 0; row < head.rows; ++row) tiles.base[row] = near_target(head, row);
    std::vector<uint32_t> packed(static_cast<size_t>(packed_pairs(head.width, head.rows)));
    pack_pairs(head.hidden, head.width, head.rows, 1, head.hidden_stride, packed.data(), threads);
    bf16_gemm(head.weight, head.weight_stride, packed.data(), tiles, head.vocab, head.rows, head.width, threads);
    const std::vector<double> rests = tiles.rests();
    std::vector<int64_t> left;
    for (int64_t row = 0; row < head.rows; ++row) {
        if (rests[row] <= kMost)
            finish(head, to, row, tiles.base[row], rests[row], tiles.hit[row]);
        else
            left.push_back(row);
        if (static_cast<int64_t>(left.size()) == kPanel || (row == head.rows - 1 && !left.empty())) {
            repair(head, to, left, threads);
            left.clear();
        }
    }
}

}  // namespace macpo
