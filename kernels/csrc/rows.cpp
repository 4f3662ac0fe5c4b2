#include "rows.hpp"

#include <cmath>

#include "vecmath.hpp"

namespace macpo {

// Clones are separate functions: an OpenMP region is outlined and would lose the target attribute.
MACPO_CLONES void logp_row(const float* x, int64_t v, int64_t target, float* logp, float* lse) {
    const float top = max_of(x, v);
    const float shift = top > -__builtin_inff() ? top : 0.0f;  // a row of -inf alone: no inf - inf
    *lse = static_cast<float>(shift + std::log(sum_exp(x, v, shift)));
    *logp = x[target] - *lse;
}

MACPO_CLONES void dlogits_row(float* x, int64_t v, int64_t target, float lse, float scale, float softcap) {
    const float hit = x[target];
    if (softcap > 0.0f) {
        for (int64_t i = 0; i < v; ++i) {
            const float t = x[i] / softcap;
            x[i] = -exp_float(x[i] - lse) * (1.0f - t * t) * scale;
        }
        const float t = hit / softcap;
        x[target] = (1.0f - exp_float(hit - lse)) * (1.0f - t * t) * scale;
    } else {
        for (int64_t i = 0; i < v; ++i) x[i] = -exp_float(x[i] - lse) * scale;
        x[target] = (1.0f - exp_float(hit - lse)) * scale;
    }
}

void row_logp(const float* logits, const int64_t* target, int64_t n, int64_t v, float* logp, float* lse, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < n; ++i) logp_row(logits + i * v, v, target[i], logp + i, lse + i);
}

void row_dlogits(float* logits, const int64_t* target, const float* lse, int64_t n, int64_t v, float scale,
                 float softcap, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < n; ++i) dlogits_row(logits + i * v, v, target[i], lse[i], scale, softcap);
}

}  // namespace macpo
