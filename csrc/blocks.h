/* SPDX-License-Identifier: MIT */
/* The blocks of a GGUF file, byte for byte (little-endian), and phi3c's own block of activations.
 * docs/formats.md draws them; `q` is the stored integer, `w` the weight it stands for. */
#ifndef PHI3C_BLOCKS_H
#define PHI3C_BLOCKS_H

#include <assert.h>
#include <stdint.h>

typedef uint16_t f16; /* IEEE half, as bits */

// clang-format off
/* 32 weights; byte j of qs holds element j in its low and j + 16 in its high nibble; bit j of qh is worth 16 */
typedef struct { f16 d; uint8_t qs[16]; } block_q4_0;                       /* w = d (q - 8) */
typedef struct { f16 d, m; uint8_t qs[16]; } block_q4_1;                    /* w = d q + m */
typedef struct { f16 d; uint8_t qh[4]; uint8_t qs[16]; } block_q5_0;        /* w = d (q - 16) */
typedef struct { f16 d, m; uint8_t qh[4]; uint8_t qs[16]; } block_q5_1;     /* w = d q + m */
typedef struct { f16 d; int8_t qs[32]; } block_q8_0;                        /* w = d q */
typedef struct { f16 d; uint8_t qs[16]; } block_iq4_nl;                     /* w = d iq4_values[q] */

/* 256 weights in groups of 16 or 32, each group with an integer scale (and min) */
typedef struct { uint8_t scales[16]; uint8_t qs[64]; f16 d, dmin; } block_q2_K;                /* w = d sc q - dmin m */
typedef struct { uint8_t hmask[32]; uint8_t qs[64]; uint8_t scales[12]; f16 d; } block_q3_K;   /* w = d (sc - 32) (q - 4) */
typedef struct { f16 d, dmin; uint8_t scales[12]; uint8_t qs[128]; } block_q4_K;               /* w = d sc q - dmin m */
typedef struct { f16 d, dmin; uint8_t scales[12]; uint8_t qh[32]; uint8_t qs[128]; } block_q5_K; /* as q4_K, bit s of qh[l] worth 16 */
typedef struct { uint8_t ql[128]; uint8_t qh[64]; int8_t scales[16]; f16 d; } block_q6_K;      /* w = d sc (q - 32) */
/* qs as those of eight iq4_nl blocks; sc[s] has its low 4 bits in nibble s of scales_l, two more in bit pair s of scales_h */
typedef struct { f16 d; uint16_t scales_h; uint8_t scales_l[4]; uint8_t qs[128]; } block_iq4_xs; /* w = d (sc - 32) iq4_values[q] */
// clang-format on

/* What the codes of iq4_nl and iq4_xs stand for: closer to one another where more weights lie. */
static const int8_t iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

static_assert(sizeof(block_q4_0) == 18, "q4_0");
static_assert(sizeof(block_q4_1) == 20, "q4_1");
static_assert(sizeof(block_q5_0) == 22, "q5_0");
static_assert(sizeof(block_q5_1) == 24, "q5_1");
static_assert(sizeof(block_q8_0) == 34, "q8_0");
static_assert(sizeof(block_q2_K) == 84, "q2_K");
static_assert(sizeof(block_q3_K) == 110, "q3_K");
static_assert(sizeof(block_q4_K) == 144, "q4_K");
static_assert(sizeof(block_q5_K) == 176, "q5_K");
static_assert(sizeof(block_q6_K) == 210, "q6_K");
static_assert(sizeof(block_iq4_nl) == 18, "iq4_nl");
static_assert(sizeof(block_iq4_xs) == 136, "iq4_xs");

/* An activation is an outlier if it exceeds OUTLIER times the mean magnitude of its block. */
#define OUTLIER 10.0f
enum { MOST_OUTLIERS = 25 }; /* of a block of 256: more cannot exceed ten times the mean */

/* What 16 codes, by magnitude, and 32 codes of one sign may add up to so that their sums times weights fit int16:
 * signed ones of 6 bits, 32 * 1023, and unsigned ones of 4, 15 * 2184. */
enum { MOST_OF_16 = 1023, MOST_OF_SIGN = 2184 };

/* 256 activations, 32 to an integer factor: x[i] = q[i] * factor[i / 32] * d, but for outliers, whose q is 0.
 *
 * |q| <= 127, factor is 1 to 8: the range of a group of 32 in eighths of the block's, so d is 1/8 of a plain int8
 * scale. Bounds: |sum32| <= 32 * 127 * 8 = 32512 fits int16, and a whole block times q6_K weights,
 * 256 * 127 * 32 * 128 * 8 = 1.07e9, or iq4_xs weights, 256 * 127 * 127 * 32 * 8 = 1.06e9, fits int32. A short last
 * block is padded with zeros.
 *
 * Two of three blocks of the 135M test model have outliers; a scale that they fit would round the others away. They
 * stay floats and multiply the weights as floats. Mean KL to float32 on that model: 0.0167 with one int8 scale per 256,
 * 0.0042 with powers of two for factors, 0.0011 with the outliers apart as well, 0.0008 with factors 1 to 8
 * (docs/accuracy.md).
 *
 * A long prompt's blocks come from the last cache for every few panels, so a block is 5 lines of 64 bytes; other sums
 * than these are made of them where a type needs them. With sums of every kind and the outliers, 10 lines of which 6 or
 * 7 were read, matrices took 1.00 to 1.19 times as long (docs/performance.md). */
typedef struct {
    int8_t q[256];
    uint8_t factor[8];
    int16_t sum32[8];   /* sum of q * factor over 32, for mins */
    int16_t nsum16[16]; /* -sum of q over 16: a chain that starts at nsum << b ends as the sum of (w - 2^b) q */
    float d;
    uint8_t wide16; /* bit j: 16 codes of group j have more than MOST_OF_16 */
    uint8_t wide32; /* bit j: codes of one sign in group j have more than MOST_OF_SIGN */
    uint16_t zero;  /* so that a block has no bytes that nobody defines */
} block_x8;

/* The outliers of a block, by column. */
typedef struct {
    float x[MOST_OUTLIERS];
    uint8_t column[MOST_OUTLIERS];
    uint8_t n, unused[2];
} outliers_x8;

static_assert(sizeof(block_x8) == 320, "x8");
static_assert(sizeof(outliers_x8) == 128, "outliers of x8");

#endif
