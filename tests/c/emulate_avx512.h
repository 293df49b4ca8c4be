/* SPDX-License-Identifier: MIT */
/* The AVX-512 that csrc/x86/kernels_avx512.c uses, in C, lane by lane as the vendor's manual defines each intrinsic;
 * conversions to and from halves are those of F16C. Compile that file with `-include` of this one, AVX2's flags and no
 * AVX-512: check.py --emulate does, and the checker then runs on any processor with AVX2.
 *
 * It proves the file's logic: which bits go where, what is added to what in which order and with which roundings. It
 * proves nothing about the code that a compiler makes of the real intrinsics, about speed, or about a reading of the
 * manual that is wrong both here and there. An intrinsic that is missing below does not compile. */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    float f32[16];
} emulated_m512;

typedef union {
    int8_t i8[64];
    uint8_t u8[64];
    int16_t i16[32];
    uint16_t u16[32];
    int32_t i32[16];
    uint32_t u32[16];
} emulated_m512i;

/* immintrin.h declares these names for every processor, so each gets another one. Some compilers have macros for those
 * that take an immediate or a number for each lane. */
#undef _mm512_cmp_ps_mask
#undef _mm512_cvtps_ph
#undef _mm512_extractf32x8_ps
#undef _mm512_mask_cmp_ps_mask
#undef _mm512_setr_epi32
#undef _mm512_shuffle_epi32
#undef _mm512_shuffle_i32x4
#define __m512 emulated_m512
#define __m512i emulated_m512i
#define _mm512_loadu_ps emulated_loadu_ps
#define _mm512_loadu_si512 emulated_loadu_si512
#define _mm512_storeu_ps emulated_storeu_ps
#define _mm512_storeu_si512 emulated_storeu_si512
#define _mm512_set1_ps emulated_set1_ps
#define _mm512_set1_epi32 emulated_set1_epi32
#define _mm512_set1_epi8 emulated_set1_epi8
#define _mm512_setr_epi32 emulated_setr_epi32
#define _mm512_setzero_ps emulated_setzero_ps
#define _mm512_setzero_si512 emulated_setzero_si512
#define _mm512_add_ps emulated_add_ps
#define _mm512_sub_ps emulated_sub_ps
#define _mm512_mul_ps emulated_mul_ps
#define _mm512_div_ps emulated_div_ps
#define _mm512_fmadd_ps emulated_fmadd_ps
#define _mm512_fnmadd_ps emulated_fnmadd_ps
#define _mm512_max_ps emulated_max_ps
#define _mm512_abs_ps emulated_abs_ps
#define _mm512_broadcast_i32x4 emulated_broadcast_i32x4
#define _mm512_shuffle_epi8 emulated_shuffle_epi8
#define _mm512_shuffle_epi32 emulated_shuffle_epi32
#define _mm512_shuffle_i32x4 emulated_shuffle_i32x4
#define _mm512_permutexvar_epi32 emulated_permutexvar_epi32
#define _mm512_unpacklo_epi32 emulated_unpacklo_epi32
#define _mm512_unpackhi_epi32 emulated_unpackhi_epi32
#define _mm512_unpacklo_epi64 emulated_unpacklo_epi64
#define _mm512_unpackhi_epi64 emulated_unpackhi_epi64
#define _mm512_packs_epi16 emulated_packs_epi16
#define _mm512_packs_epi32 emulated_packs_epi32
#define _mm512_and_si512 emulated_and_si512
#define _mm512_or_si512 emulated_or_si512
#define _mm512_xor_si512 emulated_xor_si512
#define _mm512_add_epi32 emulated_add_epi32
#define _mm512_sub_epi32 emulated_sub_epi32
#define _mm512_add_epi16 emulated_add_epi16
#define _mm512_mullo_epi16 emulated_mullo_epi16
#define _mm512_mullo_epi32 emulated_mullo_epi32
#define _mm512_abs_epi8 emulated_abs_epi8
#define _mm512_abs_epi32 emulated_abs_epi32
#define _mm512_max_epi32 emulated_max_epi32
#define _mm512_madd_epi16 emulated_madd_epi16
#define _mm512_max_epu32 emulated_max_epu32
#define _mm512_sllv_epi32 emulated_sllv_epi32
#define _mm512_srlv_epi32 emulated_srlv_epi32
#define _mm512_slli_epi32 emulated_slli_epi32
#define _mm512_srli_epi32 emulated_srli_epi32
#define _mm512_srai_epi32 emulated_srai_epi32
#define _mm512_slli_epi16 emulated_slli_epi16
#define _mm512_srli_epi16 emulated_srli_epi16
#define _mm512_castps_si512 emulated_castps_si512
#define _mm512_castsi512_ps emulated_castsi512_ps
#define _mm512_extractf32x8_ps emulated_extractf32x8_ps
#define _mm512_castps512_ps256 emulated_castps512_ps256
#define _mm512_castsi256_si512 emulated_castsi256_si512
#define _mm512_castsi512_si256 emulated_castsi512_si256
#define _mm512_zextsi256_si512 emulated_zextsi256_si512
#define _mm512_xor_ps emulated_xor_ps
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_cvtps_epi32 emulated_cvtps_epi32
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_cvtps_ph emulated_cvtps_ph
#define _mm512_cvtepi8_epi32 emulated_cvtepi8_epi32
#define _mm512_cvtepu8_epi32 emulated_cvtepu8_epi32
#define _mm512_cvtepu8_epi16 emulated_cvtepu8_epi16
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32
#define _mm512_cvtepi16_epi32 emulated_cvtepi16_epi32
#define _mm512_cvtepi32_epi16 emulated_cvtepi32_epi16
#define _mm512_cvtepi64_epi32 emulated_cvtepi64_epi32
#define _mm512_dpbusd_epi32 emulated_dpbusd_epi32
#define _mm512_dpwssd_epi32 emulated_dpwssd_epi32
#define _mm512_cmp_ps_mask emulated_cmp_ps_mask
#define _mm512_mask_cmp_ps_mask emulated_mask_cmp_ps_mask
#define _mm512_mask_mov_ps emulated_mask_mov_ps
#define _mm512_mask_max_ps emulated_mask_max_ps
#define _mm512_maskz_add_epi32 emulated_maskz_add_epi32
#define _mm512_mask_blend_epi16 emulated_mask_blend_epi16
#define _mm512_reduce_max_ps emulated_reduce_max_ps
#define _mm512_reduce_max_epu32 emulated_reduce_max_epu32

