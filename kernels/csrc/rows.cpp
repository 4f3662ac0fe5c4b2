#include "rows.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "vecmath.hpp"

namespace macpo {
namespace {

constexpr int64_t kPiece = 1024;   // tokens of a row that are worked on at a time
constexpr int64_t kWidth = 32;     // rows of a tile of lanes
constexpr int64_t kChunk = 512;    // its tokens (64 KiB); fixed, so that the number of threads does not change a bit
constexpr int64_t kShort = 64;     // tokens summed in floats before they go to doubles

MACPO_INLINE float logit(float z, float bias, const Head& head) {
    const float y = head.scale * (z + bias);
    return head.softcap > 0.0f ? head.softcap * tanh_float(y / head.softcap) : y;
}

bool is_plain(const Head& head) { return head.bias == nullptr && head.scale == 1.0f && !(head.softcap > 0.0f); }

float logit_at(const Products& z, const Head& head, int64_t row, int64_t token) {
    const float value = z.data[z.lanes ? token * z.stride + row : row * z.stride + token];
    return logit(value, head.bias == nullptr ? 0.0f : head.bias[token], head);
}

// Gradient of one row or one row of lanes, written from its logits; a loop a format, so that each is vector code.
MACPO_INLINE void store(const float* d, int64_t count, void* out, int64_t at, Format format) {
    if (format == Format::float32) {
        float* to = static_cast<float*>(out) + at;
        for (int64_t i = 0; i < count; ++i) to[i] = d[i];
    } else if (format == Format::bfloat16) {
        uint16_t* to = static_cast<uint16_t*>(out) + at;
        for (int64_t i = 0; i < count; ++i) to[i] = bfloat16_bits(d[i]);
    } else {
        uint16_t* to = static_cast<uint16_t*>(out) + at;
        for (int64_t i = 0; i < count; ++i) to[i] = half_bits(d[i]);
    }
}

MACPO_INLINE float slope(float y, const Head& head) {
    const float t = y / head.softcap;
    return 1.0f - t * t;
}

// The gradient at the target, which is not minus a probability.
float hit_gradient(float y, float lse, const Head& head) {
    const float d = 1.0f - exp_float(y - lse);
    return (head.softcap > 0.0f ? d * slope(y, head) : d) * head.scale;
}

// A maximum and the sum of e^(y - maximum) so far; -inf counts as a shift of 0, so that there is no inf - inf.
struct Running {
    float top = -kInf;
    double sum = 0.0;

