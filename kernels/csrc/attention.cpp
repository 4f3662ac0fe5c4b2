#include "attention.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "vecmath.hpp"

namespace macpo {

#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
namespace {

constexpr int64_t kKeys = 16;  // keys whose scores are made together
constexpr int64_t kSpan = 64;  // keys that all heads of a group visit while they are in cache

typedef float Vec __attribute__((vector_size(64)));  // kLanes floats

MACPO_INLINE void load(const float* x, Vec& out) { std::memcpy(&out, x, sizeof out); }
MACPO_INLINE void store(const Vec& x, float* out) { std::memcpy(out, &x, sizeof x); }

// Sums of neighbours, those of `a` before those of `b`.
MACPO_INLINE void fold(const Vec& a, const Vec& b, Vec& out) {
    out = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
          __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

int64_t vectors_of(int64_t size) { return (size + kLanes - 1) / kLanes; }

// A head is read as vectors of kLanes floats. The last one ends where the head ends, so that no load leaves it: the
// lanes that it shares with the one before are zeros in q.
template <int Vectors>
MACPO_INLINE int64_t offset(int vector, int64_t size) {
    return vector + 1 < Vectors ? vector * kLanes : size - kLanes;
}

// Keys or values that are read next, a vector for every one that is read now: the CPU's own prefetcher loses its way
// where a short run in one cache is followed by one in the other.
struct Ahead {
    const float* from;
    int64_t token, count;
};

template <int Vectors>
MACPO_INLINE void fetch(const Ahead& next, int64_t key) {
    if (key >= next.count) return;
#pragma GCC unroll 16
    for (int i = 0; i < Vectors; ++i) __builtin_prefetch(next.from + key * next.token + i * kLanes, 0, 2);
}

// scores[key] = q . k[key]; q holds whole vectors, scores are written up to a multiple of kKeys.
template <int Vectors>
MACPO_INLINE void score_keys(const float* q, const float* k, int64_t k_token, int64_t size, int64_t count,
                             const Ahead& next, float* scores) {
    Vec x[kKeys], part, q_part;
    int64_t first = 0;
    for (; first < count; first += kKeys) {
#pragma GCC unroll 16
        for (int key = 0; key < kKeys; ++key) {
            // The last key is read again where fewer than kKeys are left.
            const float* from = k + (first + key < count ? first + key : count - 1) * k_token;
            fetch<Vectors>(next, first + key);
            load(from + offset<Vectors>(0, size), part);
            load(q, q_part);
            x[key] = q_part * part;
#pragma GCC unroll 16
            for (int i = 1; i < Vectors; ++i) {
                load(from + offset<Vectors>(i, size), part);
                load(q + i * kLanes, q_part);
                x[key] += q_part * part;
            }
        }
#pragma GCC unroll 4
        for (int half = kKeys / 2; half > 0; half /= 2)
#pragma GCC unroll 8
            for (int i = 0; i < half; ++i) fold(x[2 * i], x[2 * i + 1], x[i]);
        store(x[0], scores + first);
    }
}

// out += sum over keys of weights[key] * v[key]; out holds whole vectors.
template <int Vectors>
MACPO_INLINE void mix_values(const float* weights, const float* v, int64_t v_token, int64_t size, int64_t count,
                             const Ahead& next, float* out) {
    Vec sum[Vectors], part;
#pragma GCC unroll 16
    for (int i = 0; i < Vectors; ++i) load(out + i * kLanes, sum[i]);
    for (int64_t key = 0; key < count; ++key) {
        fetch<Vectors>(next, key);
#pragma GCC unroll 16
        for (int i = 0; i < Vectors; ++i) {
            load(v + key * v_token + offset<Vectors>(i, size), part);
            sum[i] += weights[key] * part;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < Vectors; ++i) store(sum[i], out + i * kLanes);
}

}  // namespace

// One instance a number of vectors; a head of `size` takes vectors_of(size).
#define MACPO_BY_VECTORS(FUNCTION, ...)               \
    switch (vectors_of(size)) {                       \
        case 1: return FUNCTION<1>(__VA_ARGS__);      \
        case 2: return FUNCTION<2>(__VA_ARGS__);      \
        case 3: return FUNCTION<3>(__VA_ARGS__);      \
        case 4: return FUNCTION<4>(__VA_ARGS__);      \
        case 5: return FUNCTION<5>(__VA_ARGS__);      \
        case 6: return FUNCTION<6>(__VA_ARGS__);      \
        case 7: return FUNCTION<7>(__VA_ARGS__);      \
        case 8: return FUNCTION<8>(__VA_ARGS__);      \
        default: return;                              \
    }

MACPO_CLONES void span_scores(const float* q, const float* k, int64_t k_token, int64_t size, int64_t count,
                              const Ahead& next, float* scores) {
    MACPO_BY_VECTORS(score_keys, q, k, k_token, size, count, next, scores)
}

MACPO_CLONES void span_values(const float* weights, const float* v, int64_t v_token, int64_t size, int64_t count,
                              const Ahead& next, float* out) {
    MACPO_BY_VECTORS(mix_values, weights, v, v_token, size, count, next, out)
}

MACPO_CLONES void cap_scores(float* x, int64_t n, float softcap) {
    for (int64_t i = 0; i < n; ++i) x[i] = softcap * tanh_float(x[i] / softcap);
}

// x -> e^(x - max); returns their sum. The sink, -inf where there is none, is in the maximum and in the sum.
MACPO_CLONES float exp_scores(float* x, int64_t n, float sink) {
    const float largest = max_of(x, n), top = sink > largest ? sink : largest;
    float lanes[kLanes] = {}, sum = 0.0f;
    for (int64_t i = 0; i < n; ++i) x[i] = exp_float(x[i] - top);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int j = 0; j < kLanes; ++j) lanes[j] += x[i + j];
    for (; i < n; ++i) sum += x[i];
    for (int j = 0; j < kLanes; ++j) sum += lanes[j];
    return sum + exp_float(sink - top);
}

namespace {

// What one thread needs for the heads of a group: scores [group, pitch], q and out [group, width].
struct Scratch {
    float *scores, *q, *out;
    int64_t pitch, width;
};

// The tokens that a row sees: where they begin, and how many.
std::pair<int64_t, int64_t> seen(const SlotAttention& call, int64_t row) {
    const int64_t first = call.window > 0 ? std::max<int64_t>(0, call.lens[row] - call.window) : 0;
    return {first, call.lens[row] - first};
}

Ahead keys_of(const SlotAttention& call, int64_t item) {
    const int64_t row = item / call.kv_heads, kv_head = item % call.kv_heads;
    if (row >= call.rows) return {call.k, 0, 0};
    const auto [first, count] = seen(call, row);
    return {call.k + row * call.k_slot + kv_head * call.k_head + first * call.k_token, call.k_token, count};
}

Ahead rest(const Ahead& all, int64_t key, int64_t g) {  // the first head of a group fetches for all
    return {all.from + key * all.token, all.token, g == 0 ? all.count - key : 0};
}

// All heads that share the keys and values of one slot and head; items go by row, then by key-value head.
void attend(const SlotAttention& call, int64_t item, const Scratch& memory) {
    const int64_t row = item / call.kv_heads, kv_head = item % call.kv_heads;
    const int64_t group = call.heads / call.kv_heads, size = call.size, width = memory.width;
    const int64_t whole = width - kLanes;  // where the last vector of the copies begins
    if (call.new_k != nullptr) {
        const int64_t last = call.lens[row] - 1;
        std::copy_n(call.new_k + row * call.new_k_row + kv_head * call.new_k_head, size,
                    call.k + row * call.k_slot + kv_head * call.k_head + last * call.k_token);
        std::copy_n(call.new_v + row * call.new_v_row + kv_head * call.new_v_head, size,
                    call.v + row * call.v_slot + kv_head * call.v_head + last * call.v_token);
    }
    const auto [first, count] = seen(call, row);
    const float* k = keys_of(call, item).from;
    const float* v = call.v + row * call.v_slot + kv_head * call.v_head + first * call.v_token;
    const Ahead values{v, call.v_token, count}, next_keys = keys_of(call, item + 1);
    std::fill(memory.q, memory.q + group * width, 0.0f);
    std::fill(memory.out, memory.out + group * width, 0.0f);
    for (int64_t g = 0; g < group; ++g) {
        const float* from = call.q + row * call.q_row + (kv_head * group + g) * call.q_head;
        float* to = memory.q + g * width;
        for (int64_t i = 0; i < whole; ++i) to[i] = from[i] * call.scale;
        for (int64_t i = whole; i < size; ++i) to[width - size + i] = from[i] * call.scale;
    }
    for (int64_t key = 0; key < count; key += kSpan)
        for (int64_t g = 0; g < group; ++g)
            span_scores(memory.q + g * width, k + key * call.k_token, call.k_token, size, std::min(kSpan, count - key),
                        rest(values, key, g), memory.scores + g * memory.pitch + key);
    float* sums = memory.q;  // q has been read
    for (int64_t g = 0; g < group; ++g) {
        float* scores = memory.scores + g * memory.pitch;
        if (call.softcap > 0.0f) cap_scores(scores, count, call.softcap);
        sums[g] = exp_scores(scores, count, call.sinks != nullptr ? call.sinks[kv_head * group + g] : -kInf);
    }
    for (int64_t key = 0; key < count; key += kSpan)
        for (int64_t g = 0; g < group; ++g)
            span_values(memory.scores + g * memory.pitch + key, v + key * call.v_token, call.v_token, size,
                        std::min(kSpan, count - key), rest(next_keys, key, g), memory.out + g * width);
    for (int64_t g = 0; g < group; ++g) {
        const float* from = memory.out + g * width;
        float* to = call.out + (row * call.heads + kv_head * group + g) * size;
        for (int64_t i = 0; i < whole; ++i) to[i] = from[i] / sums[g];
        for (int64_t i = whole; i < size; ++i) to[i] = from[width - size + i] / sums[g];
    }
}

}  // namespace

bool has_slot_attention() { return true; }

void slot_attention(const SlotAttention& call, int threads) {
    if (call.rows == 0) return;
    const int64_t group = call.heads / call.kv_heads, width = vectors_of(call.size) * kLanes;
    const int64_t longest = *std::max_element(call.lens, call.lens + call.rows);
    const int64_t pitch = (longest + kKeys - 1) / kKeys * kKeys, share = group * (pitch + 2 * width);
    const int64_t items = call.rows * call.kv_heads;
    std::vector<float> memory(static_cast<size_t>(threads * share));
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int64_t part = 0; part < threads; ++part) {
        float* own = memory.data() + part * share;
        const Scratch scratch{own, own + group * pitch, own + group * (pitch + width), pitch, width};
        for (int64_t item = items * part / threads; item < items * (part + 1) / threads; ++item)
            attend(call, item, scratch);
    }
}

#else

bool has_slot_attention() { return false; }

void slot_attention(const SlotAttention&, int) {
    throw std::runtime_error("slot_attention needs a build with GCC 12, Clang or newer");
}

#endif

}  // namespace macpo
