// Log-probs of a bf16 head and their gradient, made from its product's tiles: no logits in memory.
// For e, rest and factor see linear_logp/triton_gemm.py: one method, two languages.
#pragma once

#include <cstdint>

namespace macpo {

// Logits scale * (hidden weight' + bias); bias null stands for 0. Bits of bfloat16; columns are contiguous.
struct Bf16Head {
    const uint16_t* hidden;
    int64_t rows, hidden_stride;
    const uint16_t* weight;
    int64_t vocab, weight_stride, width;
    const float* bias;
    float scale;
    const int64_t* target;
};

// [rows] each; d [vocab, rows], its rows `stride` apart, or null. d logp / d z = factor * d by columns.
struct HeadResults {
    float *logp, *lse, *factor;
    uint16_t* d;
    int64_t stride;
};

void head_logp(const Bf16Head& head, const HeadResults& to, int threads);

}  // namespace macpo
