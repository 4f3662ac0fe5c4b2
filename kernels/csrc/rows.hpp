// Row kernels of the head operators; contracts in kernels/native.py and linear_logp/rows.py.
#pragma once

#include <cstdint>

namespace macpo {

// From raw products z to logits y = softcap * tanh(scale * (z + bias) / softcap); no bias: null, no softcap: 0.
struct Head {
    const float* bias;
    float scale, softcap;
};

// z(row, token), float32. Rows: a row's tokens lie side by side, rows are `stride` apart.
// Lanes: the other way round, rows lie side by side and tokens are `stride` apart.
struct Products {
    const float* data;
    int64_t rows, vocab, stride;
    bool lanes;
};

// Where a gradient goes, in the layout of its products. It may lie over the front of their rows (or token rows).
enum class Format { float32, bfloat16, half };
struct Gradient {
    void* data;
    int64_t stride;
    Format format;
};

// logp [rows] of the targets and lse [rows].
void row_logp(const Products& z, const Head& head, const int64_t* target, float* logp, float* lse, int threads);

// Maximum [rows], sum of e^(y - maximum) over all tokens but the target [rows], and the target's logit [rows].
void row_partials(const Products& z, const Head& head, const int64_t* target, float* top, float* rest, float* hit,
                  int threads);

// d logp / d z = (onehot - softmax(y)) * (1 - (y / softcap)^2) * scale.
void row_dlogits(const Products& z, const Head& head, const int64_t* target, const float* lse, const Gradient& d,
                 int threads);

// Both; where rows are contiguous, a row's gradient follows its logsumexp while it is in cache.
void row_logp_dlogits(const Products& z, const Head& head, const int64_t* target, float* logp, float* lse,
                      const Gradient& d, int threads);

}  // namespace macpo