#define LANES for (int l = 0; l < 16; l++)
#define LANES16 for (int l = 0; l < 32; l++)

/* -- loads, stores, broadcasts ---------------------------------------------------------------------------- */

static inline __m512 _mm512_loadu_ps(const void *p) {
    __m512 r;
    memcpy(&r, p, sizeof r);
    return r;
}

static inline __m512i _mm512_loadu_si512(const void *p) {
    __m512i r;
    memcpy(&r, p, sizeof r);
    return r;
}

static inline void _mm512_storeu_ps(void *p, __m512 a) { memcpy(p, &a, sizeof a); }
static inline void _mm512_storeu_si512(void *p, __m512i a) { memcpy(p, &a, sizeof a); }

static inline __m512 _mm512_set1_ps(float x) {
    __m512 r;
    LANES r.f32[l] = x;
    return r;
}

static inline __m512i _mm512_set1_epi32(int x) {
    __m512i r;
    LANES r.i32[l] = x;
    return r;
}

static inline __m512i _mm512_set1_epi8(char x) {
    __m512i r;
    memset(&r, x, sizeof r);
    return r;
}

static inline __m512i _mm512_setr_epi32(int l0, int l1, int l2, int l3, int l4, int l5, int l6, int l7, int l8, int l9,
                                        int l10, int l11, int l12, int l13, int l14, int l15) {
    return (__m512i){.i32 = {l0, l1, l2, l3, l4, l5, l6, l7, l8, l9, l10, l11, l12, l13, l14, l15}};
}

