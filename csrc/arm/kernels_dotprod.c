/* SPDX-License-Identifier: MIT */
/* Kernels for ARMv8.2 with dot products (Apple M1, Raspberry Pi 5, Graviton 2 and later): tiles of quantised weights.
 * The rest is neon's. Arithmetic in half precision, which these processors have too, rounds where floats do not, so no
 * kernel may use it.
 *
 * sdot multiplies four columns of a quad with four of the 16 activations in a register, which it takes by index: no
 * broadcasts. smmla (i8mm) is left out: docs/performance.md. */
#include "quantised.h"

/* sdot with four of 16 activations. */
INLINE int32x4_t dot4(int32x4_t sum, int8x16_t weights, int8x16_t activations, const int four) {
    switch (four) {
    case 0: return vdotq_laneq_s32(sum, weights, activations, 0);
    case 1: return vdotq_laneq_s32(sum, weights, activations, 1);
    case 2: return vdotq_laneq_s32(sum, weights, activations, 2);
    default: return vdotq_laneq_s32(sum, weights, activations, 3);
    }
}

INLINE void dot(const int type, const int M, int32x4_t sum[QUADS][TOKENS], const int from, const int to,
                const super_block *w, const uint8_t *bytes, int base, const int j, const uint8_t *x, size_t x_stride) {
    int8x16_t a[TOKENS]; /* 16 columns */
    UNROLL for (int g = from; g < to; g++) {
        if (g % 4 == 0)
            UNROLL for (int t = 0; t < M; t++) a[t] = vld1q_s8(token(x, x_stride, t)->q + 32 * (base + j) + 4 * g);
        UNROLL for (int quad = 0; quad < QUADS; quad++) {
            int8x16_t v = weights(type, w, bytes, quad, base, j, g);
            UNROLL for (int t = 0; t < M; t++) sum[quad][t] = dot4(sum[quad][t], v, a[t], g % 4);
        }
    }
}

static int64_t peak(void) {
    enum { CHAINS = 16 };       /* enough to hide latencies: up to four sdot a cycle, three cycles each */
    volatile int8_t factor = 1; /* known to nobody at compile time */
    int8x16_t one = vdupq_n_s8(factor), weights = vdupq_n_s8(factor);
    int32x4_t sum[CHAINS];
    /* chains that begin alike would be computed once */
    _Pragma("GCC unroll 16") for (int i = 0; i < CHAINS; i++) sum[i] = vdupq_n_s32(i);
    for (int round = 0; round < PEAK_ROUNDS; round++)
        _Pragma("GCC unroll 16") for (int i = 0; i < CHAINS; i++) sum[i] = vdotq_s32(sum[i], weights, one);
    int64_t n = 0;
    for (int i = 0; i < CHAINS; i++) n += vaddvq_s32(sum[i]) - 4 * i;
    return n;
}

const phi3c_kernels phi3c_kernels_dotprod = {
    .name = "dotprod",
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
