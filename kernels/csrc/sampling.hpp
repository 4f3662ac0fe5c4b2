// The sampler, one row at a time; contract in sampling/op.py, rules in sampling/reference.py.
#pragma once

#include <cstdint>

namespace macpo {

// Settings of one row, as SampleParams has them.
struct RowParams {
    int64_t seed;
    float temperature, top_p, min_p, penalty;
    int64_t top_k;
};

struct Draw {
    int64_t id;
    float raw_logp, logp;
};

// logits [v], seen [v] or null, request_key [3].
Draw sample_row(const float* logits, const bool* seen, int64_t v, const RowParams& params, const int64_t* request_key,
                int64_t position);

// 32 random bits of each token [k], as int64.
void token_words(int64_t seed, const int64_t* request_key, int64_t position, const int64_t* tokens, int64_t k,
                 int64_t* words);

}  // namespace macpo