    void add(float other_top, double other_sum) {
        if (other_top > top) {
            sum = other_sum + (top > -kInf ? sum * std::exp(static_cast<double>(top) - other_top) : sum);
            top = other_top;
        } else {
            sum += other_top > -kInf && other_top < top ? other_sum * std::exp(static_cast<double>(other_top) - top)
                                                        : other_sum;
        }
    }
    float shift() const { return top > -kInf ? top : 0.0f; }
    double logsumexp() const { return shift() + std::log(sum); }
};

}  // namespace

// Clones are separate functions: an OpenMP region is outlined and would lose the target attribute.

// Logits of a run of tokens of one row.
MACPO_CLONES void row_logits(const float* z, const float* bias, int64_t count, const Head& head, float* y) {
    const Head own = head;
    if (bias != nullptr && own.softcap > 0.0f) {
        for (int64_t i = 0; i < count; ++i) y[i] = own.softcap * tanh_float(own.scale * (z[i] + bias[i]) / own.softcap);
    } else if (own.softcap > 0.0f) {
        for (int64_t i = 0; i < count; ++i) y[i] = own.softcap * tanh_float(own.scale * (z[i] + 0.0f) / own.softcap);
    } else if (bias != nullptr) {
        for (int64_t i = 0; i < count; ++i) y[i] = own.scale * (z[i] + bias[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) y[i] = own.scale * (z[i] + 0.0f);
    }
}

MACPO_INLINE void some_lanes(const float* z, float bias, int64_t count, float scale, float softcap, float* y) {
    if (softcap > 0.0f) {
        for (int64_t i = 0; i < count; ++i) y[i] = softcap * tanh_float(scale * (z[i] + bias) / softcap);
    } else {
        for (int64_t i = 0; i < count; ++i) y[i] = scale * (z[i] + bias);
    }
}

// Logits of a tile of lanes [depth, width <= kWidth] into y [depth, kWidth]; bias [depth] or null.
MACPO_CLONES void lane_logits(const float* z, int64_t stride, const float* bias, int64_t depth, int64_t width,
                              const Head& head, float* y) {
    const float scale = head.scale, softcap = head.softcap;
    for (int64_t t = 0; t < depth; ++t) {
        const float shift = bias ? bias[t] : 0.0f;
        if (width == kWidth)
            some_lanes(z + t * stride, shift, kWidth, scale, softcap, y + t * kWidth);
        else
            some_lanes(z + t * stride, shift, width, scale, softcap, y + t * kWidth);
    }
}

MACPO_CLONES void top_and_sum(const float* y, int64_t count, float* top, double* sum) {
    *top = max_of(y, count);
    *sum = sum_exp(y, count, *top > -kInf ? *top : 0.0f);
}

// Gradient of a run of tokens of one row, the target's apart.
MACPO_CLONES void row_piece(const float* y, int64_t count, float lse, const Head& head, void* out, int64_t at,
                            Format format) {
    float d[kPiece];
    const float minus = -head.scale, softcap = head.softcap;
    if (softcap > 0.0f) {
        for (int64_t i = 0; i < count; ++i) {
            const float t = y[i] / softcap;
            d[i] = exp_float(y[i] - lse) * (1.0f - t * t) * minus;
        }
    } else {
        for (int64_t i = 0; i < count; ++i) d[i] = exp_float(y[i] - lse) * minus;
    }
    store(d, count, out, at, format);
}

// As row_piece, for `count` tokens of all rows, where rows are lanes.
MACPO_CLONES void lane_tokens(const Products& z, const Head& head, int64_t first, int64_t count, const float* lse,
                              const Gradient& to) {
    const int64_t rows = z.rows;
    const float scale = head.scale, softcap = head.softcap;
    const bool plain = is_plain(head);
    float y[kWidth], d[kWidth];
    for (int64_t t = first; t < first + count; ++t) {
        const float bias = head.bias ? head.bias[t] : 0.0f;
        for (int64_t row = 0; row < rows; row += kWidth) {
            const int64_t width = rows - row < kWidth ? rows - row : kWidth;
            const float* from = z.data + t * z.stride + row;
            if (plain) {
                for (int64_t i = 0; i < width; ++i) d[i] = -exp_float(from[i] - lse[row + i]);
            } else {
                some_lanes(from, bias, width, scale, softcap, y);
                for (int64_t i = 0; i < width; ++i) d[i] = exp_float(y[i] - lse[row + i]);
                if (softcap > 0.0f) {
                    for (int64_t i = 0; i < width; ++i) {
                        const float slope = y[i] / softcap;
                        d[i] *= 1.0f - slope * slope;
                    }
                }
                for (int64_t i = 0; i < width; ++i) d[i] *= -scale;
            }
            store(d, width, to.data, t * to.stride + row, to.format);
        }
    }
}

// Maxima and sums of a tile of lanes: y [depth, width], tokens `stride` apart.
MACPO_INLINE void tile_sums(const float* y, int64_t stride, int64_t depth, int64_t width, float* top, double* sum) {
    float best[kWidth], part[kWidth];
    for (int64_t i = 0; i < width; ++i) best[i] = -kInf;
    for (int64_t t = 0; t < depth; ++t)
        for (int64_t i = 0; i < width; ++i) best[i] = y[t * stride + i] > best[i] ? y[t * stride + i] : best[i];
    for (int64_t i = 0; i < width; ++i) {
        top[i] = best[i];
        best[i] = best[i] > -kInf ? best[i] : 0.0f;
        sum[i] = 0.0;
    }
    for (int64_t from = 0; from < depth; from += kShort) {
        const int64_t stop = from + kShort < depth ? from + kShort : depth;
        for (int64_t i = 0; i < width; ++i) part[i] = 0.0f;
        for (int64_t t = from; t < stop; ++t)
            for (int64_t i = 0; i < width; ++i) part[i] += exp_float(y[t * stride + i] - best[i]);
        for (int64_t i = 0; i < width; ++i) sum[i] += part[i];
    }
}

MACPO_CLONES void lane_sums(const float* y, int64_t stride, int64_t depth, int64_t width, float* top, double* sum) {
    if (width == kWidth)
        tile_sums(y, stride, depth, kWidth, top, sum);
    else
        tile_sums(y, stride, depth, width, top, sum);
}

namespace {

// The log-prob is rounded once, at its own size: that of a confident row has digits that a float logsumexp has not.
void store_logp(const Products& z, const Head& head, int64_t row, int64_t target, double exact, float* logp,
                float* lse) {
    lse[row] = static_cast<float>(exact);
    logp[row] = static_cast<float>(logit_at(z, head, row, target) - exact);
}

// Maximum and sum of a row, without the token `skip` where that is one of them.
Running one_sums(const Products& z, const Head& head, int64_t row, int64_t skip) {
    const float* from = z.data + row * z.stride;
    float buffer[kPiece];
    Running all;
    for (int64_t i = 0; i < z.vocab; i += kPiece) {
        const int64_t count = std::min(kPiece, z.vocab - i);
        const bool here = skip >= i && skip < i + count;
        const float* y = from + i;
        if (here || !is_plain(head)) {
            row_logits(from + i, head.bias ? head.bias + i : nullptr, count, head, buffer);
            if (here) buffer[skip - i] = -kInf;
            y = buffer;
        }
        float top;
        double sum;
        top_and_sum(y, count, &top, &sum);
        all.add(top, sum);
    }
    return all;
}

double one_lse(const Products& z, const Head& head, int64_t row) { return one_sums(z, head, row, -1).logsumexp(); }

void one_dlogits(const Products& z, const Head& head, int64_t row, int64_t target, float lse, const Gradient& d) {
    const float* from = z.data + row * z.stride;
    const float hit = hit_gradient(logit_at(z, head, row, target), lse, head);
    float buffer[kPiece];
    for (int64_t i = 0; i < z.vocab; i += kPiece) {
        const int64_t count = std::min(kPiece, z.vocab - i);
        const float* y = from + i;
        if (!is_plain(head)) {
            row_logits(from + i, head.bias ? head.bias + i : nullptr, count, head, buffer);
            y = buffer;
        }
        row_piece(y, count, lse, head, d.data, row * d.stride + i, d.format);
    }
    store(&hit, 1, d.data, row * d.stride + target, d.format);
}

// Maxima and sums of all rows, each without its token `skip` [rows] where that is given.
std::vector<Running> lanes_sums(const Products& z, const Head& head, const int64_t* skip,
                                [[maybe_unused]] int threads) {
    const int64_t n = z.rows, chunks = (z.vocab + kChunk - 1) / kChunk;
    std::vector<float> tops(static_cast<size_t>(chunks * n));
    std::vector<double> sums(static_cast<size_t>(chunks * n));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t c = 0; c < chunks; ++c) {
        float buffer[kChunk * kWidth];
        const int64_t first = c * kChunk, depth = std::min(kChunk, z.vocab - first);
        for (int64_t row = 0; row < n; row += kWidth) {
            const int64_t width = std::min(kWidth, n - row);
            bool here = false;
            if (skip != nullptr)
                for (int64_t i = row; i < row + width; ++i) here = here || (skip[i] >= first && skip[i] < first + depth);
            const float* y = z.data + first * z.stride + row;
            int64_t stride = z.stride;
            if (here || !is_plain(head)) {
                lane_logits(y, stride, head.bias ? head.bias + first : nullptr, depth, width, head, buffer);
                y = buffer;
                stride = kWidth;
            }
            if (here)
                for (int64_t i = 0; i < width; ++i) {
                    const int64_t token = skip[row + i] - first;
                    if (token >= 0 && token < depth) buffer[token * kWidth + i] = -kInf;
                }
            lane_sums(y, stride, depth, width, &tops[c * n + row], &sums[c * n + row]);
        }
    }
    std::vector<Running> all(static_cast<size_t>(n));
    for (int64_t row = 0; row < n; ++row)
        for (int64_t c = 0; c < chunks; ++c) all[row].add(tops[c * n + row], sums[c * n + row]);
    return all;
}

void lanes_logp(const Products& z, const Head& head, const int64_t* target, float* logp, float* lse, int threads) {
    const std::vector<Running> all = lanes_sums(z, head, nullptr, threads);
    for (int64_t row = 0; row < z.rows; ++row) store_logp(z, head, row, target[row], all[row].logsumexp(), logp, lse);
}

void lanes_dlogits(const Products& z, const Head& head, const int64_t* target, const float* lse, const Gradient& d,
                   [[maybe_unused]] int threads) {
    const int64_t n = z.rows;
    std::vector<float> hits(static_cast<size_t>(n));
    for (int64_t row = 0; row < n; ++row)
        hits[row] = hit_gradient(logit_at(z, head, row, target[row]), lse[row], head);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t t = 0; t < z.vocab; t += kShort)
        lane_tokens(z, head, t, std::min(kShort, z.vocab - t), lse, d);
    for (int64_t row = 0; row < n; ++row) store(&hits[row], 1, d.data, target[row] * d.stride + row, d.format);
}

}  // namespace