static inline __m512i _mm512_broadcast_i32x4(__m128i a) {
    __m512i r;
    for (int i = 0; i < 64; i += 16) memcpy(r.u8 + i, &a, 16);
    return r;
}

static inline __m512 _mm512_setzero_ps(void) { return _mm512_set1_ps(0.0f); }
static inline __m512i _mm512_setzero_si512(void) { return _mm512_set1_epi32(0); }

/* -- float lanes ------------------------------------------------------------------------------------------ */

static inline __m512 _mm512_add_ps(__m512 a, __m512 b) {
    LANES a.f32[l] += b.f32[l];
    return a;
}

static inline __m512 _mm512_sub_ps(__m512 a, __m512 b) {
    LANES a.f32[l] -= b.f32[l];
    return a;
}

static inline __m512 _mm512_mul_ps(__m512 a, __m512 b) {
    LANES a.f32[l] *= b.f32[l];
    return a;
}

static inline __m512 _mm512_div_ps(__m512 a, __m512 b) {
    LANES a.f32[l] /= b.f32[l];
    return a;
}

static inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    LANES c.f32[l] = fmaf(a.f32[l], b.f32[l], c.f32[l]);
    return c;
}

static inline __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) {
    LANES c.f32[l] = fmaf(-a.f32[l], b.f32[l], c.f32[l]);
    return c;
}

/* b where either is NaN, and of two zeros. */
static inline __m512 _mm512_max_ps(__m512 a, __m512 b) {
    LANES if (a.f32[l] > b.f32[l]) b.f32[l] = a.f32[l];
    return b;
}

static inline __m512 _mm512_abs_ps(__m512 a) {
    LANES a.f32[l] = fabsf(a.f32[l]);
    return a;
}

/* -- integer lanes ---------------------------------------------------------------------------------------- */

static inline __m512i _mm512_and_si512(__m512i a, __m512i b) {
    LANES a.u32[l] &= b.u32[l];
    return a;
}

static inline __m512i _mm512_or_si512(__m512i a, __m512i b) {
    LANES a.u32[l] |= b.u32[l];
    return a;
}

static inline __m512i _mm512_xor_si512(__m512i a, __m512i b) {
    LANES a.u32[l] ^= b.u32[l];
    return a;
}

/* Bytes of a by the low 4 bits of b, from the same 16 bytes; 0 where b's sign bit is set. */
static inline __m512i _mm512_shuffle_epi8(__m512i a, __m512i b) {
    for (int i = 0; i < 64; i++) b.u8[i] = b.i8[i] < 0 ? 0 : a.u8[i / 16 * 16 + b.u8[i] % 16];
    return b;
}

/* Lane l from lane (order >> 2 (l % 4)) % 4 of the same four. */
static inline __m512i _mm512_shuffle_epi32(__m512i a, int order) {
    __m512i r;
    LANES r.i32[l] = a.i32[l / 4 * 4 + (order >> 2 * (l % 4) & 3)];
    return r;
}

/* Sixteen bytes at a time: two of a, then two of b, by two bits of `order` each. */
static inline __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int order) {
    __m512i r;
    LANES r.i32[l] = (l < 8 ? a : b).i32[(order >> 2 * (l / 4) & 3) * 4 + l % 4];
    return r;
}

static inline __m512i _mm512_permutexvar_epi32(__m512i index, __m512i a) {
    __m512i r;
    LANES r.i32[l] = a.i32[index.u32[l] % 16];
    return r;
}

/* Of each four lanes: the first two, or the last two, of a and b by turns, `width` lanes a turn. */
static inline __m512i emulated_unpack(__m512i a, __m512i b, int from, int width) {
    __m512i r;
    LANES r.i32[l] = (l / width % 2 ? b : a).i32[l / 4 * 4 + from + (width == 1 ? l % 4 / 2 : l % 2)];
    return r;
}

