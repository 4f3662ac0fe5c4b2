// Row kernels of the head operators; contracts in linear_logp/rows.py.
#pragma once

#include <cstdint>

namespace macpo {

// logits [n, v] -> logp [n] of the targets and lse [n].
void row_logp(const float* logits, const int64_t* target, int64_t n, int64_t v, float* logp, float* lse, int threads);

// logits [n, v] -> scale * (onehot - softmax) * (1 - (logits / softcap)^2), in place; softcap 0 is none.
void row_dlogits(float* logits, const int64_t* target, const float* lse, int64_t n, int64_t v, float scale,
                 float softcap, int threads);

}  // namespace macpo
