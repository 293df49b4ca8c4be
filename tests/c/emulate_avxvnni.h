/* SPDX-License-Identifier: MIT */
/* The one instruction of AVX-VNNI that csrc/x86/kernels_avxvnni.c uses, in C. Compile that file with `-include` of this
 * one and AVX2's flags: check.py --emulate does. What it proves is said in emulate_avx512.h. */
#include <immintrin.h>
#include <stdint.h>

#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32 emulated_dpbusd_avx_epi32

/* Four products of unsigned with signed bytes onto each int32, without saturation. */
static inline __m256i _mm256_dpbusd_avx_epi32(__m256i sum, __m256i a, __m256i b) {
    uint32_t sums[8];
    uint8_t unsigned_bytes[32];
    int8_t signed_bytes[32];
    _mm256_storeu_si256((__m256i *)sums, sum);
    _mm256_storeu_si256((__m256i *)unsigned_bytes, a);
    _mm256_storeu_si256((__m256i *)signed_bytes, b);
    for (int i = 0; i < 32; i++) sums[i / 4] += (uint32_t)(unsigned_bytes[i] * signed_bytes[i]);
    return _mm256_loadu_si256((const __m256i *)sums);
}