static inline __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) { return emulated_unpack(a, b, 0, 1); }
static inline __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) { return emulated_unpack(a, b, 2, 1); }
static inline __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) { return emulated_unpack(a, b, 0, 2); }
static inline __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) { return emulated_unpack(a, b, 2, 2); }

static inline int emulated_saturate(int x, int most) { return x > most ? most : x < -most - 1 ? -most - 1 : x; }

/* Of each sixteen bytes: those of a, then those of b, at half their width. */
static inline __m512i _mm512_packs_epi32(__m512i a, __m512i b) {
    __m512i r;
    LANES16 r.i16[l] = (int16_t)emulated_saturate((l % 8 < 4 ? a : b).i32[l / 8 * 4 + l % 4], INT16_MAX);
    return r;
}

static inline __m512i _mm512_packs_epi16(__m512i a, __m512i b) {
    __m512i r;
    for (int l = 0; l < 64; l++) r.i8[l] = (int8_t)emulated_saturate((l % 16 < 8 ? a : b).i16[l / 16 * 8 + l % 8], 127);
    return r;
}

static inline __m512i _mm512_add_epi32(__m512i a, __m512i b) {
    LANES a.u32[l] += b.u32[l];
    return a;
}

static inline __m512i _mm512_sub_epi32(__m512i a, __m512i b) {
    LANES a.u32[l] -= b.u32[l];
    return a;
}

static inline __m512i _mm512_mullo_epi32(__m512i a, __m512i b) {
    LANES a.u32[l] *= b.u32[l];
    return a;
}

static inline __m512i _mm512_add_epi16(__m512i a, __m512i b) {
    LANES16 a.u16[l] = (uint16_t)(a.u16[l] + b.u16[l]);
    return a;
}

static inline __m512i _mm512_mullo_epi16(__m512i a, __m512i b) {
    LANES16 a.i16[l] = (int16_t)(a.i16[l] * b.i16[l]);
    return a;
}

static inline __m512i _mm512_abs_epi8(__m512i a) {
    for (int l = 0; l < 64; l++)
        if (a.i8[l] < 0) a.u8[l] = (uint8_t)-a.i8[l];
    return a;
}

static inline __m512i _mm512_abs_epi32(__m512i a) {
    LANES if (a.i32[l] < 0) a.u32[l] = 0u - a.u32[l];
    return a;
}

static inline __m512i _mm512_max_epi32(__m512i a, __m512i b) {
    LANES if (a.i32[l] > b.i32[l]) b.i32[l] = a.i32[l];
    return b;
}

static inline __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
    __m512i sum;
    LANES sum.u32[l] = (uint32_t)(a.i16[2 * l] * b.i16[2 * l]) + (uint32_t)(a.i16[2 * l + 1] * b.i16[2 * l + 1]);
    return sum;
}

static inline __m512i _mm512_max_epu32(__m512i a, __m512i b) {
    LANES if (a.u32[l] > b.u32[l]) b.u32[l] = a.u32[l];
    return b;
}

/* Shifts by a lane's width or more give 0, where C leaves them undefined. */
static inline __m512i _mm512_sllv_epi32(__m512i a, __m512i count) {
    LANES a.u32[l] = count.u32[l] < 32 ? a.u32[l] << count.u32[l] : 0;
    return a;
}

static inline __m512i _mm512_srlv_epi32(__m512i a, __m512i count) {
    LANES a.u32[l] = count.u32[l] < 32 ? a.u32[l] >> count.u32[l] : 0;
    return a;
}

static inline __m512i _mm512_slli_epi32(__m512i a, unsigned count) {
    LANES a.u32[l] = count < 32 ? a.u32[l] << count : 0;
    return a;
}

static inline __m512i _mm512_srli_epi32(__m512i a, unsigned count) {
    LANES a.u32[l] = count < 32 ? a.u32[l] >> count : 0;
    return a;
}