void row_logp(const Products& z, const Head& head, const int64_t* target, float* logp, float* lse, int threads) {
    if (z.lanes) return lanes_logp(z, head, target, logp, lse, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < z.rows; ++row) {
        store_logp(z, head, row, target[row], one_lse(z, head, row), logp, lse);
    }
}

void row_partials(const Products& z, const Head& head, const int64_t* target, float* top, float* rest, float* hit,
                  int threads) {
    const auto store_sums = [&](int64_t row, Running all) {
        hit[row] = logit_at(z, head, row, target[row]);
        all.add(hit[row], 0.0);
        top[row] = all.top;
        rest[row] = static_cast<float>(all.sum);
    };
    if (z.lanes) {
        const std::vector<Running> all = lanes_sums(z, head, target, threads);
        for (int64_t row = 0; row < z.rows; ++row) store_sums(row, all[row]);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < z.rows; ++row) store_sums(row, one_sums(z, head, row, target[row]));
}

void row_dlogits(const Products& z, const Head& head, const int64_t* target, const float* lse, const Gradient& d,
                 int threads) {
    if (z.lanes) return lanes_dlogits(z, head, target, lse, d, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < z.rows; ++row) one_dlogits(z, head, row, target[row], lse[row], d);
}

void row_logp_dlogits(const Products& z, const Head& head, const int64_t* target, float* logp, float* lse,
                      const Gradient& d, int threads) {
    if (z.lanes) {
        lanes_logp(z, head, target, logp, lse, threads);
        return lanes_dlogits(z, head, target, lse, d, threads);
    }
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < z.rows; ++row) {
        store_logp(z, head, row, target[row], one_lse(z, head, row), logp, lse);
        one_dlogits(z, head, row, target[row], lse[row], d);
    }
}

}  // namespace macpo
