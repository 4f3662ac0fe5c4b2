// Philox4x32-10 (Salmon et al., SC 2011). The counter's layout is described in sampling/philox.py, its oracle.
#pragma once

#include <cstdint>

#include "vecmath.hpp"

namespace macpo {

constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
constexpr int kRounds = 10;
constexpr int kPositionBits = 22, kBlockBits = 20;

// The key and counter words that all draws of one row share.
struct RowKey {
    uint32_t key0, key1, counter0, counter1, counter2, sample_bits;

    RowKey(int64_t seed, const int64_t* request_key, int64_t position)
        : key0(static_cast<uint32_t>(seed)),
          key1(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)),
          counter0(static_cast<uint32_t>(request_key[0])),
          counter1(static_cast<uint32_t>(static_cast<uint64_t>(request_key[0]) >> 32)),
          counter2(static_cast<uint32_t>(position) | static_cast<uint32_t>(request_key[2]) << kPositionBits),
          sample_bits(static_cast<uint32_t>(request_key[1]) << kBlockBits) {}
};

// kLanes independent blocks at once: counter word 3 of lane j is blocks[j]; words[w][j] is its word w.
MACPO_INLINE void philox_lanes(const RowKey& row, const uint32_t* blocks, uint32_t words[4][kLanes]) {
    uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
    for (int j = 0; j < kLanes; ++j) {
        c0[j] = row.counter0;
        c1[j] = row.counter1;
        c2[j] = row.counter2;
        c3[j] = blocks[j] | row.sample_bits;
    }
    uint32_t k0 = row.key0, k1 = row.key1;
    for (int round = 0; round < kRounds; ++round) {
        for (int j = 0; j < kLanes; ++j) {
            const uint64_t p0 = static_cast<uint64_t>(c0[j]) * kMultiplier0;
            const uint64_t p1 = static_cast<uint64_t>(c2[j]) * kMultiplier1;
            c0[j] = static_cast<uint32_t>(p1 >> 32) ^ c1[j] ^ k0;
            c1[j] = static_cast<uint32_t>(p1);
            c2[j] = static_cast<uint32_t>(p0 >> 32) ^ c3[j] ^ k1;
            c3[j] = static_cast<uint32_t>(p0);
        }
        k0 += kWeyl0;
        k1 += kWeyl1;
    }
    for (int j = 0; j < kLanes; ++j) {
        words[0][j] = c0[j];
        words[1][j] = c1[j];
        words[2][j] = c2[j];
        words[3][j] = c3[j];
    }
}

// Standard Gumbel noise from 32 random bits; the uniform takes the top 23.
MACPO_INLINE float gumbel(uint32_t word) {
    const float u = (static_cast<float>(static_cast<int32_t>(word >> 9)) + 0.5f) * 0x1p-23f;
    return -log_float(-log_float(u));
}

}  // namespace macpo