static inline __m512i _mm512_srai_epi32(__m512i a, unsigned count) {
    LANES a.i32[l] >>= count;
    return a;
}

static inline __m512i _mm512_slli_epi16(__m512i a, unsigned count) {
    LANES16 a.u16[l] = count < 16 ? (uint16_t)(a.u16[l] << count) : 0;
    return a;
}

static inline __m512i _mm512_srli_epi16(__m512i a, unsigned count) {
    LANES16 a.u16[l] = count < 16 ? (uint16_t)(a.u16[l] >> count) : 0;
    return a;
}

/* -- conversions ------------------------------------------------------------------------------------------ */

static inline __m512i _mm512_castps_si512(__m512 a) { return _mm512_loadu_si512(&a); }
static inline __m512 _mm512_castsi512_ps(__m512i a) { return _mm512_loadu_ps(&a); }
static inline __m256 _mm512_extractf32x8_ps(__m512 a, int half) { return _mm256_loadu_ps(a.f32 + 8 * half); }
static inline __m256i _mm512_castsi512_si256(__m512i a) { return _mm256_loadu_si256((const __m256i *)a.u8); }

/* The upper half is zero, or anything: here what is likely to be noticed. */
static inline __m512i emulated_widen(__m256i a, int upper) {
    __m512i r = _mm512_set1_epi32(upper);
    memcpy(&r, &a, sizeof a);
    return r;
}

static inline __m512i _mm512_zextsi256_si512(__m256i a) { return emulated_widen(a, 0); }
static inline __m512i _mm512_castsi256_si512(__m256i a) { return emulated_widen(a, 0x5a5a5a5a); }

static inline __m256 _mm512_castps512_ps256(__m512 a) { return _mm512_extractf32x8_ps(a, 0); }

/* Bitwise, hence after the casts. */
static inline __m512 _mm512_xor_ps(__m512 a, __m512 b) {
    __m512i r = _mm512_castps_si512(a), bits = _mm512_castps_si512(b);
    LANES r.u32[l] ^= bits.u32[l];
    return _mm512_castsi512_ps(r);
}

static inline __m512 _mm512_cvtepi32_ps(__m512i a) {
    __m512 r;
    LANES r.f32[l] = (float)a.i32[l];
    return r;
}

/* To nearest even; what int32 cannot hold, NaN included, becomes its least value. */
static inline __m512i _mm512_cvtps_epi32(__m512 a) {
    __m512i r;
    LANES r.i32[l] = fabsf(a.f32[l]) < 0x1p31f ? (int32_t)nearbyintf(a.f32[l]) : INT32_MIN;
    return r;
}

static inline __m512 _mm512_cvtph_ps(__m256i a) {
    uint16_t halves[16];
    __m512 r;
    memcpy(halves, &a, sizeof halves);
    LANES r.f32[l] = _cvtsh_ss(halves[l]);
    return r;
}

/* To nearest even; another rounding traps. */
static inline __m256i _mm512_cvtps_ph(__m512 a, int rounding) {
    uint16_t halves[16];
    if (rounding != _MM_FROUND_TO_NEAREST_INT) __builtin_trap();
    LANES halves[l] = _cvtss_sh(a.f32[l], _MM_FROUND_TO_NEAREST_INT);
    return _mm256_loadu_si256((const __m256i *)halves);
}

static inline __m512i _mm512_cvtepi8_epi32(__m128i a) {
    int8_t from[16];
    __m512i r;
    memcpy(from, &a, sizeof from);
    LANES r.i32[l] = from[l];
    return r;
}

static inline __m512i _mm512_cvtepu8_epi32(__m128i a) {
    uint8_t from[16];
    __m512i r;
    memcpy(from, &a, sizeof from);
    LANES r.i32[l] = from[l];
    return r;
}

