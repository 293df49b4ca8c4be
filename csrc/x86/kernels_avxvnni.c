/* SPDX-License-Identifier: MIT */
/* Kernels for AVX-VNNI (Alder Lake, Zen 5 and later, also where AVX-512 is switched off): tiles of quantised weights.
 * The rest is avx2's.
 *
 * vpdpbusd adds the products of four columns straight to an int32: one instruction where AVX2 has two, and none of its
 * int16 bounds. It does not saturate. */
#include "quantised.h"

INLINE void scaled_dot(const int type, const int M, __m256i sum[2][TOKENS], const int from, const int to,
                       const __m256i scale[2], const super_block *w, const uint8_t *bytes, int base, const int j,
                       const uint8_t *x, size_t x_stride) {
    UNROLL for (int t = 0; t < M; t++) sum[0][t] = sum[1][t] = _mm256_setzero_si256();
    UNROLL for (int g = from; g < to; g++) {
        __m256i v[2], magnitude[2];
        UNROLL for (int half = 0; half < 2; half++) {
            v[half] = weights(type, w, bytes, half, base, j, g);
            if (is_signed(type)) magnitude[half] = _mm256_abs_epi8(v[half]);
        }
        UNROLL for (int t = 0; t < M; t++) {
            __m256i a = broadcast32(token(x, x_stride, t)->q + 32 * (base + j) + 4 * g);
            UNROLL for (int half = 0; half < 2; half++) {
                if (is_signed(type))
                    sum[half][t] = _mm256_dpbusd_avx_epi32(sum[half][t], magnitude[half], _mm256_sign_epi8(a, v[half]));
                else
                    sum[half][t] = _mm256_dpbusd_avx_epi32(sum[half][t], v[half], a);
                KEEP(sum[half][t]);
            }
        }
    }
    if (has_blocks_of_32(type)) return; /* of scale 1 */
    UNROLL for (int half = 0; half < 2; half++) {
        __m256i scale32 = _mm256_srai_epi32(scale[half], 16);
        UNROLL for (int t = 0; t < M; t++) sum[half][t] = _mm256_mullo_epi32(sum[half][t], scale32);
    }
}

static int64_t peak(void) {
    enum { CHAINS = 12 }; /* enough to hide latencies: two vpdpbusd a cycle, five cycles each */
    __m256i sum[CHAINS], one = _mm256_set1_epi8(1), weights = one;
    UNROLL for (int i = 0; i < CHAINS; i++) sum[i] = _mm256_setzero_si256();
    for (int round = 0; round < PEAK_ROUNDS; round++) UNROLL for (int i = 0; i < CHAINS; i++) {
            KEEP(weights); /* so that no product is known from the one before */
            sum[i] = _mm256_dpbusd_avx_epi32(sum[i], weights, one);
            KEEP(sum[i]);
        }
    __m256i total = _mm256_setzero_si256();
    UNROLL for (int i = 0; i < CHAINS; i++) total = _mm256_add_epi32(total, sum[i]);
    int32_t lanes[8];
    _mm256_storeu_si256((__m256i *)lanes, total);
    int64_t n = 0;
    for (int i = 0; i < 8; i++) n += lanes[i];
    return n;
}

const phi3c_kernels phi3c_kernels_avxvnni = {
    .name = "avxvnni",
    .tile = {[PHI3C_Q4_0] = tile_q4_0,
             [PHI3C_Q4_1] = tile_q4_1,
             [PHI3C_Q5_0] = tile_q5_0,
             [PHI3C_Q5_1] = tile_q5_1,
             [PHI3C_Q8_0] = tile_q8_0,
             [PHI3C_Q2_K] = tile_q2_K,
             [PHI3C_Q3_K] = tile_q3_K,
             [PHI3C_Q4_K] = tile_q4_K,
             [PHI3C_Q5_K] = tile_q5_K,
             [PHI3C_Q6_K] = tile_q6_K,
             [PHI3C_IQ4_NL] = tile_iq4_nl,
             [PHI3C_IQ4_XS] = tile_iq4_xs},
    .peak = peak,
};
