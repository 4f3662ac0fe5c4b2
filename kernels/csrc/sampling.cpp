#include "sampling.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "philox.hpp"
#include "vecmath.hpp"

namespace macpo {
namespace {

constexpr float kMinusInf = -kInf;
constexpr int64_t kBins = 2048;      // bins of the nucleus histogram
constexpr float kBinsPerNat = 64.0f;

struct Candidate {
    float score;
    int32_t id;
};

// Rank order: larger score first; among equals the higher id, as Hugging Face's ascending sort amounts to.
bool ranks_before(const Candidate& a, const Candidate& b) {
    return a.score != b.score ? a.score > b.score : a.id > b.id;
}

struct Scratch {
    std::vector<float> scores, maxima, sorted;
    std::vector<Candidate> kept, edge;
    std::vector<double> mass;
};

Scratch& scratch() {
    thread_local Scratch memory;
    return memory;
}

}  // namespace

MACPO_CLONES void score_row(const float* logits, const bool* seen, int64_t v, float penalty, float temperature,
                            float* scores) {
    if (seen != nullptr && penalty != 1.0f) {
        for (int64_t i = 0; i < v; ++i) {
            const float x = logits[i];
            const float penalised = x < 0.0f ? x * penalty : x / penalty;
            scores[i] = (seen[i] ? penalised : x) / temperature;
        }
    } else {
        for (int64_t i = 0; i < v; ++i) scores[i] = logits[i] / temperature;
    }
}

MACPO_CLONES float row_max(const float* x, int64_t n) { return max_of(x, n); }

MACPO_CLONES double row_sum_exp(const float* x, int64_t n, float shift) { return sum_exp(x, n, shift); }

// Maxima of groups of kLanes scores, strided so that no vector is folded; the tail's scores are groups of one.
MACPO_CLONES void group_maxima(const float* scores, int64_t v, std::vector<float>& maxima) {
    const int64_t blocks = v / kBlock;
    maxima.resize(blocks * kLanes + v % kBlock);
    for (int64_t b = 0; b < blocks; ++b) {
        float lanes[kLanes];
        const float* x = scores + b * kBlock;
        for (int j = 0; j < kLanes; ++j) lanes[j] = x[j];
        for (int64_t i = kLanes; i < kBlock; i += kLanes)
            for (int j = 0; j < kLanes; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
        for (int j = 0; j < kLanes; ++j) maxima[b * kLanes + j] = lanes[j];
    }
    std::copy(scores + blocks * kBlock, scores + v, maxima.begin() + blocks * kLanes);
}

// Every token whose score is at least that of the k-th largest.
void keep_top_k(const float* scores, int64_t v, int64_t k, Scratch& memory, std::vector<Candidate>& kept) {
    const auto kth_largest = [k](std::vector<float>& x) {
        std::nth_element(x.begin(), x.begin() + (k - 1), x.end(), std::greater<float>());
        return x[k - 1];
    };
    std::vector<float>& maxima = memory.maxima;
    std::vector<float>& sorted = memory.sorted;
    group_maxima(scores, v, maxima);
    if (static_cast<int64_t>(maxima.size()) < 2 * k) {
        sorted.assign(scores, scores + v);
        const float kth = kth_largest(sorted);
        for (int64_t i = 0; i < v; ++i)
            if (scores[i] >= kth) kept.push_back({scores[i], static_cast<int32_t>(i)});
        return;
    }
    // k groups reach the k-th largest maximum, so the k-th largest score is no smaller: few tokens are left to look at.
    sorted = maxima;
    const float bound = kth_largest(sorted);
    const int64_t grouped = v / kBlock * kLanes;
    for (int64_t g = 0; g < static_cast<int64_t>(maxima.size()); ++g) {
        if (!(maxima[g] >= bound)) continue;
        const int64_t first = g < grouped ? g / kLanes * kBlock + g % kLanes : v / kBlock * kBlock + g - grouped;
        const int64_t stop = g < grouped ? (g / kLanes + 1) * kBlock : first + 1;
        for (int64_t i = first; i < stop; i += kLanes)
            if (scores[i] >= bound) kept.push_back({scores[i], static_cast<int32_t>(i)});
    }
    sorted.clear();
    for (const Candidate& c : kept) sorted.push_back(c.score);
    const float kth = kth_largest(sorted);
    kept.erase(std::remove_if(kept.begin(), kept.end(), [kth](const Candidate& c) { return c.score < kth; }), kept.end());
}

// The nucleus of `kept`: a token stays while less than top_p of the mass ranks above it. Order is not kept.
void keep_top_p(std::vector<Candidate>& kept, float top, float top_p) {
    double total = 0.0;
    for (const Candidate& c : kept) total += exp_float(c.score - top);
    std::sort(kept.begin(), kept.end(), ranks_before);
    double above = 0.0;
    size_t size = 0;
    for (; size < kept.size() && (size == 0 || above / total < top_p); ++size) above += exp_float(kept[size].score - top);
    kept.resize(size);
}

// As keep_top_p over the whole vocabulary without sorting it: a histogram finds the bin in which the mass reaches top_p.
void keep_top_p_all(const float* scores, int64_t v, float top, double total, float top_p, std::vector<double>& mass,
                    std::vector<Candidate>& kept, std::vector<Candidate>& edge) {
    const auto bin_of = [&](float score) {
        const float at = (top - score) * kBinsPerNat;
        return at < static_cast<float>(kBins - 1) ? static_cast<int64_t>(at) : kBins - 1;
    };
    mass.assign(kBins, 0.0);
    for (int64_t i = 0; i < v; ++i) mass[bin_of(scores[i])] += exp_float(scores[i] - top);
    double above = 0.0;
    int64_t last = 0;
    while (last < kBins - 1 && (above + mass[last]) / total < top_p) above += mass[last++];
    edge.clear();
    for (int64_t i = 0; i < v; ++i) {
        const int64_t bin = bin_of(scores[i]);
        if (bin < last) kept.push_back({scores[i], static_cast<int32_t>(i)});
        if (bin == last) edge.push_back({scores[i], static_cast<int32_t>(i)});
    }
    std::sort(edge.begin(), edge.end(), ranks_before);
    for (const Candidate& c : edge) {
        if (!kept.empty() && above / total >= top_p) break;
        kept.push_back(c);
        above += exp_float(c.score - top);
    }
}

// argmax of score + Gumbel noise over the whole row; the first of equals.
MACPO_CLONES int64_t race_all(const float* scores, int64_t v, const RowKey& row) {
    int64_t best_id = -1;
    float best = kMinusInf;
    for (int64_t start = 0; start < v; start += 4 * kLanes) {
        uint32_t blocks[kLanes], words[4][kLanes];
        for (int j = 0; j < kLanes; ++j) blocks[j] = static_cast<uint32_t>(start / 4) + static_cast<uint32_t>(j);
        philox_lanes(row, blocks, words);
        float noise[4 * kLanes];
        for (int w = 0; w < 4; ++w)
            for (int j = 0; j < kLanes; ++j) noise[w * kLanes + j] = gumbel(words[w][j]);
        const int64_t count = std::min<int64_t>(4 * kLanes, v - start);
        for (int64_t i = 0; i < count; ++i) {
            const float value = scores[start + i] + noise[(i & 3) * kLanes + (i >> 2)];
            if (value > best || best_id < 0) {
                best = value;
                best_id = start + i;
            }
        }
    }
    return best_id;
}

// As race_all over a list of tokens; the lowest id wins among equals.
MACPO_CLONES int64_t race_list(const Candidate* kept, int64_t count, const RowKey& row) {
    int64_t best_id = -1;
    float best = kMinusInf;
    for (int64_t start = 0; start < count; start += kLanes) {
        uint32_t blocks[kLanes] = {}, words[4][kLanes];
        const int64_t here = std::min<int64_t>(kLanes, count - start);
        for (int64_t j = 0; j < here; ++j) blocks[j] = static_cast<uint32_t>(kept[start + j].id) >> 2;
        philox_lanes(row, blocks, words);
        for (int64_t j = 0; j < here; ++j) {
            const Candidate& c = kept[start + j];
            const float value = c.score + gumbel(words[c.id & 3][j]);
            if (best_id < 0 || value > best || (value == best && c.id < best_id)) {
                best = value;
                best_id = c.id;
            }
        }
    }
    return best_id;
}

Draw sample_row(const float* logits, const bool* seen, int64_t v, const RowParams& params, const int64_t* request_key,
                int64_t position) {
    Scratch& memory = scratch();
    const bool greedy = params.temperature == 0.0f;
    const float* scores = logits;
    const float temperature = greedy ? 1.0f : params.temperature;
    if (temperature != 1.0f || (seen != nullptr && params.penalty != 1.0f)) {
        memory.scores.resize(v);
        score_row(logits, seen, v, params.penalty, temperature, memory.scores.data());
        scores = memory.scores.data();
    }
    const float raw_top = row_max(logits, v);
    const double raw_lse = raw_top + std::log(row_sum_exp(logits, v, raw_top));
    const auto draw = [&](int64_t id, double logp) {
        return Draw{id, static_cast<float>(logits[id] - raw_lse), static_cast<float>(logp)};
    };
    // NaN or infinity among the logits, or nothing but -inf: there is no distribution to order or draw from.
    if (!std::isfinite(raw_lse)) return draw(0, std::numeric_limits<double>::quiet_NaN());
    const float top = scores == logits ? raw_top : row_max(scores, v);
    if (greedy) return draw(std::find(scores, scores + v - 1, top) - scores, 0.0);

    const RowKey row(params.seed, request_key, position);
    const bool narrow = params.top_k > 0 && params.top_k < v;
    if (!narrow && params.top_p >= 1.0f && params.min_p <= 0.0f) {
        const int64_t id = race_all(scores, v, row);
        return draw(id, scores[id] - top - std::log(row_sum_exp(scores, v, top)));
    }
    std::vector<Candidate>& kept = memory.kept;
    kept.clear();
    if (narrow) {
        keep_top_k(scores, v, params.top_k, memory, kept);
        if (params.top_p < 1.0f) keep_top_p(kept, top, params.top_p);
    } else if (params.top_p < 1.0f) {
        keep_top_p_all(scores, v, top, row_sum_exp(scores, v, top), params.top_p, memory.mass, kept, memory.edge);
    } else {
        for (int64_t i = 0; i < v; ++i) kept.push_back({scores[i], static_cast<int32_t>(i)});
    }
    double total = 0.0;
    size_t size = 0;
    for (const Candidate& c : kept) {
        const float relative = exp_float(c.score - top);
        if (relative < params.min_p) continue;
        total += relative;
        kept[size++] = c;
    }
    kept.resize(size);
    const int64_t id = race_list(kept.data(), static_cast<int64_t>(size), row);
    return draw(id, scores[id] - top - std::log(total));
}

void token_words(int64_t seed, const int64_t* request_key, int64_t position, const int64_t* tokens, int64_t k,
                 int64_t* words) {
    const RowKey row(seed, request_key, position);
    for (int64_t start = 0; start < k; start += kLanes) {
        uint32_t blocks[kLanes] = {}, lanes[4][kLanes];
        const int64_t here = std::min<int64_t>(kLanes, k - start);
        for (int64_t j = 0; j < here; ++j) blocks[j] = static_cast<uint32_t>(tokens[start + j] >> 2);
        philox_lanes(row, blocks, lanes);
        for (int64_t j = 0; j < here; ++j) words[start + j] = lanes[tokens[start + j] & 3][j];
    }
}

}  // namespace macpo
