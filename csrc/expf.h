/* SPDX-License-Identifier: MIT */
/* exp for float32, the same bits on every platform and in every SIMD lane. */
#ifndef PHI3C_EXPF_H
#define PHI3C_EXPF_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define PHI3C_ROUND 0x1.8p23f /* adding it leaves the nearest integer, ties to even, in the low bits */
#define PHI3C_LOG2E 0x1.715476p+0f
#define PHI3C_LN2_HI 0x1.62e43p-1f      /* ln2, upper 24 bits */
#define PHI3C_LN2_LO (-0x1.05c61p-29f)  /* ln2, what they lack */
#define PHI3C_EXP_MIN (-0x1.5d589ep+6f) /* -87.33654: below it the result would be subnormal and is 0 */
#define PHI3C_EXP_MAX 0x1.62e42ep+6f    /* 88.7228317: the last x whose exp is finite */

/* exp(r) = 1 + r (1 + r (E2 + r (E3 + ...))) on |r| <= ln2 / 2: minimax, relative error 3.6e-9 */
#define PHI3C_E2 0x1.fffffcp-2f
#define PHI3C_E3 0x1.555492p-3f
#define PHI3C_E4 0x1.5558f2p-5f
#define PHI3C_E5 0x1.123a2p-7f
#define PHI3C_E6 0x1.6a23dp-10f

/* exp(x) within 1 ulp: x = n ln2 + r, exp(x) = 2^n exp(r). Every step is one fmaf, subtraction, integer
 * shift, addition or select, in this order; a SIMD twin repeats them lane by lane. The result is a normal
 * number for every x between the bounds, so that one addition to the exponent is enough. */
static inline float phi3c_expf(float x) {
    float shifted = fmaf(x, PHI3C_LOG2E, PHI3C_ROUND);
    float n = shifted - PHI3C_ROUND;
    float r = fmaf(n, -PHI3C_LN2_HI, x);
    r = fmaf(n, -PHI3C_LN2_LO, r);

    float p = PHI3C_E6;
    p = fmaf(p, r, PHI3C_E5);
    p = fmaf(p, r, PHI3C_E4);
    p = fmaf(p, r, PHI3C_E3);
    p = fmaf(p, r, PHI3C_E2);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);

    uint32_t exponent, bits;
    memcpy(&exponent, &shifted, 4);
    memcpy(&bits, &p, 4);
    bits += exponent << 23;
    memcpy(&p, &bits, 4);

    p = x < PHI3C_EXP_MIN ? 0.0f : p;
    p = x > PHI3C_EXP_MAX ? INFINITY : p;
    return x != x ? x : p;
}

#endif
