// exp and log of floats, branch-free so that loops over them become vector code. Relative error below 2e-7.
// Built with -ffp-contract=off: every instruction set gives the same bits.
// Polynomials: Cephes (S. Moshier), expf and logf.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(_MSC_VER) && !defined(__clang__)
#define MACPO_INLINE __forceinline
#else
#define MACPO_INLINE inline __attribute__((always_inline))
#endif

// One source, compiled for three x86 levels and chosen when the library loads; plain code elsewhere.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define MACPO_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MACPO_CLONES
#endif

namespace macpo {

constexpr float kInf = std::numeric_limits<float>::infinity();

MACPO_INLINE int32_t float_bits(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

MACPO_INLINE float bits_float(int32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// e^x for x <= 88; 0 below -87.3 (no subnormals); NaN stays NaN.
MACPO_INLINE float exp_float(float x) {
    const float clamped = x < -87.3f ? -87.3f : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which its low bits then hold
    const float shifted = clamped * 1.44269504088896341f + magic;
    const float n = shifted - magic;
    const float r = clamped - n * 0.693359375f - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const float mantissa = p * (r * r) + r + 1.0f;
    const uint32_t power = static_cast<uint32_t>(float_bits(shifted)) - 0x4B400000u + 127u;
    const float value = mantissa * bits_float(static_cast<int32_t>(power << 23));
    return x < -87.3f ? 0.0f : value;
}

// ln x for normal x > 0.
MACPO_INLINE float log_float(float x) {
    const int32_t bits = float_bits(x);
    // x = m * 2^e with m in [sqrt(1/2), sqrt(2))
    const int32_t e = (bits - 0x3F3504F3) >> 23;
    const float m = bits_float(bits - (e << 23));
    const float f = m - 1.0f;
    const float z = f * f;
    float p = 7.0376836292e-2f;
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    const float n = static_cast<float>(e);
    float y = p * f * z;
    y += n * -2.12194440e-4f;
    y -= 0.5f * z;
    return f + y + n * 0.693359375f;
}

// tanh x, NaN stays NaN. Polynomial below 0.625: Cephes, tanhf.
MACPO_INLINE float tanh_float(float x) {
    const float size = x < 0.0f ? -x : x;
    const float capped = size > 20.0f ? 20.0f : size;  // tanh is 1 there
    const float far = 1.0f - 2.0f / (exp_float(2.0f * capped) + 1.0f);
    const float z = x * x;
    float p = -5.70498872745e-3f;
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    const float near = p * z * x + x;
    const float signed_far = x < 0.0f ? -far : far;
    return size < 0.625f ? near : signed_far;
}

// Nearest bfloat16, ties to even; NaN stays NaN.
MACPO_INLINE uint16_t bfloat16_bits(float x) {
    const uint32_t bits = static_cast<uint32_t>(float_bits(x));
    const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    return static_cast<uint16_t>(x == x ? rounded : 0x7FC0u);
}

// Nearest IEEE half, ties to even, subnormals too; NaN stays NaN.
MACPO_INLINE uint16_t half_bits(float x) {
    const uint32_t bits = static_cast<uint32_t>(float_bits(x));
    const uint32_t size = bits & 0x7FFFFFFFu, sign = bits >> 16 & 0x8000u;
    const uint32_t normal = (size - (112u << 23) + 0xFFFu + (size >> 13 & 1u)) >> 13;
    // Below 2^-14 the units of 2^-24 end in the last bit of a sum with 0.5.
    const uint32_t tiny = static_cast<uint32_t>(float_bits(bits_float(static_cast<int32_t>(size)) + 0.5f)) - 0x3F000000u;
    const uint32_t finite = size < 0x38800000u ? tiny : normal;
    const uint32_t capped = size >= 0x47800000u ? 0x7C00u : finite;
    return static_cast<uint16_t>(sign | (size > 0x7F800000u ? 0x7E00u : capped));
}

constexpr int kLanes = 16;
constexpr int64_t kBlock = 256;  // floats summed in 16 lanes before they go to a double

// Largest of x[0..n); -inf for n = 0, NaNs are passed over.
MACPO_INLINE float max_of(const float* x, int64_t n) {
    float lanes[kLanes];
    for (int j = 0; j < kLanes; ++j) lanes[j] = -kInf;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int j = 0; j < kLanes; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
    float best = -kInf;
    for (; i < n; ++i) best = x[i] > best ? x[i] : best;
    for (int j = 0; j < kLanes; ++j) best = lanes[j] > best ? lanes[j] : best;
    return best;
}

// Sum of e^(x[i] - shift).
MACPO_INLINE double sum_exp(const float* x, int64_t n, float shift) {
    double total = 0.0;
    int64_t i = 0;
    for (; i + kLanes <= n;) {
        float lanes[kLanes] = {};
        const int64_t stop = i + kBlock <= n ? i + kBlock : i + (n - i) / kLanes * kLanes;
        for (; i < stop; i += kLanes)
            for (int j = 0; j < kLanes; ++j) lanes[j] += exp_float(x[i + j] - shift);
        float sum = 0.0f;
        for (int j = 0; j < kLanes; ++j) sum += lanes[j];
        total += sum;
    }
    for (; i < n; ++i) total += exp_float(x[i] - shift);
    return total;
}

}  // namespace macpo
