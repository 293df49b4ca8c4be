/* SPDX-License-Identifier: MIT */
/* What this processor, and the operating system on it, lets us run. Only kernels.c asks. */
#ifndef PHI3C_CPU_H
#define PHI3C_CPU_H

enum {
    CPU_AVX2 = 1 << 0,    /* AVX2, FMA, F16C, BMI2, and ymm state saved by the system */
    CPU_AVXVNNI = 1 << 1, /* AVX-VNNI besides */
    CPU_AVX512 = 1 << 2,  /* CPU_AVX2, and AVX-512 F, BW, DQ, VL and VNNI, and zmm state saved */
    CPU_DOTPROD = 1 << 3, /* ARM: sdot */
    CPU_ZEN4 = 1 << 4,    /* AMD's family 19h: Zen 3 and 4 */
};

unsigned phi3c_cpu_flags(void);
/* Names of single features found, space-separated; for people. */
const char *phi3c_cpu_features(void);

#endif
