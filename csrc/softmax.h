/* SPDX-License-Identifier: MIT */
/* Softmax of a row of logits in double: the largest logit, probabilities relative to it, their sum, its logarithm.
 *
 * Made of additions, multiplications and divisions alone, which every platform rounds alike and which vectorise at
 * baseline SSE2. phi3c_expf would not do here: its fmaf is a function call on baseline x86-64. */
#ifndef PHI3C_SOFTMAX_H
#define PHI3C_SOFTMAX_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum {
    PHI3C_LOGITS_BLOCK = 64, /* logits that a loop without branches goes over at once */
    PHI3C_LANES = 16,        /* strided partial results of a reduction */
};

/* exp(x) for -707 <= x <= 0, relative error below 1e-12. x = n ln2 + r, Taylor series of exp(r) to r^10. */
static inline double phi3c_exp_negative(double x) {
    const double magic = 0x1.8p52; /* adding it rounds to an integer and leaves that in the low bits */
    const double shifted = x * 0x1.71547652b82fep+0 + magic;
    const double n = shifted - magic;
    const double r =
        x - n * 0x1.62e42fefa3800p-1 - n * 0x1.ef35793c76730p-45; /* ln2 in two parts; n * upper is exact */

    double p = 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 1.0 / 2;
    p = p * r + 1.0;
    p = p * r + 1.0;

    uint64_t exponent, bits;
    memcpy(&exponent, &shifted, sizeof exponent);
    memcpy(&bits, &p, sizeof bits);
    bits += exponent << 52;
    memcpy(&p, &bits, sizeof p);
    return p;
}

/* log(x) for finite x >= 1: x = 2^e m with m in [0.707, 1.414], log(m) = 2 artanh((m - 1) / (m + 1)). */
static inline double phi3c_log_from_1(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint64_t e = (bits - 0x3fe6a09e667f3bcd) >> 52; /* bits of sqrt(1/2) */
    bits -= e << 52;
    double m;
    memcpy(&m, &bits, sizeof m);

    const double s = (m - 1.0) / (m + 1.0);
    double series = 0.0;
    for (int k = 19; k > 0; k -= 2) series = series * (s * s) + 1.0 / k;
    return (double)e * 0x1.62e42fefa39efp-1 + 2.0 * s * series;
}

/* Largest of n logits; clears *finite if one is NaN or infinite. Integers that sort as the floats do: compilers
 * vectorise their maximum, but not that of floats, which has to care about NaN. */
static inline float phi3c_largest(const float *logits, int32_t n, bool *finite) {
    int32_t max = INT32_MIN, overflow = 0;
    for (int32_t i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, logits + i, sizeof bits);
        overflow |= (bits & 0x7f800000) == 0x7f800000;
        bits ^= bits < 0 ? 0x7fffffff : 0;
        max = bits > max ? bits : max;
    }
    *finite = *finite && !overflow;
    max ^= max < 0 ? 0x7fffffff : 0;
    float largest;
    memcpy(&largest, &max, sizeof largest);
    return largest;
}

/* Probabilities relative to the most likely token of n <= PHI3C_LOGITS_BLOCK logits, at least 9e-308. Loops without
 * branches, which compilers vectorise. */
static inline void phi3c_relative(double *out, const float *logits, int32_t n, float max, double temperature) {
    for (int32_t i = 0; i < n; i++) {
        const double x = ((double)logits[i] - max) / temperature;
        out[i] = x > -707.0 ? x : -707.0;
    }
    for (int32_t i = 0; i < n; i++) out[i] = phi3c_exp_negative(out[i]);
}

/* The lanes of a reduction joined as a tree; they are used up. */
static inline double phi3c_join(double *lane) {
    for (int width = PHI3C_LANES / 2; width > 0; width /= 2)
        for (int j = 0; j < width; j++) lane[j] += lane[j + width];
    return lane[0];
}

/* Sum of all relative probabilities: lane j adds the logits j, j + 16, ... */
static inline double phi3c_total(const float *logits, int32_t n_vocab, float max) {
    double lane[PHI3C_LANES] = {0}, p[PHI3C_LOGITS_BLOCK];
    for (int32_t begin = 0; begin < n_vocab; begin += PHI3C_LOGITS_BLOCK) {
        const int32_t left = n_vocab - begin, n = left < PHI3C_LOGITS_BLOCK ? left : PHI3C_LOGITS_BLOCK;
        phi3c_relative(p, logits + begin, n, max, 1.0);
        for (int32_t i = 0; i < n; i++) lane[i % PHI3C_LANES] += p[i];
    }
    return phi3c_join(lane);
}

#endif