static inline __m512i _mm512_cvtepu8_epi16(__m256i a) {
    uint8_t from[32];
    __m512i r;
    memcpy(from, &a, sizeof from);
    LANES16 r.i16[l] = from[l];
    return r;
}

static inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
    uint16_t from[16];
    __m512i r;
    memcpy(from, &a, sizeof from);
    LANES r.i32[l] = from[l];
    return r;
}

static inline __m512i _mm512_cvtepi16_epi32(__m256i a) {
    int16_t from[16];
    __m512i r;
    memcpy(from, &a, sizeof from);
    LANES r.i32[l] = from[l];
    return r;
}

static inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
    uint16_t low[16];
    LANES low[l] = (uint16_t)a.u32[l];
    return _mm256_loadu_si256((const __m256i *)low);
}

static inline __m256i _mm512_cvtepi64_epi32(__m512i a) {
    uint32_t low[8];
    for (int l = 0; l < 8; l++) low[l] = a.u32[2 * l];
    return _mm256_loadu_si256((const __m256i *)low);
}

/* -- dot products ----------------------------------------------------------------------------------------- */

/* Four products of unsigned with signed bytes onto each int32, without saturation. */
static inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
    LANES for (int i = 4 * l; i < 4 * l + 4; i++) sum.u32[l] += (uint32_t)(a.u8[i] * b.i8[i]);
    return sum;
}

/* Two products of signed 16-bit numbers onto each int32, without saturation. */
static inline __m512i _mm512_dpwssd_epi32(__m512i sum, __m512i a, __m512i b) {
    LANES for (int i = 2 * l; i < 2 * l + 2; i++) sum.u32[l] += (uint32_t)(a.i16[i] * b.i16[i]);
    return sum;
}

/* -- masks ------------------------------------------------------------------------------------------------ */

/* The predicates in use; another traps. */
static inline int emulated_compare(float a, float b, int predicate) {
    switch (predicate) {
    case _CMP_LT_OQ: return a < b;
    case _CMP_GT_OQ: return a > b;
    case _CMP_NLT_UQ: return !(a < b);
    case _CMP_UNORD_Q: return isnan(a) || isnan(b);
    }
    __builtin_trap();
}

static inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
    unsigned mask = 0;
    LANES mask |= (unsigned)emulated_compare(a.f32[l], b.f32[l], predicate) << l;
    return (__mmask16)mask;
}

static inline __mmask16 _mm512_mask_cmp_ps_mask(__mmask16 mask, __m512 a, __m512 b, int predicate) {
    return mask & _mm512_cmp_ps_mask(a, b, predicate);
}

static inline __m512 _mm512_mask_mov_ps(__m512 a, __mmask16 mask, __m512 b) {
    LANES if (mask >> l & 1) a.f32[l] = b.f32[l];
    return a;
}

static inline __m512 _mm512_mask_max_ps(__m512 rest, __mmask16 mask, __m512 a, __m512 b) {
    return _mm512_mask_mov_ps(rest, mask, _mm512_max_ps(a, b));
}

static inline __m512i _mm512_maskz_add_epi32(__mmask16 mask, __m512i a, __m512i b) {
    LANES a.u32[l] = mask >> l & 1 ? a.u32[l] + b.u32[l] : 0;
    return a;
}

static inline __m512i _mm512_mask_blend_epi16(__mmask32 mask, __m512i a, __m512i b) {
    LANES16 if (mask >> l & 1) a.i16[l] = b.i16[l];
    return a;
}

/* -- reductions ------------------------------------------------------------------------------------------- */

static inline float _mm512_reduce_max_ps(__m512 a) {
    for (int half = 8; half > 0; half /= 2)
        for (int l = 0; l < half; l++)
            if (!(a.f32[l] > a.f32[l + half])) a.f32[l] = a.f32[l + half];
    return a.f32[0];
}

static inline unsigned _mm512_reduce_max_epu32(__m512i a) {
    uint32_t largest = 0;
    LANES if (a.u32[l] > largest) largest = a.u32[l];
    return largest;
}
