// Decode attention over slot-contiguous keys and values; contract in paged_attention/slots.py.
#pragma once

#include <cstdint>

namespace macpo {

// Every last axis is contiguous; the strides of the others are in elements.
struct SlotAttention {
    const float* q;  // [rows, heads, size]
    float *k, *v;    // [slots, kv_heads, tokens, size]
    int64_t q_row, q_head, k_slot, k_head, k_token, v_slot, v_head, v_token;
    const int64_t* lens;  // [rows]: tokens that a row sees, in its slot of the same number
    float* out;           // [rows, heads, size], contiguous
    int64_t rows, heads, kv_heads, size;
    float scale;
    int64_t window;      // 0: none
    float softcap;       // 0: none
    const float* sinks;  // [heads], logits without a value in each row's softmax; or null
    const float *new_k, *new_v;  // [rows, kv_heads, size]: of each row's last token, to be written first; or null
    int64_t new_k_row, new_k_head, new_v_row, new_v_head;
};

// Head sizes that the kernel takes.
constexpr int64_t kMinHead = 16, kMaxHead = 128;

// False where the compiler lacks the vector extensions that it is written in.
bool has_slot_attention();

// Two passes: all scores of a group's heads, then the values; a row's sums do not depend on the others.
void slot_attention(const SlotAttention& call, int threads);

}  // namespace macpo
